// SPDX-License-Identifier: GPL-2.0

//! The side in the host: run the cases, each in a process of its own.
//!
//! A case that panics, crashes or hangs fails alone. A guest, histogram or loaded module that it
//! leaves behind is removed before the next case.

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
    driver::expect_arguments,
    host::{self, event_hist, linux, module},
    ktap::Line,
    soak,
};

/// Run the cases whose names hold one of `words`, or all without words, and one case for each of
/// `expect`. Multiply each time limit by `slow`. Return success if all passed.
pub fn run(cases: Vec<Case>, words: &[String], expect: &[String], slow: u32) -> Result<ExitCode> {
    println!("{}", Line::Version);
    let wanted = cases
        .into_iter()
        .filter(|case| words.is_empty() || words.iter().any(|word| case.name.contains(word)));
    let mut cases = Vec::new();
    for case in wanted {
        match (case.skip_reason)()? {
            None => cases.push(case),
            Some(reason) => {
                let text = format!("skipped, because {reason}: {}", case.name);
                println!("{}", Line::Remark(text));
            }
        }
    }
    cases.extend(cases::expected_log_lines(expect));
    println!("{}", Line::Plan(cases.len()));
    let mut failed = 0;
    let mut loaded = None;
    for (number, case) in (1..).zip(&cases) {
        let started = Instant::now();
        let mut output = String::new();
        let result = ensure_loaded(&mut loaded, case.module)
            .and_then(|()| run_in_process(case, expect, slow, &mut output));
        let failure = result.and(clean_up()).err();
        if failure.is_some() {
            // The module may be in a bad state: load it anew for the next case.
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

/// Run one case in this process.
pub fn run_case(name: &str, expect: &[String]) -> Result<()> {
    let mut cases = cases::all()
        .into_iter()
        .chain(soak::all())
        .chain(cases::expected_log_lines(expect));
    let case = cases.find(|case| case.name == name);
    let case = case.with_context(|| format!("there is no case '{name}'"))?;
    (case.run)()
}

/// Load or unload the module as the next case wants it. Loading and unloading take seconds, so
/// successive cases with the same parameters share one load.
fn ensure_loaded(loaded: &mut Option<&'static str>, wanted: Option<&'static str>) -> Result<()> {
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

/// Run a case in a process of its own, and append what it prints to `output`.
fn run_in_process(case: &Case, expect: &[String], slow: u32, output: &mut String) -> Result<()> {
    let mut file = memory_file().context("no memory for a case's output")?;
    let child = Command::new("/proc/self/exe")
        .args(["--case", &case.name])
        .args(expect_arguments(expect))
        .env(host::SLOWDOWN, slow.to_string())
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

/// Create an anonymous file in memory.
fn memory_file() -> io::Result<File> {
    // SAFETY: A name that ends with a NUL.
    let fd = unsafe { libc::memfd_create(c"output".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: Just opened, and nobody else's.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Wait for a case, and kill it when it takes too long.
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

/// Remove a guest and histograms that a failed case may have left.
fn clean_up() -> Result<()> {
    if linux::is_running() {
        linux::stop()?;
    }
    event_hist::remove_all()
}
