// SPDX-License-Identifier: GPL-2.0

//! A picture that is written as SVG.

use std::fmt::{Display, Write as _};

/// Fonts of texts, in order of preference.
pub const FONTS: &str = "'Noto Sans', 'DejaVu Sans', Verdana, Arial, sans-serif";

/// Colour of texts.
pub const INK: &str = "#222222";
/// Colour of secondary texts.
pub const GREY: &str = "#666666";
/// Colour of the lines behind the data.
pub const GRID: &str = "#e3e3e3";
/// Id of the pattern for "all others".
const HATCH: &str = "hatch";

/// Part of a text that is placed at its coordinates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// The first letter.
    Start,
    /// The middle.
    Middle,
    /// The last letter.
    End,
}

/// Colour of an area or a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// A colour.
    Plain(&'static str),
    /// Grey stripes.
    Hatch,
}

impl Paint {
    /// Return the fill of an area.
    pub fn fill(self) -> String {
        match self {
            Paint::Plain(color) => color.to_owned(),
            Paint::Hatch => format!("url(#{HATCH})"),
        }
    }

    /// Return the stroke of a line, which is too thin for stripes.
    pub fn stroke(self) -> &'static str {
        match self {
            Paint::Plain(color) => color,
            Paint::Hatch => "#999999",
        }
    }
}

/// A picture that is being drawn. Coordinates are pixels from the upper left corner.
#[derive(Clone, Debug)]
pub struct Picture {
    width: f64,
    height: f64,
    body: String,
}

impl Picture {
    /// Create an empty picture.
    pub fn new(width: f64, height: f64) -> Self {
        Self {
            width,
            height,
            body: String::new(),
        }
    }

    /// Write a text with its baseline at `y`.
    pub fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, size: f64, color: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let (x, y, text) = (place(x), place(y), escape(text));
        self.add(format_args!(
            "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\" fill=\"{color}\"{anchor}>{text}</text>"
        ));
    }

    /// Write a text upwards from a place.
    pub fn upwards(&mut self, (x, y): (f64, f64), size: f64, color: &str, text: &str) {
        let (x, y, text) = (place(x), place(y), escape(text));
        self.add(format_args!(
            "<text transform=\"translate({x} {y}) rotate(-90)\" font-size=\"{size}\" fill=\"{color}\">{text}</text>"
        ));
    }

    /// Draw a straight line.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), color: &str, width: f64) {
        let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(place);
        self.add(format_args!(
            "<line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\" stroke=\"{color}\" stroke-width=\"{width}\"/>"
        ));
    }

    /// Fill a rectangle. A viewer shows the hint while it is pointed at.
    pub fn rectangle(
        &mut self,
        (x, y): (f64, f64),
        (width, height): (f64, f64),
        paint: Paint,
        hint: &str,
    ) {
        let [x, y, width, height] = [x, y, width, height].map(place);
        let (fill, hint) = (paint.fill(), title(hint));
        self.add(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{fill}\">{hint}</rect>"
        ));
    }

    /// Fill the inside of a path.
    pub fn area(&mut self, points: impl IntoIterator<Item = (f64, f64)>, paint: Paint, hint: &str) {
        let (path, fill, hint) = (path(points), paint.fill(), title(hint));
        self.add(format_args!(
            "<path d=\"{path}Z\" fill=\"{fill}\">{hint}</path>"
        ));
    }

    /// Draw a line through points, with dashes and gaps of these lengths. An empty `dashes` draws a
    /// solid line.
    pub fn curve(
        &mut self,
        points: impl IntoIterator<Item = (f64, f64)>,
        paint: Paint,
        width: f64,
        dashes: &str,
        hint: &str,
    ) {
        let (path, color, hint) = (path(points), paint.stroke(), title(hint));
        let dashes = match dashes {
            "" => String::new(),
            dashes => format!(" stroke-dasharray=\"{dashes}\""),
        };
        self.add(format_args!(
            "<path d=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\" stroke-linejoin=\"round\"{dashes}>{hint}</path>"
        ));
    }

    /// Draw a disc.
    pub fn disc(&mut self, (x, y): (f64, f64), radius: f64, color: &str, hint: &str) {
        let (x, y, hint) = (place(x), place(y), title(hint));
        self.add(format_args!(
            "<circle cx=\"{x}\" cy=\"{y}\" r=\"{radius}\" fill=\"{color}\">{hint}</circle>"
        ));
    }

    fn add(&mut self, element: impl Display) {
        let _ = writeln!(self.body, "{element}");
    }

    /// Return several pictures, one below the other.
    pub fn stacked(pictures: &[Self]) -> Self {
        let width = pictures
            .iter()
            .fold(0.0, |widest: f64, next| widest.max(next.width));
        let mut all = Self::new(width, 0.0);
        for picture in pictures {
            let (y, body) = (place(all.height), &picture.body);
            let _ = write!(all.body, "<g transform=\"translate(0 {y})\">\n{body}</g>\n");
            all.height += picture.height;
        }
        all
    }

    /// Return the whole SVG. The title is also its text for screen readers.
    pub fn svg(&self, title: &str) -> String {
        let [width, height] = [self.width, self.height].map(place);
        let (title, body) = (escape(title), &self.body);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"{FONTS}\" role=\"img\">\n\
             <title>{title}</title>\n\
             <defs><pattern id=\"{HATCH}\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" \
             patternTransform=\"rotate(45)\"><rect width=\"6\" height=\"6\" fill=\"#dddddd\"/>\
             <rect width=\"2\" height=\"6\" fill=\"#aaaaaa\"/></pattern></defs>\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
        )
    }
}

/// Return a hint as an element.
fn title(hint: &str) -> String {
    match hint {
        "" => String::new(),
        hint => format!("<title>{}</title>", escape(hint)),
    }
}

/// Return a path through points.
fn path(points: impl IntoIterator<Item = (f64, f64)>) -> String {
    let mut path = String::new();
    for (x, y) in points {
        path.push(if path.is_empty() { 'M' } else { 'L' });
        let _ = write!(path, "{} {}", place(x), place(y));
    }
    path
}

/// Format a coordinate with at most one decimal.
fn place(at: f64) -> String {
    let text = format!("{at:.1}");
    match text.strip_suffix(".0") {
        Some("-0") => "0".to_owned(),
        Some(whole) => whole.to_owned(),
        None => text,
    }
}

/// Escape a text for XML.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            // XML 1.0 forbids most control characters.
            letter if letter.is_control() => escaped.push(' '),
            letter => escaped.push(letter),
        }
    }
    escaped
}
