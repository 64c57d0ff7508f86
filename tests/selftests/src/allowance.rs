//! What each test gets: its time, and arguments where its defaults ask more than an emulated host gives.

use std::time::Duration;

/// The seconds of the host's clock that a test gets when nothing else is said of it.
const LIMIT: u64 = 60;

/// What a test gets.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Its arguments.
    pub arguments: &'static [&'static str],
    /// Its time by the host's clock.
    pub limit: Duration,
}

/// The tests that get something of their own.
const SPECIAL: &[(&str, &[&str], u64)] = &[];

/// What the test of a name gets.
pub fn of(name: &str) -> Allowance {
    let special = SPECIAL.iter().find(|(special, ..)| *special == name);
    let (arguments, seconds) = special.map_or((&[][..], LIMIT), |(_, arguments, seconds)| {
        (arguments, *seconds)
    });
    Allowance {
        arguments,
        limit: Duration::from_secs(seconds),
    }
}
