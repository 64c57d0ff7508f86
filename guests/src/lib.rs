// SPDX-License-Identifier: GPL-2.0

//! Tiny KVM guests, each a loop around one instruction that exits, and the VMM that runs them.
//!
//! The instructions of a guest are known exactly, so the number and the reasons of its exits are
//! known too. [`Expected`] has them for both vendors. Any count of exits can be compared with it.
//!
//! Every vCPU of a VM has a window of 64 KiB of its own, with code, stack, tables and queries.
//! vCPUs share no page, so faults can be counted too.
//!
//! ```
//! use exitmeter_meter::reasons::Isa;
//! use tiny_guests::{Expected, Mode, Program};
//!
//! // On Intel, 1000 CPUIDs are 1000 exits of reason 10. One OUT, of reason 30, ends the guest.
//! let expected = Expected::of(Isa::Vmx, Program::Cpuid, Mode::Long, 1000, 1);
//! assert_eq!(expected.exact()[&10], 1000);
//! assert_eq!(expected.exact()[&30], 1);
//! ```
//!
//! [`TinyVm`] runs the guest, with /dev/kvm:
//!
//! ```no_run
//! use tiny_guests::{Config, TinyVm, Mode, Program};
//!
//! let mut machine = TinyVm::new(Config::new(Program::OutUser, Mode::Long, 1000))?;
//! assert_eq!(machine.run()?[0].ports, 1000);
//! # Ok::<(), tiny_guests::Error>(())
//! ```

mod absent;
mod catalogue;
mod code;
mod config;
mod hyperv;
mod inner;
mod interfere;
mod machine;
mod memory;
mod window;

pub use absent::AbsentPage;
pub use catalogue::{Differs, Expected, Mode, Program};
pub use config::{Config, Error, Registers64, MAX_LONG_VCPUS, MAX_PAGES, MAX_QUERIES, MAX_VCPUS};
pub use hyperv::NOTIFY_LONG_SPIN_WAIT;
pub use inner::L2Exit;
pub use interfere::Stepped;
pub use machine::{host_isa, pin, with_apic_id, TinyVm, UserExits};
pub use window::{REGISTERS, UNANSWERED};
