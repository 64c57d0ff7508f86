// SPDX-License-Identifier: GPL-2.0

//! CPU hotplug under load, the state of the TSC, and a suspend of the host.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{phase::Phase, reader::Snapshot};
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::{run_until, scaled, snapshots::check_none_fell};
use crate::{
    cases::Case,
    host::{
        self, codes,
        log::Log,
        meter::{read_device, MeterSnapshot, MeteredVcpu},
        span::Span,
        task,
    },
};

const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "log_queries=0",
            "soak: a CPU repeatedly goes offline and online under load",
            hotplug,
        )
        .within(1200)
        .skip_if(no_second_cpu),
        Case::with_module(
            "log_queries=0",
            "soak: the snapshot says whether the kernel trusts the TSC",
            trusted_tsc,
        ),
        Case::with_module(
            "log_queries=0",
            "soak: VMs survive a suspend of the host",
            survive_suspend,
        )
        .within(600),
    ]
}

fn no_second_cpu() -> Result<Option<&'static str>> {
    Ok((!Path::new(ONLINE).exists()).then_some("this host has one CPU"))
}

fn hotplug() -> Result<()> {
    let times = scaled(100);
    let span = Span::begin()?;
    let done = AtomicBool::new(false);
    let started = Instant::now();
    thread::scope(|scope| {
        let config = Config {
            vcpus: 3,
            ..Config::new(Program::OutUser, Mode::Long, 500)
        };
        let guest = scope.spawn(|| run_until(&done, config));
        let result = (|| {
            let mut before = MeterSnapshot::read()?;
            for time in 0..2 * times {
                let online = time % 2;
                fs::write(ONLINE, online.to_string())
                    .with_context(|| format!("{ONLINE} does not take {online}"))?;
                thread::sleep(Duration::from_millis(20));
                let meter = MeterSnapshot::read()?;
                for (before, after) in before.own().iter().zip(meter.own()) {
                    if (before.vm, before.id) == (after.vm, after.id) {
                        check_none_fell(before, after)?;
                    }
                }
                before = meter;
                ensure!(!guest.is_finished(), "the guest ended");
            }
            anyhow::Ok(())
        })();
        fs::write(ONLINE, "1")?;
        done.store(true, Ordering::Relaxed);
        task::join(guest)?;
        result
    })?;
    let exits: u64 = span.end()?.values().sum();
    println!(
        "{times} times offline and online in {:.0} s, {exits} exits meanwhile, all counted",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Check that the snapshot and the log say whether the kernel has marked the TSC unstable. The module
/// meters on such a host, too: counts are exact, but ticks come from a clock that may differ between
/// CPUs.
fn trusted_tsc() -> Result<()> {
    let bytes = read_device()?;
    let is_stable = Snapshot::parse(&bytes)?.tsc_is_stable();
    let lines = Log::from_boot()?.lines()?;
    let unstable = lines
        .iter()
        .any(|line| line.contains("Marking TSC unstable"));
    ensure!(
        is_stable != unstable,
        "TSC stable in the snapshot: {is_stable}; marked unstable by the kernel: {unstable}"
    );
    let warned = lines
        .iter()
        .any(|line| line.starts_with("exitmeter: the TSC is marked unstable"));
    ensure!(warned == unstable, "the module warned: {warned}");
    println!("the kernel trusts the TSC: {is_stable}");
    Ok(())
}

/// Return the clock of a snapshot: the TSC when the module was loaded, the TSC now, ticks in a second,
/// and the number of the meter's life.
fn snapshot_clock() -> Result<(u64, u64, u64, u64)> {
    let bytes = read_device()?;
    let snapshot = Snapshot::parse(&bytes)?;
    let second = snapshot.tsc_khz().context("the TSC's frequency")?;
    Ok((
        snapshot.loaded(),
        snapshot.now(),
        u64::from(second) * 1000,
        snapshot.life(),
    ))
}

/// Suspend the host for 5 s while one VM idles and one works. The suspend is as in S3 except for the
/// last step, the firmware's.
fn survive_suspend() -> Result<()> {
    let hlt = codes::hlt()?;
    let span = Span::begin()?;
    let config = Config {
        hlt_time: Duration::from_millis(10),
        ..Config::new(Program::HltKernel, Mode::Long, 100)
    };
    let mut idle = TinyVm::new(config.clone())?;
    idle.run()?;
    let halted_ticks = |vcpu: &MeteredVcpu| vcpu.numbers.phases[Phase::Halted as usize];
    let user_ticks = |vcpu: &MeteredVcpu| vcpu.numbers.phases[Phase::User as usize];
    let first = MeterSnapshot::read()?.only()?.clone();
    let idle_vcpu = |meter: &MeterSnapshot| -> Result<MeteredVcpu> {
        let found = meter.vcpus.iter().find(|vcpu| vcpu.vm == first.vm);
        Ok((*found.context("the idle VM is not metered")?).clone())
    };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| run_until(&done, config));
        let result = (|| {
            let begun = Instant::now();
            // KVM names a VM by the thread that created it, so `own` does not include the other VM.
            while MeterSnapshot::read()?.vcpus.len() < 2
                && begun.elapsed() < Duration::from_secs(30)
            {
                thread::sleep(Duration::from_millis(100));
                ensure!(!guest.is_finished(), "the guest ended");
            }
            let (loaded, now, second, life) = snapshot_clock()?;
            let tsc = host::tsc();
            let before = MeterSnapshot::read()?;
            fs::write("/sys/power/pm_test", "core").context("/sys/power/pm_test")?;
            fs::write("/sys/power/state", "mem").context("the host does not sleep")?;
            let (new_tsc, (loaded_after, now_after, _, life_after)) =
                (host::tsc(), snapshot_clock()?);
            ensure!(new_tsc > tsc, "the host's TSC was {tsc} and is {new_tsc}");
            ensure!(
                (loaded, life) == (loaded_after, life_after),
                "loaded at {loaded} in life {life}, then at {loaded_after} in {life_after}"
            );
            // The kernel may know the length of the suspend only to a second.
            let passed = now_after.wrapping_sub(now);
            ensure!(
                (3 * second..60 * second).contains(&passed),
                "{passed} ticks of {second} a second passed"
            );
            let after = MeterSnapshot::read()?;
            let mut seen = 0;
            for after in &after.vcpus {
                for before in &before.vcpus {
                    if (before.vm, before.id) == (after.vm, after.id) {
                        check_none_fell(before, after)?;
                        seen += 1;
                    }
                }
            }
            ensure!(seen == 2, "{seen} vCPUs live before and after");
            let slept = user_ticks(&idle_vcpu(&after)?) - user_ticks(&first);
            println!(
                "the TSC was {tsc} and is {new_tsc}; {:.1} s passed, and the idle vCPU was in user \
                 space for {:.1} s",
                passed as f64 / second as f64,
                slept as f64 / second as f64
            );
            idle.rewind()?;
            idle.run()?;
            let again = idle_vcpu(&MeterSnapshot::read()?)?;
            let times = [
                halted_ticks(&first),
                halted_ticks(&again) - halted_ticks(&first),
            ];
            println!(
                "100 HLTs took {} ticks before and {} after",
                times[0], times[1]
            );
            ensure!(
                times[1] > times[0] / 2 && times[1] < 4 * times[0],
                "time after the suspend is wrong"
            );
            let counts = [&first, &again].map(|vcpu| vcpu.numbers.exits_of(hlt));
            ensure!(counts[1] == 2 * counts[0], "HLT exits: {counts:?}");
            anyhow::Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        task::join(guest)?;
        result
    })?;
    let exits: u64 = span.end()?.values().sum();
    println!("{exits} exits, all counted");
    Ok(())
}
