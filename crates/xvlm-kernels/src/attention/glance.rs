//! Attention of one query on the CPU, as in decoding. It costs little more than to read the keys and values once, so they are
//! read where they lie.

use pulp::{Simd, WithSimd};

use super::head::{Extent, Source, Target};
use crate::real::Real;
use crate::simd::product::LANES;
use crate::simd::softmax_row;

/// Attention of query 0 over all keys, with a bias for each, into row 0 of `out`.
pub(super) struct Glance<'a, T> {
    pub(super) extent: &'a Extent,
    pub(super) q: Source<'a, T>,
    pub(super) k: Source<'a, T>,
    pub(super) v: Source<'a, T>,
    pub(super) bias: &'a [f32],
    pub(super) out: Target<'a, T>,
}

impl<T: Real> WithSimd for Glance<'_, T> {
    type Output = ();

    // Counted loops: what an iterator calls is not always inlined, and then it is not compiled for these instructions.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { extent, q, k, v, bias, mut out } = self;
        let width = extent.width;
        // Padded with zeros to whole vectors.
        let zeros = || vec![0f32; width.next_multiple_of(LANES)];
        let (mut query, mut row, mut mixed) = (zeros(), zeros(), zeros());
        let mut scores = bias.to_vec();
        widen(q.row(0), extent.scale(), &mut query);
        let query = S::as_simd_f32s(&query).0;
        for key in 0..scores.len() {
            widen(k.row(key), 1.0, &mut row);
            let row = &S::as_simd_f32s(&row).0[..query.len()];
            let mut sum = simd.splat_f32s(0.0);
            for i in 0..query.len() {
                sum = simd.mul_add_e_f32s(query[i], row[i], sum);
            }
            scores[key] += simd.reduce_sum_f32s(sum);
        }
        softmax_row(&mut scores);
        let sums = S::as_mut_simd_f32s(&mut mixed).0;
        for key in 0..scores.len() {
            widen(v.row(key), 1.0, &mut row);
            let row = &S::as_simd_f32s(&row).0[..sums.len()];
            let weight = simd.splat_f32s(scores[key]);
            for i in 0..row.len() {
                sums[i] = simd.mul_add_e_f32s(weight, row[i], sums[i]);
            }
        }
        let out = &mut out.row(0)[..width];
        for i in 0..width {
            out[i] = T::narrow(mixed[i]);
        }
    }
}

#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn widen<T: Real>(row: &[T], scale: f32, out: &mut [f32]) {
    let out = &mut out[..row.len()];
    for i in 0..row.len() {
        out[i] = scale * row[i].widen();
    }
}
