// SPDX-License-Identifier: GPL-2.0

//! Frame of a chart: the title, the axes, and a table at the right that is also the legend.

use super::{
    axis::{self, Scale},
    font,
    svg::{Anchor, Paint, Picture, GREY, GRID, INK},
};

/// Width of a chart, in pixels.
const WIDTH: f64 = 1040.0;
/// Left edge of the data, in pixels.
pub const LEFT: f64 = 66.0;
/// Right edge of the data.
pub const RIGHT: f64 = 670.0;
/// Upper edge of the data, without marks.
pub const TOP: f64 = 84.0;
/// Left edge of the legend.
const LEGEND: f64 = 694.0;
/// Right edges of the legend's columns of numbers.
const COLUMNS: [f64; 2] = [966.0, 1024.0];
/// Height of a line of the legend.
pub const LINE: f64 = 20.0;
/// Distance from the first to the second line of a pair.
const BETWEEN: f64 = 16.0;
/// Height of a pair.
pub const PAIR: f64 = 38.0;
/// Font size of the title.
const LARGE: f64 = 17.0;
/// Font size of all other texts.
pub const SMALL: f64 = 12.0;
/// Height below the data, for the labels of the ticks and of the axis.
const BELOW: f64 = 52.0;

/// Maximum width of a mark's name.
const LONGEST: f64 = 110.0;
/// Height of the line that leads to a mark's name.
const LEADER: f64 = 12.0;

/// A line of the legend.
#[derive(Clone, Debug)]
pub struct LegendLine {
    /// Colour in the chart.
    pub paint: Paint,
    /// Dashes, for a line.
    pub dashes: Option<&'static str>,
    /// Name.
    pub name: String,
    /// Two numbers.
    pub numbers: [String; 2],
}

/// A chart without its data.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Picture to draw the data on.
    pub picture: Picture,
    /// Upper end of the vertical axis. The names of marks are above it.
    top: f64,
    bottom: f64,
}

impl Chart {
    /// Create a chart whose data are `height` pixels high.
    pub fn new(title: &str, subtitle: &str, height: f64) -> Self {
        Self::with_marks(title, subtitle, height, &[])
    }

    /// Create a chart with room above the data for the names of marks.
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

    /// Draw the time axis, with lines behind the data.
    pub fn time_axis(&mut self, range: (f64, f64)) -> Scale {
        let scale = Scale::linear(range, (LEFT, RIGHT));
        for tick in axis::ticks(range.0, range.1, 8) {
            self.tick_below(scale.place(tick), &axis::label(tick), GRID);
        }
        // A chart of current activity ends at 0.
        self.name_below(match range.0 < 0.0 {
            true => "seconds up to now",
            false => "seconds since the recording began",
        });
        scale
    }

    /// Draw marks: a line at each moment, and its name above the data. Call this after the data are
    /// drawn.
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

    /// Draw the vertical axis, from 0 to at least `to`.
    pub fn vertical_axis(&mut self, name: &str, to: f64, label: impl Fn(f64) -> String) -> Scale {
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

    /// Draw the vertical axis on a logarithmic scale. Both values are at least 1.
    pub fn vertical_logarithmic_axis(
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
                let has_label = axis::labelled_multiples(range).contains(&times);
                let color = if has_label { "#cfcfcf" } else { "#f2f2f2" };
                self.picture.line((LEFT, y), (RIGHT, y), color, 1.0);
                if has_label {
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

    /// Draw a vertical line with a label below.
    pub fn tick_below(&mut self, x: f64, name: &str, color: &str) {
        self.picture.line((x, TOP), (x, self.bottom), color, 1.0);
        let at = (x, self.bottom + 18.0);
        self.picture.text(at, Anchor::Middle, SMALL, INK, name);
    }

    /// Write the name of the horizontal axis.
    pub fn name_below(&mut self, name: &str) {
        let middle = ((LEFT + RIGHT) / 2.0, self.bottom + 38.0);
        self.picture.text(middle, Anchor::Middle, SMALL, GREY, name);
    }

    /// Draw the legend.
    pub fn legend(&mut self, titles: [&str; 3], entries: &[LegendLine]) {
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

    /// Write the titles of the legend.
    fn titles(&mut self, titles: [&str; 3]) {
        let [name, numbers @ ..] = titles;
        self.picture
            .text((LEGEND, TOP - 14.0), Anchor::Start, SMALL, GREY, name);
        for (title, end) in numbers.iter().zip(COLUMNS) {
            self.picture
                .text((end, TOP - 14.0), Anchor::End, SMALL, GREY, title);
        }
    }

    /// Draw the legend with two lines for each entry, for names that are longer than their column.
    /// The numbers are in the second line, beside a text. Returns the lower end.
    pub fn legend_of_pairs(&mut self, titles: [&str; 3], entries: &[(LegendLine, String)]) -> f64 {
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

    /// Write a name beside the data, and a text below it.
    fn pair(&mut self, y: f64, name: &str, below: &str) {
        let left = LEGEND + 20.0;
        let name = font::fit(name, SMALL, COLUMNS[1] - left);
        self.picture
            .text((left, y + 10.0), Anchor::Start, SMALL, INK, &name);
        let below = font::fit(below, SMALL, COLUMNS[0] - 72.0 - left);
        let at = (left, y + 10.0 + BETWEEN);
        self.picture.text(at, Anchor::Start, SMALL, GREY, &below);
    }

    /// Write a numbered list beside the data, from height `y` on. Each entry has a name and a text
    /// below it.
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

    /// Write a remark beside the data, at height `y`.
    pub fn remark(&mut self, y: f64, text: &str) {
        let text = font::fit(text, SMALL, COLUMNS[1] - LEGEND);
        self.picture
            .text((LEGEND, y + 10.0), Anchor::Start, SMALL, GREY, &text);
    }

    /// Return the finished picture.
    pub fn done(self) -> Picture {
        self.picture
    }
}

/// Return places for the names of marks: near their lines, and not over each other.
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
    fn names_of_marks_do_not_overlap() {
        assert_eq!(apart(&[100.0, 300.0]), [100.0, 300.0]);
        assert_eq!(apart(&[100.0, 100.0, 101.0]), [100.0, 113.0, 126.0]);
        let places = apart(&[RIGHT - 2.0, RIGHT - 1.0, RIGHT]);
        assert!(places.windows(2).all(|two| two[1] - two[0] >= SMALL));
        assert!(places.iter().all(|place| *place < RIGHT + SMALL));
    }
}
