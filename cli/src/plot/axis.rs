// SPDX-License-Identifier: GPL-2.0

//! Axes: the scale of a chart, and the labels of its ticks.

/// Scale that maps values to pixels.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
    logarithmic: bool,
}

impl Scale {
    /// Map the values `from` to `to` to the pixels `start` to `end`.
    pub fn linear((from, to): (f64, f64), (start, end): (f64, f64)) -> Self {
        Self {
            from,
            // A range needs an extent to map its only value.
            to: if to > from { to } else { from + 1.0 },
            start,
            end,
            logarithmic: false,
        }
    }

    /// Map values so that equal ratios have equal distances. Both values are above 0.
    pub fn logarithmic((from, to): (f64, f64), pixels: (f64, f64)) -> Self {
        let logarithms = (from.max(1.0).log10(), to.max(1.0).log10());
        Self {
            logarithmic: true,
            ..Self::linear(logarithms, pixels)
        }
    }

    /// Return the pixel of a value.
    pub fn place(&self, value: f64) -> f64 {
        let value = if self.logarithmic {
            value.max(1.0).log10()
        } else {
            value
        };
        let share = ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0);
        self.start + share * (self.end - self.start)
    }
}

/// Return round values from `from` to `to`, about `count` of them, in steps of 1, 2 or 5 times a
/// power of ten.
pub fn ticks(from: f64, to: f64, count: u32) -> Vec<f64> {
    let rough = ((to - from) / f64::from(count.max(1))).max(f64::MIN_POSITIVE);
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|times| times * power)
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(power);
    let first = (from / step - 1e-9).ceil();
    // Multiples of the step, so that no rounding error such as 0.30000000000000004 adds up.
    (0..1000)
        .map(|place| (first + f64::from(place)) * step)
        .take_while(|tick| *tick <= to + step * 1e-6)
        .collect()
}

/// Return the powers of ten from `from` to `to`.
pub fn decades(from: f64, to: f64) -> Vec<f64> {
    let (first, last) = (from.max(1.0).log10().floor(), to.max(1.0).log10().ceil());
    (first as i32..=last as i32)
        .map(|power| 10_f64.powi(power))
        .collect()
}

/// Return the multiples of a power of ten that get labels on a logarithmic axis. A short axis has
/// few powers, so it labels values between them, too.
pub fn labelled_multiples((from, to): (f64, f64)) -> &'static [u8] {
    match to / from {
        ratio if ratio < 30.0 => &[1, 2, 5],
        _ => &[1],
    }
}

/// Format a value for an axis: `0`, `250`, `1.5k`, `20M`.
pub fn label(value: f64) -> String {
    let size = value.abs();
    let (divisor, suffix) = match size {
        size if size >= 0.9995e12 => (1e12, "T"),
        size if size >= 0.9995e9 => (1e9, "G"),
        size if size >= 0.9995e6 => (1e6, "M"),
        size if size >= 0.9995e3 => (1e3, "k"),
        _ => (1.0, ""),
    };
    let text = format!("{:.3}", value / divisor);
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text}{suffix}")
}

/// Round a number to three digits.
pub fn round(value: f64) -> f64 {
    if value <= 0.0 {
        return 0.0;
    }
    let power = 10_f64.powf(2.0 - value.log10().floor());
    (value * power).round() / power
}

/// Format a time for an axis: `500 ns`, `2 µs`, `10 ms`, `1 s`.
pub fn time(seconds: f64) -> String {
    let (times, unit) = match seconds {
        s if s < 0.9995e-6 => (1e9, "ns"),
        s if s < 0.9995e-3 => (1e6, "\u{b5}s"),
        s if s < 0.9995 => (1e3, "ms"),
        _ => (1.0, "s"),
    };
    format!("{} {unit}", label(seconds * times))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(3.2, 4.4, 5), [3.5, 4.0]);
        let tenths: Vec<_> = ticks(0.0, 0.35, 4).into_iter().map(label).collect();
        assert_eq!(tenths, ["0", "0.1", "0.2", "0.3"]);
        assert_eq!(ticks(0.0, 87_000.0, 5).len(), 5);
        for to in [1e-9, 0.7, 13.0, 999.0, 1e15] {
            let ticks = ticks(0.0, to, 5);
            assert!(
                (2..=12).contains(&ticks.len()) && ticks.iter().all(|tick| *tick <= to * 1.001)
            );
        }
        assert_eq!(
            decades(300.0, 20_000.0),
            [100.0, 1000.0, 10_000.0, 100_000.0]
        );
    }

    #[test]
    fn labels_are_short() {
        let labels = [0.0, 0.5, 250.0, 1000.0, 1500.0, 2e7, 3e9, 1e13].map(label);
        assert_eq!(
            labels,
            ["0", "0.5", "250", "1k", "1.5k", "20M", "3G", "10T"]
        );
        let times = [1e-7, 1e-6, 2.5e-5, 0.01, 1.0, 100.0].map(time);
        assert_eq!(
            times,
            ["100 ns", "1 \u{b5}s", "25 \u{b5}s", "10 ms", "1 s", "100 s"]
        );
    }

    #[test]
    fn scales_map_values_to_pixels() {
        let scale = Scale::linear((0.0, 10.0), (100.0, 200.0));
        assert_eq!(
            [0.0, 2.5, 10.0, 11.0].map(|value| scale.place(value)),
            [100.0, 125.0, 200.0, 200.0]
        );
        let scale = Scale::logarithmic((100.0, 10_000.0), (0.0, 20.0));
        assert_eq!(
            [100.0, 1000.0, 10_000.0, 0.0].map(|value| scale.place(value)),
            [0.0, 10.0, 20.0, 0.0]
        );
        assert_eq!(Scale::linear((3.0, 3.0), (0.0, 1.0)).place(3.0), 0.0);
    }
}
