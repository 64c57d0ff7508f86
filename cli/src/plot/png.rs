// SPDX-License-Identifier: GPL-2.0

//! Rendering of a picture as PNG.

use std::sync::Arc;

use resvg::{
    tiny_skia::{Pixmap, Transform},
    usvg::{Options, Tree},
};

use super::font;

/// Pixels for a pixel of the SVG. Sharp on fine screens and in print.
const SCALE: f32 = 2.0;

/// Error of rendering.
#[derive(Debug, thiserror::Error)]
#[error("cannot make pixels of the picture: {0}")]
pub struct Error(String);

/// Render an SVG as PNG.
///
/// # Errors
///
/// Returns an error if the SVG cannot be drawn.
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

/// Return the layout of an SVG.
pub fn tree(svg: &str) -> Result<Tree, Error> {
    let mut options = Options {
        font_family: "Noto Sans".to_owned(),
        ..Options::default()
    };
    // Use only the built-in font, so that a picture is the same on every machine.
    Arc::make_mut(&mut options.fontdb).load_font_data(font::FILE.to_vec());
    Tree::from_str(svg, &options).map_err(|error| Error(error.to_string()))
}
