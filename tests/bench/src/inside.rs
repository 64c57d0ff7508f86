// SPDX-License-Identifier: GPL-2.0

//! The inside: measures in the emulated host, and prints a line of JSON for each number.

use std::process::ExitCode;

use anyhow::{ensure, Context as _, Result};
use clap::ValueEnum as _;

use crate::{
    exits::Exit,
    meters::{self, Meter},
    report::{Cost, Line, Saw},
    Plan,
};

/// Measures what the plan says; the status says whether every meter could be.
pub fn run(plan: &Plan) -> Result<ExitCode> {
    // What runs for the first time costs more.
    for exit in exits(plan) {
        exit.ticks(plan.count / 10)?;
    }
    let mut failed = false;
    for meter in plan.meters() {
        if let Err(error) = measure(meter, plan) {
            failed = true;
            print(&Line::Failed {
                meter,
                why: format!("{error:#}"),
            })?;
        }
    }
    Ok(ExitCode::from(u8::from(failed)))
}

fn exits(plan: &Plan) -> Vec<Exit> {
    match &plan.exits[..] {
        [] => Exit::value_variants().to_vec(),
        some => some.to_vec(),
    }
}

/// Measures every exit under one meter.
fn measure(meter: Meter, plan: &Plan) -> Result<()> {
    let watch = meters::start(meter).context("it does not start")?;
    let mut known = 0;
    for exit in exits(plan) {
        let mut ticks = Vec::new();
        for _ in 0..plan.runs {
            ticks.push(exit.ticks(plan.count)?);
            known += Exit::known(plan.count);
        }
        print(&Line::Cost(Cost { meter, exit, ticks }))?;
    }
    let Some(watch) = watch else { return Ok(()) };
    let meters::Seen {
        exits: seen,
        remark,
    } = watch.stop().context("it does not end well")?;
    print(&Line::Saw(Saw {
        meter,
        known,
        seen,
        remark,
    }))?;
    // There are more: interrupts, and the end of each guest.
    if let Some(seen) = seen {
        ensure!(
            seen >= known,
            "it saw {seen} exits, and the guests caused {known} and more"
        );
    }
    Ok(())
}

fn print(line: &Line) -> Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}
