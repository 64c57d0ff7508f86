// SPDX-License-Identifier: GPL-2.0

//! Interrupts that this CPU sends to another one.

use kernel::prelude::*;

use crate::bindings;

/// Run a function on `cpu`, in an interrupt, and wait until it returns. Return false if the CPU is offline.
/// May sleep.
pub(crate) fn run_on<F: FnMut() + Send>(cpu: u32, mut function: F) -> bool {
    // SAFETY: `run` gets the function that it is made for. It runs before this returns, or not at all.
    unsafe { bindings::exitmeter_call_on(cpu, Some(run::<F>), (&raw mut function).cast()) }
}

/// Run the function that another CPU waits for.
///
/// # Safety
///
/// Only [`run_on`] may pass this on, with a function of type `F` that nobody else uses.
unsafe extern "C" fn run<F: FnMut()>(function: *mut c_void) {
    // SAFETY: By the contract of this function.
    unsafe { (*function.cast::<F>())() };
}
