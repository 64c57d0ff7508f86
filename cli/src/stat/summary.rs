// SPDX-License-Identifier: GPL-2.0

//! Summary of all runs of a command.

use std::{collections::BTreeMap, ffi::OsString};

use exitmeter_guest::{Isa, Phase, ReasonNumbers};
use exitmeter_meter::snapshot::Reason as Code;
use serde::Serialize;

use super::Run;
use crate::{
    guest::{tables::Reading, GuestDetails},
    model::{isa_name, Label, FORMAT},
    output::TextOptions,
    paint::{paint, Style},
    report::{format_code, format_count},
    table::{
        Side::{Left, Right},
        Table,
    },
    why::{model::Weight, symbols::Symbols, tables::Rows},
};

/// Mean and standard deviation of a number over the runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Mean {
    /// Mean.
    pub mean: f64,
    /// Sample standard deviation; `None` for a single run.
    pub stddev: Option<f64>,
}

impl Mean {
    /// Compute both for these numbers.
    pub fn of(numbers: impl Iterator<Item = f64> + Clone) -> Self {
        let count = numbers.clone().count() as f64;
        let mean = numbers.clone().sum::<f64>() / count.max(1.0);
        let squares = numbers.map(|number| (number - mean).powi(2)).sum::<f64>();
        Self {
            mean,
            stddev: (count > 1.0).then(|| (squares / (count - 1.0)).sqrt()),
        }
    }

    /// Return the rounded mean.
    fn number(&self) -> u64 {
        // The mean is far below 2^64, and not negative.
        self.mean.round() as u64
    }

    /// Format the deviation as a part of the mean.
    fn deviation(&self) -> String {
        match self.stddev {
            Some(stddev) if self.mean > 0.0 => format!("±{:.1}%", stddev * 100.0 / self.mean),
            _ => "-".to_owned(),
        }
    }
}

/// Summary of all runs.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Version of the data: [`FORMAT`].
    pub format: u32,
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    pub isa: Isa,
    /// Command and its arguments.
    pub command: Vec<String>,
    /// Number of runs that were measured.
    pub runs: usize,
    /// Number of runs that are left out because the meter began anew while they ran.
    #[serde(skip_serializing_if = "is_zero")]
    pub left_out: usize,
    /// Exit status of the last run.
    pub status: u8,
    /// The tool's own CPUID exits that were subtracted from each run.
    pub queries: Mean,
    /// Duration, in seconds.
    pub seconds: Mean,
    /// Duration, in TSC ticks.
    pub ticks: Mean,
    /// Exits of all reasons.
    pub exits: Mean,
    /// Kernel ticks of all reasons.
    pub kernel: Mean,
    /// Numbers by reason, the one with the most kernel ticks first.
    pub reasons: Vec<Reason>,
    /// Details of the exits of all runs together, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<GuestDetails>,
}

/// Numbers of one exit reason.
#[derive(Clone, Debug, Serialize)]
pub struct Reason {
    /// Exit reason.
    #[serde(flatten)]
    pub label: Label,
    /// Exits.
    pub exits: Mean,
    /// Exits of L2 guests among them, if the host reports these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nested_exits: Option<Mean>,
    /// Ticks of the host's kernel.
    pub kernel: Mean,
    /// Ticks of the VMM.
    pub user: Mean,
    /// Ticks that a vCPU slept for any reason.
    pub blocked: Mean,
    /// Ticks of these asleep in HLT, if the host reports them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub halted: Option<Mean>,
    /// Ticks of these in which KVM slept for the host, if the host reports them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Mean>,
    /// Ticks for which the host took the CPU away.
    pub preempted: Mean,
    /// Kernel ticks as a part of the time that the command took.
    pub share_of_time: f64,
}

impl Summary {
    /// Summarize the runs. Return `None` if none could be measured.
    pub fn new(command: &[OsString], isa: Isa, status: u8, all: &[Run]) -> Option<Self> {
        let runs = all.iter().filter_map(|run| Some((run, run.rows.as_ref()?)));
        let runs: Vec<(&Run, &Vec<ReasonNumbers>)> = runs.collect();
        if runs.is_empty() {
            return None;
        }
        let of = |number: &dyn Fn(&Run) -> f64| Mean::of(runs.iter().map(|(run, _)| number(run)));
        let sum = |number: fn(&ReasonNumbers) -> u64| {
            Mean::of(runs.iter().map(|(_, rows)| {
                let sum: u128 = rows.iter().map(|row| u128::from(number(row))).sum();
                sum as f64
            }))
        };
        let ticks = of(&|run| run.ticks as f64);
        let mut codes = BTreeMap::new();
        for row in runs.iter().flat_map(|(_, rows)| *rows) {
            let known = (row.nested_exits.is_some(), row.separates_waits);
            codes.entry(row.code).or_insert(known);
        }
        let mut reasons: Vec<_> = codes
            .into_iter()
            .map(|(code, (nested, waits))| {
                // A run without this reason counts as 0.
                let of = |number: &dyn Fn(&ReasonNumbers) -> u64| {
                    Mean::of(runs.iter().map(|(_, rows)| {
                        let row = rows.iter().find(|row| row.code == code);
                        row.map_or(0.0, |row| number(row) as f64)
                    }))
                };
                let in_phase = |phase| of(&|row| row.cycles(phase));
                let blocked = |row: &ReasonNumbers| {
                    row.cycles(Phase::Halted)
                        .saturating_add(row.cycles(Phase::Waiting))
                };
                let kernel = in_phase(Phase::Kernel);
                Reason {
                    label: Label::new(isa, Code::Code(code)),
                    exits: of(&|row| row.exits),
                    nested_exits: nested.then(|| of(&|row| row.nested_exits.unwrap_or(0))),
                    kernel,
                    user: in_phase(Phase::User),
                    blocked: of(&blocked),
                    halted: waits.then(|| in_phase(Phase::Halted)),
                    waiting: waits.then(|| in_phase(Phase::Waiting)),
                    preempted: in_phase(Phase::Preempted),
                    share_of_time: kernel.mean / ticks.mean.max(1.0),
                }
            })
            .collect();
        reasons.sort_by(|one, other| other.kernel.mean.total_cmp(&one.kernel.mean));
        Some(Self {
            format: FORMAT,
            isa,
            command: command
                .iter()
                .map(|word| word.to_string_lossy().into_owned())
                .collect(),
            runs: runs.len(),
            left_out: all.len() - runs.len(),
            status,
            queries: of(&|run| run.queries as f64),
            seconds: of(&|run| run.time.as_secs_f64()),
            ticks,
            exits: sum(|row| row.exits),
            kernel: sum(|row| row.cycles(Phase::Kernel)),
            reasons,
            why: why(isa, &runs),
        })
    }

    /// Return a sentence on the runs that are left out, if any.
    pub fn left_out_text(&self) -> Option<String> {
        let all = self.left_out + self.runs;
        match self.left_out {
            0 => None,
            1 => Some(format!(
                "1 of {all} runs is left out: the meter began anew while it ran"
            )),
            more => Some(format!(
                "{more} of {all} runs are left out: the meter began anew while they ran"
            )),
        }
    }

    /// Format the summary, with up to `limit` rows of details for each reason.
    pub fn text(&self, limit: usize, options: TextOptions) -> String {
        let times = match self.runs {
            1 => String::new(),
            runs => format!(" ({runs} runs)"),
        };
        let title = format!("exits caused by {}{times}", self.command.join(" "));
        let table = self.table(options);
        let with_deviation = |mean: &Mean| match mean.stddev {
            Some(_) => format!(" ({})", mean.deviation()),
            None => String::new(),
        };
        let left_out = match self.left_out_text() {
            Some(words) => paint(&words, Style::Warning, options.color) + "\n",
            None => String::new(),
        };
        let why = self.why.as_ref();
        let why = why.map_or_else(String::new, |details| details.text(false, limit, options));
        format!(
            "\n{}\n\n{}\n{}{}, kernel {} of the time, in {:.3} s{}\n\
             {} of this tool's own {} not among them\n{left_out}{why}",
            paint(&title, Style::Strong, options.color),
            table.text(options.color),
            format_count(self.exits.number(), "exit"),
            with_deviation(&self.exits),
            share(self.kernel, self.ticks),
            self.seconds.mean,
            with_deviation(&self.seconds),
            format_count(self.queries.number(), "CPUID exit"),
            if self.runs == 1 {
                "are"
            } else {
                "each time are"
            },
        )
    }

    fn table(&self, options: TextOptions) -> Table<10> {
        let spare = ["in VMM", "code", "± ", "mean"];
        Table::fitted(options, &spare, |number| {
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
                let nested = reason
                    .nested_exits
                    .map_or(0, |nested| nested.number().into());
                table.row([
                    format_code(reason.label.code),
                    reason.label.to_string(),
                    number(reason.exits.number().into()),
                    reason.exits.deviation(),
                    number(nested),
                    number(reason.kernel.number().into()),
                    reason.kernel.deviation(),
                    each(reason.kernel, reason.exits, number),
                    share(reason.kernel, self.ticks),
                    share(reason.user, self.ticks),
                ]);
            }
            if self.runs == 1 {
                table.hide(&["±", "± "]);
            }
            let nested = self.reasons.iter().filter_map(|reason| reason.nested_exits);
            if nested.fold(0.0, |sum, nested| sum + nested.mean) == 0.0 {
                table.hide(&["nested"]);
            }
            table
        })
    }
}

/// Sum up the details of all runs.
fn why(isa: Isa, runs: &[(&Run, &Vec<ReasonNumbers>)]) -> Option<GuestDetails> {
    let mut readings = runs.iter().filter_map(|(run, _)| run.why.as_ref());
    let rows: Vec<Rows> = readings.clone().map(Reading::rows).collect();
    let sum = Rows::sum(rows.iter());
    let (symbols, weight) = (Symbols::default(), Weight::Ticks);
    Some(GuestDetails::new(
        readings.next_back()?,
        &sum,
        isa,
        &symbols,
        weight,
    ))
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// Format a part of the time.
fn share(part: Mean, time: Mean) -> String {
    match time.mean {
        time if time > 0.0 => format!("{:.1}%", part.mean * 100.0 / time),
        _ => "-".to_owned(),
    }
}

/// Format the kernel ticks of one exit.
fn each(kernel: Mean, exits: Mean, number: fn(u128) -> String) -> String {
    match exits.mean {
        exits if exits > 0.0 => number((kernel.mean / exits).round() as u128),
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::{process::ExitStatus, time::Duration};

    use super::*;

    #[test]
    fn deviation_is_that_of_the_sample() {
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

    /// Create a run with this number of CPUID exits, or one in which the meter began anew.
    fn run(exits: Option<u64>) -> Run {
        let row = |exits| ReasonNumbers {
            code: 0x72,
            exits,
            nested_exits: None,
            cycles: [0, exits * 100, 0, 3, 0, 4],
            separates_waits: true,
        };
        Run {
            isa: Isa::Svm,
            rows: exits.map(|exits| vec![row(exits)]),
            why: None,
            queries: 5,
            ticks: 1_000_000,
            time: Duration::from_secs(1),
            ended: ExitStatus::default(),
        }
    }

    #[test]
    fn unmeasured_runs_are_left_out_and_reported() {
        let command = ["true".into()];
        let of = |runs: &[Run]| Summary::new(&command, Isa::Svm, 0, runs);
        assert!(of(&[run(None), run(None)]).is_none());
        let all = of(&[run(Some(10)), run(Some(30))]).expect("measured");
        assert!(!all.text(10, TextOptions::default()).contains("left out"));
        let json = serde_json::to_value(&all).expect("JSON");
        assert_eq!(json.get("left_out"), None);

        let some = of(&[run(Some(10)), run(None), run(Some(30))]).expect("measured");
        assert_eq!((some.runs, some.left_out), (2, 1));
        assert_eq!(some.exits.mean, 20.0);
        let text = some.text(10, TextOptions::default());
        let words = "\n1 of 3 runs is left out: the meter began anew while it ran\n";
        assert!(text.ends_with(words), "{text}");
        let reason = &some.reasons[0];
        let sleeps = [Some(reason.blocked), reason.halted, reason.waiting];
        let sleeps = sleeps.map(|mean| mean.map(|mean| mean.mean));
        assert_eq!(sleeps, [Some(7.0), Some(3.0), Some(4.0)]);
    }
}
