// SPDX-License-Identifier: GPL-2.0

//! The ways to ask the host's meter: the CPUID instruction, or this guest's kernel to execute it.
//!
//! A host that has the module loaded with `leaf_cpl=0` answers a guest's kernel alone. Linux
//! executes CPUID for who may read /dev/cpu/N/cpuid, which its driver `cpuid` makes: a read of
//! 16 bytes is one instruction (`cpuid_read_f` in arch/x86/kernel/cpuid.c).

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt as _,
};

use exitmeter_guest::{Cpuid, Error, Instruction, Isa, Meter, Registers};
use rustix::thread::sched_getcpu;

/// Why no meter answers by any way.
#[derive(Debug, thiserror::Error)]
pub enum Silence {
    /// There is none, or one that this tool does not know.
    #[error(transparent)]
    Meter(#[from] Error),
    /// None answers the instruction, and this guest's kernel cannot be asked to execute it.
    #[error(
        "{}; or, if it answers only this guest's kernel (leaf_cpl=0): {} ({error})",
        Error::NoMeter,
        remedy(error)
    )]
    NoDevice {
        /// What the system says of the device.
        error: io::Error,
    },
    /// This guest's kernel is to be asked, and cannot be.
    #[error(
        "code is told to this guest's kernel alone: {} ({error})",
        remedy(error)
    )]
    NoKernel {
        /// What the system says of the device.
        error: io::Error,
    },
    /// This guest's kernel stopped to execute it, as when the CPU went offline.
    #[error("/dev/cpu/*/cpuid cannot be read: {error}")]
    Unreadable {
        /// What the system says.
        error: io::Error,
    },
}

/// Return what makes this guest's kernel answer, by what the system says of its device.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "run 'modprobe cpuid' as root here, and this command as root",
        ErrorKind::PermissionDenied => "run this command as root",
        _ => "make /dev/cpu/*/cpuid readable",
    }
}

/// The way by which a meter answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The instruction, executed by this process.
    Instruction,
    /// The driver of /dev/cpu/N/cpuid.
    Device,
}

impl Way {
    /// Open it, for questions from now on.
    ///
    /// # Errors
    ///
    /// When this guest has no device of this CPU, or one that may not be opened.
    pub fn open(self) -> Result<Asker, Silence> {
        // Of the CPU that this runs on: its kernel asks there without an interrupt.
        self.open_on(sched_getcpu() as u32)
    }

    /// Open it, for questions on one CPU.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_on(self, cpu: u32) -> Result<Asker, Silence> {
        Ok(match self {
            Way::Instruction => Asker::Instruction,
            Way::Device => File::open(format!("/dev/cpu/{cpu}/cpuid"))
                .map(|file| Asker::Device { file, error: None })
                .map_err(|error| Silence::NoDevice { error })?,
        })
    }
}

/// An open way to ask.
#[derive(Debug)]
pub enum Asker {
    /// See [`Way::Instruction`].
    Instruction,
    /// See [`Way::Device`].
    Device {
        /// The device of one CPU.
        file: File,
        /// Why a question was not answered, if one was not.
        error: Option<io::Error>,
    },
}

impl Asker {
    /// Demand that all questions so far were answered. Takes no memory.
    ///
    /// # Errors
    ///
    /// When one was not: what was read since then is worth nothing.
    pub fn check(&mut self) -> Result<(), Silence> {
        match self {
            Asker::Device { error, .. } => match error.take() {
                Some(error) => Err(Silence::Unreadable { error }),
                None => Ok(()),
            },
            Asker::Instruction => Ok(()),
        }
    }
}

impl Cpuid for Asker {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        match self {
            Asker::Instruction => Instruction.ask(leaf, subleaf),
            Asker::Device { file, error } => {
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

/// The registers in the 16 bytes that the device gives: eax, ebx, ecx, edx.
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

/// Counts the questions of a search that may fail.
struct Counted<'a>(&'a mut Asker, u64);

impl Cpuid for Counted<'_> {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        self.1 = self.1.wrapping_add(1);
        self.0.ask(leaf, subleaf)
    }
}

/// Find the meter by the first way on which one answers, have `read` use it, and return the way and
/// what `read` returned. `likely` says whose CPU this seems to be (see [`Meter::find`]).
///
/// Questions that were asked in vain on the first way are among those of the meter.
///
/// # Errors
///
/// When no way has a meter, or one of another version.
pub fn find<T>(
    likely: Isa,
    read: impl FnOnce(Meter<&mut dyn Cpuid>) -> T,
) -> Result<(Way, T), Silence> {
    let mut asker = Asker::Instruction;
    let mut counted = Counted(&mut asker, 0);
    match Meter::find(&mut counted as &mut dyn Cpuid, likely) {
        Ok(meter) => return Ok((Way::Instruction, read(meter))),
        Err(Error::NoMeter) => {}
        Err(error) => return Err(error.into()),
    }
    let in_vain = counted.1;
    let mut asker = Way::Device.open()?;
    let told = Meter::find(&mut asker as &mut dyn Cpuid, likely)
        .map(|meter| read(meter.with_earlier(in_vain)));
    asker.check()?;
    Ok((Way::Device, told?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    /// A file stands in for the device: the same bytes at the same places.
    #[test]
    fn a_question_is_a_place_in_the_device_and_16_bytes_its_answer() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        let bytes: Vec<u8> = (0..=255).collect();
        file.write_all(&bytes).expect("room");
        let file = File::open(file.path()).expect("it is there");
        let mut asker = Asker::Device { file, error: None };
        let answer = Registers {
            eax: 0x0706_0504,
            ebx: 0x0b0a_0908,
            ecx: 0x0f0e_0d0c,
            edx: 0x1312_1110,
        };
        assert_eq!(asker.ask(4, 0), answer);
        asker.check().expect("an answer");
        // The subleaf is the upper half, which is behind this file's end.
        assert_eq!(asker.ask(4, 1), Registers::default());
        assert_eq!(asker.ask(4, 0), answer);
        assert!(matches!(asker.check(), Err(Silence::Unreadable { .. })));
    }

    #[test]
    fn the_remedy_fits_what_is_missing() {
        for (kind, words) in [
            (ErrorKind::NotFound, "run 'modprobe cpuid' as root here"),
            (ErrorKind::PermissionDenied, "run this command as root"),
        ] {
            let text = Silence::NoDevice { error: kind.into() }.to_string();
            assert!(
                text.contains("leaf_cpl=0") && text.contains(words),
                "{text}"
            );
            assert!(text.contains("a leaf_map other than 0; or,"), "{text}");
            let text = Silence::NoKernel { error: kind.into() }.to_string();
            assert!(!text.contains("leaf_cpl") && text.contains(words), "{text}");
        }
    }
}
