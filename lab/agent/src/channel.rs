// SPDX-License-Identifier: GPL-2.0

//! Messages in checked frames, for lines that may carry other bytes too.
//!
//! | bytes | field |
//! | --- | --- |
//! | 4 | [`MAGIC`] |
//! | 1 | kind of the message |
//! | 4 | sequence number, starting from 0 at [`Message::Hello`] |
//! | 4 | length of the body, at most [`MAX_BODY`] |
//! | length | body |
//! | 4 | CRC-32 of everything above except the magic |
//!
//! Numbers are little-endian. The magic separates frames from noise, the CRC shows damage, and the sequence number
//! shows loss. After each of these the receiver continues with the next frame. Crates for framing (postcard with COBS)
//! drop the bytes between frames, which the lab keeps as noise.

use std::io::{self, Write};

/// First bytes of a frame. None of them is ASCII, and together they are not valid UTF-8.
pub const MAGIC: [u8; 4] = [0xf5, 0xe9, 0xfd, 0x9e];

/// Largest body of a frame, in bytes.
pub const MAX_BODY: usize = 1 << 16;

const HEADER: usize = MAGIC.len() + 1 + 4 + 4;

/// Message from one end to the other.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Message {
    /// The sender has started. Its sequence numbers start with this message.
    Hello,
    /// The sender's next step, to be shown to the user.
    Stage(String),
    /// A piece of the standard output of the command.
    Stdout(Vec<u8>),
    /// A piece of the standard error of the command.
    Stderr(Vec<u8>),
    /// One record of the kernel log, as /dev/kmsg gives it.
    Kernel(Vec<u8>),
    /// A file begins.
    File {
        /// Type and permissions, as in `stat`.
        mode: u32,
        /// Path relative to the out folder, of plain names only.
        path: Vec<u8>,
    },
    /// A piece of the current file.
    FileData(Vec<u8>),
    /// The current file is complete and has this many bytes.
    FileEnd(u64),
    /// The command has ended with this status, or 128 + N for signal N. Nothing follows.
    Verdict(u32),
    /// The machine cannot do what it was started for, for this reason. Nothing follows.
    Failure(String),
    /// To a guest: run this shell command.
    Run {
        /// Number that [`Message::Started`] repeats.
        number: u64,
        /// Command line for `sh -c`.
        command: Vec<u8>,
    },
    /// The messages that follow, up to the verdict, come from the command with this number.
    Started(u64),
    /// To a guest: restart the machine.
    Reboot,
}

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Self::Hello => 1,
            Self::Stage(_) => 2,
            Self::Stdout(_) => 3,
            Self::Stderr(_) => 4,
            Self::Kernel(_) => 5,
            Self::File { .. } => 6,
            Self::FileData(_) => 7,
            Self::FileEnd(_) => 8,
            Self::Verdict(_) => 9,
            Self::Failure(_) => 10,
            Self::Run { .. } => 11,
            Self::Started(_) => 12,
            Self::Reboot => 13,
        }
    }

    fn body(&self) -> Vec<u8> {
        match self {
            Self::Hello | Self::Reboot => Vec::new(),
            Self::Stage(text) | Self::Failure(text) => text.clone().into_bytes(),
            Self::Stdout(bytes)
            | Self::Stderr(bytes)
            | Self::Kernel(bytes)
            | Self::FileData(bytes) => bytes.clone(),
            Self::Run { number, command } => [&number.to_le_bytes()[..], command].concat(),
            Self::File { mode, path } => [&mode.to_le_bytes()[..], path].concat(),
            Self::FileEnd(number) | Self::Started(number) => number.to_le_bytes().to_vec(),
            Self::Verdict(status) => status.to_le_bytes().to_vec(),
        }
    }

    fn parse(kind: u8, body: &[u8]) -> Option<Self> {
        let bytes = || body.to_vec();
        let text = || String::from_utf8_lossy(body).into_owned();
        let number = || Some(u64::from_le_bytes(body.try_into().ok()?));
        Some(match kind {
            1 if body.is_empty() => Self::Hello,
            2 => Self::Stage(text()),
            3 => Self::Stdout(bytes()),
            4 => Self::Stderr(bytes()),
            5 => Self::Kernel(bytes()),
            6 => {
                let (mode, path) = body.split_first_chunk()?;
                Self::File {
                    mode: u32::from_le_bytes(*mode),
                    path: path.to_vec(),
                }
            }
            7 => Self::FileData(bytes()),
            8 => Self::FileEnd(number()?),
            9 => Self::Verdict(u32::from_le_bytes(body.try_into().ok()?)),
            10 => Self::Failure(text()),
            11 => {
                let (number, command) = body.split_first_chunk()?;
                Self::Run {
                    number: u64::from_le_bytes(*number),
                    command: command.to_vec(),
                }
            }
            12 => Self::Started(number()?),
            13 if body.is_empty() => Self::Reboot,
            _ => return None,
        })
    }
}

/// Sending end of a line.
#[derive(Debug)]
pub struct Sender<W> {
    line: W,
    sequence: u32,
}

impl<W: Write> Sender<W> {
    /// Create a sender that has sent nothing yet.
    pub fn new(line: W) -> Self {
        Self { line, sequence: 0 }
    }

    /// Send one message in one write.
    ///
    /// # Errors
    ///
    /// Errors of the line, and a body larger than [`MAX_BODY`]. Only a path or a command can be that long, as other
    /// bytes go through [`Sender::send_pieces`].
    pub fn send(&mut self, message: &Message) -> io::Result<()> {
        let body = message.body();
        if body.len() > MAX_BODY {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the message is too long for one frame",
            ));
        }
        if *message == Message::Hello {
            self.sequence = 0;
        }
        let mut frame = Vec::with_capacity(HEADER + body.len() + 4);
        frame.extend_from_slice(&MAGIC);
        frame.push(message.kind());
        frame.extend_from_slice(&self.sequence.to_le_bytes());
        // CAST: at most MAX_BODY.
        frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
        frame.extend_from_slice(&body);
        let crc = crc32fast::hash(&frame[MAGIC.len()..]);
        frame.extend_from_slice(&crc.to_le_bytes());
        self.sequence = self.sequence.wrapping_add(1);
        self.line.write_all(&frame)?;
        self.line.flush()
    }

    /// Send bytes of any length, in as many messages as they need.
    ///
    /// # Errors
    ///
    /// Errors of the line.
    pub fn send_pieces(
        &mut self,
        kind: impl Fn(Vec<u8>) -> Message,
        bytes: &[u8],
    ) -> io::Result<()> {
        bytes
            .chunks(MAX_BODY)
            .try_for_each(|piece| self.send(&kind(piece.to_vec())))
    }
}

/// Item received over the line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Item {
    /// A complete frame, in sequence.
    Message(Message),
    /// Bytes that belong to no frame.
    Noise(Vec<u8>),
    /// A frame was lost or garbled, as the text describes.
    Damage(String),
}

/// Receiving end of a line. Turns bytes into items.
#[derive(Debug, Default)]
pub struct Receiver {
    pending: Vec<u8>,
    /// Sequence number of the next frame; unknown before the first.
    expected: Option<u32>,
}

impl Receiver {
    /// Create a receiver that has received nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Take the next bytes of the line and return the items that they complete.
    pub fn receive(&mut self, bytes: &[u8]) -> Vec<Item> {
        self.pending.extend_from_slice(bytes);
        let mut items = Vec::new();
        let mut start = 0;
        while let Some((length, item)) = self.take(start, &mut items) {
            start += length;
            items.extend(item);
        }
        self.pending.drain(..start);
        items
    }

    /// End the line and return the remaining bytes as damage or noise.
    pub fn finish(&mut self) -> Vec<Item> {
        let rest = std::mem::take(&mut self.pending);
        if rest.is_empty() {
            Vec::new()
        } else if rest.starts_with(&MAGIC) {
            vec![Item::Damage(format!(
                "the line ended {} bytes into a frame",
                rest.len()
            ))]
        } else {
            vec![Item::Noise(rest)]
        }
    }

    /// Decode the pending bytes from `start`. Return the number of bytes consumed and their item, and add a loss that
    /// precedes the item to `before`.
    fn take(&mut self, start: usize, before: &mut Vec<Item>) -> Option<(usize, Option<Item>)> {
        let rest = &self.pending[start..];
        if rest.is_empty() {
            return None;
        }
        let magic = find_magic(rest);
        if magic > 0 {
            return Some((magic, Some(Item::Noise(rest[..magic].to_vec()))));
        }
        let header: &[u8; HEADER] = rest.first_chunk()?;
        let [_, _, _, _, kind, s0, s1, s2, s3, l0, l1, l2, l3] = *header;
        let sequence = u32::from_le_bytes([s0, s1, s2, s3]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        // From here on, skip no more than the magic: the bytes that follow may hold a complete frame.
        let damage = |text: String| Some((MAGIC.len(), Some(Item::Damage(text))));
        if length > MAX_BODY {
            return damage(format!("a frame claims {length} bytes"));
        }
        let checked = rest.get(MAGIC.len()..HEADER + length)?;
        let crc: &[u8; 4] = rest[HEADER + length..].first_chunk()?;
        if crc32fast::hash(checked) != u32::from_le_bytes(*crc) {
            return damage("a frame is garbled".to_owned());
        }
        let Some(message) = Message::parse(kind, &rest[HEADER..HEADER + length]) else {
            return damage(format!("a frame of the unknown kind {kind}"));
        };
        let expected = if message == Message::Hello {
            None
        } else {
            self.expected
        };
        match expected {
            Some(expected) if expected != sequence => before.push(Item::Damage(format!(
                "frame {sequence} came in the place of frame {expected}"
            ))),
            _ => {}
        }
        self.expected = Some(sequence.wrapping_add(1));
        Some((HEADER + length + 4, Some(Item::Message(message))))
    }
}

/// Return the position of the first magic, which the end may cut off, or the length if there is none.
fn find_magic(bytes: &[u8]) -> usize {
    (0..bytes.len())
        .find(|&at| {
            let rest = &bytes[at..];
            rest.starts_with(&MAGIC) || MAGIC.starts_with(rest)
        })
        .unwrap_or(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<Message> {
        vec![
            Message::Hello,
            Message::Stage("loading kvm".to_owned()),
            Message::Stdout(b"one\n".to_vec()),
            Message::Stderr(MAGIC.to_vec()),
            Message::Kernel(b"6,1,2,-;text".to_vec()),
            Message::File {
                mode: 0o100_644,
                path: b"a/b".to_vec(),
            },
            Message::FileData(vec![0; MAX_BODY]),
            Message::FileEnd(MAX_BODY as u64),
            Message::Failure("no KVM".to_owned()),
            Message::Run {
                number: u64::MAX,
                command: b"true".to_vec(),
            },
            Message::Started(u64::MAX),
            Message::Reboot,
            Message::Verdict(7),
        ]
    }

    fn encode(messages: &[Message]) -> Vec<u8> {
        let mut line = Vec::new();
        let mut sender = Sender::new(&mut line);
        for message in messages {
            sender.send(message).unwrap();
        }
        line
    }

    fn messages(items: Vec<Item>) -> Vec<Message> {
        items
            .into_iter()
            .filter_map(|item| match item {
                Item::Message(message) => Some(message),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn every_message_survives_any_split_of_the_line() {
        let line = encode(&sample());
        for size in [1, 3, 17, 4096, line.len()] {
            let mut receiver = Receiver::new();
            let mut items = Vec::new();
            for piece in line.chunks(size) {
                items.extend(receiver.receive(piece));
            }
            assert_eq!(receiver.finish(), []);
            let expected: Vec<_> = sample().into_iter().map(Item::Message).collect();
            assert_eq!(items, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn noise_around_frames_is_separated() {
        let mut line = b"Bochs x86 Emulator 3.0\n".to_vec();
        line.extend(encode(&[Message::Hello]));
        line.extend(b"bye\xf5\xe9");
        let mut receiver = Receiver::new();
        let mut items = receiver.receive(&line);
        items.extend(receiver.finish());
        assert_eq!(
            items,
            [
                Item::Noise(b"Bochs x86 Emulator 3.0\n".to_vec()),
                Item::Message(Message::Hello),
                Item::Noise(b"bye".to_vec()),
                Item::Noise(b"\xf5\xe9".to_vec()),
            ]
        );
    }

    #[test]
    fn a_flipped_byte_is_detected_and_costs_one_message() {
        let sent = [
            Message::Hello,
            Message::Stdout(b"abc".to_vec()),
            Message::Verdict(0),
        ];
        let line = encode(&sent);
        let second = encode(&sent[..1]).len()..encode(&sent[..2]).len();
        for at in second {
            let mut damaged = line.clone();
            damaged[at] ^= 0x20;
            let mut receiver = Receiver::new();
            let mut items = receiver.receive(&damaged);
            // A length that grew takes in all that follows until the line ends.
            let rest = receiver.finish();
            let swallowed = rest.iter().any(|item| matches!(item, Item::Damage(_)));
            items.extend(rest);
            assert!(
                items.iter().any(|item| matches!(item, Item::Damage(_))),
                "byte {at}: {items:?}"
            );
            let rest = messages(items);
            if !swallowed {
                assert_eq!(rest, [Message::Hello, Message::Verdict(0)], "byte {at}");
            }
        }
    }

    #[test]
    fn a_lost_frame_is_detected() {
        let sent = [
            Message::Hello,
            Message::Stdout(b"abc".to_vec()),
            Message::Verdict(0),
        ];
        let line = encode(&sent);
        let (first, second) = (encode(&sent[..1]).len(), encode(&sent[..2]).len());
        let mut receiver = Receiver::new();
        let items = receiver.receive(&[&line[..first], &line[second..]].concat());
        assert!(
            matches!(&items[1], Item::Damage(text) if text.contains("frame 2")),
            "{items:?}"
        );
    }

    #[test]
    fn a_line_that_ends_in_a_frame_is_damaged() {
        let line = encode(&[Message::Hello, Message::Verdict(0)]);
        let mut receiver = Receiver::new();
        assert_eq!(
            receiver.receive(&line[..line.len() - 1]),
            [Item::Message(Message::Hello)]
        );
        assert!(matches!(receiver.finish()[..], [Item::Damage(_)]));
    }

    #[test]
    fn a_restarted_sender_is_not_a_loss() {
        let line = [
            encode(&sample()),
            encode(&[Message::Hello, Message::Verdict(1)]),
        ]
        .concat();
        let items = Receiver::new().receive(&line);
        assert!(items.iter().all(|item| matches!(item, Item::Message(_))));
    }
}
