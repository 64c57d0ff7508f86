// SPDX-License-Identifier: GPL-2.0

//! Dates of days.

/// Return year, month and day of a day in UTC, counted from 1 January 1970.
pub fn date(days: u64) -> (u64, u64, u64) {
    // Count from 1 March 0000, so that a leap day is the last day of its year. 400 years have 146097 days.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    (year, month, day)
}
