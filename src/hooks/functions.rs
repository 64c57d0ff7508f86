// SPDX-License-Identifier: GPL-2.0

//! Functions of KVM, hooked by ftrace.
//!
//! While a function has no other user, ftrace calls its trampoline, if it has one (`src/trampolines.S`).
//! Otherwise ftrace calls the callback, which does the same.

use core::marker::PhantomPinned;

use kernel::{
    error::to_result,
    prelude::*,
    types::Opaque, //
};

use crate::{
    bindings,
    kvm::vcpu::Vcpu, //
};

/// A function of KVM with a callback at its entry. The registry must be published for as long as this lives.
#[pin_data(PinnedDrop)]
pub(crate) struct Function {
    #[pin]
    ops: Opaque<bindings::ftrace_ops>,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: A registration may be dropped on any thread, and a shared reference to one allows nothing.
unsafe impl Send for Function {}
// SAFETY: As above.
unsafe impl Sync for Function {}

impl Function {
    /// Attach a callback, and a trampoline, to the function `name`, which is `module:name`. Set `redirect` if
    /// the callback may change the instruction pointer.
    pub(super) fn attach(
        name: &'static CStr,
        callback: Callback,
        trampoline: bindings::exitmeter_trampoline,
        redirect: bool,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            ops <- Opaque::try_ffi_init(move |slot: *mut bindings::ftrace_ops| {
                // SAFETY: The slot is ours to write; all-zero bytes are a valid ftrace_ops.
                unsafe {
                    slot.write_bytes(0, 1);
                    (*slot).func = Some(callback);
                }
                // SAFETY: The slot stays in place and is detached before it goes; the name
                // ends with a NUL.
                let ret = unsafe {
                    bindings::exitmeter_attach_function(
                        slot,
                        name.as_char_ptr(),
                        trampoline,
                        redirect,
                    )
                };
                to_result(ret).inspect_err(|error| {
                    let why = if *error == EBUSY {
                        "another module or a live patch redirects it, or kernel.ftrace_enabled is 0"
                    } else {
                        "it must be in kvm.ko and traceable by ftrace"
                    };
                    pr_err!("function {} cannot be hooked ({:?}): {}\n", name, error, why);
                })
            }),
            _pin: PhantomPinned,
        })
    }
}

#[pinned_drop]
impl PinnedDrop for Function {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Attached when this was made, and only detached here.
        unsafe { bindings::exitmeter_detach_function(self.ops.get()) };
    }
}

/// Type of ftrace's callbacks.
pub(super) type Callback =
    unsafe extern "C" fn(c_ulong, c_ulong, *mut bindings::ftrace_ops, *mut bindings::ftrace_regs);

/// Return the vCPU that is the first argument of the hooked function.
///
/// # Safety
///
/// `fregs` must be the argument of a callback that [`Function::attach`] registered, for a function whose
/// first argument is a vCPU that KVM holds during the call.
#[inline(always)]
pub(super) unsafe fn hooked<'a>(fregs: *mut bindings::ftrace_regs) -> Vcpu<'a> {
    // SAFETY: By the contract of this function; ftrace keeps the first argument in DI.
    unsafe {
        let regs = &raw const (*fregs.cast::<bindings::__arch_ftrace_regs>()).regs;
        Vcpu::from_raw((*regs).di as *mut bindings::kvm_vcpu)
    }
}
