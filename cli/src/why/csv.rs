// SPDX-License-Identifier: GPL-2.0

//! Details of exits as comma-separated values (RFC 4180).

use super::model::{Counts, Group, Subject, Why};
use crate::{
    model::Span,
    report::{quoted, vmm_columns},
};

/// Line of titles. `time_s` is the moment of the snapshot, in seconds since the module was loaded.
/// `span_s` is the time that the numbers cover. `table` is `details`, `code` or `user_exits`.
/// `about` is the row in words, empty for all others of the reason. Columns that a table does not
/// have are empty.
pub const HEADER: &str = "time_s,span_s,vm,name,pid,table,kind,code,reason,about,nested,exits,\
kernel,user,exits_missed,kernel_missed,user_missed,vmm_name,vmm_uuid,vmm_manager,vmm_id,\
vmm_unit\n";

/// Format a line for each row, and for the others of each reason.
pub fn csv(why: &Why, code: bool) -> String {
    let host = &why.host;
    let age = host.snapshot_tsc.saturating_sub(host.loaded_tsc);
    let time = Span::of(age, host.tsc_khz);
    let mut text = String::new();
    for vm in &why.vms {
        let owner = [
            seconds(time.seconds),
            seconds(vm.span.seconds),
            vm.vm.to_string(),
            quoted(&vm.name),
            vm.pid.to_string(),
        ]
        .join(",");
        let names = vmm_columns(&vm.vmm);
        let tables: &[(&str, &[Group])] = match code {
            true => &[("code", &vm.code)],
            false => &[("details", &vm.details), ("user_exits", &vm.user_exits)],
        };
        for (table, groups) in tables {
            for group in *groups {
                text += &group_lines(&format!("{owner},{table}"), &names, group);
            }
        }
    }
    text
}

fn group_lines(owner: &str, names: &str, group: &Group) -> String {
    let label = &group.label;
    let owner = format!(
        "{owner},{},{},{}",
        label.kind,
        optional(label.code),
        label.name.map_or_else(String::new, quoted),
    );
    let mut text = String::new();
    for row in &group.rows {
        let missed = match row.subject {
            Subject::User { .. } => ",,".to_owned(),
            _ => counts(&row.missed),
        };
        text += &format!(
            "{owner},{},{},{},{missed},{names}\n",
            quoted(&row.words),
            u8::from(row.nested),
            counts(&row.counts)
        );
    }
    if !group.others.is_zero() {
        text += &format!("{owner},,,{},,,,{names}\n", counts(&group.others));
    }
    text
}

fn counts(counts: &Counts) -> String {
    let Counts {
        exits,
        kernel,
        user,
    } = *counts;
    format!("{exits},{},{}", optional(kernel), optional(user))
}

/// Format a value, or nothing if it is unknown.
pub(crate) fn optional(value: Option<impl ToString>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

fn seconds(seconds: Option<f64>) -> String {
    seconds.map_or_else(String::new, |seconds| format!("{seconds:.6}"))
}
