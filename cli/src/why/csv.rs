// SPDX-License-Identifier: GPL-2.0

//! What exits were about as comma separated values, as RFC 4180 has them.

use super::model::{Counts, Group, What, Why};
use crate::report::{given, quoted};

/// The line of titles. `time_s` is the moment of the snapshot, in seconds since the module was loaded,
/// and `span_s` the time that the numbers are of. `table` is `details`, `code` or `user_exits`, and
/// `about` is the row in words, empty for all others of the reason. What a table does not have is
/// left empty.
pub const HEADER: &str = "time_s,span_s,vm,name,pid,table,kind,code,reason,about,nested,exits,\
kernel,user,exits_missed,kernel_missed,user_missed,vmm_name,vmm_uuid,vmm_manager,vmm_id,\
vmm_unit\n";

/// Write a line for each row, and for the others of each reason.
pub fn csv(why: &Why, code: bool) -> String {
    let host = &why.host;
    let age = host.snapshot_tsc.saturating_sub(host.loaded_tsc);
    let time = crate::model::Span::of(age, host.tsc_khz);
    let mut text = String::new();
    for vm in &why.vms {
        let whose = [
            seconds(time.seconds),
            seconds(vm.span.seconds),
            vm.vm.to_string(),
            quoted(&vm.name),
            vm.pid.to_string(),
        ]
        .join(",");
        let names = given(&vm.vmm);
        let tables: &[(&str, &[Group])] = match code {
            true => &[("code", &vm.code)],
            false => &[("details", &vm.details), ("user_exits", &vm.user_exits)],
        };
        for (table, groups) in tables {
            for group in *groups {
                text += &of_group(&format!("{whose},{table}"), &names, group);
            }
        }
    }
    text
}

fn of_group(whose: &str, names: &str, group: &Group) -> String {
    let label = &group.label;
    let whose = format!(
        "{whose},{},{},{}",
        label.kind,
        number(label.code),
        label.name.map_or_else(String::new, quoted),
    );
    let mut text = String::new();
    for row in &group.rows {
        let missed = match row.what {
            What::User { .. } => ",,".to_owned(),
            _ => counts(&row.missed),
        };
        text += &format!(
            "{whose},{},{},{},{missed},{names}\n",
            quoted(&row.words),
            u8::from(row.nested),
            counts(&row.counts)
        );
    }
    if !group.others.is_zero() {
        text += &format!("{whose},,,{},,,,{names}\n", counts(&group.others));
    }
    text
}

fn counts(counts: &Counts) -> String {
    let Counts {
        exits,
        kernel,
        user,
    } = *counts;
    format!("{exits},{},{}", number(kernel), number(user))
}

fn number(number: Option<impl ToString>) -> String {
    number.map_or_else(String::new, |number| number.to_string())
}

fn seconds(seconds: Option<f64>) -> String {
    seconds.map_or_else(String::new, |seconds| format!("{seconds:.6}"))
}
