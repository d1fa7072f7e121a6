//! RandAugment (Cubuk et al. 2020) as X-VLM applies it: fourteen operations on a picture of the model's resolution.
//!
//! The original (`dataset/randaugment.py`) computes them with numpy and OpenCV 4; these give the same bytes but for
//! rounding (±1 of 255; OpenCV 5 interpolates in floating point and is up to 3 away from OpenCV 4). Its luma weights are written for blue-green-red
//! pixels and get red-green-blue ones: that is kept, since the published weights were trained with it.
//!
//! Two operations of the original wrap around in 8 bits. `AutoContrast` makes a channel white unless it holds a 0
//! somewhere, and `Sharpness` turns what should be brighter than 255 dark, and the reverse. By default both are mended (as Pillow
//! computes them); [`RandAugment::wrapping`] gives the original's.

use rand::Rng;
use rand::seq::IndexedRandom;
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::image::Picture;

/// The magnitude at which each operation is strongest (the original's `MAX_LEVEL`).
pub const MAX_MAGNITUDE: f64 = 10.0;
/// What is outside the picture, in each channel (the original's `replace_value`).
const OUTSIDE: u8 = 128;
/// Share of a channel in the luma, first to third (ITU-R BT.601, in the order that the original applies it).
const LUMA: [f64; 3] = [0.114, 0.587, 0.299];

/// An operation of RandAugment; the names are the original's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Operation {
    /// Nothing.
    Identity,
    /// Stretches each channel to 0…255.
    AutoContrast,
    /// Makes the histogram of each channel flat.
    Equalize,
    /// Turns around the centre by up to 30°.
    Rotate,
    /// Inverts what is brighter than a threshold, from 0 to 256.
    Solarize,
    /// Saturation times 0.1 to 1.9.
    Color,
    /// Contrast times 0.1 to 1.9.
    Contrast,
    /// Brightness times 0.1 to 1.9.
    Brightness,
    /// Blurs (0.1) to sharpens (1.9); the outermost pixels stay as they are.
    Sharpness,
    /// Shifts rows sideways, by up to 0.3 pixels a row.
    ShearX,
    /// Shifts sideways by up to 10 pixels.
    TranslateX,
    /// Shifts up or down by up to 10 pixels.
    TranslateY,
    /// Keeps the 0 to 4 upper bits.
    Posterize,
    /// Shifts columns up or down, by up to 0.3 pixels a column.
    ShearY,
}

/// How pictures are augmented: `count` operations, drawn with replacement, each applied with probability ½.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandAugment {
    /// Operations drawn for a picture (N).
    pub count: usize,
    /// How strong they are (M), from 0 to [`MAX_MAGNITUDE`].
    pub magnitude: f64,
    /// What is drawn from.
    pub operations: Vec<Operation>,
    /// Whether `AutoContrast` and `Sharpness` wrap around as in the original (see the module's page).
    #[serde(default)]
    pub wrapping: bool,
}

impl RandAugment {
    /// Each is applied with this probability.
    const PROBABILITY: f64 = 0.5;

    /// What the original pre-trains and fine-tunes with: ten operations, N = 2, M = 7.
    #[must_use]
    pub fn pretraining() -> Self {
        use Operation::*;
        let geometry = [ShearX, ShearY, TranslateX, TranslateY, Rotate];
        let boxes = Self::boxes();
        Self { operations: [boxes.operations.as_slice(), &geometry].concat(), ..boxes }
    }

    /// For pictures with boxes: what moves nothing, N = 2, M = 7.
    #[must_use]
    pub fn boxes() -> Self {
        use Operation::*;
        let operations = vec![Identity, AutoContrast, Equalize, Brightness, Sharpness];
        Self { count: 2, magnitude: 7.0, operations, wrapping: false }
    }

    /// All fourteen operations.
    #[must_use]
    pub fn all(count: usize, magnitude: f64) -> Self {
        use Operation::*;
        let operations = vec![
            Identity,
            AutoContrast,
            Equalize,
            Rotate,
            Solarize,
            Color,
            Contrast,
            Brightness,
            Sharpness,
            ShearX,
            TranslateX,
            TranslateY,
            Posterize,
            ShearY,
        ];
        Self { count, magnitude, operations, wrapping: false }
    }

    /// Whether no operation moves anything, so that boxes stay where they are.
    #[must_use]
    pub fn keeps_places(&self) -> bool {
        self.operations.iter().all(|operation| !operation.moves())
    }

    /// # Errors
    ///
    /// [`DataError::Config`] if nothing can be drawn from, or the magnitude is out of range.
    pub fn check(&self) -> Result<(), DataError> {
        let wrong = |field, expected: &str, found: String| {
            Err(DataError::Config { field, expected: expected.to_owned(), found })
        };
        if self.count > 0 && self.operations.is_empty() {
            return wrong("augment.operations", "at least one operation", "none".to_owned());
        }
        if !(0.0..=MAX_MAGNITUDE).contains(&self.magnitude) {
            return wrong("augment.magnitude", "0 to 10", self.magnitude.to_string());
        }
        Ok(())
    }

    /// Draws operations and applies them.
    pub fn apply(&self, picture: &mut Picture, rng: &mut impl Rng) {
        for _ in 0..self.count {
            let Some(operation) = self.operations.choose(rng) else { return };
            if rng.random_bool(Self::PROBABILITY) {
                let reverse = operation.moves() && rng.random_bool(0.5);
                operation.apply(picture, self.magnitude, reverse, self.wrapping);
            }
        }
    }
}

impl Operation {
    /// Whether it moves pixels; what does has two directions.
    #[must_use]
    pub fn moves(self) -> bool {
        use Operation::*;
        matches!(self, Rotate | ShearX | ShearY | TranslateX | TranslateY)
    }

    /// Applies it, as strongly as `magnitude` of [`MAX_MAGNITUDE`] says; the other way round if `reverse`. `wrapping`: see
    /// [`RandAugment::wrapping`].
    pub fn apply(self, picture: &mut Picture, magnitude: f64, reverse: bool, wrapping: bool) {
        let share = magnitude / MAX_MAGNITUDE;
        let signed = if reverse { -share } else { share };
        // The original's `enhance_level_to_args`.
        let factor = share * 1.8 + 0.1;
        match self {
            Self::Identity => {}
            Self::AutoContrast => autocontrast(picture, wrapping),
            Self::Equalize => equalize(picture),
            Self::Rotate => {
                let (width, height) = (f64::from(picture.width()), f64::from(picture.height()));
                warp(picture, rotation(width / 2.0, height / 2.0, signed * 30.0));
            }
            Self::Solarize => {
                let threshold = (share * 256.0) as usize;
                map(picture, |byte| if usize::from(byte) < threshold { byte } else { 255 - byte });
            }
            Self::Color => color(picture, factor as f32),
            Self::Contrast => {
                let mean = mean_luma(picture);
                map(picture, |byte| ((f64::from(byte) - mean) * factor + mean) as u8);
            }
            Self::Brightness => map(picture, |byte| (f32::from(byte) * factor as f32) as u8),
            Self::Sharpness => sharpness(picture, factor as f32, wrapping),
            // Matrices are stored in single precision by the original.
            Self::ShearX => warp(picture, [1.0, f64::from((signed * 0.3) as f32), 0.0, 0.0, 1.0, 0.0]),
            Self::ShearY => warp(picture, [1.0, 0.0, 0.0, f64::from((signed * 0.3) as f32), 1.0, 0.0]),
            Self::TranslateX => translate(picture, [-signed * 10.0, 0.0]),
            Self::TranslateY => translate(picture, [0.0, -signed * 10.0]),
            Self::Posterize => {
                let bits = (share * 4.0) as u32;
                map(picture, |byte| byte & (255 << (8 - bits)) as u8);
            }
        }
    }
}

/// The same table for all channels.
fn map(picture: &mut Picture, table: impl Fn(u8) -> u8) {
    let table: [u8; 256] = std::array::from_fn(|byte| table(byte as u8));
    for byte in picture.rgb_mut() {
        *byte = table[usize::from(*byte)];
    }
}

fn map_channels(picture: &mut Picture, [red, green, blue]: &[[u8; 256]; 3]) {
    for pixel in picture.rgb_mut().chunks_exact_mut(3) {
        pixel[0] = red[usize::from(pixel[0])];
        pixel[1] = green[usize::from(pixel[1])];
        pixel[2] = blue[usize::from(pixel[2])];
    }
}

fn autocontrast(picture: &mut Picture, wrapping: bool) {
    let (mut low, mut high) = ([255u8; 3], [0u8; 3]);
    for pixel in picture.rgb().chunks_exact(3) {
        for (c, &byte) in pixel.iter().enumerate() {
            low[c] = low[c].min(byte);
            high[c] = high[c].max(byte);
        }
    }
    let tables = std::array::from_fn(|c| {
        if high[c] <= low[c] {
            return std::array::from_fn(|byte| byte as u8);
        }
        let scale = 255.0 / f64::from(high[c] - low[c]);
        // What numpy makes of `-low`, a number of 8 bits.
        let offset = if wrapping { f64::from(low[c].wrapping_neg()) } else { -f64::from(low[c]) } * scale;
        // `as` cuts off and saturates, as numpy does after `clip`.
        std::array::from_fn(|byte| (byte as f64 * scale + offset) as u8)
    });
    map_channels(picture, &tables);
}

fn equalize(picture: &mut Picture) {
    let mut histograms = [[0u32; 256]; 3];
    for pixel in picture.rgb().chunks_exact(3) {
        for (histogram, &byte) in histograms.iter_mut().zip(pixel) {
            histogram[usize::from(byte)] += 1;
        }
    }
    let tables = histograms.map(|histogram| {
        let last = histogram.iter().rposition(|&count| count > 0).unwrap_or(0);
        let step = histogram[..last].iter().sum::<u32>() / 255;
        let mut below = step / 2;
        std::array::from_fn(|byte| {
            let level = below.checked_div(step).map_or(byte, |level| level as usize);
            below += histogram[byte];
            level.min(255) as u8
        })
    });
    map_channels(picture, &tables);
}

fn color(picture: &mut Picture, factor: f32) {
    // Row: what a channel contributes to each channel.
    const OWN: [[f32; 3]; 3] = [[0.886, -0.114, -0.114], [-0.587, 0.413, -0.587], [-0.299, -0.299, 0.701]];
    let weights = OWN.map(|row| row.map(|weight| weight * factor));
    let weights: [[f32; 3]; 3] = std::array::from_fn(|from| weights[from].map(|weight| weight + LUMA[from] as f32));
    for pixel in picture.rgb_mut().chunks_exact_mut(3) {
        let from: [f32; 3] = std::array::from_fn(|c| f32::from(pixel[c]));
        for (c, byte) in pixel.iter_mut().enumerate() {
            *byte = (from[0] * weights[0][c] + from[1] * weights[1][c] + from[2] * weights[2][c]) as u8;
        }
    }
}

fn mean_luma(picture: &Picture) -> f64 {
    let mut sums = [0u64; 3];
    for pixel in picture.rgb().chunks_exact(3) {
        for (sum, &byte) in sums.iter_mut().zip(pixel) {
            *sum += u64::from(byte);
        }
    }
    let pixels = (picture.rgb().len() / 3) as f64;
    sums.iter().zip(LUMA).map(|(&sum, share)| sum as f64 / pixels * share).sum()
}

/// Away from a blurred picture: each pixel weighs 5 and its neighbours 1.
fn sharpness(picture: &mut Picture, factor: f32, wrapping: bool) {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    if width < 3 || height < 3 {
        return;
    }
    let len = width * 3;
    let mut columns = vec![0u16; len];
    let (mut above, mut here) = (vec![0u8; len], picture.rgb()[..len].to_vec());
    for y in 1..height - 1 {
        std::mem::swap(&mut above, &mut here);
        let (row, below) = picture.rgb_mut()[y * len..][..2 * len].split_at_mut(len);
        here.copy_from_slice(row);
        for (((sum, &a), &h), &b) in columns.iter_mut().zip(&above).zip(&here).zip(&*below) {
            *sum = u16::from(a) + u16::from(h) + u16::from(b);
        }
        let sums = columns.iter().zip(&columns[3..]).zip(&columns[6..]);
        for (byte, ((left, middle), right)) in row[3..].iter_mut().zip(sums) {
            let own = f32::from(*byte);
            let blurred = f32::from((left + middle + right + 4 * u16::from(*byte) + 6) / 13);
            let value = (blurred + factor * (own - blurred)) as i32;
            *byte = if wrapping { value as u8 } else { value.clamp(0, 255) as u8 };
        }
    }
}

/// Moves right and down by so many pixels.
fn translate(picture: &mut Picture, [right, down]: [f64; 2]) {
    if right.fract() != 0.0 || down.fract() != 0.0 {
        let [right, down] = [right, down].map(|by| f64::from(by as f32));
        return warp(picture, [1.0, 0.0, right, 0.0, 1.0, down]);
    }
    // Whole pixels need no interpolation.
    let (len, right, down) = (picture.width() as usize * 3, right as isize * 3, down as isize);
    let source = picture.rgb().to_vec();
    let empty = vec![OUTSIDE; len];
    for (y, row) in picture.rgb_mut().chunks_exact_mut(len).enumerate() {
        let from = y.checked_add_signed(-down).and_then(|y| source.get(y * len..)?.get(..len)).unwrap_or(&empty);
        let by = right.unsigned_abs().min(len);
        if right >= 0 {
            row[by..].copy_from_slice(&from[..len - by]);
            row[..by].fill(OUTSIDE);
        } else {
            row[..len - by].copy_from_slice(&from[by..]);
            row[len - by..].fill(OUTSIDE);
        }
    }
}

/// OpenCV's `getRotationMatrix2D` of scale one: counter-clockwise by degrees.
fn rotation(x: f64, y: f64, degrees: f64) -> [f64; 6] {
    let (sin, cos) = degrees.to_radians().sin_cos();
    [cos, sin, (1.0 - cos) * x - sin * y, -sin, cos, sin * x + (1.0 - cos) * y]
}

/// A pixel in one word, 21 bits a channel: room for a sum of four bytes with weights that sum to 1024.
fn pack(pixel: &[u8]) -> u64 {
    u64::from(pixel[0]) | u64::from(pixel[1]) << 21 | u64::from(pixel[2]) << 42
}

/// OpenCV's `warpAffine` with bilinear interpolation: `to` maps a source position (row by row, 2 × 3) to where it goes. Positions
/// are computed in 1/1024 and rounded to 1/32 of a pixel, as in OpenCV before version 5.
fn warp(picture: &mut Picture, to: [f64; 6]) {
    const SCALE: f64 = 1024.0;
    /// Half of 1/32 of a pixel.
    const HALF: i64 = 16;
    /// Half of the weights' sum, for each channel.
    const ROUND: u64 = 512 | 512 << 21 | 512 << 42;
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let determinant = to[0] * to[4] - to[1] * to[3];
    let inverse = if determinant == 0.0 { 0.0 } else { 1.0 / determinant };
    let (a, b, c, d) = (to[4] * inverse, to[1] * -inverse, to[3] * -inverse, to[0] * inverse);
    let (x0, y0) = (-a * to[2] - b * to[5], -c * to[2] - d * to[5]);
    let fixed = |value: f64| (value * SCALE).round_ties_even() as i64;
    let along: Vec<[i64; 2]> = (0..width).map(|x| [fixed(a * x as f64), fixed(c * x as f64)]).collect();

    // With two pixels of the outside all around, positions further out are the same as those just outside.
    let stride = width + 4;
    let outside = pack(&[OUTSIDE; 3]);
    let mut source = vec![outside; stride * (height + 4)];
    for (row, padded) in picture.rgb().chunks_exact(width * 3).zip(source.chunks_exact_mut(stride).skip(2)) {
        for (pixel, word) in row.chunks_exact(3).zip(&mut padded[2..]) {
            *word = pack(pixel);
        }
    }
    let (last_x, last_y) = (width as i64, height as i64);
    for (y, row) in picture.rgb_mut().chunks_exact_mut(width * 3).enumerate() {
        let start = [fixed(b * y as f64 + x0) + HALF, fixed(d * y as f64 + y0) + HALF];
        for (pixel, along) in row.chunks_exact_mut(3).zip(&along) {
            let (x, y) = ((start[0] + along[0]) >> 5, (start[1] + along[1]) >> 5);
            let (right, down) = ((x & 31) as u64, (y & 31) as u64);
            let (x, y) = ((x >> 5).clamp(-2, last_x) + 2, (y >> 5).clamp(-2, last_y) + 2);
            let place = y as usize * stride + x as usize;
            let (upper, lower) = (&source[place..place + 2], &source[place + stride..place + stride + 2]);
            let upper = upper[0] * (32 - right) + upper[1] * right;
            let lower = lower[0] * (32 - right) + lower[1] * right;
            let sum = upper * (32 - down) + lower * down + ROUND;
            pixel[0] = (sum >> 10) as u8;
            pixel[1] = (sum >> 31) as u8;
            pixel[2] = (sum >> 52) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thirteenth_is_rounded_as_in_floating_point() {
        // What OpenCV's filter computes, in single precision.
        for sum in 0..=13 * 255u16 {
            let expected = (f32::from(sum) * (1.0 / 13.0)).round_ties_even();
            assert_eq!(f32::from((sum + 6) / 13), expected, "{sum}");
        }
    }

    #[test]
    fn words_hold_the_sum_of_four_pixels() {
        let white = pack(&[255; 3]);
        let sum = white * 1024 + (512 | 512 << 21 | 512 << 42);
        assert_eq!([sum >> 10, sum >> 31, sum >> 52].map(|word| word as u8), [255; 3]);
    }
}
