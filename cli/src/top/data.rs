// SPDX-License-Identifier: GPL-2.0

//! Scope of the numbers: all VMs, one VM, or one of its vCPUs.

use crate::model::{Ledger, Report, Span, VcpuReport, Vm};

/// Scope of the numbers that are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// All VMs, and those that are gone.
    All,
    /// A VM, by its number.
    Vm(u64),
    /// A vCPU, by its VM's number and its id.
    Vcpu(u64, u32),
}

/// Numbers of a scope.
#[derive(Clone, Debug)]
pub struct ScopeNumbers {
    /// Exits and cycles.
    pub ledger: Ledger,
    /// Time that the numbers cover.
    pub span: Span,
}

impl Scope {
    /// Return the VM of the scope.
    pub fn vm<'a>(&self, report: &'a Report) -> Option<&'a Vm> {
        let (Scope::Vm(number) | Scope::Vcpu(number, _)) = self else {
            return None;
        };
        report.vms.iter().find(|vm| vm.vm == *number)
    }

    /// Return the vCPU of the scope.
    fn vcpu<'a>(&self, report: &'a Report) -> Option<&'a VcpuReport> {
        let Scope::Vcpu(_, id) = self else {
            return None;
        };
        self.vm(report)?.vcpus.iter().find(|vcpu| vcpu.vcpu == *id)
    }

    /// Return the numbers of the scope, or `None` if it is gone.
    pub fn numbers(&self, report: &Report) -> Option<ScopeNumbers> {
        let (ledger, span) = match self {
            Scope::All => {
                let vms = report.vms.iter().map(|vm| &vm.ledger);
                let ledgers = vms.chain([&report.departed.ledger]);
                let rows = ledgers.flat_map(|ledger| ledger.reasons.iter().copied());
                let host = &report.host;
                let life = host.snapshot_tsc.saturating_sub(host.loaded_tsc);
                let life = Span::of(life, host.tsc_khz);
                (Ledger::of(rows), report.interval.unwrap_or(life))
            }
            Scope::Vm(_) => {
                let vm = self.vm(report)?;
                (vm.ledger.clone(), vm.span)
            }
            Scope::Vcpu(..) => (self.vcpu(report)?.ledger.clone(), self.vm(report)?.span),
        };
        Some(ScopeNumbers { ledger, span })
    }

    /// Return the title of the scope.
    pub fn title(&self, report: &Report) -> String {
        let vm = match self.vm(report) {
            Some(vm) => format!("{}, process {}", vm.label(), vm.pid),
            None => "a VM that is gone".to_owned(),
        };
        match self {
            Scope::All => "all VMs".to_owned(),
            Scope::Vm(_) => vm,
            Scope::Vcpu(_, id) => format!("{vm}, vCPU {id}"),
        }
    }
}
