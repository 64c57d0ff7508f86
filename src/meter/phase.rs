// SPDX-License-Identifier: GPL-2.0

//! Phases of a vCPU's life. A vCPU is in exactly one at any moment.

/// Phase of a vCPU: the place where its time goes.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest runs: VM entry to VM exit.
    Guest = 0,
    /// KVM works for the vCPU: VM exit, or load, to VM entry or put.
    Kernel = 1,
    /// The VMM runs in user space: from put, not scheduled out, to load.
    User = 2,
    /// The vCPU sleeps by its own wish, for example after HLT: scheduled out in `kvm_vcpu_block()`.
    Halted = 3,
    /// The host runs something else: scheduled out while runnable.
    Preempted = 4,
    /// KVM sleeps on behalf of the host, for example until swapped-out memory is back: scheduled
    /// out, neither runnable nor halted.
    Waiting = 5,
}

impl Phase {
    /// The number of phases.
    pub const COUNT: usize = 6;

    /// Every phase, in numeric order.
    pub const ALL: [Phase; Self::COUNT] = [
        Phase::Guest,
        Phase::Kernel,
        Phase::User,
        Phase::Halted,
        Phase::Preempted,
        Phase::Waiting,
    ];

    /// Every phase, in display order: the two kinds of sleep side by side.
    pub const SHOWN: [Phase; Self::COUNT] = [
        Phase::Guest,
        Phase::Kernel,
        Phase::User,
        Phase::Halted,
        Phase::Waiting,
        Phase::Preempted,
    ];

    /// Return the phase's name, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Guest => "guest",
            Phase::Kernel => "kernel",
            Phase::User => "user",
            Phase::Halted => "halted",
            Phase::Preempted => "preempted",
            Phase::Waiting => "waiting",
        }
    }

    /// Return the phase with a number, or `None` above 5.
    pub const fn from_number(number: u32) -> Option<Phase> {
        match number {
            0 => Some(Phase::Guest),
            1 => Some(Phase::Kernel),
            2 => Some(Phase::User),
            3 => Some(Phase::Halted),
            4 => Some(Phase::Preempted),
            5 => Some(Phase::Waiting),
            _ => None,
        }
    }
}
