// SPDX-License-Identifier: GPL-2.0

//! The command as a whole, run on a saved snapshot.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{Command, Output},
};

use exitmeter_meter::reasons::{defined_count, Isa};

use self::{
    saved::compare,
    tool::{exitmeter, failed, succeeded},
};

mod saved;
mod tool;

const SNAPSHOT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.2.bin"
);
/// Snapshot that does not tell the two sleeps apart.
const SNAPSHOT_1_1: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.1.bin"
);
/// Snapshot that also lacks histograms.
const SNAPSHOT_1_0: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.0.bin"
);

fn run(args: &[&str]) -> Output {
    exitmeter(args).output().unwrap()
}

/// Return the output of a run that succeeds.
fn output_of(args: &[&str]) -> String {
    succeeded(run(args))
}

/// Return the exit status and the message of a run that fails.
fn error_of(args: &[&str]) -> (Option<i32>, String) {
    failed(run(args))
}

#[test]
fn the_report_matches_the_saved_text() {
    let text = output_of(&["report", "--input", SNAPSHOT]);
    compare(&text, "report.txt");
    assert!(
        text.lines().all(|line| line.chars().count() <= 144),
        "{text}"
    );
    let text = output_of(&["report", "--input", SNAPSHOT_1_1]);
    compare(&text, "report-1.1.txt");
    let text = output_of(&["report", "--input", SNAPSHOT_1_0]);
    compare(&text, "report-1.0.txt");
}

#[test]
fn json_has_all_numbers_of_the_report() {
    let text = output_of(&["report", "--json", "--input", SNAPSHOT]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["format"], 1);
    assert_eq!(report["host"]["isa"], "vmx");
    assert_eq!(report["unmetered_vcpus"], 1);
    let vm = &report["vms"][0];
    assert_eq!(
        (&vm["name"], &vm["pid"]),
        (&"kvm-1234".into(), &1234.into())
    );
    assert_eq!(
        (&vm["exits"], &vm["nested_exits"]),
        (&13_124.into(), &789.into())
    );
    let vcpu = &vm["vcpus"][1];
    assert_eq!(vcpu["nested_exits"], 205);
    assert_eq!(vcpu["phase"], "guest");
    assert_eq!(vcpu["latest"]["name"], "HLT");
    // Each tick of the vCPU's life stands in one phase of one reason.
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let life = number(&vcpu["last_tsc"]) - number(&vcpu["first_tsc"]);
    let cells = vcpu["reasons"].as_array().unwrap().iter();
    let cells: Vec<_> = cells.map(|row| &row["cycles"]).collect();
    let sum = |phases: &[&str]| {
        let of = |cycles: &serde_json::Value| -> u64 {
            phases.iter().map(|phase| number(&cycles[*phase])).sum()
        };
        cells.iter().map(|cycles| of(cycles)).sum::<u64>()
    };
    let awake = ["guest", "kernel", "user", "preempted"];
    assert_eq!(sum(&awake) + sum(&["halted", "waiting"]), life);
    assert_eq!(sum(&awake) + sum(&["blocked"]), life);
    assert_eq!(
        vm["reasons"][0],
        serde_json::json!({
            "kind": "code", "code": 1, "name": "EXTERNAL_INTERRUPT", "exits": 5191,
            "nested_exits": 0,
            "cycles": {
                "guest": 5191 * 40_000_u64, "kernel": 5191 * 2_100_u64,
                "user": 0, "blocked": 0, "preempted": 0, "halted": 0, "waiting": 0,
            },
            "p50": 2100, "p90": 2100, "p99": 2100, "max": 2100, "max_exact": true,
            "histogram": [[2048, 5191]],
        })
    );
    // Two vCPUs in one: 4645 exits of 1480 ticks, and 120 of 5100.
    let write = &vm["reasons"][1];
    assert_eq!(write["name"], "MSR_WRITE");
    assert_eq!(
        write["histogram"],
        serde_json::json!([[1024, 4645], [4096, 120]])
    );
    let quantiles = ["p50", "p90", "p99", "max"].map(|field| number(&write[field]));
    assert_eq!(quantiles, [1228, 1228, 4915, 5100]);
    let mut rows = vm["reasons"].as_array().unwrap().iter();
    let start = rows.find(|row| row["kind"] == "start").unwrap();
    assert_eq!(
        (&start["p50"], &start["histogram"]),
        (&serde_json::Value::Null, &serde_json::json!([]))
    );
    // KVM polled for 150 and 600 us before it let the vCPUs sleep, within HLT's 2 140 000 ticks.
    let of = |name: &str| {
        let mut rows = vm["reasons"].as_array().unwrap().iter();
        rows.find(|row| row["name"] == name).unwrap()
    };
    assert_eq!(of("HLT")["cycles"]["kernel"], 2_140_000);
    assert_eq!(
        (&of("HLT")["polled"], &vm["polled"]),
        (&1_800_000.into(), &1_800_000.into())
    );
    assert_eq!(
        (&vm["polled_ns"], &vcpu["polled_ns"]),
        (&750_000.into(), &600_000.into())
    );
    assert!(of("CPUID").get("polled").is_none());
    assert_eq!(of("EPT_VIOLATION")["cycles"]["waiting"], 18_000_000);
    assert_eq!(of("EPT_VIOLATION")["cycles"]["blocked"], 18_000_000);
    // No vCPU that is gone exited by HLT, so none of KVM's count is shown.
    let departed = &report["departed"];
    assert_eq!(
        (&departed["polled_ns"], &departed["polled"]),
        (&7_000.into(), &0.into())
    );
    assert_eq!(report["host"]["life"], 0x1122_3344_5566_7788_u64);
    assert_eq!(report["departed"]["vcpus_gone"], 1);
    assert_eq!(report["departed"]["nested_exits"], 501);
    assert_eq!(report["departed"]["reasons"][0]["name"], "IO_INSTRUCTION");

    let text = output_of(&["report", "--json", "--input", SNAPSHOT_1_0]);
    assert!(text.contains("\"exits\"") && !text.contains("p50") && !text.contains("histogram"));
    assert!(!text.contains("nested"));
    for snapshot in [SNAPSHOT_1_0, SNAPSHOT_1_1] {
        let text = output_of(&["report", "--json", "--input", snapshot]);
        assert!(text.contains("\"blocked\": 4890000000"));
        for absent in ["halted", "waiting", "polled"] {
            assert!(!text.contains(absent), "{absent}");
        }
    }
}

#[test]
fn reasons_are_listed_for_one_vendor_or_both() {
    let text = output_of(&["reasons", "--isa", "svm"]);
    assert!(
        text.contains(" 114        0x72  CPUID                      handles it\n"),
        "{text}"
    );
    assert!(!text.contains("EPT_VIOLATION"));
    let lists: serde_json::Value =
        serde_json::from_str(&output_of(&["reasons", "--json"])).unwrap();
    let vmx = lists[0]["reasons"].as_array().unwrap().len();
    assert_eq!(vmx, defined_count(Isa::Vmx) as usize);
    assert_eq!(lists[1]["isa"], "svm");
}

#[test]
fn each_error_is_one_sentence_with_its_remedy() {
    if !Path::new("/dev/exitmeter").exists() {
        let (status, text) = error_of(&["report"]);
        assert_eq!(status, Some(1));
        // The rest differs where the kernel wants signatures, as with Secure Boot.
        assert!(
            text.starts_with("exitmeter: there is no /dev/exitmeter")
                && text.contains("load")
                && text.lines().count() == 1,
            "{text}"
        );
    }
    let (status, text) = error_of(&["report", "--input", "/nowhere"]);
    assert_eq!(status, Some(1));
    assert_eq!(
        text,
        "exitmeter: cannot read /nowhere: No such file or directory (os error 2)\n"
    );
    let (status, text) = error_of(&["report", "--input", "/proc/self/cmdline"]);
    assert_eq!(status, Some(1));
    assert_eq!(
        text,
        "exitmeter: /proc/self/cmdline: this is not a snapshot of exitmeter\n"
    );
    let (status, text) = error_of(&["report", "--nonsense"]);
    assert_eq!(status, Some(2));
    assert!(text.contains("--nonsense"));
}

#[test]
fn guest_without_a_meter_gets_an_error() {
    let output = run(&["guest"]);
    let text = String::from_utf8(output.stderr).unwrap();
    if output.status.success() {
        assert!(text.is_empty());
    } else {
        assert_eq!(output.status.code(), Some(1));
        let texts = [
            "exitmeter: no meter answers CPUID leaf 0x4FFFFFF0: run this in a VM whose host has \
             exitmeter.ko loaded, with a leaf_map other than 0",
            "exitmeter: this is not a virtual machine: run this in one, or 'exitmeter report' on \
             the host\n",
        ];
        assert!(texts.iter().any(|start| text.starts_with(start)), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[test]
fn a_closed_pipe_is_quiet() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    let output = exitmeter(&["report", "--input", SNAPSHOT])
        .stdout(OwnedFd::from(theirs))
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
}

#[test]
fn full_disk_is_an_error() {
    let full = std::fs::File::create("/dev/full").unwrap();
    let output = exitmeter(&["report", "--input", SNAPSHOT])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        text,
        "exitmeter: cannot write to the standard output: \
         No space left on device (os error 28)\n"
    );
}

#[test]
fn every_command_has_examples() {
    let help = output_of(&["--help"]);
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let (commands, _) = commands.split_once("\n\n").unwrap();
    // The description of a command continues further right.
    let names: Vec<&str> = commands
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !matches!(*name, "" | "help"))
        .collect();
    assert!(names.len() > 10 && names.contains(&"bpf"), "{names:?}");
    for name in names {
        let text = output_of(&[name, "--help"]);
        assert!(text.contains("Examples:\n  "), "{text}");
        assert!(text.contains(&format!("exitmeter {name}")), "{text}");
    }
    assert!(output_of(&["--help"]).contains("Exit status:"));
}

#[test]
fn each_command_has_a_page() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("man1");
    assert_eq!(output_of(&["man", path.to_str().unwrap()]), "");
    let page = |name: &str| std::fs::read_to_string(path.join(name)).unwrap();
    let whole = page("exitmeter.1");
    for name in [
        "report", "why", "slow", "verify", "guest", "stat", "reasons",
    ] {
        assert!(whole.contains(&format!("exitmeter\\-{name}(1)")));
        let page = page(&format!("exitmeter-{name}.1"));
        assert!(page.contains(".SH \"EXAMPLES\"\n.nf\nexitmeter "), "{page}");
    }
    assert!(whole.contains(".SH \"EXIT STATUS\"\n.nf\n0  the output"));
    let (status, text) = error_of(&["man", "/proc/nowhere"]);
    assert_eq!(status, Some(1));
    assert!(
        text.starts_with("exitmeter: cannot write to /proc/nowhere: "),
        "{text}"
    );
}

#[test]
fn shells_load_the_completions() {
    for shell in ["bash", "zsh", "fish"] {
        let script = output_of(&["completions", shell]);
        assert!(script.contains("exitmeter") && script.contains("interval"));
    }
    // Bash itself accepts the script, and completes with it.
    let mut bash = Command::new("bash");
    let lines = "eval \"$(\"$1\" completions bash)\"; COMP_WORDS=(exitmeter rep); COMP_CWORD=1; \
                 _exitmeter exitmeter rep exitmeter; echo \"${COMPREPLY[@]}\"";
    bash.args(["-c", lines, "bash", env!("CARGO_BIN_EXE_exitmeter")]);
    let output = bash.output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "report\n");
}

/// Without a meter, the command is not run.
#[test]
fn stat_runs_no_command_without_a_meter() {
    if run(&["guest"]).status.success() {
        return;
    }
    let (status, text) = error_of(&["stat", "--", "echo", "run"]);
    assert_eq!(status, Some(125));
    assert!(
        text.starts_with("exitmeter: ") && text.lines().count() == 1,
        "{text}"
    );
}
