//! A VMM of a few hundred lines: one VM, its memory, its vCPUs, each a thread.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use exitmeter_meter::reasons::Isa;
use kvm_bindings::{
    kvm_irqchip, kvm_mp_state, kvm_pit_config, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region, CpuId, KVM_IRQCHIP_PIC_MASTER, KVM_MAX_CPUID_ENTRIES,
    KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    catalogue::{Mode, Program},
    code,
    memory::Memory,
};

/// The size of a page, in bytes.
pub const PAGE: u64 = 4096;

/// The most vCPUs a VM has: each has a window of 64 KiB in the first MiB.
pub const MAX_VCPUS: u8 = 15;

/// The most queries a guest asks: its window holds no more.
pub const MAX_QUERIES: u32 = ((WINDOW - QUERIES) / QUERY) as u32;

/// The most pages that the vCPUs of a VM touch together: 128 MiB.
pub const MAX_PAGES: u32 = 32 * 1024;

/// A vCPU's window, and what is where in it.
const WINDOW: u64 = 0x1_0000;
const VECTORS: u64 = 0;
const CODE: u64 = 0x1000;
const STACK_END: u64 = 0x3000;
const IDT: u64 = 0x3000;
const GDT: u64 = 0x4000;
const PML4: u64 = 0x5000;
const PDPT: u64 = 0x6000;
const PD: u64 = 0x7000;
const QUERIES: u64 = 0x8000;

/// Where the pages to touch begin: behind the windows.
const FRESH: u64 = 0x20_0000;

/// The size of a query in guest memory: four numbers in, four out.
const QUERY: u64 = 64;

/// What the VMM leaves where an answer is to come.
const UNANSWERED: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// The line of the interrupt that ends a HLT, and its vector in the guest.
const IRQ: u32 = 5;
const VECTOR_BASE: u8 = 0x20;
const VECTOR: u64 = VECTOR_BASE as u64 + IRQ as u64;

/// The port whose OUT ends a guest.
const END_PORT: u16 = 0xf4;
/// The port that the VMM answers.
const USER_PORT: u16 = 0x3f0;
/// The port that is an ioeventfd.
const EVENTFD_PORT: u64 = 0x510;

/// Selectors of code and data in 64-bit mode.
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;

/// Bits of control registers and of EFER.
const CR0_PE: u64 = 1 << 0;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: bit 1 is always set; IOPL 3 lets CPL 3 use ports.
const RFLAGS: u64 = 1 << 1;
const RFLAGS_IOPL: u64 = 3 << 12;

/// What can go wrong with a VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call to KVM failed.
    #[error("KVM refused to {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// A call to the kernel failed.
    #[error("the kernel refused to {0}")]
    Kernel(&'static str, #[source] std::io::Error),
    /// The settings do not go together.
    #[error("{0}")]
    Settings(String),
    /// The guest did what no guest here does.
    #[error("vCPU {vcpu} ended with {what}")]
    Guest {
        /// Which vCPU.
        vcpu: u8,
        /// How it ended.
        what: String,
    },
}

type Result<T> = std::result::Result<T, Error>;

/// The settings of a VM.
#[derive(Clone, Debug)]
pub struct Config {
    /// What every vCPU runs.
    pub program: Program,
    /// In what mode.
    pub mode: Mode,
    /// How often each loops, from 1. For [`Program::Query`] the number of queries.
    pub count: u32,
    /// How many vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// How long the VMM sleeps each time a guest's OUT comes to it.
    pub pause: Duration,
    /// How often the VMM sends the interrupt that ends a HLT.
    pub wake: Duration,
    /// What every vCPU asks, for [`Program::Query`].
    pub queries: Vec<Quad>,
}

impl Config {
    /// One vCPU that loops `count` times, under a VMM that does not sleep.
    pub fn new(program: Program, mode: Mode, count: u32) -> Self {
        Self {
            program,
            mode,
            count,
            vcpus: 1,
            pause: Duration::ZERO,
            wake: Duration::from_millis(5),
            queries: Vec::new(),
        }
    }

    /// One vCPU that asks `queries`.
    pub fn query(mode: Mode, queries: Vec<Quad>) -> Self {
        Self {
            queries,
            ..Self::new(Program::Query, mode, 0)
        }
    }

    fn loops(&self) -> u32 {
        match self.program {
            Program::Query => self.queries.len() as u32,
            _ => self.count,
        }
    }

    fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Settings(text));
        if !self.program.runs_in(self.mode) {
            return fail(format!(
                "{:?} would fault at CPL 3; choose mode real or long",
                self.program
            ));
        }
        if self.loops() == 0 {
            return fail("a guest loops at least once".into());
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return fail(format!("a VM has 1 to {MAX_VCPUS} vCPUs"));
        }
        if self.program == Program::Query && self.loops() > MAX_QUERIES {
            return fail(format!("a guest asks at most {MAX_QUERIES} queries"));
        }
        if self.fresh_pages() > u64::from(MAX_PAGES) {
            return fail(format!("a VM touches at most {MAX_PAGES} pages"));
        }
        if self.program == Program::HltKernel && self.vcpus != 1 {
            return fail("KVM's PIC interrupts the first vCPU alone; use one vCPU".into());
        }
        Ok(())
    }

    fn fresh_pages(&self) -> u64 {
        match self.program {
            Program::Touch => u64::from(self.count) * u64::from(self.vcpus),
            _ => 0,
        }
    }

    /// Whether KVM is to hold the interrupt controllers.
    fn has_irqchip(&self) -> bool {
        matches!(self.program, Program::HltKernel | Program::InKernel)
    }
}

/// Four registers: RAX, RBX, RCX, RDX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quad {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
}

impl Quad {
    /// What CPUID reads: the leaf in RAX, the subleaf in RCX, and in all else bits that an
    /// answer must not keep.
    pub fn cpuid(leaf: u32, subleaf: u32) -> Self {
        const JUNK: u64 = 0xdead_beef_0000_0000;
        Self {
            rax: JUNK | u64::from(leaf),
            rbx: JUNK | 0xbbbb_bbbb,
            rcx: JUNK | u64::from(subleaf),
            rdx: JUNK | 0xdddd_dddd,
        }
    }
}

/// What came to the VMM while a vCPU ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Port accesses, that which ends the guest left out.
    pub ports: u64,
    /// HLTs.
    pub hlts: u64,
}

/// A VM. It lives, and KVM keeps its vCPUs, until this is dropped.
#[derive(Debug)]
pub struct Machine {
    config: Config,
    // Fields drop in this order: the vCPUs and the VM before their memory.
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    eventfd: Option<EventFd>,
    memory: Memory,
}

/// Which vendor's extensions the host has, by what its CPU says.
pub fn host_isa() -> Option<Isa> {
    let features = core::arch::x86_64::__cpuid(1).ecx;
    if features & 1 << 5 != 0 {
        return Some(Isa::Vmx);
    }
    if core::arch::x86_64::__cpuid(0x8000_0000).eax < 0x8000_0001 {
        return None;
    }
    let extended = core::arch::x86_64::__cpuid(0x8000_0001).ecx;
    (extended & 1 << 2 != 0).then_some(Isa::Svm)
}

impl Machine {
    /// Makes the VM and its vCPUs, ready to run.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`] when they do not go together, else what KVM or the kernel said.
    pub fn new(config: Config) -> Result<Self> {
        config.check()?;
        let isa = host_isa().ok_or(Error::Settings(
            "this CPU has neither VT-x nor SVM".to_owned(),
        ))?;
        let kvm = Kvm::new().map_err(|error| {
            Error::Kvm(
                "open /dev/kvm; load kvm_intel or kvm_amd, and run as root",
                error,
            )
        })?;
        let vm = kvm
            .create_vm()
            .map_err(|error| Error::Kvm("make a VM", error))?;
        // Where Intel's KVM may put what it needs for real mode; no guest looks there.
        vm.set_identity_map_address(0xfffb_c000)
            .map_err(|error| Error::Kvm("set the identity map", error))?;
        vm.set_tss_address(0xfffb_d000)
            .map_err(|error| Error::Kvm("set the TSS", error))?;
        if config.has_irqchip() {
            vm.create_irq_chip()
                .map_err(|error| Error::Kvm("make interrupt controllers", error))?;
        }
        if config.program == Program::InKernel {
            vm.create_pit2(kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            })
            .map_err(|error| Error::Kvm("make a PIT", error))?;
        }
        if config.program == Program::HltKernel {
            set_up_pic(&vm)?;
        }
        let eventfd = match config.program {
            Program::OutEventfd => Some(take_port(&vm)?),
            _ => None,
        };

        let memory = Memory::new((FRESH + config.fresh_pages() * PAGE) as usize)
            .map_err(|error| Error::Kernel("give memory for the guest", error))?;
        let region = kvm_userspace_memory_region {
            memory_size: memory.len() as u64,
            userspace_addr: memory.address(),
            ..Default::default()
        };
        // SAFETY: The memory is held until the VM is gone.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|error| Error::Kvm("map the guest's memory", error))?;

        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| Error::Kvm("tell the CPUID leaves it supports", error))?;
        let mut machine = Self {
            config,
            vcpus: Vec::new(),
            vm,
            eventfd,
            memory,
        };
        for number in 0..machine.config.vcpus {
            let vcpu = machine.make_vcpu(number, isa, &cpuid)?;
            machine.vcpus.push(vcpu);
        }
        Ok(machine)
    }

    fn make_vcpu(&mut self, number: u8, isa: Isa, cpuid: &CpuId) -> Result<VcpuFd> {
        let vcpu = self
            .vm
            .create_vcpu(u64::from(number))
            .map_err(|error| Error::Kvm("make a vCPU", error))?;
        vcpu.set_cpuid2(cpuid)
            .map_err(|error| Error::Kvm("set a vCPU's CPUID leaves", error))?;
        let window = u64::from(number) * WINDOW;
        self.fill_window(window);

        let (mode, program) = (self.config.mode, self.config.program);
        let mut sregs = vcpu
            .get_sregs()
            .map_err(|error| Error::Kvm("tell a vCPU's registers", error))?;
        // The base of what the guest addresses: real mode adds it, 64-bit mode does not.
        let base = match mode {
            Mode::Real => {
                set_real_mode(&mut sregs, window, program);
                window
            }
            Mode::Long => {
                set_long_mode(&mut sregs, window, 0);
                0
            }
            Mode::User => {
                set_long_mode(&mut sregs, window, 3);
                0
            }
        };
        vcpu.set_sregs(&sregs)
            .map_err(|error| Error::Kvm("set a vCPU's system registers", error))?;

        let fresh = FRESH
            + u64::from(number) * self.config.fresh_pages() / u64::from(self.config.vcpus) * PAGE;
        let operand = match program {
            Program::Touch => fresh,
            _ => window + QUERIES,
        };
        vcpu.set_regs(&kvm_regs {
            rip: window - base + CODE + code::entry(program, isa, mode),
            rsp: window - base + STACK_END,
            rdi: u64::from(self.config.loops()),
            rsi: operand - base,
            rflags: match mode {
                Mode::User => RFLAGS | RFLAGS_IOPL,
                Mode::Real | Mode::Long => RFLAGS,
            },
            ..Default::default()
        })
        .map_err(|error| Error::Kvm("set a vCPU's registers", error))?;
        if self.config.has_irqchip() {
            // All but the first would wait for an INIT.
            vcpu.set_mp_state(kvm_mp_state {
                mp_state: KVM_MP_STATE_RUNNABLE,
            })
            .map_err(|error| Error::Kvm("set a vCPU running", error))?;
        }
        Ok(vcpu)
    }

    /// Writes a vCPU's code, tables and queries into its window.
    fn fill_window(&mut self, window: u64) {
        let handler = CODE + code::interrupt_handler(self.config.mode);
        let memory = &mut self.memory;
        memory.write(window + CODE, code::bytes());
        match self.config.mode {
            Mode::Real => {
                let vector = (window >> 4) << 16 | handler;
                memory.write(
                    window + VECTORS + VECTOR * 4,
                    &(vector as u32).to_le_bytes(),
                );
            }
            Mode::Long | Mode::User => {
                let handler = window + handler;
                // An interrupt gate: present, offset in three parts, selector.
                let gate = handler & 0xffff
                    | u64::from(CODE_SELECTOR) << 16
                    | 0x8e00 << 32
                    | (handler >> 16 & 0xffff) << 48;
                memory.write_u64(window + IDT + VECTOR * 16, gate);
                memory.write_u64(window + GDT + 8, 0x00af_9b00_0000_ffff);
                memory.write_u64(window + GDT + 16, 0x00cf_9300_0000_ffff);
                // Present, writable, for CPL 3 too; the last level in pages of 2 MiB.
                memory.write_u64(window + PML4, (window + PDPT) | 7);
                memory.write_u64(window + PDPT, (window + PD) | 7);
                for entry in 0..512 {
                    memory.write_u64(window + PD + entry * 8, entry << 21 | 0x87);
                }
            }
        }
        for (number, query) in (0..).zip(&self.config.queries) {
            let at = window + QUERIES + number * QUERY;
            let words = [
                query.rax, query.rbx, query.rcx, query.rdx, UNANSWERED, UNANSWERED, UNANSWERED,
                UNANSWERED,
            ];
            for (place, word) in (0..).zip(words) {
                memory.write_u64(at + place * 8, word);
            }
        }
    }

    /// Runs every vCPU to its end, each in a thread.
    ///
    /// # Errors
    ///
    /// [`Error::Guest`] for a vCPU that ends otherwise than it should.
    pub fn run(&mut self) -> Result<Vec<Seen>> {
        self.run_with(|_| Ok(()))
    }

    /// As [`Machine::run`]; each thread calls `begin` first, with the number of its vCPU.
    ///
    /// # Errors
    ///
    /// As [`Machine::run`], and those of `begin`.
    pub fn run_with(
        &mut self,
        begin: impl Fn(u8) -> std::io::Result<()> + Sync,
    ) -> Result<Vec<Seen>> {
        let (config, vm, begin) = (&self.config, &self.vm, &begin);
        let done = &AtomicBool::new(false);
        thread::scope(|scope| {
            if config.program == Program::HltKernel {
                scope.spawn(|| wake(vm, config.wake, done));
            }
            let threads: Vec<_> = (0..)
                .zip(&mut self.vcpus)
                .map(|(number, vcpu)| {
                    scope.spawn(move || {
                        begin(number).map_err(|error| Error::Kernel("begin a vCPU", error))?;
                        run_vcpu(number, vcpu, config.pause)
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

    /// What a vCPU was answered, in the order of its queries. In real mode the upper
    /// halves are not the guest's to see, and 0 here.
    pub fn answers(&self, vcpu: u8) -> Vec<Quad> {
        let at = u64::from(vcpu) * WINDOW + QUERIES;
        (0..self.config.queries.len() as u64)
            .map(|number| {
                let word = |place: u64| {
                    let word = self.memory.read_u64(at + number * QUERY + place * 8);
                    match self.config.mode {
                        Mode::Real => word & 0xffff_ffff,
                        Mode::Long | Mode::User => word,
                    }
                };
                Quad {
                    rax: word(4),
                    rbx: word(5),
                    rcx: word(6),
                    rdx: word(7),
                }
            })
            .collect()
    }

    /// How often the ioeventfd's port was written to, since the last call.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] when the eventfd cannot be read.
    pub fn eventfd_writes(&self) -> Result<u64> {
        match &self.eventfd {
            None => Ok(0),
            Some(eventfd) => eventfd
                .read()
                .map_err(|error| Error::Kernel("read an eventfd", error)),
        }
    }
}

/// Makes an ioeventfd of [`EVENTFD_PORT`].
fn take_port(vm: &VmFd) -> Result<EventFd> {
    let eventfd = EventFd::new(libc::EFD_NONBLOCK)
        .map_err(|error| Error::Kernel("make an eventfd", error))?;
    vm.register_ioevent(&eventfd, &IoEventAddress::Pio(EVENTFD_PORT), NoDatamatch)
        .map_err(|error| Error::Kvm("make an ioeventfd", error))?;
    Ok(eventfd)
}

/// Sets KVM's PIC as a guest would: interrupts acknowledge themselves, all lines but
/// [`IRQ`] are masked.
fn set_up_pic(vm: &VmFd) -> Result<()> {
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_PIC_MASTER,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .map_err(|error| Error::Kvm("tell the state of the PIC", error))?;
    // SAFETY: The chip asked for is a PIC, so that is the variant of the union, and any
    // bytes are valid for it.
    let pic = unsafe { &mut chip.chip.pic };
    pic.irq_base = VECTOR_BASE;
    pic.imr = !(1 << IRQ);
    pic.auto_eoi = 1;
    pic.init_state = 0;
    vm.set_irqchip(&chip)
        .map_err(|error| Error::Kvm("set the state of the PIC", error))
}

/// Sends the interrupt that ends a HLT, again and again, until `done`.
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

fn run_vcpu(number: u8, vcpu: &mut VcpuFd, pause: Duration) -> Result<Seen> {
    let mut seen = Seen::default();
    loop {
        let what = match vcpu.run() {
            Ok(VcpuExit::IoOut(END_PORT, _)) => return Ok(seen),
            Ok(VcpuExit::IoOut(USER_PORT, _)) => {
                seen.ports += 1;
                if !pause.is_zero() {
                    thread::sleep(pause);
                }
                continue;
            }
            Ok(VcpuExit::IoIn(USER_PORT, data)) => {
                seen.ports += 1;
                data.fill(0);
                continue;
            }
            Ok(VcpuExit::Hlt) => {
                seen.hlts += 1;
                continue;
            }
            Ok(exit) => format!("{exit:?}"),
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

fn set_real_mode(sregs: &mut kvm_sregs, window: u64, program: Program) {
    let segment = |type_| kvm_segment {
        base: window,
        limit: 0xffff,
        selector: (window >> 4) as u16,
        type_,
        present: 1,
        s: 1,
        ..Default::default()
    };
    sregs.cs = segment(0xb);
    let mut data = segment(0x3);
    sregs.ss = data;
    if program == Program::Touch {
        // Segments of 4 GiB, to reach beyond the first MiB.
        data.limit = 0xffff_ffff;
        data.g = 1;
    }
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
        *register = data;
    }
    sregs.idt.base = window + VECTORS;
    sregs.idt.limit = 0x3ff;
    // Not the reset value: that turns the caches off, and then SVM's KVM intercepts every
    // access to CR0.
    sregs.cr0 = CR0_NE;
}

fn set_long_mode(sregs: &mut kvm_sregs, window: u64, cpl: u8) {
    let segment = |selector: u16, type_, l| kvm_segment {
        limit: 0xffff_ffff,
        selector: selector | u16::from(cpl),
        type_,
        present: 1,
        dpl: cpl,
        s: 1,
        l,
        db: 1 - l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(CODE_SELECTOR, 0xb, 1);
    let data = segment(DATA_SELECTOR, 0x3, 0);
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.gdt.base = window + GDT;
    sregs.gdt.limit = 0x17;
    sregs.idt.base = window + IDT;
    sregs.idt.limit = 0xfff;
    sregs.cr0 = CR0_PE | CR0_NE | CR0_PG;
    sregs.cr3 = window + PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}
