//! Pictures: decoding, resizing, normalising, and a cache of what was decoded.

mod cache;
mod encoded;
pub(crate) mod header;
mod huffman;
mod idct;
mod jpeg;

use std::path::Path;
use std::sync::LazyLock;

pub(crate) use cache::source_key;
pub use cache::{Decoded, ImageCache};
pub use encoded::{DecodeOptions, Encoded, MAX_PIXELS};

use crate::error::DataError;
use crate::resize::resize_bicubic;
use crate::transform::Rect;

/// Mean of each channel that pixels are normalised with (CLIP's; X-VLM `dataset/__init__.py`).
pub const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Standard deviation of each channel that pixels are normalised with (CLIP's).
pub const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// An RGB image of 8 bits a channel, `[height][width][3]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

impl Picture {
    /// A picture of given bytes, `[height][width][3]`; `None` if their number does not fit or a side
    /// is 0.
    #[must_use]
    pub fn from_rgb(width: u32, height: u32, rgb: Vec<u8>) -> Option<Self> {
        let fits = width > 0 && height > 0 && rgb.len() == width as usize * height as usize * 3;
        fits.then_some(Self { width, height, rgb })
    }

    /// A picture of one colour.
    ///
    /// # Panics
    ///
    /// If a side is 0.
    #[must_use]
    pub fn blank(width: u32, height: u32, colour: [u8; 3]) -> Self {
        assert!(width > 0 && height > 0, "a picture of {width}x{height}");
        Self { width, height, rgb: colour.repeat(width as usize * height as usize) }
    }

    /// Covers a part of the picture with another of the part's size.
    ///
    /// # Panics
    ///
    /// If it is of another size, or the part not inside the picture.
    pub fn put(&mut self, other: &Self, part: Rect) {
        assert!(part.is_inside(self.width, self.height), "{part:?} in {}x{}", self.width, self.height);
        assert_eq!((other.width, other.height), (part.width, part.height), "the size of the part");
        let (stride, length) = (self.width as usize * 3, part.width as usize * 3);
        let rows = self.rgb.chunks_exact_mut(stride).skip(part.y as usize);
        for (row, other) in rows.zip(other.rgb.chunks_exact(length)) {
            row[part.x as usize * 3..][..length].copy_from_slice(other);
        }
    }

    /// Decodes an image file, its pixels as stored: see [`Encoded`].
    ///
    /// # Errors
    ///
    /// [`DataError::Image`] or [`DataError::ImageSize`] naming the file.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        Encoded::open(path, DecodeOptions::default())?.decode()
    }

    /// Decodes an image file and turns it as its EXIF orientation says: for pictures that come without boxes.
    ///
    /// # Errors
    ///
    /// [`DataError::Image`] or [`DataError::ImageSize`] naming the file.
    pub fn open_upright(path: &Path) -> Result<Self, DataError> {
        Encoded::open(path, DecodeOptions::upright())?.decode()
    }

    /// Decodes the content of an image file, its pixels as stored.
    ///
    /// # Errors
    ///
    /// [`DataError::Image`] or [`DataError::ImageSize`] naming `name`.
    pub fn from_bytes(bytes: &[u8], name: &dyn std::fmt::Display) -> Result<Self, DataError> {
        Encoded::new(bytes, name, DecodeOptions::default())?.decode()
    }

    /// Width in pixels.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The bytes, `[height][width][3]`.
    #[must_use]
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// The bytes, `[height][width][3]`, to draw into.
    pub fn rgb_mut(&mut self) -> &mut [u8] {
        &mut self.rgb
    }

    /// The whole of it.
    #[must_use]
    pub fn rect(&self) -> Rect {
        Rect::whole(self.width, self.height)
    }

    /// The part `rect` alone.
    ///
    /// # Panics
    ///
    /// If the rectangle is empty or not inside the picture.
    #[must_use]
    pub fn part(&self, rect: Rect) -> Self {
        assert!(rect.is_inside(self.width, self.height), "{rect:?} in {}x{}", self.width, self.height);
        let (x, width) = (rect.x as usize * 3, rect.width as usize * 3);
        let rows = self.rgb.chunks_exact(self.width as usize * 3).skip(rect.y as usize).take(rect.height as usize);
        let rgb = rows.flat_map(|row| &row[x..x + width]).copied().collect();
        Self { width: rect.width, height: rect.height, rgb }
    }

    /// The part `rect`, resized to `width` × `height` as Pillow's bicubic filter does it.
    ///
    /// # Panics
    ///
    /// If the rectangle is empty or not inside the picture, or the new size is 0.
    #[must_use]
    pub fn resized(&self, rect: Rect, width: u32, height: u32) -> Self {
        assert!(width > 0 && height > 0, "a picture of {width}x{height}");
        let (w, h) = (width as usize, height as usize);
        let rgb = resize_bicubic(&self.rgb, self.width as usize, rect, w, h);
        Self { width, height, rgb }
    }

    /// The whole, resized to a square.
    #[must_use]
    pub fn resized_square(&self, resolution: usize) -> Self {
        self.resized_part(self.rect(), resolution)
    }

    /// The part `rect`, resized to a square.
    ///
    /// # Panics
    ///
    /// As [`Self::resized`].
    #[must_use]
    pub fn resized_part(&self, rect: Rect, resolution: usize) -> Self {
        let side = resolution as u32;
        let fits = (rect, self.width, self.height) == (Rect::whole(side, side), side, side);
        if fits { self.clone() } else { self.resized(rect, side, side) }
    }

    /// Mirrors it left to right.
    pub fn mirror(&mut self) {
        for row in self.rgb.chunks_exact_mut(self.width as usize * 3) {
            row.as_chunks_mut::<3>().0.reverse();
        }
    }

    /// Appends the normalised pixels, `[3][height][width]`, mirrored left to right if `flip`.
    pub fn normalise_onto(&self, flip: bool, out: &mut Vec<f32>) {
        static TABLE: LazyLock<[[f32; 256]; 3]> = LazyLock::new(|| {
            std::array::from_fn(|c| std::array::from_fn(|byte| (byte as f32 / 255.0 - MEAN[c]) / STD[c]))
        });
        let pixels = self.rgb.as_chunks::<3>().0;
        for (c, table) in TABLE.iter().enumerate() {
            let value = |pixel: &[u8; 3]| table[usize::from(pixel[c])];
            if flip {
                let rows = pixels.chunks_exact(self.width as usize);
                rows.for_each(|row| out.extend(row.iter().rev().map(value)));
            } else {
                out.extend(pixels.iter().map(value));
            }
        }
    }

    /// The normalised pixels, `[3][height][width]`.
    #[must_use]
    pub fn normalised(&self) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.rgb.len());
        self.normalise_onto(false, &mut out);
        out
    }

    /// The inverse of [`Self::normalised`]; `None` if the number of values does not fit.
    #[must_use]
    pub fn from_normalised(values: &[f32], width: u32, height: u32) -> Option<Self> {
        let plane = width as usize * height as usize;
        if values.len() != plane * 3 {
            return None;
        }
        let byte = |c: usize, i: usize| {
            let value = values[c * plane + i] * STD[c] + MEAN[c];
            (value * 255.0).round().clamp(0.0, 255.0) as u8
        };
        let pixels = (0..plane).flat_map(|i| (0..3).map(move |c| (c, i)));
        Self::from_rgb(width, height, pixels.map(|(c, i)| byte(c, i)).collect())
    }

    /// The content of a PNG file of this picture.
    ///
    /// # Errors
    ///
    /// [`DataError::Image`] if the encoder fails.
    pub fn to_png(&self) -> Result<Vec<u8>, DataError> {
        use image::ImageEncoder;
        let mut png = Vec::new();
        let color = image::ExtendedColorType::Rgb8;
        image::codecs::png::PngEncoder::new(&mut png).write_image(&self.rgb, self.width, self.height, color).map_err(
            |error| DataError::Image {
                name: format!("of {}x{} pixels", self.width, self.height),
                message: error.to_string(),
            },
        )?;
        Ok(png)
    }
}
