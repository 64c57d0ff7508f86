// SPDX-License-Identifier: GPL-2.0

//! Turns the lines that the host prints into the printed results and the JSON.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::{exits::Exit, meters::Meter};

/// A line that the host prints.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// Cost of one kind of exit under one meter.
    Cost(Cost),
    /// Exits that a meter saw while it was measured.
    Saw(ExitsSeen),
    /// A meter that could not be measured.
    Failed {
        /// The meter.
        meter: Meter,
        /// Error message.
        why: String,
    },
}

/// Cost of one kind of exit under one meter.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Cost {
    /// The meter.
    pub meter: Meter,
    /// The exit.
    pub exit: Exit,
    /// TSC ticks per exit, one number for each run.
    pub ticks: Vec<f64>,
}

/// Exits that a meter counted, beside those that it must have seen: a meter that does nothing would look cheap.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ExitsSeen {
    /// The meter.
    pub meter: Meter,
    /// Exits that the guests are known to have caused. There are others besides.
    pub known: u64,
    /// Exits that the meter saw; `None` from a part of exitmeter that does not count.
    pub seen: Option<u64>,
    /// Further output of the meter, such as the size of its data.
    pub remark: Option<String>,
}

/// All results of one host.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// `intel` or `amd`.
    pub host: String,
    /// Release of the host's kernel.
    pub kernel: String,
    /// Exits of one run, whose mean is its result.
    pub count: u32,
    /// Costs by meter and exit.
    pub costs: Vec<Summary>,
    /// Exits that the meters saw.
    pub saw: Vec<ExitsSeen>,
    /// Meters that could not be measured, with the reasons.
    pub failures: Vec<String>,
}

/// A cost with its statistics.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The measured ticks.
    #[serde(flatten)]
    pub cost: Cost,
    /// Median of the runs, in ticks.
    pub median: f64,
    /// Smallest result, in ticks.
    pub min: f64,
    /// Largest result, in ticks.
    pub max: f64,
    /// Median minus the median without a meter, in ticks.
    pub added: Option<f64>,
    /// Added ticks as a multiple of those that exitmeter adds.
    pub ratio: Option<f64>,
}

impl Report {
    /// Parse a line of the host. Return `false` if it is something else.
    pub fn take(&mut self, line: &str) -> bool {
        let Ok(line) = serde_json::from_str(line) else {
            return false;
        };
        match line {
            Line::Cost(cost) => self.costs.push(Summary::new(cost)),
            Line::Saw(saw) => self.saw.push(saw),
            Line::Failed { meter, why } => {
                self.failures.push(format!("{}: {why}", meter.title()));
            }
        }
        true
    }

    fn median(&self, meter: Meter, exit: Exit) -> Option<f64> {
        self.cell(meter, exit).map(|cell| cell.median)
    }

    fn cell(&self, meter: Meter, exit: Exit) -> Option<&Summary> {
        self.costs
            .iter()
            .find(|cell| cell.cost.meter == meter && cell.cost.exit == exit)
    }

    /// Compute what each meter adds. Call this after the last line.
    pub fn finish(&mut self) {
        let added = |this: &Self, meter, exit| {
            Some(this.median(meter, exit)? - this.median(Meter::None, exit)?)
        };
        for at in 0..self.costs.len() {
            let Cost { meter, exit, .. } = self.costs[at].cost;
            if meter == Meter::None {
                continue;
            }
            let this = added(self, meter, exit);
            let ours = added(self, Meter::Exitmeter, exit).filter(|ours| *ours > 0.0);
            self.costs[at].added = this;
            self.costs[at].ratio = this.zip(ours).map(|(this, ours)| this / ours);
        }
    }

    /// Format the results with a line for each meter and a column for each exit.
    pub fn table(&self) -> String {
        const LABEL: usize = 33;
        const CELL: usize = 18;
        let mut columns: Vec<Exit> = Vec::new();
        let mut rows: Vec<Meter> = Vec::new();
        for cell in &self.costs {
            if !columns.contains(&cell.cost.exit) {
                columns.push(cell.cost.exit);
            }
            if !rows.contains(&cell.cost.meter) {
                rows.push(cell.cost.meter);
            }
        }
        let mut text = format!("{:LABEL$}", "TSC ticks per exit");
        for exit in &columns {
            let _ = write!(text, "{:>CELL$}", exit.title());
        }
        text.push('\n');
        for meter in rows {
            let _ = write!(text, "{:LABEL$}", meter.title());
            for exit in &columns {
                let cell = self.cell(meter, *exit);
                let _ = write!(
                    text,
                    "{:>CELL$}",
                    cell.map(Summary::cell).unwrap_or_default()
                );
            }
            text.push('\n');
        }
        text
    }
}

impl Summary {
    fn new(cost: Cost) -> Self {
        let mut sorted = cost.ticks.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |place: usize| sorted.get(place).copied().unwrap_or(f64::NAN);
        let (count, middle) = (sorted.len(), sorted.len() / 2);
        let median = if count % 2 == 1 {
            at(middle)
        } else {
            (at(middle.wrapping_sub(1)) + at(middle)) / 2.0
        };
        Self {
            median,
            min: at(0),
            max: at(count.wrapping_sub(1)),
            added: None,
            ratio: None,
            cost,
        }
    }

    /// Format the ticks without a meter, or the added ticks and their ratio, and the spread.
    fn cell(&self) -> String {
        let spread = self.max - self.min;
        match (self.added, self.ratio) {
            (None, _) => format!("{:.0} ±{:.0}", self.median, spread / 2.0),
            (Some(added), None) => format!("{added:+.0} ±{:.0}", spread / 2.0),
            (Some(added), Some(ratio)) => {
                format!("{added:+.0} ±{:.0} {ratio:5.1}x", spread / 2.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(meter: Meter, ticks: &[f64]) -> Line {
        Line::Cost(Cost {
            meter,
            exit: Exit::Cpuid,
            ticks: ticks.to_vec(),
        })
    }

    #[test]
    fn formats_the_lines_of_the_host() {
        let mut report = Report::default();
        for line in [
            cost(Meter::None, &[1150.0, 1100.0, 1147.0]),
            cost(Meter::Exitmeter, &[1247.0, 1247.0]),
            cost(Meter::BpfLatency, &[2647.0]),
        ] {
            assert!(report.take(&serde_json::to_string(&line).expect("JSON")));
        }
        assert!(!report.take("perf: something of its own"));
        report.finish();
        let none = report.cell(Meter::None, Exit::Cpuid).expect("there");
        assert_eq!((none.median, none.min, none.max), (1147.0, 1100.0, 1150.0));
        assert_eq!(none.added, None);
        let bpf = report.cell(Meter::BpfLatency, Exit::Cpuid).expect("there");
        assert_eq!((bpf.added, bpf.ratio), (Some(1500.0), Some(15.0)));
        let table = report.table();
        let rows: Vec<&str> = table.lines().collect();
        assert_eq!(rows.len(), 4);
        assert!(rows[1].ends_with("1147 ±25"));
        assert!(rows[2].ends_with("+100 ±0   1.0x"));
        assert!(rows[3].ends_with("+1500 ±0  15.0x"));
    }

    #[test]
    fn without_a_baseline_no_added_ticks_are_computed() {
        let mut report = Report::default();
        report.take(&serde_json::to_string(&cost(Meter::BpfLatency, &[9.0])).expect("JSON"));
        report.finish();
        assert_eq!(report.costs[0].added, None);
    }
}
