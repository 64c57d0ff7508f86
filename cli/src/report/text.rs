// SPDX-License-Identifier: GPL-2.0

//! The report as text.

use std::collections::BTreeSet;

use exitmeter_meter::phase::Phase;

use super::Selection;
use crate::{
    model::{Counts, Cycles, HostReport, Ledger, Meter, ReasonRow, Report, Span, VcpuReport},
    names::VmNames,
    numbers::{at_least, exact, rate, rough, rounded, share, time},
    output::TextOptions,
    paint::{paint, Style},
    spread::Spread,
    table::{
        Cell,
        Side::{Left, Right},
        Table,
    },
};

/// Width of a full bar, in characters.
const BAR: usize = 40;

/// Format the report.
pub fn text(report: &Report, selection: &Selection<'_>, options: TextOptions) -> String {
    let mut writer = Writer::new(opening(report), options);
    if report.unmetered_vcpus != 0 {
        let vcpus = format_count(report.unmetered_vcpus, "vCPU");
        let line = format!("not metered: {vcpus} (past max_vcpus, no memory, or a trust domain)");
        writer.text += &(paint(&line, Style::Warning, options.color) + "\n");
    }
    if report.vms.is_empty() {
        writer.text += "\nNo VM runs.\n";
    }
    for vm in &report.vms {
        let (name, pid) = (options.plain(&vm.label()), vm.pid);
        let vcpus = format_count(vm.vcpus.len() as u64, "vCPU");
        let exits = exits(&vm.ledger, Some(vm.span));
        writer.title(&format!("{name}, process {pid}: {exits}, {vcpus}"));
        writer.names(&vm.vmm);
        writer.phases(&vm.ledger);
        writer.vcpus(&report.host, &vm.vcpus);
        writer.reasons(&vm.ledger, Some(vm.span));
    }
    let departed = &report.departed;
    if departed.vcpus_gone != 0 && !selection.is_part() {
        let vcpus = format_count(departed.vcpus_gone, "vCPU");
        let exits = exits(&departed.ledger, None);
        writer.title(&format!("gone: {exits}, {vcpus}"));
        writer.phases(&departed.ledger);
        writer.reasons(&departed.ledger, None);
    }
    writer.finish()
}

/// Format the lines about the host and the time.
fn opening(report: &Report) -> String {
    let host = &report.host;
    let isa = host.isa.name().to_uppercase();
    let clock = match host.tsc_khz {
        Some(khz) => format!("{:.3} MHz", f64::from(khz) / 1000.0),
        None => "of unknown rate".to_owned(),
    };
    let unstable = if host.tsc_stable { "" } else { ", unstable" };
    let age = time(
        host.snapshot_tsc.saturating_sub(host.loaded_tsc),
        host.tsc_khz,
    );
    if host.source == Meter::Bpf {
        let passed = report
            .interval
            .map(|interval| time(interval.ticks, host.tsc_khz));
        let since = match passed {
            Some(passed) => format!("in {passed}, up to {age} after it was attached"),
            None => format!("attached {age} ago"),
        };
        return format!("host: {isa}, source: bpf, cycles are nanoseconds, {since}\n");
    }
    if let Some(interval) = report.interval {
        let passed = time(interval.ticks, host.tsc_khz);
        return format!(
            "in {passed}, up to {age} after the module was loaded ({isa}, TSC {clock}{unstable})\n"
        );
    }
    let guests = match host.leaf_map {
        Some(0) => "guests read nothing".to_owned(),
        map => {
            let map = map.map_or("?".to_owned(), |map| map.to_string());
            let scope = if host.host_scope {
                "the host"
            } else {
                "their VM"
            };
            format!("guests read the sums of {scope} by leaf map {map}")
        }
    };
    format!("host: {isa}, TSC {clock}{unstable}, loaded {age} ago\n{guests}\n")
}

/// Format the number of exits, and their rate.
fn exits(ledger: &Ledger, span: Option<Span>) -> String {
    let exits = format_count(ledger.exits, "exit");
    match span.and_then(|span| span.per_second(ledger.exits)) {
        Some(per_second) => format!("{exits}, {}/s", rate(Some(per_second))),
        None => exits,
    }
}

/// Builder of a report's text.
pub(crate) struct Writer {
    text: String,
    /// Titles of columns that did not fit.
    dropped: BTreeSet<String>,
    options: TextOptions,
}

impl Writer {
    /// Create a builder with the opening lines.
    pub(crate) fn new(text: String, options: TextOptions) -> Self {
        Self {
            text,
            dropped: BTreeSet::new(),
            options,
        }
    }

    /// Return the text, with a line about the columns that did not fit.
    fn finish(mut self) -> String {
        if !self.dropped.is_empty() {
            let columns: Vec<_> = self.dropped.into_iter().collect();
            let words = format!("No room for: {}.", columns.join(", "));
            let rest = "--json has all.";
            let fits = self
                .options
                .width
                .is_none_or(|width| words.len() + 1 + rest.len() <= width);
            let gap = if fits { ' ' } else { '\n' };
            self.text += &format!("\n{words}{gap}{rest}\n");
        }
        self.text
    }

    /// Return the text with a last line.
    pub(crate) fn end(mut self, line: &str) -> String {
        self.text += &format!("\n{line}\n");
        self.finish()
    }

    fn title(&mut self, title: &str) {
        let title = paint(title, Style::Strong, self.options.color);
        self.text += &format!("\n{title}\n\n");
    }

    /// Write the VM's further names, as many in a line as fit. Leave out a name that does not
    /// fit alone.
    fn names(&mut self, given: &VmNames) {
        let mut lines: Vec<String> = Vec::new();
        let fits = |text: &str| {
            let width = self.options.width;
            width.is_none_or(|width| text.chars().count() <= width)
        };
        for words in given.others() {
            let words = self.options.plain(&words);
            let joined = lines.last().map(|line| format!("{line}, {words}"));
            match joined.filter(|line| fits(line)) {
                Some(joined) => {
                    lines.pop();
                    lines.push(joined);
                }
                None if fits(&words) => lines.push(words),
                None => {
                    let what = words.split(' ').next().unwrap_or_default();
                    self.dropped.insert(what.to_owned());
                }
            }
        }
        if !lines.is_empty() {
            self.text += &(lines.join("\n") + "\n\n");
        }
    }

    pub(crate) fn table<const COLUMNS: usize>(&mut self, table: &Table<COLUMNS>) {
        self.text += &table.text(self.options.color);
        self.dropped.extend(table.dropped().iter().cloned());
    }

    /// Write the table of phases.
    pub(crate) fn phases(&mut self, ledger: &Ledger) {
        let all = &ledger.cycles;
        let whole = all.sum();
        // List the phases, and behind the kernel phase the polling that is part of it.
        let mut lines: Vec<_> = all
            .phases()
            .map(|phase| {
                let text = at_least(exact(all.of(phase)), all.is_full(phase));
                (all.name(phase), all.of(phase), text, Style::Phase(phase))
            })
            .collect();
        let polled = ledger.polled.filter(|polled| *polled != 0);
        let kernel = lines.iter().position(|line| line.0 == Phase::Kernel.name());
        if let (Some(polled), Some(kernel)) = (polled, kernel) {
            let style = Style::Phase(Phase::Kernel);
            lines.insert(kernel + 1, (POLLED_OF_IT, polled, exact(polled), style));
        }
        let widest = |lengths: Vec<usize>| lengths.into_iter().max().unwrap_or(0);
        let names = widest(lines.iter().map(|line| line.0.len()).collect());
        let cycles = widest(lines.iter().map(|line| line.2.len()).collect()).max("cycles".len());
        // Width before the bar: phase, cycles, share and the gaps.
        let before = names + cycles + "100.0%".len() + 3 * 2;
        let room = self
            .options
            .width
            .map_or(BAR, |width| width.saturating_sub(before));
        let mut table = Table::new([
            ("phase", Left),
            ("cycles", Right),
            ("share", Right),
            ("", Left),
        ]);
        for (name, part, text, style) in lines {
            table.row([
                Cell::new(name, style),
                text.into(),
                share(part, whole).into(),
                Cell::new(self.options.bar(part, whole, room.min(BAR) as u32), style),
            ]);
        }
        self.table(&table);
        self.text.push('\n');
    }

    /// Write the table of vCPUs: phases, and the present phase.
    fn vcpus(&mut self, host: &HostReport, vcpus: &[VcpuReport]) {
        let none_nested = none_nested(vcpus.iter().map(|vcpu| vcpu.ledger.nested_exits));
        let (halted, none_waits) = sleeps(vcpus.iter().map(|vcpu| &vcpu.ledger.cycles));
        let none_polled = none_polled(vcpus.iter().map(|vcpu| vcpu.ledger.polled));
        let spare = ["cycles", POLLED, "now", "preempted", "waiting"];
        let table = Table::fitted(self.options, &spare, |number| {
            let mut table = Table::new([
                ("vCPU", Right),
                ("now", Left),
                ("exits", Right),
                (NESTED, Right),
                ("cycles", Right),
                ("guest", Right),
                ("kernel", Right),
                (POLLED, Right),
                ("user", Right),
                (halted, Right),
                ("waiting", Right),
                ("preempted", Right),
            ]);
            for vcpu in vcpus {
                let whole = vcpu.ledger.cycles.sum();
                let of = |phase| Cell::from(share(vcpu.ledger.cycles.of(phase), whole));
                let phase = vcpu.phase_name.unwrap_or("?");
                let polled = vcpu.ledger.polled.unwrap_or(0);
                let now = format!("{phase} for {}", time(vcpu.phase_ticks, host.tsc_khz));
                let style = vcpu.phase.map_or(Style::Plain, Style::Phase);
                table.row([
                    vcpu.vcpu.to_string().into(),
                    Cell::new(now, style),
                    number(vcpu.ledger.exits.into()).into(),
                    nested(vcpu.ledger.nested_exits, number).into(),
                    number(whole).into(),
                    of(Phase::Guest),
                    of(Phase::Kernel),
                    share(polled, whole).into(),
                    of(Phase::User),
                    of(Phase::Halted),
                    of(Phase::Waiting),
                    of(Phase::Preempted),
                ]);
            }
            if none_waits {
                table.hide(&["waiting"]);
            }
            if none_polled {
                table.hide(&[POLLED]);
            }
            if none_nested {
                table.hide(&[NESTED]);
            }
            table
        });
        self.table(&table);
        self.text.push('\n');
    }

    /// Write the table of reasons. "kernel" and the columns computed from it are without polling;
    /// "share" is the part of all kernel cycles. The columns of phases are the time that vCPUs
    /// spent there with this as their latest exit. Columns that the snapshot has no data for are
    /// left out.
    pub(crate) fn reasons(&mut self, ledger: &Ledger, span: Option<Span>) {
        if ledger.reasons.is_empty() {
            self.text += "no exit, and no time passed\n";
            return;
        }
        let single = ledger.reasons.iter().any(|row| row.spread.is_some());
        let rates = span.is_some_and(|span| span.seconds.is_some());
        let (halted, none_waits) = sleeps([&ledger.cycles]);
        let spare = [
            "preempted",
            "guest",
            "code",
            "p50",
            "waiting",
            halted,
            POLLED,
            "user",
            "max",
            "mean",
            "/s",
        ];
        let table = Table::fitted(self.options, &spare, |number| {
            let mut table = Table::new([
                ("code", Right),
                ("reason", Left),
                ("exits", Right),
                (NESTED, Right),
                ("/s", Right),
                ("kernel", Right),
                (POLLED, Right),
                ("share", Right),
                ("mean", Right),
                ("p50", Right),
                ("p99", Right),
                ("max", Right),
                ("guest", Right),
                ("user", Right),
                (halted, Right),
                ("waiting", Right),
                ("preempted", Right),
            ]);
            for row in &ledger.reasons {
                table.row(cells(row, ledger, span, number));
            }
            if !single {
                table.hide(&["p50", "p99", "max"]);
            }
            if !rates {
                table.hide(&["/s"]);
            }
            if none_nested([ledger.nested_exits]) {
                table.hide(&[NESTED]);
            }
            if none_waits {
                table.hide(&["waiting"]);
            }
            if none_polled([ledger.polled]) {
                table.hide(&[POLLED]);
            }
            table
        });
        self.table(&table);
    }
}

/// Format the cells of one reason.
fn cells(
    row: &ReasonRow,
    ledger: &Ledger,
    span: Option<Span>,
    number: fn(u128) -> String,
) -> [String; 17] {
    let Counts {
        exits,
        nested_exits,
        cycles,
        polled,
    } = row.counts;
    let single = |ticks: fn(&Spread) -> Option<u64>| {
        let ticks = row.spread.as_ref().and_then(ticks);
        ticks.map_or_else(|| "-".to_owned(), rough)
    };
    let unsure = match row.spread {
        Some(spread) if !spread.max_exact => "~",
        _ => "",
    };
    let full = |text, phase| at_least(text, cycles.is_full(phase));
    let phase = |phase| full(rough(cycles.of(phase)), phase);
    let mean = rounded(row.cost(), exits);
    [
        format_code(row.label.code),
        row.label.to_string(),
        number(exits.into()),
        nested(nested_exits, number),
        rate(span.and_then(|span| span.per_second(exits))),
        full(number(row.cost()), Phase::Kernel),
        polled.map_or_else(|| "-".to_owned(), rough),
        share(row.cost(), ledger.cost()),
        mean.map_or_else(|| "-".to_owned(), number),
        single(|spread| spread.quantile(50)),
        single(|spread| spread.quantile(99)),
        unsure.to_owned() + &single(|spread| Some(spread.max).filter(|max| *max != 0)),
        phase(Phase::Guest),
        phase(Phase::User),
        phase(Phase::Halted),
        phase(Phase::Waiting),
        phase(Phase::Preempted),
    ]
}

/// Title of the column of KVM's polling, shown when there was some.
const POLLED: &str = "polled";
/// Title of the line of polling, as a part of the kernel phase.
const POLLED_OF_IT: &str = "- polled";

/// Return true if the column of polling would be empty.
fn none_polled(polled: impl IntoIterator<Item = Option<u128>>) -> bool {
    let mut polled = polled.into_iter();
    polled.all(|polled| matches!(polled, None | Some(0)))
}

/// Return the title of the column of [`Phase::Halted`], and true if the snapshot does not
/// tell the two sleeps apart. Then [`Phase::Waiting`] has no column.
fn sleeps<'a>(cycles: impl IntoIterator<Item = &'a Cycles>) -> (&'static str, bool) {
    let both = cycles.into_iter().find(|cycles| !cycles.separates_waits);
    let named = both.copied().unwrap_or_default();
    (named.name(Phase::Halted), both.is_some())
}

/// Title of the column of exits of L2 guests, shown when there are some.
const NESTED: &str = "nested";

/// Format the nested column: the exits of L2 guests, or a dash where the module does not count
/// them.
fn nested(exits: Option<u64>, number: fn(u128) -> String) -> String {
    exits.map_or_else(|| "-".to_owned(), |exits| number(exits.into()))
}

/// Return true if the nested column would be empty.
fn none_nested(exits: impl IntoIterator<Item = Option<u64>>) -> bool {
    exits
        .into_iter()
        .all(|exits| matches!(exits, None | Some(0)))
}

/// Format a code in decimal, as in leaves and the kernel log. Rows without a code get an empty
/// text.
pub(crate) fn format_code(code: Option<u32>) -> String {
    code.map_or_else(String::new, |code| code.to_string())
}

/// Format a number with its noun, in the plural unless it is 1.
pub(crate) fn format_count(number: u64, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {thing}{plural}", exact(number))
}
