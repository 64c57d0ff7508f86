// SPDX-License-Identifier: GPL-2.0

//! `exitmeter report` in all its forms: narrow, as CSV, selected, by intervals, in colours.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::termios::Winsize;
use rustix_openpty::openpty;
use tempfile::TempDir;

use self::{
    saved::compare,
    tool::{exitmeter, failed, succeeded},
};

mod saved;
mod tool;

const SAVED: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.2.bin");

/// Header: TSC of the snapshot, vCPUs not metered, offset of the records, the meter's life.
const NOW: usize = 40;
const UNMETERED: usize = 56;
const RECORDS: usize = 88;
const LIFE: usize = 120;
/// A record: TSC of its latest transition, and its first row's exits and guest ticks.
const LAST: usize = 32;
const EXITS: usize = 112 + 8;
const GUEST: usize = 112 + 16;

fn add(bytes: &mut [u8], offset: usize, more: u64) {
    let number = bytes[offset..].first_chunk_mut::<8>().unwrap();
    *number = (u64::from_le_bytes(*number).wrapping_add(more)).to_le_bytes();
}

/// Write the saved snapshot, and another one second later: after 1000 more exits of the first vCPU
/// and 30 ms in its guest, of which 20 ms are booked.
fn two_snapshots(folder: &TempDir) -> [PathBuf; 2] {
    let mut later = SAVED.to_vec();
    let first = u64::from_le_bytes(*SAVED[RECORDS..].first_chunk().unwrap());
    let first = usize::try_from(first).unwrap();
    add(&mut later, NOW, 2_400_000_000);
    add(&mut later, UNMETERED, 2);
    add(&mut later, first + EXITS, 1000);
    add(&mut later, first + GUEST, 48_000_000);
    add(&mut later, first + LAST, 48_000_000);
    let [before, after] = ["before", "after"].map(|name| folder.path().join(name));
    fs::write(&before, SAVED).unwrap();
    fs::write(&after, later).unwrap();
    [before, after]
}

fn report(arguments: &[&str]) -> Command {
    exitmeter(&[&["report"], arguments].concat())
}

/// Return the output for the saved snapshot.
fn output_of(arguments: &[&str]) -> String {
    let folder = TempDir::new().unwrap();
    let [before, _] = two_snapshots(&folder);
    let mut command = report(arguments);
    succeeded(command.arg("--input").arg(before).output().unwrap())
}

fn error_of(command: &mut Command) -> String {
    let (status, said) = failed(command.output().unwrap());
    assert_eq!(status, Some(1));
    said
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn eighty_columns_are_enough() {
    let folder = TempDir::new().unwrap();
    let [before, _] = two_snapshots(&folder);
    let mut command = report(&["--input", text(&before)]);
    let text = succeeded(command.env("COLUMNS", "80").output().unwrap());
    compare(&text, "report-80.txt");
    assert!(text.lines().all(|line| line.chars().count() <= 80));
}

#[test]
fn a_selection_shows_only_its_vm_or_vcpu() {
    let whole = output_of(&[]);
    for vm in ["1234", "kvm-1234"] {
        let part = output_of(&["--vm", vm]);
        assert!(part.contains("\nkvm-1234, process 1234: 13,124 exits, 525/s, 2 vCPUs\n"));
        assert!(!part.contains("kvm-1300") && !part.contains("gone:"));
        assert!(part.lines().all(|line| whole.contains(line)));
    }
    // The numbers of the VM are the sums of the selected vCPU only.
    let part = output_of(&["--vcpu", "1"]);
    assert!(
        part.contains("\nkvm-1234, process 1234: 530 exits"),
        "{part}"
    );
    assert!(!part.contains("kvm-1300") && !part.contains("gone:"));

    let folder = TempDir::new().unwrap();
    let [before, _] = two_snapshots(&folder);
    assert_eq!(
        error_of(&mut report(&["--vm", "7", "--input", text(&before)])),
        "exitmeter: no VM runs that is called '7' or belongs to process '7'; \
         those that run are kvm-1234, kvm-1300\n"
    );
    assert_eq!(
        error_of(&mut report(&["--vcpu", "2", "--input", text(&before)])),
        "exitmeter: no vCPU with the id 2 runs: vCPUs are counted from 0\n"
    );
}

#[test]
fn each_order_sorts_the_greatest_first() {
    let first = |sort: &str| {
        let text = output_of(&["--csv", "--sort", sort]);
        let line = text.lines().nth(1).unwrap();
        line.split(',').nth(8).unwrap().to_owned()
    };
    assert_eq!(first("cycles"), "EXTERNAL_INTERRUPT");
    assert_eq!(first("exits"), "EXTERNAL_INTERRUPT");
    assert_eq!(first("p99"), "HLT");
    let text = output_of(&["--csv", "--sort", "exits"]);
    let second = text.lines().nth(2).unwrap();
    assert!(second.contains(",MSR_WRITE,4765,"));
}

#[test]
fn csv_has_a_line_for_each_reason() {
    let text = output_of(&["--csv"]);
    let lines: Vec<Vec<_>> = text.lines().map(|line| line.split(',').collect()).collect();
    assert!(lines.iter().all(|line| line.len() == lines[0].len()));
    let column = |title| lines[0].iter().position(|field| *field == title).unwrap();
    // 9 reasons of one VM, 1 of the other, 3 of those that are gone.
    assert_eq!(lines.len(), 1 + 9 + 1 + 3);
    let hlt = lines.iter().find(|line| line[column("reason")] == "HLT");
    let hlt = hlt.unwrap();
    let fields = [
        "name",
        "pid",
        "code",
        "reason",
        "exits",
        "nested_exits",
        "kernel",
        "blocked",
        "max",
        "halted",
        "waiting",
        "polled",
    ];
    assert_eq!(
        fields.map(|title| hlt[column(title)]),
        [
            "kvm-1234",
            "1234",
            "12",
            "HLT",
            "710",
            "355",
            "2140000",
            "4890000000",
            "41000",
            "4890000000",
            "0",
            "1800000",
        ]
    );
    let rate: f64 = hlt[column("per_second")].parse().unwrap();
    assert!((rate - 710.0 / 24.999_167).abs() < 0.001);
    assert_eq!(lines[13][column("name")], "departed");
    assert_eq!(lines[13][column("vm")], "");
}

#[test]
fn two_snapshots_are_compared() {
    let folder = TempDir::new().unwrap();
    let [before, after] = two_snapshots(&folder);
    let (before, after) = (text(&before), text(&after));
    let text = succeeded(report(&["--diff", before, after]).output().unwrap());
    compare(&text, "report-diff.txt");

    let json = succeeded(
        report(&["--json", "--diff", before, after])
            .output()
            .unwrap(),
    );
    let report_of: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        report_of["interval"],
        serde_json::json!({"ticks": 2_400_000_000_u64, "seconds": 1.0})
    );
    assert_eq!(report_of["unmetered_vcpus"], 2);
    assert_eq!(report_of["vms"][0]["exits"], 1000);
    let vcpu = &report_of["vms"][0]["vcpus"][0];
    assert_eq!(vcpu["cycles"]["guest"], 2_400_000_000_u64);

    assert_eq!(
        error_of(&mut report(&["--diff", after, before])),
        format!("exitmeter: {before} is older than {after}: name the older one first\n")
    );
    let amd = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../src/meter/tests/snapshot-1.0-amd.bin"
    );
    assert_eq!(
        error_of(&mut report(&["--diff", amd, before])),
        format!(
            "exitmeter: the meter began anew between {amd} and {before}, or they are of two hosts: \
             compare two snapshots of one life of the meter, or report each alone with --input\n"
        )
    );
}

#[test]
fn intervals_go_on_until_nobody_reads() {
    let folder = TempDir::new().unwrap();
    let [before, after] = two_snapshots(&folder);
    let mut child = report(&["--json", "--interval", "0.02", "--input", text(&before)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut exits = || -> u64 {
        let line = lines.next().unwrap().unwrap();
        let report: serde_json::Value = serde_json::from_str(&line).unwrap();
        report["vms"][0]["exits"].as_u64().unwrap()
    };
    assert_eq!((exits(), exits()), (0, 0));
    fs::rename(after, before).unwrap();
    // A change is reported once.
    let told = (0..1000).find_map(|_| Some(exits()).filter(|exits| *exits != 0));
    assert_eq!((told, exits()), (Some(1000), 0));
    drop(lines);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
}

/// A new life is reported, and the next interval counts from there.
#[test]
fn intervals_go_on_when_the_meter_begins_anew() {
    // The module is loaded again; or its clock is set back, as an older module's was when the host
    // woke from sleep.
    let anew: [fn(&mut [u8]); 2] = [
        |bytes| add(bytes, LIFE, 1),
        |bytes| add(bytes, NOW, 1_u64.wrapping_neg()),
    ];
    for anew in anew {
        let folder = TempDir::new().unwrap();
        let [before, after] = two_snapshots(&folder);
        let mut child = report(&["--interval", "0.02", "--json", "--input", text(&before)])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut exits = || -> u64 {
            let line = lines.next().unwrap().unwrap();
            let report: serde_json::Value = serde_json::from_str(&line).unwrap();
            report["vms"][0]["exits"].as_u64().unwrap()
        };
        assert_eq!(exits(), 0);
        let mut other = SAVED.to_vec();
        anew(&mut other);
        let [new, later] = ["new", "later"].map(|name| folder.path().join(name));
        fs::write(&new, other).unwrap();
        fs::rename(new, &before).unwrap();
        let mut told = BufReader::new(child.stderr.take().unwrap()).lines();
        assert_eq!(
            told.next().unwrap().unwrap(),
            "exitmeter: the meter began anew; the next interval counts from here"
        );
        // 1000 more exits, in the new life.
        let mut bytes = fs::read(after).unwrap();
        anew(&mut bytes);
        fs::write(&later, bytes).unwrap();
        fs::rename(later, &before).unwrap();
        let found = (0..1000).find_map(|_| Some(exits()).filter(|exits| *exits != 0));
        assert_eq!(found, Some(1000));
        drop(lines);
        assert!(child.wait().unwrap().success());
        assert!(told.next().is_none());
    }
}

#[test]
fn the_count_ends_the_intervals() {
    let text = output_of(&["--json", "--interval", "0.01", "--count", "3"]);
    assert_eq!(text.lines().count(), 3);
    let output = report(&["--count", "3"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let output = report(&["--interval", "0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

/// Run it on a terminal of this width.
fn on_a_terminal(columns: u16, change: impl FnOnce(&mut Command) -> &mut Command) -> String {
    let folder = TempDir::new().unwrap();
    let [before, _] = two_snapshots(&folder);
    let size = Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let terminal = openpty(None, Some(&size)).unwrap();
    let mut command = report(&["--input", text(&before)]);
    change(command.env("TERM", "xterm").stdout(terminal.user));
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut bytes = Vec::new();
    // Linux returns EIO once the other side is closed.
    let _ = File::from(terminal.controller).read_to_end(&mut bytes);
    assert!(child.wait().unwrap().success());
    String::from_utf8(bytes).unwrap().replace('\r', "")
}

fn without_colors(text: &str) -> String {
    let mut pieces = text.split("\x1b[");
    let first = pieces.next().unwrap().to_owned();
    pieces.fold(first, |text, piece| text + piece.split_once('m').unwrap().1)
}

#[test]
fn colors_are_for_terminals() {
    let colored = on_a_terminal(80, |command| command);
    assert_eq!(without_colors(&colored), include_str!("report-80.txt"));
    assert!(
        colored.contains("\x1b[1mkvm-1234, process 1234"),
        "{colored}"
    );
    assert!(colored.contains("\x1b[34mguest\x1b[0m"));

    let plain = on_a_terminal(80, |command| command.env("NO_COLOR", "1"));
    assert_eq!(plain, include_str!("report-80.txt"));
    let plain = on_a_terminal(200, |command| command.arg("--color=never"));
    assert_eq!(plain, include_str!("report.txt"));
    let forced = output_of(&["--color=always"]);
    assert_ne!(forced, include_str!("report.txt"));
    assert_eq!(without_colors(&forced), include_str!("report.txt"));
}

#[test]
fn bars_are_ascii_where_utf8_is_not_known() {
    let folder = TempDir::new().unwrap();
    let [before, _] = two_snapshots(&folder);
    let set = [
        ("LC_ALL", "C"),
        ("LC_ALL", "de_DE.ISO-8859-1"),
        ("TERM", "dumb"),
    ];
    for (variable, value) in set {
        let mut command = report(&["--input", text(&before)]);
        let plain = succeeded(command.env(variable, value).output().unwrap());
        assert!(plain.is_ascii(), "{variable}={value}: {plain}");
        let whole = include_str!("report.txt");
        assert_eq!(plain.lines().count(), whole.lines().count());
        let longest = |text: &str, bar| text.lines().map(|line| line.matches(bar).count()).max();
        let [plain_bar, whole_bar] =
            [longest(&plain, '#'), longest(whole, '█')].map(Option::unwrap);
        assert!(
            plain_bar > 3 && plain_bar.abs_diff(whole_bar) <= 1,
            "{plain}"
        );
    }
}
