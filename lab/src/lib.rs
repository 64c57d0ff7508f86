//! Emulated hosts: what sets them up, boots them and reads what they say.

pub mod interrupt;
pub mod module;
pub mod setup;
