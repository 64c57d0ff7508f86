// SPDX-License-Identifier: GPL-2.0

//! A snapshot as its difference from another of the same size.
//!
//! Both are rows of numbers of 8 bytes, little endian. What each has grown by, modulo 2^64, is
//! written in as few bytes as it takes, 7 bits in each, the lowest first, and the top bit set
//! in all but the last (LEB128). Bytes behind the last whole number stand as they are.

/// Bytes of a number.
const WORD: usize = 8;

/// What makes `now` of `before`; `None` when they are not of one size.
pub fn encode(before: &[u8], now: &[u8]) -> Option<Vec<u8>> {
    if before.len() != now.len() {
        return None;
    }
    let mut difference = Vec::with_capacity(now.len() / 4);
    let (olds, news) = (before.chunks_exact(WORD), now.chunks_exact(WORD));
    let rest = news.remainder();
    for (old, new) in olds.zip(news) {
        let mut grown = word(new).wrapping_sub(word(old));
        while grown >= 0x80 {
            difference.push(grown as u8 | 0x80);
            grown >>= 7;
        }
        difference.push(grown as u8);
    }
    difference.extend_from_slice(rest);
    Some(difference)
}

/// Makes of a snapshot the next one; `None` when this is not the difference between two of
/// this size.
pub fn apply(before: &[u8], difference: &[u8]) -> Option<Vec<u8>> {
    let mut now = Vec::with_capacity(before.len());
    let mut rest = difference.iter();
    let olds = before.chunks_exact(WORD);
    let tail = olds.remainder().len();
    for old in olds {
        let mut grown = 0_u64;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = *rest.next()?;
            let bits = u64::from(byte & 0x7f);
            // Of the tenth byte only one bit has room.
            if bits << shift >> shift != bits {
                return None;
            }
            grown |= bits << shift;
            if byte & 0x80 == 0 {
                break;
            }
            if shift == 63 {
                return None;
            }
        }
        now.extend_from_slice(&word(old).wrapping_add(grown).to_le_bytes());
    }
    let rest = rest.as_slice();
    now.extend_from_slice(rest);
    (rest.len() == tail).then_some(now)
}

/// The number in 8 bytes.
fn word(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
