// SPDX-License-Identifier: GPL-2.0

//! The page of `exitmeter export` in a browser: what people see of it, on a screen and on a phone.
//!
//! Pictures of all that is looked at are in target/tmp/page afterwards.
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "export")]

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use self::{browser::Browser, server::Server};

mod browser;
mod host;
mod server;

/// Two VMs that run, and one that is gone: see src/meter/tests/snapshot.rs.
const SAVED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.3.bin"
);

/// A name that a VM's owner can give it.
const HOSTILE: &str = "<script>alert(1)</script>";

/// A size of a window, what it is called, and whether it is one of a phone.
const WINDOWS: [(&str, (u32, u32), bool); 2] =
    [("screen", (1280, 800), false), ("phone", (400, 800), true)];

/// What a page has, as the browser has laid it out; `null` while it is still read.
const LOOK: &str = r#"(() => {
    if (document.readyState !== "complete") return null;
    const box = (element) => element.getBoundingClientRect();
    // A hair of a pixel is none that anybody sees.
    const apart = (a, b) => a.right <= b.left + 0.5 || b.right <= a.left + 0.5 || a.bottom <= b.top + 0.5 || b.bottom <= a.top + 0.5;
    const faults = [];
    const svgs = [...document.querySelectorAll("svg")];
    for (const svg of svgs) {
        const name = svg.querySelector("title").textContent;
        const whole = box(svg);
        if (!(whole.width > 0 && whole.height > 0)) faults.push(`${name} is empty`);
        const texts = [...svg.querySelectorAll("text")];
        if (texts.length === 0) faults.push(`${name} has no text`);
        texts.forEach((text, place) => {
            const [own, words] = [box(text), text.textContent];
            if (!(own.width > 0 && own.height >= 10)) faults.push(`${name}: '${words}' is ${own.height} pixels high`);
            if (own.left < whole.left || own.right > whole.right || own.top < whole.top || own.bottom > whole.bottom)
                faults.push(`${name}: '${words}' is cut off`);
            for (const other of texts.slice(place + 1))
                if (!apart(own, box(other))) faults.push(`${name}: '${words}' lies over '${other.textContent}'`);
        });
    }
    for (const row of document.querySelectorAll("table.reasons tr"))
        if (box(row).height > 30) faults.push(`'${row.textContent}' takes more than a line`);
    const lines = (table) => [...document.querySelectorAll(`${table} tr`)].map(
        (row) => [...row.children].map((cell) => cell.textContent));
    return {
        faults, svgs: svgs.length, vms: lines("table.vms"), reasons: lines("table.reasons"),
        room: window.innerWidth, taken: document.documentElement.scrollWidth,
        text: document.body.innerText,
    };
})()"#;

/// Return the folder of the pictures.
fn pictures() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn url(server: &Server) -> String {
    format!("http://{}/", server.address)
}

/// Return which events tell of what a page must not do: ask for anything besides itself, complain, or run scripts.
fn complaints<'a>(events: &'a [Value], url: &str) -> Vec<&'a Value> {
    let is_one = |event: &&Value| {
        let of = &event["params"];
        match event["method"].as_str().unwrap() {
            "Network.requestWillBeSent" => of["request"]["url"] != url,
            "Network.responseReceived" => of["response"]["status"] != 200,
            "Runtime.consoleAPICalled"
            | "Runtime.exceptionThrown"
            | "Log.entryAdded"
            | "Page.javascriptDialogOpening"
            | "Network.loadingFailed" => true,
            _ => false,
        }
    };
    events.iter().filter(is_one).collect()
}

/// Fail for complaints, and where the page was not asked for.
fn nothing_else(events: &[Value], url: &str) {
    let complaints = complaints(events, url);
    assert!(complaints.is_empty(), "{complaints:?}");
    let is_request = |event: &Value| event["method"] == "Network.requestWillBeSent";
    assert!(events.iter().any(is_request), "{events:?}");
}

/// Return what a page has that is opened, once nothing is wrong with it.
fn look(browser: &mut Browser, url: &str) -> Value {
    let events = browser.open(url);
    nothing_else(&events, url);
    seen(browser)
}

/// Return what the page has that is open.
fn seen(browser: &mut Browser) -> Value {
    loop {
        // While it reads itself again there is none.
        let seen = browser.value(LOOK);
        if !seen.is_null() {
            assert_eq!(seen["faults"], serde_json::json!([]));
            assert!(
                seen["taken"].as_u64() <= seen["room"].as_u64(),
                "{} pixels wide in a window of {}",
                seen["taken"],
                seen["room"]
            );
            return seen;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Look at a page in each window.
fn in_each_window(name: &str, server: &Server, check: impl Fn(&Value)) {
    let mut browser = Browser::start();
    for (window, size, is_phone) in WINDOWS {
        browser.size(size, is_phone);
        let seen = look(&mut browser, &url(server));
        browser.screenshot(&pictures().join(format!("{name}-{window}.png")));
        check(&seen);
    }
}

/// Return the column of a table that has a title.
fn column<'a>(table: &'a Value, title: &str) -> Vec<&'a str> {
    let lines = table.as_array().unwrap();
    let titles = lines[0].as_array().unwrap();
    let place = titles.iter().position(|cell| cell == title).unwrap();
    let cells = lines[1..].iter().map(|line| line[place].as_str().unwrap());
    cells.collect()
}

/// A host of 30 VMs that is read again and again.
struct Busy {
    folder: TempDir,
    server: Server,
}

impl Busy {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("snapshot");
        Self::write(&path, 0, 30);
        let server = Server::start(&["--input", path.to_str().unwrap()]);
        Self { folder, server }
    }

    /// Write what it has in its so-manieth reading.
    fn write(path: &Path, reading: u64, vms: u64) {
        let idle = host::lived(40 + 10 * reading);
        let busy = host::lived(200 + 1500 * reading + 700 * (reading % 2));
        let vm = |number| host::Vm {
            number,
            name: match number {
                0 => "web-frontend-of-the-shop-in-europe-0001.example".to_owned(),
                number => format!("db-{number}"),
            },
            vcpus: 1 + number as u32 % 4,
            lived: if number < 3 { &busy } else { &idle },
        };
        let now = (25 + 5 * reading) * host::SECOND;
        host::write(path, now, &(0..vms).map(vm).collect::<Vec<_>>());
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("snapshot")
    }

    /// Let the page see some readings.
    fn live(&self) {
        for reading in 0..5 {
            Self::write(&self.path(), reading, 30);
            self.server.ask("GET /");
            // What is younger than a second is shown again.
            thread::sleep(Duration::from_millis(1100));
        }
    }
}

#[test]
fn a_busy_host_is_shown_whole() {
    let host = Busy::new();
    host.live();
    in_each_window("busy", &host.server, |seen| {
        assert_eq!(seen["svgs"], 3);
        let vms = column(&seen["vms"], "VM");
        assert_eq!(vms.len(), 20);
        // The three busy ones lead.
        for name in [
            "web-frontend-of-the-shop-in-europe-0001.example",
            "db-1",
            "db-2",
        ] {
            assert!(vms[..3].contains(&name), "{vms:?}");
        }
        let rates = column(&seen["vms"], "exits/s");
        assert!(!rates.contains(&"-"), "{rates:?}");
        assert_eq!(column(&seen["reasons"], "reason").len(), 20);
        let text = seen["text"].as_str().unwrap();
        assert!(text.contains("VMs, 20 of 30"), "{text}");
    });
}

#[test]
fn a_host_that_is_seen_for_the_first_time_is_shown_whole() {
    let server = Server::start(&["--input", SAVED]);
    in_each_window("first", &server, |seen| {
        assert_eq!(seen["svgs"], 3);
        assert_eq!(column(&seen["vms"], "VM"), ["kvm-1234", "kvm-1300"]);
        let reasons = column(&seen["reasons"], "reason");
        assert!(reasons.contains(&"EXTERNAL_INTERRUPT"), "{reasons:?}");
    });
}

#[test]
fn a_host_without_vms_says_so() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("snapshot");
    host::write(&path, 25 * host::SECOND, &[]);
    let server = Server::start(&["--input", path.to_str().unwrap()]);
    in_each_window("none", &server, |seen| {
        let text = seen["text"].as_str().unwrap();
        assert!(text.contains("No VM runs"), "{text}");
        assert_eq!(seen["svgs"], 0);
    });
}

#[test]
fn a_host_without_a_meter_says_why() {
    let server = Server::start(&["--input", "/nowhere"]);
    in_each_window("error", &server, |seen| {
        let text = seen["text"].as_str().unwrap();
        assert!(text.contains("cannot read /nowhere"), "{text}");
    });
}

#[test]
fn a_name_that_is_a_script_is_text() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("snapshot");
    let vm = host::Vm {
        number: 1,
        name: HOSTILE.to_owned(),
        vcpus: 1,
        lived: &host::lived(200),
    };
    host::write(&path, 25 * host::SECOND, &[vm]);
    let server = Server::start(&["--input", path.to_str().unwrap()]);
    in_each_window("hostile", &server, |seen| {
        assert_eq!(column(&seen["vms"], "VM"), [HOSTILE]);
    });
}

#[test]
fn the_page_reads_itself_again() {
    let host = Busy::new();
    let mut browser = Browser::start();
    let url = url(&host.server);
    let first = look(&mut browser, &url);
    assert_eq!(column(&first["vms"], "VM").len(), 20);
    Busy::write(&host.path(), 1, 2);
    // Nobody does anything. The first load may have begun before the file was there.
    for _ in 0..2 {
        nothing_else(&browser.loaded(), &url);
    }
    let now = seen(&mut browser);
    let mut vms = column(&now["vms"], "VM");
    vms.sort_unstable();
    assert_eq!(
        vms,
        ["db-1", "web-frontend-of-the-shop-in-europe-0001.example"]
    );
}

#[test]
fn a_page_with_faults_is_caught() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("bad.html");
    let page = r#"<!DOCTYPE html><body>
        <script>alert(1); console.error("two"); three()</script>
        <img src="http://127.0.0.1:9/four"><div style="width: 3000px">wide</div>
        <svg width="100" height="50"><title>five</title>
        <text x="9" y="20">over</text><text x="11" y="22">under</text><text x="80" y="40">cut off</text>
        <text x="9" y="40" font-size="3">small</text></svg>
        <svg width="0" height="0"><title>six</title></svg>
        <table class="reasons"><tr><td>a<br>b</td></tr></table>"#;
    fs::write(&path, page).unwrap();
    let url = format!("file://{}", path.display());
    let mut browser = Browser::start();
    browser.size((400, 800), false);
    let events = browser.open(&url);
    let complaints = complaints(&events, &url);
    for method in [
        "Page.javascriptDialogOpening",
        "Runtime.consoleAPICalled",
        "Runtime.exceptionThrown",
        "Network.requestWillBeSent",
    ] {
        let is_told = complaints.iter().any(|event| event["method"] == method);
        assert!(is_told, "{method}: {events:?}");
    }
    let seen = browser.value(LOOK);
    assert!(seen["taken"].as_u64() > seen["room"].as_u64(), "{seen}");
    let faults = seen["faults"].to_string();
    for fault in [
        "'over' lies over 'under'",
        "'cut off' is cut off",
        "'small' is",
        "six is empty",
        "'ab' takes more than a line",
    ] {
        assert!(faults.contains(fault), "{fault}: {faults}");
    }
}
