// SPDX-License-Identifier: GPL-2.0

//! What of a snapshot is shown, and in which order.

use crate::{
    model::{Report, Sort, Vm},
    names::{self, NoVm},
};

/// What is to be shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection<'a> {
    /// Of the VMs, only the one that is called so, or of this process.
    pub vm: Option<&'a str>,
    /// Of each VM, only the vCPU of this id.
    pub vcpu: Option<u32>,
    /// The order of the reasons.
    pub sort: Sort,
}

/// What is to be shown is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such VM.
    #[error(transparent)]
    NoVm(#[from] NoVm),
    /// There is no such vCPU.
    #[error("no vCPU with the id {0} runs: vCPUs are counted from 0")]
    NoVcpu(u32),
}

impl Selection<'_> {
    /// Whether it leaves something out.
    pub fn is_part(&self) -> bool {
        self.vm.is_some() || self.vcpu.is_some()
    }

    /// The part of a report that is to be shown. What is of no VM that runs stays as it is.
    ///
    /// # Errors
    ///
    /// When there is no such part.
    pub fn apply(&self, mut report: Report) -> Result<Report, Error> {
        if let Some(vm) = self.vm {
            let meant = names::find(vm, report.vms.iter().map(Vm::known))?;
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
