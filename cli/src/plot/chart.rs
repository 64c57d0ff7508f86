// SPDX-License-Identifier: GPL-2.0

//! What all charts have: title, axes, and at the right a table that is the legend as well.

use super::{
    axis::{self, Scale},
    font,
    svg::{Anchor, Paint, Picture, GREY, GRID, INK},
};

/// Pixels of a chart in all.
const WIDTH: f64 = 1040.0;
/// Where the data begin and end.
pub const LEFT: f64 = 66.0;
/// See [`LEFT`].
pub const RIGHT: f64 = 670.0;
/// See [`LEFT`].
pub const TOP: f64 = 84.0;
/// Where the legend begins.
const LEGEND: f64 = 694.0;
/// Where its columns of numbers end.
const COLUMNS: [f64; 2] = [966.0, 1024.0];
/// From one line of the legend to the next.
pub const LINE: f64 = 20.0;
/// From the first to the second line of a pair, and from one pair to the next.
const BETWEEN: f64 = 16.0;
/// See [`BETWEEN`].
pub const PAIR: f64 = 38.0;
/// Sizes of texts.
const LARGE: f64 = 17.0;
/// See [`LARGE`].
pub const SMALL: f64 = 12.0;
/// Below the data: names of ticks, and of the axis.
const BELOW: f64 = 52.0;

/// Room for the name of a moment, and for what leads from it to its line.
const LONGEST: f64 = 110.0;
/// See [`LONGEST`].
const LEADER: f64 = 12.0;

/// A line of the legend.
#[derive(Clone, Debug)]
pub struct Entry {
    /// How that looks in the chart.
    pub paint: Paint,
    /// Of a line: its dashes.
    pub dashes: Option<&'static str>,
    /// What it is.
    pub name: String,
    /// Two numbers of it.
    pub numbers: [String; 2],
}

/// A chart with its data still to be drawn.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Where to draw them.
    pub picture: Picture,
    /// Where the upright axis ends: above it are the names of moments.
    top: f64,
    bottom: f64,
}

impl Chart {
    /// A chart whose data have so many pixels from top to bottom.
    pub fn new(title: &str, subtitle: &str, height: f64) -> Self {
        Self::with_marks(title, subtitle, height, &[])
    }

    /// The same with room for the names of moments above the data.
    pub fn with_marks(title: &str, subtitle: &str, height: f64, marks: &[(f64, String)]) -> Self {
        let longest = marks.iter().map(|(_, name)| font::width(name, SMALL));
        let room = longest.fold(0.0, f64::max).min(LONGEST);
        let head = if marks.is_empty() {
            0.0
        } else {
            room + LEADER + 8.0
        };
        let top = TOP + head;
        let bottom = top + height;
        let mut picture = Picture::new(WIDTH, bottom + BELOW);
        picture.text((14.0, 30.0), Anchor::Start, LARGE, INK, title);
        let subtitle = font::fit(subtitle, SMALL, WIDTH - 28.0);
        picture.text((14.0, 50.0), Anchor::Start, SMALL, GREY, &subtitle);
        Self {
            picture,
            top,
            bottom,
        }
    }

    /// The axis of time, with lines behind the data.
    pub fn time_axis(&mut self, range: (f64, f64)) -> Scale {
        let scale = Scale::linear(range, (LEFT, RIGHT));
        for tick in axis::ticks(range.0, range.1, 8) {
            self.tick_below(scale.place(tick), &axis::label(tick), GRID);
        }
        // What happens now ends at 0.
        self.name_below(match range.0 < 0.0 {
            true => "seconds up to now",
            false => "seconds since the recording began",
        });
        scale
    }

    /// Moments that have names: a line for each, and its name above the data. Comes behind these.
    pub fn marks(&mut self, marks: &[(f64, String)], scale: Scale) {
        let lines: Vec<_> = marks.iter().map(|(time, _)| scale.place(*time)).collect();
        let (paint, feet) = (Paint::Plain(GREY), self.top - LEADER);
        for ((_, name), (x, above)) in marks.iter().zip(lines.iter().zip(apart(&lines))) {
            let ends = [(*x, self.top), (*x, self.bottom)];
            self.picture.curve(ends, paint, 0.8, "3 2", name);
            let leader = [(*x, self.top), (above, feet)];
            self.picture.curve(leader, paint, 0.8, "", name);
            let name = font::fit(name, SMALL, LONGEST);
            let at = (above + SMALL / 3.0, feet - 3.0);
            self.picture.upwards(at, SMALL, INK, &name);
        }
    }

    /// The upright axis, from 0 to a value or a bit more.
    pub fn upright_axis(&mut self, name: &str, to: f64, label: impl Fn(f64) -> String) -> Scale {
        let scale = Scale::linear((0.0, to), (self.bottom, self.top));
        for tick in axis::ticks(0.0, to, 6) {
            let y = scale.place(tick);
            let color = if tick == 0.0 { GREY } else { GRID };
            self.picture.line((LEFT, y), (RIGHT, y), color, 1.0);
            let at = (LEFT - 8.0, y + SMALL / 3.0);
            self.picture.text(at, Anchor::End, SMALL, INK, &label(tick));
        }
        self.picture
            .text((14.0, TOP - 14.0), Anchor::Start, SMALL, GREY, name);
        scale
    }

    /// The upright axis with equal steps for equal ratios. Both values are at least 1.
    pub fn upright_logarithmic_axis(
        &mut self,
        name: &str,
        range: (f64, f64),
        label: impl Fn(f64) -> String,
    ) -> Scale {
        let scale = Scale::logarithmic(range, (self.bottom, self.top));
        for decade in axis::decades(range.0, range.1) {
            for times in 1..10_u8 {
                let value = decade * f64::from(times);
                if value < range.0 || value > range.1 {
                    continue;
                }
                let y = scale.place(value);
                let is_named = axis::named(range).contains(&times);
                let color = if is_named { "#cfcfcf" } else { "#f2f2f2" };
                self.picture.line((LEFT, y), (RIGHT, y), color, 1.0);
                if is_named {
                    let at = (LEFT - 8.0, y + SMALL / 3.0);
                    self.picture
                        .text(at, Anchor::End, SMALL, INK, &label(value));
                }
            }
        }
        self.picture
            .line((LEFT, self.bottom), (RIGHT, self.bottom), GREY, 1.0);
        self.picture
            .text((14.0, TOP - 14.0), Anchor::Start, SMALL, GREY, name);
        scale
    }

    /// A line from top to bottom, named below.
    pub fn tick_below(&mut self, x: f64, name: &str, color: &str) {
        self.picture.line((x, TOP), (x, self.bottom), color, 1.0);
        let at = (x, self.bottom + 18.0);
        self.picture.text(at, Anchor::Middle, SMALL, INK, name);
    }

    /// What the axis below is of.
    pub fn name_below(&mut self, name: &str) {
        let middle = ((LEFT + RIGHT) / 2.0, self.bottom + 38.0);
        self.picture.text(middle, Anchor::Middle, SMALL, GREY, name);
    }

    /// The table at the right.
    pub fn legend(&mut self, titles: [&str; 3], entries: &[Entry]) {
        self.titles(titles);
        let mut y = TOP + 4.0;
        for entry in entries {
            match entry.dashes {
                None => self
                    .picture
                    .rectangle((LEGEND, y - 1.0), (13.0, 13.0), entry.paint, ""),
                Some(dashes) => {
                    let ends = [(LEGEND - 8.0, y + 5.5), (LEGEND + 14.0, y + 5.5)];
                    self.picture.curve(ends, entry.paint, 2.2, dashes, "");
                }
            }
            let room = COLUMNS[0] - 62.0 - LEGEND - 20.0;
            let name = font::fit(&entry.name, SMALL, room);
            self.picture
                .text((LEGEND + 20.0, y + 10.0), Anchor::Start, SMALL, INK, &name);
            for (number, end) in entry.numbers.iter().zip(COLUMNS) {
                self.picture
                    .text((end, y + 10.0), Anchor::End, SMALL, INK, number);
            }
            y += LINE;
        }
    }

    /// The titles of the table at the right.
    fn titles(&mut self, titles: [&str; 3]) {
        let [name, numbers @ ..] = titles;
        self.picture
            .text((LEGEND, TOP - 14.0), Anchor::Start, SMALL, GREY, name);
        for (title, end) in numbers.iter().zip(COLUMNS) {
            self.picture
                .text((end, TOP - 14.0), Anchor::End, SMALL, GREY, title);
        }
    }

    /// The table at the right with names that are longer than its column: the numbers stand below
    /// them, beside what they belong to.
    pub fn legend_of_pairs(&mut self, titles: [&str; 3], entries: &[(Entry, String)]) -> f64 {
        self.titles(titles);
        let mut y = TOP + 4.0;
        for (entry, below) in entries {
            self.picture
                .rectangle((LEGEND, y - 1.0), (13.0, 13.0), entry.paint, &entry.name);
            self.pair(y, &entry.name, below);
            for (number, end) in entry.numbers.iter().zip(COLUMNS) {
                let at = (end, y + 10.0 + BETWEEN);
                self.picture.text(at, Anchor::End, SMALL, GREY, number);
            }
            y += PAIR;
        }
        y
    }

    /// A name beside the data, and what is said of it below that.
    fn pair(&mut self, y: f64, name: &str, below: &str) {
        let left = LEGEND + 20.0;
        let name = font::fit(name, SMALL, COLUMNS[1] - left);
        self.picture
            .text((left, y + 10.0), Anchor::Start, SMALL, INK, &name);
        let below = font::fit(below, SMALL, COLUMNS[0] - 72.0 - left);
        let at = (left, y + 10.0 + BETWEEN);
        self.picture.text(at, Anchor::Start, SMALL, GREY, &below);
    }

    /// Numbered names beside the data, from a height on, and what is said of each below it.
    pub fn list(&mut self, mut y: f64, title: &str, entries: &[(String, String)]) {
        self.picture
            .text((LEGEND, y + 10.0), Anchor::Start, SMALL, GREY, title);
        y += LINE + 4.0;
        let left = LEGEND + 20.0;
        for (place, (name, below)) in entries.iter().enumerate() {
            let number = (place + 1).to_string();
            let at = (LEGEND + 6.0, y + 10.0);
            self.picture.text(at, Anchor::Middle, SMALL, INK, &number);
            for (text, down, color) in [(name, 0.0, INK), (below, BETWEEN, GREY)] {
                let text = font::fit(text, SMALL, COLUMNS[1] - left);
                let at = (left, y + 10.0 + down);
                self.picture.text(at, Anchor::Start, SMALL, color, &text);
            }
            y += PAIR;
        }
    }

    /// A remark beside the data, at a height.
    pub fn remark(&mut self, y: f64, text: &str) {
        let text = font::fit(text, SMALL, COLUMNS[1] - LEGEND);
        self.picture
            .text((LEGEND, y + 10.0), Anchor::Start, SMALL, GREY, &text);
    }

    /// A ready picture.
    pub fn done(self) -> Picture {
        self.picture
    }
}

/// Places for names of moments, near to their lines and none over another.
fn apart(lines: &[f64]) -> Vec<f64> {
    let step = SMALL + 1.0;
    let mut places: Vec<f64> = Vec::new();
    for line in lines {
        let free = places.last().map_or(f64::MIN, |place| place + step);
        places.push(line.max(free));
    }
    let mut end = RIGHT + step / 2.0;
    for place in places.iter_mut().rev() {
        *place = place.min(end);
        end = *place - step;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_moments_do_not_lie_over_each_other() {
        assert_eq!(apart(&[100.0, 300.0]), [100.0, 300.0]);
        assert_eq!(apart(&[100.0, 100.0, 101.0]), [100.0, 113.0, 126.0]);
        let places = apart(&[RIGHT - 2.0, RIGHT - 1.0, RIGHT]);
        assert!(places.windows(2).all(|two| two[1] - two[0] >= SMALL));
        assert!(places.iter().all(|place| *place < RIGHT + SMALL));
    }
}
