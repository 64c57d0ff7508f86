// SPDX-License-Identifier: GPL-2.0

//! I/O ports between a host and the lab.

use std::{
    arch::asm,
    io::{self, Write},
};

use lab_agent::settings::{CONTROL_PORT, PORT};

/// The ports [`PORT`] and [`CONTROL_PORT`], opened for this process. Bytes written to the first reach the lab without
/// a driver, an interrupt or a wait.
#[derive(Debug)]
pub struct Port(());

impl Port {
    /// Ask the kernel for the ports.
    pub fn open() -> io::Result<Self> {
        for port in [PORT, CONTROL_PORT] {
            // SAFETY: `ioperm` touches no memory of ours.
            if unsafe { libc::ioperm(port.into(), 1, 1) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(()))
    }

    /// Let the emulator save the machine and end. Every run that starts from the saved machine continues from here.
    pub fn save_machine(&mut self) {
        // SAFETY: Touches no memory, and `self` proves that this process may use the port.
        unsafe {
            asm!("out dx, al", in("dx") CONTROL_PORT, in("al") 1_u8, options(nostack, nomem, preserves_flags));
        }
    }

    /// Read the next bytes of this run's input from the lab.
    pub fn read_exact(&mut self, bytes: &mut [u8]) {
        // SAFETY: Writes to `bytes` and nothing else, and `self` proves that this process may use the port.
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
        // SAFETY: Reads `bytes` and nothing else, and `self` proves that this process may use the port. The device
        // behind the port does nothing to the machine.
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
