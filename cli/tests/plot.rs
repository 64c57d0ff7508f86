// SPDX-License-Identifier: GPL-2.0

//! `exitmeter plot`, run on recordings of guests that booted on emulated hosts.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::Output,
};

use tempfile::TempDir;

use self::tool::{exitmeter, failed, succeeded};

mod tool;

const INTEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/recordings/intel-boot.rec"
);

/// Recording with details.
const WHY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recordings/amd-why.rec");

fn plot(arguments: &[&str]) -> Output {
    let arguments = [&["plot"], arguments].concat();
    exitmeter(&arguments).output().unwrap()
}

/// Return the message of a run that fails.
fn error_of(arguments: &[&str]) -> String {
    let (status, text) = failed(plot(arguments));
    assert_eq!(status, Some(1));
    text
}

#[test]
fn each_kind_is_drawn_in_each_format() {
    let folder = TempDir::new().unwrap();
    for kind in ["rate", "phases", "cumulative", "latency", "all"] {
        for (name, begin) in [
            ("x.svg", "<svg "),
            ("x.png", "\u{fffd}PNG"),
            ("x.HTML", "<!DOCTYPE html>"),
        ] {
            // Pixels are drawn from the same lines.
            if name == "x.png" && kind != "latency" {
                continue;
            }
            let file = folder.path().join(name);
            let output = plot(&[INTEL, "--kind", kind, "-o", file.to_str().unwrap()]);
            assert_eq!(succeeded(output), "");
            let bytes = fs::read(file).unwrap();
            assert!(String::from_utf8_lossy(&bytes).starts_with(begin));
            assert!(bytes.len() > 3000);
        }
    }
}

#[test]
fn a_recording_with_details_has_two_pictures_more() {
    let folder = TempDir::new().unwrap();
    for (kind, format, begin) in [
        ("details", "svg", "<svg "),
        ("slow", "svg", "<svg "),
        ("slow", "png", "\u{fffd}PNG"),
    ] {
        for more in [&[][..], &["--reason", "ioio", "--weight", "ticks"]] {
            let file = folder.path().join(format!("x.{format}"));
            let output =
                plot(&[&[WHY, "--kind", kind, "-o", file.to_str().unwrap()], more].concat());
            assert!(output.status.success() && output.stderr.is_empty());
            let bytes = fs::read(file).unwrap();
            assert!(String::from_utf8_lossy(&bytes).starts_with(begin));
        }
    }
    let output = plot(&[WHY, "--format", "html", "-o", "-"]);
    let page = String::from_utf8(output.stdout).unwrap();
    assert_eq!(page.matches("<svg ").count(), 6);
    for cell in [
        "<tr><td>MSR</td><td>write 0x6e0 IA32_TSC_DEADLINE</td><td>",
        "<td>KVM_EXIT_IO</td>",
    ] {
        assert!(page.contains(cell), "{cell}");
    }
    // A list of symbols names the code of slow exits.
    let symbols = folder.path().join("System.map");
    fs::write(&symbols, "ffffffff81000000 T _text\n").unwrap();
    let symbols = symbols.to_str().unwrap();
    let output = plot(&[
        WHY,
        "--kind",
        "slow",
        "--format",
        "svg",
        "-o",
        "-",
        "--symbols",
        symbols,
    ]);
    assert!(output.status.success());
}

#[test]
fn a_recording_without_details_says_how_to_have_them() {
    for kind in ["details", "slow"] {
        assert_eq!(
            error_of(&[INTEL, "-o", "x.svg", "--kind", kind]),
            format!(
                "exitmeter: {INTEL} has no details: they were off while it was recorded; \
                 'exitmeter record --why' turns them on\n"
            )
        );
        assert_eq!(
            error_of(&[WHY, "-o", "x.svg", "--kind", kind, "--reason", "TASK_SWITCH"]),
            format!(
                "exitmeter: there is no {} by TASK_SWITCH in that part of {WHY}: draw another part, or \
                 another reason\n",
                if kind == "slow" { "slow exit" } else { "exit" }
            )
        );
    }
    let text = error_of(&[WHY, "-o", "x.svg", "--reason", "MSR_WRITE"]);
    assert!(
        text.starts_with("exitmeter: no exit reason of svm is called 'MSR_WRITE'"),
        "{text}"
    );
    let page = plot(&[INTEL, "--format", "html", "-o", "-"]);
    let page = String::from_utf8(page.stdout).unwrap();
    assert!(page.contains("<dt>details</dt><dd>none: "));
}

#[test]
fn a_page_stands_alone_and_has_all_numbers() {
    let output = plot(&[INTEL, "--format", "html", "-o", "-"]);
    assert!(output.status.success());
    let page = String::from_utf8(output.stdout).unwrap();
    let elsewhere = page.replace("http://www.w3.org/2000/svg", "");
    for word in ["http", "<script", "<link", "src=", "@import"] {
        assert!(!elsewhere.contains(word), "{word}");
    }
    assert_eq!(page.matches("<svg ").count(), 4);
    for cell in [
        "<td>EXTERNAL_INTERRUPT</td><td>5,452</td><td>41.7%</td>",
        "<dd>guest boot</dd>",
        "<dd>13,063</dd>",
    ] {
        assert!(page.contains(cell), "{cell}");
    }
}

#[test]
fn a_recording_that_was_cut_off_is_drawn_with_a_warning() {
    let folder = TempDir::new().unwrap();
    let [cut, damaged, picture] = ["cut.rec", "damaged.rec", "x.svg"].map(|name| {
        let path = folder.path().join(name);
        path.to_str().unwrap().to_owned()
    });
    let mut bytes = fs::read(INTEL).unwrap();
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    bytes[20_000] ^= 1;
    fs::write(&damaged, &bytes).unwrap();
    for (file, word) in [(cut, "cut off"), (damaged, "damaged")] {
        let output = plot(&[&file, "-o", &picture]);
        assert!(output.status.success());
        let words = format!("exitmeter: {file} is {word}; this is what it has up to there\n");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), words);
    }
}

#[test]
fn each_error_is_one_sentence_with_its_remedy() {
    assert_eq!(
        error_of(&[INTEL, "-o", "x.gif"]),
        "exitmeter: cannot tell from the name x.gif what to write: let it end in .svg, .png or \
         .html, or say --format\n"
    );
    assert_eq!(
        error_of(&["/etc/passwd", "-o", "x.svg"]),
        "exitmeter: /etc/passwd: this is not a recording of exitmeter: make one with `exitmeter \
         record`\n"
    );
    assert_eq!(
        error_of(&[INTEL, "-o", "/nowhere/x.svg"]),
        "exitmeter: cannot write /nowhere/x.svg: No such file or directory (os error 2)\n"
    );
    let text = error_of(&[INTEL, "-o", "x.svg", "--vm", "other"]);
    assert!(text.ends_with("; those in it are kvm-99\n"), "{text}");
    let output = plot(&[INTEL]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_closed_pipe_is_quiet() {
    for format in ["svg", "png"] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        let mut command = exitmeter(&["plot", INTEL, "-o", "-", "--format", format]);
        let output = command.stdout(OwnedFd::from(theirs)).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty());
    }
}

#[test]
fn the_help_has_examples() {
    let text = String::from_utf8(plot(&["--help"]).stdout).unwrap();
    assert!(text.contains("Examples:\n  exitmeter plot "), "{text}");
}
