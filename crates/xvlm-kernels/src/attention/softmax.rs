//! The softmax of scores stored key by key, `[keys, queries]`: every lane of a vector is a query of its own, so that nothing
//! is ever summed across the lanes.

// Counted loops: what an iterator calls is not always inlined, and then its vectors are not kept in registers.
#![allow(clippy::needless_range_loop)]

use pulp::{Simd, WithSimd};

/// `scores` become e^(score − largest of its column); the softmax is that times `scales`, the reciprocals of the columns'
/// sums.
pub(crate) struct Softmax<'a> {
    pub(crate) scores: &'a mut [f32],
    pub(crate) scales: &'a mut [f32],
}

/// The softmax's gradient: from what [`Softmax`] leaves and the gradients of the probabilities to the probabilities and the
/// gradients of the scores.
pub(crate) struct SoftmaxBackward<'a> {
    pub(crate) weights: &'a mut [f32],
    pub(crate) scales: &'a [f32],
    pub(crate) gradients: &'a mut [f32],
    /// What the gradients of the scores are added to, with the distance of its rows, a multiple of
    /// [`crate::simd::product::LANES`].
    pub(crate) sums: Option<(&'a mut [f32], usize)>,
}

/// The vectors of `$first..$first + V` for the largest `V` up to four, then the next.
macro_rules! by_vectors {
    ($count:expr, $first:ident, $V:ident => $body:expr) => {
        let mut $first = 0;
        while $first < $count {
            $first += match $count - $first {
                1 => by_vectors!(1, $V => $body),
                2 => by_vectors!(2, $V => $body),
                3 => by_vectors!(3, $V => $body),
                _ => by_vectors!(4, $V => $body),
            };
        }
    };
    ($number:literal, $V:ident => $body:expr) => {{
        const $V: usize = $number;
        $body;
        $V
    }};
}

/// `V` vectors of a row.
#[inline(always)]
fn part<T, const V: usize>(row: &mut [T], first: usize) -> &mut [T; V] {
    (&mut row[first..first + V]).try_into().expect("as many as asked for")
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let scores = S::as_mut_simd_f32s(self.scores).0;
        let scales = S::as_mut_simd_f32s(self.scales).0;
        let count = scales.len();
        by_vectors!(count, first, V => softmax::<S, V>(simd, scores, scales, first));
    }
}

#[inline(always)]
fn softmax<S: Simd, const V: usize>(simd: S, scores: &mut [S::f32s], scales: &mut [S::f32s], first: usize) {
    let width = scales.len();
    let mut top = [simd.splat_f32s(f32::NEG_INFINITY); V];
    for row in scores.chunks_exact_mut(width) {
        let row = part::<_, V>(row, first);
        for v in 0..V {
            top[v] = simd.max_f32s(top[v], row[v]);
        }
    }
    let mut sum = [simd.splat_f32s(0.0); V];
    for row in scores.chunks_exact_mut(width) {
        let row = part::<_, V>(row, first);
        for v in 0..V {
            row[v] = exp(simd, simd.sub_f32s(row[v], top[v]));
            sum[v] = simd.add_f32s(sum[v], row[v]);
        }
    }
    let scales = part::<_, V>(scales, first);
    for v in 0..V {
        scales[v] = simd.div_f32s(simd.splat_f32s(1.0), sum[v]);
    }
}

impl WithSimd for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let weights = S::as_mut_simd_f32s(self.weights).0;
        let gradients = S::as_mut_simd_f32s(self.gradients).0;
        let scales = S::as_simd_f32s(self.scales).0;
        let count = scales.len();
        by_vectors!(count, first, V => softmax_backward::<S, V>(simd, weights, scales, gradients, first));
        if let Some((sums, stride)) = self.sums {
            let (sums, stride) = (S::as_mut_simd_f32s(sums).0, stride / S::F32_LANES);
            by_vectors!(count, first, V => add::<S, V>(simd, sums, stride, gradients, count, first));
        }
    }
}

#[inline(always)]
fn softmax_backward<S: Simd, const V: usize>(
    simd: S,
    weights: &mut [S::f32s],
    scales: &[S::f32s],
    gradients: &mut [S::f32s],
    first: usize,
) {
    let width = scales.len();
    let mut mean = [simd.splat_f32s(0.0); V];
    for (p, g) in weights.chunks_exact_mut(width).zip(gradients.chunks_exact_mut(width)) {
        let (p, g) = (part::<_, V>(p, first), part::<_, V>(g, first));
        for v in 0..V {
            mean[v] = simd.mul_add_e_f32s(p[v], g[v], mean[v]);
        }
    }
    let mut scale = [simd.splat_f32s(0.0); V];
    for v in 0..V {
        scale[v] = scales[first + v];
        mean[v] = simd.mul_f32s(mean[v], scale[v]);
    }
    for (p, g) in weights.chunks_exact_mut(width).zip(gradients.chunks_exact_mut(width)) {
        let (p, g) = (part::<_, V>(p, first), part::<_, V>(g, first));
        for v in 0..V {
            p[v] = simd.mul_f32s(p[v], scale[v]);
            g[v] = simd.mul_f32s(p[v], simd.sub_f32s(g[v], mean[v]));
        }
    }
}

#[inline(always)]
fn add<S: Simd, const V: usize>(
    simd: S,
    sums: &mut [S::f32s],
    stride: usize,
    x: &mut [S::f32s],
    width: usize,
    first: usize,
) {
    for (sums, x) in sums.chunks_mut(stride).zip(x.chunks_exact_mut(width)) {
        let (sums, x) = (part::<_, V>(sums, first), part::<_, V>(x, first));
        for v in 0..V {
            sums[v] = simd.add_f32s(sums[v], x[v]);
        }
    }
}

/// eˣ for `x` up to 0, as [`crate::simd::exp`].
#[inline(always)]
fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding and subtracting it rounds to an integer
    const LOWEST: f32 = -87.3;
    let splat = |x| simd.splat_f32s(x);
    let fma = |a, b, c| simd.mul_add_e_f32s(a, b, c);
    let vanishes = simd.less_than_f32s(x, splat(LOWEST));
    let clamped = simd.select_f32s(vanishes, splat(LOWEST), x);
    let shifted = fma(clamped, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = simd.sub_f32s(shifted, splat(ROUND));
    let r = fma(n, splat(2.121_944_4e-4), fma(n, splat(-0.693_359_4), clamped));
    let p = fma(splat(1.987_569_1e-4), r, splat(1.398_199_9e-3));
    let p = fma(p, r, splat(8.333_452e-3));
    let p = fma(p, r, splat(4.166_579_6e-2));
    let p = fma(p, r, splat(1.666_666_6e-1));
    let p = fma(p, r, splat(0.5));
    let y = simd.add_f32s(fma(p, simd.mul_f32s(r, r), r), splat(1.0));
    // The lowest bits of `shifted` are n; shifted to the exponent they make 2ⁿ.
    let biased = simd.add_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(127));
    let power = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(biased, simd.splat_u32s(23)));
    simd.select_f32s(vanishes, splat(0.0), simd.mul_f32s(y, power))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn softmax_of_columns<S: Simd>(simd: S) {
        for (keys, width) in [(1, 16), (5, 32), (49, 48), (7, 64), (3, 80)] {
            let number = |i: usize| match (i * 37 + 11) % 101 {
                0 => f32::NEG_INFINITY,
                1 => -10_000.0,
                x => x as f32 * 0.17 - 9.0,
            };
            let scores: Vec<f32> = (0..keys * width).map(|i| if i < width { 0.3 } else { number(i) }).collect();
            let gradients: Vec<f32> = (0..keys * width).map(|i| (i % 13) as f32 - 6.0).collect();
            let (mut weights, mut scales) = (scores.clone(), vec![0f32; width]);
            simd.vectorize(Softmax { scores: &mut weights, scales: &mut scales });
            let mut slopes = gradients.clone();
            let (stride, mut sums) = (width + 16, vec![1f32; keys * (width + 16)]);
            simd.vectorize(SoftmaxBackward {
                weights: &mut weights,
                scales: &scales,
                gradients: &mut slopes,
                sums: Some((&mut sums[16..], stride)),
            });
            for (sums, slopes) in sums.chunks_exact(stride).zip(slopes.chunks_exact(width)) {
                assert!(sums[..16].iter().all(|&x| x == 1.0));
                assert!(sums[16..].iter().zip(slopes).all(|(sum, slope)| *sum == 1.0 + slope));
            }
            for query in 0..width {
                let column = |x: &[f32]| (0..keys).map(|key| f64::from(x[key * width + query])).collect::<Vec<_>>();
                let exponentials: Vec<f64> = column(&scores).iter().map(|x| x.exp()).collect();
                let total: f64 = exponentials.iter().sum();
                let p: Vec<f64> = exponentials.iter().map(|e| e / total).collect();
                let g = column(&gradients);
                let mean: f64 = p.iter().zip(&g).map(|(p, g)| p * g).sum();
                for (key, (found, slope)) in column(&weights).iter().zip(column(&slopes)).enumerate() {
                    assert!((found - p[key]).abs() < 1e-6 * (p[key] + 1e-3), "{keys} {width}: {found} {}", p[key]);
                    assert!((slope - p[key] * (g[key] - mean)).abs() < 1e-5 * (p[key] + 1e-3));
                    assert!(*found == 0.0 || scores[key * width + query] > -1000.0, "hidden is hidden");
                }
            }
        }
    }

    #[test]
    fn it_is_the_softmax_on_every_instruction_set() {
        struct Best;
        impl WithSimd for Best {
            type Output = ();
            fn with_simd<S: Simd>(self, simd: S) {
                softmax_of_columns(simd);
            }
        }
        pulp::Arch::new().dispatch(Best);
        softmax_of_columns(pulp::Scalar);
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            softmax_of_columns(simd);
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let (mut scores, mut scales) = ([f32::NAN; 16], [0f32; 16]);
        pulp::Arch::new().dispatch(Softmax { scores: &mut scores, scales: &mut scales });
        assert!(scores.iter().all(|x| x.is_nan()) && scales.iter().all(|x| x.is_nan()));
    }
}
