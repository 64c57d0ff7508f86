// SPDX-License-Identifier: GPL-2.0

//! The module comes and goes a thousand times while guests work, and while they do what is
//! worst for it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail, ensure, Context as _, Result};
use tiny_guests::{pin, Config, Machine, Mode, Program, Quad};

use super::{keep_on, part_of};
use crate::{
    cases::{attach_again, Case},
    host::{self, hist, leaves::MAP_2021, linux::Linux, meter::Meter, module},
};

/// How often the module is loaded and unloaded.
const CYCLES: u64 = 1000;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![Case::without_module(
        "soak: loaded and unloaded again and again while guests work",
        || cycles(part_of(CYCLES)),
    )
    .with_linux()
    .within(7200)];
    for (words, config) in [
        (
            "sleeps in HLT for seconds",
            Config {
                wake: Duration::from_secs(4),
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
                ..Config::query(Mode::Long, vec![Quad::cpuid(MAP_2021.total_exits, 0); 500])
            },
        ),
    ] {
        cases.push(
            Case::without_module(format!("soak: goes while a guest {words}"), move || {
                goes_while(&config)
            })
            .within(300),
        );
    }
    cases.push(Case::without_module(
        "soak: stays while its device is open",
        held_open,
    ));
    cases.push(
        Case::without_module(
            "soak: the BPF meter attached and detached under load",
            || attach_again(part_of(CYCLES)),
        )
        .within(7200),
    );
    cases
}

fn cycles(count: u64) -> Result<()> {
    let linux = Linux::boot(&["--vcpus", "2"])?;
    // What is made once and kept, be made before the first look.
    cycle()?;
    cycle()?;
    let before = Memory::read()?;
    let done = AtomicBool::new(false);
    let started = Instant::now();
    let (sums, tiny) = thread::scope(|scope| {
        // The guest checks itself: the same bytes have the same sum, on both of its CPUs.
        let work = "dd if=/dev/urandom of=/tmp/a bs=64k count=16 2>/dev/null; \
                    a=$(sha256sum </tmp/a); for i in 1 2 3 4; do \
                    (b=$(sha256sum </tmp/a); test \"$a\" = \"$b\" || echo differs) & done; wait";
        let linux = scope.spawn(|| {
            keep_on(&done, || {
                let said = linux.run(work)?;
                ensure!(said.trim().is_empty(), "the guest's sum {said}");
                Ok(())
            })
        });
        let tiny = scope.spawn(|| {
            // These two have KVM's own interrupt controllers. VMs without would have KVM change its
            // code (the static key kvm_has_noapic_vcpu) as they come and go, and there QEMU's
            // emulation of several CPUs is not sound: see docs/testing.md.
            let programs = [Program::InKernel, Program::HltKernel];
            let mut turn = programs.iter().cycle();
            keep_on(&done, || {
                let program = *turn.next().context("a cycle has no end")?;
                Machine::new(Config::new(program, Mode::Long, 30))?.run()?;
                Ok(())
            })
        });
        let cycled = (0..count).try_for_each(|number| {
            ensure!(
                !linux.is_finished() && !tiny.is_finished(),
                "a guest ended at load {number}"
            );
            cycle()
        });
        done.store(true, Ordering::Relaxed);
        // What a guest ended by says more than that it ended.
        let ended = match (linux.join(), tiny.join()) {
            (Ok(linux), Ok(tiny)) => (linux?, tiny?),
            _ => bail!("a guest's thread panicked"),
        };
        cycled?;
        anyhow::Ok(ended)
    })?;
    let after = Memory::read()?;
    linux.stop()?;
    println!(
        "{count} loads and unloads in {:.0} s, while a Linux guest checked {sums} sums and {tiny} VMs came and went",
        started.elapsed().as_secs_f64()
    );
    before.demand_no_leak(&after, count)
}

/// Loads the module, sees that it meters, and unloads it.
fn cycle() -> Result<()> {
    module::load("log_queries=0")?;
    Meter::read()?;
    // A process that another thread starts in this moment holds all files that were open, that of
    // the device as well, until it runs its own program.
    let mut patience = 100;
    loop {
        match module::unload() {
            Err(error) if patience > 0 && is_in_use(&error) => {
                patience -= 1;
                thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Whether the module was not unloaded as somebody uses it.
fn is_in_use(error: &anyhow::Error) -> bool {
    let number = error.downcast_ref::<std::io::Error>();
    number.and_then(std::io::Error::raw_os_error) == Some(libc::EWOULDBLOCK)
}

/// What the kernel's allocators have handed out.
struct Memory {
    /// Objects by cache.
    objects: BTreeMap<String, u64>,
    /// Pages of vmalloc.
    vmalloc: u64,
}

impl Memory {
    fn read() -> Result<Self> {
        // What is freed lazily, be freed: RCU's and vmalloc's.
        for _ in 0..3 {
            fs::write("/proc/sys/vm/drop_caches", "3")?;
            thread::sleep(Duration::from_millis(500));
        }
        // Under KASAN what is freed stays an object for long, unless its cache is shrunk.
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
                // Of others' caches the number changes as files and processes come and go.
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

    /// Demands that nothing was kept at each of so many cycles: of 1000, one object at every second
    /// one would show, and so would one page.
    fn demand_no_leak(&self, after: &Self, cycles: u64) -> Result<()> {
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
        // A cache counts its objects by whole slabs, and the kernel keeps the stacks of some threads.
        let slack = (cycles / 2).max(256);
        ensure!(
            most.0 < slack && pages < slack,
            "memory leaks, some at each cycle"
        );
        Ok(())
    }
}

/// The module comes and goes ten times under a guest.
fn goes_while(config: &Config) -> Result<()> {
    let cpus = host::cpus()?;
    let mut machine = Machine::new(config.clone())?;
    let runs = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| {
            keep_on(&done, || {
                machine.run_with(|vcpu| pin(usize::from(vcpu) % cpus))?;
                runs.fetch_add(1, Ordering::Relaxed);
                machine = Machine::new(config.clone())?;
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
                let why = guest.join().map_err(|_| anyhow!("its thread panicked"))?;
                why.with_context(|| format!("the guest ended in round {round}"))?;
                bail!("the guest ended in round {round} without an error");
            }
        }
        println!(
            "10 unloads, the slowest took {:.2} s",
            slowest.as_secs_f64()
        );
        done.store(true, Ordering::Relaxed);
        match guest.join() {
            Ok(times) => times.map(drop),
            Err(_) => bail!("the guest's thread panicked"),
        }
    })
}

fn held_open() -> Result<()> {
    module::load("")?;
    let device = File::open("/dev/exitmeter")?;
    let error = module::unload().err();
    let refused = error.as_ref().is_some_and(is_in_use);
    Meter::read()?;
    drop(device);
    module::unload()?;
    hist::stop()?;
    ensure!(
        refused,
        "unloading under an open device ends with {error:?} instead of being refused"
    );
    Ok(())
}
