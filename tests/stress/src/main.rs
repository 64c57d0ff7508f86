// SPDX-License-Identifier: GPL-2.0

//! `make stress`; the library has the code.

use std::time::Duration;

use clap::Parser;
use stress::{
    measure::{self, measure, measure_machine, Size},
    together::{self, together},
};

/// Run the module's own ledger, hash table and registry at native speed, with real threads.
#[derive(Parser)]
struct Arguments {
    /// Seconds for each kind of caller; the run of all at once takes ten times as long.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// vCPUs of the largest measurement.
    #[arg(long, default_value_t = 65_536)]
    most: usize,
    /// Measure at a real-time priority, above all other threads of the machine; needs root.
    #[arg(long)]
    real_time: bool,
    /// Run only all kinds of callers at once.
    #[arg(long)]
    together: bool,
    /// Run only the measurements.
    #[arg(long, conflicts_with = "together")]
    measure: bool,
}

fn main() {
    let arguments = Arguments::parse();
    let time = Duration::from_secs_f64(arguments.seconds);
    if !arguments.together {
        measure::print_head();
        measure_machine(time, arguments.real_time);
        for (size, reasons) in measurements() {
            if size.vcpus <= arguments.most {
                let plan = measure::Plan {
                    time,
                    reasons,
                    poison: false,
                    real_time: arguments.real_time,
                };
                measure(size, plan);
            }
        }
    }
    if !arguments.measure {
        println!("\nAll at once:\n");
        for plan in plans(time * 10) {
            together(plan);
        }
    }
}

fn measurements() -> Vec<(Size, u32)> {
    let one_vm = |vcpus| Size { vcpus, vms: 1 };
    let each = |vcpus| Size { vcpus, vms: vcpus };
    vec![
        (one_vm(1), 4),
        (one_vm(1), 20),
        (one_vm(1), 30),
        (one_vm(32), 20),
        (one_vm(256), 20),
        (one_vm(4096), 20),
        (each(4096), 20),
        (each(65_536), 1),
    ]
}

fn plans(time: Duration) -> [together::Plan; 3] {
    let plan = together::Plan {
        time,
        max_vcpus: 4096,
        staying: (20, 80),
        coming: 100,
        host_scope: false,
        poison: true,
    };
    [
        plan,
        // The registry refuses most of the vCPUs that come.
        together::Plan {
            max_vcpus: 120,
            ..plan
        },
        together::Plan {
            host_scope: true,
            ..plan
        },
    ]
}
