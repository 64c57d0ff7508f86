// SPDX-License-Identifier: GPL-2.0

//! A process of its own for each test, and the end of whatever it leaves running.

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

/// How often a running test is looked at.
const TICK: Duration = Duration::from_millis(20);

/// What the kernel gets to end processes that were killed: those of a large guest have much memory to give back.
const GRACE: Duration = Duration::from_secs(30);

/// From now on, processes that lose their parent become children of this one.
pub fn adopt_orphans() -> Result<()> {
    // SAFETY: This option takes a number and touches no memory.
    let ret = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    if ret != 0 {
        return Err(io::Error::last_os_error()).context("orphans cannot be adopted");
    }
    Ok(())
}

/// Starts a command in a process group of its own, with its output in a file.
pub fn start(command: &mut Command, output: &Path) -> Result<Child> {
    let file = File::create(output).with_context(|| format!("cannot make {}", output.display()))?;
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("{command:?} cannot be run"))
}

/// Waits for a test; `None` when it took too long and was killed. Whatever it left running is ended too.
pub fn wait(mut child: Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            break None;
        }
        thread::sleep(TICK);
    };
    // CAST: A process id of Linux is at most 2^22.
    let group = child.id() as libc::pid_t;
    // SAFETY: kill() touches no memory. The group is the child's own, which is not waited for or has just ended.
    unsafe { libc::kill(-group, libc::SIGKILL) };
    let deadline = Instant::now() + GRACE;
    if status.is_none() {
        while child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                bail!("it was killed and did not end in {} s", GRACE.as_secs());
            }
            thread::sleep(TICK);
        }
    }
    end_orphans(deadline)?;
    Ok(status)
}

/// Ends all children of this process that are left.
fn end_orphans(deadline: Instant) -> Result<()> {
    loop {
        for child in children()? {
            // SAFETY: kill() touches no memory; nobody else waits for this process's children.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        // SAFETY: A status is not asked for.
        let ended = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        match ended {
            0 if Instant::now() >= deadline => {
                bail!("a process that it left does not end by SIGKILL")
            }
            0 => thread::sleep(TICK),
            1.. => {}
            _ => match io::Error::last_os_error().raw_os_error() {
                Some(libc::ECHILD) => return Ok(()),
                Some(libc::EINTR) => {}
                _ => return Err(io::Error::last_os_error()).context("cannot wait for children"),
            },
        }
    }
}

/// The children of this process, as /proc has them.
fn children() -> Result<Vec<libc::pid_t>> {
    let own = std::process::id().to_string();
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc cannot be read")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        // A process may end while it is looked at.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // pid (name) state parent: a name may hold anything, so from its end.
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

    /// One test alone, as it waits for all children of this process.
    #[test]
    fn what_a_test_leaves_is_ended() -> Result<()> {
        adopt_orphans()?;
        let (status, text) = run("echo said; exit 4", Duration::from_secs(60))?;
        assert_eq!(status.and_then(|status| status.code()), Some(4));
        assert_eq!(text, "said\n");

        let (status, _) = run("sleep 1000", Duration::from_millis(100))?;
        assert_eq!(status, None);

        // An orphan in a session of its own.
        let started = Instant::now();
        let (status, text) = run("setsid sh -c 'echo $$; exec sleep 1000' & sleep 1", GRACE)?;
        assert!(status.is_some_and(|status| status.success()));
        assert!(started.elapsed() < GRACE);
        assert!(!Path::new(&format!("/proc/{}", text.trim())).exists());
        assert!(children()?.is_empty());
        Ok(())
    }
}
