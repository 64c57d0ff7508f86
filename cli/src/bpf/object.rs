// SPDX-License-Identifier: GPL-2.0

//! The compiled programs. Creates their maps, and patches this kernel's offsets into their
//! instructions.

use std::{
    collections::{HashMap, HashSet},
    io::ErrorKind,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use aya::maps::{Array, Map, MapData, MapError};
use aya_obj::{
    btf::BtfFeatures,
    generated::{
        bpf_insn,
        bpf_map_type::{BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_STACK},
        BPF_PSEUDO_KFUNC_CALL, BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE,
    },
    Object as Parsed, ProgramSection,
};
use exitmeter_meter::{
    histogram,
    ledger::{Ledger, MoreHistograms},
};

use super::{attach::refused, layout::Layout, sys, Error};

/// Programs, compiled by cli/build.rs.
static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ledger.bpf.o"));

/// List of the values that are patched into the programs.
static KNOWN: &str = include_str!("../../bpf/known.h");

/// KNOWN_FIRST of cli/bpf/kernel.h: an immediate operand that stands for the first value of
/// [`KNOWN`].
const KNOWN_FIRST: i32 = 0x4558_0000;

/// `rdonly_cast` of cli/bpf/kernel.h: a call of this number is a call of bpf_rdonly_cast().
const CAST: i32 = 0x4559_0000;

/// Opcode of a call (Documentation/bpf/standardization/instruction-set.rst).
const CALL: u8 = 0x85;
/// Opcode of a 64-bit load.
const LOAD_64: u8 = 0x18;

/// Maps of one entry whose address is patched into the programs.
const DIRECT: [&str; 3] = ["cpus", "ledgers", "buckets"];

/// BUCKET_STEPS of cli/bpf/ledger.h.
const STEPS: usize = 4;
/// BUCKET_STEP of cli/bpf/ledger.h.
const STEP: usize = 2048;

/// Bytes of a ledger and the histograms behind it.
const LEDGER: u32 = (size_of::<Ledger>() + size_of::<MoreHistograms>()) as u32;

/// Bytes behind the ledgers that only the verifier needs: it allows a ledger to begin at any byte
/// of them. See also sample() of cli/bpf/ledger.bpf.c.
const BEHIND: u32 = LEDGER + (16 << 10);

/// Minimum number of vCPUs that can be marked as unmetered.
const MARKS: u32 = 4096;

/// Programs that are not loaded yet, with their maps.
#[derive(Debug)]
pub struct Object {
    parsed: Parsed,
    maps: HashMap<String, Map>,
    types: OwnedFd,
}

/// Sizes of the maps.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// vCPUs metered at a time.
    pub vcpus: u32,
    /// vCPUs known at a time, metered or not.
    pub known: u32,
    /// Possible CPUs, a power of two.
    pub cpus: u32,
    /// True if vCPUs have tables.
    pub details: bool,
}

impl Sizes {
    /// Return the sizes for at least `vcpus` vCPUs: as many ledgers as fit the next power of two of
    /// bytes.
    pub fn new(vcpus: u32, cpus: u32, details: bool) -> Self {
        let room = (vcpus * LEDGER).next_power_of_two();
        let vcpus = room / LEDGER;
        Self {
            vcpus,
            known: vcpus.saturating_mul(2).max(MARKS),
            cpus,
            details,
        }
    }

    /// Return the mask for the offset of a ledger: a power of two minus one.
    pub fn ledgers_mask(&self) -> u32 {
        (self.vcpus * LEDGER).next_power_of_two() - 1
    }
}

impl Object {
    /// Create the maps, and patch the layout into the programs.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn new(layout: &Layout, sizes: Sizes) -> Result<Self, Error> {
        let mut parsed = Parsed::parse(PROGRAMS).map_err(refused("ledger.bpf.o"))?;
        // Features of the kernels that have bpf_loop(), as far as clang uses them.
        let features = BtfFeatures::new(true, true, true, true, true, true, false);
        let types = parsed
            .fixup_and_sanitize_btf(&features)
            .map_err(refused("ledger.bpf.o"))?
            .ok_or_else(|| Error::Unknown("types in ledger.bpf.o".to_owned()))?;
        let types = sys::load_types(&types.to_bytes()).map_err(refused("types"))?;

        let mut maps = HashMap::new();
        let mut made = Vec::new();
        for (name, mut map) in parsed.maps.drain() {
            let value = map.value_size();
            match name.as_str() {
                "cpus" => map.set_value_size(value * sizes.cpus),
                "ledgers" => map.set_value_size(sizes.ledgers_mask() + 1 + BEHIND),
                "owners" | "unused" | "vms" => map.set_max_entries(sizes.vcpus),
                "vcpus" => map.set_max_entries(sizes.known),
                "tables" if sizes.details => map.set_max_entries(sizes.vcpus),
                _ => {}
            }
            let kind = map.map_type();
            // The type ids describe one entry, and some values are larger.
            if let aya_obj::Map::Btf(map) = &mut map {
                (map.def.btf_key_type_id, map.def.btf_value_type_id) = (0, 0);
            }
            let data = MapData::create(map.clone(), &name, None).map_err(no_map)?;
            made.push((name.clone(), data.fd().as_fd().as_raw_fd(), map));
            maps.insert(name, wrap(data, kind));
        }
        let text: HashSet<usize> = parsed
            .functions
            .keys()
            .map(|(section, _)| *section)
            .collect();
        let of_each = made
            .iter()
            .map(|(name, file, map)| (name.as_str(), *file, map));
        parsed
            .relocate_maps(of_each, &text)
            .map_err(refused("ledger.bpf.o"))?;
        let direct = made
            .iter()
            .filter(|(name, ..)| DIRECT.contains(&name.as_str()));
        let direct: Vec<i32> = direct.map(|(_, file, _)| *file).collect();
        let known = values(layout)?;
        for function in parsed.functions.values_mut() {
            patch(&mut function.instructions, &known, layout.cast, &direct)?;
        }
        parsed
            .relocate_calls(&text)
            .map_err(refused("ledger.bpf.o"))?;

        let mut object = Self {
            parsed,
            maps,
            types,
        };
        let mut buckets: Array<_, [u8; STEPS * STEP]> = object.map("buckets")?;
        buckets
            .set(0, bucket_table(), 0)
            .map_err(refused("buckets"))?;
        Ok(object)
    }

    /// Return a map, for filling.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Unknown`] if there is no such map.
    pub fn map<'a, T>(&'a mut self, name: &str) -> Result<T, Error>
    where
        T: TryFrom<&'a mut Map>,
    {
        let map = self.maps.get_mut(name).and_then(|map| map.try_into().ok());
        map.ok_or_else(|| Error::Unknown(format!("map {name}")))
    }

    /// Remove an array from the object and return it. Programs that use it must be loaded before.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Unknown`] if there is no such array.
    pub fn take(&mut self, name: &str) -> Result<MapData, Error> {
        match self.maps.remove(name) {
            Some(Map::Array(map)) => Ok(map),
            _ => Err(Error::Unknown(format!("map {name}"))),
        }
    }

    /// Load the program `name`.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Unknown`] if there is no such program, or the kernel's refusal.
    pub fn load(&self, name: &'static str, purpose: &sys::Purpose<'_>) -> Result<OwnedFd, Error> {
        use aya_obj::generated::bpf_prog_type::{
            BPF_PROG_TYPE_KPROBE, BPF_PROG_TYPE_RAW_TRACEPOINT, BPF_PROG_TYPE_TRACING,
        };

        let missing = || Error::Unknown(format!("program {name}"));
        let program = self.parsed.programs.get(name).ok_or_else(missing)?;
        let function = self
            .parsed
            .functions
            .get(&program.function_key())
            .ok_or_else(missing)?;
        let kind = match program.section {
            ProgramSection::KProbe => BPF_PROG_TYPE_KPROBE,
            ProgramSection::RawTracePoint => BPF_PROG_TYPE_RAW_TRACEPOINT,
            ProgramSection::FEntry { .. } => BPF_PROG_TYPE_TRACING,
            _ => return Err(missing()),
        };
        let types = self.types.as_fd();
        sys::load(kind, function, &program.license, types, purpose).map_err(refused_program(name))
    }
}

/// Return the error for a map that cannot be created.
fn no_map(error: MapError) -> Error {
    match &error {
        // Before Linux 6.0, kmalloc() limits a map's value to 4 MiB.
        MapError::CreateError { io_error, .. }
            if io_error.kind() == ErrorKind::ArgumentListTooLong =>
        {
            Error::TooLarge
        }
        _ => refused("map")(error),
    }
}

/// Wrap a map in the variant of its kind.
fn wrap(map: MapData, kind: u32) -> Map {
    match kind {
        kind if kind == BPF_MAP_TYPE_HASH as u32 => Map::HashMap(map),
        kind if kind == BPF_MAP_TYPE_STACK as u32 => Map::Stack(map),
        _ => Map::Array(map),
    }
}

/// Return the values for the names of known.h, in its order.
fn values(layout: &Layout) -> Result<Vec<u32>, Error> {
    let value = |name| {
        let found = layout.known.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, value)| *value)
            .ok_or_else(|| Error::Unknown(format!("value of {name}")))
    };
    names().map(value).collect()
}

/// Return the names that known.h lists.
fn names() -> impl Iterator<Item = &'static str> {
    KNOWN
        .lines()
        .filter_map(|line| line.strip_prefix("KNOWN(")?.strip_suffix(')'))
}

/// Patch the known values into the instructions of a function.
fn patch(
    instructions: &mut [bpf_insn],
    known: &[u32],
    cast: u32,
    direct: &[i32],
) -> Result<(), Error> {
    for instruction in instructions {
        if instruction.code == CALL && instruction.imm == CAST {
            // With id 0 the call is invalid, and the verifier wants to see that it is never
            // reached.
            instruction.set_src_reg(BPF_PSEUDO_KFUNC_CALL as u8);
            instruction.imm = cast as i32;
        } else if instruction.code == LOAD_64 {
            let is_map = u32::from(instruction.src_reg()) == BPF_PSEUDO_MAP_FD;
            if is_map && direct.contains(&instruction.imm) {
                instruction.set_src_reg(BPF_PSEUDO_MAP_VALUE as u8);
            }
        } else if (KNOWN_FIRST..CAST).contains(&instruction.imm) {
            let place = (instruction.imm - KNOWN_FIRST) as usize;
            let value = known
                .get(place)
                .ok_or_else(|| Error::Unknown(format!("number {place} of known.h")))?;
            instruction.imm = *value as i32;
        }
    }
    Ok(())
}

/// Return the table by which bucket_of() of cli/bpf/ledger.bpf.c finds the bucket of a time.
fn bucket_table() -> [u8; STEPS * STEP] {
    let mut table = [0; STEPS * STEP];
    for (place, bucket) in table.iter_mut().enumerate() {
        let ticks = ((place % STEP) as u64) << (5 + 9 * (place / STEP));
        *bucket = histogram::bucket(ticks) as u8;
    }
    table
}

/// Return the error for a program that the kernel refuses.
fn refused_program(name: &'static str) -> impl FnOnce(sys::Refusal) -> Error {
    move |refusal| {
        // The last lines of the verifier's log give the reason.
        let lines: Vec<&str> = refusal.log.lines().collect();
        let from = lines.len().saturating_sub(12);
        match refused(name)(refusal.error) {
            // The verifier refuses a program with EACCES and a log.
            Error::NoRight | Error::Refused { .. } if !lines.is_empty() => Error::Refused {
                program: name.to_owned(),
                error: lines[from..].join("; "),
            },
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Return the bucket of `ticks` as bucket_of() of cli/bpf/ledger.bpf.c does.
    fn bucket(table: &[u8], ticks: u64) -> usize {
        let steps = [(16, 5), (25, 14), (34, 23), (43, 32)];
        let step = steps.iter().position(|(end, _)| ticks >> end == 0);
        match step {
            Some(step) => table[step * STEP + (ticks >> steps[step].1) as usize].into(),
            None => histogram::BUCKETS - 1,
        }
    }

    #[test]
    fn bucket_table_matches_the_meter() {
        let table = bucket_table();
        for ticks in 0..1 << 17 {
            assert_eq!(bucket(&table, ticks), histogram::bucket(ticks), "{ticks}");
        }
        for power in 16..64 {
            for part in 4_u64..8 {
                let begin = part << (power - 2);
                for ticks in [begin - 1, begin, begin + 1] {
                    assert_eq!(bucket(&table, ticks), histogram::bucket(ticks), "{ticks}");
                }
            }
        }
    }

    #[test]
    fn object_uses_exactly_the_known_values() {
        let parsed = Parsed::parse(PROGRAMS).expect("an object");
        let names: Vec<&str> = names().collect();
        let mut used = HashSet::new();
        for function in parsed.functions.values() {
            for instruction in &function.instructions {
                let is_known = instruction.code != LOAD_64 && instruction.imm >= KNOWN_FIRST;
                if is_known && instruction.imm < CAST {
                    used.insert((instruction.imm - KNOWN_FIRST) as usize);
                }
            }
        }
        let unused: Vec<_> = (0..names.len()).filter(|at| !used.contains(at)).collect();
        assert!(unused.is_empty(), "{unused:?} of {names:?}");
        assert!(used.iter().all(|at| *at < names.len()), "{used:?}");
    }
}
