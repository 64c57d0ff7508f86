// SPDX-License-Identifier: GPL-2.0

//! Details of this VM's exits, read inside the guest from the host's tables. The field names are
//! those of `--json` and stay.

use std::collections::BTreeSet;

use exitmeter_guest::Isa;
use exitmeter_meter::snapshot::{TABLE_CODE, TABLE_DETAILS, TABLE_USER};
use serde::Serialize;

use super::tables::Reading;
use crate::{
    output::TextOptions,
    paint::{paint, Style},
    report::format_count,
    why::{
        model::{groups, total, Group, Weight},
        symbols::Symbols,
        tables::Rows,
        text::{dropped_note, table},
    },
};

/// Sums over the tables of the vCPUs that were read.
#[derive(Clone, Debug, Serialize)]
pub struct GuestDetails {
    /// vCPUs whose tables were read.
    pub vcpus: usize,
    /// vCPUs that were not read, because this process may not run on their CPUs.
    pub vcpus_unread: usize,
    /// vCPUs without tables, for lack of memory on the host.
    pub vcpus_without_tables: usize,
    /// Details of the exits, by reason.
    pub details: Vec<Group>,
    /// Reasons why exits went to user space, by exit reason.
    pub user_exits: Vec<Group>,
    /// Guest code that caused the exits, by reason, if it was read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub code: Vec<Group>,
}

impl GuestDetails {
    /// Group the rows of a reading, or a part of them.
    pub fn new(
        reading: &Reading,
        rows: &Rows,
        isa: Isa,
        symbols: &Symbols,
        weight: Weight,
    ) -> Self {
        let of = |table| groups(rows, table, isa, symbols, weight);
        Self {
            vcpus: reading.vcpus(),
            vcpus_unread: reading.unread(),
            vcpus_without_tables: reading.without_tables(),
            details: of(TABLE_DETAILS),
            user_exits: of(TABLE_USER),
            code: of(TABLE_CODE),
        }
    }

    /// Format the tables with up to `limit` rows of each reason: either the code, or all else.
    pub fn text(&self, code: bool, limit: usize, options: TextOptions) -> String {
        let shown: &[(&str, &[Group])] = match code {
            true => &[("about", &self.code)],
            false => &[
                ("about", &self.details),
                ("to user space", &self.user_exits),
            ],
        };
        let mut text = String::new();
        let mut dropped = BTreeSet::new();
        for (title, groups) in shown {
            let all = total(groups);
            text += &table(title, groups, all, limit, options, &mut dropped);
        }
        text + &dropped_note(dropped) + &self.missing_vcpus(options)
    }

    /// Name the vCPUs that are missing from the tables.
    fn missing_vcpus(&self, options: TextOptions) -> String {
        let mut lines = Vec::new();
        let all = self.vcpus + self.vcpus_unread + self.vcpus_without_tables;
        if self.vcpus_unread != 0 {
            lines.push(format!(
                "read on {} of {}: this command may not run on the others, whose exits are not above",
                all - self.vcpus_unread,
                format_count(all as u64, "CPU")
            ));
        }
        if self.vcpus_without_tables != 0 {
            lines.push(format!(
                "the host has no memory for the tables of {}: their exits are not above",
                format_count(self.vcpus_without_tables as u64, "vCPU")
            ));
        }
        let lines = lines
            .iter()
            .map(|line| paint(line, Style::Warning, options.color) + "\n");
        lines.collect()
    }
}
