// SPDX-License-Identifier: GPL-2.0

//! What the scripts and the lab say on a machine that lacks something: one sentence that names it and the remedy.
#![expect(clippy::unwrap_used, reason = "this is how a test fails")]

use std::env;
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Output};

use tempfile::TempDir;

/// The commands that every machine has, and the scripts take as given.
const BASICS: &[&str] = &[
    "bash", "cat", "cut", "dirname", "find", "flock", "grep", "head", "mkdir", "mktemp", "mv",
    "rm", "sed", "sh", "sort", "tail", "tar", "touch", "tr",
];

/// A machine with nothing but the basics, some room on its disk, and what a test gives it. Who asks is root.
struct Machine(TempDir);

impl Machine {
    fn new() -> Self {
        let machine = Self(TempDir::new().unwrap());
        for folder in ["bin", "root/usr/bin", "out/usr/bin", "kernel"] {
            fs::create_dir_all(machine.path(folder)).unwrap();
        }
        for name in BASICS {
            machine.real(name);
        }
        // What the scripts look for in the root, which is what root.sh puts out, and in a kernel.
        for root in ["root", "out"] {
            machine.write(&format!("{root}/usr/bin/env"), "#!/bin/sh\n");
        }
        machine.write("kernel/release", "7.3.4+deb13-amd64\n");
        machine.command("id", "echo 0");
        machine.command("df", "echo Avail; echo 100000");
        machine
    }

    /// A machine that has all that scripts/bootstrap.sh looks for in the PATH.
    fn whole() -> Self {
        let machine = Self::new();
        machine.command("rustc", "echo 'rustc 1.85.0 (4d91de4e4 2025-02-17)'");
        for name in ["make", "cc", "cargo", "mmdebstrap", "unshare", "mount"] {
            machine.command(name, "exit 0");
        }
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Gives it a command of its own.
    fn command(&self, name: &str, script: &str) {
        self.remove(name);
        self.write(&format!("bin/{name}"), &format!("#!/bin/sh\n{script}\n"));
    }

    /// Gives it a command of this machine.
    fn real(&self, name: &str) {
        self.remove(name);
        let path = env::var_os("PATH").unwrap();
        let found = env::split_paths(&path)
            .map(|folder| folder.join(name))
            .find(|path| path.exists())
            .unwrap_or_else(|| panic!("these tests take the command {name}"));
        symlink(found, self.path("bin").join(name)).unwrap();
    }

    fn remove(&self, name: &str) {
        let _ = fs::remove_file(self.path("bin").join(name));
    }

    /// Somebody who is not root.
    fn user(&self) {
        self.command(
            "id",
            "case $1 in -un) echo somebody ;; *) echo 54321 ;; esac",
        );
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        self.run_with(&[], program, arguments)
    }

    fn run_with(&self, environment: &[(&str, &str)], program: &str, arguments: &[&str]) -> Output {
        Command::new(program)
            .args(arguments)
            .env_clear()
            .env("PATH", self.path("bin"))
            .env("HOME", self.path("home"))
            .envs(environment.iter().copied())
            .output()
            .unwrap()
    }

    fn script(&self, name: &str, arguments: &[&str]) -> Output {
        self.script_with(&[], name, arguments)
    }

    fn script_with(&self, environment: &[(&str, &str)], name: &str, arguments: &[&str]) -> Output {
        let script = script(name);
        self.run_with(environment, "bash", &[&[&*script], arguments].concat())
    }

    /// Runs the script of a step of the set-up as the engine does.
    fn step(&self, name: &str) -> Output {
        let paths = ["root", "out", "kernel", "cache"].map(|name| self.path(name));
        let [root, out, kernel, cache] = paths.each_ref().map(|path| path.to_str().unwrap());
        let environment = [
            ("ROOT", root),
            ("OUT", out),
            ("KERNEL_DIR", kernel),
            ("EXITMETER_CACHE", cache),
            ("KERNEL", "newest"),
            ("JOBS", "1"),
            ("FLAVOUR", "debug"),
            ("CONFIG", "CONFIG_KVM=m"),
        ];
        self.script_with(&environment, &format!("{name}.sh"), &[])
    }

    /// Calls a function of scripts/common.sh.
    fn function(&self, call: &str) -> Output {
        let text = format!(". \"$0/common.sh\"; {call}");
        self.run("bash", &["-euc", &text, &script("")])
    }
}

fn script(name: &str) -> String {
    let path = lab::setup::repository().join("scripts").join(name);
    path.to_str().unwrap().to_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A script that failed ends with one sentence, which holds these words: what is missing, and the remedy.
#[track_caller]
fn assert_says(output: &Output, words: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let sentences: Vec<&str> = said
        .lines()
        .filter(|line| line.starts_with("exitmeter: "))
        .collect();
    assert_eq!(sentences, said.lines().last().as_slice(), "{said}");
    let sentence = sentences[0];
    assert!(
        sentence.ends_with('.') && !sentence.ends_with(" ."),
        "{said}"
    );
    for word in words {
        assert!(sentence.contains(word), "{word} is not in it: {said}");
    }
}

#[test]
fn root_without_the_right_to_make_namespaces_is_told_of_the_capability() {
    let machine = Machine::new();
    machine.command("unshare", "exit 1");
    let output = machine.function("need_namespaces");
    assert_says(&output, &["may not make mount namespaces", "--privileged"]);
}

#[test]
fn a_user_without_what_namespaces_take_is_told_of_it() {
    let machine = Machine::new();
    machine.user();
    let need = || machine.function("need_namespaces");
    assert_says(&need(), &["unshare is missing", "the package util-linux"]);
    machine.command("unshare", "exit 1");
    assert_says(&need(), &["newuidmap is missing", "the package uidmap"]);
    machine.command("newuidmap", "exit 0");
    assert_says(
        &need(),
        &[
            "somebody is not root and has no sub-ids",
            "usermod --add-subuids",
        ],
    );
    // Sub-ids, as far as anybody can see.
    machine.command("grep", "exit 0");
    assert_says(
        &need(),
        &[
            "may not make user namespaces",
            "kernel.unprivileged_userns_clone=1",
        ],
    );
    machine.command("unshare", "exit 0");
    assert!(need().status.success());
}

#[test]
fn whatever_the_lab_is_asked_for_it_says_first_that_nothing_can_run_in_its_root() {
    let machine = Machine::new();
    machine.command("unshare", "exit 1");
    for arguments in [
        &["prepare"][..],
        &["build"],
        &["root"],
        &["run", "--host", "amd", "--", "true"],
        &["shell", "--host", "intel"],
    ] {
        let output = machine.run(env!("CARGO_BIN_EXE_lab"), arguments);
        assert_eq!(output.status.code(), Some(100));
        assert_eq!(
            stderr(&output),
            "lab: root may not make mount namespaces here; \
             in a container, run it with the capability SYS_ADMIN (--privileged)\n",
        );
    }
}

#[test]
fn a_disk_that_is_too_small_is_measured() {
    let machine = Machine::new();
    machine.real("df");
    assert_says(
        &machine.function("need_space / 999999999999"),
        &[
            "MiB free and this step needs 999999999999 MiB",
            "XDG_CACHE_HOME to a larger disk",
        ],
    );
}

#[test]
fn a_step_that_is_called_by_hand_names_the_command() {
    let machine = Machine::new();
    for step in [
        "root",
        "kernel",
        "tree",
        "bochs",
        "perf",
        "selftests",
        "debug-kernel",
    ] {
        let output = machine.script(&format!("{step}.sh"), &[]);
        assert_says(&output, &["wants OUT", "run `cargo lab prepare`"]);
    }
    let output = machine.script("in-root.sh", &["/nowhere", "--", "true"]);
    assert_says(
        &output,
        &["/nowhere is no Debian root", "`cargo lab prepare`"],
    );
}

#[test]
fn a_step_whose_work_fails_shows_its_log_and_says_what_to_do() {
    let machine = Machine::new();
    // Namespaces can be made; what is run in the root fails.
    machine.command(
        "unshare",
        "case $* in *in-root.sh*) echo the reason >&2; exit 100 ;; esac",
    );
    machine.command("mmdebstrap", "exit 0");
    fs::write(machine.path("out/.base"), "").unwrap();
    for (step, what, remedy) in [
        ("root", "the lists of packages", "check the network"),
        ("kernel", "no kernel newest", "the log is"),
        ("tree", "the source of 7.3.4+deb13-amd64", "remove"),
        ("bochs", "the source of Bochs", "check the network"),
        ("perf", "perf could not be fetched", "check the network"),
        ("selftests", "KVM's selftests", "check the network"),
        ("debug-kernel", "the kernel's source", "remove"),
    ] {
        let output = machine.step(step);
        assert_says(&output, &[what, remedy]);
        let said = stderr(&output);
        assert!(said.starts_with("--- the end of "), "{said}");
        assert!(said.contains("the reason\n"), "{said}");
    }
}

#[test]
fn without_a_network_there_is_no_root() {
    let machine = Machine::new();
    machine.command("unshare", "exit 0");
    assert_says(
        &machine.step("root"),
        &["mmdebstrap is missing", "scripts/bootstrap.sh as root"],
    );
    machine.command("mmdebstrap", "echo 'E: no such host' >&2; exit 1");
    let output = machine.step("root");
    assert_says(
        &output,
        &["the base of Debian", "check the network and the mirror"],
    );
    assert!(stderr(&output).contains("E: no such host\n"));
}

#[test]
fn without_a_network_old_lists_are_no_proof_that_there_is_no_kernel() {
    let machine = Machine::new();
    // What kernel.sh runs in the root leaves word that the lists are old.
    machine.command(
        "unshare",
        "case $* in *in-root.sh*) touch \"$OUT/offline\"; exit 100 ;; esac",
    );
    assert_says(
        &machine.step("kernel"),
        &["the old ones have no kernel newest", "check the network"],
    );
}

#[test]
fn without_apt_the_missing_commands_are_named() {
    let machine = Machine::whole();
    machine.remove("mmdebstrap");
    machine.command("rustc", "echo 'rustc 1.84.1 (e71f9a9a9 2025-01-27)'");
    assert_says(
        &machine.script("bootstrap.sh", &["shellcheck"]),
        &[
            "this machine lacks cargo mmdebstrap",
            "shellcheck; install them (cargo means Rust 1.85 or later)",
        ],
    );
}

/// Without root, what to install is named by its packages; where Debian's Rust is too old, by those of the newer one.
#[test]
fn a_user_is_told_what_to_install() {
    let machine = Machine::whole();
    machine.user();
    machine.remove("cargo");
    machine.command("apt-get", "exit 1");
    for (known, packages) in [
        ("rustc) v=1.85.0+dfsg3-1", "cargo rustc uidmap"),
        (
            "rustc) v=1.63.0+dfsg1-2 ;; rustc-web) v=1.85.0+dfsg2-3~deb12u3",
            "cargo-web rustc-web uidmap",
        ),
    ] {
        machine.command(
            "apt-cache",
            &format!("v='(none)'; case $2 in {known} ;; esac; echo \"  Candidate: $v\""),
        );
        let output = machine.script("bootstrap.sh", &[]);
        let remedy = format!("or apt-get install {packages}");
        assert_says(
            &output,
            &["this machine lacks cargo newuidmap", "as root", &remedy],
        );
    }
    for unknown in ["echo '  Candidate: (none)'", "exit 100"] {
        machine.command("apt-cache", unknown);
        assert_says(
            &machine.script("bootstrap.sh", &[]),
            &["no Rust 1.85 or later", "install one (rustup"],
        );
    }
}

#[test]
fn root_gets_what_is_missing_or_the_reason() {
    let machine = Machine::whole();
    machine.remove("mmdebstrap");
    machine.real("env");
    for (apt, words) in [
        (
            "exit 1",
            ["the lists of packages", "check the network and the mirror"],
        ),
        (
            "[ $1 = update ]",
            ["mmdebstrap could not be installed", "the reason is above"],
        ),
        ("exit 0", ["mmdebstrap is still missing", "see PATH"]),
    ] {
        machine.command("apt-get", apt);
        assert_says(&machine.script("bootstrap.sh", &[]), &words);
    }
    let bin = machine.path("bin");
    let make = format!("ln -sf cargo {}/mmdebstrap", bin.display());
    machine.real("ln");
    machine.command("apt-get", &make);
    let output = machine.script("bootstrap.sh", &[]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn the_tool_alone_takes_nothing_of_the_labs() {
    let machine = Machine::whole();
    machine.user();
    for name in ["mmdebstrap", "unshare", "mount"] {
        machine.remove(name);
    }
    let output = machine.script("bootstrap.sh", &["--tool"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(output.stdout.is_empty() && output.stderr.is_empty());
    assert_says(&machine.script("bootstrap.sh", &[]), &["lacks mmdebstrap"]);
    machine.remove("cc");
    let output = machine.script("bootstrap.sh", &["--tool"]);
    assert_says(&output, &["lacks cc; install them"]);
}

/// What make would do.
fn recipe(arguments: &[&str]) -> String {
    let output = Command::new("make")
        .args(["--dry-run", "--no-print-directory"])
        .args(arguments)
        .current_dir(lab::setup::repository())
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL")
        .env_remove("KDIR")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn make_asks_for_the_labs_commands_only_where_it_needs_them() {
    let build = "cargo build --release -p exitmeter\n";
    assert_eq!(
        recipe(&["tool", "KDIR=/lib/modules/7.3.4/build"]),
        format!("scripts/bootstrap.sh --tool clang\n{build}")
    );
    assert_eq!(
        recipe(&["tool"]),
        format!("scripts/bootstrap.sh clang\n{build}")
    );
    // Whoever tries it first does not wait for clang.
    assert!(recipe(&["demo"]).starts_with("scripts/bootstrap.sh\n"));
    assert!(recipe(&["all"]).starts_with("scripts/bootstrap.sh\ncargo lab build\n"));
}

/// A browser has several names, and any will do.
#[test]
fn a_browser_is_asked_for_where_there_is_none() {
    assert!(recipe(&["test"]).starts_with("scripts/bootstrap.sh clang browser\n"));
    let machine = Machine::whole();
    machine.user();
    machine.command("newuidmap", "exit 0");
    machine.command("apt-get", "exit 1");
    machine.command("apt-cache", "echo '  Candidate: 1.85.0+dfsg3-1'");
    assert_says(
        &machine.script("bootstrap.sh", &["browser"]),
        &[
            "this machine lacks browser",
            "apt-get install chromium-headless-shell",
        ],
    );
    for name in ["chromium-headless-shell", "google-chrome"] {
        machine.command(name, "exit 0");
        let output = machine.script("bootstrap.sh", &["browser"]);
        assert!(output.status.success(), "{}", stderr(&output));
        machine.remove(name);
    }
}

#[test]
fn crates_that_are_there_are_not_asked_for() {
    let machine = Machine::whole();
    let calls = machine.path("calls");
    machine.command("cargo", &format!("echo \"$@\" >>{}", calls.display()));
    let output = machine.script("bootstrap.sh", &["--tool"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let calls = fs::read_to_string(calls).unwrap();
    assert_eq!(calls, "fetch --quiet --locked --offline\n");
}

#[test]
fn without_a_network_the_crates_are_missing_and_the_remedy_is_named() {
    let machine = Machine::whole();
    for name in ["cargo", "rustc"] {
        // Of the toolchain itself: rustup would look for its own in HOME.
        let output = Command::new("rustc").args(["--print", "sysroot"]).output();
        let sysroot = String::from_utf8(output.unwrap().stdout).unwrap();
        machine.command(name, &format!("exec {}/bin/{name} \"$@\"", sysroot.trim()));
    }
    let home = machine.path("cargo-home");
    let environment = [
        ("CARGO_HOME", home.to_str().unwrap()),
        ("CARGO_NET_RETRY", "0"),
        // Nobody is there.
        ("https_proxy", "http://127.0.0.1:9"),
        ("http_proxy", "http://127.0.0.1:9"),
    ];
    let output = machine.script_with(&environment, "bootstrap.sh", &["--tool"]);
    assert_says(
        &output,
        &[
            "the crates could not be fetched",
            "check the network",
            "proxy",
        ],
    );
}
