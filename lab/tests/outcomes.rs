// SPDX-License-Identifier: GPL-2.0

//! Tests of every outcome of a run, on real emulated hosts:
//! `cargo test -p lab --test outcomes -- --ignored --test-threads 2`. Add `--skip kernel_finds` to leave out the debug
//! kernels, which have to be built first.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use lab::{
    module,
    setup::{self, SetupOptions},
};
use rustix::process::{kill_process, Pid, Signal};

/// Return the command of a run on the AMD host, which boots fastest.
fn lab(arguments: &[&str]) -> Command {
    lab_on("amd", arguments)
}

fn lab_on(host: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
    command
        .args(["run", "--host", host, "--no-module"])
        .args(arguments);
    command
}

#[track_caller]
fn assert_ends_with(arguments: &[&str], status: i32) -> Output {
    let output = lab(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
    output
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Return the folder that the last line of a run names.
fn folder(output: &Output) -> PathBuf {
    let text = stderr(output);
    let (_, folder) = text.trim_end().rsplit_once("the logs are in ").unwrap();
    folder.into()
}

/// Path of the module that makes a fault on request, built for the default kernel of the hosts.
static FAULT: LazyLock<String> = LazyLock::new(|| fault_for(None));

fn fault_for(kernel: Option<&str>) -> String {
    let prepared = setup::prepare(&SetupOptions {
        kernel: kernel.map(str::to_owned),
        tree: true,
        ..SetupOptions::default()
    })
    .unwrap();
    let name = format!("fault-{}", prepared.release);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    for name in ["Kbuild", "fault.c"] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fault")
            .join(name);
        fs::copy(source, folder.join(name)).unwrap();
    }
    let output = setup::in_root(&prepared.root)
        .bind(&folder, "/src")
        .bind(prepared.tree.as_deref().unwrap(), "/tree")
        .command("make")
        .args(["-C", "/tree", "M=/src", "modules"])
        .arg(format!("CC={}", module::compiler(&prepared).unwrap()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    folder.join("fault.ko").to_str().unwrap().to_owned()
}

/// Return the part of a log that a failed run shows, without the script's standard error before it and the verdict
/// after it.
#[track_caller]
fn shown(output: &Output, log: &str) -> String {
    let said = stderr(output);
    let (_, shown) = said
        .split_once(&format!("--- the end of {log}:\n"))
        .unwrap_or_else(|| panic!("it shows no {log}: {said}"));
    let (shown, _) = shown.rsplit_once("lab: ").unwrap();
    shown.to_owned()
}

/// Check that a fault of this kind ends a run with this status, and that the run shows these words of it.
#[track_caller]
fn fault_ends_with(kind: &str, status: i32, words: &str) -> Output {
    let kind = format!("kind={kind}");
    // The script would go on, and end well, if it could.
    let output = assert_ends_with(
        &[
            "--no-kvm",
            "--file",
            &FAULT,
            "--",
            "sh",
            "-c",
            "insmod fault.ko $0; sleep 5",
            &kind,
        ],
        status,
    );
    // The last lines alone may begin after the place of the fault.
    let console = folder(&output).join("console.log");
    let text = String::from_utf8_lossy(&fs::read(console).unwrap()).into_owned();
    assert!(
        text.contains("fault_init") || text.contains("fault:"),
        "{text}"
    );
    let shown = shown(&output, "console.log");
    assert!(shown.contains(words), "no {words} in {shown}");
    output
}

#[test]
#[ignore = "boots a host"]
fn a_run_has_the_scripts_status_and_its_standard_output() {
    let script = Path::new(env!("CARGO_TARGET_TMPDIR")).join("script");
    fs::write(
        &script,
        "echo out $1; echo err >&2; mkdir -p $OUT/a; echo kept >$OUT/a/file; echo logged >/dev/kmsg; exit 7\n",
    )
    .unwrap();
    let output = assert_ends_with(&["--", script.to_str().unwrap(), "first"], 7);
    assert_eq!(output.stdout, b"out first\n");
    assert!(stderr(&output).contains("err\n"));
    let folder = folder(&output);
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    assert_eq!(read("out/a/file"), "kept\n");
    assert!(read("kernel.log").contains("Linux version"));
    assert!(read("kernel.log").contains("logged"));
    assert_eq!(read("stdout.log"), "out first\n");
}

#[test]
#[ignore = "boots a host"]
fn two_runs_can_go_side_by_side() {
    let runs = ["one", "two"].map(|word| {
        let run = lab(&["--", "echo", word])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        (word, run.unwrap())
    });
    for (word, run) in runs {
        let output = run.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(output.stdout, format!("{word}\n").as_bytes());
    }
}

#[test]
#[ignore = "boots a host"]
fn a_host_that_cannot_load_kvm_is_100_and_gives_its_reason() {
    let output = assert_ends_with(&["--kvm-args", "npt=x", "--", "true"], 100);
    assert!(stderr(&output).contains("npt=x"), "{}", stderr(&output));
}

#[test]
#[ignore = "boots a host"]
fn a_panic_is_101() {
    fault_ends_with("panic", 101, "Kernel panic - not syncing");
}

#[test]
#[ignore = "boots a host"]
fn a_panic_is_101_on_the_intel_host_too() {
    let script = ["--file", &FAULT, "--", "insmod fault.ko kind=panic"];
    let output = lab_on("intel", &script).output().unwrap();
    assert_eq!(output.status.code(), Some(101), "{}", stderr(&output));
    let shown = shown(&output, "console.log");
    assert!(shown.contains("Kernel panic - not syncing"), "{shown}");
}

#[test]
#[ignore = "boots a host"]
fn an_oops_is_102() {
    fault_ends_with("oops", 102, "BUG: kernel NULL pointer dereference");
    fault_ends_with("bug", 102, "kernel BUG at");
}

#[test]
#[ignore = "boots a host"]
fn a_warning_is_103() {
    fault_ends_with("warn", 103, "WARNING: ");
}

#[test]
#[ignore = "boots hosts"]
fn a_call_past_an_endbr_is_102_on_a_cpu_that_tracks_branches() {
    let load = |model: &str| {
        let model = ["--model", model, "--kvm-args", "enable_apicv=0"];
        let script = ["--file", &FAULT, "--", "insmod fault.ko kind=ibt"];
        let arguments = [&model[..], &script[..]].concat();
        lab_on("intel", &arguments).output().unwrap()
    };
    let tracked = load("arrow_lake");
    assert_eq!(tracked.status.code(), Some(102), "{}", stderr(&tracked));
    let log = fs::read_to_string(folder(&tracked).join("kernel.log")).unwrap();
    assert!(log.contains("Missing ENDBR: fault_target"), "{log}");
    // Nothing else is wrong with that call.
    let untracked = load("corei7_ivy_bridge_3770k");
    assert_eq!(untracked.status.code(), Some(0), "{}", stderr(&untracked));
}

/// Check that each fault of `kinds`, on a debug kernel, ends a run with this status and these words in the kernel log.
#[track_caller]
fn is_found_by(kernel: &str, kinds: &[(&str, i32, &str)]) {
    let fault = fault_for(Some(kernel));
    for &(kind, status, words) in kinds {
        // A scan finds leaked memory once it is some seconds old.
        let script = format!(
            "insmod fault.ko kind={kind}; \
             for i in 1 2 3 4; do sleep 6; echo scan >/sys/kernel/debug/kmemleak; done; sleep 2"
        );
        let host = ["--kernel", kernel, "--memory", "2048", "--cpus", "2"];
        let run = ["--no-kvm", "--file", &fault, "--", &script];
        let output = lab(&[&host[..], &run[..]].concat()).output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(status), "{kind}: {text}");
        let log = fs::read_to_string(folder(&output).join("kernel.log")).unwrap();
        assert!(log.contains(words), "{kind}: {log}");
    }
}

#[test]
#[ignore = "builds a kernel, and boots hosts with it"]
fn a_fault_that_the_debug_kernel_finds_ends_a_run() {
    is_found_by(
        "debug",
        &[
            ("freed", 102, "BUG: KASAN: slab-use-after-free in fault_"),
            ("shift", 102, "UBSAN: shift-out-of-bounds"),
            ("locks", 103, "possible circular locking dependency"),
            ("rcu", 103, "suspicious RCU usage"),
            ("sleep", 102, "BUG: scheduling while atomic"),
            ("timer", 102, "ODEBUG: free active"),
            ("leak", 103, "new suspected memory leaks (see"),
        ],
    );
}

#[test]
#[ignore = "builds a kernel, and boots hosts with it"]
fn a_race_that_the_kcsan_kernel_finds_ends_a_run() {
    is_found_by("kcsan", &[("race", 102, "BUG: KCSAN: data-race in fault_")]);
}

#[test]
#[ignore = "builds a kernel, and boots hosts with it"]
fn a_call_that_the_cfi_kernel_finds_ends_a_run() {
    let fault = fault_for(Some("cfi"));
    let tracked = ["--model", "arrow_lake", "--kvm-args", "enable_apicv=0"];
    for (host, model, mode) in [
        ("amd", &[][..], "kcfi"),
        ("intel", &tracked, "kcfi"),
        ("intel", &tracked, "fineibt"),
        // Nothing else is wrong with that call.
        ("amd", &[], "off"),
    ] {
        let append = format!("--append=cfi={mode}");
        let run = ["--kernel", "cfi", &append, "--file", &fault, "--"];
        let arguments = [model, &run, &["insmod fault.ko kind=type"]].concat();
        let output = lab_on(host, &arguments).output().unwrap();
        let (status, words) = match mode {
            "off" => (0, "called as a function of another type"),
            // The kernel names the caller under kCFI, and the called function under FineIBT.
            "fineibt" => (102, "CFI failure at fault_number"),
            _ => (102, "CFI failure at fault_type"),
        };
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(status), "{host} {mode}: {text}");
        let log = fs::read_to_string(folder(&output).join("kernel.log")).unwrap();
        assert!(log.contains(words), "{host} {mode}: {log}");
    }
}

#[test]
#[ignore = "boots a host, and waits 25 s"]
fn a_lockup_is_104() {
    fault_ends_with("softlockup", 104, "BUG: soft lockup");
}

/// Check that a limit ends a script with this status, and that the shown console ends with the script's last line.
#[track_caller]
fn limit_ends_with(limit: &str, script: &str, status: i32) {
    let script = format!("echo the last word >/dev/console; {script}");
    let ends_well = |seconds: &str| {
        let output = assert_ends_with(&[limit, seconds, "--", &script], status);
        let shown = shown(&output, "console.log");
        println!("after {seconds} s: {shown}");
        shown.ends_with("the last word\n")
    };
    // On a busy machine the limit may come before the script.
    assert!(["20", "120"].into_iter().any(ends_well));
}

#[test]
#[ignore = "boots a host"]
fn silence_is_106() {
    limit_ends_with("--silence", "sleep 1000", 106);
}

#[test]
#[ignore = "boots a host"]
fn the_time_limit_is_107() {
    limit_ends_with("--timeout", "while true; do echo .; sleep 1; done", 107);
}

#[test]
#[ignore = "boots a host"]
fn a_host_that_ends_without_a_verdict_is_108() {
    assert_ends_with(&["--", "reboot -f; sleep 100"], 108);
}

#[test]
#[ignore = "fetches two kernels, and boots hosts with them"]
fn a_kernel_without_rust_boots_without_the_module_and_cannot_build_it() {
    let lab = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        command.args(arguments).output().unwrap()
    };
    let script = "uname -r; ls; ls /sys/kernel/btf/kvm /sys/kernel/tracing/events/kvm/kvm_exit/id";
    for (kernel, release) in [("6.12", "6.12."), ("6.1", "6.1.0-")] {
        let output = lab(&["run", "--host", "amd", "--kernel", kernel, "--", script]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{said}");
        let text = String::from_utf8(output.stdout).unwrap();
        let (first, rest) = text.split_once('\n').unwrap();
        assert!(first.starts_with(release), "{text}");
        assert!(first.ends_with("-amd64"), "{text}");
        let there = "/sys/kernel/btf/kvm\n/sys/kernel/tracing/events/kvm/kvm_exit/id\n";
        assert_eq!(rest, there, "and no exitmeter.ko");
        let line = format!("no exitmeter.ko, as its kernel {first} is built without Rust.\n");
        assert!(said.contains(&line), "no {line:?} in {said}");

        let output = lab(&["build", "--kernel", kernel]);
        assert_eq!(output.status.code(), Some(100));
        let sentence = format!("lab: {first} is built without Rust, so it takes no exitmeter.ko");
        let said = stderr(&output);
        assert!(said.starts_with(&sentence), "{said}");
        assert!(
            said.contains("from 7.2 on, or do without --kernel"),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

/// Run a host with a cache that holds the set-up, on a disk with so many MiB for the rest.
fn on_a_disk_of(mib: u32, host: &str) -> Output {
    LazyLock::force(&FAULT);
    let mount = r#"
        mount -t tmpfs -o size="$1m" tmpfs "$2"
        mkdir "$2/exitmeter"
        ln -s "$3"/{root,kernel,tree,bochs}-* "$2/exitmeter/"
        export XDG_CACHE_HOME=$2
        shift 3
        exec "$@""#;
    let disk = Path::new(env!("CARGO_TARGET_TMPDIR")).join("disk");
    fs::create_dir_all(&disk).unwrap();
    let mut namespace = Command::new("unshare");
    namespace.arg("--mount");
    if !rustix::process::geteuid().is_root() {
        namespace.args(["--map-root-user", "--map-auto"]);
    }
    let run = lab_on(host, &["--", "true"]);
    namespace
        .args(["bash", "-euc", mount, "bash", &mib.to_string()])
        .args([&disk, &setup::cache().unwrap()])
        .arg(run.get_program())
        .args(run.get_args())
        .output()
        .unwrap()
}

#[test]
#[ignore = "takes the set-up"]
fn a_full_disk_is_100_and_names_its_remedy_once() {
    // On the first disk the image does not fit, on the second a saved machine does not.
    for (mib, host, words) in [
        (20, "amd", "lab: there is no space left to write "),
        (
            200,
            "intel",
            " MiB free and saving a machine needs 1428 MiB",
        ),
    ] {
        let output = on_a_disk_of(mib, host);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(100), "{said}");
        assert!(said.contains(words), "no {words} in {said}");
        assert!(
            said.ends_with("; free some, or point XDG_CACHE_HOME to a larger disk\n")
                && said.lines().count() == 1,
            "{said}"
        );
    }
}

/// Start a run. Return it once its script has begun, with the first process of its emulator.
fn start_run() -> (Child, Pid) {
    first_child_of(lab(&["--", SLEEP]))
}

/// Script that prints a line, and then runs until it is killed.
const SLEEP: &str = "echo begun; sleep 1000";

/// Start a command of the lab. Return it once its script, [`SLEEP`], has begun, with its first child.
fn first_child_of(mut command: Command) -> (Child, Pid) {
    let mut run = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(run.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "begun\n");
    let children = format!("/proc/{0}/task/{0}/children", run.id());
    let children = fs::read_to_string(children).unwrap();
    let child = children.split_whitespace().next().unwrap().parse().unwrap();
    (run, Pid::from_raw(child).unwrap())
}

/// Return the last process of an emulator. It is the emulator itself; its namespace's first process waits for it.
fn innermost(mut pid: Pid) -> Pid {
    loop {
        let children = format!("/proc/{0}/task/{0}/children", pid.as_raw_nonzero());
        let children = fs::read_to_string(children).unwrap_or_default();
        match children
            .split_whitespace()
            .next()
            .and_then(|child| child.parse().ok())
            .and_then(Pid::from_raw)
        {
            Some(child) => pid = child,
            None => return pid,
        }
    }
}

fn is_gone(pid: Pid) -> bool {
    let stat =
        fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    // A zombie counts as gone: it only waits to be reaped.
    stat.rsplit_once(')')
        .is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

#[track_caller]
fn wait_soon(mut run: Child) -> (Option<i32>, String) {
    let since = Instant::now();
    let status = run.wait().unwrap();
    assert!(
        since.elapsed() < Duration::from_secs(5),
        "it took {:?}",
        since.elapsed()
    );
    let mut text = String::new();
    run.stderr.unwrap().read_to_string(&mut text).unwrap();
    (status.code(), text)
}

#[test]
#[ignore = "boots a host"]
fn an_emulator_that_dies_is_105_at_once() {
    let (run, emulator) = start_run();
    kill_process(innermost(emulator), Signal::KILL).unwrap();
    let (status, text) = wait_soon(run);
    assert_eq!(status, Some(105), "{text}");
}

#[test]
#[ignore = "boots hosts"]
fn an_interrupted_run_leaves_nothing_running() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let (run, emulator) = start_run();
        let innermost = innermost(emulator);
        kill_process(Pid::from_child(&run), signal).unwrap();
        let (status, text) = wait_soon(run);
        assert_eq!(status, Some(130), "{text}");
        are_gone_soon([emulator, innermost]);
    }
}

#[test]
#[ignore = "boots a host"]
fn a_killed_run_leaves_nothing_running() {
    let (mut run, emulator) = start_run();
    let innermost = innermost(emulator);
    run.kill().unwrap();
    run.wait().unwrap();
    are_gone_soon([emulator, innermost]);
}

#[test]
#[ignore = "takes the set-up"]
fn a_command_in_the_root_ends_with_the_lab() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::KILL] {
        // A test may run where signals are ignored, and its children inherit that.
        let mut command = Command::new("env");
        command
            .args(["--default-signal", env!("CARGO_BIN_EXE_lab")])
            .args(["root", "--", "sh", "-c", SLEEP]);
        let (mut root, child) = first_child_of(command);
        let innermost = innermost(child);
        kill_process(Pid::from_child(&root), signal).unwrap();
        root.wait().unwrap();
        are_gone_soon([child, innermost]);
    }
}

/// Check that processes end soon. The kernel needs a moment for a killed process with a host's memory.
fn are_gone_soon(processes: [Pid; 2]) {
    let since = Instant::now();
    while !processes.into_iter().all(is_gone) {
        assert!(
            since.elapsed() < Duration::from_secs(5),
            "a process lives on"
        );
        thread::sleep(Duration::from_millis(50));
    }
}
