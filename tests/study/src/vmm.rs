// SPDX-License-Identifier: GPL-2.0

//! A minimal VMM for a packaged Linux: one vCPU, memory, KVM's own interrupt controllers and timer, and two serial ports. It
//! has no firmware, no ACPI, no PCI and no disk. A triple fault restarts the guest.

mod kernel;
mod memory;
mod uart;

use std::{
    fs::File,
    io::Read as _,
    os::unix::net::UnixListener,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{bail, Context as _, Result};
use kvm_bindings::{
    kvm_pit_config, kvm_segment, kvm_userspace_memory_region, KVM_MAX_CPUID_ENTRIES,
    KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use tiny_guests::with_apic_id;

use self::{memory::Memory, uart::Uart};

/// Memory of the guest, in bytes.
const MEMORY: usize = 256 << 20;

/// Command line of the kernel. It spares the kernel probing for firmware and PCI.
const COMMAND_LINE: &str =
    "console=ttyS0,115200 rdinit=/bin/guest-init quiet mitigations=off tsc=reliable nokaslr \
                            reboot=t panic=-1 random.trust_cpu=on acpi=off pci=off";

/// First I/O port and interrupt of each serial port. The first is the console, the second takes commands.
const PORTS: [(u16, u32); 2] = [(0x3f8, 4), (0x2f8, 3)];

/// Paths that the serial ports connect to.
pub struct SerialPorts<'a> {
    /// Socket to listen at for the sender of commands.
    pub commands: &'a str,
    /// File for the output of the console.
    pub console: &'a str,
}

/// Boot the kernel with this initramfs, again and again. Ends by a signal, or with an error when the guest exits in a way that
/// the VMM does not handle.
pub fn run(kernel: &Path, initramfs: &Path, ports: &SerialPorts<'_>) -> Result<()> {
    let listener =
        UnixListener::bind(ports.commands).context("cannot open the socket for commands")?;
    let console = File::create(ports.console).context("cannot create the file for the console")?;
    let (commands, _) = listener.accept()?;
    let uarts = [
        Arc::new(Mutex::new(Uart::new(console)?)),
        Arc::new(Mutex::new(Uart::new(commands.try_clone()?)?)),
    ];
    let second = Arc::clone(&uarts[1]);
    thread::spawn(move || {
        let mut commands = commands;
        let mut bytes = [0; 256];
        while let Ok(length @ 1..) = commands.read(&mut bytes) {
            lock(&second).receive(&bytes[..length]);
        }
    });
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    loop {
        let memory = Memory::new(MEMORY)?;
        let entry = kernel::load(&memory, kernel, initramfs, COMMAND_LINE)?;
        let vm = create_vm(&kvm, &memory, &uarts)?;
        let vcpu = create_vcpu(&kvm, &vm, entry)?;
        run_until_reset(vcpu, &uarts)?;
    }
}

fn lock(uart: &Mutex<Uart>) -> std::sync::MutexGuard<'_, Uart> {
    uart.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Create the VM, without its vCPU.
fn create_vm(kvm: &Kvm, memory: &Memory, uarts: &[Arc<Mutex<Uart>>; 2]) -> Result<VmFd> {
    let vm = kvm.create_vm()?;
    // Intel's KVM puts pages there that it needs for real mode. No guest uses these addresses.
    vm.set_identity_map_address(0xfffb_c000)?;
    vm.set_tss_address(0xfffb_d000)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })?;
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: memory.address(),
        ..Default::default()
    };
    // SAFETY: The caller keeps the memory until the VM is gone.
    unsafe { vm.set_user_memory_region(region) }?;
    for (uart, (_, line)) in uarts.iter().zip(PORTS) {
        let mut uart = lock(uart);
        uart.reset();
        vm.register_irqfd(uart.interrupt(), line)?;
    }
    Ok(vm)
}

/// Create a vCPU in the state that PVH demands: protected mode, flat segments, no paging, and EBX pointing to the start
/// info.
fn create_vcpu(kvm: &Kvm, vm: &VmFd, entry: u64) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(0)?;
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let mut cpuid = with_apic_id(&supported, 0);
    for leaf in cpuid
        .as_mut_slice()
        .iter_mut()
        .filter(|leaf| leaf.function == 1)
    {
        // CPUID.1:ECX[31]: running under a hypervisor.
        leaf.ecx |= 1 << 31;
    }
    vcpu.set_cpuid2(&cpuid)?;
    let segment = |type_: u8, selector: u16, code: u8| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: code,
        s: code,
        g: code,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = segment(0xb, 0x8, 1);
    let data = segment(0x3, 0x10, 1);
    [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss] = [data; 5];
    sregs.tr = kvm_segment {
        limit: 0x67,
        ..segment(0xb, 0x18, 0)
    };
    // CR0: PE, and ET, which is always set.
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = entry;
    regs.rbx = kernel::START_INFO;
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;
    Ok(vcpu)
}

/// Run the vCPU until it resets itself.
fn run_until_reset(mut vcpu: VcpuFd, uarts: &[Arc<Mutex<Uart>>; 2]) -> Result<()> {
    let uart = |port: u16| {
        let place = PORTS.iter().position(|(first, _)| port & !7 == *first)?;
        Some((&uarts[place], port & 7))
    };
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, bytes)) => {
                if let Some((uart, register)) = uart(port) {
                    lock(uart).write(register, bytes[0])?;
                }
            }
            Ok(VcpuExit::IoIn(port, bytes)) => {
                bytes.fill(match (uart(port), port) {
                    (Some((uart, register)), _) => lock(uart).read(register),
                    // 0 keeps the guest from waiting for these devices.
                    (None, 0x61 | 0x64 | 0x71) => 0,
                    (None, _) => 0xff,
                });
            }
            Ok(VcpuExit::MmioRead(_, bytes)) => bytes.fill(0xff),
            Ok(VcpuExit::MmioWrite(..)) => {}
            Ok(VcpuExit::Shutdown) => return Ok(()),
            Ok(exit) => bail!("the guest ended with {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error).context("KVM cannot run the guest"),
        }
    }
}
