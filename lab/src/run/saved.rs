// SPDX-License-Identifier: GPL-2.0

//! Saved machines: hosts that have booted and loaded KVM, from which runs can start.
//!
//! Bochs saves the whole machine when the agent asks for it. Each run continues from there, which takes a second or two
//! instead of the boot's twenty. The agent then reads the run's orders from a port. The saved state depends on the
//! machine, on KVM's parameters, and on everything that was booted. It is made at first use and kept in the cache.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use lab_agent::settings::{Settings, Task};

use super::{
    folder::{tidy, CONSOLE},
    options::Options,
    running::Running,
};
use crate::{
    emulator::{bochs, Boot, Console, InitialState},
    image::{cache, payload, Images},
    outcome::{RunError, LIMITS},
    setup::{need_space, Setup, SetupError},
};

/// Name of the file that holds a saved machine's memory.
const MEMORY: &str = "memory.ram";

/// Return the folder of the saved machine for `options`. If it is missing, report that to `note` and make it. The logs
/// of its boot go to a folder in `logs`, and stay there if it fails.
///
/// # Errors
///
/// [`RunError`]; [`RunError::Boot`] if the host ends before it is saved.
pub fn machine(
    options: &Options,
    prepared: &Setup,
    agent: &Path,
    logs: &Path,
    note: &dyn Fn(&str),
) -> Result<PathBuf, RunError> {
    let images = Images::new(prepared, Path::new(""))?;
    let kernel = images.kernel(prepared)?;
    let read = |path: &Path| fs::read(path).map_err(RunError::io("read", path));
    let bochs = prepared.bochs.as_deref().unwrap_or(Path::new(""));
    let what = format!("{:?} {:?}", options.machine, options.kvm_parameters);
    let command_line = options.machine.command_line();
    let parts = [
        include_bytes!("saved.rs").as_slice(),
        include_bytes!("../emulator/bochs.rs"),
        include_bytes!("../image/pvh.rs"),
        what.as_bytes(),
        command_line.as_bytes(),
        images.base.as_os_str().as_bytes(),
        kernel.path.as_os_str().as_bytes(),
        &read(&bochs.join("bochs"))?,
        &read(agent)?,
    ];
    cache::get("machine", &parts, |target| {
        check_space(target, options.machine.memory)?;
        note("The host boots once and is saved, so that later runs start from there...");
        save(options, prepared, agent, &logs.join("boot"), target)
    })
}

/// Fail if the disk cannot hold the machine, before it boots. Bochs writes all of its memory. Then the part that is not
/// zero, a little more than a quarter, is written once more.
fn check_space(target: &Path, memory: u32) -> Result<(), SetupError> {
    let folder = target.parent().unwrap_or(target);
    need_space(folder, u64::from(memory) / 3 * 4 + 64, "saving a machine")
}

/// Boot a host and save it to `target`.
fn save(
    options: &Options,
    prepared: &Setup,
    agent: &Path,
    logs: &Path,
    target: &Path,
) -> Result<(), RunError> {
    for folder in [logs, target] {
        fs::create_dir_all(folder).map_err(RunError::io("make", folder))?;
    }
    let settings = Settings {
        kvm: options.kvm_module(),
        task: Task::Save,
    };
    let payload = logs.join("payload");
    payload::write(&payload, Some(agent), &[], &settings)?;
    let boot = Boot {
        prepared,
        machine: &options.machine,
        images: &Images::new(prepared, &payload)?,
        folder: logs,
        console: Console::File(CONSOLE),
        initial_state: InitialState::Save(target),
    };
    // The limits of the run do not apply to this boot.
    let options = Options {
        out: None,
        limits: LIMITS,
        ..options.clone()
    };
    let outcome = Running::start(&boot)?.watch(&options, logs, &mut |_| {})?;
    tidy(logs);
    let log = fs::read_to_string(logs.join("bochs.log")).unwrap_or_default();
    if !log.contains("the state is saved") {
        return Err(RunError::Boot(Box::new(outcome)));
    }
    bochs::complete_saved(target)?;
    let memory = target.join(MEMORY);
    let size = fs::metadata(&memory).map_or(0, |facts| facts.len());
    if size != u64::from(options.machine.memory) << 20 {
        return Err(RunError::io("save a machine to", target)(
            io::ErrorKind::StorageFull.into(),
        ));
    }
    make_sparse(&memory).map_err(RunError::io("write", &memory))?;
    fs::remove_dir_all(logs).map_err(RunError::io("remove", logs))
}

/// Rewrite a file without its blocks of zeros, so that these take no space on the disk.
fn make_sparse(path: &Path) -> io::Result<()> {
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
