// SPDX-License-Identifier: GPL-2.0

//! What was measured: from lines of the inside to the table and the JSON.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::{exits::Exit, meters::Meter};

/// A line that the inside prints.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// One cell of the table.
    Cost(Cost),
    /// What a meter saw while it was measured.
    Saw(Saw),
    /// A meter that could not be measured.
    Failed {
        /// Which.
        meter: Meter,
        /// Why.
        why: String,
    },
}

/// The ticks of an exit under a meter.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Cost {
    /// The meter.
    pub meter: Meter,
    /// The exit.
    pub exit: Exit,
    /// TSC ticks per exit, one number for each run.
    pub ticks: Vec<f64>,
}

/// What a meter saw, so that none is taken for cheap that did nothing.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Saw {
    /// The meter.
    pub meter: Meter,
    /// Exits that the guests are known to have caused, and no others.
    pub known: u64,
    /// Exits that the meter saw; `None` from a part of exitmeter that does not count.
    pub seen: Option<u64>,
    /// What else it left behind.
    pub remark: Option<String>,
}

/// Everything of one host.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// `intel` or `amd`.
    pub host: String,
    /// Its kernel's release.
    pub kernel: String,
    /// How many exits a number is the mean of.
    pub count: u32,
    /// What was measured.
    pub costs: Vec<Summary>,
    /// What the meters saw.
    pub saw: Vec<Saw>,
    /// What failed.
    pub failures: Vec<String>,
}

/// One cell, with what follows from it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The ticks measured.
    #[serde(flatten)]
    pub cost: Cost,
    /// Their median.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// The median less that without a meter.
    pub added: Option<f64>,
    /// How many times what exitmeter adds.
    pub ratio: Option<f64>,
}

impl Report {
    /// Takes a line of the inside; whether it was one.
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

    /// Works out what each meter adds, once all lines are there.
    pub fn finish(&mut self) {
        let added = |this: &Self, meter, exit| {
            Some(this.median(meter, exit)? - this.median(Meter::None, exit)?)
        };
        for at in 0..self.costs.len() {
            let Cost { meter, exit, .. } = self.costs[at].cost;
            if meter == Meter::None {
                continue;
            }
            let of_it = added(self, meter, exit);
            let ours = added(self, Meter::Exitmeter, exit).filter(|ours| *ours > 0.0);
            self.costs[at].added = of_it;
            self.costs[at].ratio = of_it.zip(ours).map(|(of_it, ours)| of_it / ours);
        }
    }

    /// The table: a row for each meter, a column for each exit.
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

    /// Without a meter the ticks, else what is added and its ratio; and the spread.
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
    fn a_table_of_what_was_printed() {
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
    fn without_a_base_nothing_is_added() {
        let mut report = Report::default();
        report.take(&serde_json::to_string(&cost(Meter::BpfLatency, &[9.0])).expect("JSON"));
        report.finish();
        assert_eq!(report.costs[0].added, None);
    }
}
