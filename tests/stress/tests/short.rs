// SPDX-License-Identifier: GPL-2.0

//! The short form of `make stress`: small sizes, the same assertions.

use std::time::Duration;

use stress::{
    measure::{self, measure, Size},
    together::{self, together},
};

#[test]
fn each_kind_of_caller_takes_bounded_steps() {
    for (vcpus, vms) in [(1, 1), (80, 1), (80, 80)] {
        let plan = measure::Plan {
            time: Duration::from_millis(100),
            reasons: 20,
            poison: true,
            real_time: false,
        };
        measure(Size { vcpus, vms }, plan);
    }
}

#[test]
fn all_callers_at_once_see_what_the_writers_did() {
    for (max_vcpus, host_scope) in [(4096, false), (120, false), (4096, true)] {
        together(together::Plan {
            time: Duration::from_millis(1000),
            max_vcpus,
            staying: (20, 80),
            coming: 100,
            host_scope,
            poison: true,
        });
    }
}
