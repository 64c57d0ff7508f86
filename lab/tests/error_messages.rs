// SPDX-License-Identifier: GPL-2.0

//! Tests of the error messages of the scripts and the lab on a machine that lacks something: one sentence that names what
//! is missing and the remedy.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    env, fs,
    os::unix::fs::{symlink, PermissionsExt as _},
    path::PathBuf,
    process::{Command, Output},
};

use tempfile::TempDir;

/// Commands that every machine has, and that the scripts do not check for.
const BASICS: &[&str] = &[
    "bash", "cat", "cut", "dirname", "find", "flock", "grep", "head", "mkdir", "mktemp", "mv",
    "rm", "sed", "sh", "sort", "tail", "tar", "touch", "tr",
];

/// A simulated machine with the basic commands, some free space, and the things that a test adds. The user is root.
struct FakeMachine(TempDir);

impl FakeMachine {
    fn new() -> Self {
        let machine = Self(TempDir::new().unwrap());
        for folder in ["bin", "root/usr/bin", "out/usr/bin", "kernel"] {
            fs::create_dir_all(machine.path(folder)).unwrap();
        }
        for name in BASICS {
            machine.real_command(name);
        }
        // The scripts look for this file in the root, which is the result of root.sh, and for the next in a kernel.
        for root in ["root", "out"] {
            machine.write(&format!("{root}/usr/bin/env"), "#!/bin/sh\n");
        }
        machine.write("kernel/release", "7.3.4+deb13-amd64\n");
        machine.command("id", "echo 0");
        machine.command("df", "echo Avail; echo 100000");
        machine
    }

    /// Return a machine with all commands that scripts/bootstrap.sh looks for in the PATH.
    fn complete() -> Self {
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

    /// Add a command that runs this script.
    fn command(&self, name: &str, script: &str) {
        self.remove(name);
        self.write(&format!("bin/{name}"), &format!("#!/bin/sh\n{script}\n"));
    }

    /// Add a command of the machine that runs the tests.
    fn real_command(&self, name: &str) {
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

    /// Make the user one who is not root.
    fn drop_root(&self) {
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

    /// Run the script of a step of the set-up as the engine does.
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

    /// Call a function of scripts/common.sh.
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

/// Check that a script failed with one sentence that has these words, which name what is missing and the remedy.
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
fn root_that_may_not_make_namespaces_learns_of_the_capability() {
    let machine = FakeMachine::new();
    machine.command("unshare", "exit 1");
    let output = machine.function("need_namespaces");
    assert_says(&output, &["may not make mount namespaces", "--privileged"]);
}

#[test]
fn a_user_who_cannot_make_namespaces_learns_the_reason() {
    let machine = FakeMachine::new();
    machine.drop_root();
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
    // Pretend that the user has sub-ids.
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
fn every_command_of_the_lab_checks_first_that_it_can_make_namespaces() {
    let machine = FakeMachine::new();
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
fn a_disk_that_is_too_small_is_reported() {
    let machine = FakeMachine::new();
    machine.real_command("df");
    assert_says(
        &machine.function("need_space / 999999999999"),
        &[
            "MiB free and this step needs 999999999999 MiB",
            "XDG_CACHE_HOME to a larger disk",
        ],
    );
}

#[test]
fn a_step_that_is_called_by_hand_names_the_command_to_use() {
    let machine = FakeMachine::new();
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
fn a_step_that_fails_shows_its_log_and_names_the_remedy() {
    let machine = FakeMachine::new();
    // Namespaces can be made, but commands in the root fail.
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
    let machine = FakeMachine::new();
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
fn without_a_network_old_lists_do_not_prove_that_a_kernel_is_missing() {
    let machine = FakeMachine::new();
    // The commands of kernel.sh in the root report that the lists are old.
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
    let machine = FakeMachine::complete();
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

/// A user who is not root gets the names of the packages. If Debian's Rust is too old, they are those of the newer one.
#[test]
fn a_user_learns_which_packages_to_install() {
    let machine = FakeMachine::complete();
    machine.drop_root();
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
fn for_root_missing_commands_are_installed_or_the_reason_is_named() {
    let machine = FakeMachine::complete();
    machine.remove("mmdebstrap");
    machine.real_command("env");
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
    machine.real_command("ln");
    machine.command("apt-get", &make);
    let output = machine.script("bootstrap.sh", &[]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn the_tool_alone_does_not_need_the_labs_commands() {
    let machine = FakeMachine::complete();
    machine.drop_root();
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

/// Return the commands that make would run.
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
fn make_only_requires_the_labs_commands_where_it_needs_them() {
    let build = "cargo build --release -p exitmeter\n";
    assert_eq!(
        recipe(&["tool", "KDIR=/lib/modules/7.3.4/build"]),
        format!("scripts/bootstrap.sh --tool clang\n{build}")
    );
    assert_eq!(
        recipe(&["tool"]),
        format!("scripts/bootstrap.sh clang\n{build}")
    );
    // A first `make demo` does not wait for clang.
    assert!(recipe(&["demo"]).starts_with("scripts/bootstrap.sh\n"));
    assert!(recipe(&["all"]).starts_with("scripts/bootstrap.sh\ncargo lab build\n"));
}

/// A browser has several names, and any will do.
#[test]
fn a_missing_browser_is_reported() {
    assert!(recipe(&["test"]).starts_with("scripts/bootstrap.sh clang browser\n"));
    let machine = FakeMachine::complete();
    machine.drop_root();
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
fn crates_that_are_there_are_not_fetched() {
    let machine = FakeMachine::complete();
    let calls = machine.path("calls");
    machine.command("cargo", &format!("echo \"$@\" >>{}", calls.display()));
    let output = machine.script("bootstrap.sh", &["--tool"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let calls = fs::read_to_string(calls).unwrap();
    assert_eq!(calls, "fetch --quiet --locked --offline\n");
}

#[test]
fn without_a_network_the_crates_are_missing_and_the_remedy_is_named() {
    let machine = FakeMachine::complete();
    for name in ["cargo", "rustc"] {
        // Call the toolchain's program directly: rustup would look for its toolchains in HOME.
        let output = Command::new("rustc").args(["--print", "sysroot"]).output();
        let sysroot = String::from_utf8(output.unwrap().stdout).unwrap();
        machine.command(name, &format!("exec {}/bin/{name} \"$@\"", sysroot.trim()));
    }
    let home = machine.path("cargo-home");
    let environment = [
        ("CARGO_HOME", home.to_str().unwrap()),
        ("CARGO_NET_RETRY", "0"),
        // Nothing listens there.
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
