//! Bicubic resizing, bit for bit as Pillow 13 does it (a = −0.5, the kernel widened when shrinking).
//!
//! The published weights were trained and are evaluated on images resized by Pillow; other bicubic
//! kernels (OpenCV's a = −0.75, or without the widening) move the features. What has to be kept to be
//! equal: weights computed in f64, rounded to fixed point with 22 fractional bits; the result of the
//! first pass rounded to 8 bits; an axis that keeps its size is not filtered; the horizontal pass first,
//! unless the height shrinks by more than twice of what the width does (see Pillow's `Resample.c`).
//! Earlier versions of Pillow never take the vertical pass first: on such pictures they differ by one
//! of 255 here and there.
//!
//! Sums along rows are first computed in single precision, which processors multiply more of at once than whole numbers of 32 bits. Where
//! such a sum is so close to the middle between two bytes that its rounding errors could matter (some values in a thousand), it is computed
//! again in whole numbers: the result is always that of Pillow.

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
    /// `longest` weights for each output position, in fixed point.
    fixed: Vec<i32>,
    /// The same weights.
    floats: Vec<f32>,
    longest: usize,
    /// Further than this from a whole number a sum in single precision may round otherwise than the exact one.
    certain: f32,
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
        let mut fixed = vec![0i32; output * longest];
        let mut row = vec![0f64; longest];
        let mut largest = 0;
        for (out, fixed) in fixed.chunks_exact_mut(longest).enumerate() {
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
            for (fixed, weight) in fixed.iter_mut().zip(&row[..count]) {
                *fixed = (weight / sum * f64::from(1u32 << PRECISION)).round() as i32;
            }
            largest = fixed.iter().map(|weight| weight.unsigned_abs()).sum::<u32>().max(largest);
            spans.push((first, count));
        }
        let one = (1u32 << PRECISION) as f32;
        // Each of n products and n sums is off by at most 2⁻²⁴ of the sum of all products' sizes.
        let doubt = (2 * longest) as f32 * (largest as f32 / one * 255.0) / (1 << 24) as f32;
        let floats = fixed.iter().map(|&weight| weight as f32 / one).collect();
        Self { spans, fixed, floats, longest, certain: 0.5 - doubt }
    }

    /// Of each output position the first input position, the weights, and these in fixed point.
    fn each(&self) -> impl Iterator<Item = (usize, &[f32], &[i32])> {
        let weights = self.floats.chunks_exact(self.longest).zip(self.fixed.chunks_exact(self.longest));
        let each = self.spans.iter().zip(weights);
        each.map(|(&(first, count), (floats, fixed))| (first, &floats[..count], &fixed[..count]))
    }
}

/// Half of the unit of fixed-point numbers: what rounds a sum.
const HALF: i32 = 1 << (PRECISION - 1);

/// A rounded sum in fixed point.
#[inline(always)]
fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// The sum of products in fixed point.
fn exact(products: impl Iterator<Item = (u8, i32)>) -> u8 {
    to_byte(products.fold(HALF, |sum, (byte, weight)| sum + i32::from(byte) * weight))
}

/// The nearest byte, and how far from it the number is, after clamping.
#[inline(always)]
fn nearest(value: f32) -> (u8, f32) {
    // Above this, the last bit of a number is worth 1.
    const LARGE: f32 = (1 << 23) as f32;
    let value = if value > 0.0 { value } else { 0.0 };
    let value = if value < 255.0 { value } else { 255.0 };
    let shifted = value + LARGE;
    (shifted.to_bits() as u8, (value - (shifted - LARGE)).abs())
}

/// The nearest bytes, and whether any of them is further from its number than what is `certain`.
#[inline(always)]
fn nearest_all<const N: usize>(sums: &[f32; N], certain: f32) -> ([u8; N], bool) {
    let (mut bytes, mut distances) = ([0; N], [0.0; N]);
    for i in 0..N {
        (bytes[i], distances[i]) = nearest(sums[i]);
    }
    let doubtful = distances.iter().fold(0, |any, &distance| any | u32::from(distance > certain));
    (bytes, doubtful != 0)
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
    let rows: Vec<&[u8]> = (0..h).map(|y| &rgb[((y0 + y) * width + x0) * 3..][..w * 3]).collect();
    pulp::Arch::new().dispatch(Resize { rows, out_width, out_height, vertical_first })
}

/// The work of [`resize_bicubic`], to be compiled for each instruction set: what it calls must be `#[inline(always)]` to profit.
struct Resize<'a> {
    rows: Vec<&'a [u8]>,
    out_width: usize,
    out_height: usize,
    vertical_first: bool,
}

impl pulp::NullaryFnOnce for Resize<'_> {
    type Output = Vec<u8>;

    #[inline(always)]
    fn call(self) -> Vec<u8> {
        let Self { rows, out_width, out_height, vertical_first } = self;
        if vertical_first {
            let middle = vertical(&rows, out_height);
            horizontal(&middle.chunks_exact(rows[0].len()).collect::<Vec<_>>(), out_width)
        } else {
            let middle = horizontal(&rows, out_width);
            vertical(&middle.chunks_exact(out_width * 3).collect::<Vec<_>>(), out_height)
        }
    }
}

/// Rows that are resized at once, so that neighbours in memory get the same weight.
const ROWS: usize = 8;

/// The same channel of a pixel in [`ROWS`] rows.
type Lanes = [f32; ROWS];

/// Resizes each row of RGB pixels.
#[inline(always)]
fn horizontal(rows: &[&[u8]], out_width: usize) -> Vec<u8> {
    let len = rows.first().map_or(0, |row| row.len());
    if len == out_width * 3 {
        return rows.concat();
    }
    let weights = Weights::new(len / 3, out_width);
    let out_len = out_width * 3;
    let mut result = vec![0; rows.len() * out_len];
    let mut columns = vec![[0.0; ROWS]; len];
    let mut resized = vec![[0; ROWS]; out_len];
    for (rows, out) in rows.chunks(ROWS).zip(result.chunks_mut(ROWS * out_len)) {
        // The last rows may be fewer: one is repeated.
        let rows: [&[u8]; ROWS] = std::array::from_fn(|i| rows[i.min(rows.len() - 1)]);
        to_columns(rows, &mut columns);
        resize_columns(&columns, &weights, &mut resized);
        for (i, out) in out.chunks_exact_mut(out_len).enumerate() {
            for (out, lanes) in out.iter_mut().zip(&resized) {
                *out = lanes[i % ROWS];
            }
        }
    }
    result
}

#[inline(always)]
fn to_columns(rows: [&[u8]; ROWS], columns: &mut [Lanes]) {
    const MANY: usize = 16;
    let (many, rest) = columns.as_chunks_mut::<MANY>();
    let done = many.len() * MANY;
    for (i, columns) in many.iter_mut().enumerate() {
        let rows: [&[u8; MANY]; ROWS] = rows.map(|row| row[i * MANY..].first_chunk().expect("as many as columns"));
        let bytes: [[u8; ROWS]; MANY] = std::array::from_fn(|x| rows.map(|row| row[x]));
        for (column, bytes) in columns.iter_mut().zip(&bytes) {
            *column = bytes.map(f32::from);
        }
    }
    for (x, column) in rest.iter_mut().enumerate() {
        *column = rows.map(|row| f32::from(row[done + x]));
    }
}

#[inline(always)]
fn resize_columns(columns: &[Lanes], weights: &Weights, out: &mut [[u8; ROWS]]) {
    for ((first, floats, fixed), out) in weights.each().zip(out.as_chunks_mut::<3>().0) {
        let pixels = columns[3 * first..3 * (first + floats.len())].as_chunks::<3>().0;
        let mut sums = [[0.0; ROWS]; 3];
        for (pixel, &weight) in pixels.iter().zip(floats) {
            for c in 0..3 {
                for r in 0..ROWS {
                    sums[c][r] += weight * pixel[c][r];
                }
            }
        }
        let mut doubtful = false;
        for c in 0..3 {
            let (bytes, doubt) = nearest_all(&sums[c], weights.certain);
            out[c] = bytes;
            doubtful |= doubt;
        }
        if doubtful {
            for (c, r) in (0..3).flat_map(|c| (0..ROWS).map(move |r| (c, r))) {
                if nearest(sums[c][r]).1 > weights.certain {
                    out[c][r] = exact(pixels.iter().map(|pixel| pixel[c][r] as u8).zip(fixed.iter().copied()));
                }
            }
        }
    }
}

/// Resizes all columns, a row at a time: the inner loop runs over neighbours in memory.
#[inline(always)]
fn vertical(rows: &[&[u8]], out_height: usize) -> Vec<u8> {
    if rows.len() == out_height {
        return rows.concat();
    }
    let weights = Weights::new(rows.len(), out_height);
    let len = rows.first().map_or(0, |row| row.len());
    let mut result = vec![0; out_height * len];
    for ((first, _, fixed), out) in weights.each().zip(result.chunks_exact_mut(len)) {
        combine(&rows[first..first + fixed.len()], fixed, out);
    }
    result
}

/// The sum of rows, each with its weight: whole numbers, since bytes would first have to be made floating-point ones.
#[inline(always)]
fn combine(rows: &[&[u8]], weights: &[i32], out: &mut [u8]) {
    const MANY: usize = 16;
    let (many, rest) = out.as_chunks_mut::<MANY>();
    let done = many.len() * MANY;
    for (i, out) in many.iter_mut().enumerate() {
        let mut sums = [HALF; MANY];
        for (row, &weight) in rows.iter().zip(weights) {
            let bytes: &[u8; MANY] = row[i * MANY..].first_chunk().expect("rows of the same length");
            for (sum, &byte) in sums.iter_mut().zip(bytes) {
                *sum += weight * i32::from(byte);
            }
        }
        *out = sums.map(to_byte);
    }
    for (x, byte) in rest.iter_mut().enumerate() {
        *byte = exact(rows.iter().map(|row| row[done + x]).zip(weights.iter().copied()));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One axis after the other, weights from their definition, sums in whole numbers.
    fn slow(image: &[Vec<[u8; 3]>], out_width: usize, out_height: usize) -> Vec<Vec<[u8; 3]>> {
        let (width, height) = (image[0].len(), image.len());
        let along = |line: &[[u8; 3]], output: usize| -> Vec<[u8; 3]> {
            let (input, scale) = (line.len(), line.len() as f64 / output as f64);
            let stretch = scale.max(1.0);
            let pixel = |out: usize| {
                let center = (out as f64 + 0.5) * scale;
                let inside = |i: &usize| (*i as f64 + 0.5 - center).abs() <= 2.0 * stretch + 0.5;
                let taps: Vec<usize> = (0..input).filter(inside).collect();
                let weight = |i: usize| kernel((i as f64 - center + 0.5) * (1.0 / stretch));
                let total: f64 = taps.iter().map(|&i| weight(i)).sum();
                std::array::from_fn(|c| {
                    let unit = 4_194_304.0;
                    let term = |&i: &usize| i64::from(line[i][c]) * (weight(i) / total * unit).round() as i64;
                    let sum = taps.iter().map(term).sum::<i64>() + 2_097_152;
                    (sum >> 22).clamp(0, 255) as u8
                })
            };
            if input == output { line.to_vec() } else { (0..output).map(pixel).collect() }
        };
        let turned = |image: &[Vec<[u8; 3]>]| -> Vec<Vec<[u8; 3]>> {
            (0..image[0].len()).map(|x| image.iter().map(|row| row[x]).collect()).collect()
        };
        let across = |image: &[Vec<[u8; 3]>]| -> Vec<_> { image.iter().map(|row| along(row, out_width)).collect() };
        let down = |image: &[Vec<[u8; 3]>]| {
            let columns: Vec<_> = turned(image).iter().map(|column| along(column, out_height)).collect();
            turned(&columns)
        };
        let saved = |from: usize, to: usize| from as i64 - to as i64;
        let vertical_first = saved(height, out_height) > 0.max(2 * saved(width, out_width));
        if vertical_first { across(&down(image)) } else { down(&across(image)) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn any_part_is_resized_as_if_it_were_all(
            size in (1usize..70, 1usize..70),
            out in (1usize..50, 1usize..50),
            border in (0usize..4, 0usize..4),
            seed in any::<u32>(),
            extreme in any::<bool>(),
        ) {
            let ((width, height), (left, top)) = (size, border);
            let mut state = seed;
            let mut byte = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let byte = (state >> 24) as u8;
                if extreme { if byte < 128 { 0 } else { 255 } } else { byte }
            };
            let full = (width + 2 * left, height + 2 * top);
            let rgb: Vec<u8> = (0..full.0 * full.1 * 3).map(|_| byte()).collect();
            let pixel = |x: usize, y: usize| *rgb[((top + y) * full.0 + left + x) * 3..].first_chunk().unwrap();
            let image: Vec<Vec<[u8; 3]>> = (0..height).map(|y| (0..width).map(|x| pixel(x, y)).collect()).collect();
            let [x, y, w, h] = [left, top, width, height].map(|v| v as u32);
            let found = resize_bicubic(&rgb, full.0, Rect { x, y, width: w, height: h }, out.0, out.1);
            prop_assert_eq!(found, slow(&image, out.0, out.1).concat().concat());
        }
    }
}
