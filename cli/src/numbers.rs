// SPDX-License-Identifier: GPL-2.0

//! Numbers formatted for people.

/// Format a number in full, with a comma at every third digit.
pub fn exact<N: Into<u128>>(number: N) -> String {
    let digits = number.into().to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Format a number with about three digits: `907`, `12.3k`, `4.02G`.
pub fn rough<N: Into<u128>>(number: N) -> String {
    let number = number.into();
    if number < 1000 {
        return number.to_string();
    }
    let mut value = number as f64;
    for suffix in ["", "k", "M", "G", "T", "P", "E", "Z"] {
        if value < 999.5 {
            let decimals = match value {
                value if value < 9.995 => 2,
                value if value < 99.95 => 1,
                _ => 0,
            };
            return format!("{value:.decimals$}{suffix}");
        }
        value /= 1000.0;
    }
    format!("{value:.0}Y")
}

/// Append a `+` if `at_least` is set: the counter was full, and the number is a lower bound
/// (`18.4E+`).
pub fn at_least(text: String, at_least: bool) -> String {
    text + if at_least { "+" } else { "" }
}

/// Format `part` of `whole` in percent, at most 100; a dash if `whole` is 0.
pub fn share<P: Into<u128>, W: Into<u128>>(part: P, whole: W) -> String {
    let (part, whole) = (part.into(), whole.into());
    if whole == 0 {
        return "-".to_owned();
    }
    format!("{:.1}%", (part as f64 * 100.0 / whole as f64).min(100.0))
}

/// Format a rate per second with about three digits; a dash if it is unknown.
pub fn rate(per_second: Option<f64>) -> String {
    match per_second {
        None => "-".to_owned(),
        Some(rate) if rate > 0.0 && rate < 0.005 => "<.01".to_owned(),
        Some(rate) if rate > 0.0 && rate < 9.995 => format!("{rate:.2}"),
        Some(rate) if rate < 99.95 && rate > 0.0 => format!("{rate:.1}"),
        // The cast saturates far above any rate of exits.
        Some(rate) => rough(rate.round() as u128),
    }
}

/// Format the mean of `count` parts that add up to `sum`; a dash if there are none.
pub fn mean(sum: u128, count: u64) -> String {
    rounded(sum, count).map_or_else(|| "-".to_owned(), exact)
}

/// Return the mean, rounded, or `None` if `count` is 0.
pub fn rounded(sum: u128, count: u64) -> Option<u128> {
    sum.saturating_add(u128::from(count / 2))
        .checked_div(count.into())
}

/// Format ticks as time if the frequency is known, else as ticks.
pub fn time<N: Into<u128>>(ticks: N, khz: Option<u32>) -> String {
    let ticks = ticks.into();
    let Some(khz) = khz else {
        return format!("{} ticks", rough(ticks));
    };
    let seconds = ticks as f64 / (f64::from(khz) * 1000.0);
    match seconds {
        s if s < 999.5e-9 => format!("{:.0} ns", s * 1e9),
        s if s < 999.5e-6 => format!("{:.0} us", s * 1e6),
        s if s < 999.5e-3 => format!("{:.0} ms", s * 1e3),
        s if s < 99.95 => format!("{s:.1} s"),
        s if s < 5999.5 => format!("{:.0} min {:.0} s", (s / 60.0).floor(), (s % 60.0).floor()),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Format the rate of a clock, in MHz.
pub fn clock_rate(khz: Option<u32>) -> String {
    match khz {
        Some(khz) => format!("{:.3} MHz", f64::from(khz) / 1000.0),
        None => "of unknown rate".to_owned(),
    }
}

/// Format a bar for `part` of `whole`. A full bar has `width` characters.
pub fn bar<P: Into<u128>, W: Into<u128>>(part: P, whole: W, width: u32) -> String {
    let (part, whole) = (part.into(), whole.into());
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    if part == 0 || whole == 0 {
        return String::new();
    }
    let share = (part as f64 / whole as f64).min(1.0);
    // Any part above 0 is visible.
    let eighths = ((share * f64::from(width) * 8.0).round() as usize).max(1);
    let (full, rest) = (eighths / 8, eighths % 8);
    "█".repeat(full) + EIGHTHS.get(rest).unwrap_or(&"")
}

/// Format the same bar in ASCII. A part below half a character is a dot.
pub fn ascii_bar<P: Into<u128>, W: Into<u128>>(part: P, whole: W, width: u32) -> String {
    let (part, whole) = (part.into(), whole.into());
    if part == 0 || whole == 0 {
        return String::new();
    }
    let share = (part as f64 / whole as f64).min(1.0);
    match (share * f64::from(width)).round() as usize {
        0 => ".".to_owned(),
        full => "#".repeat(full),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_exact() {
        let exactly = [0, 999, 1000, 1_234_567, u64::MAX].map(exact::<u64>);
        assert_eq!(
            exactly,
            [
                "0",
                "999",
                "1,000",
                "1,234,567",
                "18,446,744,073,709,551,615"
            ]
        );
        let roughly = [
            0,
            999,
            1000,
            9_994,
            9_995,
            99_949,
            999_499,
            999_500,
            4_020_000_000,
        ];
        let roughly = roughly.map(rough::<u64>);
        assert_eq!(
            roughly,
            ["0", "999", "1.00k", "9.99k", "10.0k", "99.9k", "999k", "1.00M", "4.02G"]
        );
        assert_eq!(rough(u64::MAX), "18.4E");
        assert_eq!(rough(u128::from(u64::MAX) * 100), "1.84Z");
        assert_eq!(
            [(1_u64, 3_u64), (0, 5), (1, 0), (7, 5)].map(|(part, whole)| share(part, whole)),
            ["33.3%", "0.0%", "-", "100.0%"]
        );
        assert_eq!([mean(10, 4), mean(3, 0)], ["3", "-"]);
        let rates =
            [0.0, 0.001, 0.5, 9.999, 99.96, 1234.4].map(|per_second| rate(Some(per_second)));
        assert_eq!(rates, ["0", "<.01", "0.50", "10.0", "100", "1.23k"]);
        assert_eq!(rate(None), "-");
    }

    #[test]
    fn ticks_are_shown_as_time() {
        let time = |ticks: u64| time(ticks, Some(1_000_000));
        let times = [
            7,
            70_000,
            70_000_000,
            7_000_000_000,
            125_000_000_000,
            7_200_000_000_000,
        ];
        assert_eq!(
            times.map(time),
            ["7 ns", "70 us", "70 ms", "7.0 s", "2 min 5 s", "2.0 h"]
        );
        assert_eq!(super::time(7_000_u64, None), "7.00k ticks");
    }

    #[test]
    fn bars_are_as_long_as_their_share() {
        assert_eq!(bar(1_u64, 2_u64, 4), "██");
        assert_eq!(bar(1_u64, 1_000_000_u64, 4), "▏");
        assert_eq!(bar(9_u64, 16_u64, 2), "█▏");
        assert_eq!([bar(0_u64, 7_u64, 4), bar(3_u64, 0_u64, 4)], ["", ""]);
        assert_eq!(bar(9_u64, 3_u64, 2), "██");
        assert_eq!(ascii_bar(1_u64, 2_u64, 4), "##");
        assert_eq!(ascii_bar(1_u64, 1_000_000_u64, 4), ".");
        assert_eq!(ascii_bar(9_u64, 3_u64, 2), "##");
        assert_eq!(ascii_bar(0_u64, 7_u64, 4), "");
    }
}
