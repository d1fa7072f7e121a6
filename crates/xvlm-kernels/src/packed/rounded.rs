//! Weights and rows as bytes, with a scale for each.

use rayon::prelude::*;

use crate::numbers::Lines;
use crate::simd::native::{Factor, Multiplier, Panels};
use crate::simd::vectorized;

/// Weights in panels of bytes.
pub(super) struct Quantised {
    pub(super) panels: Panels<i8>,
    pub(super) scales: Vec<f32>,
    /// Of the bytes of each output.
    pub(super) sums: Vec<i32>,
}

impl Quantised {
    pub(super) fn new(multiplier: &Multiplier<i8>, Rounded { bytes, scales, sums, inputs }: Rounded) -> Self {
        Self { panels: multiplier.pack(Factor::Along(&bytes), (scales.len(), inputs)), scales, sums }
    }
}

/// Rows of numbers as bytes, and a scale for each row.
pub(super) struct Rounded {
    pub(super) bytes: Vec<i8>,
    pub(super) scales: Vec<f32>,
    /// Of the bytes of each row.
    pub(super) sums: Vec<i32>,
    pub(super) inputs: usize,
}

impl Rounded {
    /// In 254 steps (255 values) from the negative of a row's greatest number to the number itself. A row with a number that
    /// is not finite has a scale of NaN. `memory` is what the bytes are written to.
    pub(super) fn of(weight: &Lines<f32>, memory: Vec<i8>) -> Self {
        let (outputs, inputs) = weight.size();
        let (mut bytes, mut scales, mut sums) = (memory, vec![0.0; outputs], vec![0; outputs]);
        bytes.resize(outputs * inputs, 0);
        let rows = bytes.par_chunks_exact_mut(inputs).zip(&mut scales).zip(&mut sums).enumerate();
        rows.for_each_init(Vec::new, |read, (i, ((bytes, scale), sum))| {
            let row = weight.plain(i..i + 1).unwrap_or_else(|| {
                read.resize(inputs, 0.0);
                weight.read(i, 0, read);
                read
            });
            (*scale, *sum) = vectorized(
                #[inline(always)]
                || round(row, bytes),
            );
        });
        Self { bytes, scales, sums, inputs }
    }

    /// In `f32`.
    pub(super) fn widened(&self) -> Vec<f32> {
        let rows = self.bytes.chunks_exact(self.inputs).zip(&self.scales);
        rows.flat_map(|(row, scale)| row.iter().map(move |q| f32::from(*q) * scale)).collect()
    }
}

/// Rounds a row of weights, and returns its scale and the sum of its bytes.
#[inline(always)]
fn round(row: &[f32], bytes: &mut [i8]) -> (f32, i32) {
    let Bounds { least, greatest } = Bounds::of(row);
    let scale = greatest.max(-least) / 127.0;
    // A row of zeros has any scale.
    let (scale, steps) = if scale == 0.0 { (1.0, 0.0) } else { (scale, 1.0 / scale) };
    for (byte, &w) in bytes.iter_mut().zip(row) {
        *byte = (w * steps).round_ties_even() as i32 as i8;
    }
    (scale, bytes.iter().copied().map(i32::from).sum())
}

/// Rows that a thread rounds at a time.
const ROWS: usize = 16;

/// Numbers that are compared side by side.
const ABREAST: usize = 64;

/// Rows as unsigned bytes (in signed ones), with scale and zero of each. A row with a number that is not finite has a scale of
/// NaN.
pub(super) fn quantised(x: &[f32], width: usize) -> (Vec<i8>, Vec<(f32, i32)>) {
    let mut rows = vec![(0.0, 0); x.len() / width];
    let mut bytes = vec![0i8; x.len()];
    let parts = bytes.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).zip(rows.par_chunks_mut(ROWS));
    parts.for_each(|((bytes, x), rows)| {
        for ((bytes, x), row) in bytes.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(rows) {
            *row = vectorized(
                #[inline(always)]
                || quantise(x, bytes),
            );
        }
    });
    (bytes, rows)
}

#[inline(always)]
fn quantise(x: &[f32], bytes: &mut [i8]) -> (f32, i32) {
    let Bounds { least, greatest } = Bounds::of(x);
    let scale = (greatest - least) / 255.0;
    let steps = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let zero = (-least * steps).round_ties_even();
    for (byte, &x) in bytes.iter_mut().zip(x) {
        *byte = (x.mul_add(steps, zero).round_ties_even().clamp(0.0, 255.0) as i32 as u8).cast_signed();
    }
    (scale, zero as i32)
}

/// The least and the greatest of some numbers and 0; NaN if one of them is not finite.
struct Bounds {
    least: f32,
    greatest: f32,
}

impl Bounds {
    #[inline(always)]
    fn of(x: &[f32]) -> Self {
        let (mut least, mut greatest, mut nothing) = ([0f32; ABREAST], [0f32; ABREAST], [0f32; ABREAST]);
        let (blocks, rest) = x.as_chunks::<ABREAST>();
        let mut last = [0f32; ABREAST];
        last[..rest.len()].copy_from_slice(rest);
        for x in blocks.iter().chain([&last]) {
            for i in 0..ABREAST {
                least[i] = if x[i] < least[i] { x[i] } else { least[i] };
                greatest[i] = if x[i] > greatest[i] { x[i] } else { greatest[i] };
                nothing[i] += 0.0 * x[i];
            }
        }
        let nothing = nothing.iter().sum::<f32>();
        let least = least.iter().fold(0f32, |a, b| a.min(*b)) + nothing;
        Self { least, greatest: greatest.iter().fold(0f32, |a, b| a.max(*b)) + nothing }
    }
}
