// SPDX-License-Identifier: GPL-2.0

//! The hook at the host's sleep, after which the TSC may restart.

use crate::{
    bindings,
    registry::published, //
};

/// Move the registry to a restarted TSC, which reads `now`. It would read `then` if it had gone on.
///
/// # Safety
///
/// Only the shim may call this, while no other CPU runs.
unsafe extern "C" fn on_rebase(then: u64, now: u64) {
    if let Some(registry) = published() {
        registry.rebase(then, now);
    }
}

/// Watch over the host's sleep. The registry must be published for as long as this lives.
pub(crate) struct Sleep(());

impl Sleep {
    /// Begin to watch.
    pub(crate) fn watch() -> Self {
        // SAFETY: Called once, by the module's init; undone in `drop`.
        unsafe { bindings::exitmeter_attach_sleep(Some(on_rebase)) };
        Self(())
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        // SAFETY: Attached when this was made.
        unsafe { bindings::exitmeter_detach_sleep() };
    }
}
