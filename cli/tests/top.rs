// SPDX-License-Identifier: GPL-2.0

//! `exitmeter top` on a pseudo-terminal whose other end is read by a terminal emulator. It shows a
//! snapshot in a file that the tests rewrite, as the device would.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    os::unix::{fs::FileExt as _, process::ExitStatusExt as _},
    path::PathBuf,
    process::{Command, Stdio},
};

use exitmeter::top::screen::Screen;
use rustix::process::Signal;
use tempfile::TempDir;

use self::{ioctl::answer_details, terminal::Terminal};

mod ioctl;
mod terminal;

const SNAPSHOT: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.2.bin");
const RECORDING: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recordings/amd-work.rec");

/// Recording with details.
const WHY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recordings/amd-why.rec");

/// Ticks of an exit in the phases guest, kernel, user and halted.
const CYCLES: [u64; 4] = [700_000, 150_000, 250_000, 350_000];

/// Snapshot of the same VM with tables.
const TABLES: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.3.bin");

/// A file that stands for the device. In each second of its TSC, the first reason of the first vCPU
/// has 1500 exits, which take 90% of the second. For the rest of it, and in the other vCPUs, the
/// phase of before continues.
struct Device {
    folder: TempDir,
    snapshot: Vec<u8>,
    /// Offset of the row of that reason.
    row: usize,
    /// Offsets of the entries of tables that count these exits.
    entries: Vec<usize>,
    seconds: u64,
    /// Number that changes the meter's life.
    lives: u8,
}

impl Device {
    fn new() -> Self {
        Self::of(SNAPSHOT.to_vec())
    }

    fn of(snapshot: Vec<u8>) -> Self {
        let folder = TempDir::new().unwrap();
        let device = Self {
            folder,
            row: number(&snapshot, 88) + 112,
            snapshot,
            entries: Vec::new(),
            seconds: 0,
            lives: 0,
        };
        device.write();
        device
    }

    /// Create one with details on. Its exits are MSR_WRITEs of the first vCPU: of one of the three
    /// MSRs that it has written, and from one place.
    fn with_tables() -> Self {
        let mut device = Self::of(TABLES.to_vec());
        let bytes = &mut device.snapshot;
        let row_size = number(bytes, 112) & 0xffff_ffff;
        let is_write = |bytes: &[u8], at: usize| number(bytes, at) >> 32 == 32;
        while !is_write(bytes, device.row) {
            device.row += row_size;
        }
        // Find the sections of details and of code in the first record.
        let mut section = number(bytes, 144) + 32;
        for (table, msrs) in [(1, &[0x6e0, 0x830, 0x4000_0070][..]), (2, &[])] {
            assert_eq!(number(bytes, section) & 0xffff_ffff, table);
            let (size, count) = (number(bytes, section + 8), number(bytes, section + 8) >> 32);
            let entries = (0..count).map(|entry| section + 16 + entry * (size & 0xffff_ffff));
            let entries: Vec<_> = entries.filter(|at| is_write(bytes, *at)).collect();
            device.entries.push(entries[0]);
            if msrs.is_empty() {
                // This vCPU has no code addresses: all exits are others, and get an address here.
                assert_eq!((entries.len(), bytes[entries[0] + 9] & 2), (1, 2));
                bytes[entries[0] + 9] = 0;
                let rip = 0xffff_ffff_8100_0000_u64.to_le_bytes();
                bytes[entries[0] + 16..entries[0] + 24].copy_from_slice(&rip);
            }
            for (entry, msr) in entries.iter().zip(msrs) {
                let key: u64 = msr | 1 << 32;
                bytes[entry + 16..entry + 24].copy_from_slice(&key.to_le_bytes());
            }
            section += number(bytes, section) >> 32;
        }
        device.write();
        device
    }

    /// Prepare the tool for this file as a device whose details can be turned on, or fail with an
    /// error.
    fn top_with(&self, errno: u32) -> Command {
        let mut command = self.top();
        answer_details(&mut command, errno);
        command
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("device")
    }

    fn second(&mut self) {
        self.seconds += 1;
        self.write();
    }

    /// Write the file atomically, so that nobody reads a half.
    fn write(&self) {
        let mut bytes = self.snapshot.clone();
        let (records, row) = (number(&bytes, 88), self.row);
        let exits = 1500 * self.seconds;
        let khz = (number(&bytes, 48) & 0xffff_ffff) as u64;
        let phases = [16, 24, 32, 584].into_iter().zip(CYCLES);
        let phases = phases.map(|(at, cycles)| (row + at, exits * cycles));
        let grown = [
            (40, self.seconds * khz * 1000),
            (records + 32, exits * CYCLES.iter().sum::<u64>()),
            (row + 8, exits),
        ];
        let tables = self.entries.iter();
        let tables = tables.flat_map(|at| [(at + 24, exits), (at + 32, exits * CYCLES[1])]);
        let grown = grown.into_iter().chain(phases).chain(tables);
        for (at, more) in grown {
            let sum = number(&bytes, at) as u64 + more;
            bytes[at..at + 8].copy_from_slice(&sum.to_le_bytes());
        }
        bytes[120] ^= self.lives;
        if self.entries.is_empty() {
            let new = self.folder.path().join("new");
            fs::write(&new, bytes).unwrap();
            fs::rename(new, self.path()).unwrap();
            return;
        }
        // With details on, the tool keeps the file open. A half that it reads is corrected by the
        // next reading.
        let file = fs::File::options().write(true).open(self.path());
        file.unwrap().write_all_at(&bytes, 0).unwrap();
    }

    fn top(&self) -> Command {
        let mut command = top();
        command
            .args(["--interval", "20", "--input"])
            .arg(self.path());
        command
    }
}

/// Return the number at an offset.
fn number(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

fn top() -> Command {
    // A test may run where signals are ignored, as in the background of a script, and its children
    // inherit that.
    let mut command = Command::new("env");
    command.args(["--default-signal", env!("CARGO_BIN_EXE_exitmeter")]);
    command
        .arg("top")
        .env("TERM", "xterm-256color")
        .env("LC_ALL", "C.UTF-8")
        .env_remove("NO_COLOR");
    command
}

/// Return a saved screen, which was checked by eye.
fn saved(name: &str) -> String {
    let path = format!("{}/tests/screens/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(path).unwrap_or_default()
}

/// Wait until a screen is equal to a saved one.
fn compare(terminal: &mut Terminal, name: &str) {
    if std::env::var_os("EXITMETER_SAVE").is_some() {
        terminal.settle();
        let path = format!("{}/tests/screens/{name}.txt", env!("CARGO_MANIFEST_DIR"));
        fs::write(path, terminal.text()).unwrap();
    }
    let saved = saved(name);
    terminal.wait(name, |terminal| terminal.text() == saved);
}

#[test]
fn screens_of_80_by_24_match_the_saved_ones() {
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
fn screens_of_160_by_50_match_the_saved_ones() {
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
fn the_screen_follows_the_size_of_the_terminal() {
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
fn keys_sort_filter_select_pause_and_go_back() {
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
    // The selected line stays selected in any order.
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
    // Paused: changes are not shown.
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
fn a_reason_opens_to_its_details_and_these_to_code() {
    let mut device = Device::with_tables();
    let symbols = device.folder.path().join("kallsyms");
    fs::write(&symbols, "ffffffff81000000 T native_write_msr\n").unwrap();
    let mut command = device.top_with(0);
    command.args(["--vm", "1234", "--symbols"]).arg(symbols);
    let mut terminal = Terminal::new(80, 24, command);
    terminal.wait_for("most kernel cycles first");
    device.second();
    terminal.wait_for("1.50k exits/s");
    terminal.wait_for("Enter details");
    terminal.keys("\r");
    terminal.wait_for("detail of MSR_WRITE");
    terminal.settle();
    device.second();
    terminal.wait_for("1 detail of MSR_WRITE, most kernel cycles first");
    compare(&mut terminal, "details-80x24");
    terminal.keys("\r");
    terminal.wait_for("1 place in the code of MSR_WRITE");
    compare(&mut terminal, "code-80x24");
    terminal.keys("\t");
    terminal.wait_for("none of the running vCPUs had such an exit to user space");
    terminal.keys("\t");
    // Since details are on, there are those of the other vCPU, too.
    terminal.keys("t");
    terminal.wait_for("6 details of MSR_WRITE, most kernel cycles first");
    terminal.wait_for("since details are on");
    terminal.wait_selected("write 0x6e0 IA32_TSC_DEADLINE");
    terminal.keys("/icr");
    terminal.wait_for("1 detail of MSR_WRITE, most kernel cycles first, with \"icr\"");
    terminal.wait_selected("write 0x830 X2APIC_ICR");
    terminal.keys("\x1b");
    terminal.wait_for("6 details");
    terminal.keys("s");
    terminal.wait_for("6 details of MSR_WRITE, most exits first");
    // Even on a narrow screen, the subject and the rate are shown.
    terminal.resize(30, 12);
    terminal.wait_for("write 0x6e0 IA32_TSC_");
    for (columns, rows) in [(20, 5), (4, 2), (2, 1)] {
        terminal.resize(columns, rows);
        terminal.settle();
    }
    terminal.resize(80, 24);
    // A key that comes together with the new size waits in crossterm for the next one.
    terminal.wait_for("6 details of MSR_WRITE, most exits first");
    // All the way back, to the line that was entered.
    terminal.keys("\r");
    terminal.wait_for("places in the code of MSR_WRITE");
    terminal.wait_for("native_write_msr+0x0");
    terminal.keys("\x1b");
    terminal.wait_for("6 details");
    terminal.keys("\x7f");
    terminal.wait_for(" reasons, most kernel cycles first");
    terminal.wait_selected("MSR_WRITE");
    // Only of one vCPU.
    terminal.keys("\tj\r");
    terminal.wait_for("process 1234, vCPU 1");
    terminal.keys("/msr_w\r\r");
    terminal.wait_for("3 details of MSR_WRITE");
    terminal.keys("q");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn a_reason_without_details_has_its_code() {
    let mut device = Device::with_tables();
    let mut terminal = Terminal::new(80, 24, device.top_with(0));
    terminal.wait_for("most exits first");
    terminal.keys("/1234\r\r/external\r\r");
    terminal.wait_for("1 detail of EXTERNAL_INTERRUPT");
    terminal.wait_selected("(no details)");
    terminal.keys("\r");
    terminal.wait_for("of EXTERNAL_INTERRUPT");
    // An interval without an exit of this reason.
    device.second();
    terminal.wait_for("none of the running vCPUs had such an exit");
}

#[test]
fn refused_details_are_explained() {
    // 1: EPERM.
    for (command, words) in [
        (
            Device::top_with as fn(&Device, u32) -> Command,
            "no details: this needs CAP_PERFMON: run this as root, or load the module with\ndetails=1\n",
        ),
        (
            |device: &Device, _| device.top(),
            "no details: the snapshot has none: 'exitmeter why -- CMD' turns them on\n",
        ),
    ] {
        let mut device = Device::new();
        let mut terminal = Terminal::new(80, 24, command(&device, 1));
        terminal.wait_for("most exits first");
        terminal.keys("\r\r");
        terminal.wait_for("0 details of ");
        terminal.wait_for(words);
        device.second();
        terminal.wait_for("1.50k exits/s");
        terminal.keys("\x1b");
        terminal.wait_for("1 reason, most kernel cycles first");
    }
    let mut command = top();
    command.args(["--input", RECORDING, "--vm", "97", "--interval", "1000"]);
    let mut terminal = Terminal::new(60, 20, command);
    terminal.wait_for("kvm-97, process 97");
    terminal.keys("t");
    terminal.wait_selected("MSR");
    terminal.keys("\r");
    terminal.wait_for("no details: the recording has none here: 'exitmeter record\n--why' records");
    // Symbols are of one guest, so they need its name.
    let output = top().args(["--symbols", "x"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_recording_with_details_has_them() {
    let mut command = top();
    command.args(["--input", WHY, "--interval", "1000"]);
    let mut terminal = Terminal::new(80, 24, command);
    terminal.wait_for("exitmeter all VMs");
    terminal.keys("t\t");
    terminal.wait_for("IOIO");
    terminal.keys("/ioio\r\rs");
    terminal.wait_for("details of IOIO, most exits first");
    // The guest has just begun to boot.
    terminal.wait_for("OUT 0xcf8 PCI config address");
    terminal.keys("p\r");
    // The firmware, which runs in the lower half.
    terminal.wait_for("(user)");
    terminal.keys("\t");
    terminal.wait_for("KVM_EXIT_IO");
}

#[test]
fn the_terminal_is_restored_at_each_end() {
    let device = Device::new();
    for keys in ["q", "\x03", "/\x03", "?xq"] {
        let mut terminal = Terminal::new(80, 24, device.top());
        terminal.wait_for("most exits first");
        assert!(terminal.is_alternate_screen());
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
fn the_terminal_is_restored_after_a_panic() {
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
    assert!(terminal.was_on_alternate_screen());
    terminal.assert_restored("on purpose");
}

/// Program of the test above.
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
    assert!(terminal.is_alternate_screen());
    terminal.keys("q");
    assert_eq!(terminal.end().code(), Some(0));
    terminal.assert_restored("");
}

#[test]
fn a_dumb_terminal_is_refused() {
    let device = Device::new();
    let mut command = device.top();
    command.env("TERM", "dumb");
    let mut terminal = Terminal::new(80, 24, command);
    assert_eq!(terminal.end().code(), Some(1));
    assert!(!terminal.was_on_alternate_screen());
    let said = "a dumb terminal (TERM) cannot show this";
    terminal.assert_restored(said);
    assert!(terminal.text().contains("exitmeter report"));
}

#[test]
fn a_terminal_without_utf8_gets_ascii() {
    let mut device = Device::new();
    let mut command = device.top();
    command.env("LC_ALL", "C");
    let mut terminal = Terminal::new(160, 50, command);
    terminal.wait_for("since the module was loaded");
    device.second();
    terminal.wait_for("1.50k exits/s");
    terminal.settle();
    let text = terminal.text();
    assert!(text.is_ascii(), "{text}");
    assert!(text.contains("####"), "{text}");
    terminal.keys("?");
    terminal.wait_for("any key goes back");
    assert!(terminal.text().is_ascii());
}

#[test]
fn colors_can_be_turned_off() {
    let mut device = Device::new();
    for (name, value, colours) in [("NO_COLOR", "", true), ("NO_COLOR", "1", false)] {
        let mut command = device.top();
        command.env(name, value);
        let mut terminal = Terminal::new(80, 24, command);
        terminal.wait_for("most exits first");
        device.second();
        terminal.wait_for("1.50k exits/s");
        assert_eq!(terminal.has_colors(), colours, "{name}={value}");
    }
}

#[test]
fn a_device_may_go_and_come_back() {
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
fn a_new_life_of_the_meter_is_noted() {
    let mut device = Device::new();
    let mut terminal = Terminal::new(80, 24, device.top());
    terminal.wait_for("most exits first");
    device.second();
    terminal.wait_for("1.50k exits/s");
    // The module is loaded again, with a clock that began anew as well.
    (device.lives, device.seconds) = (1, 0);
    device.write();
    terminal.wait_for("most exits first  the meter began anew");
    terminal.wait_for("since the module was loaded");
    device.second();
    terminal.wait_for("1.50k exits/s");
    assert!(!terminal.text().contains("anew"));
}

#[test]
fn a_recording_is_shown_to_its_end() {
    let mut command = top();
    command.args(["--input", RECORDING, "--interval", "1000", "--vm", "97"]);
    let mut terminal = Terminal::new(80, 24, command);
    terminal.wait_for("kvm-97, process 97");
    // Faster than recorded: shorter intervals, each of the same part of the recording.
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
fn without_a_terminal_it_names_alternatives() {
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
        "exitmeter: standard input and output must be a terminal: use `exitmeter report --interval` \
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
