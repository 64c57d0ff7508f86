// SPDX-License-Identifier: GPL-2.0

//! Text from outside the tool, made harmless for terminals, files and people.

/// Maximum length of a text, in characters. libvirt and QEMU allow no longer name of a VM.
pub const LONGEST: usize = 255;

/// Convert bytes to text. Control characters, invisible characters, characters that change the
/// direction of writing, and bytes that are not UTF-8 are shown by their number: `\x1b`,
/// `\u{202e}`. A text that is too long ends in dots.
pub fn clean(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut count = 0_usize;
    let mut add = |piece: &str| {
        let length = piece.chars().count();
        let fits = count.saturating_add(length) <= LONGEST;
        if fits {
            text.push_str(piece);
            count += length;
        }
        fits
    };
    let whole = bytes.utf8_chunks().all(|chunk| {
        let valid = chunk.valid().chars().all(|letter| match letter {
            letter if is_harmless(letter) => add(letter.encode_utf8(&mut [0; 4])),
            letter => add(&escape(letter)),
        });
        let invalid = chunk.invalid().iter();
        valid
            && invalid
                .into_iter()
                .all(|byte| add(&format!("\\x{byte:02x}")))
    });
    if !whole {
        let kept = text.char_indices().nth(LONGEST - 3);
        text.truncate(kept.map_or(text.len(), |(at, _)| at));
        text.push_str("...");
    }
    text
}

/// Replace characters outside ASCII by their number, for terminals without UTF-8. An 8-bit terminal
/// may take a byte of such a character for a command.
pub fn ascii(text: &str) -> String {
    let letters = text.chars().map(|letter| match letter.is_ascii() {
        true => letter.to_string(),
        false => escape(letter),
    });
    letters.collect()
}

fn escape(letter: char) -> String {
    match u32::from(letter) {
        byte @ 0..=0x9f => format!("\\x{byte:02x}"),
        number => format!("\\u{{{number:x}}}"),
    }
}

/// Return true if a character is visible and controls nothing.
fn is_harmless(letter: char) -> bool {
    // Excludes the general category Cc, and those of Cf, Zl and Zp that have no use in a name
    // (Unicode Character Database, UnicodeData.txt): they are invisible, or change the direction of
    // what follows.
    !letter.is_control()
        && !matches!(
            letter,
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}
