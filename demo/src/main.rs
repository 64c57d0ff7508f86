// SPDX-License-Identifier: GPL-2.0

//! Demo of exitmeter: an emulated host, the module beside its KVM, and a Linux guest that reads its own exits with the
//! stock `cpuid` tool.

mod sweep;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Parser;
use exitmeter_meter::reasons::Isa;
use lab::{
    host::Host,
    run::{self, Event, Lines, Options},
    verdict::RunEnd,
};

use self::sweep::Sweep;

/// Number of the host's log lines that are shown.
const LOG_LINES: usize = 4;

/// Show exitmeter at work on an emulated host, set-up included.
#[derive(Debug, Parser)]
struct Arguments {
    /// Host to boot: intel (Bochs) or amd (QEMU)
    #[arg(long, default_value = "intel")]
    host: Host,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // Query the reasons that the course covers; on SVM the codes from exceptions to nested page faults.
    let (isa, reasons): (_, &[&str]) = match arguments.host {
        Host::Intel => (Isa::Vmx, &["0", "69"]),
        Host::Amd => (Isa::Svm, &["64", "141", "1024", "1027"]),
    };
    let script = [concat!(env!("CARGO_MANIFEST_DIR"), "/src/host.sh")];
    let options = Options::new(arguments.host, script.iter().chain(reasons));
    println!(
        "{}",
        match arguments.host {
            Host::Intel => "An Intel host starts, emulated by Bochs...",
            Host::Amd => "An AMD host starts, emulated by QEMU...",
        }
    );
    let mut printer = Printer::new(isa);
    let outcome = run::run(&options, &mut |event| printer.event(event))?;
    printer.end()?;
    println!(
        "\nThe full logs, console and kernel of the host, are in {}",
        outcome.folder.display()
    );
    if !matches!(outcome.end, RunEnd::Script(0)) {
        eprint!("{}", outcome.tail);
        eprintln!("demo: {}", outcome.end);
        return Ok(ExitCode::FAILURE);
    }
    let boot = printer.boot.context("the guest read no exits")?;
    let exits = printer
        .boot_exits
        .context("the guest did not read the exits of its boot")?;
    println!("The boot took {exits} exits; {}.", boot.leading());
    Ok(ExitCode::SUCCESS)
}

/// Return the VM of a query's log line: `[    1.5] exitmeter: kvm-107: CPUID(...`.
fn vm(line: &str) -> Option<&str> {
    line.split(": ").nth(1)
}

/// Printer of the demo's output as it runs.
struct Printer {
    isa: Isa,
    stdout: Lines,
    /// Table that is being filled.
    sweep: Option<Sweep>,
    /// Exits of the boot, as the guest read them right after it.
    boot_exits: Option<u64>,
    /// The first sweep.
    boot: Option<Sweep>,
    /// The host's log lines of queries.
    queries: Vec<String>,
}

impl Printer {
    fn new(isa: Isa) -> Self {
        Self {
            isa,
            stdout: Lines::default(),
            sweep: None,
            boot_exits: None,
            boot: None,
            queries: Vec::new(),
        }
    }

    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Stage(_) => {}
            Event::Stderr(bytes) => {
                let _ = io::stderr().write_all(bytes);
            }
            Event::Kernel(line) if line.contains("CPUID(0x4FFFFFF") => {
                // Leave out queries of the guests that verify the meter.
                let first = self.queries.first().map_or(line, String::as_str);
                if vm(first) == vm(line) {
                    self.queries.push(line.to_owned());
                }
            }
            Event::Kernel(_) => {}
            Event::Stdout(bytes) => {
                for line in self.stdout.take(bytes) {
                    self.line(line.trim_end());
                }
            }
        }
        let _ = io::stdout().flush();
    }

    fn line(&mut self, line: &str) {
        match (line.strip_prefix("=="), &mut self.sweep) {
            (Some(""), _) => self.finish_sweep(),
            (Some(title), _) => self.sweep = Some(Sweep::new(self.isa, title.trim())),
            (None, Some(sweep)) => {
                if sweep.line(line) && sweep.answers() % 14 == 0 {
                    eprint!(".");
                }
            }
            (None, None) => {
                println!("{line}");
                if let Some(exits) = sweep::total_exits(line) {
                    self.boot_exits = self.boot_exits.or(Some(exits));
                }
            }
        }
    }

    fn finish_sweep(&mut self) {
        let Some(sweep) = self.sweep.take() else {
            return;
        };
        eprintln!();
        match &self.boot {
            None => {
                println!("\n{}", sweep.table());
                self.boot = Some(sweep);
            }
            Some(boot) => println!("\n{}", sweep.since(boot).table()),
        }
    }

    /// Show the host's log lines of the queries.
    fn end(&self) -> Result<()> {
        let mut out = io::stdout().lock();
        writeln!(
            out,
            "\nThe host's kernel log has a line for each of the {} queries:",
            self.queries.len()
        )?;
        for line in self.queries.iter().take(LOG_LINES) {
            writeln!(out, "  {line}")?;
        }
        if let [.., last] = &self.queries[..] {
            writeln!(out, "  ...\n  {last}")?;
        }
        Ok(())
    }
}
