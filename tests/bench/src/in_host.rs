// SPDX-License-Identifier: GPL-2.0

//! Measures in the emulated host and prints each result as a line of JSON.

use std::process::ExitCode;

use anyhow::{ensure, Context as _, Result};
use clap::ValueEnum as _;

use crate::{
    exits::Exit,
    meters::{self, Meter},
    report::{Cost, ExitsSeen, Line},
    Plan,
};

/// Measure all of the plan. The exit code is 1 if a meter could not be measured.
pub fn run(plan: &Plan) -> Result<ExitCode> {
    // Warm up: the first run of each costs more.
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

/// Measure every kind of exit under one meter.
fn measure(meter: Meter, plan: &Plan) -> Result<()> {
    let running = meters::start(meter).context("cannot start it")?;
    let mut known = 0;
    for exit in exits(plan) {
        let mut ticks = Vec::new();
        for _ in 0..plan.runs {
            ticks.push(exit.ticks(plan.count)?);
            known += Exit::caused(plan.count);
        }
        print(&Line::Cost(Cost { meter, exit, ticks }))?;
    }
    let Some(running) = running else {
        return Ok(());
    };
    let meters::CountedExits {
        exits: seen,
        remark,
    } = running.stop().context("cannot stop it")?;
    print(&Line::Saw(ExitsSeen {
        meter,
        known,
        seen,
        remark,
    }))?;
    // The meter sees more than `known`: also interrupts, and the last exit of each guest.
    if let Some(seen) = seen {
        ensure!(
            seen >= known,
            "it saw {seen} exits, but the guests caused at least {known}"
        );
    }
    Ok(())
}

fn print(line: &Line) -> Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}
