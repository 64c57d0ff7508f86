// SPDX-License-Identifier: GPL-2.0

//! What the lab and its agent have in common.
//!
//! The agent is the first process of an emulated host and of the Linux guest inside it; the lab is what started
//! the emulator. They speak over a line of bytes that others write to as well, so all of it goes in checked
//! frames ([`channel`]). What to do stands in a file of the initramfs ([`settings`]), which the lab packs with the
//! same writer ([`cpio`]) as the agent packs the guest's ([`initramfs`]).

pub mod channel;
pub mod cpio;
pub mod initramfs;
pub mod settings;
