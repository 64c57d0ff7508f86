// SPDX-License-Identifier: GPL-2.0

//! The module is loaded and unloaded a thousand times while guests work, and while guests do what is
//! worst for unloading.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use tiny_guests::{pin, Config, Mode, Program, Registers64, TinyVm};

use super::{repeat_until, scaled};
use crate::{
    cases::{attach_again, Case},
    host::{
        self, hist,
        leaves::MAP_2021,
        linux::Linux,
        meter::{MeterSnapshot, DEVICE},
        module, task,
    },
};

/// Number of loads and unloads.
const CYCLES: u64 = 1000;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![Case::without_module(
        "soak: the module is loaded and unloaded repeatedly while guests work",
        || load_repeatedly(scaled(CYCLES)),
    )
    .with_linux()
    .within(7200)];
    for (words, config) in [
        (
            "sleeps in HLT for seconds",
            Config {
                hlt_time: Duration::from_secs(4),
                ..Config::new(Program::HltKernel, Mode::Long, 3)
            },
        ),
        (
            "computes without an exit",
            Config::new(Program::Spin, Mode::Long, u32::MAX),
        ),
        (
            "floods the meter's leaves",
            Config {
                vcpus: 2,
                ..Config::query(
                    Mode::Long,
                    vec![Registers64::cpuid(MAP_2021.total_exits, 0); 500],
                )
            },
        ),
    ] {
        cases.push(
            Case::without_module(
                format!("soak: the module unloads while a guest {words}"),
                move || unload_under(&config),
            )
            .within(300),
        );
    }
    cases.push(Case::without_module(
        "soak: the module does not unload while its device is open",
        refused_while_open,
    ));
    cases.push(
        Case::without_module(
            "soak: the BPF meter attached and detached repeatedly under load",
            || attach_again(scaled(CYCLES)),
        )
        .within(7200),
    );
    cases
}

fn load_repeatedly(count: u64) -> Result<()> {
    let linux = Linux::boot(&["--vcpus", "2"])?;
    // Make the allocations that stay before the first measurement.
    load_and_unload()?;
    load_and_unload()?;
    let before = Memory::read()?;
    let done = AtomicBool::new(false);
    let started = Instant::now();
    let (sums, tiny) = thread::scope(|scope| {
        // The guest checks itself: the same bytes have the same checksum on both of its CPUs.
        let work = "dd if=/dev/urandom of=/tmp/a bs=64k count=16 2>/dev/null; \
                    a=$(sha256sum </tmp/a); for i in 1 2 3 4; do \
                    (b=$(sha256sum </tmp/a); test \"$a\" = \"$b\" || echo differs) & done; wait";
        let linux = scope.spawn(|| {
            repeat_until(&done, || {
                let printed = linux.run(work)?;
                ensure!(printed.trim().is_empty(), "the guest's sum: {printed}");
                Ok(())
            })
        });
        let tiny = scope.spawn(|| {
            // These two use KVM's interrupt controllers. VMs without them would make KVM patch its
            // code (the static key kvm_has_noapic_vcpu) as they come and go, which QEMU's emulation of
            // several CPUs does not handle soundly: see docs/testing.md.
            let programs = [Program::InKernel, Program::HltKernel];
            let mut turn = programs.iter().cycle();
            repeat_until(&done, || {
                let program = *turn.next().context("a cycle has no end")?;
                TinyVm::new(Config::new(program, Mode::Long, 30))?.run()?;
                Ok(())
            })
        });
        let cycled = (0..count).try_for_each(|number| {
            ensure!(
                !linux.is_finished() && !tiny.is_finished(),
                "a guest ended at load {number}"
            );
            load_and_unload()
        });
        done.store(true, Ordering::Relaxed);
        // A guest's own error says more than the fact that it ended.
        let (linux, tiny) = (task::join(linux), task::join(tiny));
        let ended = (linux?, tiny?);
        cycled?;
        anyhow::Ok(ended)
    })?;
    let after = Memory::read()?;
    linux.stop()?;
    println!(
        "{count} loads and unloads in {:.0} s, while a Linux guest checked {sums} sums and {tiny} VMs came and went",
        started.elapsed().as_secs_f64()
    );
    before.check_no_leak(&after, count)
}

/// Load the module, read a snapshot, and unload the module.
fn load_and_unload() -> Result<()> {
    module::load("log_queries=0")?;
    MeterSnapshot::read()?;
    // A process that another thread is just starting holds all open files, including the device,
    // until its exec.
    let mut retries = 100;
    loop {
        match module::unload() {
            Err(error) if retries > 0 && is_in_use(&error) => {
                retries -= 1;
                thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Return true if the module was not unloaded because it is in use.
fn is_in_use(error: &anyhow::Error) -> bool {
    let number = error.downcast_ref::<std::io::Error>();
    number.and_then(std::io::Error::raw_os_error) == Some(libc::EWOULDBLOCK)
}

/// Memory that the kernel's allocators have handed out.
struct Memory {
    /// Number of objects by slab cache.
    objects: BTreeMap<String, u64>,
    /// Number of vmalloc pages.
    vmalloc: u64,
}

impl Memory {
    fn read() -> Result<Self> {
        // Let the lazy frees of RCU and vmalloc complete.
        for _ in 0..3 {
            fs::write("/proc/sys/vm/drop_caches", "3")?;
            thread::sleep(Duration::from_millis(500));
        }
        // Under KASAN a freed object still counts for a long time, unless its cache is shrunk.
        for cache in fs::read_dir("/sys/kernel/slab").context("/sys/kernel/slab")? {
            let cache = cache?;
            if cache.file_name().to_string_lossy().starts_with("kmalloc") {
                fs::write(cache.path().join("shrink"), "1")?;
            }
        }
        let slabs = fs::read_to_string("/proc/slabinfo").context("/proc/slabinfo")?;
        let objects = slabs
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let name = words.next()?;
                // The number of objects in other caches changes as files and processes come and go.
                name.starts_with("kmalloc")
                    .then(|| Some((name.to_owned(), words.next()?.parse().ok()?)))?
            })
            .collect();
        let areas = fs::read_to_string("/proc/vmallocinfo").context("/proc/vmallocinfo")?;
        let vmalloc = areas
            .lines()
            .filter_map(|line| {
                line.split("pages=")
                    .nth(1)?
                    .split(' ')
                    .next()?
                    .parse::<u64>()
                    .ok()
            })
            .sum();
        Ok(Self { objects, vmalloc })
    }

    /// Check that the cycles leaked nothing. With 1000 cycles, one object or page at every second cycle
    /// would show.
    fn check_no_leak(&self, after: &Self, cycles: u64) -> Result<()> {
        ensure!(!self.objects.is_empty(), "/proc/slabinfo has no kmalloc");
        let mut most = (0, "nothing");
        for (name, objects) in &after.objects {
            let before = self.objects.get(name).copied().unwrap_or(0);
            let more = objects.saturating_sub(before);
            if more > most.0 {
                most = (more, name);
            }
        }
        let pages = after.vmalloc.saturating_sub(self.vmalloc);
        println!(
            "kept after {cycles} cycles: {} objects more in {}, {pages} pages more of vmalloc",
            most.0, most.1
        );
        // A cache counts whole slabs of objects, and the kernel keeps the stacks of some threads.
        let slack = (cycles / 2).max(256);
        ensure!(
            most.0 < slack && pages < slack,
            "memory leaks, some at each cycle"
        );
        Ok(())
    }
}

/// Load and unload the module ten times under a guest.
fn unload_under(config: &Config) -> Result<()> {
    let cpus = host::cpus()?;
    let mut machine = TinyVm::new(config.clone())?;
    let runs = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| {
            repeat_until(&done, || {
                machine.run_with(|vcpu| pin(usize::from(vcpu) % cpus))?;
                runs.fetch_add(1, Ordering::Relaxed);
                machine = TinyVm::new(config.clone())?;
                Ok(())
            })
        });
        thread::sleep(Duration::from_millis(200));
        let mut slowest = Duration::ZERO;
        for round in 0..10 {
            let loaded = module::Loaded::with("log_queries=0")?;
            thread::sleep(Duration::from_millis(50));
            let begun = Instant::now();
            loaded.unload()?;
            slowest = slowest.max(begun.elapsed());
            if guest.is_finished() {
                task::join(guest).with_context(|| format!("the guest ended in round {round}"))?;
                bail!("the guest ended in round {round} without an error");
            }
        }
        println!(
            "10 unloads, the slowest took {:.2} s",
            slowest.as_secs_f64()
        );
        done.store(true, Ordering::Relaxed);
        task::join(guest).map(drop)
    })
}

fn refused_while_open() -> Result<()> {
    module::load("")?;
    let device = File::open(DEVICE)?;
    let error = module::unload().err();
    let refused = error.as_ref().is_some_and(is_in_use);
    MeterSnapshot::read()?;
    drop(device);
    module::unload()?;
    hist::remove()?;
    ensure!(
        refused,
        "unloading under an open device ends with {error:?} instead of being refused"
    );
    Ok(())
}
