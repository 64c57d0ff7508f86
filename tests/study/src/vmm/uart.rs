// SPDX-License-Identifier: GPL-2.0

//! Emulates a serial port that Linux's driver detects as a 16550A.
//!
//! The crate vm-superio has one that refuses more than 64 unread bytes. This one takes a message of any length, and the
//! numbers of docs/study.md were measured with it.

use std::{
    collections::VecDeque,
    io::{self, Write},
};

use anyhow::Result;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

// Registers. DLAB switches DATA and ENABLE to the divisor.
const DATA: u16 = 0;
const ENABLE: u16 = 1;
const IDENTIFY: u16 = 2;
const LINE: u16 = 3;
const MODEM: u16 = 4;
const LINE_STATUS: u16 = 5;
const MODEM_STATUS: u16 = 6;
const SCRATCH: u16 = 7;

const DLAB: u8 = 0x80;
const LOOP: u8 = 0x10;
/// Interrupt enable bits: data received, and transmitter empty.
const ON_DATA: u8 = 1;
const ON_EMPTY: u8 = 2;

/// A serial port. It sends bytes at once.
pub struct Uart {
    out: Box<dyn Write + Send>,
    interrupt: EventFd,
    received: VecDeque<u8>,
    /// True until the guest has read that the transmitter is empty.
    empty: bool,
    fifo: bool,
    enable: u8,
    line: u8,
    modem: u8,
    scratch: u8,
    divisor: [u8; 2],
}

impl Uart {
    /// Create a port that sends to `out`.
    pub fn new(out: impl Write + Send + 'static) -> Result<Self> {
        Ok(Self {
            out: Box::new(out),
            interrupt: EventFd::new(EFD_NONBLOCK)?,
            received: VecDeque::new(),
            empty: false,
            fifo: false,
            enable: 0,
            line: 0,
            modem: 0,
            scratch: 0,
            divisor: [12, 0],
        })
    }

    /// Reset the port to its state at power-on. Received bytes that were not read are lost.
    pub fn reset(&mut self) {
        self.received.clear();
        self.empty = false;
        self.fifo = false;
        [self.enable, self.line, self.modem, self.scratch] = [0; 4];
    }

    /// Return the eventfd that raises the interrupt.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Receive bytes for the guest.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.received.extend(bytes);
        self.raise();
    }

    /// Raise the interrupt if one is due that the guest has enabled.
    fn raise(&self) {
        let data = self.enable & ON_DATA != 0 && !self.received.is_empty();
        let empty = self.enable & ON_EMPTY != 0 && self.empty;
        if data || empty {
            // An event that is already pending suffices for both.
            let _ = self.interrupt.write(1);
        }
    }

    /// Read a register.
    pub fn read(&mut self, register: u16) -> u8 {
        let latched = self.line & DLAB != 0;
        match register {
            DATA if latched => self.divisor[0],
            ENABLE if latched => self.divisor[1],
            DATA => {
                let byte = self.received.pop_front().unwrap_or(0);
                self.raise();
                byte
            }
            ENABLE => self.enable,
            IDENTIFY => {
                let fifo = if self.fifo { 0xc0 } else { 0 };
                if self.enable & ON_DATA != 0 && !self.received.is_empty() {
                    fifo | 4
                } else if self.enable & ON_EMPTY != 0 && self.empty {
                    // Reading this clears the interrupt.
                    self.empty = false;
                    fifo | 2
                } else {
                    fifo | 1
                }
            }
            LINE => self.line,
            MODEM => self.modem,
            // The transmitter is always empty.
            LINE_STATUS => 0x60 | u8::from(!self.received.is_empty()),
            // In loopback mode the port sees its own lines: RTS as CTS, DTR as DSR, and so on.
            MODEM_STATUS if self.modem & LOOP != 0 => {
                let lines = self.modem;
                (lines & 2) << 3 | (lines & 1) << 5 | (lines & 4) << 4 | (lines & 8) << 4
            }
            // The other end is connected and ready.
            MODEM_STATUS => 0xb0,
            SCRATCH => self.scratch,
            _ => 0,
        }
    }

    /// Write a register.
    pub fn write(&mut self, register: u16, value: u8) -> io::Result<()> {
        let latched = self.line & DLAB != 0;
        match register {
            DATA if latched => self.divisor[0] = value,
            ENABLE if latched => self.divisor[1] = value,
            DATA => {
                if self.modem & LOOP != 0 {
                    self.received.push_back(value);
                } else {
                    self.out.write_all(&[value])?;
                }
                self.empty = true;
                self.raise();
            }
            ENABLE => {
                let fresh = value & !self.enable;
                self.enable = value & 0xf;
                self.empty |= fresh & ON_EMPTY != 0;
                self.raise();
            }
            IDENTIFY => {
                self.fifo = value & 1 != 0;
                if value & 2 != 0 {
                    self.received.clear();
                }
            }
            LINE => self.line = value,
            MODEM => self.modem = value & 0x1f,
            SCRATCH => self.scratch = value,
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does what Linux's driver does to detect the port.
    #[test]
    fn linux_detects_a_16550a() -> Result<()> {
        let mut uart = Uart::new(io::sink())?;
        uart.write(ENABLE, 0)?;
        assert_eq!(uart.read(ENABLE) & 0xf, 0);
        uart.write(ENABLE, 0xf)?;
        assert_eq!(uart.read(ENABLE) & 0xf, 0xf);
        uart.write(ENABLE, 0)?;
        uart.write(MODEM, LOOP | 0xa)?;
        assert_eq!(uart.read(MODEM_STATUS) & 0xf0, 0x90);
        uart.write(MODEM, 0)?;
        uart.write(IDENTIFY, 1)?;
        assert_eq!(uart.read(IDENTIFY) >> 6, 3);
        Ok(())
    }

    #[test]
    fn identifies_an_empty_transmitter_once_and_data_until_it_is_read() -> Result<()> {
        let mut uart = Uart::new(io::sink())?;
        uart.write(ENABLE, ON_EMPTY | ON_DATA)?;
        assert_eq!(uart.interrupt.read()?, 1);
        assert_eq!([uart.read(IDENTIFY), uart.read(IDENTIFY)], [2, 1]);
        uart.write(DATA, b'x')?;
        assert_eq!(uart.interrupt.read()?, 1);
        assert_eq!(uart.read(IDENTIFY), 2);
        uart.receive(b"ab");
        assert_eq!(uart.interrupt.read()?, 1);
        for byte in *b"ab" {
            assert_eq!((uart.read(IDENTIFY), uart.read(LINE_STATUS)), (4, 0x61));
            assert_eq!(uart.read(DATA), byte);
        }
        assert_eq!((uart.read(IDENTIFY), uart.read(LINE_STATUS)), (1, 0x60));
        Ok(())
    }
}
