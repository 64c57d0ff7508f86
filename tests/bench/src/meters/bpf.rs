// SPDX-License-Identifier: GPL-2.0

//! BPF programs that do what bcc's and bpftrace's do; their source is in ../../bpf.

use std::fs;

use anyhow::{ensure, Context as _, Result};
use aya::{
    maps::{HashMap, PerCpuArray},
    programs::{RawTracePoint, TracePoint},
    Ebpf, EbpfLoader, Pod,
};

use super::{ftrace, Seen, Watch};
use crate::outside::{reason, BPF_FOLDER, REASON_FILE};

/// Where a program is attached.
#[derive(Clone, Copy, Debug)]
pub enum Hook {
    /// To the tracepoint's arguments.
    Raw,
    /// To the event that the kernel makes of them.
    Event,
}

/// A program that watches.
pub struct Program {
    ebpf: Ebpf,
    seen: fn(&mut Ebpf) -> Result<u64>,
}

/// As in count.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct Counts {
    thread: u64,
    exits: [u64; 256],
}
// SAFETY: Any bytes are valid numbers, and there is no padding.
unsafe impl Pod for Counts {}

/// As in code.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    rip: u64,
    reason: u64,
}
// SAFETY: Any bytes are valid numbers, and there is no padding.
unsafe impl Pod for Place {}

/// As in code.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct Row {
    exits: u64,
    time: u64,
}
// SAFETY: Any bytes are valid numbers, and there is no padding.
unsafe impl Pod for Row {}

/// As in latency.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct Histogram {
    slots: [u64; 64],
}
// SAFETY: Any bytes are valid numbers, and there is no padding.
unsafe impl Pod for Histogram {}

impl Program {
    /// Counts exits by thread and reason.
    pub fn count(hook: Hook) -> Result<Self> {
        let mut ebpf = load("count.bpf.o")?;
        attach(&mut ebpf, hook, "kvm_exit")?;
        Ok(Self {
            ebpf,
            seen: |ebpf| {
                let map = ebpf.map("latest").context("there is no map")?;
                let map = PerCpuArray::<_, Counts>::try_from(map)?;
                let mut sum: u64 = 0;
                for counts in map.get(&0, 0)?.iter() {
                    sum += counts.exits.iter().sum::<u64>();
                }
                let map = ebpf.map("others").context("there is no map")?;
                let map = aya::maps::PerCpuHashMap::<_, u64, Counts>::try_from(map)?;
                for counts in map.iter() {
                    for counts in counts?.1.iter() {
                        sum += counts.exits.iter().sum::<u64>();
                    }
                }
                Ok(sum)
            },
        })
    }

    /// Counts exits by reason and guest RIP, with their time if that is wanted.
    pub fn code(with_time: bool) -> Result<Self> {
        let mut ebpf = load("code.bpf.o")?;
        if with_time {
            attach_event(&mut ebpf, "kvm_exit_timed", "kvm_exit")?;
            attach_event(&mut ebpf, "kvm_entry", "kvm_entry")?;
        } else {
            attach_event(&mut ebpf, "kvm_exit", "kvm_exit")?;
        }
        Ok(Self {
            ebpf,
            seen: |ebpf| {
                let map = ebpf.map("rows").context("there is no map")?;
                let map = HashMap::<_, Place, Row>::try_from(map)?;
                let mut sum = 0;
                for row in map.iter() {
                    sum += row?.1.exits;
                }
                Ok(sum)
            },
        })
    }

    /// Takes the time from exit to entry, by reason.
    pub fn latency(hook: Hook) -> Result<Self> {
        let mut ebpf = load("latency.bpf.o")?;
        attach(&mut ebpf, hook, "kvm_exit")?;
        attach(&mut ebpf, hook, "kvm_entry")?;
        Ok(Self {
            ebpf,
            seen: |ebpf| {
                let map = ebpf.map("histograms").context("there is no map")?;
                let map = HashMap::<_, u32, Histogram>::try_from(map)?;
                let mut sum = 0;
                for histogram in map.iter() {
                    sum += histogram?.1.slots.iter().sum::<u64>();
                }
                Ok(sum)
            },
        })
    }
}

/// Loads a program, told where this kernel keeps the exit reason.
fn load(name: &str) -> Result<Ebpf> {
    ftrace::mount()?;
    check_event()?;
    let text = fs::read_to_string(REASON_FILE)?;
    let place: reason::Place = serde_json::from_str(&text)?;
    let path = format!("{BPF_FOLDER}/{name}");
    EbpfLoader::new()
        .set_global("pointer_offset", &place.pointer.unwrap_or(u32::MAX), true)
        .set_global("reason_offset", &place.reason, true)
        .load_file(&path)
        .with_context(|| format!("the kernel refuses {path}"))
}

/// The programs on events read the reason from where it is in all kernels so far.
fn check_event() -> Result<()> {
    let format = fs::read_to_string("/sys/kernel/tracing/events/kvm/kvm_exit/format")?;
    for (name, place) in [
        ("exit_reason;", "offset:8;\tsize:4;"),
        ("guest_rip;", "offset:16;\tsize:8;"),
    ] {
        let field = format.lines().find(|line| line.contains(name));
        ensure!(
            field.is_some_and(|field| field.contains(place)),
            "the event kvm_exit has another layout than tests/bench/bpf says"
        );
    }
    Ok(())
}

fn attach(ebpf: &mut Ebpf, hook: Hook, event: &str) -> Result<()> {
    match hook {
        Hook::Raw => {
            let program = program(ebpf, &format!("{event}_raw"))?;
            let program: &mut RawTracePoint = program.try_into()?;
            program.load()?;
            program.attach(event)?;
            Ok(())
        }
        Hook::Event => attach_event(ebpf, event, event),
    }
}

fn attach_event(ebpf: &mut Ebpf, name: &str, event: &str) -> Result<()> {
    let program: &mut TracePoint = program(ebpf, name)?.try_into()?;
    program.load()?;
    program.attach("kvm", event)?;
    Ok(())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::programs::Program> {
    ebpf.program_mut(name)
        .with_context(|| format!("there is no program {name}"))
}

impl Watch for Program {
    fn stop(mut self: Box<Self>) -> Result<Seen> {
        let exits = (self.seen)(&mut self.ebpf)?;
        Ok(Seen {
            exits: Some(exits),
            remark: None,
        })
    }
}
