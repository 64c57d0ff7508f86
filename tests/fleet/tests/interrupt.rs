// SPDX-License-Identifier: GPL-2.0

//! Tests that a signal ends the fleet in order: its temporary folder and all its processes are gone.
//!
//! The programs that the fleet runs are scripts of this test, so it needs no network. They run in a mount namespace, as
//! Debian's programs do, which needs root or user namespaces.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{kill_process, kill_process_group, Pid, Signal};
use tempfile::TempDir;

const SIGNALS: [Signal; 3] = [Signal::INT, Signal::TERM, Signal::HUP];

/// Time limit for a step of the fleet. It is shorter than the fleet's own waits, of 30 s and more.
const LIMIT: Duration = Duration::from_secs(20);

/// Script of a program that runs until it is killed. It first writes its arguments to a file beside itself.
const PROGRAM: &str = "#!/bin/sh
echo \"$*\" >\"$0.new\" && mv \"$0.new\" \"$0.arguments\"
exec sleep 1000
";

/// A running fleet, in folders of its own.
struct Fleet {
    process: Child,
    folder: TempDir,
}

impl Fleet {
    /// Start a fleet. With `fetched`, Debian's programs are already in its cache.
    fn start(arguments: &[&str], fetched: bool) -> Self {
        let folder = TempDir::new().unwrap();
        let place = |name: &str| folder.path().join(name);
        for folder in ["tmp", "bin", "cache/exitmeter/prometheus/usr/bin"] {
            fs::create_dir_all(place(folder)).unwrap();
        }
        for script in [
            "bin/apt-get",
            "bin/dpkg-deb",
            "cache/exitmeter/prometheus/usr/bin/prometheus",
        ] {
            fs::write(place(script), PROGRAM).unwrap();
            fs::set_permissions(place(script), fs::Permissions::from_mode(0o755)).unwrap();
        }
        if fetched {
            let cache = place("cache/exitmeter/prometheus");
            fs::create_dir_all(cache.join("usr/share")).unwrap();
            for marker in [".done", ".done-pages"] {
                fs::write(cache.join(marker), "").unwrap();
            }
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let path = [place("bin")].into_iter().chain(env::split_paths(&path));
        // A test may run where signals are ignored, and its children inherit that.
        let mut command = Command::new("env");
        let process = command
            .args(["--default-signal", env!("CARGO_BIN_EXE_fleet")])
            .args(arguments)
            .env("PATH", env::join_paths(path).unwrap())
            .env("TMPDIR", place("tmp"))
            .env("XDG_CACHE_HOME", place("cache"))
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { process, folder }
    }

    /// Wait until the fleet runs a program. Return the program's arguments.
    fn arguments_of(&self, program: &str) -> String {
        let file = self.folder.path().join(format!("{program}.arguments"));
        let file = wait_for("the program", || fs::read_to_string(&file).ok());
        assert_eq!(files(&self.folder.path().join("tmp")).len(), 1);
        file
    }

    /// Wait until the fleet runs Prometheus. Return a listener at Prometheus's address.
    fn prometheus(&self) -> TcpListener {
        let arguments = self.arguments_of("cache/exitmeter/prometheus/usr/bin/prometheus");
        let address = arguments
            .split_whitespace()
            .find_map(|argument| argument.strip_prefix("--web.listen-address="));
        TcpListener::bind(address.unwrap()).unwrap()
    }

    /// Send a signal as a terminal or a user sends it. Check that the fleet ends soon with `status` and leaves nothing.
    fn ends_by(mut self, signal: Signal, status: i32) {
        let pid = Pid::from_child(&self.process);
        if signal == Signal::INT {
            // Ctrl-C reaches all processes of the terminal.
            kill_process_group(pid, signal).unwrap();
        } else {
            kill_process(pid, signal).unwrap();
        }
        let ended = wait_for("the end", || self.process.try_wait().unwrap());
        let mut said = String::new();
        let stderr = self.process.stderr.as_mut().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert_eq!(ended.code(), Some(status), "{signal:?}: {said}");
        let expected = match status {
            0 => String::new(),
            _ => format!("fleet: stopped by signal {}\n", signal.as_raw()),
        };
        // Bash reports a program that was killed together with it.
        let said = said.trim_start_matches("Terminated\n");
        assert_eq!(said, expected);
        wait_for("the end of all processes", || {
            self.processes().is_empty().then_some(())
        });
        for folder in ["tmp", "cache/exitmeter/prometheus"] {
            let left = files(&self.folder.path().join(folder));
            let known = |path: &PathBuf| {
                [".done", ".done-pages", ".lock", "usr"].contains(&name(path).as_str())
            };
            assert!(left.iter().all(known), "{signal:?}: {left:?}");
        }
    }

    /// Return the processes that have this fleet's folder in their environment: the fleet and its children.
    fn processes(&self) -> Vec<PathBuf> {
        let folder = format!("TMPDIR={}/tmp\0", self.folder.path().display());
        let mut processes = files(Path::new("/proc"));
        processes.retain(|process| {
            // A zombie has no environment.
            let environment = fs::read(process.join("environ")).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains(&folder)
        });
        processes
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// Wait until `found` returns a value.
#[track_caller]
fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(begun.elapsed() < LIMIT, "{what} takes too long");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_signal_while_programs_are_fetched_leaves_nothing() {
    for signal in SIGNALS {
        let fleet = Fleet::start(&["--check"], false);
        fleet.arguments_of("bin/apt-get");
        fleet.ends_by(signal, 128 + signal.as_raw());
    }
}

#[test]
fn a_signal_while_a_server_starts_leaves_nothing() {
    for signal in SIGNALS {
        let fleet = Fleet::start(&["--check"], true);
        // The server takes the fleet's request and never answers it.
        let _listener = fleet.prometheus();
        thread::sleep(Duration::from_millis(200));
        fleet.ends_by(signal, 128 + signal.as_raw());
    }
}

/// Answer requests of the fleet with success until it goes on to its next wait.
fn answer(listener: TcpListener) {
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.read(&mut [0; 1 << 12]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhealthy");
        }
    });
    thread::sleep(Duration::from_millis(500));
}

#[test]
fn a_signal_during_a_check_leaves_nothing() {
    for signal in SIGNALS {
        let fleet = Fleet::start(&["--check"], true);
        answer(fleet.prometheus());
        fleet.ends_by(signal, 128 + signal.as_raw());
    }
}

#[test]
fn a_signal_during_a_measurement_leaves_nothing() {
    let fleet = Fleet::start(&["--measure", "1"], true);
    answer(fleet.prometheus());
    fleet.ends_by(Signal::TERM, 143);
}

#[test]
fn a_signal_is_the_usual_end_of_a_fleet_that_is_watched() {
    for signal in SIGNALS {
        let fleet = Fleet::start(&[], true);
        answer(fleet.prometheus());
        fleet.ends_by(signal, 0);
    }
}
