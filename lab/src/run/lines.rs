// SPDX-License-Identifier: GPL-2.0

//! Lines of a script's output, which comes in pieces.

use std::mem;

/// Splitter of bytes into lines. Bytes that are not UTF-8 are replaced.
#[derive(Debug, Default)]
pub struct Lines {
    /// Bytes since the last end of a line.
    rest: Vec<u8>,
}

impl Lines {
    /// Take the next bytes, and return the lines that they complete, without line feeds.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        self.rest.extend_from_slice(bytes);
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else {
            return Vec::new();
        };
        let rest = self.rest.split_off(end + 1);
        let lines = mem::replace(&mut self.rest, rest);
        let lines = lines[..end].split(|byte| *byte == b'\n');
        lines.map(text).collect()
    }

    /// Return the last line if the output ended without a line feed.
    pub fn finish(self) -> Option<String> {
        (!self.rest.is_empty()).then(|| text(&self.rest))
    }
}

fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_split_of_the_output_gives_the_same_lines() {
        let output = "one\n\n\u{e4}\nlast";
        for size in 1..=output.len() {
            let mut lines = Lines::default();
            let mut all: Vec<_> = output
                .as_bytes()
                .chunks(size)
                .flat_map(|piece| lines.take(piece))
                .collect();
            all.extend(lines.finish());
            assert_eq!(all, ["one", "", "\u{e4}", "last"], "in pieces of {size}");
        }
        assert_eq!(Lines::default().finish(), None);
    }
}
