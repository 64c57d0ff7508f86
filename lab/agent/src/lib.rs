// SPDX-License-Identifier: GPL-2.0

//! Code that the lab and its agent share.
//!
//! The agent is the first process of an emulated host and of the Linux guest in it. The lab starts the emulator. They
//! communicate over a line that others write to as well, so their messages go in checked frames ([`channel`]). The
//! agent finds its orders in a file of the initramfs ([`settings`]). The lab packs that initramfs with the same writer
//! ([`cpio`]) as the agent packs the guest's ([`initramfs`]).

pub mod channel;
pub mod cpio;
pub mod initramfs;
pub mod settings;
