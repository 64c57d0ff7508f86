// SPDX-License-Identifier: GPL-2.0

//! Runs BPF programs that do what those of bcc and bpftrace do. Their source is in ../../bpf.

use std::fs;

use anyhow::{ensure, Context as _, Result};
use aya::{
    maps::{HashMap, PerCpuArray},
    programs::{RawTracePoint, TracePoint},
    Ebpf, EbpfLoader, Pod,
};

use super::{ftrace, CountedExits, RunningMeter};
use crate::driver::{reason, BPF_FOLDER, REASON_FILE};

/// Kind of tracepoint that a program is attached to.
#[derive(Clone, Copy, Debug)]
pub enum AttachPoint {
    /// The raw tracepoint, which passes the tracepoint's arguments.
    RawTracepoint,
    /// The trace event, which the kernel builds from them.
    TraceEvent,
}

/// Attached BPF programs of one meter.
pub struct Attached {
    ebpf: Ebpf,
    read_exits: fn(&mut Ebpf) -> Result<u64>,
}

/// `struct counts` of count.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct Counts {
    thread: u64,
    exits: [u64; 256],
}
// SAFETY: Any bytes are valid numbers, and there is no padding.
unsafe impl Pod for Counts {}

/// `struct code_key` of code.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct CodeKey {
    rip: u64,
    reason: u64,
}
// SAFETY: Any bytes are valid numbers, and there is no padding.
unsafe impl Pod for CodeKey {}

/// `struct code_value` of code.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct CodeValue {
    exits: u64,
    time: u64,
}
// SAFETY: Any bytes are valid numbers, and there is no padding.
unsafe impl Pod for CodeValue {}

/// `struct histogram` of latency.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct Histogram {
    slots: [u64; 64],
}
// SAFETY: Any bytes are valid numbers, and there is no padding.
unsafe impl Pod for Histogram {}

impl Attached {
    /// Attach the program that counts exits by thread and reason.
    pub fn count(point: AttachPoint) -> Result<Self> {
        let mut ebpf = load("count.bpf.o")?;
        attach(&mut ebpf, point, "kvm_exit")?;
        Ok(Self {
            ebpf,
            read_exits: |ebpf| {
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

    /// Attach the program that counts exits by reason and guest RIP, and with `with_time` adds up their
    /// time.
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
            read_exits: |ebpf| {
                let map = ebpf.map("rows").context("there is no map")?;
                let map = HashMap::<_, CodeKey, CodeValue>::try_from(map)?;
                let mut sum = 0;
                for row in map.iter() {
                    sum += row?.1.exits;
                }
                Ok(sum)
            },
        })
    }

    /// Attach the programs that take the time from exit to entry, by reason.
    pub fn latency(point: AttachPoint) -> Result<Self> {
        let mut ebpf = load("latency.bpf.o")?;
        attach(&mut ebpf, point, "kvm_exit")?;
        attach(&mut ebpf, point, "kvm_entry")?;
        Ok(Self {
            ebpf,
            read_exits: |ebpf| {
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

/// Load an object file, and set the offsets at which this kernel keeps the exit reason.
fn load(name: &str) -> Result<Ebpf> {
    ftrace::mount()?;
    check_event()?;
    let text = fs::read_to_string(REASON_FILE)?;
    let offsets: reason::Offsets = serde_json::from_str(&text)?;
    let path = format!("{BPF_FOLDER}/{name}");
    EbpfLoader::new()
        .set_global("pointer_offset", &offsets.pointer.unwrap_or(u32::MAX), true)
        .set_global("reason_offset", &offsets.reason, true)
        .load_file(&path)
        .with_context(|| format!("the kernel refuses {path}"))
}

/// Check that the fields of the event kvm_exit are where the programs read them. All kernels so far
/// agree on that.
fn check_event() -> Result<()> {
    let format = fs::read_to_string("/sys/kernel/tracing/events/kvm/kvm_exit/format")?;
    for (name, place) in [
        ("exit_reason;", "offset:8;\tsize:4;"),
        ("guest_rip;", "offset:16;\tsize:8;"),
    ] {
        let field = format.lines().find(|line| line.contains(name));
        ensure!(
            field.is_some_and(|field| field.contains(place)),
            "the event kvm_exit has another layout than tests/bench/bpf/common.h says"
        );
    }
    Ok(())
}

fn attach(ebpf: &mut Ebpf, point: AttachPoint, event: &str) -> Result<()> {
    match point {
        AttachPoint::RawTracepoint => {
            let program = program(ebpf, &format!("{event}_raw"))?;
            let program: &mut RawTracePoint = program.try_into()?;
            program.load()?;
            program.attach(event)?;
            Ok(())
        }
        AttachPoint::TraceEvent => attach_event(ebpf, event, event),
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

impl RunningMeter for Attached {
    fn stop(mut self: Box<Self>) -> Result<CountedExits> {
        let exits = (self.read_exits)(&mut self.ebpf)?;
        Ok(CountedExits {
            exits: Some(exits),
            remark: None,
        })
    }
}
