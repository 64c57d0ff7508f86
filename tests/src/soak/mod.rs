//! What takes too long for every day: the module under load, under faults, under attack.
//!
//! Cases as the others are, run by `system-tests --soak`. Each prints its figures.

mod churn;
mod clock;
mod hostile;
mod loading;
mod random;
mod snapshots;

pub use churn::{bequeath, worker};

use crate::cases::Case;

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    [
        loading::cases(),
        churn::cases(),
        hostile::cases(),
        snapshots::cases(),
        clock::cases(),
        // It looks back at all of them.
        crate::cases::log_is_clean(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
