// SPDX-License-Identifier: GPL-2.0

//! `exitmeter slow` on saved snapshots, in all its forms.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs::{self, File},
    path::PathBuf,
    process::Output,
    time::{Duration, SystemTime},
};

use serde_json::Value;
use tempfile::TempDir;

use self::tool::{exitmeter, failed, succeeded};

mod tool;

const SAVED: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.3.bin");
const WITHOUT_TABLES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.2.bin"
);
/// TSC of the snapshot, its frequency, and the distance of the culprit before it.
const NOW: u64 = 60_000_000_000;
const KHZ: u64 = 2_400_000;

fn slow(arguments: &[&str]) -> Output {
    let arguments = [&["slow"], arguments].concat();
    exitmeter(&arguments).output().unwrap()
}

/// Return the output of a run that succeeds.
fn output_of(arguments: &[&str]) -> String {
    succeeded(slow(arguments))
}

/// Return the exit status and the message of a run that fails.
fn error_of(arguments: &[&str]) -> (Option<i32>, String) {
    failed(slow(arguments))
}

/// The saved snapshot, with a file time of 2026-11-27 12:00:00 UTC.
struct Saved {
    _folder: TempDir,
    path: PathBuf,
}

impl Saved {
    fn new(bytes: &[u8]) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("snapshot");
        fs::write(&path, bytes).unwrap();
        let written = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_780_800);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(written).unwrap();
        Self {
            _folder: folder,
            path,
        }
    }

    fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

/// Return the lines of a table from the titles on, each as its cells.
fn table<'a>(text: &'a str, title: &str) -> Vec<Vec<&'a str>> {
    let lines = text.lines().skip_while(|line| !line.starts_with(title));
    let lines = lines.skip(1).take_while(|line| !line.is_empty());
    lines
        .map(|line| {
            line.split("  ")
                .map(str::trim)
                .filter(|cell| !cell.is_empty())
                .collect()
        })
        .collect()
}

#[test]
fn the_slowest_exits_are_shown_with_their_phases() {
    let saved = Saved::new(SAVED);
    let printed = output_of(&["--limit", "20", saved.path()]);
    assert!(
        printed.starts_with("slow exits (VMX), in microseconds, at times in UTC\n"),
        "{printed}"
    );
    let rows = table(
        &printed,
        "kvm-1234, process 1234: 20 slowest exits of 32 that are kept",
    );
    assert_eq!(
        rows[0],
        [
            "when",
            "vCPU",
            "exit",
            "code",
            "CPU",
            "took",
            "kernel",
            "user",
            "waiting",
            "preempted",
            "halted",
            "outs"
        ]
    );
    // 9 waits for the host, then the preempted exits, the longest first. The guest's own sleep,
    // 3750 us of each HLT, does not count.
    for row in &rows[1..10] {
        assert_eq!(row[1], "0");
        assert!(row[2].starts_with("EPT_VIOLATION "), "{row:?}");
        assert!(row[3].ends_with("(kernel)"), "{row:?}");
        let numbers = ["837.4", "4.1", "0", "833.3", "0", "0", "1"];
        assert_eq!(row[5..], numbers);
    }
    // The first of these exits moved to another CPU, and the others stayed there.
    let cpus: Vec<_> = rows[1..10].iter().map(|row| row[4]).collect();
    assert_eq!(cpus.iter().filter(|cpu| **cpu == "3->5").count(), 1);
    assert_eq!(cpus.iter().filter(|cpu| **cpu == "5").count(), 8);
    assert_eq!(rows[10][2], "INTERRUPT_WINDOW");
    assert_eq!(rows[10][5..], ["129.5", "0.4", "0", "0", "129.2", "0", "1"]);
    assert!(printed.contains("\nThe ring of vCPU 0 is frozen, for EPT_VIOLATION "));
    assert!(printed.contains(": --ring shows what led to it.\n"));
    assert!(printed.contains("\nkvm-1300, process 1300: 0 slowest exits\n"));
}

#[test]
fn the_time_shown_is_that_of_the_exit() {
    let saved = Saved::new(SAVED);
    let json: Value = serde_json::from_str(&output_of(&["--json", saved.path()])).unwrap();
    let ring = &json["vms"][0]["rings"][0];
    assert_eq!(ring["frozen"], true);
    let exits = ring["exits"].as_array().unwrap();
    assert_eq!(exits.len(), 64);
    let culprit = exits.last().unwrap();
    assert_eq!(culprit["culprit"], true);
    let age = (NOW - culprit["tsc"].as_u64().unwrap()) * 1000 / KHZ;
    let of_hour = 12 * 3_600_000_000 - age;
    let expected = format!(
        "2026-11-27T11:59:{:02}.{:06}Z",
        of_hour / 1_000_000 % 60,
        of_hour % 1_000_000
    );
    assert_eq!(culprit["when"], expected);
    assert_eq!(culprit["name"], "EPT_VIOLATION");
    assert_eq!(culprit["detail"]["kind"], "memory");
    assert_eq!(
        (&culprit["took"], &culprit["waiting"]),
        (&2_009_800.into(), &2_000_000.into())
    );
    assert_eq!(
        (&culprit["cpu_exit"], &culprit["cpu_entry"]),
        (&3.into(), &5.into())
    );
    assert_eq!(culprit["rip"], "0xffffffff81000000");
    assert_eq!(json["vms"][0]["slowest"].as_array().unwrap().len(), 32);
}

#[test]
fn a_ring_has_the_exits_before_the_culprit() {
    let saved = Saved::new(SAVED);
    let printed = output_of(&["--ring", "--limit", "3", "--vm", "1234", saved.path()]);
    let rows = table(&printed, "kvm-1234, process 1234, vCPU 0: ring, frozen");
    assert_eq!(rows.len(), 4);
    assert!(rows.iter().all(|row| row.len() == 11), "{rows:?}");
    assert!(rows[3][0].starts_with("> "), "{rows:?}");
    assert!(!rows[2][0].starts_with('>') && rows[2][0] < &rows[3][0][2..]);
    assert!(printed.contains("\nkvm-1234, process 1234, vCPU 1: ring, not frozen\n"));
    assert!(!printed.contains("kvm-1300"));
}

#[test]
fn code_has_its_symbol() {
    let saved = Saved::new(SAVED);
    let folder = TempDir::new().unwrap();
    let symbols = folder.path().join("kallsyms");
    fs::write(&symbols, "ffffffff80fffff0 T fault_in\n").unwrap();
    let symbols = symbols.to_str().unwrap();
    let printed = output_of(&["--vm", "kvm-1234", "--symbols", symbols, saved.path()]);
    let rows = table(&printed, "kvm-1234, process 1234");
    assert_eq!(rows[1][3], "fault_in+0x10");
    let (status, said) = error_of(&["--symbols", symbols, saved.path()]);
    assert_eq!(status, Some(1));
    assert!(said.contains("name the guest by --vm"), "{said}");
}

#[test]
fn csv_has_a_line_for_each_exit() {
    let saved = Saved::new(SAVED);
    let lines = |arguments: &[&str]| {
        let printed = output_of(arguments);
        printed.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let slowest = lines(&["--csv", "--reason", "EPT_VIOLATION", saved.path()]);
    assert_eq!(slowest.len(), 1 + 9);
    let titles = slowest[0].split(',').count();
    for line in &slowest[1..] {
        assert_eq!(line.split(',').count(), titles, "{line}");
        assert!(line.contains(",EPT_VIOLATION,"), "{line}");
        assert!(line.contains(",5,2009800,9800,0,2000000,0,0,1,"), "{line}");
    }
    // The first of these exits moved to another CPU, and the others stayed there.
    let moved = slowest.iter().filter(|line| line.contains(",3,5,2009800,"));
    assert_eq!(moved.count(), 1);
    let stayed = slowest.iter().filter(|line| line.contains(",5,5,2009800,"));
    assert_eq!(stayed.count(), 8);
    let ring = lines(&["--csv", "--ring", "--vm", "1234", saved.path()]);
    assert_eq!(ring.len(), 1 + 64 + 64);
    assert_eq!(
        ring.iter().filter(|line| line.ends_with(",1,,,,,")).count(),
        1
    );
}

#[test]
fn missing_slow_exits_are_an_error() {
    let saved = Saved::new(SAVED);
    let (status, said) = error_of(&[WITHOUT_TABLES]);
    assert_eq!(status, Some(1));
    assert!(
        said.contains("has no slow exits: details were off"),
        "{said}"
    );
    let (_, said) = error_of(&["--vm", "999", saved.path()]);
    assert!(
        said.contains("those that run are kvm-1234, kvm-1300"),
        "{said}"
    );
    let (_, said) = error_of(&["--reason", "NPF", saved.path()]);
    assert!(said.contains("no exit reason of vmx"), "{said}");
    let (_, said) = error_of(&["--device", "/nowhere"]);
    assert!(
        said.starts_with("exitmeter: cannot read /nowhere"),
        "{said}"
    );
    // A device without details is refused before they are turned on.
    let (_, said) = error_of(&["--device", WITHOUT_TABLES]);
    assert!(
        said.contains("details are off, so no exit has been recorded"),
        "{said}"
    );
    let (status, _) = error_of(&["--device", "/nowhere", "--", "true"]);
    assert_eq!(status, Some(125));
}
