// SPDX-License-Identifier: GPL-2.0

//! Calls of bpf(2) for programs and their links.
//!
//! aya parses and links the object, and makes the maps. It cannot load these programs itself: it
//! does not know calls of kernel functions, the address of a map's value that a reader maps, or
//! fentry on functions of a module.

use std::{
    ffi::{c_long, c_ulong, CStr, CString},
    fs, io, mem,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use aya_obj::{
    generated::{
        bpf_attach_type, bpf_attr, bpf_btf_info, bpf_cmd, bpf_prog_type, perf_event_attr,
        PERF_FLAG_FD_CLOEXEC,
    },
    Function,
};

/// Size of the verifier's log for a refused program, in bytes.
const LOG: usize = 1 << 20;

/// File that holds the event type of kprobes.
const KPROBE: &str = "/sys/bus/event_source/devices/kprobe/type";

/// Function of the kernel or of a module, as fentry names it.
#[derive(Debug)]
pub struct Target<'a> {
    /// Types of the module; `None` for the kernel image.
    pub types: Option<BorrowedFd<'a>>,
    /// Id of the function in these types.
    pub id: u32,
}

/// Error of a program that the kernel refuses.
#[derive(Debug)]
pub struct Refusal {
    /// Error of the call.
    pub error: io::Error,
    /// Log of the verifier.
    pub log: String,
}

/// Call bpf(2).
///
/// # Safety
///
/// The attributes are those of the command, and each address in them refers to memory that the
/// command may read or write.
unsafe fn bpf(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<c_long> {
    let size = size_of::<bpf_attr>();
    // SAFETY: The attributes have this size, and the caller vouches for their content.
    match unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as c_long,
            ptr::from_mut(attributes),
            size,
        )
    } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// Call bpf(2) with a command that creates a file.
///
/// # Safety
///
/// See [`bpf`].
unsafe fn create(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<OwnedFd> {
    // SAFETY: The caller vouches for the attributes.
    let file = unsafe { bpf(command, attributes) }?;
    let file = i32::try_from(file).map_err(io::Error::other)?;
    // SAFETY: The file descriptor is new, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(file) })
}

/// Return zeroed attributes.
fn attributes() -> bpf_attr {
    // SAFETY: A union of numbers, for which zeros are valid.
    unsafe { mem::zeroed() }
}

/// Return the file descriptor of `file` as bpf(2) takes it.
fn raw_fd(file: impl AsFd) -> u32 {
    file.as_fd().as_raw_fd().unsigned_abs()
}

/// Load the types of the object into the kernel.
///
/// # Errors
///
/// Returns the error of bpf(2).
pub fn load_types(types: &[u8]) -> io::Result<OwnedFd> {
    let mut attributes = attributes();
    // SAFETY: This is the command's part of the union.
    let this = unsafe { &mut attributes.__bindgen_anon_7 };
    this.btf = types.as_ptr() as u64;
    this.btf_size = u32::try_from(types.len()).map_err(io::Error::other)?;
    // SAFETY: The types are borrowed for as long as the call takes.
    unsafe { create(bpf_cmd::BPF_BTF_LOAD, &mut attributes) }
}

/// Type of attachment that a program is loaded for.
#[derive(Debug)]
pub enum Purpose<'a> {
    /// The program type says all.
    Plain,
    /// Entry of a function, by fentry.
    Fentry(&'a Target<'a>),
    /// Kprobe without a perf event.
    KprobeMulti,
}

/// Load a program. `types` are the types of its object.
///
/// # Errors
///
/// Returns the kernel's error and the verifier's log.
pub fn load(
    kind: bpf_prog_type,
    function: &Function,
    license: &CStr,
    types: BorrowedFd<'_>,
    purpose: &Purpose<'_>,
) -> Result<OwnedFd, Refusal> {
    let mut attributes = attributes();
    let functions = function.func_info.func_info_bytes();
    let lines = function.line_info.line_info_bytes();
    // SAFETY: This is the command's part of the union.
    let this = unsafe { &mut attributes.__bindgen_anon_3 };
    this.prog_type = kind as u32;
    // The kernel requires a zero at the end.
    for (to, from) in this.prog_name[..15].iter_mut().zip(function.name.bytes()) {
        *to = from as i8;
    }
    this.insns = function.instructions.as_ptr() as u64;
    this.insn_cnt = function.instructions.len() as u32;
    this.license = license.as_ptr() as u64;
    this.prog_btf_fd = raw_fd(types);
    this.func_info = functions.as_ptr() as u64;
    this.func_info_cnt = function.func_info.len() as u32;
    this.func_info_rec_size = function.func_info_rec_size as u32;
    this.line_info = lines.as_ptr() as u64;
    this.line_info_cnt = function.line_info.len() as u32;
    this.line_info_rec_size = function.line_info_rec_size as u32;
    match purpose {
        Purpose::Plain => {}
        Purpose::Fentry(target) => {
            this.expected_attach_type = bpf_attach_type::BPF_TRACE_FENTRY as u32;
            this.attach_btf_id = target.id;
            this.__bindgen_anon_1.attach_btf_obj_fd = target.types.map_or(0, raw_fd);
        }
        Purpose::KprobeMulti => {
            this.expected_attach_type = bpf_attach_type::BPF_TRACE_KPROBE_MULTI as u32;
        }
    }
    // SAFETY: The instructions, the license and the records live until the call returns.
    let error = match unsafe { create(bpf_cmd::BPF_PROG_LOAD, &mut attributes) } {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    // Load again with a log, to get the verifier's reason.
    let mut log = vec![0_u8; LOG];
    // SAFETY: This is the command's part of the union.
    let this = unsafe { &mut attributes.__bindgen_anon_3 };
    this.log_level = 1;
    this.log_size = LOG as u32;
    this.log_buf = log.as_mut_ptr() as u64;
    // SAFETY: As before, and the log has the stated size.
    match unsafe { create(bpf_cmd::BPF_PROG_LOAD, &mut attributes) } {
        Ok(program) => Ok(program),
        Err(_) => {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(LOG);
            let log = String::from_utf8_lossy(&log[..end]).into_owned();
            Err(Refusal { error, log })
        }
    }
}

/// Attach a program to a tracepoint, or, without a name, to the function that it was loaded for.
///
/// # Errors
///
/// Returns the error of bpf(2).
pub fn attach(tracepoint: Option<&CStr>, program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attributes = attributes();
    attributes.raw_tracepoint.name = tracepoint.map_or(0, |name| name.as_ptr() as u64);
    attributes.raw_tracepoint.prog_fd = raw_fd(program);
    // SAFETY: The name lives until the call returns.
    unsafe { create(bpf_cmd::BPF_RAW_TRACEPOINT_OPEN, &mut attributes) }
}

/// Create a kprobe at the entry of a function. It calls nothing until a program is linked to it.
///
/// # Errors
///
/// Returns the error of perf_event_open(2).
pub fn kprobe(function: &CStr) -> io::Result<OwnedFd> {
    let kind = fs::read_to_string(KPROBE)?;
    // SAFETY: A struct of numbers, for which zeros are valid.
    let mut event: perf_event_attr = unsafe { mem::zeroed() };
    event.size = size_of::<perf_event_attr>() as u32;
    event.type_ = kind.trim().parse().map_err(io::Error::other)?;
    event.__bindgen_anon_3.config1 = function.as_ptr() as u64;
    let (every_task, first_cpu, no_group) = (-1, 0, -1);
    // SAFETY: The event has the size that it states, and the name lives until the call returns.
    let file = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            ptr::from_ref(&event),
            every_task,
            first_cpu,
            no_group,
            c_ulong::from(PERF_FLAG_FD_CLOEXEC),
        )
    };
    match i32::try_from(file) {
        // SAFETY: The file descriptor is new, and nobody else owns it.
        Ok(file) if file >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(file) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Link a program to a kprobe, which then calls it. The link keeps both.
///
/// # Errors
///
/// Returns the error of bpf(2).
pub fn link(kprobe: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attributes = attributes();
    attributes.link_create.__bindgen_anon_1.prog_fd = raw_fd(program);
    attributes.link_create.__bindgen_anon_2.target_fd = raw_fd(kprobe);
    attributes.link_create.attach_type = bpf_attach_type::BPF_PERF_EVENT as u32;
    // SAFETY: No addresses.
    unsafe { create(bpf_cmd::BPF_LINK_CREATE, &mut attributes) }
}

/// Attach a program, loaded for [`Purpose::KprobeMulti`], to the entry of a function without a perf
/// event. Needs Linux 5.18, and 6.2 for functions of modules; CAP_PERFMON is enough, whatever
/// kernel.perf_event_paranoid is.
///
/// # Errors
///
/// Returns the error of bpf(2).
pub fn kprobe_multi(function: &CStr, program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let names = [function.as_ptr() as u64];
    let mut attributes = attributes();
    attributes.link_create.__bindgen_anon_1.prog_fd = raw_fd(program);
    attributes.link_create.attach_type = bpf_attach_type::BPF_TRACE_KPROBE_MULTI as u32;
    // SAFETY: This is the command's part of the union, for links of this kind.
    let this = unsafe { &mut attributes.link_create.__bindgen_anon_3.kprobe_multi };
    this.cnt = 1;
    this.syms = names.as_ptr() as u64;
    // SAFETY: The name and the list that holds it live until the call returns.
    unsafe { create(bpf_cmd::BPF_LINK_CREATE, &mut attributes) }
}

/// Pin a link in the BPF file system.
///
/// # Errors
///
/// Returns the error of bpf(2).
pub fn pin(link: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let mut attributes = attributes();
    // SAFETY: This is the command's part of the union.
    let this = unsafe { &mut attributes.__bindgen_anon_4 };
    this.bpf_fd = raw_fd(link);
    this.pathname = path.as_ptr() as u64;
    // SAFETY: The path lives until the call returns.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attributes) }.map(drop)
}

/// Return the types of a module as the kernel holds them. Returns `None` if it has none, or if this
/// process lacks CAP_SYS_ADMIN, which the search needs.
pub fn types_of(module: &str) -> Option<OwnedFd> {
    let mut id = 0;
    loop {
        let mut next = attributes();
        next.__bindgen_anon_6.__bindgen_anon_1.start_id = id;
        // SAFETY: No addresses.
        unsafe { bpf(bpf_cmd::BPF_BTF_GET_NEXT_ID, &mut next) }.ok()?;
        // SAFETY: This is the command's part of the union, and the command has filled it.
        id = unsafe { next.__bindgen_anon_6.next_id };

        let mut open = attributes();
        open.__bindgen_anon_6.__bindgen_anon_1.btf_id = id;
        // SAFETY: No addresses.
        let Ok(types) = (unsafe { create(bpf_cmd::BPF_BTF_GET_FD_BY_ID, &mut open) }) else {
            continue;
        };
        let mut name = [0_u8; 64];
        // SAFETY: A struct of numbers, for which zeros are valid.
        let mut info: bpf_btf_info = unsafe { mem::zeroed() };
        info.name = name.as_mut_ptr() as u64;
        info.name_len = name.len() as u32;
        let mut ask = attributes();
        ask.info.bpf_fd = raw_fd(&types);
        ask.info.info_len = size_of::<bpf_btf_info>() as u32;
        ask.info.info = ptr::from_mut(&mut info) as u64;
        // SAFETY: Both buffers are ours and have the stated sizes.
        unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut ask) }.ok()?;
        if name.split(|byte| *byte == 0).next() == Some(module.as_bytes()) {
            return Some(types);
        }
    }
}
