// SPDX-License-Identifier: GPL-2.0

//! `exitmeter record`, run on files that a command changes as the device would.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use exitmeter::recording::read::{Ending, Reader};
use rustix::process::{kill_process, Pid, Signal};
use tempfile::TempDir;

use self::ioctl::answer_details;

mod ioctl;

const SNAPSHOT: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.2.bin");
const OTHER: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.0.bin");

/// Create a folder with a file that stands for the device, and another snapshot.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("device"), SNAPSHOT).unwrap();
    fs::write(folder.path().join("other"), OTHER).unwrap();
    folder
}

/// Prepare `exitmeter record -o FILE`, each 10 ms, in a folder.
fn record(folder: &TempDir, arguments: &[&str]) -> Command {
    // A test may run where signals are ignored, as in the background of a script, and its children
    // inherit that.
    let mut command = Command::new("env");
    command.args(["--default-signal", env!("CARGO_BIN_EXE_exitmeter")]);
    let file = ["record", "-o", "file.rec", "--input", "device"];
    command
        .current_dir(folder)
        .args(file)
        .args(["--interval", "10"]);
    command.args(arguments);
    command
}

fn file(folder: &TempDir) -> PathBuf {
    folder.path().join("file.rec")
}

/// Return the snapshots of a recording, and its ending.
fn read(file: &Path) -> (Vec<Vec<u8>>, Option<Ending>) {
    let bytes = fs::read(file).unwrap();
    let mut reader = Reader::new(&bytes).unwrap();
    let mut snapshots = Vec::new();
    while let Some(taken) = reader.next_snapshot() {
        snapshots.push(taken.snapshot.to_vec());
    }
    (snapshots, reader.ending().cloned())
}

fn words(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_command_is_recorded_from_before_it_starts_until_it_has_ended() {
    let folder = folder();
    // The command makes its change as the last thing.
    let begun = Instant::now();
    let change = "sleep 0.1; echo out; mv other device; exit 3";
    let output = record(&folder, &["--", "sh", "-c", change])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stdout, b"out\n");
    let (snapshots, ending) = read(&file(&folder));
    assert_eq!(
        ending,
        Some(Ending::Complete(
            "the command ended with status 3".to_owned()
        ))
    );
    // A busy machine takes fewer snapshots; no machine takes more than there was time for.
    let most = begun.elapsed().as_millis() / 10 + 3;
    let count = snapshots.len();
    assert!(
        count >= 3 && count as u128 <= most,
        "{count} snapshots, {most} at most"
    );
    assert_eq!(
        (&snapshots[0][..], &snapshots.last().unwrap()[..]),
        (SNAPSHOT, OTHER)
    );
    let told = words(&output);
    let told = told.strip_prefix(&format!("exitmeter: {} snapshots in 0.", snapshots.len()));
    // The other snapshot is of another life.
    let words = " kB in file.rec; the meter began anew once meanwhile\n";
    assert!(told.unwrap().ends_with(words), "{told:?}");

    let bytes = fs::read(file(&folder)).unwrap();
    let reader = Reader::new(&bytes).unwrap();
    assert_eq!(reader.header.interval, Duration::from_millis(10));
    let about: Vec<_> = reader.about().collect();
    assert!(
        about.contains(&("command", &format!("sh -c {change}"))),
        "{about:?}"
    );
    assert!(about.contains(&("tool", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn one_life_of_the_meter_is_not_mentioned() {
    let folder = folder();
    let output = record(&folder, &["--", "true"]).output().unwrap();
    let told = words(&output);
    assert!(
        told.ends_with(" kB in file.rec\n") || told.ends_with(" B in file.rec\n"),
        "{told}"
    );
}

#[test]
fn the_exit_status_is_the_commands() {
    let folder = folder();
    let status = |arguments: &[&str]| {
        let output = record(&folder, arguments).output().unwrap();
        (output.status.code().unwrap(), words(&output))
    };
    assert_eq!(status(&["-q", "--", "true"]), (0, String::new()));
    assert_eq!(
        status(&["-q", "--", "sh", "-c", "kill -KILL $$"]),
        (128 + 9, String::new())
    );
    let (code, text) = status(&["--", "/nowhere/at-all"]);
    let words = "exitmeter: cannot run /nowhere/at-all: No such file or directory (os error 2)\n";
    assert_eq!((code, text.as_str()), (127, words));
    let (code, text) = status(&["--", "/etc/passwd"]);
    assert_eq!(code, 126);
    assert!(
        text.contains("cannot run /etc/passwd: Permission denied"),
        "{text}"
    );
    // The command runs to its end although the device goes meanwhile.
    let (code, text) = status(&["--", "sh", "-c", "rm device; sleep 0.2; touch ended"]);
    let words = "exitmeter: cannot read device: No such file or directory (os error 2)\n";
    assert_eq!((code, text.as_str()), (125, words));
    assert!(folder.path().join("ended").exists());
    assert_eq!(read(&file(&folder)).1, Some(Ending::Cut));
    // With nothing to record, the command does not run.
    assert_eq!(status(&["--", "touch", "run"]).0, 125);
    assert!(!folder.path().join("run").exists());
    let (code, _) = status(&[]);
    assert_eq!(code, 1);
}

#[test]
fn details_are_turned_on_for_as_long_as_it_records() {
    let folder = folder();
    // Without the right to details, nothing is run, and the file keeps its contents.
    fs::write(file(&folder), "kept").unwrap();
    for (errno, told) in [
        (
            1,
            "exitmeter: no right to turn details on: run this as root, or with CAP_PERFMON; with the \
             module's parameter details=1 they are always on\n",
        ),
        (
            25,
            "exitmeter: device has no details: the module that is loaded is older than this tool, \
             or this is not its device\n",
        ),
    ] {
        let mut command = record(&folder, &["--why", "--", "touch", "run"]);
        answer_details(&mut command, errno);
        let output = command.output().unwrap();
        assert_eq!(
            (output.status.code(), words(&output).as_str()),
            (Some(125), told)
        );
    }
    assert!(!folder.path().join("run").exists());
    assert_eq!(fs::read(file(&folder)).unwrap(), b"kept");
    // The file is opened once, and read anew each time.
    let change = "sleep 0.1; cat other >device; sleep 0.1; rm device";
    let mut command = record(&folder, &["-q", "--why", "--", "sh", "-c", change]);
    answer_details(&mut command, 0);
    let output = command.output().unwrap();
    assert_eq!(
        (output.status.code(), words(&output).as_str()),
        (Some(0), "")
    );
    let (snapshots, _) = read(&file(&folder));
    assert_eq!(
        (&snapshots[0][..], &snapshots.last().unwrap()[..]),
        (SNAPSHOT, OTHER)
    );
}

#[test]
fn other_files_are_not_recorded() {
    let folder = folder();
    fs::write(folder.path().join("device"), "words").unwrap();
    let output = record(&folder, &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        words(&output),
        "exitmeter: device: this is not a snapshot of exitmeter\n"
    );
    assert!(!file(&folder).exists());
}

#[test]
fn an_unwritable_file_is_an_error() {
    let folder = folder();
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitmeter"));
    let arguments = ["record", "--input", "device", "-o", "/dev/full"];
    let output = command
        .current_dir(&folder)
        .args(arguments)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = "exitmeter: cannot write /dev/full: No space left on device (os error 28)\n";
    assert_eq!(words(&output), told);
}

/// Wait until a recording has so many bytes.
fn wait_for(file: &Path, bytes: u64) {
    let begun = Instant::now();
    while fs::metadata(file).map_or(0, |file| file.len()) < bytes {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "nothing is recorded"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_signal_ends_a_recording_without_a_command() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let folder = folder();
        let child = record(&folder, &["-q"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for(&file(&folder), 1500);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            (output.status.code(), words(&output).as_str()),
            (Some(0), "")
        );
        let (snapshots, ending) = read(&file(&folder));
        let how = format!("stopped by signal {}", signal.as_raw());
        assert_eq!(ending, Some(Ending::Complete(how)));
        assert!(snapshots.len() > 1 && snapshots.iter().all(|snapshot| snapshot == SNAPSHOT));
    }
}

#[test]
fn signals_are_passed_on_to_the_command() {
    let folder = folder();
    let trap = "trap 'echo obeyed; exit 5' TERM; while :; do sleep 0.02; done";
    let mut command = record(&folder, &["-q", "--", "sh", "-c", trap]);
    let child = command.stdout(Stdio::piped()).spawn().unwrap();
    wait_for(&file(&folder), 1500);
    // The first signal is Ctrl-C, which the command would also get from the terminal.
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(5), &b"obeyed\n"[..])
    );
    let (_, ending) = read(&file(&folder));
    assert_eq!(
        ending,
        Some(Ending::Complete(
            "the command ended with status 5".to_owned()
        ))
    );
}

#[test]
fn after_nohup_a_hangup_is_ignored() {
    let folder = folder();
    let mut command = Command::new("sh");
    let words = format!(
        "trap '' HUP; exec {} record -q -o file.rec --input device -i 10 -- sh -c 'kill -HUP $PPID; sleep 0.1'",
        env!("CARGO_BIN_EXE_exitmeter")
    );
    let status = command
        .current_dir(&folder)
        .args(["-c", &words])
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    let (_, ending) = read(&file(&folder));
    let how = "the command ended with status 0".to_owned();
    assert_eq!(ending, Some(Ending::Complete(how)));
}

#[test]
fn a_recording_that_was_killed_reads_up_to_its_last_snapshot() {
    let folder = folder();
    let mut child = record(&folder, &["-q"]).spawn().unwrap();
    wait_for(&file(&folder), 2000);
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    let (snapshots, ending) = read(&file(&folder));
    assert_eq!(ending, Some(Ending::Cut));
    assert!(snapshots.len() > 2);
}

#[test]
fn the_help_has_examples_and_statuses() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitmeter"));
    let output = command.args(["record", "--help"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Examples:\n  exitmeter record ") && text.contains("Exit status:"));
    for wrong in [&["-i", "0", "-o", "x"][..], &["-o"], &[]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exitmeter"));
        let output = command.arg("record").args(wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
    }
}
