// SPDX-License-Identifier: GPL-2.0

//! The work of a guest in the study. Each word on the command line names a piece of work of a fixed amount.

use std::{
    alloc::{self, Layout},
    fs::{File, OpenOptions},
    hint::black_box,
    io::{self, Read as _, Write as _},
    net::{TcpStream, UdpSocket},
    os::{
        fd::AsRawFd as _,
        unix::{fs::OpenOptionsExt as _, net::UnixStream},
    },
    process::{Command, ExitCode},
    slice,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use tiny_guests::pin;

// Amount of each kind of work.
const STEPS: u64 = 20_000_000;
const SLEEPS: u32 = 200;
const PROCESSES: u32 = 20;
const PAGES: usize = 2048;
const BARRIERS: u32 = 100;
const WAKES: u32 = 200;
const BLOCKS: usize = 64;
const BLOCK: usize = 65536;
const PINGS: u32 = 100;
const STREAM: usize = 1 << 20;
const LETTERS: usize = 1000;

/// Addresses of the host's echo server and stream server.
const ECHO: &str = "10.0.2.1:7";
const SINK: &str = "10.0.2.1:9";

fn main() -> ExitCode {
    for word in std::env::args().skip(1) {
        let done = match &*word {
            "compute" => compute(),
            "timers" => timers(),
            "processes" => processes(),
            "memory" => memory(),
            "ipi" => ipi(),
            "wake" => wake(),
            "write" => disk(true),
            "read" => disk(false),
            "ping" => ping(),
            "stream" => stream(),
            "console" => console(),
            _ => Err(io::Error::other("unknown work")),
        };
        if let Err(error) = done {
            eprintln!("{word}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Do arithmetic, without a system call.
fn compute() -> io::Result<()> {
    let mut state = 1_u64;
    for _ in 0..STEPS {
        state = black_box(state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1));
    }
    Ok(())
}

/// Sleep for 1 ms, again and again.
fn timers() -> io::Result<()> {
    for _ in 0..SLEEPS {
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Create processes, each of which runs and ends.
fn processes() -> io::Result<()> {
    for _ in 0..PROCESSES {
        Command::new("/bin/true").status()?;
    }
    Ok(())
}

/// Write to new pages of 4 KiB.
fn memory() -> io::Result<()> {
    let mut pages = vec![0_u8; PAGES * 4096];
    for page in pages.chunks_mut(4096) {
        page[0] = 1;
    }
    black_box(&mut pages);
    Ok(())
}

fn membarrier(command: libc::c_int) -> io::Result<()> {
    // SAFETY: The call takes only numbers.
    match unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Send interrupts from one CPU to another that computes, by memory barriers on all CPUs of this process.
fn ipi() -> io::Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)?;
    pin(0)?;
    let other = thread::spawn(|| {
        pin(1)?;
        while !DONE.load(Ordering::Relaxed) {
            black_box(());
        }
        Ok(())
    });
    // By then the thread runs on the other CPU.
    thread::sleep(Duration::from_millis(20));
    for _ in 0..BARRIERS {
        membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)?;
    }
    DONE.store(true, Ordering::Relaxed);
    other
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a thread ended early")))
}

/// Let two threads on two CPUs wake each other in turn.
fn wake() -> io::Result<()> {
    let (mut here, mut there) = UnixStream::pair()?;
    pin(0)?;
    let other = thread::spawn(move || {
        pin(1)?;
        let mut byte = [0];
        for _ in 0..WAKES {
            there.read_exact(&mut byte)?;
            there.write_all(&byte)?;
        }
        Ok(())
    });
    let mut byte = [0];
    for _ in 0..WAKES {
        here.write_all(&byte)?;
        here.read_exact(&mut byte)?;
    }
    other
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a thread ended early")))
}

/// Write blocks of 64 KiB to the disk, or read them, past the guest's cache.
fn disk(write: bool) -> io::Result<()> {
    let mut disk: File = OpenOptions::new()
        .read(!write)
        .write(write)
        .custom_flags(libc::O_DIRECT)
        .open("/dev/vda")?;
    let layout = Layout::from_size_align(BLOCK, 4096).map_err(io::Error::other)?;
    // SAFETY: The size of the layout is not 0.
    let memory = unsafe { alloc::alloc_zeroed(layout) };
    if memory.is_null() {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    // SAFETY: The memory was just allocated with that size, zeroed, and is never freed.
    let block: &mut [u8] = unsafe { slice::from_raw_parts_mut(memory, BLOCK) };
    for _ in 0..BLOCKS {
        match write {
            true => disk.write_all(block)?,
            false => disk.read_exact(block)?,
        }
    }
    // SAFETY: The file is open.
    match unsafe { libc::fdatasync(disk.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Send datagrams to the host, and wait for the echo of each.
fn ping() -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.connect(ECHO)?;
    let mut bytes = [0; 64];
    for _ in 0..PINGS {
        socket.send(&bytes)?;
        socket.recv(&mut bytes)?;
    }
    Ok(())
}

/// Send a stream to the host, which answers once it has all of it.
fn stream() -> io::Result<()> {
    let mut stream = TcpStream::connect(SINK)?;
    stream.write_all(&vec![0; STREAM])?;
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_exact(&mut [0])
}

/// Write letters to the console.
fn console() -> io::Result<()> {
    let mut console = OpenOptions::new().write(true).open("/dev/ttyS0")?;
    console.write_all(&[b'x'; LETTERS])?;
    // SAFETY: The terminal is open.
    match unsafe { libc::tcdrain(console.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
