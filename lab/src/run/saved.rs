// SPDX-License-Identifier: GPL-2.0

//! Saved machines: hosts that have booted and loaded KVM, to start runs from.
//!
//! Bochs writes down all of a machine when the agent asks for it, and each run goes on from there: it takes a second
//! or two instead of the boot's twenty. The agent then reads by a port what the run wants of it. What is saved depends
//! on the machine, on KVM's parameters, and on all that was booted; it is made when it is first wanted, and kept in the
//! cache.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use lab_agent::settings::{Settings, Task};

use crate::emulator::{bochs, Begin, Boot, Console};
use crate::image::{cache, payload, Images};
use crate::run::{self, Options, RunError, Running};
use crate::setup::{need_space, Prepared, SetupError};

/// The file of a saved machine that holds its memory.
const MEMORY: &str = "memory.ram";

/// Make the saved machine for `options` if it is not there, which `note` is told of, and return its folder. The logs of
/// its boot go to a folder in `logs`, and stay there when it fails.
///
/// # Errors
///
/// [`RunError`]; among them [`RunError::Boot`] when the host does not come as far as to be saved.
pub fn machine(
    options: &Options,
    prepared: &Prepared,
    agent: &Path,
    logs: &Path,
    note: &dyn Fn(&str),
) -> Result<PathBuf, RunError> {
    let images = Images::new(prepared, Path::new(""))?;
    let kernel = images.kernel(prepared)?;
    let read = |path: &Path| fs::read(path).map_err(RunError::io("read", path));
    let bochs = prepared.bochs.as_deref().unwrap_or(Path::new(""));
    let what = format!("{:?} {:?}", options.machine, options.kvm);
    let command_line = options.machine.command_line();
    let parts = [
        include_bytes!("saved.rs").as_slice(),
        include_bytes!("emulator/bochs.rs"),
        include_bytes!("image/pvh.rs"),
        what.as_bytes(),
        command_line.as_bytes(),
        images.base.as_os_str().as_bytes(),
        kernel.path.as_os_str().as_bytes(),
        &read(&bochs.join("bochs"))?,
        &read(agent)?,
    ];
    cache::get("machine", &parts, |target| {
        check_space(target, options.machine.memory)?;
        note("The host boots once and is saved, so that later runs go on from there...");
        save(options, prepared, agent, &logs.join("boot"), target)
    })
}

/// Fails when the disk cannot hold the machine, before it boots: Bochs writes all of its memory, and what is not zero
/// there, a quarter and a bit, is then written once more.
fn check_space(target: &Path, memory: u32) -> Result<(), SetupError> {
    let folder = target.parent().unwrap_or(target);
    need_space(folder, u64::from(memory) / 3 * 4 + 64, "saving a machine")
}

/// Boots a host and saves it to `target`.
fn save(
    options: &Options,
    prepared: &Prepared,
    agent: &Path,
    logs: &Path,
    target: &Path,
) -> Result<(), RunError> {
    for folder in [logs, target] {
        fs::create_dir_all(folder).map_err(RunError::io("make", folder))?;
    }
    let settings = Settings {
        kvm: options.kvm(),
        task: Task::Save,
    };
    let payload = logs.join("payload");
    payload::write(&payload, Some(agent), &[], &settings)?;
    let boot = Boot {
        prepared,
        machine: &options.machine,
        images: &Images::new(prepared, &payload)?,
        folder: logs,
        console: Console::File(run::CONSOLE),
        begin: Begin::Save(target),
    };
    // The run's own limits are for what it does.
    let options = Options {
        out: None,
        limits: run::LIMITS,
        ..options.clone()
    };
    let outcome = Running::start(&boot)?.watch(&options, logs, &mut |_| {})?;
    run::tidy(logs);
    let log = fs::read_to_string(logs.join("bochs.log")).unwrap_or_default();
    if !log.contains("the state is saved") {
        return Err(RunError::Boot(Box::new(outcome)));
    }
    bochs::settle(target)?;
    let memory = target.join(MEMORY);
    let size = fs::metadata(&memory).map_or(0, |facts| facts.len());
    if size != u64::from(options.machine.memory) << 20 {
        return Err(RunError::io("save a machine to", target)(
            io::ErrorKind::StorageFull.into(),
        ));
    }
    dig_holes(&memory).map_err(RunError::io("write", &memory))?;
    fs::remove_dir_all(logs).map_err(RunError::io("remove", logs))
}

/// Writes a file anew without its zeros, which then take no place on the disk.
fn dig_holes(path: &Path) -> io::Result<()> {
    const PIECE: usize = 1 << 16;
    let sparse = path.with_extension("sparse");
    let mut source = File::open(path)?;
    let mut target = File::create(&sparse)?;
    let size = source.metadata()?.len();
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        // CAST: at most PIECE.
        let length = (size - at).min(PIECE as u64) as usize;
        source.read_exact(&mut piece[..length])?;
        if piece[..length].iter().any(|&byte| byte != 0) {
            target.seek(SeekFrom::Start(at))?;
            target.write_all(&piece[..length])?;
        }
        at += length as u64;
    }
    target.set_len(size)?;
    fs::rename(&sparse, path)
}
