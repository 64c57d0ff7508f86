// SPDX-License-Identifier: GPL-2.0

//! A node in /dev.

use core::marker::PhantomPinned;

use kernel::{
    bindings as kernel_bindings,
    error::to_result,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions, //
    },
    prelude::*,
    types::Opaque,
};

/// A node in /dev with a mode of its own.
///
/// The registration of the kernel's crate leaves the mode at 0600, hence this one. The file operations are
/// those of the kernel's crate.
#[pin_data(PinnedDrop)]
pub(crate) struct Node {
    #[pin]
    device: Opaque<kernel_bindings::miscdevice>,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: A misc device may be deregistered from any thread.
unsafe impl Send for Node {}
// SAFETY: A shared reference to a registration allows nothing.
unsafe impl Sync for Node {}

impl Node {
    /// Make the node `/dev/<name>`.
    pub(crate) fn register<T: MiscDevice>(
        name: &'static CStr,
        mode: u16,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            device <- Opaque::try_ffi_init(move |slot: *mut kernel_bindings::miscdevice| {
                let mut device = MiscDeviceOptions { name }.into_raw::<T>();
                device.mode = mode;
                // SAFETY: The slot is ours to write.
                unsafe { slot.write(device) };
                // SAFETY: Just written; it stays in place and is deregistered in `drop`.
                to_result(unsafe { kernel_bindings::misc_register(slot) })
                    .inspect_err(|_| pr_err!("/dev/exitmeter cannot be made\n"))
            }),
            _pin: PhantomPinned,
        })
    }
}

#[pinned_drop]
impl PinnedDrop for Node {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered when this was made. Open files pin the module.
        unsafe { kernel_bindings::misc_deregister(self.device.get()) };
    }
}
