// SPDX-License-Identifier: GPL-2.0

//! The meter's CPUID leaves (docs/interface.md).

/// The leaves whose order depends on the leaf map.
#[derive(Clone, Copy)]
pub struct Map {
    /// Exits, of all reasons.
    pub total_exits: u32,
    /// TSC ticks spent on all exits.
    pub total_cycles: u32,
    /// Exits of the reason in ECX.
    pub reason_exits: u32,
    /// TSC ticks spent on exits of the reason in ECX.
    pub reason_cycles: u32,
}

/// Leaf map 2021.
pub const MAP_2021: Map = Map {
    total_exits: 0x4fff_ffff,
    total_cycles: 0x4fff_fffe,
    reason_exits: 0x4fff_fffd,
    reason_cycles: 0x4fff_fffc,
};

/// Leaf map 2022.
pub const MAP_2022: Map = Map {
    total_exits: 0x4fff_fffc,
    total_cycles: 0x4fff_fffd,
    reason_exits: 0x4fff_fffe,
    reason_cycles: 0x4fff_ffff,
};

/// Highest leaf, and "ExitMeter". This leaf and the following are the same in both maps.
pub const IDENTITY: u32 = 0x4fff_fff0;
/// Version of the interface, vendor, number of reasons, and leaf map.
pub const INTERFACE: u32 = 0x4fff_fff1;
/// TSC ticks of a reason in a phase.
pub const PHASE_CYCLES: u32 = 0x4fff_fff2;
/// Exits of a reason, in 64 bits; with bit 16 of ECX set, of L2 guests only.
pub const EXITS_64: u32 = 0x4fff_fff3;
/// Number of the meter's life.
pub const LIFE: u32 = 0x4fff_fff4;
/// Details of the exits of the vCPU that asks.
pub const TABLES: u32 = 0x4fff_fff5;
