// SPDX-License-Identifier: GPL-2.0

//! The hook at the host's sleep, in which the TSC may begin anew.

use crate::{
    bindings,
    registry::published, //
};

/// Have the registry go on with a TSC that has begun anew. `then` and `now` are one moment, by the TSC as
/// it would have gone on, and as it is.
///
/// # Safety
///
/// For the shim alone, when no other CPU runs.
unsafe extern "C" fn on_rebase(then: u64, now: u64) {
    if let Some(registry) = published() {
        registry.rebase(then, now);
    }
}

/// Watches the host's sleep while this lives. The registry has to be published for as long.
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
