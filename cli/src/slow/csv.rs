// SPDX-License-Identifier: GPL-2.0

//! Slow exits as comma-separated values (RFC 4180).

use super::model::{Exit, Slow};
use crate::{
    report::{quoted, vmm_columns},
    why::csv::optional,
};

/// Line of titles. Times are TSC ticks. Unknown and absent values are empty.
const HEADER: &str = "when,tsc,vm,name,pid,vcpu,sequence,kind,code,reason,about,nested,rip,symbol,\
cpu_exit,cpu_entry,took,kernel,user,waiting,preempted,halted,scheduled_out,exit_reason,culprit,\
vmm_name,vmm_uuid,vmm_manager,vmm_id,vmm_unit\n";

/// Format a line for each of the slowest exits, or for each exit of the rings.
pub fn csv(slow: &Slow, ring: bool) -> String {
    let mut text = HEADER.to_owned();
    for vm in &slow.vms {
        let vm_columns = format!("{},{},{}", vm.vm, quoted(&vm.name), vm.pid);
        let names = vmm_columns(&vm.vmm);
        if ring {
            for exit in vm.rings.iter().flat_map(|ring| &ring.exits) {
                text += &line(&vm_columns, &names, exit);
            }
        } else {
            for exit in &vm.slowest {
                text += &line(&vm_columns, &names, exit);
            }
        }
    }
    text
}

fn line(vm_columns: &str, names: &str, exit: &Exit) -> String {
    let fields = [
        optional(exit.when),
        exit.tsc.to_string(),
        vm_columns.to_owned(),
        exit.vcpu.to_string(),
        exit.sequence.to_string(),
        exit.label.kind.to_owned(),
        optional(exit.label.code),
        exit.label.name.map_or_else(String::new, quoted),
        exit.words.as_deref().map_or_else(String::new, quoted),
        u8::from(exit.nested).to_string(),
        exit.rip.map_or_else(String::new, |rip| format!("{rip:#x}")),
        exit.symbol
            .is_some()
            .then(|| exit.place())
            .flatten()
            .map_or_else(String::new, |place| quoted(&place)),
        optional(exit.cpu_exit),
        optional(exit.cpu_entry),
        exit.took.to_string(),
        exit.kernel.to_string(),
        exit.user.to_string(),
        exit.waiting.to_string(),
        exit.preempted.to_string(),
        exit.halted.to_string(),
        exit.scheduled_out.to_string(),
        exit.to_user().map_or_else(String::new, |why| quoted(&why)),
        u8::from(exit.culprit).to_string(),
        names.to_owned(),
    ];
    fields.join(",") + "\n"
}
