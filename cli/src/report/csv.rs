// SPDX-License-Identifier: GPL-2.0

//! The report as comma-separated values (RFC 4180).

use super::Selection;
use crate::{
    model::{Counts, ReasonRow, Report, Span},
    names::VmNames,
    why::csv::optional,
};

/// Line of titles. `time_s` is the moment of the snapshot, in seconds since the module was loaded.
/// `span_s` is the time that the numbers cover. An unknown number is empty, as are `vm`, `pid` and
/// `span_s` of the sums of vCPUs that are gone. `kernel`, `share` and `mean` include the time that
/// KVM polled; `polled` is that part of `kernel`. `blocked` is the sum of `halted` and `waiting`.
/// `name` is KVM's name, and `vmm_name` the name that the VMM was given.
pub const HEADER: &str = "time_s,span_s,vm,name,pid,vcpu,kind,code,reason,exits,nested_exits,\
per_second,guest,kernel,user,blocked,preempted,share,mean,p50,p90,p99,max,max_exact,halted,waiting,\
polled,vmm_name,vmm_uuid,vmm_manager,vmm_id,vmm_unit\n";

/// Columns about the vCPUs of a line, which come first.
const OWNER: usize = 6;

/// Columns with the names that the VMM was given, which come last.
const NAMES: usize = 5;

/// Columns about the reason, in between.
const REASON: usize = {
    let (mut columns, mut at) = (1, 0);
    while at < HEADER.len() {
        columns += (HEADER.as_bytes()[at] == b',') as usize;
        at += 1;
    }
    columns - OWNER - NAMES
};

/// Format the names that the VMM was given, as the last columns of a line.
pub(crate) fn vmm_columns(given: &VmNames) -> String {
    let VmNames {
        name,
        uuid,
        manager,
        id,
        unit,
        ..
    } = given;
    let texts: [_; NAMES] = [name, uuid, manager, id, unit];
    let texts = texts.map(|text| text.as_deref().map_or_else(String::new, quoted));
    texts.join(",")
}

/// Format a line for each reason of each VM. With no selection, add the vCPUs that are gone. The
/// column `vcpu` has a number when only the vCPUs of that id are selected.
pub fn csv(report: &Report, selection: &Selection<'_>) -> String {
    let host = &report.host;
    let age = host.snapshot_tsc.saturating_sub(host.loaded_tsc);
    let time = seconds(&Span::of(age, host.tsc_khz));
    let mut text = String::new();
    for vm in &report.vms {
        let owner: [_; OWNER] = [
            time.clone(),
            seconds(&vm.span),
            vm.vm.to_string(),
            quoted(&vm.name),
            vm.pid.to_string(),
            optional(selection.vcpu),
        ];
        let owner = owner.join(",");
        let names = vmm_columns(&vm.vmm);
        for row in &vm.ledger.reasons {
            text += &line(&owner, &names, row, vm.ledger.cycles.kernel, Some(vm.span));
        }
    }
    if !selection.is_part() {
        let owner = format!("{time},,,departed,,");
        let ledger = &report.departed.ledger;
        let names = vmm_columns(&VmNames::default());
        for row in &ledger.reasons {
            text += &line(&owner, &names, row, ledger.cycles.kernel, report.interval);
        }
    }
    text
}

fn line(owner: &str, names: &str, row: &ReasonRow, kernel: u128, span: Option<Span>) -> String {
    let Counts {
        exits,
        nested_exits,
        cycles,
        polled,
    } = row.counts;
    let rate = span.and_then(|span| span.per_second(exits));
    let part = |whole: u128| (whole != 0).then(|| cycles.kernel as f64 / whole as f64);
    let spread = row.spread.as_ref();
    let quantile = |percent| optional(spread.and_then(|spread| spread.quantile(percent)));
    let max = spread.filter(|spread| spread.max != 0);
    let sleep = |ticks: u128| optional(cycles.separates_waits.then_some(ticks));
    let reason: [String; REASON] = [
        row.label.kind.to_owned(),
        optional(row.label.code),
        row.label.name.map_or_else(String::new, quoted),
        exits.to_string(),
        optional(nested_exits),
        decimal(rate, 3),
        cycles.guest.to_string(),
        cycles.kernel.to_string(),
        cycles.user.to_string(),
        cycles.blocked().to_string(),
        cycles.preempted.to_string(),
        decimal(part(kernel), 6),
        decimal(part(exits.into()), 1),
        quantile(50),
        quantile(90),
        quantile(99),
        optional(max.map(|spread| spread.max)),
        optional(max.map(|spread| spread.max_exact)),
        sleep(cycles.halted),
        sleep(cycles.waiting),
        optional(polled),
    ];
    format!("{owner},{},{names}\n", reason.join(","))
}

fn decimal(number: Option<f64>, places: usize) -> String {
    number.map_or_else(String::new, |number| format!("{number:.places$}"))
}

fn seconds(span: &Span) -> String {
    decimal(span.seconds, 6)
}

/// Return a text, in quotes if it needs them.
pub(crate) fn quoted(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_special_characters_are_quoted() {
        assert_eq!(quoted("kvm-1"), "kvm-1");
        assert_eq!(quoted("a,b"), "\"a,b\"");
        assert_eq!(quoted("a\"b"), "\"a\"\"b\"");
    }
}
