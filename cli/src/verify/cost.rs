// SPDX-License-Identifier: GPL-2.0

//! What exits cost on this CPU: ticks of guests that do nothing but exit.

use exitmeter_meter::phase::Phase;
use tiny_guests::{Config, Machine, Mode, Program};

use super::{
    environment::Frequency,
    host::Host,
    model::{Cost, KindCost},
    own::{self, Before, Own},
    reload::Reload,
    statistics::{median_of, Summary},
};
use crate::{source, why::device::Device};

/// How often the guest loops that shows what a loop takes.
const SPINS: u32 = 1_000_000;

/// A kind of exit.
struct Kind {
    name: &'static str,
    program: Program,
    /// Its reason, on VMX and on SVM.
    reason: [u32; 2],
    /// The most exits of one guest: pages are memory.
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

/// The kinds, from what the kernel alone does to what goes to user space.
const KINDS: [Kind; 6] = [
    Kind::new("CPUID", Program::Cpuid, [10, 0x72], u32::MAX),
    Kind::new("INVD", Program::Invd, [13, 0x76], u32::MAX),
    Kind::new("WBINVD", Program::Wbinvd, [54, 0x89], u32::MAX),
    Kind::new("WRMSR, fastpath", Program::WrmsrFast, [32, 0x7c], u32::MAX),
    Kind::new("OUT to user space", Program::OutUser, [30, 0x7b], u32::MAX),
    Kind::new("page fault", Program::Touch, [48, 0x400], 16 * 1024),
];

/// The kind of which the world switch is told: its loop is the instruction and two more.
const SWITCH: Program = Program::Invd;

/// How much is to be measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How often each number is taken.
    pub runs: u32,
    /// Exits of which a number is the mean.
    pub exits: u32,
}

/// One kind of exit, measured once.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    ticks: f64,
    /// Guest, kernel and user ticks, as the meter tells them.
    phases: Option<[f64; 3]>,
}

/// The samples of all kinds, by run.
type Block = Vec<[Sample; KINDS.len()]>;

/// Measure what exits cost; with `reload` also without the module, in turn.
///
/// # Errors
///
/// [`Stopped`](super::stop::Stopped), those of KVM, and when the module does not come or go.
pub fn measure(host: &Host, plan: Plan, reload: Option<&mut Reload>) -> anyhow::Result<Cost> {
    // What runs for the first time costs more.
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
        // Without the right there is nothing to tell.
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
            true => "BPF tells phases in nanoseconds, so none stand beside cycles; what its programs add is in these",
            false => "the guests were not metered, so nothing is told of phases and of what metering adds",
        };
        cost.remark = Some(text.to_owned());
        without.clear();
        detailed.clear();
    } else if alternate {
        cost.world_switch = switch(host, &with)?;
    } else {
        cost.world_switch = switch(host, &with)?;
        let text = "what metering adds takes --reload: the module has to go for it, and comes back";
        cost.remark = Some(text.to_owned());
    }
    for (place, kind) in KINDS.iter().enumerate() {
        let of = |block: &Block| -> Vec<f64> { column(block, place).map(|it| it.ticks).collect() };
        let phase = |at: usize| {
            let phases = column(&with, place).filter_map(|it| it.phases?.get(at).copied());
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

/// The samples of one kind.
fn column(block: &Block, place: usize) -> impl Iterator<Item = Sample> + '_ {
    block
        .iter()
        .filter_map(move |samples| samples.get(place).copied())
}

/// Measure each kind once.
fn samples(host: &Host, plan: Plan, metered: bool) -> anyhow::Result<[Sample; KINDS.len()]> {
    let mut samples = [Sample::default(); KINDS.len()];
    for (sample, kind) in samples.iter_mut().zip(&KINDS) {
        *sample = measure_one(host, plan, kind, metered)?;
    }
    Ok(samples)
}

/// Measure one kind. What a vCPU's start and end cost falls out, as the difference of two guests is
/// taken, of which one exits so many times more.
fn measure_one(host: &Host, plan: Plan, kind: &Kind, metered: bool) -> anyhow::Result<Sample> {
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

/// What the meter tells of the guest that is there, for one exit; `None` when it is not metered.
fn phases(host: &Host, kind: &Kind, before: &Before) -> anyhow::Result<Option<[f64; 3]>> {
    let Some(own) = find(host, before)? else {
        return Ok(None);
    };
    let [vmx, svm] = kind.reason;
    let code = host.pick(vmx, svm);
    let exits = own.exits_of(code);
    if exits == 0 {
        // Without nested paging a page faults by another reason.
        return Ok(Some([f64::NAN; 3]));
    }
    let phases = [Phase::Guest, Phase::Kernel, Phase::User];
    Ok(Some(phases.map(|phase| {
        own.ticks_of(code, phase) as f64 / exits as f64
    })))
}

fn find(host: &Host, before: &Before) -> anyhow::Result<Option<Own>> {
    let bytes = source::read(&host.path)?;
    match Own::find(&source::parse(&host.path, &bytes)?, before, host.pid) {
        Ok(own) => Ok(Some(own)),
        Err(own::Error::Unmetered(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Guest ticks of one exit, less those of the loop around it.
fn switch(host: &Host, with: &Block) -> anyhow::Result<Option<f64>> {
    let (_machine, own) = host.run_metered(Config::new(Program::Spin, Mode::Long, SPINS), None)?;
    let looped = own.ticks(Phase::Guest) as f64 / f64::from(SPINS);
    let place = KINDS.iter().position(|kind| kind.program == SWITCH);
    let guest = place.and_then(|place| {
        let guest = column(with, place).filter_map(|sample| Some(sample.phases?[0]));
        median_of(guest.collect())
    });
    Ok(guest.map(|guest| guest - looped))
}

/// Run a guest; TSC ticks from before its start until after its end, and the guest.
fn run(host: &Host, program: Program, count: u32) -> anyhow::Result<(u64, Machine)> {
    host.stop.check()?;
    let mut machine = Machine::new(Config::new(program, Mode::Long, count.max(1)))?;
    let start = now();
    host.run_again(&mut machine)?;
    Ok((now().saturating_sub(start), machine))
}

/// The TSC now, read when all before it is done.
fn now() -> u64 {
    // SAFETY: Each CPU of 64 bits has both.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}
