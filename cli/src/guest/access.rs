// SPDX-License-Identifier: GPL-2.0

//! Ways to query the host's meter: execute CPUID in this process, or let the guest's kernel execute
//! it.
//!
//! A module loaded with `leaf_cpl=0` answers only a guest's kernel. Linux executes CPUID for a
//! process that may read /dev/cpu/N/cpuid, a device of its driver `cpuid`. A read of 16 bytes is
//! one instruction (`cpuid_read_f` in arch/x86/kernel/cpuid.c).

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt as _,
};

use exitmeter_guest::{Cpuid, Error, Instruction, Isa, Meter, Registers};
use rustix::thread::sched_getcpu;

/// A reason why no meter answers.
#[derive(Debug, thiserror::Error)]
pub enum NoAnswer {
    /// There is no meter, or its version is unknown.
    #[error(transparent)]
    Meter(#[from] Error),
    /// No meter answers the instruction, and the guest's kernel cannot be asked to execute it.
    #[error(
        "{}; or, if it answers only this guest's kernel (leaf_cpl=0): {} ({error})",
        Error::NoMeter,
        remedy(error)
    )]
    NoDevice {
        /// Error of the device.
        error: io::Error,
    },
    /// The guest's kernel must be asked, and cannot be.
    #[error("only this guest's kernel can read code: {} ({error})", remedy(error))]
    NoKernel {
        /// Error of the device.
        error: io::Error,
    },
    /// The guest's kernel stopped executing CPUID, as when the CPU goes offline.
    #[error("/dev/cpu/*/cpuid cannot be read: {error}")]
    Unreadable {
        /// Error of the device.
        error: io::Error,
    },
}

/// Return the remedy for an error of the device.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "run 'modprobe cpuid' as root here, and this command as root",
        ErrorKind::PermissionDenied => "run this command as root",
        _ => "make /dev/cpu/*/cpuid readable",
    }
}

/// Way to query a meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// CPUID, executed by this process.
    Instruction,
    /// The driver of /dev/cpu/N/cpuid.
    Device,
}

impl Access {
    /// Open the way for queries.
    ///
    /// # Errors
    ///
    /// Returns an error if this guest has no device for this CPU, or it may not be opened.
    pub fn open(self) -> Result<Querier, NoAnswer> {
        // Choose the CPU that this runs on: its kernel needs no interrupt there.
        self.open_on(sched_getcpu() as u32)
    }

    /// Open the way for queries on one CPU.
    ///
    /// # Errors
    ///
    /// See [`Self::open`].
    pub fn open_on(self, cpu: u32) -> Result<Querier, NoAnswer> {
        Ok(match self {
            Access::Instruction => Querier::Instruction,
            Access::Device => File::open(format!("/dev/cpu/{cpu}/cpuid"))
                .map(|file| Querier::Device { file, error: None })
                .map_err(|error| NoAnswer::NoDevice { error })?,
        })
    }
}

/// An open way to query the meter.
#[derive(Debug)]
pub enum Querier {
    /// See [`Access::Instruction`].
    Instruction,
    /// See [`Access::Device`].
    Device {
        /// Device of one CPU.
        file: File,
        /// First error of a query, if any.
        error: Option<io::Error>,
    },
}

impl Querier {
    /// Check that all queries so far were answered. Does not allocate.
    ///
    /// # Errors
    ///
    /// Returns the error of the first query that failed. The answers since then are worthless.
    pub fn check(&mut self) -> Result<(), NoAnswer> {
        match self {
            Querier::Device { error, .. } => match error.take() {
                Some(error) => Err(NoAnswer::Unreadable { error }),
                None => Ok(()),
            },
            Querier::Instruction => Ok(()),
        }
    }
}

impl Cpuid for Querier {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        match self {
            Querier::Instruction => Instruction.ask(leaf, subleaf),
            Querier::Device { file, error } => {
                let mut answer = [0; 16];
                let place = u64::from(subleaf) << 32 | u64::from(leaf);
                match file.read_exact_at(&mut answer, place) {
                    Ok(()) => registers(&answer),
                    Err(new) => {
                        error.get_or_insert(new);
                        Registers::default()
                    }
                }
            }
        }
    }
}

/// Return the registers from the 16 bytes of the device: eax, ebx, ecx, edx.
fn registers(bytes: &[u8; 16]) -> Registers {
    let mut words = bytes.chunks_exact(4).map(|bytes| {
        let mut word = [0; 4];
        word.copy_from_slice(bytes);
        u32::from_ne_bytes(word)
    });
    let mut next = || words.next().unwrap_or(0);
    Registers {
        eax: next(),
        ebx: next(),
        ecx: next(),
        edx: next(),
    }
}

/// A [`Cpuid`] that counts its queries of all leaves, for a search that may fail.
struct Counted<'a>(&'a mut Querier, u64);

impl Cpuid for Counted<'_> {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        self.1 = self.1.wrapping_add(1);
        self.0.ask(leaf, subleaf)
    }
}

/// Find the meter by the first way on which one answers. Returns the way, and what `read` returns
/// for the meter. `likely` is the probable vendor (see [`Meter::find`]).
///
/// The meter's count of queries includes those that failed on the first way.
///
/// # Errors
///
/// Returns an error if no way has a meter, or its version is unknown.
pub fn find<T>(
    likely: Isa,
    read: impl FnOnce(Meter<&mut dyn Cpuid>) -> T,
) -> Result<(Access, T), NoAnswer> {
    let mut querier = Querier::Instruction;
    let mut counted = Counted(&mut querier, 0);
    match Meter::find(&mut counted as &mut dyn Cpuid, likely) {
        Ok(meter) => return Ok((Access::Instruction, read(meter))),
        Err(Error::NoMeter) => {}
        Err(error) => return Err(error.into()),
    }
    let failed_queries = counted.1;
    let mut querier = Access::Device.open()?;
    let result = Meter::find(&mut querier as &mut dyn Cpuid, likely)
        .map(|meter| read(meter.with_earlier(failed_queries)));
    querier.check()?;
    Ok((Access::Device, result?))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A file stands in for the device, with the same bytes at the same places.
    #[test]
    fn device_queries_use_the_leaf_as_offset() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        let bytes: Vec<u8> = (0..=255).collect();
        file.write_all(&bytes).expect("room");
        let file = File::open(file.path()).expect("it is there");
        let mut querier = Querier::Device { file, error: None };
        let answer = Registers {
            eax: 0x0706_0504,
            ebx: 0x0b0a_0908,
            ecx: 0x0f0e_0d0c,
            edx: 0x1312_1110,
        };
        assert_eq!(querier.ask(4, 0), answer);
        querier.check().expect("an answer");
        // The subleaf is the upper half of the offset, which is past the end of this file.
        assert_eq!(querier.ask(4, 1), Registers::default());
        assert_eq!(querier.ask(4, 0), answer);
        assert!(matches!(querier.check(), Err(NoAnswer::Unreadable { .. })));
    }

    #[test]
    fn remedy_depends_on_the_error() {
        for (kind, words) in [
            (ErrorKind::NotFound, "run 'modprobe cpuid' as root here"),
            (ErrorKind::PermissionDenied, "run this command as root"),
        ] {
            let text = NoAnswer::NoDevice { error: kind.into() }.to_string();
            assert!(
                text.contains("leaf_cpl=0") && text.contains(words),
                "{text}"
            );
            assert!(text.contains("a leaf_map other than 0; or,"), "{text}");
            let text = NoAnswer::NoKernel { error: kind.into() }.to_string();
            assert!(!text.contains("leaf_cpl") && text.contains(words), "{text}");
        }
    }
}
