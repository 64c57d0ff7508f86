// SPDX-License-Identifier: GPL-2.0

//! The runs of the study: host, guest and paging.

use std::{fmt, str::FromStr};

use lab::host::Host;

/// A kind of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// Linux in QEMU's microvm, as the lab's command `guest` boots it.
    Microvm,
    /// Microvm with two vCPUs.
    Smp,
    /// Microvm with Debian's cloud kernel in guest and host.
    Cloud,
    /// Linux as packaged, in QEMU's q35 with firmware, PCI, VGA and a serial console.
    Pc,
    /// Linux in a VMM that has two serial ports and nothing else.
    Tiny,
    /// Loops around one instruction each, without an operating system.
    Loops,
}

/// Mapping of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// The CPU maps it: EPT or NPT.
    Nested,
    /// KVM maps it, and writes the page tables that the CPU walks.
    Shadow,
}

/// One run. It has a host of its own, so it starts with an empty ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Host that the guest runs on.
    pub host: Host,
    /// Guest that is recorded.
    pub guest: GuestKind,
    /// Mapping of the guest's memory.
    pub paging: Paging,
}

const fn run(host: Host, guest: GuestKind, paging: Paging) -> Run {
    Run {
        host,
        guest,
        paging,
    }
}

/// All runs, in the order of the tables. On QEMU's emulated AMD host, no Linux boots without nested paging.
pub const RUNS: [Run; 16] = [
    run(Host::Intel, GuestKind::Microvm, Paging::Nested),
    run(Host::Intel, GuestKind::Microvm, Paging::Shadow),
    run(Host::Intel, GuestKind::Smp, Paging::Nested),
    run(Host::Intel, GuestKind::Cloud, Paging::Nested),
    run(Host::Intel, GuestKind::Pc, Paging::Nested),
    run(Host::Intel, GuestKind::Tiny, Paging::Nested),
    run(Host::Intel, GuestKind::Tiny, Paging::Shadow),
    run(Host::Intel, GuestKind::Loops, Paging::Nested),
    run(Host::Intel, GuestKind::Loops, Paging::Shadow),
    run(Host::Amd, GuestKind::Microvm, Paging::Nested),
    run(Host::Amd, GuestKind::Smp, Paging::Nested),
    run(Host::Amd, GuestKind::Cloud, Paging::Nested),
    run(Host::Amd, GuestKind::Pc, Paging::Nested),
    run(Host::Amd, GuestKind::Tiny, Paging::Nested),
    run(Host::Amd, GuestKind::Loops, Paging::Nested),
    run(Host::Amd, GuestKind::Loops, Paging::Shadow),
];

impl GuestKind {
    const ALL: [Self; 6] = [
        Self::Microvm,
        Self::Smp,
        Self::Cloud,
        Self::Pc,
        Self::Tiny,
        Self::Loops,
    ];

    /// Return the guest's part of the names of runs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::Smp => "smp",
            Self::Cloud => "cloud",
            Self::Pc => "pc",
            Self::Tiny => "tiny",
            Self::Loops => "loops",
        }
    }

    /// Return the title in tables and pictures.
    pub fn title(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::Smp => "microvm, 2 vCPUs",
            Self::Cloud => "microvm, cloud kernel",
            Self::Pc => "q35",
            Self::Tiny => "tiny VMM",
            Self::Loops => "loops",
        }
    }
}

impl Paging {
    /// Return the paging's part of the names of runs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nested => "nested",
            Self::Shadow => "shadow",
        }
    }
}

impl Run {
    /// Return the parameters of KVM's module.
    pub fn kvm_parameters(self) -> &'static str {
        match (self.paging, self.host) {
            (Paging::Nested, _) => "",
            (Paging::Shadow, Host::Intel) => "ept=0",
            (Paging::Shadow, Host::Amd) => "npt=0",
        }
    }

    /// Return true if the TSC counts the emulator's instructions. Otherwise it is the wall clock of the machine that runs the
    /// emulator: Linux guests get stuck in an AMD host that counts.
    pub fn counts_instructions(self) -> bool {
        self.host == Host::Intel || self.guest == GuestKind::Loops
    }

    /// Return the title in tables and pictures: host, guest and, unless it is nested, paging.
    pub fn title(self) -> String {
        let host = match self.host {
            Host::Intel => "Intel",
            Host::Amd => "AMD",
        };
        let paging = match self.paging {
            Paging::Nested => "",
            Paging::Shadow => ", shadow paging",
        };
        format!("{host}, {}{paging}", self.guest.title())
    }
}

/// Format the name in files and on command lines, such as `intel-microvm-nested`.
impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (guest, paging) = (self.guest.name(), self.paging.name());
        write!(f, "{}-{guest}-{paging}", self.host)
    }
}

impl FromStr for Run {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = RUNS.into_iter().find(|run| run.to_string() == name);
        let made = || {
            let mut words = name.split('-');
            let host = match words.next()? {
                "intel" => Host::Intel,
                "amd" => Host::Amd,
                _ => return None,
            };
            let word = words.next()?;
            let guest = GuestKind::ALL
                .into_iter()
                .find(|guest| guest.name() == word)?;
            let paging = match words.next()? {
                "nested" => Paging::Nested,
                "shadow" => Paging::Shadow,
                _ => return None,
            };
            words.next().is_none().then_some(run(host, guest, paging))
        };
        known
            .or_else(made)
            .ok_or_else(|| format!("there is no run {name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_runs_are_unique_and_parse() {
        for (place, run) in RUNS.into_iter().enumerate() {
            assert_eq!(run.to_string().parse(), Ok(run));
            let same = |other: &Run| other.to_string() == run.to_string();
            assert_eq!(RUNS.iter().position(same), Some(place));
        }
        assert!("intel-loops".parse::<Run>().is_err());
        assert!("intel-loops-nested-x".parse::<Run>().is_err());
    }
}
