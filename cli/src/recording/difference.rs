// SPDX-License-Identifier: GPL-2.0

//! Encoding of a snapshot as its difference from another of the same size.
//!
//! Both are rows of 8-byte numbers, little endian. The growth of each number, modulo 2^64, is
//! written in LEB128: as few bytes as it takes, 7 bits in each, the lowest first, and the top bit
//! set in all but the last. Bytes behind the last whole number are copied.

/// Size of a number, in bytes.
const WORD: usize = 8;

/// Return the difference from `before` to `now`, or `None` if their sizes differ.
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

/// Apply a difference to a snapshot, and return the next one. Return `None` if this is not the
/// difference between two snapshots of this size.
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
            // The tenth byte has room for one bit only.
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

/// Return the number in 8 bytes.
fn word(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
