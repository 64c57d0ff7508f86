// SPDX-License-Identifier: GPL-2.0

//! A guest whose CPUID instruction KVM must fetch from memory that is not there yet. So KVM sleeps
//! while it emulates the instruction, as it does for memory that is swapped out or is still to come
//! from another host.
//!
//! The guest moves its own code by its page table, and executes CPUID before its CPU notices. The
//! CPU continues with the translation that it has cached. KVM walks the page table if the CPU does
//! not report the length of an instruction (SVM without NRIPS), and so comes to the new page. That
//! page belongs to userfaultfd (Documentation/admin-guide/mm/userfaultfd.rst).

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
    time::Duration,
};

use kvm_bindings::kvm_regs;

use crate::{
    catalogue::{Mode, Program},
    config::{Config, Error, Registers64, Result},
    machine::TinyVm,
    window::{Window, FRESH, PAGE},
};

/// Size of a large page of the guest, in small ones.
const LARGE_PAGE: u32 = 512;

// From linux/userfaultfd.h.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u64 = 0x12;

/// Page that is missing until [`AbsentPage::provide`].
#[derive(Debug)]
pub struct AbsentPage {
    userfault: OwnedFd,
    address: u64,
    code: Vec<u8>,
}

impl TinyVm {
    /// Create a VM of one vCPU that executes CPUID once, by an instruction that is in memory for
    /// the CPU and missing for KVM. [`TinyVm::registers`] has the answer.
    ///
    /// # Errors
    ///
    /// See [`TinyVm::new`]. Also returns [`Error::Kernel`] without userfaultfd.
    pub fn with_absent_code(query: Registers64) -> Result<(Self, AbsentPage)> {
        let mut machine = Self::new(Config::new(Program::Touch, Mode::Long, LARGE_PAGE))?;
        let window = Window::of(0);
        let (from, to) = window.code_pages();
        let mut code = vec![0; PAGE as usize];
        machine.memory().read(from, &mut code);
        let address = machine.memory().address() + to;
        let absent = AbsentPage::new(address, code)
            .map_err(|error| Error::Kernel("take a page away (userfaultfd)", error))?;
        machine
            .first_vcpu()
            .set_regs(&window.moved(query))
            .map_err(|error| Error::Kvm("set a vCPU's registers", error))?;
        Ok((machine, absent))
    }

    /// Create a VM of one vCPU that writes to one page, which is missing: KVM sleeps while it
    /// resolves the page fault.
    ///
    /// # Errors
    ///
    /// See [`TinyVm::new`]. Also returns [`Error::Kernel`] without userfaultfd.
    pub fn with_absent_page() -> Result<(Self, AbsentPage)> {
        let machine = Self::new(Config::new(Program::Touch, Mode::Long, 1))?;
        let address = machine.memory().address() + FRESH;
        let absent = AbsentPage::new(address, vec![0; PAGE as usize])
            .map_err(|error| Error::Kernel("take a page away (userfaultfd)", error))?;
        Ok((machine, absent))
    }

    /// Return the first vCPU's registers RAX to RDX.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Kvm`] if KVM refuses.
    pub fn registers(&mut self) -> Result<Registers64> {
        let kvm_regs {
            rax, rbx, rcx, rdx, ..
        } = self
            .first_vcpu()
            .get_regs()
            .map_err(|error| Error::Kvm("read a vCPU's registers", error))?;
        Ok(Registers64 { rax, rbx, rcx, rdx })
    }
}

impl AbsentPage {
    /// Remove the page at an address. It will come back with `code` in it.
    fn new(address: u64, code: Vec<u8>) -> io::Result<Self> {
        // SAFETY: The call takes no addresses.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: The descriptor was just opened, and has no other owner.
        let userfault = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let absent = Self {
            userfault,
            address,
            code,
        };
        absent.call(UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        let mode = UFFDIO_REGISTER_MODE_MISSING;
        absent.call(UFFDIO_REGISTER, &mut [address, PAGE, mode, 0])?;
        let place = ptr::without_provenance_mut(address as usize);
        // SAFETY: The page is in a guest's memory, to which this process holds no reference.
        match unsafe { libc::madvise(place, PAGE as usize, libc::MADV_DONTNEED) } {
            0 => Ok(absent),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Wait until a thread sleeps for the page.
    ///
    /// # Errors
    ///
    /// Returns an error of the kernel, or `TimedOut`.
    pub fn wait_until_wanted(&self, within: Duration) -> io::Result<()> {
        let mut poll = libc::pollfd {
            fd: self.userfault.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: The pointer is to one such struct, as the count says.
        match unsafe { libc::poll(&raw mut poll, 1, within.as_millis() as i32) } {
            -1 => return Err(io::Error::last_os_error()),
            0 => return Err(io::ErrorKind::TimedOut.into()),
            _ => {}
        }
        // Layout of `struct uffd_msg`: the event, then for a page fault its flags and its address.
        let mut message = [0_u64; 4];
        let size = size_of_val(&message);
        // SAFETY: The buffer is ours, and has this size.
        let read = unsafe { libc::read(poll.fd, message.as_mut_ptr().cast(), size) };
        if read < 0 {
            return Err(io::Error::last_os_error());
        }
        let wanted = message[2] & !(PAGE - 1);
        if message[0] & 0xff != UFFD_EVENT_PAGEFAULT || wanted != self.address {
            return Err(io::Error::other(format!("another event: {message:x?}")));
        }
        Ok(())
    }

    /// Provide the page, and wake the threads that sleep for it. Can be called again.
    ///
    /// # Errors
    ///
    /// Returns an error of the kernel.
    pub fn provide(&self) -> io::Result<()> {
        let from = self.code.as_ptr() as u64;
        match self.call(UFFDIO_COPY, &mut [self.address, from, PAGE, 0, 0]) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    fn call<const WORDS: usize>(
        &self,
        request: libc::c_ulong,
        words: &mut [u64; WORDS],
    ) -> io::Result<()> {
        // SAFETY: Each request of this module reads and writes as many words as its number says,
        // and the page that it copies.
        match unsafe { libc::ioctl(self.userfault.as_raw_fd(), request, words.as_mut_ptr()) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}
