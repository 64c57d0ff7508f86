// SPDX-License-Identifier: GPL-2.0

//! Selection of the VMs, vCPUs and order that a report shows.

use crate::{
    model::{Report, Sort, Vm},
    names::{self, NoVm},
};

/// Selection of a part of a report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection<'a> {
    /// Name or process of the only VM to show.
    pub vm: Option<&'a str>,
    /// Id of the only vCPU to show, of each VM.
    pub vcpu: Option<u32>,
    /// Order of the reasons.
    pub sort: Sort,
}

/// Error for a selection that matches nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No VM matches.
    #[error(transparent)]
    NoVm(#[from] NoVm),
    /// No vCPU matches.
    #[error("no vCPU with the id {0} runs: vCPUs are counted from 0")]
    NoVcpu(u32),
}

impl Selection<'_> {
    /// Return true if the selection leaves something out.
    pub fn is_part(&self) -> bool {
        self.vm.is_some() || self.vcpu.is_some()
    }

    /// Return the selected part of a report. The sums of vCPUs that are gone stay as they are.
    ///
    /// # Errors
    ///
    /// Fails when nothing matches.
    pub fn apply(&self, mut report: Report) -> Result<Report, Error> {
        if let Some(vm) = self.vm {
            let meant = names::find(vm, report.vms.iter().map(Vm::candidate))?;
            report.vms.retain(|vm| meant.contains(&vm.vm));
        }
        if let Some(id) = self.vcpu {
            for vm in &mut report.vms {
                vm.vcpus.retain(|vcpu| vcpu.vcpu == id);
                vm.sum_up();
            }
            report.vms.retain(|vm| !vm.vcpus.is_empty());
            if report.vms.is_empty() {
                return Err(Error::NoVcpu(id));
            }
        }
        let vms = report.vms.iter_mut();
        let ledgers = vms.flat_map(|vm| {
            let vcpus = vm.vcpus.iter_mut().map(|vcpu| &mut vcpu.ledger);
            std::iter::once(&mut vm.ledger).chain(vcpus)
        });
        for ledger in ledgers.chain([&mut report.departed.ledger]) {
            ledger.sort(self.sort);
        }
        Ok(report)
    }
}
