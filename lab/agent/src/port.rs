// SPDX-License-Identifier: GPL-2.0

//! The ports between a host and the lab.

use std::arch::asm;
use std::io::{self, Write};

use lab_agent::settings::{CONTROL_PORT, PORT};

/// The ports [`PORT`] and [`CONTROL_PORT`], opened for this process. What is written to the first goes to a file of
/// the lab's machine, without a driver, an interrupt or a wait.
#[derive(Debug)]
pub struct Port(());

impl Port {
    /// Asks the kernel for the ports.
    pub fn open() -> io::Result<Self> {
        for port in [PORT, CONTROL_PORT] {
            // SAFETY: `ioperm` touches no memory of ours.
            if unsafe { libc::ioperm(port.into(), 1, 1) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(()))
    }

    /// Has the emulator save the machine as it is now, and end. Every run that starts from what was saved goes on
    /// from here.
    pub fn save_machine(&mut self) {
        // SAFETY: touches no memory; `self` shows that the port is ours.
        unsafe {
            asm!("out dx, al", in("dx") CONTROL_PORT, in("al") 1_u8, options(nostack, nomem, preserves_flags));
        }
    }

    /// Reads the next bytes of what the lab gave to this run.
    pub fn read_exact(&mut self, bytes: &mut [u8]) {
        // SAFETY: writes to `bytes` and nothing else; `self` shows that the port is ours.
        unsafe {
            asm!(
                "rep insb",
                in("dx") CONTROL_PORT,
                inout("rcx") bytes.len() => _,
                inout("rdi") bytes.as_mut_ptr() => _,
                options(nostack, preserves_flags),
            );
        }
    }
}

impl Write for Port {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: reads `bytes` and nothing else; `self` shows that the port is ours, and what listens there
        // does nothing to the machine.
        unsafe {
            asm!(
                "rep outsb",
                in("dx") PORT,
                inout("rcx") bytes.len() => _,
                inout("rsi") bytes.as_ptr() => _,
                options(nostack, readonly, preserves_flags),
            );
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
