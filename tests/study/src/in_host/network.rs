// SPDX-License-Identifier: GPL-2.0

//! The host's side of the guest's network: a tap, an echo server and a stream server.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, UdpSocket},
    process::Command,
    thread,
};

use anyhow::{ensure, Context as _, Result};

/// Name of the tap.
pub const TAP: &str = "tap0";

/// Command that sets up the guest's side.
pub const GUEST: &str = "ifconfig eth0 10.0.2.2 netmask 255.255.255.0 up";

/// Set up the tap and start the servers, which run until this process ends.
pub fn set_up() -> Result<()> {
    let commands = "insmod /root/modules/tun.ko && tunctl -t tap0 >/dev/null && \
                    ifconfig lo 127.0.0.1 up && ifconfig tap0 10.0.2.1 netmask 255.255.255.0 up";
    let status = Command::new("sh").args(["-c", commands]).status()?;
    ensure!(status.success(), "cannot make the tap: {status}");
    let echo = UdpSocket::bind("10.0.2.1:7").context("no socket for the echo")?;
    thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((length, from)) = echo.recv_from(&mut bytes) {
            let _ = echo.send_to(&bytes[..length], from);
        }
    });
    let sink = TcpListener::bind("10.0.2.1:9").context("no socket for the stream")?;
    thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while let Ok((mut stream, _)) = sink.accept() {
            while stream.read(&mut bytes).is_ok_and(|length| length > 0) {}
            let _ = stream.write_all(&[1]);
        }
    });
    Ok(())
}
