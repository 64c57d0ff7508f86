// SPDX-License-Identifier: GPL-2.0

//! Measures the callbacks of an exit on this machine's CPU, with the caches and the RDTSC that the
//! emulated hosts lack.
//!
//! It runs the module's own code, the ledger, in user space. It cannot run KVM, so four things are
//! missing: the tracepoints, VMREAD, the per-CPU cache of the last vCPU, and a guest that evicts lines
//! from the processor's caches. Flushing the ledger's lines and the code before each exit bounds the
//! cost of the last one.
//!
//! There is no pass or fail. A busy machine makes the numbers larger.

mod cachegrind;

use std::{
    arch::x86_64::{__cpuid, _mm_clflush, _mm_lfence, _mm_mfence, _rdtsc},
    hint::black_box,
    ptr::from_ref,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use exitmeter_meter::{
    ledger::Ledger,
    phase::Phase,
    reasons::{slot, Isa, Slot},
};
use tiny_guests::pin;

/// Measure exitmeter's callbacks on this machine's CPU
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Samples of each measurement
    #[arg(long, value_name = "N", default_value_t = 200_000,
          value_parser = clap::value_parser!(u32).range(1000..=100_000_000))]
    samples: u32,
    /// CPU to measure on
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    cpu: u32,
    /// Count instructions, cache misses and branches with valgrind's cachegrind instead
    #[arg(long)]
    cachegrind: bool,
    /// Run N exits and measure nothing
    #[arg(long, hide = true, value_name = "N")]
    exits: Option<u32>,
}

/// Size of a cache line, in bytes.
const LINE: usize = 64;

/// Upper bound of the code size of one exit and entry, in bytes.
const CODE: usize = 512;

/// Exit reasons, which take turns: those that a Linux guest causes most.
const REASONS: [u32; 4] = [1, 10, 30, 48];

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(exits) = arguments.exits {
        return run_exits(exits);
    }
    if arguments.cachegrind {
        return cachegrind::count();
    }
    pin(arguments.cpu as usize)
        .with_context(|| format!("this cannot run on CPU {}", arguments.cpu))?;
    let samples = arguments.samples;
    let ledger = ledger();
    let slots = REASONS.map(|code| slot(Isa::Vmx, code));

    let nothing = measure(samples, |_| (), |_| ());
    let clock = measure(samples, |_| (), |_| two_clocks());
    let slot_of = |turn: u32| slots[turn as usize % slots.len()];
    let hot = measure(
        samples,
        |_| (),
        |turn| exit_and_entry(&ledger, slot_of(turn)),
    );
    let cold = measure(
        samples,
        |_| flush(from_ref(&*ledger).cast(), size_of::<Ledger>()),
        |turn| exit_and_entry(&ledger, slot_of(turn)),
    );
    let code = exit_and_entry as fn(&Ledger, Slot) as *const u8;
    let colder = measure(
        samples,
        |_| {
            flush(from_ref(&*ledger).cast(), size_of::<Ledger>());
            flush(code, CODE);
        },
        |turn| exit_and_entry(&ledger, slot_of(turn)),
    );
    let user = measure(samples, |_| (), |_| to_user(&ledger));

    println!(
        "TSC ticks, on {}; median, and 90 of 100 are within",
        cpu_name()
    );
    let base = nothing.median;
    let pair = clock.median.saturating_sub(base);
    for (name, times) in [
        ("two RDTSC", clock),
        ("exit and entry", hot),
        ("exit and entry, no line of the ledger in the cache", cold),
        ("exit and entry, neither these nor the code", colder),
        ("exit, leave, resume, entry", user),
    ] {
        let [median, low, high] =
            [times.median, times.low, times.high].map(|ticks| ticks.saturating_sub(base));
        let ratio = median as f64 / pair.max(1) as f64;
        println!("{name:52} {median:5}  {low:5} to {high:5}  {ratio:5.1} times two RDTSC");
    }
    println!("The {base} ticks of the measurement itself are subtracted.");
    Ok(())
}

/// Distribution of the times of many runs, in TSC ticks.
#[derive(Clone, Copy)]
struct Times {
    median: u64,
    low: u64,
    high: u64,
}

/// Measure `run` `samples` times, each time after `prepare`. Both get the number of the sample.
fn measure(samples: u32, prepare: impl Fn(u32), run: impl Fn(u32)) -> Times {
    let mut times: Vec<u64> = (0..samples)
        .map(|turn| {
            prepare(turn);
            let begin = fenced();
            run(turn);
            fenced().wrapping_sub(begin)
        })
        .collect();
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    Times {
        median: at(50),
        low: at(5),
        high: at(95),
    }
}

/// Return the TSC, read after all earlier instructions and before all later ones.
#[inline(always)]
fn fenced() -> u64 {
    // SAFETY: x86-64 has these.
    unsafe {
        _mm_mfence();
        _mm_lfence();
        let now = _rdtsc();
        _mm_lfence();
        now
    }
}

/// Return the TSC as the callbacks read it.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: x86-64 has it.
    unsafe { _rdtsc() }
}

#[inline(never)]
fn two_clocks() {
    black_box(now());
    black_box(now());
}

#[inline(never)]
fn exit_and_entry(ledger: &Ledger, slot: Slot) {
    ledger.exit(now(), slot);
    ledger.entry(now());
}

#[inline(never)]
fn to_user(ledger: &Ledger) {
    ledger.exit(now(), slot(Isa::Vmx, 30));
    ledger.leave(now(), Phase::User);
    ledger.resume(now());
    ledger.entry(now());
}

/// Flush a range of memory from all caches, and wait until that is done.
fn flush(start: *const u8, bytes: usize) {
    for offset in (0..bytes).step_by(LINE) {
        // SAFETY: The callers pass mapped memory.
        unsafe { _mm_clflush(start.wrapping_add(offset)) };
    }
    // SAFETY: x86-64 has it.
    unsafe { _mm_mfence() };
}

/// Return a ledger of a vCPU that is in its guest.
fn ledger() -> Box<Ledger> {
    // SAFETY: All-zero bytes are a valid ledger, as `Ledger` promises.
    let ledger: Box<Ledger> = Box::new(unsafe { std::mem::zeroed() });
    ledger.begin(now(), Phase::Kernel);
    ledger.entry(now());
    ledger
}

/// Run `exits` exits with their entries, and nothing else.
fn run_exits(exits: u32) -> Result<()> {
    let ledger = ledger();
    let slots = REASONS.map(|code| slot(Isa::Vmx, code));
    for turn in 0..exits as usize {
        exit_and_entry(&ledger, black_box(slots[turn % slots.len()]));
    }
    Ok(())
}

/// Return the CPU's name (CPUID leaves 0x80000002 to 0x80000004).
fn cpu_name() -> String {
    let bytes = (0x8000_0002..=0x8000_0004_u32).flat_map(|leaf| {
        let words = __cpuid(leaf);
        [words.eax, words.ebx, words.ecx, words.edx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
    });
    let bytes: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}
