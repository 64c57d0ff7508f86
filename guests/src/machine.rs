// SPDX-License-Identifier: GPL-2.0

//! A VMM of a few hundred lines: one VM, its memory, and its vCPUs, each a thread.

use std::{
    io,
    num::NonZero,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use exitmeter_meter::reasons::Isa;
use kvm_bindings::{
    kvm_irqchip, kvm_mp_state, kvm_pit_config, kvm_userspace_memory_region, CpuId,
    KVM_IRQCHIP_PIC_MASTER, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use rustix::thread::{sched_setaffinity, CpuSet};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    catalogue::Program,
    config::{Config, Error, Registers64, Result},
    interfere,
    memory::Memory,
    window::{Window, FRESH, IRQ, PAGE, VECTOR_BASE},
};

/// Port whose OUT ends a guest.
pub(crate) const END_PORT: u16 = 0xf4;
/// Port that the VMM answers.
const USER_PORT: u16 = 0x3f0;
/// Port that is an ioeventfd.
const EVENTFD_PORT: u64 = 0x510;

/// Exits to the VMM while a vCPU ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserExits {
    /// Port accesses, without the one that ends the guest.
    pub ports: u64,
    /// HLTs.
    pub hlts: u64,
    /// Accesses to registers of devices in memory.
    pub registers: u64,
}

/// A VM. KVM keeps its vCPUs until this value is dropped.
#[derive(Debug)]
pub struct TinyVm {
    config: Config,
    // Fields drop in this order: the vCPUs and the VM before their memory.
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    eventfd: Option<EventFd>,
    memory: Memory,
}

/// Return the virtualization extension of the host's CPU.
pub fn host_isa() -> Option<Isa> {
    if cpuid_ecx(1) & 1 << 5 != 0 {
        return Some(Isa::Vmx);
    }
    (cpuid_ecx(0x8000_0001) & 1 << 2 != 0).then_some(Isa::Svm)
}

/// Return the extension of the host, or an error if there is none.
fn required_isa() -> Result<Isa> {
    host_isa().ok_or(Error::Settings(
        "this CPU has neither VT-x nor SVM".to_owned(),
    ))
}

/// Return ECX of a CPUID leaf, or 0 for a leaf past the last.
fn cpuid_ecx(leaf: u32) -> u32 {
    use core::arch::x86_64::__cpuid;
    #[allow(unused_unsafe, reason = "safe since Rust 1.94, unsafe before")]
    // SAFETY: Every CPU of 64 bits has CPUID.
    let (last, ecx) = unsafe { (__cpuid(leaf & 0x8000_0000).eax, __cpuid(leaf).ecx) };
    if leaf <= last {
        ecx
    } else {
        0
    }
}

impl TinyVm {
    /// Create the VM and its vCPUs, ready to run.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Settings`] for settings that do not go together, or an error of KVM or the
    /// kernel.
    pub fn new(config: Config) -> Result<Self> {
        config.check()?;
        let isa = required_isa()?;
        let kvm = Kvm::new().map_err(|error| {
            Error::Kvm(
                "open /dev/kvm; load kvm_intel or kvm_amd, and run as root",
                error,
            )
        })?;
        let vm = kvm
            .create_vm()
            .map_err(|error| Error::Kvm("create a VM", error))?;
        // Intel's KVM may put its data for real mode here; no guest accesses it.
        vm.set_identity_map_address(0xfffb_c000)
            .map_err(|error| Error::Kvm("set the identity map", error))?;
        vm.set_tss_address(0xfffb_d000)
            .map_err(|error| Error::Kvm("set the TSS", error))?;
        if config.has_irqchip() {
            vm.create_irq_chip()
                .map_err(|error| Error::Kvm("create interrupt controllers", error))?;
        }
        if config.program == Program::InKernel {
            vm.create_pit2(kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            })
            .map_err(|error| Error::Kvm("create a PIT", error))?;
        }
        if config.program == Program::HltKernel {
            set_up_pic(&vm)?;
        }
        let eventfd = match config.program {
            Program::OutEventfd => Some(take_port(&vm)?),
            _ => None,
        };

        let mut memory = Memory::new((FRESH + config.fresh_pages() * PAGE) as usize)
            .map_err(|error| Error::Kernel("allocate memory for the guest", error))?;
        if config.program == Program::Call {
            const RET: u8 = 0xc3;
            for page in 0..config.fresh_pages() {
                memory.write(FRESH + page * PAGE, &[RET]);
            }
        }
        let region = kvm_userspace_memory_region {
            memory_size: memory.len() as u64,
            userspace_addr: memory.address(),
            ..Default::default()
        };
        // SAFETY: The memory is kept until the VM is gone.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|error| Error::Kvm("map the guest's memory", error))?;

        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| Error::Kvm("list the CPUID leaves that it supports", error))?;
        let mut machine = Self {
            config,
            vcpus: Vec::new(),
            vm,
            eventfd,
            memory,
        };
        for number in 0..machine.config.vcpus {
            machine.make_vcpu(number, isa, &cpuid)?;
        }
        Ok(machine)
    }

    fn make_vcpu(&mut self, number: u8, isa: Isa, cpuid: &CpuId) -> Result<()> {
        let vcpu = self
            .vm
            .create_vcpu(u64::from(number))
            .map_err(|error| Error::Kvm("create a vCPU", error))?;
        vcpu.set_cpuid2(&with_apic_id(cpuid, number))
            .map_err(|error| Error::Kvm("set a vCPU's CPUID leaves", error))?;
        Window::of(number).fill(&mut self.memory, &self.config);
        self.vcpus.push(vcpu);
        self.set_to_beginning(number, isa)?;
        if self.config.has_irqchip() {
            // All vCPUs but the first would wait for an INIT.
            self.vcpus[usize::from(number)]
                .set_mp_state(kvm_mp_state {
                    mp_state: KVM_MP_STATE_RUNNABLE,
                })
                .map_err(|error| Error::Kvm("set a vCPU running", error))?;
        }
        Ok(())
    }

    /// Set a vCPU's registers to the start of its program.
    fn set_to_beginning(&mut self, number: u8, isa: Isa) -> Result<()> {
        let (window, vcpu) = (Window::of(number), &self.vcpus[usize::from(number)]);
        let mut sregs = vcpu
            .get_sregs()
            .map_err(|error| Error::Kvm("read a vCPU's registers", error))?;
        window.set_mode(&mut sregs, &self.config);
        vcpu.set_sregs(&sregs)
            .map_err(|error| Error::Kvm("set a vCPU's system registers", error))?;
        let pages_each = self.config.fresh_pages() / u64::from(self.config.vcpus);
        let fresh = FRESH + u64::from(number) * pages_each * PAGE;
        vcpu.set_regs(&window.registers(&self.config, isa, fresh))
            .map_err(|error| Error::Kvm("set a vCPU's registers", error))
    }

    /// Run every vCPU to its end, each in a thread.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Guest`] for a vCPU that ends in an unexpected way.
    pub fn run(&mut self) -> Result<Vec<UserExits>> {
        self.run_with(|_| Ok(()))
    }

    /// Run every vCPU to its end like [`TinyVm::run`]. Each thread calls `begin` first, with the
    /// number of its vCPU.
    ///
    /// # Errors
    ///
    /// See [`TinyVm::run`]. Also returns the errors of `begin`.
    pub fn run_with(
        &mut self,
        begin: impl Fn(u8) -> io::Result<()> + Sync,
    ) -> Result<Vec<UserExits>> {
        let (config, vm, begin) = (&self.config, &self.vm, &begin);
        let done = &AtomicBool::new(false);
        thread::scope(|scope| {
            if config.program == Program::HltKernel {
                scope.spawn(|| wake(vm, config.hlt_time, done));
            }
            let threads: Vec<_> = (0..)
                .zip(&mut self.vcpus)
                .map(|(number, vcpu)| {
                    scope.spawn(move || {
                        begin(number).map_err(|error| Error::Kernel("begin a vCPU", error))?;
                        run_vcpu(number, vcpu, config, &|| false)
                    })
                })
                .collect();
            let seen = threads
                .into_iter()
                .map(|thread| match thread.join() {
                    Ok(seen) => seen,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect();
            done.store(true, Ordering::Relaxed);
            seen
        })
    }

    /// Run one vCPU to its end, in this thread.
    ///
    /// # Errors
    ///
    /// See [`TinyVm::run`].
    pub fn run_one(&mut self, number: u8) -> Result<UserExits> {
        self.run_one_until(number, &|| false)
    }

    /// Run one vCPU to its end, in this thread, or until a signal finds `stop` true.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Stopped`] if `stop` ended the run; else see [`TinyVm::run`].
    pub fn run_one_until(&mut self, number: u8, stop: &dyn Fn() -> bool) -> Result<UserExits> {
        let vcpu = self
            .vcpus
            .get_mut(usize::from(number))
            .ok_or_else(|| Error::Settings(format!("there is no vCPU {number}")))?;
        run_vcpu(number, vcpu, &self.config, stop)
    }

    /// Let every vCPU make new queries, as many as before.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Settings`] for another number of queries, or [`Error::Kvm`] if KVM refuses.
    pub fn set_queries(&mut self, queries: &[Registers64]) -> Result<()> {
        if queries.len() != self.config.queries.len() {
            return Err(Error::Settings(
                "a guest asks as often as before".to_owned(),
            ));
        }
        self.config.queries = queries.to_vec();
        for number in 0..self.config.vcpus {
            Window::of(number).fill(&mut self.memory, &self.config);
        }
        self.rewind()
    }

    /// Set every vCPU back to the start of its program.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Kvm`] if KVM refuses.
    pub fn rewind(&mut self) -> Result<()> {
        let isa = required_isa()?;
        for number in 0..self.config.vcpus {
            self.set_to_beginning(number, isa)?;
        }
        Ok(())
    }

    /// Return the answers of a vCPU, in the order of its queries. In real mode the upper halves are
    /// not visible to the guest, and 0 here.
    pub fn answers(&self, vcpu: u8) -> Vec<Registers64> {
        Window::of(vcpu).answers(&self.memory, &self.config)
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn memory_mut(&mut self) -> &mut Memory {
        &mut self.memory
    }

    pub(crate) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Return the first vCPU. A machine has at least one.
    pub(crate) fn first_vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpus[0]
    }

    /// Return the number of writes to the ioeventfd's port since the last call.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Kernel`] if the eventfd cannot be read.
    pub fn eventfd_writes(&self) -> Result<u64> {
        match &self.eventfd {
            None => Ok(0),
            Some(eventfd) => eventfd
                .read()
                .map_err(|error| Error::Kernel("read an eventfd", error)),
        }
    }
}

/// Return the numbers of the host's CPUs.
fn host_cpus() -> Range<usize> {
    0..thread::available_parallelism().map_or(1, NonZero::get)
}

/// Bind the calling thread to one CPU of the host.
///
/// # Errors
///
/// Returns the error of sched_setaffinity(2), or `InvalidInput` for a number that no set of CPUs
/// holds.
pub fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

/// Return the CPUID leaves for one vCPU. KVM returns those of the host CPU that happened to run the
/// call.
pub fn with_apic_id(cpuid: &CpuId, vcpu: u8) -> CpuId {
    let (mut cpuid, id) = (cpuid.clone(), u32::from(vcpu));
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => leaf.edx = id,
            0x8000_001e => (leaf.eax, leaf.ebx) = (id, leaf.ebx & !0xff | id),
            _ => {}
        }
    }
    cpuid
}

/// Create an ioeventfd of [`EVENTFD_PORT`].
fn take_port(vm: &VmFd) -> Result<EventFd> {
    let eventfd = EventFd::new(libc::EFD_NONBLOCK)
        .map_err(|error| Error::Kernel("create an eventfd", error))?;
    vm.register_ioevent(&eventfd, &IoEventAddress::Pio(EVENTFD_PORT), NoDatamatch)
        .map_err(|error| Error::Kvm("create an ioeventfd", error))?;
    Ok(eventfd)
}

/// Set up KVM's PIC as a guest would: interrupts acknowledge themselves, and all lines but [`IRQ`]
/// are masked.
fn set_up_pic(vm: &VmFd) -> Result<()> {
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_PIC_MASTER,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .map_err(|error| Error::Kvm("read the state of the PIC", error))?;
    // SAFETY: The chip asked for is a PIC, so that is the variant of the union, and any bytes are
    // valid for it.
    let pic = unsafe { &mut chip.chip.pic };
    pic.irq_base = VECTOR_BASE;
    pic.imr = !(1 << IRQ);
    pic.auto_eoi = 1;
    pic.init_state = 0;
    vm.set_irqchip(&chip)
        .map_err(|error| Error::Kvm("set the state of the PIC", error))
}

/// Send the interrupt that ends a HLT at intervals, until `done`.
fn wake(vm: &VmFd, every: Duration, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        thread::sleep(every);
        for level in [true, false] {
            if let Err(error) = vm.set_irq_line(IRQ, level) {
                eprintln!("The interrupt line cannot be set: {error}");
            }
        }
    }
}

fn run_vcpu(
    number: u8,
    vcpu: &mut VcpuFd,
    config: &Config,
    stop: &dyn Fn() -> bool,
) -> Result<UserExits> {
    let mut seen = UserExits::default();
    let mut cpus = host_cpus().cycle().skip(number.into());
    loop {
        if config.rewrite_registers {
            // KVM completes an exit to the VMM only at the next run, and until then a register may
            // be half-written. So run, and return at once.
            vcpu.set_kvm_immediate_exit(1);
            let completed = vcpu.run().map(drop);
            vcpu.set_kvm_immediate_exit(0);
            match completed {
                Err(error) if error.errno() == libc::EINTR => {
                    interfere::State::of(vcpu)?.restore(vcpu)?
                }
                other => {
                    return Err(Error::Guest {
                        vcpu: number,
                        what: format!("{other:?} instead of coming back at once"),
                    })
                }
            }
        }
        let what = match vcpu.run() {
            Ok(VcpuExit::IoOut(END_PORT, _)) => return Ok(seen),
            Ok(VcpuExit::IoOut(USER_PORT, _)) => {
                seen.ports += 1;
                let pauses = config.vmm_pause_on.is_none_or(|on| on == seen.ports);
                if pauses && !config.vmm_pause.is_zero() {
                    thread::sleep(config.vmm_pause);
                }
                if config.change_cpus {
                    if let Some(cpu) = cpus.next() {
                        pin(cpu).map_err(|error| Error::Kernel("move a vCPU", error))?;
                    }
                }
                continue;
            }
            Ok(VcpuExit::IoIn(USER_PORT, data)) => {
                seen.ports += 1;
                data.fill(0);
                continue;
            }
            Ok(VcpuExit::MmioWrite(..)) => {
                seen.registers += 1;
                continue;
            }
            Ok(VcpuExit::MmioRead(_, data)) => {
                seen.registers += 1;
                data.fill(0);
                continue;
            }
            Ok(VcpuExit::Hlt) => {
                seen.hlts += 1;
                continue;
            }
            Ok(exit) => format!("{exit:?}"),
            Err(error) if error.errno() == libc::EINTR && stop() => return Err(Error::Stopped),
            Err(error) if error.errno() == libc::EINTR => continue,
            Err(error) => error.to_string(),
        };
        let place = match (vcpu.get_regs(), vcpu.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                " at {:#x}:{:#x}, cr0 {:#x}",
                sregs.cs.base, regs.rip, sregs.cr0
            ),
            _ => String::new(),
        };
        return Err(Error::Guest {
            vcpu: number,
            what: what + &place,
        });
    }
}
