// SPDX-License-Identifier: GPL-2.0

//! Ctrl-C and its like, noted instead of obeyed, where something has to be ended in order first.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

struct Handlers {
    /// One of the signals came since the first guard was taken.
    seen: Arc<AtomicBool>,
    /// No guard is held, so the signals have their default effect.
    idle: Arc<AtomicBool>,
    guards: Mutex<usize>,
}

static HANDLERS: LazyLock<Handlers> = LazyLock::new(|| {
    let seen = Arc::new(AtomicBool::new(false));
    let idle = Arc::new(AtomicBool::new(true));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // These fail only for signals that nobody may handle, such as SIGKILL.
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

/// While one of these lives, SIGINT, SIGTERM and SIGHUP do not end the process; [`seen`] tells of them.
///
/// [`seen`]: Interrupts::seen
#[derive(Debug)]
#[must_use = "dropped, it gives the signals their default effect back"]
pub struct Interrupts(());

/// Starts to note the signals.
pub fn watch() -> Interrupts {
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
    /// Whether one of the signals came.
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
