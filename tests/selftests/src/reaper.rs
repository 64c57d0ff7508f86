// SPDX-License-Identifier: GPL-2.0

//! Runs each test in a process group of its own, and kills all processes that it leaves.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, Context as _, Result};

/// Interval at which a running test is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Time limit for killed processes to end. Those of a large guest have much memory to free.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// Make this process the parent of all its descendants that lose theirs.
pub fn adopt_orphans() -> Result<()> {
    // SAFETY: This option takes a number and touches no memory.
    let ret = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    if ret != 0 {
        return Err(io::Error::last_os_error()).context("cannot adopt orphans");
    }
    Ok(())
}

/// Start a command in a process group of its own, with its output in a file.
pub fn start(command: &mut Command, output: &Path) -> Result<Child> {
    let file = File::create(output).with_context(|| format!("cannot make {}", output.display()))?;
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))
}

/// Wait for a test, and kill all processes that it leaves. Return `None` if it took too long and was killed.
pub fn wait(mut child: Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            break None;
        }
        thread::sleep(POLL_INTERVAL);
    };
    // CAST: Linux's process IDs are at most 2^22.
    let group = child.id() as libc::pid_t;
    // SAFETY: kill() touches no memory. The group is the child's own, which is not waited for or has just ended.
    unsafe { libc::kill(-group, libc::SIGKILL) };
    let deadline = Instant::now() + KILL_TIMEOUT;
    if status.is_none() {
        while child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                bail!(
                    "it was killed and did not end in {} s",
                    KILL_TIMEOUT.as_secs()
                );
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
    kill_orphans(deadline)?;
    Ok(status)
}

/// Kill all remaining children of this process.
fn kill_orphans(deadline: Instant) -> Result<()> {
    loop {
        for child in children()? {
            // SAFETY: kill() touches no memory; nobody else waits for this process's children.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        // SAFETY: The pointer for the status may be null.
        let ended = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        match ended {
            0 if Instant::now() >= deadline => {
                bail!("a process that it left does not end on SIGKILL")
            }
            0 => thread::sleep(POLL_INTERVAL),
            1.. => {}
            _ => match io::Error::last_os_error().raw_os_error() {
                Some(libc::ECHILD) => return Ok(()),
                Some(libc::EINTR) => {}
                _ => return Err(io::Error::last_os_error()).context("cannot wait for children"),
            },
        }
    }
}

/// Return the children of this process, according to /proc.
fn children() -> Result<Vec<libc::pid_t>> {
    let own = std::process::id().to_string();
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        // A process may end meanwhile.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The format is "pid (name) state parent". A name may contain anything, so search from the end.
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1));
        if parent == Some(&own) {
            children.push(pid);
        }
    }
    Ok(children)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, limit: Duration) -> Result<(Option<ExitStatus>, String)> {
        let output = std::env::temp_dir().join(format!("reaper-{}", std::process::id()));
        let child = start(Command::new("sh").args(["-c", script]), &output)?;
        let status = wait(child, limit)?;
        let text = fs::read_to_string(&output)?;
        fs::remove_file(&output)?;
        Ok((status, text))
    }

    /// All in one test, as each run waits for all children of this process.
    #[test]
    fn processes_that_a_test_leaves_are_killed() -> Result<()> {
        adopt_orphans()?;
        let (status, text) = run("echo said; exit 4", Duration::from_secs(60))?;
        assert_eq!(status.and_then(|status| status.code()), Some(4));
        assert_eq!(text, "said\n");

        let (status, _) = run("sleep 1000", Duration::from_millis(100))?;
        assert_eq!(status, None);

        // This leaves an orphan in a session of its own.
        let started = Instant::now();
        let (status, text) = run(
            "setsid sh -c 'echo $$; exec sleep 1000' & sleep 1",
            KILL_TIMEOUT,
        )?;
        assert!(status.is_some_and(|status| status.success()));
        assert!(started.elapsed() < KILL_TIMEOUT);
        assert!(!Path::new(&format!("/proc/{}", text.trim())).exists());
        assert!(children()?.is_empty());
        Ok(())
    }
}
