// SPDX-License-Identifier: GPL-2.0

//! The meter's CPUID leaves, as a guest asks for them (docs/interface.md).

/// The leaves of one of the course's maps.
#[derive(Clone, Copy)]
pub struct Map {
    /// Exits.
    pub total_exits: u32,
    /// Ticks spent on all exits.
    pub total_cycles: u32,
    /// Exits of the reason in ECX.
    pub reason_exits: u32,
    /// Ticks spent on these.
    pub reason_cycles: u32,
}

/// That of 2021.
pub const MAP_2021: Map = Map {
    total_exits: 0x4fff_ffff,
    total_cycles: 0x4fff_fffe,
    reason_exits: 0x4fff_fffd,
    reason_cycles: 0x4fff_fffc,
};

/// That of 2022.
pub const MAP_2022: Map = Map {
    total_exits: 0x4fff_fffc,
    total_cycles: 0x4fff_fffd,
    reason_exits: 0x4fff_fffe,
    reason_cycles: 0x4fff_ffff,
};

/// "ExitMeter", and the highest leaf. This one and those below are the same in both maps.
pub const IDENTITY: u32 = 0x4fff_fff0;
/// Version, vendor, number of reasons, and map.
pub const INTERFACE: u32 = 0x4fff_fff1;
/// Ticks of a reason in a phase.
pub const PHASE_CYCLES: u32 = 0x4fff_fff2;
/// Exits of a reason in 64 bits; with bit 16 of ECX those of nested guests.
pub const EXITS_64: u32 = 0x4fff_fff3;
/// The number of the life of the meter.
pub const LIFE: u32 = 0x4fff_fff4;
/// What the exits of the vCPU that asks were about.
pub const TABLES: u32 = 0x4fff_fff5;
