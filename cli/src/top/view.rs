// SPDX-License-Identifier: GPL-2.0

//! Drawing of the screen.

use ratatui::{
    layout::{Alignment, Constraint, Layout, Rect},
    text::{Line, Span, Text},
    widgets::{Block, Cell, Clear, Paragraph, Row, Sparkline, Table, TableState, Wrap},
    Frame,
};

use super::{
    app::{App, Tab},
    columns::{self, Column, Sheet, GAP},
    data::{Scope, ScopeNumbers},
    details::View,
    history::sparkline,
    theme::{texture, Theme},
};
use crate::{
    model::Cycles,
    numbers::{self, bar, exact, rough, share},
    report::format_count,
};

/// Keys and their actions.
const HELP: [(&str, &str); 12] = [
    ("Up Down PgUp PgDn", "select a line (also j, k, g, G)"),
    ("Enter", "go into the VM, vCPU or reason that is selected"),
    ("Esc", "drop the filter; go back"),
    ("Tab", "reasons, VMs or vCPUs; details, code, to user space"),
    ("s", "sort by something else"),
    ("/", "show only lines with a text in their names"),
    ("t", "numbers since the beginning, or of the last interval"),
    ("p  Space", "pause, or go on"),
    ("+ -", "read less often, or more often"),
    ("? h", "these keys"),
    ("Ctrl-Z", "stop; fg goes on"),
    ("q  Ctrl-C", "leave"),
];

/// Draw the whole screen.
pub fn draw(frame: &mut Frame<'_>, app: &mut App, theme: &Theme) {
    let tall = frame.area().height >= 36;
    let [head, rates, bar, legend, title, table, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(if tall { 5 } else { 2 }),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(2),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let numbers = app.numbers();
    header(frame, head, app, theme);
    exits(frame, rates, app, numbers.as_ref(), theme);
    phases(frame, [bar, legend], numbers.as_ref(), theme);
    let sheet = app.sheet();
    app.page = usize::from(table.height.saturating_sub(1)).max(1);
    heading(frame, title, app, &sheet, theme);
    lines(frame, table, app, &sheet, theme);
    footer(frame, foot, app, theme);
    if app.help {
        help(frame, theme);
    }
}

/// Draw the scope and the time that the numbers cover.
fn header(frame: &mut Frame<'_>, area: Rect, app: &App, theme: &Theme) {
    let host = &app.report().host;
    let time = if app.is_total() {
        match app.scope {
            _ if app.breakdown.is_some() => "since details are on".to_owned(),
            Scope::All => "since the module was loaded".to_owned(),
            _ => "since it began".to_owned(),
        }
    } else {
        let interval = app.report().interval;
        let ticks = interval.map_or(0, |interval| interval.ticks);
        format!("in the last {}", numbers::time(ticks, host.tsc_khz))
    };
    let left = Line::from(vec![
        Span::styled("exitmeter ", theme.quiet()),
        Span::styled(app.scope.title(app.report()), theme.title()),
    ]);
    let mut right = vec![Span::styled(time, theme.quiet())];
    if app.paused {
        right.insert(0, Span::styled("paused  ", theme.notice()));
    }
    frame.render_widget(left, area);
    frame.render_widget(Line::from(right).alignment(Alignment::Right), area);
}

/// Draw the number of exits, and the rates before.
fn exits(
    frame: &mut Frame<'_>,
    area: Rect,
    app: &App,
    numbers: Option<&ScopeNumbers>,
    theme: &Theme,
) {
    const WORDS: u16 = 22;
    let [words, bars] =
        Layout::horizontal([Constraint::Length(WORDS), Constraint::Min(0)]).areas(area);
    let (rate, exits) = match numbers {
        Some(ScopeNumbers { ledger, span }) => {
            (columns::rate(*span, ledger.exits), exact(ledger.exits))
        }
        None => ("-".to_owned(), "-".to_owned()),
    };
    let rates = app.history.latest(app.scope, bars.width.into());
    let most = rates.iter().copied().max().unwrap_or(0);
    let mut text = vec![
        Line::from(vec![Span::styled(rate, theme.title()), " exits/s".into()]),
        Line::styled(format!("{exits} exits"), theme.quiet()),
    ];
    if area.height > 2 {
        text.push(Line::styled(
            format!("most {}/s", rough(most)),
            theme.quiet(),
        ));
    }
    frame.render_widget(Text::from(text), words);
    // Keep the latest at the right.
    let shown = u16::try_from(rates.len())
        .unwrap_or(u16::MAX)
        .min(bars.width);
    let bars = Rect {
        x: bars.right() - shown,
        width: shown,
        ..bars
    };
    let bars_of = Sparkline::default().data(&rates).style(theme.bars());
    frame.render_widget(bars_of, bars);
}

/// Draw the phases, as a bar and in numbers.
fn phases(frame: &mut Frame<'_>, areas: [Rect; 2], numbers: Option<&ScopeNumbers>, theme: &Theme) {
    let cycles = numbers.map_or_else(Default::default, |numbers| numbers.ledger.cycles);
    let whole = cycles.sum();
    let width = u128::from(areas[0].width);
    let mut bar = Vec::new();
    let (mut sum, mut drawn) = (0_u128, 0);
    for phase in cycles.phases() {
        sum += cycles.of(phase);
        // Round the end of each part, so that the bar is as wide as the screen.
        let end = (sum * width + whole / 2).checked_div(whole).unwrap_or(0) as usize;
        let length = end.saturating_sub(drawn);
        let texture = texture(phase).to_string().repeat(length);
        bar.push(Span::styled(texture, theme.phase(phase)));
        drawn = end;
    }
    frame.render_widget(Line::from(bar), areas[0]);
    frame.render_widget(legend(&cycles, areas[1].width, theme), areas[1]);
}

/// Return the legend of the bar of phases. If it does not fit, leave out phases without time,
/// and then decimals.
fn legend(cycles: &Cycles, width: u16, theme: &Theme) -> Line<'static> {
    let whole = cycles.sum();
    let line = |all: bool, decimals: bool| {
        let phases = cycles.phases();
        let phases = phases.filter(|phase| all || cycles.of(*phase) != 0);
        let words = phases.flat_map(|phase| {
            let share = share(cycles.of(phase), whole);
            let (name, gap) = (cycles.name(phase), if decimals { "  " } else { " " });
            let share = match share.split_once('.') {
                Some((number, _)) if !decimals => format!("{number}%"),
                _ => share,
            };
            [
                Span::styled(texture(phase).to_string(), theme.phase(phase)),
                Span::raw(format!(" {name} {share}{gap}")),
            ]
        });
        Line::from(words.collect::<Vec<_>>())
    };
    // The last gap may be cut off.
    let fits = |line: &Line<'_>| line.width() <= usize::from(width) + 2;
    [line(true, true), line(false, true)]
        .into_iter()
        .find(fits)
        .unwrap_or_else(|| line(false, false))
}

/// Draw the title of the table, and the notes for the user.
fn heading(frame: &mut Frame<'_>, area: Rect, app: &App, sheet: &Sheet, theme: &Theme) {
    let [one, several] = sheet.nouns;
    let lines = match sheet.lines.len() {
        1 => format!("1 {one}{}", sheet.suffix),
        many => format!("{many} {several}{}", sheet.suffix),
    };
    let order = match sheet.order {
        "name" | "number" => format!(", by {}", sheet.order),
        order => format!(", most {order} first"),
    };
    let mut words = vec![
        Span::styled(lines, theme.title()),
        Span::styled(order, theme.quiet()),
    ];
    if !app.filter.is_empty() {
        words.push(Span::styled(
            format!(", with \"{}\"", app.filter),
            theme.notice(),
        ));
    }
    if let Some(without @ 1..) = app
        .breakdown
        .as_ref()
        .map(|breakdown| breakdown.without_tables)
    {
        let vcpus = format_count(without.into(), "vCPU");
        words.push(Span::styled(
            format!("  no memory for {vcpus}"),
            theme.notice(),
        ));
    }
    if !app.note.is_empty() {
        words.push(Span::styled(format!("  {}", app.note), theme.notice()));
    }
    frame.render_widget(Line::from(words), area);
}

/// Draw the table.
fn lines(frame: &mut Frame<'_>, area: Rect, app: &App, sheet: &Sheet, theme: &Theme) {
    let shown = columns::fitting(&sheet.columns, area.width);
    let columns: Vec<&Column> = shown
        .iter()
        .filter_map(|place| sheet.columns.get(*place))
        .collect();
    let taken = columns.iter().filter(|column| !column.grows);
    let taken: usize = taken.map(|column| usize::from(column.width) + GAP).sum();
    let rest = usize::from(area.width).saturating_sub(taken);
    let widths = columns.iter().map(|column| match column.grows {
        true => Constraint::Length(rest as u16),
        false => Constraint::Length(column.width),
    });
    let aligned = |column: &Column, text: String| {
        let side = if column.left {
            Alignment::Left
        } else {
            Alignment::Right
        };
        Cell::from(Text::from(text).alignment(side))
    };
    let titles = columns
        .iter()
        .map(|column| aligned(column, column.title.to_owned()));
    let rows = sheet.lines.iter().map(|line| {
        let cells = shown.iter().zip(&columns).filter_map(|(place, column)| {
            Some(match line.cells.get(*place)? {
                columns::Cell::Text(text) => aligned(column, text.clone()),
                columns::Cell::Rates(scope) => {
                    let rates = app.history.latest(*scope, rest);
                    aligned(column, sparkline(&rates, rest)).style(theme.bars())
                }
                columns::Cell::Part(part, whole) => {
                    let bar = bar(*part, *whole, rest as u32);
                    aligned(column, bar).style(theme.bars())
                }
            })
        });
        Row::new(cells.collect::<Vec<_>>())
    });
    let table = Table::new(rows, widths)
        .column_spacing(GAP as u16)
        .header(Row::new(titles.collect::<Vec<_>>()).style(theme.title()))
        .row_highlight_style(theme.selected());
    let mut state = TableState::default().with_selected(app.selected(sheet));
    frame.render_stateful_widget(table, area, &mut state);
    if sheet.lines.is_empty() && area.height > 1 {
        let text;
        let word = match (app.tab, app.scope, app.filter.is_empty()) {
            (_, _, false) => "no line has that text; Esc drops the filter",
            (Tab::Why(_, view), ..) => match (&app.breakdown, &app.details_error) {
                (Some(breakdown), _) => breakdown.empty_text(view),
                (None, Some(details_error)) => {
                    text = format!("no details: {details_error}");
                    &text
                }
                (None, None) => "details come with the next reading",
            },
            (Tab::Parts, Scope::All, _) => "no VM runs",
            (_, Scope::All, _) => "no VM has exited",
            (_, scope, _) if scope.numbers(app.report()).is_none() => "it is gone; Esc goes back",
            _ => "no exits",
        };
        let below = Rect {
            y: area.y + 1,
            height: area.height - 1,
            ..area
        };
        let words = Paragraph::new(Line::styled(word, theme.quiet()));
        frame.render_widget(words.wrap(Wrap { trim: true }), below);
    }
}

/// Draw the most important keys, or the filter that is being typed.
fn footer(frame: &mut Frame<'_>, area: Rect, app: &App, theme: &Theme) {
    if app.typing {
        let words = vec![
            Span::styled("/", theme.key()),
            Span::raw(app.filter.clone()),
            Span::styled("_", theme.key()),
            Span::styled("   Enter keeps this filter, Esc drops it", theme.quiet()),
        ];
        frame.render_widget(Line::from(words), area);
        return;
    }
    let other = match (app.tab, app.scope) {
        (Tab::Why(_, view), _) => view.next().name(),
        (Tab::Parts, _) | (_, Scope::Vcpu(..)) => "reasons",
        (_, Scope::All) => "VMs",
        _ => "vCPUs",
    };
    let enter = match app.tab {
        Tab::Parts => "open",
        Tab::Reasons => "details",
        Tab::Why(_, View::Details) => "code",
        Tab::Why(..) => "",
    };
    // The last ones are dropped where there is no room for all.
    let mut keys = vec![
        ("q", "quit"),
        ("?", "help"),
        ("Enter", enter),
        ("Esc", "back"),
        ("Tab", other),
        ("s", "sort"),
        ("/", "filter"),
        ("p", if app.paused { "go on" } else { "pause" }),
        ("t", if app.totals { "interval" } else { "totals" }),
    ];
    keys.retain(|(_, word)| !word.is_empty());
    let width = |keys: &[(&str, &str)]| {
        let widths = keys.iter().map(|(key, word)| key.len() + word.len() + 3);
        widths.sum::<usize>().saturating_sub(2)
    };
    while width(&keys) > usize::from(area.width) && keys.len() > 1 {
        keys.pop();
    }
    let words = keys.into_iter().flat_map(|(key, word)| {
        let word = Span::styled(format!(" {word}  "), theme.quiet());
        [Span::styled(key, theme.key()), word]
    });
    frame.render_widget(Line::from(words.collect::<Vec<_>>()), area);
}

/// Draw the list of keys over the rest.
fn help(frame: &mut Frame<'_>, theme: &Theme) {
    let whole = frame.area();
    let (width, height) = (
        76.min(whole.width),
        (HELP.len() as u16 + 4).min(whole.height),
    );
    let area = Rect {
        x: whole.x + (whole.width - width) / 2,
        y: whole.y + (whole.height - height) / 2,
        width,
        height,
    };
    let mut lines = vec![Line::default()];
    lines.extend(HELP.into_iter().map(|(keys, words)| {
        Line::from(vec![
            Span::styled(format!("  {keys:<19}"), theme.key()),
            words.into(),
        ])
    }));
    let block = Block::bordered()
        .title(" Keys ")
        .title_bottom(" any key goes back ");
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(lines).block(block), area);
}
