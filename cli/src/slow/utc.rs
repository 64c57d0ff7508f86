// SPDX-License-Identifier: GPL-2.0

//! Wall clock time, in UTC.

use std::{fmt, time::SystemTime};

/// UTC, in microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Utc(i64);

impl Utc {
    /// Convert a system time. Return `None` if it is out of range.
    pub fn new(time: SystemTime) -> Option<Self> {
        let micros = match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_micros()).ok()?,
            Err(before) => -i64::try_from(before.duration().as_micros()).ok()?,
        };
        Some(Self(micros))
    }

    /// Return the time that lies `ticks` earlier. `khz` is the number of ticks in a millisecond.
    pub fn before(self, ticks: i128, khz: u32) -> Option<Self> {
        let micros = ticks.checked_mul(1000)? / i128::from(khz.max(1));
        let micros = i128::from(self.0).checked_sub(micros)?;
        Some(Self(i64::try_from(micros).ok()?))
    }

    /// Format the time of day.
    pub fn time_of_day(self) -> String {
        const DAY: i64 = 86_400_000_000;
        let micros = self.0.rem_euclid(DAY);
        let (seconds, micros) = (micros / 1_000_000, micros % 1_000_000);
        format!(
            "{:02}:{:02}:{:02}.{micros:06}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        )
    }

    /// Return the year, the month and the day of the month.
    ///
    /// The algorithm is `civil_from_days` of Howard Hinnant, "chrono-Compatible Low-Level Date
    /// Algorithms".
    fn day(self) -> (i64, i64, i64) {
        let days = self.0.div_euclid(86_400_000_000) + 719_468;
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Months counted from March.
        let month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        (year, month, day)
    }

    /// Format the date.
    pub fn date(self) -> String {
        let (year, month, day) = self.day();
        format!("{year:04}-{month:02}-{day:02}")
    }
}

/// RFC 3339.
impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}T{}Z", self.date(), self.time_of_day())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn after(seconds: u64, micros: u32) -> Utc {
        let time = SystemTime::UNIX_EPOCH + Duration::new(seconds, micros * 1000);
        Utc::new(time).expect("near enough")
    }

    #[test]
    fn dates_match_the_calendar() {
        // Expected dates by `date -u -d @N`.
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000Z"),
            (1_795_772_912, "2026-11-27T09:48:32.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(after(seconds, 0).to_string(), expected);
        }
    }

    #[test]
    fn ticks_are_subtracted() {
        let moment = after(100, 5);
        let before = |ticks, khz| moment.before(ticks, khz).expect("near enough");
        assert_eq!(before(2_400_000_000, 2_400_000), after(99, 5));
        assert_eq!(before(12_000, 2_400_000), after(100, 0));
        assert_eq!(before(-2_400_000, 2_400_000), after(100, 1005));
        assert!(before(i64::MAX.into(), 2_400_000) < moment);
    }
}
