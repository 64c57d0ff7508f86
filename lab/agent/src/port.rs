//! The port that takes bytes to the lab.

use std::arch::asm;
use std::io::{self, Write};

use lab_agent::settings::PORT;

/// The port [`PORT`], opened for this process. Both emulators take what is written there to a file of the lab's
/// machine, without a driver, an interrupt or a wait.
#[derive(Debug)]
pub struct Port(());

impl Port {
    /// Asks the kernel for the port.
    pub fn open() -> io::Result<Self> {
        // SAFETY: `ioperm` touches no memory of ours.
        if unsafe { libc::ioperm(PORT.into(), 1, 1) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(()))
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
