// SPDX-License-Identifier: GPL-2.0

//! Slow exits of this VM, read inside the guest. The host's CPUs and its time stay unknown.

use std::cmp::Reverse;

use exitmeter_guest::{Isa, Phase, SlowExit};
use serde::Serialize;

use super::tables::{Reading, SlowCpu};
use crate::{
    model::{optional_hexadecimal, Label},
    output::TextOptions,
    paint::{paint, Style},
    table::{
        Side::{Left, Right},
        Table,
    },
    why::{
        detail::{nested_mark, user_exit, Detail},
        symbols::{self, Symbols},
    },
};

/// Slow exits. The field names are those of `--json` and stay.
#[derive(Clone, Debug, Serialize)]
pub struct Slow {
    /// vCPUs whose exits were read.
    pub vcpus: usize,
    /// vCPUs that were not read, because this process may not run on their CPUs.
    pub vcpus_unread: usize,
    /// Slowest exits, the longest first.
    pub slowest: Vec<Exit>,
    /// Frozen rings: the exits up to one that was too slow.
    pub rings: Vec<Ring>,
}

/// Last exits of a vCPU before its ring froze. The last one was too slow.
#[derive(Clone, Debug, Serialize)]
pub struct Ring {
    /// This guest's CPU.
    pub cpu: u32,
    /// Exits, the oldest first.
    pub exits: Vec<Exit>,
}

/// One exit.
#[derive(Clone, Debug, Serialize)]
pub struct Exit {
    /// This guest's CPU.
    pub cpu: u32,
    /// TSC ticks of the host since the exit.
    pub ago: u64,
    /// Number of the exit among the vCPU's exits since details were turned on.
    pub sequence: u64,
    /// Exit reason.
    #[serde(flatten)]
    pub label: Label,
    /// Detail of the exit.
    pub detail: Option<Detail>,
    /// The detail, in words.
    pub words: Option<String>,
    /// True for an exit from a nested guest.
    pub nested: bool,
    /// Guest RIP, if the guest's kernel asks.
    #[serde(serialize_with = "optional_hexadecimal")]
    pub rip: Option<u64>,
    /// The guest RIP, in words.
    pub code: Option<String>,
    /// TSC ticks that count as slow: the sum of the phases below without `halted`.
    pub took: u64,
    /// TSC ticks in the host's kernel.
    pub kernel: u64,
    /// TSC ticks in the VMM.
    pub user: u64,
    /// TSC ticks asleep for the host.
    pub waiting: u64,
    /// TSC ticks preempted.
    pub preempted: u64,
    /// TSC ticks asleep in HLT, by the guest's own wish.
    pub halted: u64,
    /// Number of times that the host's scheduler took the vCPU off its CPU.
    pub scheduled_out: u32,
    /// KVM_EXIT_* of `struct kvm_run`, if the exit went to user space.
    pub exit_reason: Option<u32>,
}

impl Exit {
    fn new(cpu: u32, exit: &SlowExit, isa: Isa, symbols: &Symbols) -> Self {
        let ticks = |phase| exit.ticks.get(phase as usize).copied().unwrap_or(0);
        let head = &exit.head;
        let detail = (head.detail_kind != 0).then(|| Detail::new(head.detail_kind, head.key));
        let [kernel, user, waiting, preempted] =
            [Phase::Kernel, Phase::User, Phase::Waiting, Phase::Preempted].map(ticks);
        let took = [kernel, user, waiting, preempted];
        Self {
            cpu,
            ago: exit.ago,
            sequence: exit.sequence,
            label: Label::new(isa, head.reason),
            words: detail.map(|detail| detail.words()),
            detail,
            nested: head.nested,
            rip: exit.rip,
            code: exit.rip.map(|rip| {
                let place = symbols.find(rip);
                symbols::words(rip, place.map(|place| (place.symbol, place.offset)))
            }),
            took: took.into_iter().fold(0, u64::saturating_add),
            kernel,
            user,
            waiting,
            preempted,
            halted: ticks(Phase::Halted),
            scheduled_out: exit.scheduled_out,
            exit_reason: exit.user_exit,
        }
    }
}

impl Slow {
    /// Collect the slow exits of each CPU.
    pub fn new(
        reading: &Reading,
        cpus: impl IntoIterator<Item = (u32, SlowCpu)>,
        isa: Isa,
        symbols: &Symbols,
    ) -> Self {
        let (mut slowest, mut rings) = (Vec::new(), Vec::new());
        for (cpu, slow) in cpus {
            let exit = |exit: &SlowExit| Exit::new(cpu, exit, isa, symbols);
            slowest.extend(slow.slowest.iter().map(exit));
            if !slow.ring.is_empty() {
                let exits = slow.ring.iter().map(exit).collect();
                rings.push(Ring { cpu, exits });
            }
        }
        slowest.sort_by_key(|exit| Reverse(exit.took));
        Self {
            vcpus: reading.vcpus(),
            vcpus_unread: reading.unread(),
            slowest,
            rings,
        }
    }

    /// Format the exits as tables, with up to `limit` of the slowest.
    pub fn text(&self, limit: usize, options: TextOptions) -> String {
        let slowest: Vec<_> = self.slowest.iter().take(limit).collect();
        let mut text = format!(
            "\n{}\n\n{}",
            paint("the slowest exits", Style::Strong, options.color),
            table(&slowest, options)
        );
        for ring in &self.rings {
            let title = format!(
                "CPU {}: the last exits up to one that was too slow",
                ring.cpu
            );
            let exits: Vec<_> = ring.exits.iter().collect();
            text += &format!(
                "\n{}\n\n{}",
                paint(&title, Style::Strong, options.color),
                table(&exits, options)
            );
        }
        if self.vcpus_unread != 0 {
            let all = self.vcpus + self.vcpus_unread;
            text += &format!(
                "read on {} of {all} CPUs: this command may not run on the others\n",
                self.vcpus
            );
        }
        text + "\nall times are TSC ticks of the host\n"
    }
}

fn table(exits: &[&Exit], options: TextOptions) -> String {
    let spare = ["CPU", "outs", "code", "to user space", "halted"];
    let table = Table::fitted(options, &spare, |number| {
        let mut table = Table::new([
            ("CPU", Right),
            ("ago", Right),
            ("exit", Left),
            ("code", Left),
            ("took", Right),
            ("kernel", Right),
            ("user", Right),
            ("waiting", Right),
            ("preempted", Right),
            ("halted", Right),
            ("outs", Right),
            ("to user space", Left),
        ]);
        for exit in exits {
            let about = exit.words.as_ref().map(|words| format!(" {words}"));
            let nested = nested_mark(exit.nested);
            let ticks = |ticks: u64| number(ticks.into());
            table.row([
                exit.cpu.to_string(),
                ticks(exit.ago),
                format!("{}{}{nested}", exit.label, about.unwrap_or_default()),
                exit.code.clone().unwrap_or_default(),
                ticks(exit.took),
                ticks(exit.kernel),
                ticks(exit.user),
                ticks(exit.waiting),
                ticks(exit.preempted),
                ticks(exit.halted),
                exit.scheduled_out.to_string(),
                exit.exit_reason
                    .map_or_else(String::new, |why| user_exit(why.into())),
            ]);
        }
        if exits.iter().all(|exit| exit.code.is_none()) {
            table.hide(&["code"]);
        }
        table
    });
    table.text(options.color)
}
