// SPDX-License-Identifier: GPL-2.0

//! Deferring of Ctrl-C and similar signals, so that work can be ended in order first.

use std::sync::{
    atomic::{AtomicBool, Ordering},
    Arc, LazyLock, Mutex, PoisonError,
};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

struct Handlers {
    /// True if one of the signals came since the first guard was taken.
    seen: Arc<AtomicBool>,
    /// True if no guard is held, so that the signals have their default effect.
    idle: Arc<AtomicBool>,
    guards: Mutex<usize>,
}

static HANDLERS: LazyLock<Handlers> = LazyLock::new(|| {
    let seen = Arc::new(AtomicBool::new(false));
    let idle = Arc::new(AtomicBool::new(true));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // These calls fail only for signals that nobody may handle, such as SIGKILL.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&idle))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&seen)))
            .expect("SIGINT, SIGTERM and SIGHUP can be handled");
    }
    Handlers {
        seen,
        idle,
        guards: Mutex::new(0),
    }
});

/// Guard that keeps SIGINT, SIGTERM and SIGHUP from ending the process. [`seen`] reports them instead.
///
/// [`seen`]: Interrupts::seen
#[derive(Debug)]
#[must_use = "dropped, it gives the signals their default effect back"]
pub struct Interrupts(());

/// Start to defer the signals.
pub fn defer() -> Interrupts {
    let mut guards = HANDLERS
        .guards
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if *guards == 0 {
        HANDLERS.seen.store(false, Ordering::SeqCst);
        HANDLERS.idle.store(false, Ordering::SeqCst);
    }
    *guards += 1;
    Interrupts(())
}

impl Interrupts {
    /// Return true if one of the signals came.
    pub fn seen(&self) -> bool {
        HANDLERS.seen.load(Ordering::SeqCst)
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        let mut guards = HANDLERS
            .guards
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *guards -= 1;
        if *guards == 0 {
            HANDLERS.idle.store(true, Ordering::SeqCst);
        }
    }
}
