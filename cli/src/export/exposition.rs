// SPDX-License-Identifier: GPL-2.0

//! The two text formats that Prometheus reads: its own, version 0.0.4, and OpenMetrics 1.0.
//!
//! The crate prometheus-client writes only OpenMetrics, but node_exporter's textfile collector and
//! promtool read the other format.

use std::fmt::{self, Write as _};

/// Format of a scrape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Prometheus's own format (prometheus.io/docs/instrumenting/exposition_formats).
    #[default]
    Text,
    /// OpenMetrics 1.0 (prometheus.io/docs/specs/om/open_metrics_spec).
    OpenMetrics,
}

impl Format {
    /// Return the format for a request's Accept header: OpenMetrics if the header names it.
    pub fn accepted(accept: &str) -> Self {
        match accept.contains("application/openmetrics-text") {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }

    /// Return the value of Content-Type.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number that only grows.
    Counter,
    /// A number.
    Gauge,
    /// The constant 1, with information in its labels.
    Info,
    /// Numbers of samples up to each bound.
    Histogram,
}

impl Kind {
    /// Return the suffix of a sample's name, for families with one sample per set of labels.
    const fn suffix(self) -> &'static str {
        match self {
            Self::Counter => "_total",
            Self::Info => "_info",
            Self::Gauge | Self::Histogram => "",
        }
    }

    const fn name(self, format: Format) -> &'static str {
        match (self, format) {
            (Self::Counter, _) => "counter",
            (Self::Info, Format::OpenMetrics) => "info",
            (Self::Gauge | Self::Info, _) => "gauge",
            (Self::Histogram, _) => "histogram",
        }
    }
}

/// Text of a scrape, while it is written.
#[derive(Clone, Debug)]
pub struct Exposition {
    text: String,
    format: Format,
}

/// A family of metrics.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Name, without the suffix of its kind.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// Unit that the name ends in.
    pub unit: Option<&'static str>,
    /// Description, one sentence.
    pub help: &'static str,
}

/// Names and values of labels.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

impl Exposition {
    /// Create an empty scrape.
    pub fn new(format: Format) -> Self {
        Self {
            text: String::new(),
            format,
        }
    }

    /// Reserve memory for `bytes` more bytes.
    pub fn reserve(&mut self, bytes: usize) {
        self.text.reserve(bytes);
    }

    /// Begin a family. All its samples must follow.
    pub fn family(&mut self, family: &Family) {
        let Family {
            name,
            kind,
            unit,
            help,
        } = *family;
        // In OpenMetrics, the family's name has no suffix.
        let suffix = match self.format {
            Format::Text => kind.suffix(),
            Format::OpenMetrics => "",
        };
        let kind = kind.name(self.format);
        self.add(format_args!("# HELP {name}{suffix} {help}\n"));
        self.add(format_args!("# TYPE {name}{suffix} {kind}\n"));
        if let (Format::OpenMetrics, Some(unit)) = (self.format, unit) {
            self.add(format_args!("# UNIT {name} {unit}\n"));
        }
    }

    /// Add a sample, for families with one sample per set of labels.
    pub fn sample(&mut self, family: &Family, labels: Labels<'_>, value: impl fmt::Display) {
        self.line(family.name, family.kind.suffix(), labels, None, value);
    }

    /// Add the start time of the counters with these labels, in seconds since 1970. Only
    /// OpenMetrics has it.
    pub fn created(&mut self, family: &Family, labels: Labels<'_>, seconds: f64) {
        if self.format == Format::OpenMetrics {
            self.line(family.name, "_created", labels, None, seconds);
        }
    }

    /// Add a histogram: the number of samples up to each bound and to infinity, and their sum.
    pub fn histogram(
        &mut self,
        family: &Family,
        labels: Labels<'_>,
        counts: &[(f64, u64)],
        count: u64,
        sum: f64,
    ) {
        for (bound, count) in counts {
            let bound = bound.to_string();
            self.line(family.name, "_bucket", labels, Some(&bound), count);
        }
        self.line(family.name, "_bucket", labels, Some("+Inf"), count);
        self.line(family.name, "_sum", labels, None, sum);
        self.line(family.name, "_count", labels, None, count);
    }

    /// Finish the scrape and return its text.
    pub fn done(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }

    fn line(
        &mut self,
        name: &str,
        suffix: &str,
        labels: Labels<'_>,
        bound: Option<&str>,
        value: impl fmt::Display,
    ) {
        self.text.push_str(name);
        self.text.push_str(suffix);
        let bound = bound.map(|bound| ("le", bound));
        let mut before = '{';
        for (name, value) in labels.iter().copied().chain(bound) {
            self.text.push(before);
            before = ',';
            self.text.push_str(name);
            self.text.push_str("=\"");
            escape(&mut self.text, value);
            self.text.push('"');
        }
        if before == ',' {
            self.text.push('}');
        }
        self.add(format_args!(" {value}\n"));
    }

    fn add(&mut self, text: fmt::Arguments<'_>) {
        let _ = self.text.write_fmt(text);
    }
}

/// Append the value of a label, escaped.
fn escape(text: &mut String, value: &str) {
    for letter in value.chars() {
        match letter {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            letter => text.push(letter),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXITS: Family = Family {
        name: "exits",
        kind: Kind::Counter,
        unit: None,
        help: "Exits.",
    };
    const TIME: Family = Family {
        name: "time_seconds",
        kind: Kind::Histogram,
        unit: Some("seconds"),
        help: "Time.",
    };
    const BUILD: Family = Family {
        name: "build",
        kind: Kind::Info,
        unit: None,
        help: "Version.",
    };

    fn written(format: Format) -> String {
        let mut text = Exposition::new(format);
        text.family(&EXITS);
        text.sample(&EXITS, &[("vm", "a\"b\\c\nd")], u64::MAX);
        text.created(&EXITS, &[("vm", "a\"b\\c\nd")], 1.5);
        text.family(&TIME);
        text.histogram(&TIME, &[], &[(0.000_000_5, 1), (2.0, 3)], 4, 10.25);
        text.family(&BUILD);
        text.sample(&BUILD, &[("version", "1")], 1);
        text.done()
    }

    #[test]
    fn text_format_matches_its_specification() {
        assert_eq!(
            written(Format::Text),
            "# HELP exits_total Exits.\n# TYPE exits_total counter\n\
             exits_total{vm=\"a\\\"b\\\\c\\nd\"} 18446744073709551615\n\
             # HELP time_seconds Time.\n# TYPE time_seconds histogram\n\
             time_seconds_bucket{le=\"0.0000005\"} 1\ntime_seconds_bucket{le=\"2\"} 3\n\
             time_seconds_bucket{le=\"+Inf\"} 4\ntime_seconds_sum 10.25\ntime_seconds_count 4\n\
             # HELP build_info Version.\n# TYPE build_info gauge\nbuild_info{version=\"1\"} 1\n"
        );
    }

    #[test]
    fn openmetrics_matches_its_specification() {
        assert_eq!(
            written(Format::OpenMetrics),
            "# HELP exits Exits.\n# TYPE exits counter\n\
             exits_total{vm=\"a\\\"b\\\\c\\nd\"} 18446744073709551615\nexits_created{vm=\"a\\\"b\\\\c\\nd\"} 1.5\n\
             # HELP time_seconds Time.\n# TYPE time_seconds histogram\n# UNIT time_seconds seconds\n\
             time_seconds_bucket{le=\"0.0000005\"} 1\ntime_seconds_bucket{le=\"2\"} 3\n\
             time_seconds_bucket{le=\"+Inf\"} 4\ntime_seconds_sum 10.25\ntime_seconds_count 4\n\
             # HELP build Version.\n# TYPE build info\nbuild_info{version=\"1\"} 1\n# EOF\n"
        );
    }

    #[test]
    fn openmetrics_is_chosen_by_the_accept_header() {
        // The header of Prometheus 2.53.
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        assert_eq!(Format::accepted(prometheus), Format::OpenMetrics);
        assert_eq!(Format::accepted("*/*"), Format::Text);
    }
}
