// SPDX-License-Identifier: GPL-2.0

//! Sweeps over the exit reasons, as `cpuid -r` prints them, and their tables.

use std::{collections::BTreeMap, fmt::Write};

use exitmeter_meter::reasons::{self, Isa};

/// Leaf of all exits, in the map of 2021.
const TOTAL_EXITS: u32 = 0x4fff_ffff;

/// Exits and cycles of one reason.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Numbers {
    exits: u64,
    cycles: u64,
}

/// A guest's answers to one sweep.
#[derive(Clone, Debug)]
pub(crate) struct Sweep {
    isa: Isa,
    title: String,
    reasons: BTreeMap<u32, Numbers>,
    total: Numbers,
    answers: usize,
}

impl Sweep {
    /// Create an empty sweep.
    pub(crate) fn new(isa: Isa, title: &str) -> Self {
        Self {
            isa,
            title: title.to_owned(),
            reasons: BTreeMap::new(),
            total: Numbers::default(),
            answers: 0,
        }
    }

    /// Return the number of answers.
    pub(crate) fn answers(&self) -> usize {
        self.answers
    }

    /// Take a line of `cpuid -r`:
    /// `   0x4ffffffd 0x0a: eax=0x000003ea ebx=0x00000000 ecx=0x00000000 edx=0x00000000`.
    /// Return true if it is such a line, with a leaf of the map of 2021.
    pub(crate) fn line(&mut self, line: &str) -> bool {
        let Some((leaf, reason, [eax, ebx, ecx, edx])) = parse(line) else {
            return false;
        };
        let undefined = [eax, ebx, ecx, edx] == [0, 0, 0, u32::MAX];
        let join = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        match leaf {
            TOTAL_EXITS => self.total.exits = join(ebx, eax),
            0x4fff_fffe => self.total.cycles = join(ebx, ecx),
            0x4fff_fffd if undefined => {}
            0x4fff_fffc if undefined => {}
            0x4fff_fffd => self.reasons.entry(reason).or_default().exits = join(ebx, eax),
            0x4fff_fffc => self.reasons.entry(reason).or_default().cycles = join(ebx, ecx),
            _ => return false,
        }
        self.answers += 1;
        true
    }

    /// Return the exits and cycles added since an earlier sweep.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let minus = |now: Numbers, then: Numbers| Numbers {
            exits: now.exits.saturating_sub(then.exits),
            cycles: now.cycles.saturating_sub(then.cycles),
        };
        let mut since = self.clone();
        since.total = minus(self.total, earlier.total);
        for (reason, numbers) in &mut since.reasons {
            let then = earlier.reasons.get(reason).copied().unwrap_or_default();
            *numbers = minus(*numbers, then);
        }
        since
    }

    fn name(&self, reason: u32) -> &'static str {
        reasons::name(self.isa, reason).unwrap_or("?")
    }

    /// Return the reasons that occurred, sorted by one of their numbers, largest first.
    fn by(&self, key: impl Fn(&Numbers) -> u64) -> Vec<(u32, Numbers)> {
        let mut rows: Vec<_> = self
            .reasons
            .iter()
            .filter(|(_, numbers)| numbers.exits > 0)
            .map(|(reason, numbers)| (*reason, *numbers))
            .collect();
        rows.sort_by_key(|(_, numbers)| std::cmp::Reverse(key(numbers)));
        rows
    }

    /// Format the table of the reasons that occurred, most costly first.
    pub(crate) fn table(&self) -> String {
        let mut table = format!(
            "{}\n\n{:>6}  {:<22} {:>8} {:>12} {:>12} {:>7}\n",
            self.title, "reason", "name", "exits", "cycles", "per exit", "share"
        );
        let sum: u64 = self.reasons.values().map(|numbers| numbers.cycles).sum();
        for (reason, Numbers { exits, cycles }) in self.by(|numbers| numbers.cycles) {
            let share = cycles as f64 * 100.0 / sum.max(1) as f64;
            let _ = writeln!(
                table,
                "{reason:>6}  {:<22} {exits:>8} {cycles:>12} {:>12} {share:>6.1}%",
                self.name(reason),
                cycles / exits,
            );
        }
        let _ = writeln!(
            table,
            "{:>6}  {:<22} {:>8} {:>12}   (leaves 0x4FFFFFFF and 0x4FFFFFFE)",
            "", "all, when it ended", self.total.exits, self.total.cycles
        );
        table
    }

    /// Name the three most frequent reasons in a few words.
    pub(crate) fn leading(&self) -> String {
        let exits: u64 = self.reasons.values().map(|numbers| numbers.exits).sum();
        let leading: Vec<_> = self
            .by(|numbers| numbers.exits)
            .iter()
            .take(3)
            .map(|(reason, numbers)| {
                let share = numbers.exits as f64 * 100.0 / exits.max(1) as f64;
                format!("{} ({reason}) with {share:.0}%", self.name(*reason))
            })
            .collect();
        format!(
            "up to the first sweep, the most frequent were {}",
            leading.join(", ")
        )
    }
}

/// Return the total of exits in a line of `cpuid -r`, if the line is for that leaf.
pub(crate) fn total_exits(line: &str) -> Option<u64> {
    let (leaf, _, [eax, ebx, ..]) = parse(line)?;
    (leaf == TOTAL_EXITS).then_some(u64::from(ebx) << 32 | u64::from(eax))
}

/// Parse a line of `cpuid -r` into leaf, sub-leaf and the four registers.
fn parse(line: &str) -> Option<(u32, u32, [u32; 4])> {
    let (place, registers) = line.split_once(':')?;
    let (leaf, subleaf) = place.trim().split_once(' ')?;
    let mut values = [0; 4];
    let mut words = registers.split_whitespace();
    for (value, name) in values.iter_mut().zip(["eax", "ebx", "ecx", "edx"]) {
        *value = hex(words.next()?.strip_prefix(name)?.strip_prefix('=')?)?;
    }
    Some((hex(leaf)?, hex(subleaf)?, values))
}

fn hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: &str =
        "   0x4ffffffd 0x0a: eax=0x00000364 ebx=0x00000001 ecx=0x00000000 edx=0x00000000";

    fn sweep(lines: &[&str]) -> Sweep {
        let mut sweep = Sweep::new(Isa::Vmx, "A title");
        for line in lines {
            assert!(sweep.line(line), "{line}");
        }
        sweep
    }

    #[test]
    fn lines_of_cpuid_are_parsed() {
        assert_eq!(parse(COUNT), Some((0x4fff_fffd, 10, [0x364, 1, 0, 0])));
        let mut sweep = Sweep::new(Isa::Vmx, "");
        for line in [
            "",
            "CPU:",
            "   0x4ffffffd 0x0a: eax=1",
            "[   12.3] kernel: noise",
        ] {
            assert!(!sweep.line(line), "{line}");
        }
    }

    #[test]
    fn a_table_has_the_exits_of_its_sweep_or_those_added_since() {
        let first = sweep(&[
            "   0x4ffffffd 0x0a: eax=0x00000064 ebx=0x00000000 ecx=0x00000000 edx=0x00000000",
            "   0x4ffffffc 0x0a: eax=0x00000000 ebx=0x00000000 ecx=0x000003e8 edx=0x00000000",
            "   0x4ffffffd 0x23: eax=0x00000000 ebx=0x00000000 ecx=0x00000000 edx=0xffffffff",
            "   0x4fffffff 0x00: eax=0x00000065 ebx=0x00000000 ecx=0x00000000 edx=0x00000000",
        ]);
        assert_eq!(
            first.table().lines().nth(3),
            Some("    10  CPUID                       100         1000           10  100.0%")
        );
        let second = sweep(&[
            "   0x4ffffffd 0x0a: eax=0x00000078 ebx=0x00000000 ecx=0x00000000 edx=0x00000000",
            "   0x4ffffffc 0x0a: eax=0x00000000 ebx=0x00000000 ecx=0x000007d0 edx=0x00000000",
        ]);
        assert!(second
            .since(&first)
            .table()
            .contains("CPUID                        20         1000           50"));
        assert_eq!(
            first.leading(),
            "up to the first sweep, the most frequent were CPUID (10) with 100%"
        );
    }
}
