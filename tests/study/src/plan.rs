// SPDX-License-Identifier: GPL-2.0

//! Which guest runs on which host, and how its memory is mapped.

use std::{fmt, str::FromStr};

use lab::host::Host;

/// What runs under KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// Linux in QEMU's microvm, as the lab's command `guest` boots it.
    Microvm,
    /// The same with two vCPUs.
    Smp,
    /// The same with Debian's kernel for clouds, which the host has as well.
    Cloud,
    /// Linux as packaged, in QEMU's q35 with firmware, PCI, VGA and a serial console.
    Pc,
    /// Linux in a VMM that has two serial ports and nothing else.
    Tiny,
    /// Loops around one instruction each, without an operating system.
    Loops,
}

/// How the guest's memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// By the CPU: EPT or NPT.
    Nested,
    /// By KVM, which writes the page tables that the CPU walks.
    Shadow,
}

/// One run on one host of its own, so with a fresh ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The host.
    pub host: Host,
    /// The guest.
    pub guest: Guest,
    /// How its memory is mapped.
    pub paging: Paging,
}

const fn run(host: Host, guest: Guest, paging: Paging) -> Run {
    Run {
        host,
        guest,
        paging,
    }
}

/// All runs, in the order of the tables. On the AMD host, as QEMU emulates it, no Linux boots without nested paging.
pub const RUNS: [Run; 16] = [
    run(Host::Intel, Guest::Microvm, Paging::Nested),
    run(Host::Intel, Guest::Microvm, Paging::Shadow),
    run(Host::Intel, Guest::Smp, Paging::Nested),
    run(Host::Intel, Guest::Cloud, Paging::Nested),
    run(Host::Intel, Guest::Pc, Paging::Nested),
    run(Host::Intel, Guest::Tiny, Paging::Nested),
    run(Host::Intel, Guest::Tiny, Paging::Shadow),
    run(Host::Intel, Guest::Loops, Paging::Nested),
    run(Host::Intel, Guest::Loops, Paging::Shadow),
    run(Host::Amd, Guest::Microvm, Paging::Nested),
    run(Host::Amd, Guest::Smp, Paging::Nested),
    run(Host::Amd, Guest::Cloud, Paging::Nested),
    run(Host::Amd, Guest::Pc, Paging::Nested),
    run(Host::Amd, Guest::Tiny, Paging::Nested),
    run(Host::Amd, Guest::Loops, Paging::Nested),
    run(Host::Amd, Guest::Loops, Paging::Shadow),
];

impl Guest {
    const ALL: [Self; 6] = [
        Self::Microvm,
        Self::Smp,
        Self::Cloud,
        Self::Pc,
        Self::Tiny,
        Self::Loops,
    ];

    /// Its name in those of runs.
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

    /// What it is, for people.
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
    /// Its name in those of runs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nested => "nested",
            Self::Shadow => "shadow",
        }
    }
}

impl Run {
    /// The parameters of KVM's module.
    pub fn kvm(self) -> &'static str {
        match (self.paging, self.host) {
            (Paging::Nested, _) => "",
            (Paging::Shadow, Host::Intel) => "ept=0",
            (Paging::Shadow, Host::Amd) => "npt=0",
        }
    }

    /// Whether its TSC counts what the emulator executes; else it is the wall clock of the machine that emulates. Linux
    /// guests get stuck in an AMD host that counts.
    pub fn counts_instructions(self) -> bool {
        self.host == Host::Intel || self.guest == Guest::Loops
    }

    /// What it is, for people: host, guest and, when it is not the usual one, paging.
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

/// Its name in files and on command lines, such as `intel-microvm-nested`.
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
            let guest = Guest::ALL.into_iter().find(|guest| guest.name() == word)?;
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
    fn runs_have_names_of_their_own() {
        for (place, run) in RUNS.into_iter().enumerate() {
            assert_eq!(run.to_string().parse(), Ok(run));
            let same = |other: &Run| other.to_string() == run.to_string();
            assert_eq!(RUNS.iter().position(same), Some(place));
        }
        assert!("intel-loops".parse::<Run>().is_err());
        assert!("intel-loops-nested-x".parse::<Run>().is_err());
    }
}
