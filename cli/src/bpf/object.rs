// SPDX-License-Identifier: GPL-2.0

//! The compiled programs: makes their maps, and puts into their instructions what is known of this kernel.

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

/// The programs, compiled by cli/build.rs.
static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ledger.bpf.o"));

/// What the programs are to be told of this kernel.
static KNOWN: &str = include_str!("../../bpf/known.h");

/// KNOWN_FIRST of cli/bpf/kernel.h: in an instruction it stands for the first of [`KNOWN`].
const KNOWN_FIRST: i32 = 0x4558_0000;

/// `rdonly_cast` of cli/bpf/kernel.h: an instruction that calls this calls bpf_rdonly_cast().
const CAST: i32 = 0x4559_0000;

/// The instruction that calls a function (Documentation/bpf/standardization/instruction-set.rst).
const CALL: u8 = 0x85;
/// That which loads 64 bits.
const LOAD_64: u8 = 0x18;

/// Maps of one entry whose address the programs have.
const DIRECT: [&str; 3] = ["heres", "ledgers", "buckets"];

/// BUCKET_STEPS and BUCKET_STEP of cli/bpf/ledger.h.
const STEPS: usize = 4;
/// See [`STEPS`].
const STEP: usize = 2048;

/// Bytes of a ledger, with the histograms behind it.
const LEDGER: u32 = (size_of::<Ledger>() + size_of::<MoreHistograms>()) as u32;

/// Room behind the ledgers that only the verifier wants: a ledger at any byte of theirs, and see sample() of
/// cli/bpf/ledger.bpf.c.
const BEHIND: u32 = LEDGER + (16 << 10);

/// The least room for vCPUs that are marked as not metered.
const MARKS: u32 = 4096;

/// The programs and their maps, none of them loaded yet.
#[derive(Debug)]
pub struct Object {
    parsed: Parsed,
    maps: HashMap<String, Map>,
    types: OwnedFd,
}

/// What sizes the maps.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// vCPUs that are metered at a time.
    pub vcpus: u32,
    /// vCPUs that are known, with those that are not metered.
    pub known: u32,
    /// CPUs that there can be: a power of two.
    pub cpus: u32,
    /// Whether vCPUs have tables.
    pub details: bool,
}

impl Sizes {
    /// Sizes for so many vCPUs, or some more: as many as fit the power of two that the ledgers' room is.
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

    /// A power of two, less one, that no ledger's first byte exceeds.
    pub fn ledgers_mask(&self) -> u32 {
        (self.vcpus * LEDGER).next_power_of_two() - 1
    }
}

impl Object {
    /// Make the maps, and tell the programs what the layout says.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn new(layout: &Layout, sizes: Sizes) -> Result<Self, Error> {
        let mut parsed = Parsed::parse(PROGRAMS).map_err(refused("ledger.bpf.o"))?;
        // What the kernels have that have bpf_loop(), and clang uses.
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
                "heres" => map.set_value_size(value * sizes.cpus),
                "ledgers" => map.set_value_size(sizes.ledgers_mask() + 1 + BEHIND),
                "owners" | "unused" | "vms" => map.set_max_entries(sizes.vcpus),
                "vcpus" => map.set_max_entries(sizes.known),
                "tables" if sizes.details => map.set_max_entries(sizes.vcpus),
                _ => {}
            }
            let kind = map.map_type();
            // The types are of one entry, and some values are larger.
            if let aya_obj::Map::Btf(map) = &mut map {
                (map.def.btf_key_type_id, map.def.btf_value_type_id) = (0, 0);
            }
            let data = MapData::create(map.clone(), &name, None).map_err(no_map)?;
            made.push((name.clone(), data.fd().as_fd().as_raw_fd(), map));
            maps.insert(name, wrapped(data, kind));
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
            tell(&mut function.instructions, &known, layout.cast, &direct)?;
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
        buckets.set(0, table(), 0).map_err(refused("buckets"))?;
        Ok(object)
    }

    /// Return a map, to be filled.
    ///
    /// # Errors
    ///
    /// [`Error::Unknown`].
    pub fn map<'a, T>(&'a mut self, name: &str) -> Result<T, Error>
    where
        T: TryFrom<&'a mut Map>,
    {
        let map = self.maps.get_mut(name).and_then(|map| map.try_into().ok());
        map.ok_or_else(|| Error::Unknown(format!("map {name}")))
    }

    /// Return an array, to be kept. The programs that use it have to be loaded before.
    ///
    /// # Errors
    ///
    /// [`Error::Unknown`].
    pub fn take(&mut self, name: &str) -> Result<MapData, Error> {
        match self.maps.remove(name) {
            Some(Map::Array(map)) => Ok(map),
            _ => Err(Error::Unknown(format!("map {name}"))),
        }
    }

    /// Load a program of this name.
    ///
    /// # Errors
    ///
    /// [`Error::Unknown`], and why the kernel does not take it.
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

/// Return why there is no map.
fn no_map(error: MapError) -> Error {
    match &error {
        // Before Linux 6.0 no value was larger than what kmalloc() gives, which is 4 MiB.
        MapError::CreateError { io_error, .. }
            if io_error.kind() == ErrorKind::ArgumentListTooLong =>
        {
            Error::TooLarge
        }
        _ => refused("map")(error),
    }
}

/// Return a map as one of its kind.
fn wrapped(map: MapData, kind: u32) -> Map {
    match kind {
        kind if kind == BPF_MAP_TYPE_HASH as u32 => Map::HashMap(map),
        kind if kind == BPF_MAP_TYPE_STACK as u32 => Map::Stack(map),
        _ => Map::Array(map),
    }
}

/// Return the values of known.h, in its order.
fn values(layout: &Layout) -> Result<Vec<u32>, Error> {
    let value = |name| {
        let found = layout.known.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, value)| *value)
            .ok_or_else(|| Error::Unknown(format!("value of {name}")))
    };
    names().map(value).collect()
}

/// The names that known.h lists.
fn names() -> impl Iterator<Item = &'static str> {
    KNOWN
        .lines()
        .filter_map(|line| line.strip_prefix("KNOWN(")?.strip_suffix(')'))
}

/// Put into the instructions of a function what is known.
fn tell(
    instructions: &mut [bpf_insn],
    known: &[u32],
    cast: u32,
    direct: &[i32],
) -> Result<(), Error> {
    for instruction in instructions {
        if instruction.code == CALL && instruction.imm == CAST {
            // A function of no id is none, and the verifier wants to see that it is never called.
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

/// Return the table from which the programs take the bucket of a time, as bucket_of() of cli/bpf/ledger.bpf.c has it.
fn table() -> [u8; STEPS * STEP] {
    let mut table = [0; STEPS * STEP];
    for (place, bucket) in table.iter_mut().enumerate() {
        let ticks = ((place % STEP) as u64) << (5 + 9 * (place / STEP));
        *bucket = histogram::bucket(ticks) as u8;
    }
    table
}

/// Return why the kernel does not take a program.
fn refused_program(name: &'static str) -> impl FnOnce(sys::Refusal) -> Error {
    move |refusal| {
        // The verifier's last lines say what it does not like.
        let lines: Vec<&str> = refusal.log.lines().collect();
        let from = lines.len().saturating_sub(12);
        match refused(name)(refusal.error) {
            // The verifier's own refusals of a program come as EACCES, with a log.
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

    /// As bucket_of() of cli/bpf/ledger.bpf.c.
    fn bucket(table: &[u8], ticks: u64) -> usize {
        let steps = [(16, 5), (25, 14), (34, 23), (43, 32)];
        let step = steps.iter().position(|(end, _)| ticks >> end == 0);
        match step {
            Some(step) => table[step * STEP + (ticks >> steps[step].1) as usize].into(),
            None => histogram::BUCKETS - 1,
        }
    }

    #[test]
    fn the_table_has_the_bucket_of_each_time() {
        let table = table();
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
    fn the_object_has_instructions_for_each_known_value_and_no_other() {
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
