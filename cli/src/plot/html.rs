// SPDX-License-Identifier: GPL-2.0

//! A page with all charts and their numbers, in one file.

use super::{
    series::Series,
    svg::{escape, Picture},
};
use crate::numbers::{exact, mean, share};

const STYLE: &str = "\
body { font: 15px/1.5 'Noto Sans', 'DejaVu Sans', Verdana, Arial, sans-serif; color: #222; background: #f4f4f4; margin: 0 }
main { max-width: 1072px; margin: 0 auto; padding: 24px 16px }
h1 { font-size: 22px; margin: 0 0 8px } h2 { font-size: 17px; font-weight: normal; margin: 8px 14px }
figure, section { background: #fff; margin: 16px 0; padding: 8px; border: 1px solid #ddd; border-radius: 6px; overflow-x: auto }
svg { display: block; max-width: 100%; height: auto }
dl { display: grid; grid-template-columns: max-content auto; gap: 2px 16px; margin: 0 } dt { color: #666 } dd { margin: 0 }
table { border-collapse: collapse; font-size: 13px; width: 100% }
th { font-weight: normal; color: #666; text-align: right } td { text-align: right; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; border-bottom: 1px solid #eee } th:nth-child(2), td:nth-child(2) { text-align: left }
";

/// The page. `facts` are names and texts.
pub fn page(
    title: &str,
    facts: &[(String, String)],
    pictures: &[(String, Picture)],
    series: &Series,
) -> String {
    let title = escape(title);
    let facts: String = facts
        .iter()
        .map(|(name, text)| format!("<dt>{}</dt><dd>{}</dd>\n", escape(name), escape(text)))
        .collect();
    let figures: String = pictures
        .iter()
        .map(|(name, picture)| format!("<figure>\n{}</figure>\n", picture.svg(name)))
        .collect();
    let table = table(series);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<dl>\n{facts}</dl>\n\
         {figures}<section>\n<h2>All reasons, the most kernel cycles first</h2>\n{table}</section>\n\
         </main>\n</body>\n</html>\n"
    )
}

fn table(series: &Series) -> String {
    let titles = [
        "code",
        "reason",
        "exits",
        "of all",
        "kernel cycles",
        "of all",
        "mean",
        "p50",
        "p95",
        "p99",
        "max",
    ];
    let row = |cells: &[String], tag: &str| {
        let cells: String = cells
            .iter()
            .map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)))
            .collect();
        format!("<tr>{cells}</tr>\n")
    };
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
                exact(reason.cycles.kernel),
                share(reason.cycles.kernel, series.sum.cycles.kernel),
                mean(reason.cycles.kernel, reason.exits),
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
