// SPDX-License-Identifier: GPL-2.0

//! A running `exitmeter export`.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::Duration,
};

/// A server that ends with the test.
pub struct Server {
    pub process: Child,
    /// Address and port.
    pub address: String,
}

impl Server {
    pub fn start(arguments: &[&str]) -> Self {
        let given = ["export", "--listen", "127.0.0.1:0"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_exitmeter"));
        command.args(given).args(arguments);
        Self::of(command.stderr(Stdio::piped()).spawn().unwrap())
    }

    pub fn of(mut process: Child) -> Self {
        let mut said = String::new();
        let stderr = process.stderr.take().unwrap();
        BufReader::new(stderr).read_line(&mut said).unwrap();
        let address = said
            .split("http://")
            .nth(1)
            .and_then(|rest| rest.split('/').next());
        let address = address.unwrap_or_else(|| panic!("{said}")).to_owned();
        Self { process, address }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
    }

    /// Return the head and the body of an answer.
    pub fn ask(&self, request: &str) -> (String, String) {
        let mut stream = self.connect();
        write!(stream, "{request} HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
