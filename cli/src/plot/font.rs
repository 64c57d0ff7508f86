// SPDX-License-Identifier: GPL-2.0

//! Font of the pictures, and the width of texts in it.

/// A part of Noto Sans, see font/LICENSE.
#[cfg(feature = "png")]
pub const FILE: &[u8] = include_bytes!("font/NotoSans.ttf");

/// Widths of the characters from blank to tilde, in thousandths of the font size.
const WIDTHS: [u16; 95] = [
    260, 269, 408, 646, 572, 831, 732, 225, 300, 300, 551, 572, 268, 322, 268, 372, 572, 572, 572,
    572, 572, 572, 572, 572, 572, 572, 268, 268, 572, 572, 572, 434, 899, 639, 650, 632, 730, 556,
    519, 728, 741, 339, 273, 619, 524, 907, 760, 781, 605, 781, 622, 549, 556, 731, 600, 930, 586,
    566, 572, 329, 372, 329, 572, 444, 281, 561, 615, 480, 615, 564, 344, 615, 618, 258, 258, 534,
    258, 935, 618, 605, 615, 615, 413, 479, 361, 618, 508, 786, 529, 510, 470, 380, 551, 380, 572,
];

/// Return the width of a text, in pixels. For characters outside ASCII it is an estimate.
pub fn width(text: &str, size: f64) -> f64 {
    let letter = |letter: char| {
        let place = (letter as usize).checked_sub(' ' as usize);
        f64::from(*place.and_then(|place| WIDTHS.get(place)).unwrap_or(&600))
    };
    text.chars().map(letter).sum::<f64>() / 1000.0 * size
}

/// Return a text that fits into `room` pixels, cut with an ellipsis if necessary.
pub fn fit(text: &str, size: f64, room: f64) -> String {
    if width(text, size) <= room {
        return text.to_owned();
    }
    let mut cut = String::new();
    for letter in text.chars() {
        cut.push(letter);
        if width(&cut, size) + size > room {
            cut.pop();
            break;
        }
    }
    cut + "\u{2026}"
}
