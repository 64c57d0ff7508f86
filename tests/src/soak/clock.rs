//! CPUs that go and come back under load, and what is said of the clock.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::reader::Snapshot;
use tiny_guests::{Config, Mode, Program};

use super::{keep_running, part_of, snapshots::not_behind};
use crate::{
    cases::Case,
    host::{log::Log, meter::Meter, span::Span},
};

const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with(
            "log_queries=0",
            "soak: a CPU goes offline and comes back under load, again and again",
            hotplug,
        )
        .within(1200)
        .unless(one_cpu),
        Case::with(
            "log_queries=0",
            "soak: the snapshot says whether the kernel trusts the TSC",
            trusted_tsc,
        ),
    ]
}

fn one_cpu() -> Result<Option<&'static str>> {
    Ok((!Path::new(ONLINE).exists()).then_some("this host has one CPU"))
}

fn hotplug() -> Result<()> {
    let times = part_of(100);
    let span = Span::begin()?;
    let done = AtomicBool::new(false);
    let started = Instant::now();
    thread::scope(|scope| {
        let config = Config {
            vcpus: 3,
            ..Config::new(Program::OutUser, Mode::Long, 500)
        };
        let guest = scope.spawn(|| keep_running(&done, config));
        let result = (|| {
            let mut before = Meter::read()?;
            for time in 0..2 * times {
                let online = time % 2;
                fs::write(ONLINE, online.to_string())
                    .with_context(|| format!("{ONLINE} does not take {online}"))?;
                thread::sleep(Duration::from_millis(20));
                let meter = Meter::read()?;
                for (before, after) in before.own().iter().zip(meter.own()) {
                    if (before.vm, before.id) == (after.vm, after.id) {
                        not_behind(before, after)?;
                    }
                }
                before = meter;
                ensure!(!guest.is_finished(), "the guest ended");
            }
            anyhow::Ok(())
        })();
        fs::write(ONLINE, "1")?;
        done.store(true, Ordering::Relaxed);
        guest.join().ok().context("the guest's thread panicked")??;
        result
    })?;
    let exits: u64 = span.end()?.values().sum();
    println!(
        "{times} times offline and online in {:.0} s, {exits} exits meanwhile, all counted",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The module meters on a host whose TSC the kernel has given up as well, and says so: counts
/// stay exact, and ticks are those of a clock that may differ from CPU to CPU.
fn trusted_tsc() -> Result<()> {
    let bytes = fs::read("/dev/exitmeter")?;
    let said = Snapshot::parse(&bytes)?.tsc_is_stable();
    let lines = Log::from_boot()?.lines()?;
    let unstable = lines
        .iter()
        .any(|line| line.contains("Marking TSC unstable"));
    ensure!(
        said != unstable,
        "the snapshot says that the TSC is stable: {said}; the kernel gave it up: {unstable}"
    );
    let warned = lines
        .iter()
        .any(|line| line.starts_with("exitmeter: the TSC is marked unstable"));
    ensure!(warned == unstable, "the module warned: {warned}");
    println!("the kernel trusts the TSC: {said}");
    Ok(())
}
