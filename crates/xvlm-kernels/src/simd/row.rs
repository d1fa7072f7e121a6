//! Rows of numbers, vector by vector. The order of sums depends on the length of a row and the instruction set alone.

use std::ops::Range;

use pulp::Simd;
use pulp::bytemuck::{cast_slice, cast_slice_mut};

use super::{EXP, EXP_LEAST, LN_2, ROUND};
use crate::real::Real;

/// Sums that are taken side by side, so that one addition need not wait for the last.
pub(crate) const SUMS: usize = 4;

/// Rows whose passes are taken together, at most: the next row need not wait until this one is summed up.
pub(crate) const ROWS: usize = 8;

/// As many rows as stay in the nearest cache from pass to pass.
pub(crate) fn rows_together(width: usize) -> usize {
    (2048 / width.max(1)).clamp(1, ROWS)
}

/// Calls `work` with the range of each vector in a row, which is shorter at the end of the row, and with the sum to add to.
#[inline(always)]
pub(crate) fn each<S: Simd>(_: S, width: usize, mut work: impl FnMut(Range<usize>, usize)) {
    let lanes = S::F32_LANES;
    let mut at = 0;
    // Not a loop over the sums, which would keep them in memory.
    while width - at >= SUMS * lanes {
        work(at..at + lanes, 0);
        work(at + lanes..at + 2 * lanes, 1);
        work(at + 2 * lanes..at + 3 * lanes, 2);
        work(at + 3 * lanes..at + 4 * lanes, 3);
        at += SUMS * lanes;
    }
    while width - at >= lanes {
        work(at..at + lanes, 0);
        at += lanes;
    }
    if at < width {
        work(at..width, 1);
    }
}

/// At most a vector of numbers, widened; `pad` where there are fewer.
#[inline(always)]
pub(crate) fn load<S: Simd, T: Real>(simd: S, from: &[T], pad: f32) -> S::f32s {
    if from.len() < S::F32_LANES {
        let there = simd.mask_between_m32s(0, from.len() as u32).mask();
        return simd.select_f32s(there, T::partial_load(simd, from), simd.splat_f32s(pad));
    }
    let mut vector = [simd.splat_f32s(0.0)];
    for (lane, x) in cast_slice_mut::<S::f32s, f32>(&mut vector).iter_mut().zip(from) {
        *lane = x.widen();
    }
    vector[0]
}

/// Narrows as many numbers as there is place for.
#[inline(always)]
pub(crate) fn store<S: Simd, T: Real>(simd: S, vector: S::f32s, to: &mut [T]) {
    if to.len() < S::F32_LANES {
        return T::partial_store(simd, vector, to);
    }
    for (to, lane) in to.iter_mut().zip(cast_slice::<S::f32s, f32>(&[vector])) {
        *to = T::narrow(*lane);
    }
}

#[inline(always)]
pub(crate) fn total<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; SUMS]) -> f32 {
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
}

/// The largest number that is one; −∞ if there is none.
#[inline(always)]
pub(crate) fn max<S: Simd, T: Real>(simd: S, row: &[T]) -> f32 {
    let mut tops = [simd.splat_f32s(f32::NEG_INFINITY); SUMS];
    // The second of two numbers is taken unless the first is larger: NaN never is.
    each(
        simd,
        row.len(),
        #[inline(always)]
        |at, i| tops[i] = simd.max_f32s(load(simd, &row[at], f32::NEG_INFINITY), tops[i]),
    );
    let [a, b, c, d] = tops;
    simd.reduce_max_f32s(simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d)))
}

/// [`exp`](super::exp) of numbers that are not above 88.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let round = simd.splat_f32s(ROUND);
    let shifted = simd.mul_add_e_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), round);
    let n = simd.sub_f32s(shifted, round);
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN_2[0]), x);
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN_2[1]), r);
    let mut p = simd.splat_f32s(EXP[0]);
    for coefficient in &EXP[1..] {
        p = simd.mul_add_e_f32s(p, r, simd.splat_f32s(*coefficient));
    }
    let y = simd.add_f32s(simd.mul_add_e_f32s(p, simd.mul_f32s(r, r), r), simd.splat_f32s(1.0));
    let exponent = simd.add_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(127));
    let power = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(exponent, simd.splat_u32s(23)));
    let is_least = simd.less_than_f32s(x, simd.splat_f32s(EXP_LEAST));
    simd.select_f32s(is_least, simd.splat_f32s(0.0), simd.mul_f32s(y, power))
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use pulp::WithSimd;

    use super::*;

    fn covers<S: Simd, T: Real>(simd: S, len: usize) {
        // Whole numbers that bf16 has, whose sum does not depend on the order.
        let x: Vec<T> = (0..len).map(|i| T::narrow((i % 17) as f32 - 20.0)).collect();
        let mut copy = vec![T::narrow(1.0); len];
        let mut sums = [simd.splat_f32s(0.0); SUMS];
        each(simd, len, |at, i| {
            let vector = load(simd, &x[at.clone()], 0.0);
            sums[i] = simd.add_f32s(sums[i], vector);
            store(simd, vector, &mut copy[at]);
        });
        assert_eq!(total(simd, sums), x.iter().map(|x| x.widen()).sum::<f32>(), "{len}");
        assert!(copy == x, "{len}");
        assert_eq!(max(simd, &x), x.iter().map(|x| x.widen()).fold(f32::NEG_INFINITY, f32::max), "{len}");
        let padded = load(simd, &x[..len.min(S::F32_LANES)], 7.0);
        let lanes = cast_slice::<S::f32s, f32>(std::slice::from_ref(&padded));
        assert!(lanes.iter().enumerate().all(|(i, lane)| *lane == x.get(i).map_or(7.0, |x| x.widen())), "{len}");
    }

    fn all<S: Simd>(simd: S) {
        for len in 0..150 {
            covers::<S, f32>(simd, len);
            covers::<S, bf16>(simd, len);
        }
        let row = [1.0, f32::NAN, 3.0, f32::NAN];
        assert_eq!(max(simd, &row), 3.0);
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let y = simd.reduce_max_f32s(exp(simd, simd.splat_f32s(x)));
            let want = (x as f64).exp();
            assert!(((y as f64 - want) / want).abs() < 3e-7, "exp({x})");
        }
        for (x, y) in [(-10_000.0, 0.0), (f32::NEG_INFINITY, 0.0), (0.0, 1.0)] {
            assert_eq!(simd.reduce_max_f32s(exp(simd, simd.splat_f32s(x))), y);
        }
        let none = exp(simd, simd.splat_f32s(f32::NAN));
        assert!(cast_slice::<S::f32s, f32>(&[none]).iter().all(|x| x.is_nan()));
    }

    #[test]
    fn rows_are_covered_on_every_instruction_set() {
        struct Best;
        impl WithSimd for Best {
            type Output = ();
            fn with_simd<S: Simd>(self, simd: S) {
                all(simd);
            }
        }
        pulp::Arch::new().dispatch(Best);
        all(pulp::Scalar);
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            all(simd);
        }
    }
}
