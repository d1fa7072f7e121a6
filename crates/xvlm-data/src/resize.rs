//! Bicubic resizing, bit for bit as Pillow 13 does it (a = −0.5, the kernel widened when shrinking).
//!
//! The published weights were trained and are evaluated on images resized by Pillow; other bicubic
//! kernels (OpenCV's a = −0.75, or without the widening) move the features. What has to be kept to be
//! equal: weights computed in f64, rounded to fixed point with 22 fractional bits; the result of the
//! first pass rounded to 8 bits; an axis that keeps its size is not filtered; the horizontal pass first,
//! unless the height shrinks by more than twice of what the width does (see Pillow's `Resample.c`).
//! Earlier versions of Pillow never take the vertical pass first: on such pictures they differ by one
//! of 255 here and there.

use crate::transform::Rect;

/// Fractional bits of the weights: 32 bits less 8 of the pixel and 2 of head room.
const PRECISION: u32 = 32 - 8 - 2;
/// Half of the kernel's width at scale one.
const SUPPORT: f64 = 2.0;

/// Keys' cubic with a = −0.5 (Catmull–Rom).
fn kernel(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// For each output position the first input position and the weights from there on.
struct Weights {
    /// (first input position, number of weights) of each output position.
    spans: Vec<(usize, usize)>,
    /// `longest` weights for each output position.
    values: Vec<i32>,
    longest: usize,
}

impl Weights {
    fn new(input: usize, output: usize) -> Self {
        let scale = input as f64 / output as f64;
        let stretch = scale.max(1.0);
        let support = SUPPORT * stretch;
        // Multiplied with, as Pillow does: dividing by `stretch` rounds otherwise.
        let shrink = 1.0 / stretch;
        let longest = support.ceil() as usize * 2 + 1;
        let mut spans = Vec::with_capacity(output);
        let mut values = vec![0i32; output * longest];
        let mut row = vec![0f64; longest];
        for (out, values) in values.chunks_exact_mut(longest).enumerate() {
            let center = (out as f64 + 0.5) * scale;
            // `as` truncates towards zero and saturates, which is what the C casts do here.
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let count = end - first;
            let mut sum = 0.0;
            for (i, weight) in row[..count].iter_mut().enumerate() {
                *weight = kernel(((i + first) as f64 - center + 0.5) * shrink);
                sum += *weight;
            }
            for (fixed, weight) in values.iter_mut().zip(&row[..count]) {
                *fixed = (weight / sum * f64::from(1u32 << PRECISION)).round() as i32;
            }
            spans.push((first, count));
        }
        Self { spans, values, longest }
    }

    fn of(&self, out: usize) -> (usize, &[i32]) {
        let (first, count) = self.spans[out];
        (first, &self.values[out * self.longest..][..count])
    }
}

#[inline]
fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// Resizes the part `rect` of an RGB image (`[height][width][3]` bytes, `width` pixels a row) to
/// `out_width` × `out_height`. Pixels outside the rectangle have no influence, as if it had been cut
/// out first.
///
/// # Panics
///
/// If the rectangle is empty or not inside the image.
#[must_use]
pub fn resize_bicubic(rgb: &[u8], width: usize, rect: Rect, out_width: usize, out_height: usize) -> Vec<u8> {
    let (x0, y0) = (rect.x as usize, rect.y as usize);
    let (w, h) = (rect.width as usize, rect.height as usize);
    assert!(w > 0 && h > 0 && x0 + w <= width && (y0 + h) * width * 3 <= rgb.len());
    let shrinks = |from: usize, to: usize| from as i64 - to as i64;
    let vertical_first = shrinks(h, out_height) > 0.max(2 * shrinks(w, out_width));
    let row = |y: usize| &rgb[((y0 + y) * width + x0) * 3..][..w * 3];
    if vertical_first {
        let rows: Vec<&[u8]> = (0..h).map(row).collect();
        let middle = vertical(&rows, out_height);
        horizontal(middle.chunks_exact(w * 3), w, out_width)
    } else {
        let middle = horizontal((0..h).map(row), w, out_width);
        let rows: Vec<&[u8]> = middle.chunks_exact(out_width * 3).collect();
        vertical(&rows, out_height)
    }
}

/// Half of the unit of fixed-point numbers: what rounds a sum.
const HALF: i32 = 1 << (PRECISION - 1);

/// Resizes each row of `width` pixels.
fn horizontal<'a>(rows: impl Iterator<Item = &'a [u8]>, width: usize, out_width: usize) -> Vec<u8> {
    if width == out_width {
        return rows.flatten().copied().collect();
    }
    let weights = Weights::new(width, out_width);
    let mut result = Vec::with_capacity(rows.size_hint().0 * out_width * 3);
    for row in rows {
        for x in 0..out_width {
            let (first, weights) = weights.of(x);
            let (mut r, mut g, mut b) = (HALF, HALF, HALF);
            let pixels = row[first * 3..].chunks_exact(3);
            for (&weight, pixel) in weights.iter().zip(pixels) {
                r += weight * i32::from(pixel[0]);
                g += weight * i32::from(pixel[1]);
                b += weight * i32::from(pixel[2]);
            }
            result.extend([to_byte(r), to_byte(g), to_byte(b)]);
        }
    }
    result
}

/// Resizes all columns, a row at a time: the inner loop runs over neighbours in memory.
fn vertical(rows: &[&[u8]], out_height: usize) -> Vec<u8> {
    if rows.len() == out_height {
        return rows.concat();
    }
    let weights = Weights::new(rows.len(), out_height);
    let row_len = rows.first().map_or(0, |row| row.len());
    let mut result = Vec::with_capacity(out_height * row_len);
    let mut sums = vec![0i32; row_len];
    for y in 0..out_height {
        let (first, weights) = weights.of(y);
        sums.fill(HALF);
        for (&weight, row) in weights.iter().zip(&rows[first..]) {
            for (sum, &byte) in sums.iter_mut().zip(*row) {
                *sum += weight * i32::from(byte);
            }
        }
        result.extend(sums.iter().map(|&sum| to_byte(sum)));
    }
    result
}
