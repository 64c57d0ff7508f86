// SPDX-License-Identifier: GPL-2.0

//! A picture in pixels.

use std::sync::Arc;

use resvg::{
    tiny_skia::{Pixmap, Transform},
    usvg::{Options, Tree},
};

use super::font;

/// Pixels for one of the SVG's: sharp on fine screens and in print.
const SCALE: f32 = 2.0;

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
#[error("cannot make pixels of the picture: {0}")]
pub struct Error(String);

/// The bytes of a PNG of an SVG.
///
/// # Errors
///
/// When the SVG cannot be drawn.
pub fn render(svg: &str) -> Result<Vec<u8>, Error> {
    let tree = tree(svg)?;
    let size = tree.size().to_int_size().scale_by(SCALE);
    let mut pixels = size
        .and_then(|size| Pixmap::new(size.width(), size.height()))
        .ok_or_else(|| Error("it has no size".to_owned()))?;
    resvg::render(
        &tree,
        Transform::from_scale(SCALE, SCALE),
        &mut pixels.as_mut(),
    );
    pixels
        .encode_png()
        .map_err(|error| Error(error.to_string()))
}

/// The SVG, laid out.
pub fn tree(svg: &str) -> Result<Tree, Error> {
    let mut options = Options {
        font_family: "Noto Sans".to_owned(),
        ..Options::default()
    };
    // No font of the machine's, so that a picture is the same everywhere.
    Arc::make_mut(&mut options.fontdb).load_font_data(font::FILE.to_vec());
    Tree::from_str(svg, &options).map_err(|error| Error(error.to_string()))
}
