// SPDX-License-Identifier: GPL-2.0

//! A headless Chromium, driven by its DevTools protocol.
//!
//! The protocol is JSON between zero bytes on a pipe, so this needs no further crates. The crates
//! that have all of it as types (headless_chrome, chromiumoxide) compile for four minutes, and the
//! tests use eleven of its methods.

use std::{
    collections::VecDeque,
    env,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use base64::{prelude::BASE64_STANDARD, Engine as _};
use serde_json::{json, Value};
use tempfile::TempDir;

/// Names of the program in Debian and elsewhere. scripts/bootstrap.sh looks for the same.
const NAMES: [&str; 4] = [
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
];

/// Time limit of a call. Nothing takes as long, even on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A browser with one page. It ends with the test.
pub struct Browser {
    process: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    /// Events that have not been taken yet.
    events: VecDeque<Value>,
    session: String,
    calls: u64,
    profile: TempDir,
}

impl Browser {
    /// Start a browser with an empty page.
    pub fn start() -> Self {
        let program = program();
        let profile = TempDir::new().unwrap();
        // The browser wants the pipe at 3 and 4, where std cannot put it.
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >&2", "sh"]);
        command.arg(&program).args([
            "--headless",
            "--remote-debugging-pipe",
            // Needed for root. The browser shows only pages of this test.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]);
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        let log = File::create(profile.path().join("log")).unwrap();
        let spawned = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn();
        let mut process = spawned.unwrap();
        let to = process.stdin.take().unwrap();
        let mut pipe = BufReader::new(process.stdout.take().unwrap());
        let (told, from) = mpsc::channel();
        thread::spawn(move || loop {
            let mut message = Vec::new();
            match pipe.read_until(0, &mut message) {
                Ok(1..) if message.pop() == Some(0) => {}
                _ => return,
            }
            if told
                .send(serde_json::from_slice(&message).unwrap())
                .is_err()
            {
                return;
            }
        });
        let mut browser = Self {
            process,
            to,
            from,
            events: VecDeque::new(),
            session: String::new(),
            calls: 0,
            profile,
        };
        browser.open_page();
        browser
    }

    fn open_page(&mut self) {
        let target = self.call("Target.createTarget", json!({"url": "about:blank"}));
        let target = json!({"targetId": target["targetId"], "flatten": true});
        let attached = self.call("Target.attachToTarget", target);
        self.session = attached["sessionId"].as_str().unwrap().to_owned();
        for part in ["Page", "Runtime", "Log", "Network"] {
            self.call(&format!("{part}.enable"), json!({}));
        }
    }

    /// Call a method, and return its result.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.calls += 1;
        let mut message = json!({"id": self.calls, "method": method, "params": parameters});
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        if write!(self.to, "{message}\0").is_err() {
            panic!("{method}: {}", self.log());
        }
        loop {
            let answer = self.next(method);
            if answer["id"] == self.calls {
                assert_eq!(answer["error"], Value::Null, "{method}: {answer}");
                return answer["result"].clone();
            }
            self.events.push_back(answer);
        }
    }

    /// Return the next message, and fail if none comes. `wanted` is for the error.
    fn next(&mut self, wanted: &str) -> Value {
        self.from
            .recv_timeout(TIMEOUT)
            .unwrap_or_else(|error| panic!("{wanted}: {error}: {}", self.log()))
    }

    /// Return the standard error of the browser.
    fn log(&self) -> String {
        fs::read_to_string(self.profile.path().join("log")).unwrap_or_default()
    }

    /// Wait for the end of a load, and return all events up to it. A page that reloads itself does
    /// so each time.
    pub fn loaded(&mut self) -> Vec<Value> {
        let mut before = Vec::new();
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.next("Page.loadEventFired"),
            };
            if event["method"] == "Page.javascriptDialogOpening" {
                // A dialog of the page waits for an answer.
                self.call("Page.handleJavaScriptDialog", json!({"accept": true}));
            }
            let is_end = event["method"] == "Page.loadEventFired";
            before.push(event);
            if is_end {
                return before;
            }
        }
    }

    /// Set the size of the window for pages opened later.
    pub fn size(&mut self, (width, height): (u32, u32), is_phone: bool) {
        let size =
            json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone});
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    /// Open a page, and return the events up to its load.
    pub fn open(&mut self, url: &str) -> Vec<Value> {
        self.events.clear();
        let opened = self.call("Page.navigate", json!({"url": url}));
        assert_eq!(opened["errorText"], Value::Null, "{url}: {opened}");
        self.loaded()
    }

    /// Return the value of a JavaScript expression, evaluated beside the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let asked = json!({"expression": expression, "returnByValue": true});
        let answer = self.call("Runtime.evaluate", asked);
        assert_eq!(answer["exceptionDetails"], Value::Null, "{answer}");
        answer["result"]["value"].clone()
    }

    /// Write a picture of the whole page.
    pub fn screenshot(&mut self, path: &Path) {
        let asked = json!({"captureBeyondViewport": true});
        let taken = self.call("Page.captureScreenshot", asked);
        let bytes = BASE64_STANDARD.decode(taken["data"].as_str().unwrap());
        fs::write(path, bytes.unwrap()).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Let its processes end properly, so that the folder can be removed.
        let _ = write!(self.to, "{{\"id\":0,\"method\":\"Browser.close\"}}\0");
        for _ in 0..100 {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Return the browser's program.
fn program() -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<_> = env::split_paths(&path).collect();
    let found = NAMES.iter().find_map(|name| {
        let mut programs = folders.iter().map(|folder| folder.join(name));
        programs.find(|program| program.exists())
    });
    found.unwrap_or_else(|| {
        panic!(
            "this test takes a Chromium, and none of {} is in the PATH: as root, run scripts/bootstrap.sh browser, or \
             apt-get install chromium-headless-shell",
            NAMES.join(", ")
        )
    })
}
