// SPDX-License-Identifier: GPL-2.0

//! Text that others wrote, made harmless for terminals, files and people.

/// Characters of the longest text that is kept: libvirt and QEMU know no longer name of a VM.
pub const LONGEST: usize = 255;

/// Make text of bytes. What a terminal might obey, what cannot be seen or turns the direction of
/// writing, and what is not UTF-8 is told by its number: `\x1b`, `\u{202e}`. Text that is too long ends
/// in dots.
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

/// Tell what is not ASCII by its number, for terminals that do not know UTF-8: to one of 8 bits a
/// byte of a letter may be a command.
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

/// Return true if a letter is seen, and does nothing.
fn is_harmless(letter: char) -> bool {
    // General categories Cc, and of Cf, Zl and Zp what is of no use in a name (Unicode Character
    // Database, UnicodeData.txt): invisible, or turns the direction of what follows.
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
