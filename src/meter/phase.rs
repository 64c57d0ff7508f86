// SPDX-License-Identifier: GPL-2.0

//! The phases of a vCPU's life. At any moment it is in exactly one.

/// Where a vCPU's time goes.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest runs: VM entry to VM exit.
    Guest = 0,
    /// KVM works for the vCPU: VM exit, or load, to VM entry or put.
    Kernel = 1,
    /// The VMM runs in user space: from put, not scheduled out, to load.
    User = 2,
    /// The vCPU sleeps by its own wish (HLT, waiting): scheduled out, not preempted.
    Blocked = 3,
    /// The host took the CPU away: scheduled out while runnable.
    Preempted = 4,
}

impl Phase {
    /// How many phases there are.
    pub const COUNT: usize = 5;

    /// Every phase, in the order of their numbers.
    pub const ALL: [Phase; Self::COUNT] = [
        Phase::Guest,
        Phase::Kernel,
        Phase::User,
        Phase::Blocked,
        Phase::Preempted,
    ];

    /// The phase's name, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Guest => "guest",
            Phase::Kernel => "kernel",
            Phase::User => "user",
            Phase::Blocked => "blocked",
            Phase::Preempted => "preempted",
        }
    }

    /// The phase with a number; `None` above 4.
    pub const fn from_number(number: u32) -> Option<Phase> {
        match number {
            0 => Some(Phase::Guest),
            1 => Some(Phase::Kernel),
            2 => Some(Phase::User),
            3 => Some(Phase::Blocked),
            4 => Some(Phase::Preempted),
            _ => None,
        }
    }
}
