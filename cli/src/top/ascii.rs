// SPDX-License-Identifier: GPL-2.0

//! Drawing on a terminal that does not know UTF-8.

use ratatui::buffer::Buffer;

/// Replace each character that is not ASCII.
pub fn replace(screen: &mut Buffer) {
    for cell in &mut screen.content {
        if !cell.symbol().is_ascii() {
            let letter = cell.symbol().chars().next().map_or(' ', ascii);
            cell.set_char(letter);
        }
    }
}

/// Return the most similar ASCII character. The textures of phases stay distinct.
fn ascii(letter: char) -> char {
    match letter {
        '█' | '▇' | '▊' | '▉' => '#',
        '▓' => '%',
        '▒' => '+',
        '░' => '-',
        '·' => '.',
        '▁' | '▂' | '▏' | '▎' | '▍' => '.',
        '▃' | '▄' | '▅' | '▆' | '▌' | '▋' => ':',
        '─' => '-',
        '│' => '|',
        '┌' | '┐' | '└' | '┘' => '+',
        _ => '?',
    }
}

#[cfg(test)]
mod tests {
    use exitmeter_meter::phase::Phase;

    use super::{super::theme::texture, *};

    #[test]
    fn phases_stay_distinct() {
        let textures = Phase::ALL.map(|phase| match texture(phase) {
            letter if letter.is_ascii() => letter,
            letter => ascii(letter),
        });
        for (place, one) in textures.iter().enumerate() {
            assert!(
                one.is_ascii() && !textures[..place].contains(one),
                "{textures:?}"
            );
        }
    }
}
