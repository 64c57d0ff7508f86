// SPDX-License-Identifier: GPL-2.0

//! `exitmeter export` gives Prometheus the numbers of the snapshot.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    os::unix::{fs::chown, process::CommandExt as _},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    phase::Phase,
    reader::Snapshot,
    reasons::{self, Isa},
    snapshot::Reason,
};
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::{bpf::Attached, Case};
use crate::host::{
    self,
    meter::{read_device, DEVICE},
    module, task, tool,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "export: a scrape matches the snapshot, and needs the group of the device",
            module_scrape,
        ),
        Case::without_module(
            "export: a scrape matches the BPF meter's snapshot",
            bpf_scrape,
        )
        .within(120),
        Case::with_module(
            "",
            "export: the host's counters never fall while VMs come and go",
            never_fall,
        )
        .within(120),
        Case::with_module(
            "details=1",
            "export: counters of details never fall, and sum to their reason's exits",
            detail_counters,
        ),
        Case::without_module(
            "export: the exporter survives unloading and loading of the module",
            module_reloaded,
        ),
    ]
}

/// User and group ID that no other process has, as with DynamicUser= in a unit.
const USER: u32 = 64_999;

/// A running `exitmeter export`; dropping this kills it. The tool's own tests start it by
/// cli/tests/server, which panics where a case returns an error.
struct Exporter {
    process: Child,
    address: String,
}

impl Exporter {
    /// Start the exporter as [`USER`], whose group may read the device, or as root.
    fn start(arguments: &[&str], as_user: bool) -> Result<Self> {
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status()?;
        ensure!(up.success(), "there is no loopback");
        let mut command = tool::command(&["export", "--listen", "127.0.0.1:0"]);
        command.args(arguments);
        if as_user {
            command.uid(USER).gid(USER);
        }
        let mut process = command.stderr(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stderr = process.stderr.take().context("it has a standard error")?;
        BufReader::new(stderr).read_line(&mut line)?;
        let address = line
            .split("http://")
            .nth(1)
            .and_then(|rest| rest.split('/').next());
        let address = address
            .with_context(|| format!("it says {line}"))?
            .to_owned();
        Ok(Self { process, address })
    }

    /// Scrape the exporter, and return the samples by name and labels.
    fn scrape(&self) -> Result<BTreeMap<String, f64>> {
        let mut stream = TcpStream::connect(&self.address)?;
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer")?;
        ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let lines = body.lines().filter(|line| !line.starts_with('#'));
        lines
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').context("a sample")?;
                Ok((name.to_owned(), value.parse()?))
            })
            .collect()
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn reason_label(vendor: Isa, reason: Reason) -> String {
    match reason {
        Reason::Code(code) => match reasons::name(vendor, code) {
            Some(name) => name.to_owned(),
            None => format!("{code:#x}"),
        },
        Reason::Start => "start".to_owned(),
        Reason::Other => "other".to_owned(),
    }
}

/// Check that a scrape has the numbers of a snapshot. The vCPUs must be at rest.
fn check_scrape(scrape: &BTreeMap<String, f64>, bytes: &[u8]) -> Result<()> {
    let snapshot = Snapshot::parse(bytes)?;
    let vendor = snapshot.isa();
    let khz = f64::from(snapshot.tsc_khz().context("the clock has a rate")?);
    let mut vms: BTreeMap<(String, String), (u64, u128)> = BTreeMap::new();
    let mut host: BTreeMap<String, (u64, u128)> = BTreeMap::new();
    let vcpu_rows = snapshot.vcpus().flat_map(|vcpu| {
        let name = vcpu.name().to_owned();
        vcpu.rows()
            .map(move |row| (Some(name.clone()), row))
            .collect::<Vec<_>>()
    });
    for (vm, row) in vcpu_rows.chain(snapshot.totals().map(|row| (None, row))) {
        let reason = reason_label(vendor, row.reason());
        let kernel = u128::from(row.cycles(Phase::Kernel));
        let vm_sum = vm.map(|vm| vms.entry((vm, reason.clone())).or_default());
        for sum in vm_sum.into_iter().chain([host.entry(reason).or_default()]) {
            sum.0 += row.exits();
            sum.1 += kernel;
        }
    }
    let check = |name: String, value: f64| {
        let found = scrape.get(&name).copied();
        // A number that is 0 may have no line.
        ensure!(
            found == Some(value) || (value == 0.0 && found.is_none()),
            "{name}: {found:?}, and not {value}"
        );
        Ok(())
    };
    let seconds = |ticks: u128| ticks as f64 / (khz * 1000.0);
    ensure!(!vms.is_empty(), "no VM runs");
    for ((vm, reason), (exits, kernel)) in vms {
        let labels = format!("{{vm=\"{vm}\",reason=\"{reason}\"}}");
        check(format!("exitmeter_exits_total{labels}"), exits as f64)?;
        check(
            format!("exitmeter_kernel_seconds_total{labels}"),
            seconds(kernel),
        )?;
    }
    for (reason, (exits, kernel)) in host {
        let labels = format!("{{reason=\"{reason}\"}}");
        check(format!("exitmeter_host_exits_total{labels}"), exits as f64)?;
        check(
            format!("exitmeter_host_kernel_seconds_total{labels}"),
            seconds(kernel),
        )?;
    }
    check(
        "exitmeter_departed_vcpus_total".to_owned(),
        snapshot.departed() as f64,
    )?;
    check(
        "exitmeter_vcpus".to_owned(),
        snapshot.vcpus().count() as f64,
    )
}

/// Run a VM and drop it; then run another and return it at rest.
fn departed_and_resting_vm() -> Result<TinyVm> {
    TinyVm::new(Config::new(Program::Invd, Mode::Long, 40))?.run()?;
    let mut machine = TinyVm::new(Config {
        vcpus: 2,
        ..Config::new(Program::OutUser, Mode::Long, 300)
    })?;
    machine.run()?;
    Ok(machine)
}

fn module_scrape() -> Result<()> {
    let machine = departed_and_resting_vm()?;
    let exporter = Exporter::start(&[], true)?;
    let refused = exporter.scrape()?;
    ensure!(
        refused.get("exitmeter_up") == Some(&0.0) && refused.len() == 2,
        "without the right to read the device: {refused:?}"
    );
    // The udev rule does the same for the group kvm.
    chown(DEVICE, None, Some(USER))?;
    let scrape = exporter.scrape()?;
    check_scrape(&scrape, &read_device()?)?;
    let name = format!("kvm-{}", std::process::id());
    let info = scrape
        .keys()
        .find(|sample| sample.starts_with("exitmeter_vm_info"));
    ensure!(info.is_some_and(|info| info.contains(&name)), "{info:?}");
    // A departed VM remains in the host's counters only.
    let exits = |scrape: &BTreeMap<String, f64>| -> f64 {
        let of = scrape
            .iter()
            .filter(|(name, _)| name.starts_with("exitmeter_host_exits_total"));
        of.map(|(_, value)| value).sum()
    };
    let before = exits(&scrape);
    drop(machine);
    let scrape = exporter.scrape()?;
    ensure!(
        !scrape.keys().any(|name| name.contains("vm=")),
        "a departed VM has samples"
    );
    let after = exits(&scrape);
    ensure!(
        after == before && before >= 640.0,
        "{before} exits became {after}"
    );
    Ok(())
}

fn bpf_scrape() -> Result<()> {
    let attached = Attached::with(&[])?;
    let machine = departed_and_resting_vm()?;
    let exporter = Exporter::start(&["--source", "bpf"], false)?;
    let scrape = exporter.scrape()?;
    check_scrape(&scrape, &attached.snapshot()?)?;
    let vendor = host::vendor()?.name();
    let info = format!("exitmeter_meter_info{{source=\"bpf\",isa=\"{vendor}\"}}");
    ensure!(scrape.contains_key(&info), "there is no {info}");
    drop(machine);
    attached.stop()
}

/// Check that no counter with one of the prefixes `names` is less than in earlier scrapes.
fn check_none_fell(
    before: &mut BTreeMap<String, f64>,
    scrape: &BTreeMap<String, f64>,
    names: &[&str],
) -> Result<()> {
    let is_one = |name: &str| names.iter().any(|begin| name.starts_with(begin));
    for (name, value) in scrape.iter().filter(|(name, _)| is_one(name)) {
        let last = before.insert(name.clone(), *value).unwrap_or(0.0);
        ensure!(*value >= last, "{name} fell from {last} to {value}");
    }
    Ok(())
}

fn never_fall() -> Result<()> {
    let exporter = Exporter::start(&[], false)?;
    let mut before: BTreeMap<String, f64> = BTreeMap::new();
    let mut scrapes = 0;
    thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<()> {
            for _ in 0..30 {
                let mut machine = TinyVm::new(Config {
                    vcpus: 2,
                    ..Config::new(Program::Cpuid, Mode::Long, 300)
                })?;
                machine.run()?;
            }
            Ok(())
        });
        while !load.is_finished() {
            let scrape = exporter.scrape()?;
            let counters = ["exitmeter_host_", "exitmeter_departed"];
            check_none_fell(&mut before, &scrape, &counters)?;
            scrapes += 1;
            thread::sleep(Duration::from_millis(20));
        }
        task::join(load)
    })?;
    ensure!(scrapes > 5, "there were only {scrapes} scrapes");
    let departed = exporter
        .scrape()?
        .get("exitmeter_departed_vcpus_total")
        .copied();
    ensure!(
        departed == Some(60.0),
        "{departed:?} vCPUs are gone, and not 60"
    );
    Ok(())
}

fn detail_counters() -> Result<()> {
    const OUTS: u32 = 3000;
    let exporter = Exporter::start(&["--details", "20"], false)?;
    let mut machine = TinyVm::new(Config {
        vcpus: 2,
        ..Config::new(Program::OutUser, Mode::Long, OUTS)
    })?;
    let mut before: BTreeMap<String, f64> = BTreeMap::new();
    let mut watch = || -> Result<BTreeMap<String, f64>> {
        let scrape = exporter.scrape()?;
        check_none_fell(&mut before, &scrape, &["exitmeter_detail_"])?;
        Ok(scrape)
    };
    thread::scope(|scope| -> Result<()> {
        let guest = scope.spawn(|| machine.run());
        while !guest.is_finished() {
            watch()?;
            thread::sleep(Duration::from_millis(20));
        }
        task::join(guest)?;
        Ok(())
    })?;
    let scrape = watch()?;
    ensure!(
        scrape.get("exitmeter_detailed_vcpus") == Some(&2.0),
        "not each vCPU has details: {scrape:?}"
    );
    let vm = format!("vm=\"kvm-{}\"", std::process::id());
    let mut reasons = 0;
    for (name, exits) in &scrape {
        let Some(reason) = name.strip_prefix(&format!("exitmeter_exits_total{{{vm},")) else {
            continue;
        };
        let of_reason = format!(
            "exitmeter_detail_exits_total{{{vm},{}",
            reason.replace('}', ",")
        );
        let details = scrape.iter();
        let details = details.filter(|(name, _)| name.starts_with(&of_reason));
        let sum: f64 = details.map(|(_, value)| value).sum();
        ensure!(
            sum == *exits,
            "{name} is {exits}, and its details are {sum}"
        );
        reasons += 1;
    }
    ensure!(reasons > 1, "{reasons} reasons");
    let out = scrape
        .iter()
        .find(|(name, _)| name.contains("detail=\"OUT 0x3f0"));
    ensure!(
        out.is_some_and(|(_, exits)| *exits == f64::from(2 * OUTS)),
        "2 vCPUs of {OUTS} OUTs each have {out:?}"
    );
    Ok(())
}

fn module_reloaded() -> Result<()> {
    let exporter = Exporter::start(&["--source", "module"], false)?;
    let up = || -> Result<Option<f64>> { Ok(exporter.scrape()?.get("exitmeter_up").copied()) };
    ensure!(up()? == Some(0.0), "there is no module");
    module::load("")?;
    ensure!(up()? == Some(1.0), "the module is there");
    module::unload()?;
    ensure!(up()? == Some(0.0), "the module is gone");
    module::load("")?;
    ensure!(up()? == Some(1.0), "the module is there again");
    module::unload()
}
