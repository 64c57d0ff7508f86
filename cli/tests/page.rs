// SPDX-License-Identifier: GPL-2.0

//! The page of `exitmeter export` in a browser, on a screen and on a phone.
//!
//! The tests leave pictures of all pages in target/tmp/page.
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

/// Snapshot with two VMs that run and one that is gone: see src/meter/tests/snapshot.rs.
const SAVED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.3.bin"
);

/// Name that a VM's owner can give it.
const HOSTILE: &str = "<script>alert(1)</script>";

/// Windows: a name, a size, and true for a phone's.
const WINDOWS: [(&str, (u32, u32), bool); 2] =
    [("screen", (1280, 800), false), ("phone", (400, 800), true)];

/// Script that returns the page as laid out by the browser, or `null` while it is still loading.
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

/// Return the events of what a page must not do: load anything else, complain, or run scripts.
fn complaints<'a>(events: &'a [Value], url: &str) -> Vec<&'a Value> {
    let is_complaint = |event: &&Value| {
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
    events.iter().filter(is_complaint).collect()
}

/// Fail if there are complaints, or if the page was not requested.
fn assert_no_complaints(events: &[Value], url: &str) {
    let complaints = complaints(events, url);
    assert!(complaints.is_empty(), "{complaints:?}");
    let is_request = |event: &Value| event["method"] == "Network.requestWillBeSent";
    assert!(events.iter().any(is_request), "{events:?}");
}

/// Open a page, and return its contents once nothing is wrong with it.
fn contents_of(browser: &mut Browser, url: &str) -> Value {
    let events = browser.open(url);
    assert_no_complaints(&events, url);
    contents(browser)
}

/// Return the contents of the open page.
fn contents(browser: &mut Browser) -> Value {
    loop {
        // While the page reloads, there are none.
        let contents = browser.value(LOOK);
        if !contents.is_null() {
            assert_eq!(contents["faults"], serde_json::json!([]));
            assert!(
                contents["taken"].as_u64() <= contents["room"].as_u64(),
                "{} pixels wide in a window of {}",
                contents["taken"],
                contents["room"]
            );
            return contents;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Check a page in each window.
fn check_in_each_window(name: &str, server: &Server, check: impl Fn(&Value)) {
    let mut browser = Browser::start();
    for (window, size, is_phone) in WINDOWS {
        browser.size(size, is_phone);
        let contents = contents_of(&mut browser, &url(server));
        browser.screenshot(&pictures().join(format!("{name}-{window}.png")));
        check(&contents);
    }
}

/// Return the column of a table by its title.
fn column<'a>(table: &'a Value, title: &str) -> Vec<&'a str> {
    let lines = table.as_array().unwrap();
    let titles = lines[0].as_array().unwrap();
    let place = titles.iter().position(|cell| cell == title).unwrap();
    let cells = lines[1..].iter().map(|line| line[place].as_str().unwrap());
    cells.collect()
}

/// A host of 30 VMs that is read repeatedly.
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

    /// Write its snapshot for a reading.
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

    /// Let the page collect some readings.
    fn live(&self) {
        for reading in 0..5 {
            Self::write(&self.path(), reading, 30);
            self.server.ask("GET /");
            // Readings within a second are the same one.
            thread::sleep(Duration::from_millis(1100));
        }
    }
}

#[test]
fn a_busy_host_is_shown_whole() {
    let host = Busy::new();
    host.live();
    check_in_each_window("busy", &host.server, |contents| {
        assert_eq!(contents["svgs"], 3);
        let vms = column(&contents["vms"], "VM");
        assert_eq!(vms.len(), 20);
        // The three busy VMs come first.
        for name in [
            "web-frontend-of-the-shop-in-europe-0001.example",
            "db-1",
            "db-2",
        ] {
            assert!(vms[..3].contains(&name), "{vms:?}");
        }
        let rates = column(&contents["vms"], "exits/s");
        assert!(!rates.contains(&"-"), "{rates:?}");
        assert_eq!(column(&contents["reasons"], "reason").len(), 20);
        let text = contents["text"].as_str().unwrap();
        assert!(text.contains("VMs, 20 of 30"), "{text}");
    });
}

#[test]
fn a_host_that_is_seen_for_the_first_time_is_shown_whole() {
    let server = Server::start(&["--input", SAVED]);
    check_in_each_window("first", &server, |contents| {
        assert_eq!(contents["svgs"], 3);
        assert_eq!(column(&contents["vms"], "VM"), ["kvm-1234", "kvm-1300"]);
        let reasons = column(&contents["reasons"], "reason");
        assert!(reasons.contains(&"EXTERNAL_INTERRUPT"), "{reasons:?}");
    });
}

#[test]
fn a_host_without_vms_says_so() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("snapshot");
    host::write(&path, 25 * host::SECOND, &[]);
    let server = Server::start(&["--input", path.to_str().unwrap()]);
    check_in_each_window("none", &server, |contents| {
        let text = contents["text"].as_str().unwrap();
        assert!(text.contains("No VM runs"), "{text}");
        assert_eq!(contents["svgs"], 0);
    });
}

#[test]
fn a_host_without_a_meter_says_why() {
    let server = Server::start(&["--input", "/nowhere"]);
    check_in_each_window("error", &server, |contents| {
        let text = contents["text"].as_str().unwrap();
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
    check_in_each_window("hostile", &server, |contents| {
        assert_eq!(column(&contents["vms"], "VM"), [HOSTILE]);
    });
}

#[test]
fn the_page_reads_itself_again() {
    let host = Busy::new();
    let mut browser = Browser::start();
    let url = url(&host.server);
    let first = contents_of(&mut browser, &url);
    assert_eq!(column(&first["vms"], "VM").len(), 20);
    Busy::write(&host.path(), 1, 2);
    // Only wait. The first load may have begun before the file existed.
    for _ in 0..2 {
        assert_no_complaints(&browser.loaded(), &url);
    }
    let now = contents(&mut browser);
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
    let contents = browser.value(LOOK);
    assert!(
        contents["taken"].as_u64() > contents["room"].as_u64(),
        "{contents}"
    );
    let faults = contents["faults"].to_string();
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
