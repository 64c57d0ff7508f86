// SPDX-License-Identifier: GPL-2.0

//! `exitmeter export`: its numbers, its outputs, and clients that misbehave.
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "export")]

use std::{
    collections::BTreeMap,
    fs,
    io::{ErrorKind, Write as _},
    net::TcpListener,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use self::{
    server::Server,
    tool::{exitmeter, failed, succeeded},
};

mod host;
mod server;
mod tool;

/// Snapshot with two VMs that run and one that is gone: see src/meter/tests/snapshot.rs.
const SAVED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.3.bin"
);

/// Series of a VM and of a host besides those of reasons.
const OF_VM: usize = 11;
const OF_HOST: usize = 15;

/// Return the text of a scrape.
fn metrics(server: &Server) -> String {
    let (head, body) = server.ask("GET /metrics");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    body
}

/// Return the samples of a scrape.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let samples = lines.map(|line| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    });
    samples.collect()
}

/// Return the sum of the samples with a name and a label.
fn sum(samples: &BTreeMap<String, f64>, name: &str, label: &str) -> f64 {
    let of_name = samples
        .iter()
        .filter(|(sample, _)| sample.starts_with(&format!("{name}{{")) && sample.contains(label));
    of_name.map(|(_, value)| value).sum()
}

fn file(folder: &Path, arguments: &[&str]) -> String {
    let folder_name = folder.to_str().unwrap();
    let given = ["export", "--textfile", folder_name, "--input"];
    let said = exitmeter(&[&given, arguments].concat()).output().unwrap();
    assert_eq!(succeeded(said), "");
    fs::read_to_string(folder.join("exitmeter.prom")).unwrap()
}

#[test]
fn the_numbers_are_those_of_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let found = samples(&file(folder.path(), &[SAVED]));
    let report = exitmeter(&["report", "--json", "--input", SAVED])
        .output()
        .unwrap();
    let report: Value = serde_json::from_str(&succeeded(report)).unwrap();
    let khz = report["host"]["tsc_khz"].as_f64().unwrap();
    let mut exits = report["departed"]["exits"].as_f64().unwrap();
    for (vm, label) in report["vms"]
        .as_array()
        .unwrap()
        .iter()
        .zip(["kvm-1234", "kvm-1300"])
    {
        let vm_label = format!("vm=\"{label}\"");
        exits += vm["exits"].as_f64().unwrap();
        assert_eq!(
            sum(&found, "exitmeter_exits_total", &vm_label),
            vm["exits"].as_f64().unwrap()
        );
        for reason in vm["reasons"].as_array().unwrap() {
            let name = reason["name"].as_str().or(reason["kind"].as_str()).unwrap();
            let labels = format!("{{vm=\"{label}\",reason=\"{name}\"}}");
            let exits = found[&format!("exitmeter_exits_total{labels}")];
            assert_eq!(exits, reason["exits"].as_f64().unwrap(), "{labels}");
        }
        // The phases cover all the time up to the snapshot, including the present phase.
        let vcpus = vm["vcpus"].as_array().unwrap().iter();
        let life = vcpus.map(|vcpu| {
            let now = report["host"]["snapshot_tsc"].as_f64().unwrap();
            now - vcpu["first_tsc"].as_f64().unwrap()
        });
        let life = life.sum::<f64>() / khz / 1000.0;
        let phases = sum(&found, "exitmeter_phase_seconds_total", &vm_label);
        assert!((phases - life).abs() < 1e-6, "{phases} {life}");
    }
    assert_eq!(sum(&found, "exitmeter_host_exits_total", ""), exits);
    let of =
        |phase: &str| found[&format!("exitmeter_host_phase_seconds_total{{phase=\"{phase}\"}}")];
    let kernel = sum(&found, "exitmeter_host_kernel_seconds_total", "");
    assert!((kernel - of("kernel")).abs() < 1e-9);
    assert_eq!(found["exitmeter_unmetered_vcpus_total"], 1.0);
    assert_eq!(found["exitmeter_vcpus"], 3.0);
    assert_eq!(found["exitmeter_up"], 1.0);
}

#[test]
fn bounds_count_only_exits_surely_below_them() {
    let folder = tempfile::tempdir().unwrap();
    let found = samples(&file(folder.path(), &[SAVED]));
    let at = |reason: &str, bound: &str| {
        let name = "exitmeter_host_exit_duration_seconds_bucket";
        found[&format!("{name}{{reason=\"{reason}\",le=\"{bound}\"}}")]
    };
    // 5191 exits of 2100 ticks at 2.4 GHz: 0.875 us, in the bucket from 2048 to 3072 ticks, which is 1.28 us.
    assert_eq!(at("EXTERNAL_INTERRUPT", "0.000001"), 0.0);
    assert_eq!(at("EXTERNAL_INTERRUPT", "0.000002"), 5191.0);
    // 10 of HLT's took 41000 ticks: 17.1 us, in the bucket from 32768 to 49152 ticks, which is 20.5 us.
    assert_eq!(at("HLT", "0.000016"), 700.0);
    assert_eq!(at("HLT", "0.000032"), 710.0);
    assert_eq!(at("HLT", "+Inf"), 710.0);
}

#[test]
fn labels_with_many_series_are_optional() {
    let folder = tempfile::tempdir().unwrap();
    let usual = file(folder.path(), &[SAVED]);
    assert!(
        !usual.contains("vcpu=") && !usual.contains("exitmeter_exit_duration"),
        "{usual}"
    );
    // Series that a VM adds, by the formula of docs/fleet.md: for each reason 2, or 3 with time of the
    // VMM, and some more.
    let of_one = samples(&usual)
        .into_keys()
        .filter(|name| name.contains("vm=\"kvm-1234\""));
    assert_eq!(of_one.count(), OF_VM + 2 * 9 + 2);
    let help = succeeded(exitmeter(&["help", "export"]).output().unwrap());
    let of_20 = format!("a VM with 20 reasons has {} series", OF_VM + 2 * 20 + 1);
    let help: Vec<_> = help.split_whitespace().collect();
    assert!(help.join(" ").contains(&of_20), "{help:?}");
    let all = samples(&file(folder.path(), &[SAVED, "--vcpus", "--histograms"]));
    let exits = "exitmeter_vcpu_exits_total{vm=\"kvm-1234\",vcpu=\"1\"}";
    assert_eq!(all[exits], 530.0);
    let count = "exitmeter_exit_duration_seconds_count{vm=\"kvm-1234\",reason=\"HLT\"}";
    assert_eq!(all[count], 710.0);
}

#[test]
fn details_are_those_of_why() {
    let folder = tempfile::tempdir().unwrap();
    let found = samples(&file(folder.path(), &[SAVED, "--details", "1000"]));
    assert_eq!(found["exitmeter_detailed_vcpus"], 2.0);
    let why = exitmeter(&["why", "--json", "--limit", "1000", SAVED])
        .output()
        .unwrap();
    let why: Value = serde_json::from_str(&succeeded(why)).unwrap();
    let khz = why["host"]["tsc_khz"].as_f64().unwrap();
    let mut due = BTreeMap::new();
    for vm in why["vms"].as_array().unwrap() {
        for group in vm["details"].as_array().unwrap() {
            let others = [(Value::from("others"), &group["others"])];
            let rows = group["rows"].as_array().unwrap().iter().map(|row| {
                let nested = if row["nested"] == true {
                    ", nested"
                } else {
                    ""
                };
                let words = format!("{}{nested}", row["words"].as_str().unwrap());
                (Value::from(words), row)
            });
            for (words, counts) in rows.chain(others) {
                let (vm, words) = (vm["name"].as_str().unwrap(), words.as_str().unwrap());
                let reason = match group["kind"].as_str().unwrap() {
                    "code" => group["name"].as_str().unwrap(),
                    kind => kind,
                };
                let labels = format!("{{vm=\"{vm}\",reason=\"{reason}\",detail=\"{words}\"}}");
                let seconds = |of: &str| counts[of].as_f64().unwrap_or_default() / (khz * 1000.0);
                let exits = counts["exits"].as_f64().unwrap();
                due.insert(format!("exitmeter_detail_exits_total{labels}"), exits);
                let kernel = format!("exitmeter_detail_kernel_seconds_total{labels}");
                due.insert(kernel, seconds("kernel"));
                let user = format!("exitmeter_detail_user_seconds_total{labels}");
                due.insert(user, seconds("user"));
            }
        }
    }
    due.retain(|_, value| *value != 0.0);
    let mut details = found.clone();
    details.retain(|name, _| name.starts_with("exitmeter_detail_"));
    assert!(due.len() > 30, "{due:?}");
    assert_eq!(details, due);
    // Details are absent unless asked for, and not more than asked for.
    let usual = samples(&file(folder.path(), &[SAVED]));
    assert!(usual.keys().all(|name| !name.contains("detail")));
    let few = samples(&file(folder.path(), &[SAVED, "--details", "3"]));
    let few = few.keys().filter(|name| {
        name.starts_with("exitmeter_detail_exits_total{vm=\"kvm-1234\"")
            && !name.contains("detail=\"others\"")
    });
    assert_eq!(few.count(), 3);
}

#[test]
fn each_format_is_served_on_request() {
    let server = Server::start(&["--created", "--input", SAVED]);
    let (head, text) = server.ask("GET /metrics");
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(!text.contains("_created") && !text.contains("# EOF"));
    let (head, open) = server.ask(
        "GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text;version=1.0.0\r\nX: ",
    );
    assert!(
        head.contains("content-type: application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    assert!(open.ends_with("# EOF\n"));
    assert!(open.contains("\n# TYPE exitmeter_exits counter\n"));
    assert!(open.contains("\nexitmeter_exits_created{vm=\"kvm-1234\",reason=\"CPUID\"} "));
    // The samples are equal except for the duration and the meter's start by the clock.
    let same = |text: &str| {
        let mut samples = samples(text);
        samples.retain(|name, _| !name.contains("_created") && !name.contains("_time_seconds"));
        samples.remove("exitmeter_read_duration_seconds");
        samples
    };
    assert_eq!(same(&text), same(&open));
}

#[test]
fn missing_pages_and_taken_ports_are_errors() {
    let server = Server::start(&["--input", SAVED]);
    let (head, body) = server.ask("GET /nothing");
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    assert_eq!(body, "there is /metrics, and / for people\n");
    let (head, _) = server.ask("POST /metrics");
    assert!(
        head.starts_with("HTTP/1.1 405") && head.contains("allow: GET, HEAD"),
        "{head}"
    );
    let (head, body) = server.ask("HEAD /metrics");
    assert!(
        head.starts_with("HTTP/1.1 200") && body.is_empty(),
        "{head}"
    );
    let taken = exitmeter(&["export", "--listen", &server.address])
        .output()
        .unwrap();
    let (status, said) = failed(taken);
    assert_eq!(status, Some(1));
    assert!(
        said.contains("cannot listen at") && said.contains("--listen"),
        "{said}"
    );
}

#[test]
fn without_a_meter_only_up_is_served() {
    let server = Server::start(&["--input", "/nowhere"]);
    let found = samples(&metrics(&server));
    assert_eq!(found["exitmeter_up"], 0.0);
    assert_eq!(found.len(), 2, "{found:?}");
    let (_, page) = server.ask("GET /");
    assert!(page.contains("cannot read /nowhere"), "{page}");
}

#[test]
fn damaged_snapshot_does_not_give_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(SAVED).unwrap();
    let path = folder.path().join("cut");
    // The last files lack only tables.
    let all = bytes.len();
    for size in [0, 7, 100, 200, 1000, 3000, all - 20_000, all - 1] {
        fs::write(&path, &bytes[..size]).unwrap();
        let (path, folder) = (path.to_str().unwrap(), folder.path().to_str().unwrap());
        let given = ["export", "--details", "9", "--textfile", folder];
        let ended = exitmeter(&[&given[..], &["--input", path]].concat());
        let (status, said) = failed({ ended }.output().unwrap());
        assert_eq!(status, Some(1), "{size}");
        assert!(
            said.starts_with(&format!("exitmeter: {path}: ")),
            "{size}: {said}"
        );
        let text = fs::read_to_string(format!("{folder}/exitmeter.prom")).unwrap();
        assert!(
            text.contains("\nexitmeter_up 0\n") && !text.contains("exits"),
            "{size}: {text}"
        );
    }
}

#[test]
fn the_page_shows_the_host_without_scripts() {
    let server = Server::start(&["--input", SAVED]);
    let (head, page) = server.ask("GET /");
    assert!(
        head.contains("content-security-policy: default-src 'none'"),
        "{head}"
    );
    for text in [
        "kvm-1234",
        "<svg",
        "EXTERNAL_INTERRUPT",
        "http-equiv=\"refresh\"",
        "</html>",
    ] {
        assert!(page.contains(text), "{text} is not in {page}");
    }
    assert!(!page.contains("<script"), "{page}");
}

#[test]
fn slow_or_hanging_clients_do_not_block_others() {
    let server = Server::start(&["--input", SAVED]);
    // Open more connections than there is room for.
    let mut hanging: Vec<_> = (0..200).map(|_| server.connect()).collect();
    for stream in &mut hanging[150..] {
        // Some of them have sent a request, and do not read.
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            .unwrap();
    }
    let sender = thread::spawn({
        let mut stream = server.connect();
        move || {
            let begun = Instant::now();
            write!(
                stream,
                "GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 1073741824\r\n\r\n"
            )
            .unwrap();
            let some = vec![b'x'; 1 << 20];
            let sent = (0..1024).find_map(|_| stream.write_all(&some).err());
            (sent.map(|error| error.kind()), begun.elapsed())
        }
    });
    let mut head = server.connect();
    let endless = thread::spawn(move || {
        head.write_all(b"GET /metrics HTTP/1.1\r\nX: ").unwrap();
        let some = vec![b'x'; 1 << 16];
        (0..1 << 14)
            .find_map(|_| head.write_all(&some).err())
            .map(|error| error.kind())
    });
    for _ in 0..20 {
        let begun = Instant::now();
        assert_eq!(samples(&metrics(&server))["exitmeter_up"], 1.0);
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "{:?}",
            begun.elapsed()
        );
    }
    let reset = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
    let (sent, took) = sender.join().unwrap();
    assert!(
        sent.is_some_and(|kind| reset.contains(&kind)),
        "all of 1 GB was taken in {took:?}"
    );
    let sent = endless.join().unwrap();
    assert!(sent.is_some_and(|kind| reset.contains(&kind)), "{sent:?}");
}

#[test]
fn a_socket_of_systemd_is_used() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // systemd's first socket is file 3. LISTEN_PID must be the process that has it.
    let script = format!(
        "LISTEN_FDS=1 LISTEN_PID=$$ exec {} export --input {SAVED} 3<&{}",
        env!("CARGO_BIN_EXE_exitmeter"),
        listener.as_raw_fd()
    );
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let shell = Command::new("sh")
        .args(["-c", &script])
        .stderr(Stdio::piped())
        .spawn();
    let server = Server::of(shell.unwrap());
    assert_eq!(server.address, address);
    assert_eq!(samples(&metrics(&server))["exitmeter_up"], 1.0);
}

#[test]
fn the_file_is_replaced_at_once_or_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let name = folder.path().to_str().unwrap();
    let mut writer = exitmeter(&[
        "export",
        "--textfile",
        name,
        "--interval",
        "0.01",
        "--input",
        SAVED,
    ]);
    let mut writer = writer.spawn().unwrap();
    let path = folder.path().join("exitmeter.prom");
    while !path.exists() {
        thread::sleep(Duration::from_millis(10));
    }
    for _ in 0..500 {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.ends_with('\n') && text.contains("exitmeter_phase_seconds_total"));
    }
    writer.kill().unwrap();
    writer.wait().unwrap();
    let (status, said) = failed(
        exitmeter(&["export", "--textfile", "/nowhere", "--input", SAVED])
            .output()
            .unwrap(),
    );
    assert_eq!(status, Some(1));
    assert!(
        said.contains("/nowhere/exitmeter.prom") && said.contains("node_exporter"),
        "{said}"
    );
}

/// Write the snapshot of a host with so many VMs of so many vCPUs.
fn large(folder: &Path, vms: u32, vcpus: u32) -> PathBuf {
    let lived = host::lived(200);
    let vm = |number: u32| host::Vm {
        number: number.into(),
        name: format!("kvm-{}", 100_000 + number),
        vcpus,
        lived: &lived,
    };
    let path = folder.join("large");
    let vms: Vec<_> = (0..vms).map(vm).collect();
    host::write(&path, 25 * host::SECOND, &vms);
    path
}

/// Return the peak memory of a process, in KiB.
fn memory(process: &Child) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

#[test]
fn a_vm_that_kvm_destroys_is_left_out_before_its_counters_fall() {
    let folder = tempfile::tempdir().unwrap();
    let path = large(folder.path(), 3, 8);
    let server = Server::start(&["--input", path.to_str().unwrap()]);
    let vcpus_shown = || {
        let found = samples(&metrics(&server));
        let vcpus = found
            .keys()
            .filter(|name| name.starts_with("exitmeter_vm_vcpus"));
        (vcpus.count(), found["exitmeter_vcpus"])
    };
    assert_eq!(vcpus_shown(), (3, 24.0));
    // Some vCPUs of each VM are gone.
    large(folder.path(), 3, 5);
    assert_eq!(vcpus_shown(), (0, 15.0));
    // Two VMs have more vCPUs than they ever had, and one VM is gone.
    large(folder.path(), 2, 9);
    assert_eq!(vcpus_shown(), (2, 18.0));
}

#[test]
fn a_host_of_100_vms_has_less_than_10000_series() {
    let folder = tempfile::tempdir().unwrap();
    let path = large(folder.path(), 100, 8);
    let text = file(folder.path(), &[path.to_str().unwrap()]);
    let found = samples(&text);
    let of_name = |name: &str| {
        found
            .keys()
            .filter(|sample| sample.starts_with(name))
            .count()
    };
    let page = include_str!("../../docs/fleet.md");
    assert!(page.contains(&format!("\n    {OF_VM} + 2 R + U ")));
    assert!(page.contains(&format!("\nA host has {OF_HOST} + 17 R + U ")));
    let reasons = of_name("exitmeter_host_exits_total{");
    let with_user = of_name("exitmeter_host_user_seconds_total{");
    let of_vm = OF_VM + 2 * reasons + with_user;
    let of_host = OF_HOST + 17 * reasons + with_user;
    assert!(reasons >= 20 && with_user >= 1, "{reasons} {with_user}");
    assert_eq!(found.len(), 100 * of_vm + of_host);
    assert!(found.len() < 10_000, "{}", found.len());
}

#[test]
fn a_host_of_8000_vcpus_takes_50_mb() {
    let folder = tempfile::tempdir().unwrap();
    let path = large(folder.path(), 1000, 8);
    let size = fs::metadata(&path).unwrap().len();
    assert!(size > 90 << 20, "{size}");
    let server = Server::start(&["--input", path.to_str().unwrap()]);
    let mut least = Duration::MAX;
    for _ in 0..10 {
        let begun = Instant::now();
        let text = metrics(&server);
        least = least.min(begun.elapsed());
        assert!(text.contains("exitmeter_vcpus 8000\n"));
    }
    let kib = memory(&server.process);
    println!("{size} bytes, {least:?} at least, {kib} KiB");
    assert!(kib < 50_000, "{kib} KiB");
}
