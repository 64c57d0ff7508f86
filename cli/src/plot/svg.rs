// SPDX-License-Identifier: GPL-2.0

//! A picture, as the text of an SVG.

use std::fmt::{Display, Write as _};

/// What texts are set in. Where a viewer does not have the first, the next will do.
pub const FONTS: &str = "'Noto Sans', 'DejaVu Sans', Verdana, Arial, sans-serif";

/// The colour of texts.
pub const INK: &str = "#222222";
/// The colour of what is said beside.
pub const GREY: &str = "#666666";
/// The colour of the lines behind the data.
pub const GRID: &str = "#e3e3e3";
/// The id of the pattern that stands for "all the rest".
const HATCH: &str = "hatch";

/// What a text is lined up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// Its first letter.
    Start,
    /// Its middle.
    Middle,
    /// Its last letter.
    End,
}

/// How an area or a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// A colour.
    Plain(&'static str),
    /// Grey stripes.
    Hatch,
}

impl Paint {
    /// For an area.
    pub fn fill(self) -> String {
        match self {
            Paint::Plain(color) => color.to_owned(),
            Paint::Hatch => format!("url(#{HATCH})"),
        }
    }

    /// For a line, which has no room for stripes.
    pub fn stroke(self) -> &'static str {
        match self {
            Paint::Plain(color) => color,
            Paint::Hatch => "#999999",
        }
    }
}

/// A picture that is being drawn, in pixels from its upper left corner.
#[derive(Clone, Debug)]
pub struct Picture {
    width: f64,
    height: f64,
    body: String,
}

impl Picture {
    /// An empty one.
    pub fn new(width: f64, height: f64) -> Self {
        Self {
            width,
            height,
            body: String::new(),
        }
    }

    /// Writes a text, its baseline at `y`.
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

    /// Writes a text upwards from a place.
    pub fn upwards(&mut self, (x, y): (f64, f64), size: f64, color: &str, text: &str) {
        let (x, y, text) = (place(x), place(y), escape(text));
        self.add(format_args!(
            "<text transform=\"translate({x} {y}) rotate(-90)\" font-size=\"{size}\" fill=\"{color}\">{text}</text>"
        ));
    }

    /// Draws a straight line.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), color: &str, width: f64) {
        let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(place);
        self.add(format_args!(
            "<line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\" stroke=\"{color}\" stroke-width=\"{width}\"/>"
        ));
    }

    /// Fills a rectangle; a viewer that is pointed at it shows the hint.
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

    /// Fills what lies inside of a line.
    pub fn area(&mut self, points: impl IntoIterator<Item = (f64, f64)>, paint: Paint, hint: &str) {
        let (path, fill, hint) = (path(points), paint.fill(), title(hint));
        self.add(format_args!(
            "<path d=\"{path}Z\" fill=\"{fill}\">{hint}</path>"
        ));
    }

    /// Draws a line through points, with dashes and gaps of these lengths (none: unbroken).
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

    /// Draws a disc.
    pub fn disc(&mut self, (x, y): (f64, f64), radius: f64, color: &str, hint: &str) {
        let (x, y, hint) = (place(x), place(y), title(hint));
        self.add(format_args!(
            "<circle cx=\"{x}\" cy=\"{y}\" r=\"{radius}\" fill=\"{color}\">{hint}</circle>"
        ));
    }

    fn add(&mut self, element: impl Display) {
        let _ = writeln!(self.body, "{element}");
    }

    /// Several pictures, one below the other.
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

    /// The whole SVG. Its words for those who cannot see it are the title.
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

/// A hint as an element.
fn title(hint: &str) -> String {
    match hint {
        "" => String::new(),
        hint => format!("<title>{}</title>", escape(hint)),
    }
}

/// A path through points.
fn path(points: impl IntoIterator<Item = (f64, f64)>) -> String {
    let mut path = String::new();
    for (x, y) in points {
        path.push(if path.is_empty() { 'M' } else { 'L' });
        let _ = write!(path, "{} {}", place(x), place(y));
    }
    path
}

/// A place to a tenth of a pixel, as short as it can be written.
fn place(at: f64) -> String {
    let text = format!("{at:.1}");
    match text.strip_suffix(".0") {
        Some("-0") => "0".to_owned(),
        Some(whole) => whole.to_owned(),
        None => text,
    }
}

/// A text as it may stand in XML.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            // XML has no place for others.
            letter if letter.is_control() => escaped.push(' '),
            letter => escaped.push(letter),
        }
    }
    escaped
}
