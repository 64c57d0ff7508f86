// SPDX-License-Identifier: GPL-2.0

//! Command line of `cargo lab`.

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use lab::{
    host::{Host, Machine},
    image::payload::FileSpec,
    module::{self, BuildArgs, RootArgs},
    programs::Tool,
    run::{self, Event, Options, LIMITS},
    rust_project::{self, RustProjectArgs},
    setup::{self, PrepareArgs},
    shell,
    verdict::Limits,
};

/// Boot emulated hosts with VT-x or SVM from packaged, unmodified kernels, and run scripts on them.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab")]
struct Lab {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Boot a host, run a script on it, and exit with the script's status.
    ///
    /// The script runs as root in /root, which holds exitmeter.ko and the files of --file. It can use the commands of
    /// busybox, `exitmeter` and `guest`. Its output goes to standard output. Its files in $OUT, the console and the kernel
    /// log are kept in a folder that is named at the end.
    ///
    /// Status: that of the script, at most 99; 100 the host could not start, 101 kernel panic, 102 oops or BUG, 103 WARN,
    /// 104 lockup or stall, 105 the emulator died, 106 silence, 107 time limit, 108 no verdict, 130 interrupted.
    Run(RunArgs),
    /// Boot a host and open a shell on its console; Ctrl-] ends the host.
    Shell(HostArgs),
    /// Make everything that the hosts need.
    Prepare(PrepareArgs),
    /// Build exitmeter.ko for a packaged kernel.
    Build(BuildArgs),
    /// Run a command in the Debian root, with the checkout at /src and the kernel's tree at /tree.
    Root(RootArgs),
    /// Write build/rust-project.json, which describes the module to rust-analyzer.
    RustProject(RustProjectArgs),
}

#[derive(Args, Debug)]
struct HostArgs {
    /// Host to boot
    #[arg(long)]
    host: Host,
    /// CPU model, as its emulator names it
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Number of CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Memory, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u32,
    /// AMD only: let the TSC count instructions, so that the same work takes the same number of ticks
    #[arg(long)]
    icount: bool,
    /// Debian's kernel: a version (7.2.12), series (6.12, 6.1) or release (7.3.4+deb13-cloud-amd64); by default the newest of
    /// backports. A kernel built without Rust, such as those before 7.2, gets no exitmeter.ko. Or a debug kernel: `debug`
    /// (KASAN, lockdep, kmemleak and more), `kcsan` or `cfi`, built here at first use; the first two need --memory 2048.
    /// `7.2.12-debug` is built from that version's source
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
    /// Text to append to the host kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    append: String,
    /// Parameters of kvm-intel or kvm-amd, such as "ept=0"
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    kvm_args: String,
    /// Do not load KVM's modules
    #[arg(long, conflicts_with = "kvm_args")]
    no_kvm: bool,
    /// Boot the host, instead of continuing from one that was saved after its boot
    #[arg(long)]
    fresh: bool,
    /// Do not build exitmeter.ko
    #[arg(long)]
    no_module: bool,
    /// Build the host's `exitmeter` with its BPF meter, which needs clang
    #[arg(long)]
    bpf: bool,
    /// A file or folder for the host, in /root or at DEST
    #[arg(long = "file", value_name = "SRC[:DEST]", value_parser = FileSpec::parse)]
    files: Vec<FileSpec>,
}

#[derive(Args, Debug)]
struct RunArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Folder for the files that the script leaves in $OUT
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Time limit of the run
    #[arg(long, value_name = "SECONDS", default_value_t = LIMITS.time.as_secs())]
    timeout: u64,
    /// Longest time without output from the host
    #[arg(long, value_name = "SECONDS", default_value_t = LIMITS.silence.as_secs())]
    silence: u64,
    /// A shell script of this machine, or a command of the host, and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "SCRIPT"
    )]
    script: Vec<OsString>,
}

impl HostArgs {
    fn options(self, script: Vec<OsString>) -> Options {
        Options {
            machine: Machine {
                host: self.host,
                model: self.model,
                cpus: self.cpus,
                memory: self.memory,
                icount: self.icount,
                append: self.append,
            },
            kernel: self.kernel,
            kvm_parameters: (!self.no_kvm).then_some(self.kvm_args),
            tool: match self.bpf {
                true => Tool::WithBpf,
                false => Tool::ForScripts,
            },
            fresh: self.fresh,
            module: !self.no_module,
            files: self.files,
            ..Options::new(self.host, script)
        }
    }
}

/// Run `cargo lab`.
pub fn main() -> ExitCode {
    let done = match Lab::parse().verb {
        Verb::Run(args) => run(args).map(ExitCode::from),
        Verb::Shell(args) => shell::shell(&args.options(Vec::new()))
            .map(|()| ExitCode::SUCCESS)
            .map_err(Into::into),
        Verb::Prepare(args) => setup::command(args).map(|()| ExitCode::SUCCESS),
        Verb::Build(args) => module::command(args).map(|()| ExitCode::SUCCESS),
        Verb::Root(args) => module::root_command(args),
        Verb::RustProject(args) => rust_project::command(args).map(|()| ExitCode::SUCCESS),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(100)
        }
    }
}

fn run(args: RunArgs) -> Result<u8> {
    let options = Options {
        out: args.out,
        limits: Limits {
            time: Duration::from_secs(args.timeout),
            silence: Duration::from_secs(args.silence),
        },
        ..args.host.options(args.script)
    };
    let stages = io::stderr().is_terminal();
    let outcome = run::run(&options, &mut |event| match event {
        // Ignore a closed output: the run is worth its verdict and its files even so.
        Event::Stdout(bytes) => {
            let mut stdout = io::stdout().lock();
            let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
        }
        Event::Stderr(bytes) => {
            let _ = io::stderr().write_all(bytes);
        }
        Event::Stage(text) if stages => eprintln!("lab: {text}"),
        Event::Stage(_) | Event::Kernel(_) => {}
    })?;
    eprint!("{}", outcome.tail);
    eprintln!("lab: {}", outcome.summary());
    Ok(outcome.end.status())
}
