// SPDX-License-Identifier: GPL-2.0

//! `exitmeter top` on a terminal: a pseudo-terminal whose other end is read by a terminal
//! emulator. It shows a snapshot in a file that the tests write anew, as the device would.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod terminal;

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use exitmeter::top::screen::Screen;
use rustix::process::Signal;
use tempfile::TempDir;
use terminal::Terminal;

const SNAPSHOT: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.1.bin");
const RECORDING: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recordings/amd-work.rec");

/// What an exit takes in the phases: guest, kernel, user, blocked.
const CYCLES: [u64; 4] = [700_000, 150_000, 250_000, 350_000];

/// A file that stands for the device. Each second of its TSC the first reason of the first
/// vCPU has 1500 exits, which take 90% of it; for the rest, and in the other vCPUs, goes on
/// what went on before.
struct Device {
    folder: TempDir,
    seconds: u64,
}

impl Device {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let device = Self { folder, seconds: 0 };
        device.write();
        device
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("device")
    }

    fn second(&mut self) {
        self.seconds += 1;
        self.write();
    }

    /// Writes it at once, as nobody reads a half.
    fn write(&self) {
        let mut bytes = SNAPSHOT.to_vec();
        let number =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let records = usize::try_from(number(&bytes, 88)).unwrap();
        let row = records + 104;
        let exits = 1500 * self.seconds;
        let khz = number(&bytes, 48) & 0xffff_ffff;
        let phases = [16, 24, 32, 40].into_iter().zip(CYCLES);
        let phases = phases.map(|(at, cycles)| (row + at, exits * cycles));
        let grown = [
            (40, self.seconds * khz * 1000),
            (records + 32, exits * CYCLES.iter().sum::<u64>()),
            (row + 8, exits),
        ];
        let grown = grown.into_iter().chain(phases);
        for (at, more) in grown {
            let sum = number(&bytes, at) + more;
            bytes[at..at + 8].copy_from_slice(&sum.to_le_bytes());
        }
        let new = self.folder.path().join("new");
        fs::write(&new, bytes).unwrap();
        fs::rename(new, self.path()).unwrap();
    }

    fn top(&self) -> Command {
        let mut command = top();
        command
            .args(["--interval", "20", "--input"])
            .arg(self.path());
        command
    }
}

fn top() -> Command {
    // A test may run where signals are ignored, as in the background of a script, and what runs
    // there leaves them so.
    let mut command = Command::new("env");
    command.args(["--default-signal", env!("CARGO_BIN_EXE_exitmeter")]);
    command
        .arg("top")
        .env("TERM", "xterm-256color")
        .env_remove("NO_COLOR");
    command
}

/// A screen as it was when it was looked at and found right.
fn saved(name: &str) -> String {
    let path = format!("{}/tests/screens/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(path).unwrap_or_default()
}

/// Waits until a screen is as a saved one.
fn compare(terminal: &mut Terminal, name: &str) {
    let saved = saved(name);
    terminal.wait(name, |terminal| terminal.text() == saved);
}

#[test]
fn the_whole_screen_at_80_by_24() {
    let mut device = Device::new();
    let mut terminal = Terminal::new(80, 24, device.top());
    terminal.wait_for("since the module was loaded");
    device.second();
    terminal.wait_for("1.50k exits/s");
    compare(&mut terminal, "vms-80x24");
    terminal.keys("\r");
    terminal.wait_for("kvm-1234, process 1234");
    compare(&mut terminal, "reasons-80x24");
    terminal.keys("\t");
    terminal.wait_for("2 vCPUs, by number");
    compare(&mut terminal, "vcpus-80x24");
    terminal.keys("?");
    terminal.wait_for("any key goes back");
    compare(&mut terminal, "help-80x24");
}

#[test]
fn the_whole_screen_at_160_by_50() {
    let mut device = Device::new();
    let mut terminal = Terminal::new(160, 50, device.top());
    terminal.wait_for("since the module was loaded");
    for second in 1..=3 {
        device.second();
        terminal.wait_for(&format!("{}\n", "█".repeat(second)));
        terminal.wait_for("1.50k exits/s");
        terminal.settle();
    }
    compare(&mut terminal, "vms-160x50");
    terminal.keys("\r");
    terminal.wait_for("kvm-1234, process 1234");
    compare(&mut terminal, "reasons-160x50");
}

#[test]
fn a_terminal_that_changes_its_size() {
    let mut device = Device::new();
    let mut terminal = Terminal::new(160, 50, device.top());
    terminal.wait_for("since the module was loaded");
    device.second();
    terminal.wait_for("1.50k exits/s");
    terminal.resize(80, 24);
    terminal.settle();
    compare(&mut terminal, "vms-80x24");
    // So small that nothing fits: nothing breaks.
    for (columns, rows) in [(20, 5), (4, 2), (2, 1)] {
        terminal.resize(columns, rows);
        terminal.settle();
    }
    terminal.resize(80, 24);
    terminal.settle();
    compare(&mut terminal, "vms-80x24");
}

#[test]
fn keys() {
    let mut device = Device::new();
    let mut terminal = Terminal::new(80, 24, device.top());
    terminal.wait_for("most exits first");
    terminal.keys("s");
    terminal.wait_for("most kernel cycles first");
    terminal.keys("ss");
    terminal.wait_for("most exits first");
    // A filter, dropped and kept.
    terminal.keys("\r/io_");
    terminal.wait_for("1 reason, most kernel cycles first, with \"io_\"");
    terminal.wait_for("/io__   Enter keeps this filter");
    terminal.keys("\x1b");
    terminal.wait_for(" reasons, most kernel cycles first\n");
    terminal.keys("/zzz\r");
    terminal.wait_for("no line has that text; Esc drops the filter");
    terminal.keys("\x7f");
    terminal.wait_for(" reasons, most kernel cycles first\n");
    // The line that is selected stays so, in whatever order.
    terminal.keys("j");
    let selected = terminal.wait_selected("MSR_WRITE");
    terminal.keys("s");
    terminal.wait_for("most exits first");
    assert_eq!(
        terminal.wait_selected("MSR_WRITE").split(' ').next(),
        selected.split(' ').next()
    );
    terminal.keys("G");
    terminal.wait_selected("(other codes)");
    terminal.keys("g");
    terminal.wait_selected("EXTERNAL_INTERRUPT");
    // Paused: what happens is not shown.
    terminal.keys("p");
    terminal.wait_for("paused");
    device.second();
    terminal.settle();
    terminal.wait_for("since it began");
    terminal.keys(" ");
    terminal.wait_for("in the last 1.0 s");
    terminal.wait_for("1.50k exits/s");
    terminal.keys("t");
    terminal.wait_for("since it began");
    terminal.keys("t");
    // To a vCPU, and all the way back.
    terminal.keys("\tj\r");
    terminal.wait_for("process 1234, vCPU 1");
    terminal.wait_for("no exits");
    terminal.keys("\x1b");
    terminal.wait_for("2 vCPUs, by number");
    terminal.wait_selected("vCPU 1");
    terminal.keys("\x1b");
    terminal.wait_for("exitmeter all VMs");
    terminal.wait_selected("kvm-1234");
    terminal.keys("q");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn the_terminal_is_as_it_was_however_it_ends() {
    let device = Device::new();
    for keys in ["q", "\x03", "/\x03", "?xq"] {
        let mut terminal = Terminal::new(80, 24, device.top());
        terminal.wait_for("most exits first");
        assert!(terminal.is_other_screen());
        terminal.keys(keys);
        assert_eq!(terminal.end().code(), Some(0), "{keys:?}");
        terminal.assert_restored("");
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let mut terminal = Terminal::new(80, 24, device.top());
        terminal.wait_for("most exits first");
        terminal.signal(signal);
        assert_eq!(terminal.end().signal(), Some(signal.as_raw()));
        terminal.assert_restored("");
    }
}

#[test]
fn the_terminal_is_as_it_was_after_a_panic() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "panics_on_the_other_screen",
        "--ignored",
        "--nocapture",
    ]);
    command.env("RUST_BACKTRACE", "0");
    let mut terminal = Terminal::new(80, 24, command);
    assert!(!terminal.end().success());
    assert!(terminal.was_on_other_screen());
    terminal.assert_restored("on purpose");
}

/// What the test above runs.
#[test]
#[ignore = "it panics on purpose, for another test"]
fn panics_on_the_other_screen() {
    let _screen = Screen::enter().unwrap();
    panic!("on purpose");
}

#[test]
fn control_z_stops_it_and_it_goes_on() {
    let mut device = Device::new();
    let mut terminal = Terminal::new(80, 24, device.top());
    terminal.wait_for("most exits first");
    terminal.keys("\x1a");
    terminal.wait_stopped();
    terminal.assert_restored("");
    device.second();
    terminal.signal(Signal::CONT);
    terminal.wait_for("1.50k exits/s");
    assert!(terminal.is_other_screen());
    terminal.keys("q");
    assert_eq!(terminal.end().code(), Some(0));
    terminal.assert_restored("");
}

#[test]
fn colours_only_where_they_are_welcome() {
    let mut device = Device::new();
    for (name, value, colours) in [
        ("NO_COLOR", "", true),
        ("NO_COLOR", "1", false),
        ("TERM", "dumb", false),
    ] {
        let mut command = device.top();
        command.env(name, value);
        let mut terminal = Terminal::new(80, 24, command);
        terminal.wait_for("most exits first");
        device.second();
        terminal.wait_for("1.50k exits/s");
        assert_eq!(terminal.has_colours(), colours, "{name}={value}");
    }
}

#[test]
fn a_device_that_goes_and_comes_back() {
    let mut device = Device::new();
    let mut terminal = Terminal::new(80, 24, device.top());
    terminal.wait_for("most exits first");
    fs::rename(device.path(), device.folder.path().join("away")).unwrap();
    terminal.wait_for("cannot read ");
    device.second();
    terminal.wait_for("1.50k exits/s");
    assert!(!terminal.text().contains("cannot read"));
}

#[test]
fn a_recording_is_shown_to_its_end() {
    let mut command = top();
    command.args(["--input", RECORDING, "--interval", "1000", "--vm", "97"]);
    let mut terminal = Terminal::new(80, 24, command);
    terminal.wait_for("kvm-97, process 97");
    // Faster than it was: readings come at shorter times, each of as much of the recording.
    terminal.keys("--");
    terminal.wait_for("in the last 2");
    terminal.keys("+");
    terminal.wait_for("in the last 5");
    terminal.keys("--");
    terminal.wait_for("the recording ends here");
    terminal.keys("t");
    terminal.wait_for("MSR");
    terminal.keys("q");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn without_a_terminal_it_says_what_to_use_instead() {
    let device = Device::new();
    let run = |command: &mut Command| {
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.stdout.is_empty());
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (status, text) = run(&mut device.top());
    assert_eq!(status, Some(1));
    assert_eq!(
        text,
        "exitmeter: this is no terminal that could show it: use `exitmeter report --interval` \
         for a log, or `exitmeter record` for a file\n"
    );
    let (status, text) = run(top().args(["--input", "/nowhere"]));
    assert_eq!(status, Some(1));
    assert_eq!(
        text,
        "exitmeter: cannot read /nowhere: No such file or directory (os error 2)\n"
    );
    let (status, text) = run(device.top().args(["--vm", "other"]));
    assert_eq!(status, Some(1));
    assert!(
        text.starts_with("exitmeter: no VM runs that is called 'other'"),
        "{text}"
    );
    assert_eq!(run(top().args(["--interval", "1"])).0, Some(2));
    let output = top().arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Examples:\n  exitmeter top") && text.contains("Exit status:"));
}
