// SPDX-License-Identifier: GPL-2.0

//! Page with all charts and their numbers, in one file.

use std::cmp::Reverse;

use super::{
    details,
    series::Series,
    slow,
    svg::{escape, Picture},
};
use crate::{
    numbers::{exact, mean, share},
    why::model::Weight,
};

/// Maximum number of rows of a table.
const ROWS: usize = 100;

const STYLE: &str = "\
body { font: 15px/1.5 'Noto Sans', 'DejaVu Sans', Verdana, Arial, sans-serif; color: #222; background: #f4f4f4; margin: 0 }
main { max-width: 1072px; margin: 0 auto; padding: 24px 16px }
h1 { font-size: 22px; margin: 0 0 8px } h2 { font-size: 17px; font-weight: normal; margin: 8px 14px }
figure, section { background: #fff; margin: 16px 0; padding: 8px; border: 1px solid #ddd; border-radius: 6px; overflow-x: auto }
svg { display: block; max-width: 100%; min-width: 860px; height: auto }
dl { display: grid; grid-template-columns: max-content auto; gap: 2px 16px; margin: 0 } dt { color: #666 } dd { margin: 0 }
table { border-collapse: collapse; font-size: 13px; width: 100% }
th { font-weight: normal; color: #666; text-align: right } td { text-align: right; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; border-bottom: 1px solid #eee; white-space: nowrap } th:nth-child(2), td:nth-child(2), .code :nth-child(3) { text-align: left }
td:nth-child(2), .code td:nth-child(3) { white-space: normal; min-width: 10em }
";

/// Return the page of a recording. `facts` are pairs of a name and a text.
pub fn page(
    title: &str,
    facts: &[(String, String)],
    pictures: &[(String, Picture)],
    series: &Series,
    weight: Weight,
) -> String {
    let facts: String = facts
        .iter()
        .map(|(name, text)| format!("<dt>{}</dt><dd>{}</dd>\n", escape(name), escape(text)))
        .collect();
    let figures: String = pictures
        .iter()
        .map(|(name, picture)| format!("<figure>\n{}</figure>\n", picture.svg(name)))
        .collect();
    let table = table(series);
    let more = details_section(series, weight) + &slow_section(series);
    let body = format!(
        "<dl>\n{facts}</dl>\n\
         {figures}<section>\n<h2>All reasons, the most kernel cycles first, without those for which KVM polled before it let a vCPU sleep</h2>\n{table}</section>\n{more}"
    );
    document(title, "", &body)
}

/// Return a whole page. `head` is added to its head, after the title and the style.
pub fn document(title: &str, head: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n{head}<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}</main>\n</body>\n</html>\n"
    )
}

/// Return a line of a table.
fn row(cells: &[String], tag: &str) -> String {
    let cells: String = cells
        .iter()
        .map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)))
        .collect();
    format!("<tr>{cells}</tr>\n")
}

/// Return a section with a table of at most `ROWS` rows.
pub fn section(title: &str, class: &str, titles: &[&str], rows: Vec<Vec<String>>) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let more = match rows.len().saturating_sub(ROWS) {
        0 => String::new(),
        more => format!("; {} more are left out", exact(more as u64)),
    };
    let titles: Vec<_> = titles.iter().map(|title| (*title).to_owned()).collect();
    let rows: String = rows
        .iter()
        .take(ROWS)
        .map(|cells| row(cells, "td"))
        .collect();
    format!(
        "<section>\n<h2>{title}{more}</h2>\n<table class=\"{class}\">\n{}{rows}</table>\n</section>\n",
        row(&titles, "th")
    )
}

/// Return the section of details.
fn details_section(series: &Series, weight: Weight) -> String {
    let mut rows = Vec::new();
    for group in details::by_reason(series, weight) {
        for row in &group.rows {
            rows.push((group.label, row.about(), row.counts, row.bound()));
        }
        if !group.others.is_zero() {
            let words = if group.rows.is_empty() { "" } else { "others" };
            rows.push((group.label, words.to_owned(), group.others, String::new()));
        }
    }
    rows.sort_by_key(|(.., counts, _)| Reverse((counts.weigh(weight), counts.exits)));
    let all: u64 = rows.iter().map(|(.., counts, _)| counts.exits).sum();
    let rows = rows.into_iter().map(|(label, words, counts, bound)| {
        let kernel = counts.kernel.unwrap_or(0);
        vec![
            label.to_string(),
            words,
            exact(counts.exits),
            share(counts.exits, all),
            exact(kernel),
            mean(kernel, counts.exits),
            exact(counts.user.unwrap_or(0)),
            bound,
        ]
    });
    let titles = [
        "reason",
        "about",
        "exits",
        "of all",
        "kernel cycles",
        "mean",
        "user cycles",
        "bound",
    ];
    section(
        "What exits were about, what leads first",
        "about",
        &titles,
        rows.collect(),
    )
}

/// Return the section of slow exits.
fn slow_section(series: &Series) -> String {
    let unit = slow::Unit::new(series);
    let rows = series.slow.iter().map(|slow| {
        let exit = &slow.exit;
        let mut cells = vec![
            format!("{:.6}", slow.at),
            exit.about(),
            exit.place().unwrap_or_default(),
            format!("{} {}", slow.vm, exit.vcpu),
        ];
        let times = [
            exit.took,
            exit.kernel,
            exit.user,
            exit.waiting,
            exit.preempted,
            exit.halted,
        ];
        cells.extend(times.map(|ticks| match ticks {
            0 => "0".to_owned(),
            ticks => unit.time(ticks),
        }));
        cells.push(exact(exit.scheduled_out));
        cells.push(exit.to_user().unwrap_or_default());
        cells
    });
    let titles = [
        "s",
        "exit",
        "code",
        "vCPU",
        "took",
        "kernel",
        "user",
        "waiting",
        "preempted",
        "halted",
        "outs",
        "to user space",
    ];
    section(
        "The slowest exits, the longest first",
        "code",
        &titles,
        rows.collect(),
    )
}

fn table(series: &Series) -> String {
    let titles = [
        "code",
        "reason",
        "exits",
        "of all",
        "kernel cycles",
        "polled",
        "of all",
        "mean",
        "p50",
        "p95",
        "p99",
        "max",
    ];
    let mut table = row(&titles.map(str::to_owned), "th");
    for reason in &series.sum.reasons {
        let spread = reason.spread.as_ref();
        let quantile = |percent| {
            let ticks = spread.and_then(|spread| spread.quantile(percent));
            ticks.map_or("-".to_owned(), exact)
        };
        let max = spread.map(|spread| spread.max).filter(|max| *max != 0);
        let code = reason.label.code;
        table += &row(
            &[
                code.map_or(String::new(), |code| code.to_string()),
                reason.label.to_string(),
                exact(reason.exits),
                share(reason.exits, series.sum.exits),
                exact(reason.cost()),
                reason.polled.map_or("-".to_owned(), exact),
                share(reason.cost(), series.sum.cost()),
                mean(reason.cost(), reason.exits),
                quantile(50),
                quantile(95),
                quantile(99),
                max.map_or("-".to_owned(), exact),
            ],
            "td",
        );
    }
    format!("<table>\n{table}</table>\n")
}
