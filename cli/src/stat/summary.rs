// SPDX-License-Identifier: GPL-2.0

//! What all runs of a command caused.

use std::{collections::BTreeMap, ffi::OsString};

use exitmeter_guest::{Isa, Phase, Row};
use exitmeter_meter::snapshot::Reason as Code;
use serde::Serialize;

use super::Run;
use crate::{
    model::{isa_name, Label, FORMAT},
    output::Look,
    paint::{paint, Style},
    report::{code, count},
    table::{
        Side::{Left, Right},
        Table,
    },
};

/// A number of each run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Mean {
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation, as that of a sample; of one run there is none.
    pub stddev: Option<f64>,
}

impl Mean {
    /// Of these numbers.
    pub fn of(numbers: impl Iterator<Item = f64> + Clone) -> Self {
        let count = numbers.clone().count() as f64;
        let mean = numbers.clone().sum::<f64>() / count.max(1.0);
        let squares = numbers.map(|number| (number - mean).powi(2)).sum::<f64>();
        Self {
            mean,
            stddev: (count > 1.0).then(|| (squares / (count - 1.0)).sqrt()),
        }
    }

    /// The mean, rounded.
    fn number(&self) -> u64 {
        // Below 2^64 by far, and not negative.
        self.mean.round() as u64
    }

    /// The deviation as a part of the mean.
    fn deviation(&self) -> String {
        match self.stddev {
            Some(stddev) if self.mean > 0.0 => format!("±{:.1}%", stddev * 100.0 / self.mean),
            _ => "-".to_owned(),
        }
    }
}

/// What all runs caused.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// [`FORMAT`].
    pub format: u32,
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    pub isa: Isa,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// How often it ran.
    pub runs: usize,
    /// Its exit status, of the last run.
    pub status: u8,
    /// CPUID exits of the tool's own that were taken out of each run.
    pub queries: Mean,
    /// How long it took.
    pub seconds: Mean,
    /// The same in TSC ticks.
    pub ticks: Mean,
    /// Exits of all reasons.
    pub exits: Mean,
    /// Kernel ticks of all reasons.
    pub kernel: Mean,
    /// By reason, the one with the most kernel ticks first.
    pub reasons: Vec<Reason>,
}

/// What exits of a reason were caused.
#[derive(Clone, Debug, Serialize)]
pub struct Reason {
    /// Which.
    #[serde(flatten)]
    pub label: Label,
    /// Exits.
    pub exits: Mean,
    /// Of these, those from nested guests, when the host tells them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nested_exits: Option<Mean>,
    /// Ticks of the host's kernel.
    pub kernel: Mean,
    /// Ticks of the VMM.
    pub user: Mean,
    /// Ticks that a vCPU slept.
    pub blocked: Mean,
    /// Ticks for which the host took the CPU away.
    pub preempted: Mean,
    /// The kernel's ticks as a part of the time that the command took.
    pub share_of_time: f64,
}

impl Summary {
    /// Of these runs.
    pub fn new(command: &[OsString], isa: Isa, status: u8, runs: &[Run]) -> Self {
        let of = |number: &dyn Fn(&Run) -> f64| Mean::of(runs.iter().map(number));
        let sum = |number: fn(&Row) -> u64| {
            move |run: &Run| run.rows.iter().map(number).fold(0, u64::wrapping_add) as f64
        };
        let ticks = of(&|run| run.ticks as f64);
        let mut codes = BTreeMap::new();
        for row in runs.iter().flat_map(|run| &run.rows) {
            codes.entry(row.code).or_insert(row.nested_exits.is_some());
        }
        let mut reasons: Vec<_> = codes
            .into_iter()
            .map(|(code, nested)| {
                // A reason that a run did not have has 0 there.
                let of = |number: &dyn Fn(&Row) -> u64| {
                    Mean::of(runs.iter().map(|run| {
                        let row = run.rows.iter().find(|row| row.code == code);
                        row.map_or(0.0, |row| number(row) as f64)
                    }))
                };
                let in_phase = |phase| of(&|row| row.cycles(phase));
                let kernel = in_phase(Phase::Kernel);
                Reason {
                    label: Label::new(isa, Code::Code(code)),
                    exits: of(&|row| row.exits),
                    nested_exits: nested.then(|| of(&|row| row.nested_exits.unwrap_or(0))),
                    kernel,
                    user: in_phase(Phase::User),
                    blocked: in_phase(Phase::Blocked),
                    preempted: in_phase(Phase::Preempted),
                    share_of_time: kernel.mean / ticks.mean.max(1.0),
                }
            })
            .collect();
        reasons.sort_by(|one, other| other.kernel.mean.total_cmp(&one.kernel.mean));
        Self {
            format: FORMAT,
            isa,
            command: command
                .iter()
                .map(|word| word.to_string_lossy().into_owned())
                .collect(),
            runs: runs.len(),
            status,
            queries: of(&|run| run.queries as f64),
            seconds: of(&|run| run.time.as_secs_f64()),
            ticks,
            exits: of(&sum(|row| row.exits)),
            kernel: of(&sum(|row| row.cycles(Phase::Kernel))),
            reasons,
        }
    }

    /// The summary as text.
    pub fn text(&self, look: Look) -> String {
        let times = match self.runs {
            1 => String::new(),
            runs => format!(" ({runs} runs)"),
        };
        let title = format!("exits caused by {}{times}", self.command.join(" "));
        let table = self.table(look);
        let with_deviation = |mean: &Mean| match mean.stddev {
            Some(_) => format!(" ({})", mean.deviation()),
            None => String::new(),
        };
        format!(
            "\n{}\n\n{}\n{}{}, kernel {} of the time, in {:.3} s{}\n\
             {} of this tool's own {} not among them\n",
            paint(&title, Style::Strong, look.color),
            table.text(look.color),
            count(self.exits.number(), "exit"),
            with_deviation(&self.exits),
            share(self.kernel, self.ticks),
            self.seconds.mean,
            with_deviation(&self.seconds),
            count(self.queries.number(), "CPUID exit"),
            if self.runs == 1 {
                "are"
            } else {
                "each time are"
            },
        )
    }

    fn table(&self, look: Look) -> Table<10> {
        let spare = ["in VMM", "code", "± ", "mean"];
        Table::fitted(look, &spare, |number| {
            let mut table = Table::new([
                ("code", Right),
                ("reason", Left),
                ("exits", Right),
                ("±", Right),
                ("nested", Right),
                ("kernel", Right),
                ("± ", Right),
                ("mean", Right),
                ("of time", Right),
                ("in VMM", Right),
            ]);
            for reason in &self.reasons {
                let nested = reason.nested_exits.map_or(0, |nested| nested.number());
                table.row([
                    code(reason.label.code),
                    reason.label.to_string(),
                    number(reason.exits.number()),
                    reason.exits.deviation(),
                    number(nested),
                    number(reason.kernel.number()),
                    reason.kernel.deviation(),
                    each(reason.kernel, reason.exits, number),
                    share(reason.kernel, self.ticks),
                    share(reason.user, self.ticks),
                ]);
            }
            if self.runs == 1 {
                table.leave_out(&["±", "± "]);
            }
            let nested = self.reasons.iter().filter_map(|reason| reason.nested_exits);
            if nested.fold(0.0, |sum, nested| sum + nested.mean) == 0.0 {
                table.leave_out(&["nested"]);
            }
            table
        })
    }
}

/// A part of the time.
fn share(part: Mean, time: Mean) -> String {
    match time.mean {
        time if time > 0.0 => format!("{:.1}%", part.mean * 100.0 / time),
        _ => "-".to_owned(),
    }
}

/// What one exit took.
fn each(kernel: Mean, exits: Mean, number: fn(u64) -> String) -> String {
    match exits.mean {
        exits if exits > 0.0 => number((kernel.mean / exits).round() as u64),
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_its_deviation() {
        let of = |numbers: &[f64]| Mean::of(numbers.iter().copied());
        assert_eq!(
            of(&[7.0]),
            Mean {
                mean: 7.0,
                stddev: None
            }
        );
        let three = of(&[2.0, 4.0, 6.0]);
        assert_eq!(
            three,
            Mean {
                mean: 4.0,
                stddev: Some(2.0)
            }
        );
        assert_eq!(three.deviation(), "±50.0%");
        assert_eq!(of(&[0.0, 0.0]).deviation(), "-");
    }
}
