// SPDX-License-Identifier: GPL-2.0

//! The inside: runs the cases in the emulated host, each in a process of its own.
//!
//! So a case that panics, crashes or hangs fails alone. What it leaves behind, a guest, a
//! histogram or a loaded module, is taken away before the next.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _},
    os::fd::{FromRawFd as _, OwnedFd},
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};

use crate::{
    cases::{self, Case},
    host::{self, keyed, linux, module},
    outside::expected,
    report::Line,
    soak,
};

/// Runs the cases whose names hold one of the words, or all, and those that demand what is
/// `expect`ed of the kernel log; each gets `slow` times its time. The status says whether all
/// passed.
pub fn run(cases: Vec<Case>, words: &[String], expect: &[String], slow: u32) -> Result<ExitCode> {
    println!("{}", Line::Version);
    let wanted = cases
        .into_iter()
        .filter(|case| words.is_empty() || words.iter().any(|word| case.name.contains(word)));
    let mut cases = Vec::new();
    for case in wanted {
        match (case.impossible)()? {
            None => cases.push(case),
            Some(reason) => {
                let text = format!("left out, as {reason}: {}", case.name);
                println!("{}", Line::Remark(text));
            }
        }
    }
    cases.extend(cases::expected(expect));
    println!("{}", Line::Plan(cases.len()));
    let mut failed = 0;
    let mut loaded = None;
    for (number, case) in (1..).zip(&cases) {
        let started = Instant::now();
        let mut output = String::new();
        let result = have(&mut loaded, case.module)
            .and_then(|()| run_apart(case, expect, slow, &mut output));
        let failure = result.and(tidy()).err();
        if failure.is_some() {
            // Whatever is wrong with it, the next case is to find a new one.
            loaded = None;
        }
        let mut remarks: Vec<String> = output.lines().map(str::to_owned).collect();
        if let Some(failure) = &failure {
            failed += 1;
            remarks.extend(format!("{failure:#}").lines().map(str::to_owned));
        }
        remarks.push(format!("{:.1} s", started.elapsed().as_secs_f64()));
        for remark in remarks {
            println!("{}", Line::Remark(remark));
        }
        let line = Line::Case {
            number,
            passed: failure.is_none(),
            name: case.name.clone(),
        };
        println!("{line}");
    }
    Ok(ExitCode::from(u8::from(failed != 0)))
}

/// Runs one case in this process.
pub fn run_case(name: &str, expect: &[String]) -> Result<()> {
    let mut cases = cases::all()
        .into_iter()
        .chain(soak::all())
        .chain(cases::expected(expect));
    let case = cases.find(|case| case.name == name);
    let case = case.with_context(|| format!("there is no case '{name}'"))?;
    (case.run)()
}

/// Has the module loaded as a case wants it. To load and to unload takes the kernel seconds,
/// so cases in a row that want the same share it.
fn have(loaded: &mut Option<&'static str>, wanted: Option<&'static str>) -> Result<()> {
    if wanted.is_some() && *loaded == wanted && module::is_loaded("exitmeter")? {
        return Ok(());
    }
    *loaded = None;
    if module::is_loaded("exitmeter")? {
        module::unload()?;
    }
    if let Some(parameters) = wanted {
        module::load(parameters)?;
    }
    *loaded = wanted;
    Ok(())
}

/// Runs a case in a process of its own; adds to `output` what it printed.
fn run_apart(case: &Case, expect: &[String], slow: u32, output: &mut String) -> Result<()> {
    let mut file = memory_file().context("no memory for a case's output")?;
    let child = Command::new("/proc/self/exe")
        .args(["--case", &case.name])
        .args(expected(expect))
        .env(host::SLOW, slow.to_string())
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file.try_clone()?)
        .spawn()
        .context("a case cannot be started")?;
    let status = wait(child, case.limit * slow);
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    output.push_str(&String::from_utf8_lossy(&bytes));
    let status = status?;
    ensure!(status.success(), "the case ended with {status}");
    Ok(())
}

/// A file without a name.
fn memory_file() -> io::Result<File> {
    // SAFETY: A name that ends with a NUL.
    let fd = unsafe { libc::memfd_create(c"output".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: Just opened, and nobody else's.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Waits for a case, and ends it when it takes too long.
fn wait(mut child: Child, limit: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("the case took longer than {} s", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Takes away what a case that failed may have left.
fn tidy() -> Result<()> {
    if linux::is_running() {
        linux::stop()?;
    }
    keyed::clear()
}
