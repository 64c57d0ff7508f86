// SPDX-License-Identifier: GPL-2.0

//! The tool on a kernel of ten years ago, Linux 4.8 of October 2016, without all later system
//! calls. The binary is static, so that nothing else of a system matters.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::process::CommandExt as _,
    process::{Command, Output},
};

use seccompiler::{apply_filter, BpfProgram, SeccompAction, SeccompFilter, TargetArch};

const SNAPSHOT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.2.bin"
);
const RECORDING: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recordings/amd-work.rec");

/// System calls from the first that Linux 4.8 lacks, pkey_mprotect, to one past those of Linux 7.3
/// (arch/x86/entry/syscalls/syscall_64.tbl).
const LATER: std::ops::Range<i64> = 329..512;

/// Build a seccomp filter that fails newer system calls with ENOSYS, as an old kernel does.
fn old_kernel_filter() -> BpfProgram {
    let rules: BTreeMap<i64, _> = LATER.map(|number| (number, Vec::new())).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        TargetArch::x86_64,
    );
    filter.unwrap().try_into().unwrap()
}

fn run(program: &str, args: &[&str]) -> Output {
    let filter = old_kernel_filter();
    let mut command = Command::new(program);
    command.args(args);
    // SAFETY: The filter is built already; applying it takes two system calls.
    unsafe {
        command.pre_exec(move || apply_filter(&filter).map_err(io::Error::other));
    }
    command.output().unwrap()
}

#[test]
fn the_tool_works_on_an_old_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (svg, png, html) = (file("a.svg"), file("a.png"), file("a.html"));
    for args in [
        &["report", "--input", SNAPSHOT][..],
        &["report", "--json", "--input", SNAPSHOT],
        &["report", "--diff", SNAPSHOT, SNAPSHOT],
        &["reasons"],
        &["plot", RECORDING, "-o", &svg],
        &["plot", RECORDING, "-o", &png],
        &["plot", RECORDING, "-o", &html],
    ] {
        let output = run(env!("CARGO_BIN_EXE_exitmeter"), args);
        let now = Command::new(env!("CARGO_BIN_EXE_exitmeter"))
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        assert_eq!(output.stdout, now.stdout, "{args:?}");
    }
    for picture in [svg, png, html] {
        assert!(fs::metadata(picture).unwrap().len() > 1000);
    }
    // It reports what is missing in the same words.
    let output = run(env!("CARGO_BIN_EXE_exitmeter"), &["guest"]);
    let now = Command::new(env!("CARGO_BIN_EXE_exitmeter"))
        .arg("guest")
        .output()
        .unwrap();
    assert_eq!(output, now);
}

/// Check that the filter works: a newer system call fails.
#[test]
fn newer_system_calls_fail() {
    let filter = old_kernel_filter();
    let thread = std::thread::spawn(move || {
        apply_filter(&filter).unwrap();
        // SAFETY: The call uses no memory. Its only file descriptor is not open.
        let ret = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, -1, 0, 0, 0) };
        (ret, io::Error::last_os_error().raw_os_error())
    });
    assert_eq!(thread.join().unwrap(), (-1, Some(libc::ENOSYS)));
}

/// The tool needs neither libraries nor a loader.
#[test]
fn the_binary_is_static() {
    let bytes = fs::read(env!("CARGO_BIN_EXE_exitmeter")).unwrap();
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let half = |at: usize| usize::from(u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()));
    // Program headers (the ELF specification): none has the type PT_INTERP, an interpreter.
    let (first, size, count) = (word(0x20), half(0x36), half(0x38));
    assert!(count > 0);
    for at in (0..count).map(|number| first + number * size) {
        assert_ne!(half(at), 3, "it asks for a loader");
    }
}
