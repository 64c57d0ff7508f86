// SPDX-License-Identifier: GPL-2.0

//! The report as comma-separated values (RFC 4180).

use super::Selection;
use crate::{
    model::{ReasonRow, Report, Span},
    names::VmNames,
};

/// Line of titles. `time_s` is the moment of the snapshot, in seconds since the module was loaded.
/// `span_s` is the time that the numbers cover. An unknown number is empty, as are `vm`, `pid` and
/// `span_s` of the sums of vCPUs that are gone. `kernel`, `share` and `mean` include the time that
/// KVM polled; `polled` is that part of `kernel`. `blocked` is the sum of `halted` and `waiting`.
/// `name` is KVM's name, and `vmm_name` the name that the VMM was given.
pub const HEADER: &str = "time_s,span_s,vm,name,pid,vcpu,kind,code,reason,exits,nested_exits,\
per_second,guest,kernel,user,blocked,preempted,share,mean,p50,p90,p99,max,max_exact,halted,waiting,\
polled,vmm_name,vmm_uuid,vmm_manager,vmm_id,vmm_unit\n";

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
    let texts = [name, uuid, manager, id, unit];
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
        let owner = [
            time.clone(),
            seconds(&vm.span),
            vm.vm.to_string(),
            quoted(&vm.name),
            vm.pid.to_string(),
            number(selection.vcpu),
        ]
        .join(",");
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
    let rate = span.and_then(|span| span.per_second(row.exits));
    let part = |whole: u128| (whole != 0).then(|| row.cycles.kernel as f64 / whole as f64);
    let spread = row.spread.as_ref();
    let quantile = |percent| number(spread.and_then(|spread| spread.quantile(percent)));
    let mut fields = vec![
        owner.to_owned(),
        row.label.kind.to_owned(),
        number(row.label.code),
        row.label.name.map_or_else(String::new, quoted),
        row.exits.to_string(),
        number(row.nested_exits),
        decimal(rate, 3),
    ];
    let cycles = &row.cycles;
    let phases = [
        cycles.guest,
        cycles.kernel,
        cycles.user,
        cycles.blocked(),
        cycles.preempted,
    ];
    fields.extend(phases.map(|ticks| ticks.to_string()));
    fields.extend([decimal(part(kernel), 6), decimal(part(row.exits.into()), 1)]);
    fields.extend([50, 90, 99].map(quantile));
    let max = spread.filter(|spread| spread.max != 0);
    fields.push(number(max.map(|spread| spread.max)));
    fields.push(number(max.map(|spread| spread.max_exact)));
    let sleeps = [cycles.halted, cycles.waiting];
    fields.extend(sleeps.map(|ticks| number(cycles.separates_waits.then_some(ticks))));
    fields.push(number(row.polled));
    fields.push(names.to_owned());
    fields.join(",") + "\n"
}

fn number(number: Option<impl ToString>) -> String {
    number.map_or_else(String::new, |number| number.to_string())
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
