// SPDX-License-Identifier: GPL-2.0

//! Snapshots for readers that may not open the pins, from packaging/exitmeter-bpf.socket.
//!
//! systemd listens, and for each connection runs `exitmeter bpf snapshot --without-code` as root,
//! which writes to it. So a reader opens no map. It would have to open it for writing, and a
//! process that writes these maps can make the programs read any kernel address.

use std::{
    io::{self, ErrorKind, Read as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use exitmeter_meter::reader::Snapshot;

use super::{Error, SOCKET};

/// Time limit for the other side's next bytes.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Read a snapshot from the socket.
///
/// # Errors
///
/// Returns [`Error::PinsUnreadable`] if this process cannot use the socket, or [`Error::NotGiven`].
pub fn read() -> Result<Vec<u8>, Error> {
    read_from(Path::new(SOCKET))
}

fn read_from(path: &Path) -> Result<Vec<u8>, Error> {
    let bytes = receive(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::PermissionDenied => Error::PinsUnreadable,
        ErrorKind::WouldBlock => Error::NotGiven(format!("nothing for {} s", TIMEOUT.as_secs())),
        _ => Error::NotGiven(error.to_string()),
    })?;
    match bytes.is_empty() {
        true => Err(Error::NotGiven("it closes the connection".to_owned())),
        false => Ok(bytes),
    }
}

fn receive(path: &Path) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Return true if the programs keep details. Unless details are `asked` for, check only that the
/// socket exists.
///
/// # Errors
///
/// See [`read`].
pub fn has_details(asked: bool) -> Result<bool, Error> {
    if !asked {
        return match Path::new(SOCKET).exists() {
            true => Ok(false),
            false => Err(Error::PinsUnreadable),
        };
    }
    let bytes = read()?;
    let snapshot = Snapshot::parse(&bytes).map_err(|error| Error::NotGiven(error.to_string()))?;
    Ok(snapshot.has_tables())
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, os::unix::net::UnixListener, thread};

    use super::*;

    #[test]
    fn snapshots_are_read_in_full_and_empty_ones_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        assert!(matches!(read_from(&path), Err(Error::PinsUnreadable)));
        let listener = UnixListener::bind(&path).expect("a socket");
        let other = thread::spawn(move || {
            let (mut first, _) = listener.accept().expect("a connection");
            for part in [&b"one "[..], &[b'x'; 1 << 20]] {
                first.write_all(part).expect("a reader");
            }
            drop(first);
            drop(listener.accept().expect("a connection"));
        });
        let read = read_from(&path).expect("a snapshot");
        assert_eq!(read.len(), 4 + (1 << 20));
        let error = read_from(&path).expect_err("nothing").to_string();
        assert!(error.contains("closes the connection"), "{error}");
        other.join().expect("no panic");
        // The socket's file is there, but nobody listens.
        let error = read_from(&path).expect_err("nothing").to_string();
        assert!(error.contains("refused"), "{error}");
        fs::remove_file(&path).expect("the file");
    }
}
