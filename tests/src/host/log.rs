// SPDX-License-Identifier: GPL-2.0

//! The host's kernel log, read line by line.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
};

use anyhow::{bail, Context as _, Result};

/// A reader of the kernel log.
#[derive(Debug)]
pub struct Log(File);

impl Log {
    /// Open the log behind its latest line.
    pub fn from_now() -> Result<Self> {
        let mut log = Self::from_boot()?;
        // /dev/kmsg seeks to the end whatever the offset.
        log.0.seek(SeekFrom::End(0)).context("the kernel log")?;
        Ok(log)
    }

    /// Open the log at the oldest line that the kernel still has.
    pub fn from_boot() -> Result<Self> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("/dev/kmsg cannot be opened")?;
        Ok(Self(file))
    }

    /// Return the lines since the last call, without their timestamps.
    pub fn lines(&mut self) -> Result<Vec<String>> {
        let records = self.records()?;
        Ok(records.into_iter().map(|(_, line)| line).collect())
    }

    /// Return the lines since the last call with their levels, 0 (emergency) to 7 (debug).
    fn records(&mut self) -> Result<Vec<(u32, String)>> {
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(lines),
                Ok(len) => lines.push(parse(&String::from_utf8_lossy(&record[..len]))?),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(lines),
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {
                    bail!("the kernel log overran its buffer before it was read")
                }
                Err(error) => return Err(error).context("the kernel log cannot be read"),
            }
        }
    }

    /// Return the module's lines since the last call, without the prefix `exitmeter: `.
    pub fn module_lines(&mut self) -> Result<Vec<String>> {
        let records = self.module_records()?;
        Ok(records.into_iter().map(|(_, line)| line).collect())
    }

    /// Return the module's lines since the last call with their levels.
    pub fn module_records(&mut self) -> Result<Vec<(u32, String)>> {
        let records = self.records()?;
        Ok(records
            .iter()
            .filter_map(|(level, line)| {
                Some((*level, line.strip_prefix("exitmeter: ")?.to_owned()))
            })
            .filter(|(_, line)| !LOADER_LINES.contains(&line.as_str()))
            .collect())
    }
}

/// Lines that the kernel's module loader logs once per boot with the module's name before them
/// (kernel/module/main.c).
const LOADER_LINES: [&str; 2] = [
    "loading out-of-tree module taints kernel.",
    "module verification failed: signature and/or required key missing - tainting kernel",
];

/// Return level and text of a /dev/kmsg record: `priority,number,time,flags;text`, then lines with
/// the record's properties. The level is the lower 3 bits of the priority.
fn parse(record: &str) -> Result<(u32, String)> {
    let read = || {
        let (head, text) = record.split_once(';')?;
        let priority: u32 = head.split(',').next()?.parse().ok()?;
        Some((
            priority & 7,
            text.lines().next().unwrap_or_default().to_owned(),
        ))
    };
    read().with_context(|| format!("'{record}' is no record of the kernel log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_returns_level_and_text() -> Result<()> {
        let record =
            "30,339,5140900,-;NET: Registered; really\n SUBSYSTEM=acpi\n DEVICE=+acpi:PNP0A03:00\n";
        assert_eq!(parse(record)?, (6, "NET: Registered; really".to_owned()));
        assert!(parse("garbage").is_err() && parse("x,1;text").is_err());
        Ok(())
    }
}
