// SPDX-License-Identifier: GPL-2.0

//! A Linux guest under KVM, controlled by the host's command `guest`.

use std::{
    io::Read as _,
    process::{Command, Stdio},
    str::FromStr,
};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::leaves::Registers;
use flate2::read::GzDecoder;

/// A running guest; dropping it ends its VMM.
#[derive(Debug)]
pub struct Linux(());

impl Linux {
    /// Boot a guest with options of `guest boot`.
    pub fn boot(options: &[&str]) -> Result<Self> {
        guest(&[&["boot"], options].concat())?;
        Ok(Self(()))
    }

    /// Run a shell command in the guest, and return its output.
    pub fn run(&self, command: &str) -> Result<String> {
        guest(&["run", "--", command])
    }

    /// Run a shell command in the guest, and return its output. The output is compressed on the way
    /// because the serial port causes at least one exit for each byte.
    pub fn run_compressed(&self, command: &str) -> Result<String> {
        let hex = self.run(&format!(
            "{command} | gzip -c | od -An -v -tx1 | tr -d ' \\n'"
        ))?;
        let digits = hex.trim().as_bytes().chunks(2);
        let bytes = digits.map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?));
        let bytes: Vec<u8> = bytes
            .collect::<Result<_>>()
            .with_context(|| format!("{command} printed {hex}"))?;
        let mut text = String::new();
        GzDecoder::new(&bytes[..])
            .read_to_string(&mut text)
            .with_context(|| format!("{command} printed {hex}"))?;
        Ok(text)
    }

    /// Reboot the guest.
    pub fn reboot(&self) -> Result<()> {
        guest(&["reboot"]).map(drop)
    }

    /// Return the process ID of the guest's VMM.
    pub fn pid(&self) -> Result<u32> {
        let text = guest(&["pid"])?;
        text.trim()
            .parse()
            .with_context(|| format!("'{text}' is no process"))
    }

    /// End the guest's VMM.
    pub fn stop(self) -> Result<()> {
        std::mem::forget(self);
        stop()
    }
}

impl Drop for Linux {
    fn drop(&mut self) {
        if let Err(error) = stop() {
            eprintln!("{error:#}");
        }
    }
}

/// End the VMM of the running guest.
pub fn stop() -> Result<()> {
    guest(&["stop"]).map(drop)
}

/// Return true if a guest runs.
pub fn is_running() -> bool {
    guest(&["pid"]).is_ok()
}

fn guest(arguments: &[&str]) -> Result<String> {
    let (subcommand, rest) = arguments.split_first().context("no subcommand")?;
    // A debug kernel gets more time.
    let timeout = 300 * super::slowdown();
    let output = Command::new("guest")
        .args([subcommand, "--timeout", &timeout.to_string()])
        .args(rest)
        .stdin(Stdio::null())
        .output()
        .context("the command guest cannot be run")?;
    ensure!(
        output.status.success(),
        "guest {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A line of output of the tool `cpuid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidLine {
    /// Leaf, as in EAX.
    pub leaf: u32,
    /// Subleaf, as in ECX.
    pub subleaf: u32,
    /// Registers that CPUID returned.
    pub registers: Registers,
}

impl FromStr for CpuidLine {
    type Err = anyhow::Error;

    /// Parse `   0x4ffffffd 0x0a: eax=0x000003ea ebx=0x00000000 ecx=0x00000000 edx=0x00000000`.
    fn from_str(line: &str) -> Result<Self> {
        let read = || {
            let mut words = line.split_whitespace();
            let mut number = |prefix: &str, suffix: &str| {
                let word = words.next()?.strip_prefix(prefix)?;
                u32::from_str_radix(word.strip_suffix(suffix)?, 16).ok()
            };
            Some(Self {
                leaf: number("0x", "")?,
                subleaf: number("0x", ":")?,
                registers: Registers {
                    eax: number("eax=0x", "")?,
                    ebx: number("ebx=0x", "")?,
                    ecx: number("ecx=0x", "")?,
                    edx: number("edx=0x", "")?,
                },
            })
        };
        read().with_context(|| format!("'{line}' is no line of the tool cpuid"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_the_output_of_cpuid() -> Result<()> {
        let line =
            "   0x4ffffffd 0x0a: eax=0x000003ea ebx=0x00000000 ecx=0x00000001 edx=0xffffffff";
        assert_eq!(
            line.parse::<CpuidLine>()?,
            CpuidLine {
                leaf: 0x4fff_fffd,
                subleaf: 10,
                registers: Registers {
                    eax: 1002,
                    ebx: 0,
                    ecx: 1,
                    edx: u32::MAX
                }
            }
        );
        assert!("CPU:".parse::<CpuidLine>().is_err());
        assert!(line.replace("edx=", "").parse::<CpuidLine>().is_err());
        Ok(())
    }
}
