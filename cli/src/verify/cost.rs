// SPDX-License-Identifier: GPL-2.0

//! Cost of exits on this CPU: ticks of guests that do nothing but exit.

use exitmeter_meter::phase::Phase;
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::{
    environment::Frequency,
    host::MeteredHost,
    model::{Cost, KindCost},
    own::{self, Before, MeteredGuest},
    reload::Reload,
    statistics::{median_of, Summary},
};
use crate::{source, why::device::Device};

/// Loop iterations of the guest that measures the loop itself.
const SPINS: u32 = 1_000_000;

/// Kind of exit.
struct Kind {
    name: &'static str,
    program: Program,
    /// Exit reason on VMX and on SVM.
    reason: [u32; 2],
    /// Maximum number of exits of one guest, because touched pages take memory.
    most: u32,
}

impl Kind {
    const fn new(name: &'static str, program: Program, reason: [u32; 2], most: u32) -> Self {
        Self {
            name,
            program,
            reason,
            most,
        }
    }
}

/// Kinds of exit, from those that the kernel handles alone to those that go to user space.
const KINDS: [Kind; 6] = [
    Kind::new("CPUID", Program::Cpuid, [10, 0x72], u32::MAX),
    Kind::new("INVD", Program::Invd, [13, 0x76], u32::MAX),
    Kind::new("WBINVD", Program::Wbinvd, [54, 0x89], u32::MAX),
    Kind::new("WRMSR, fastpath", Program::WrmsrFast, [32, 0x7c], u32::MAX),
    Kind::new("OUT to user space", Program::OutUser, [30, 0x7b], u32::MAX),
    Kind::new("page fault", Program::Touch, [48, 0x400], 16 * 1024),
];

/// Guest that measures the world switch. Its loop is INVD and two more instructions.
const SWITCH: Program = Program::Invd;

/// Number of runs and exits to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Number of times that each number is taken.
    pub runs: u32,
    /// Number of exits that a number is the mean of.
    pub exits: u32,
}

/// One measurement of one kind of exit.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    ticks: f64,
    /// Guest, kernel and user ticks, as metered.
    phases: Option<[f64; 3]>,
}

/// Samples of all kinds, by run.
type Block = Vec<[Sample; KINDS.len()]>;

/// Measure what exits cost. With `reload`, measure with and without the module in turn.
///
/// # Errors
///
/// Returns [`Stopped`](crate::stop::Stopped), an error of KVM, or an error if the module cannot be
/// unloaded or loaded.
pub fn measure(
    host: &MeteredHost,
    plan: Plan,
    reload: Option<&mut Reload>,
) -> anyhow::Result<Cost> {
    // Warm up: the first run costs more.
    for kind in &KINDS {
        run(host, kind.program, plan.exits / 10)?;
    }
    let mut cost = Cost {
        cpu: host.cpu,
        runs: plan.runs,
        exits: plan.exits,
        tsc_khz: host.tsc_khz,
        ..Cost::default()
    };
    let (mut with, mut without, mut detailed) = (Block::new(), Block::new(), Block::new());
    let alternate = reload.is_some();
    if let Some(reload) = reload {
        for _ in 0..plan.runs {
            reload.unload()?;
            without.push(samples(host, plan, false)?);
            reload.load()?;
            with.push(samples(host, plan, true)?);
        }
    } else {
        for _ in 0..plan.runs {
            with.push(samples(host, plan, !host.by_bpf)?);
        }
        // Without the right to read details, measure nothing.
        if let (false, Ok(_device)) = (
            host.has_details || host.by_bpf,
            Device::open_by(source::Choice::Module, source::DEVICE.as_ref()),
        ) {
            for _ in 0..plan.runs {
                detailed.push(samples(host, plan, false)?);
            }
        }
    }
    let metered = with.iter().flatten().all(|sample| sample.phases.is_some());
    if !metered {
        let text = match host.by_bpf {
            true => "BPF measures phases in nanoseconds, so they are not shown beside cycles; the cycles include the cost of its programs",
            false => "the guests were not metered, so there are no phases, and no cost of metering",
        };
        cost.remark = Some(text.to_owned());
        without.clear();
        detailed.clear();
    } else if alternate {
        cost.world_switch = switch(host, &with)?;
    } else {
        cost.world_switch = switch(host, &with)?;
        let text =
            "the cost of metering needs --reload, which unloads the module and loads it again";
        cost.remark = Some(text.to_owned());
    }
    for (place, kind) in KINDS.iter().enumerate() {
        let of = |block: &Block| -> Vec<f64> {
            column(block, place).map(|sample| sample.ticks).collect()
        };
        let phase = |at: usize| {
            let phases = column(&with, place).filter_map(|sample| sample.phases?.get(at).copied());
            median_of(phases.collect())
        };
        let Some(ticks) = Summary::of(&of(&with)) else {
            continue;
        };
        cost.kinds.push(KindCost {
            kind: kind.name,
            ns: host.tsc_khz.map(|khz| ticks.median * 1e6 / f64::from(khz)),
            guest: phase(0),
            kernel: phase(1),
            user: phase(2),
            metering_adds: Summary::of_differences(&of(&with), &of(&without)),
            details_add: Summary::of_differences(&of(&detailed), &ticks.runs),
            ticks,
        });
    }
    let Frequency { khz, governor, .. } = Frequency::of(host.cpu);
    (cost.cpu_khz, cost.governor) = (khz, governor);
    Ok(cost)
}

/// Return the samples of one kind.
fn column(block: &Block, place: usize) -> impl Iterator<Item = Sample> + '_ {
    block
        .iter()
        .filter_map(move |samples| samples.get(place).copied())
}

/// Measure each kind once.
fn samples(host: &MeteredHost, plan: Plan, metered: bool) -> anyhow::Result<[Sample; KINDS.len()]> {
    let mut samples = [Sample::default(); KINDS.len()];
    for (sample, kind) in samples.iter_mut().zip(&KINDS) {
        *sample = measure_one(host, plan, kind, metered)?;
    }
    Ok(samples)
}

/// Measure one kind. The difference between two guests of which one exits `exits` times more
/// cancels the cost of starting and ending a vCPU.
fn measure_one(
    host: &MeteredHost,
    plan: Plan,
    kind: &Kind,
    metered: bool,
) -> anyhow::Result<Sample> {
    let exits = plan.exits.min(kind.most);
    let few = (exits / 10).max(1);
    let (short, _) = run(host, kind.program, few)?;
    let before = match metered {
        true => Some(Before::new(&source::parse(
            &host.path,
            &source::read(&host.path)?,
        )?)),
        false => None,
    };
    let (long, machine) = run(host, kind.program, few + exits)?;
    let phases = match &before {
        Some(before) => phases(host, kind, before)?,
        None => None,
    };
    drop(machine);
    Ok(Sample {
        ticks: (long as f64 - short as f64) / f64::from(exits),
        phases,
    })
}

/// Return the metered phases of one exit of the guest, or `None` if it is not metered.
fn phases(host: &MeteredHost, kind: &Kind, before: &Before) -> anyhow::Result<Option<[f64; 3]>> {
    let Some(guest) = find(host, before)? else {
        return Ok(None);
    };
    let [vmx, svm] = kind.reason;
    let code = host.by_vendor(vmx, svm);
    let exits = guest.exits_of(code);
    if exits == 0 {
        // Without nested paging, a page faults with another reason.
        return Ok(Some([f64::NAN; 3]));
    }
    let phases = [Phase::Guest, Phase::Kernel, Phase::User];
    Ok(Some(phases.map(|phase| {
        guest.ticks_of(code, phase) as f64 / exits as f64
    })))
}

fn find(host: &MeteredHost, before: &Before) -> anyhow::Result<Option<MeteredGuest>> {
    let bytes = source::read(&host.path)?;
    match MeteredGuest::find(&source::parse(&host.path, &bytes)?, before, host.pid) {
        Ok(guest) => Ok(Some(guest)),
        Err(own::Error::Unmetered(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Return the guest ticks of one exit, without those of the loop around it.
fn switch(host: &MeteredHost, with: &Block) -> anyhow::Result<Option<f64>> {
    let (_machine, guest) =
        host.run_metered(Config::new(Program::Spin, Mode::Long, SPINS), None)?;
    let looped = guest.ticks(Phase::Guest) as f64 / f64::from(SPINS);
    let place = KINDS.iter().position(|kind| kind.program == SWITCH);
    let per_exit = place.and_then(|place| {
        let ticks = column(with, place).filter_map(|sample| Some(sample.phases?[0]));
        median_of(ticks.collect())
    });
    Ok(per_exit.map(|ticks| ticks - looped))
}

/// Run a guest. Return the TSC ticks from before its start until after its end, and the guest.
fn run(host: &MeteredHost, program: Program, count: u32) -> anyhow::Result<(u64, TinyVm)> {
    host.stop.check()?;
    let mut machine = TinyVm::new(Config::new(program, Mode::Long, count.max(1)))?;
    let start = now();
    host.run_again(&mut machine)?;
    Ok((now().saturating_sub(start), machine))
}

/// Read the TSC after all earlier instructions are done.
fn now() -> u64 {
    // SAFETY: Each CPU of 64 bits has both.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}
