// SPDX-License-Identifier: GPL-2.0

//! `exitmeter reasons`: the list of exit reasons.

use clap::ValueEnum;
use exitmeter_guest::defined;
use exitmeter_meter::reasons::{self, is_handled, Isa};
use serde::Serialize;

use crate::{
    model::isa_name,
    output::Output,
    report,
    table::{
        Side::{Left, Right},
        Table,
    },
};

/// List the exit reasons of both vendors, with codes and names.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  exitmeter reasons --isa vmx")]
pub struct Args {
    /// List only this vendor's reasons.
    #[arg(long, value_enum)]
    isa: Option<Vendor>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// Choice of `--isa`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Vendor {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

impl Vendor {
    fn isa(self) -> Isa {
        match self {
            Vendor::Vmx => Isa::Vmx,
            Vendor::Svm => Isa::Svm,
        }
    }
}

impl Args {
    /// Print the reasons.
    ///
    /// # Errors
    ///
    /// Returns an error if the output cannot be written.
    pub fn run(self, out: &mut Output) -> anyhow::Result<()> {
        let isas = self
            .isa
            .map_or(vec![Isa::Vmx, Isa::Svm], |vendor| vec![vendor.isa()]);
        let list = list(&isas);
        if self.json {
            out.json(&list)?;
        } else {
            out.print(&text(&list))?;
        }
        Ok(())
    }
}

/// Exit reasons of one ISA.
#[derive(Clone, Debug, Serialize)]
pub struct List {
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    pub isa: Isa,
    /// Reasons, sorted by code.
    pub reasons: Vec<NamedReason>,
}

/// One exit reason.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct NamedReason {
    /// VMX basic exit reason or SVM exit code.
    pub code: u32,
    /// Name in the vendor's manual.
    pub name: &'static str,
    /// True if KVM of Linux 7.3 handles this exit. Other exits never happen.
    pub handled: bool,
}

/// Return the exit reasons of `isas`, one list for each.
pub fn list(isas: &[Isa]) -> Vec<List> {
    isas.iter()
        .map(|&isa| {
            let mut reasons: Vec<_> = defined(isa)
                .filter_map(|code| {
                    reasons::name(isa, code).map(|name| NamedReason {
                        code,
                        name,
                        handled: is_handled(isa, code),
                    })
                })
                .collect();
            reasons.sort_by_key(|entry| entry.code);
            List { isa, reasons }
        })
        .collect()
}

/// Format the reasons as one table for each ISA.
pub fn text(lists: &[List]) -> String {
    let tables = lists.iter().map(|List { isa, reasons }| {
        let title = match isa {
            Isa::Vmx => "VMX: Intel's SDM, volume 3, appendix \"VMX Basic Exit Reasons\"",
            Isa::Svm => "SVM: AMD's APM, volume 2, appendix \"SVM Intercept Exit Codes\"",
        };
        let mut table = Table::new([
            ("code", Right),
            ("hex", Right),
            ("name", Left),
            ("KVM of Linux 7.3", Left),
        ]);
        for entry in reasons {
            let handled = if entry.handled { "handles it" } else { "" };
            table.row([
                report::format_code(Some(entry.code)),
                format!("{:#x}", entry.code),
                entry.name.to_owned(),
                handled.to_owned(),
            ]);
        }
        format!("{title}\n\n{table}")
    });
    tables.collect::<Vec<_>>().join("\n")
}
