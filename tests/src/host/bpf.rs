// SPDX-License-Identifier: GPL-2.0

//! BPF programs at the entry of kernel functions (fentry), whose runs the kernel counts.
//!
//! They are loaded by bpf(2) directly because the Rust libraries know only functions of the kernel's
//! image, not of its modules. The tool has such calls too (cli/src/bpf/sys.rs), but these tests judge
//! the tool, so they share none of its code.

use std::{
    ffi::c_long,
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    ptr,
};

use anyhow::{Context as _, Result};
use btf_rs::{Backend, Btf};

// Commands and types of linux/bpf.h.
const BPF_PROG_LOAD: c_long = 5;
const BPF_OBJ_GET_INFO_BY_FD: c_long = 15;
const BPF_RAW_TRACEPOINT_OPEN: c_long = 17;
const BPF_BTF_GET_FD_BY_ID: c_long = 19;
const BPF_BTF_GET_NEXT_ID: c_long = 23;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_FENTRY: u32 = 24;

/// Sysctl file: while it holds 1, the kernel counts the runs of all programs.
const STATS_ENABLED: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct ProgLoadAttr {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    own_btf: u32,
    function_record: u32,
    functions: u64,
    function_count: u32,
    line_record: u32,
    lines: u64,
    line_count: u32,
    attach_id: u32,
    attach_btf: u32,
    padding: u32,
}

/// The part of `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfoAttr {
    fd: u32,
    size: u32,
    info: u64,
}

/// `struct bpf_btf_info`.
#[repr(C)]
#[derive(Default)]
struct BtfInfo {
    bytes: u64,
    size: u32,
    id: u32,
    name: u64,
    name_size: u32,
    of_kernel: u32,
}

/// Call bpf(2).
///
/// # Safety
///
/// The addresses in `attributes` must be of memory that the command may read or write.
unsafe fn bpf<T>(command: c_long, attributes: &mut T) -> io::Result<RawFd> {
    let size = size_of::<T>();
    // SAFETY: The attributes have the stated size; the caller keeps the rest of the contract.
    match unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attributes), size) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value as RawFd),
    }
}

/// Call bpf(2) with a command that returns a new file descriptor.
///
/// # Safety
///
/// As for [`bpf`].
unsafe fn bpf_fd<T>(command: c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: By the contract of this function; the file is new, and nobody else's.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attributes)?)) }
}

/// Open the kernel's BTF of a module.
fn open_btf(module: &str) -> Result<OwnedFd> {
    let mut next = [0_u32; 4];
    loop {
        // The first number is the ID to start after; the kernel writes the next ID behind it.
        // SAFETY: No addresses.
        unsafe { bpf(BPF_BTF_GET_NEXT_ID, &mut next) }
            .with_context(|| format!("the kernel holds no types of {module}"))?;
        next[0] = next[1];
        let mut id = [next[1], 0, 0, 0];
        // SAFETY: No addresses.
        let Ok(types) = (unsafe { bpf_fd(BPF_BTF_GET_FD_BY_ID, &mut id) }) else {
            continue;
        };
        let mut name = [0_u8; 64];
        let mut info = BtfInfo {
            name: name.as_mut_ptr() as u64,
            name_size: name.len() as u32,
            ..BtfInfo::default()
        };
        let mut get = GetInfoAttr {
            fd: types.as_raw_fd() as u32,
            size: size_of::<BtfInfo>() as u32,
            info: ptr::from_mut(&mut info) as u64,
        };
        // SAFETY: Both buffers are local and have the stated sizes.
        unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut get) }?;
        if name.split(|byte| *byte == 0).next() == Some(module.as_bytes()) {
            return Ok(types);
        }
    }
}

/// A program at the entry of a function, attached until this is dropped.
#[derive(Debug)]
pub struct Fentry {
    program: OwnedFd,
    _link: OwnedFd,
}

impl Fentry {
    /// Attach an empty program at the entry of each of `functions` in a module, and let the kernel count
    /// the runs from now on.
    pub fn attach_all(module: &str, functions: &[&str]) -> Result<Vec<Self>> {
        fs::write(STATS_ENABLED, "1").context(STATS_ENABLED)?;
        let base = Btf::from_file_with_backend("/sys/kernel/btf/vmlinux", Backend::Mmap)
            .context("/sys/kernel/btf/vmlinux cannot be read")?;
        let path = format!("/sys/kernel/btf/{module}");
        let names =
            Btf::from_split_file(&path, &base).with_context(|| format!("{path} cannot be read"))?;
        let types = open_btf(module)?;
        let attach = |function: &&str| {
            let ids = names.resolve_ids_by_name(function)?;
            let id = ids.last().context("it has no type")?;
            Self::attach(&types, *id)
                .with_context(|| format!("no program can be attached to {function}"))
        };
        functions.iter().map(attach).collect()
    }

    fn attach(types: &OwnedFd, function: u32) -> Result<Self> {
        // r0 = 0; exit
        let instructions = [0x0000_0000_0000_00b7_u64, 0x0000_0000_0000_0095];
        let mut load = ProgLoadAttr {
            kind: BPF_PROG_TYPE_TRACING,
            instruction_count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            attach_type: BPF_TRACE_FENTRY,
            attach_id: function,
            attach_btf: types.as_raw_fd() as u32,
            ..ProgLoadAttr::default()
        };
        // SAFETY: The addresses are of the two instructions and a string, which are only read.
        let program = unsafe { bpf_fd(BPF_PROG_LOAD, &mut load) }.context("it is not loaded")?;
        // The name, which stays 0 because the type names the function, and the program.
        let mut open = [0_u64, program.as_raw_fd() as u64];
        // SAFETY: There is no name, and so no address.
        let link = unsafe { bpf_fd(BPF_RAW_TRACEPOINT_OPEN, &mut open) }.context("no link")?;
        Ok(Self {
            program,
            _link: link,
        })
    }

    /// Return how many times the program has run.
    pub fn runs(&self) -> Result<u64> {
        let path = format!("/proc/self/fdinfo/{}", self.program.as_raw_fd());
        let text = fs::read_to_string(&path)?;
        let count = text.lines().find_map(|line| line.strip_prefix("run_cnt:"));
        Ok(count.context("the kernel counts no runs")?.trim().parse()?)
    }
}
