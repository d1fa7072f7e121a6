//! Plain loops compiled for the instruction set found at run time, and the elementary functions they need.

use gemm::Parallelism;

use crate::real::Real;

pub(crate) mod native;
pub(crate) mod product;
pub(crate) mod row;
pub(crate) mod transpose;

/// Runs `work` compiled for the best instruction set of this CPU. Whatever `work` calls must be `#[inline(always)]` to
/// profit.
#[inline(always)]
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Sums that are taken side by side: four vectors of sixteen, so that one addition need not wait for the last. In one loop
/// over all of them, which the compiler makes vectors of; loops over sixteen it unrolls into single numbers.
const LANES: usize = 64;

/// Folds pairs of numbers into one by `step`, then the lanes by `join`, in an order that the length alone decides.
#[inline(always)]
pub(crate) fn fold<A: Copy, B: Copy>(
    a: &[A],
    b: &[B],
    start: f32,
    step: impl Fn(f32, A, B) -> f32,
    join: impl Fn(f32, f32) -> f32,
) -> f32 {
    let b = &b[..a.len()];
    let mut lanes = [start; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in blocks.iter().zip(b_blocks) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane = step(*lane, a, b);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(rest).zip(b_rest) {
        *lane = step(*lane, a, b);
    }
    halve::<32>(&mut lanes, &join);
    halve::<16>(&mut lanes, &join);
    halve::<8>(&mut lanes, &join);
    halve::<4>(&mut lanes, &join);
    join(join(lanes[0], lanes[2]), join(lanes[1], lanes[3]))
}

/// Joins the second `HALF` lanes to the first.
#[inline(always)]
fn halve<const HALF: usize>(lanes: &mut [f32; LANES], join: &impl Fn(f32, f32) -> f32) {
    let (low, high) = lanes.split_at_mut(HALF);
    for (low, high) in low.iter_mut().zip(high) {
        *low = join(*low, *high);
    }
}

#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    fold(x, x, 0.0, |total, x, _| total + x, |a, b| a + b)
}

/// Σ x², widened.
#[inline(always)]
pub(crate) fn squares<T: Real>(x: &[T]) -> f32 {
    fold(x, x, 0.0, |total, x: T, _| x.widen().mul_add(x.widen(), total), |a, b| a + b)
}

#[inline(always)]
pub(crate) fn add_assign(x: &mut [f32], y: &[f32]) {
    let len = x.len().min(y.len());
    let (x, y) = (&mut x[..len], &y[..len]);
    for i in 0..len {
        x[i] += y[i];
    }
}

/// `x += y`, widening `y`.
#[inline(always)]
pub(crate) fn add_widened<T: Real>(x: &mut [f32], y: &[T]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y.widen();
    }
}

#[inline(always)]
pub(crate) fn max<T: Real>(x: &[T]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    fold(x, x, f32::NEG_INFINITY, |top, x, _| larger(top, x.widen()), larger)
}

/// 1.5 · 2²³: adding and subtracting it rounds to an integer.
const ROUND: f32 = 12_582_912.0;
/// ln 2 split in two, so that a small integer times the first is exact (Cody and Waite).
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// (eˣ − 1 − x) / x² near 0, the highest power first.
const EXP: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5];
/// Below it eˣ is taken for 0.
const EXP_LEAST: f32 = -87.3;

/// eˣ with a relative error below 2e-7; 0 far below −87, finite above 88.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(EXP_LEAST, 88.3);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2[1], n.mul_add(-LN_2[0], clamped));
    let [highest, rest @ ..] = EXP;
    let p = rest.iter().fold(
        highest,
        #[inline(always)]
        |p, c| p.mul_add(r, *c),
    );
    let y = p.mul_add(r * r, r) + 1.0;
    // The low bits of `shifted` are n, those above them leave the number to the left.
    let scaled = y * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < EXP_LEAST { 0.0 } else { scaled }
}

/// The error function by a rational approximation on [−4, 4], within 3e-7; exactly ±1 where it is within 1e-7 of it.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let sign = 1f32.copysign(x);
    let is_flat = x.abs() > 3.8;
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    let p = -2.726_142_3e-10_f32;
    let p = p.mul_add(s, 2.770_681_4e-8);
    let p = p.mul_add(s, -2.101_024e-6);
    let p = p.mul_add(s, -5.692_506_4e-5);
    let p = p.mul_add(s, -7.349_906_3e-4);
    let p = p.mul_add(s, -2.954_6e-3);
    let p = p.mul_add(s, -1.609_603_3e-2);
    let q = -1.456_607_2e-5_f32;
    let q = q.mul_add(s, -2.133_740_5e-4);
    let q = q.mul_add(s, -1.682_827e-3);
    let q = q.mul_add(s, -7.373_329_2e-3);
    let q = q.mul_add(s, -1.426_473_9e-2);
    if is_flat { sign } else { x * p / q }
}

/// Softmax of one row in place.
#[inline(always)]
pub(crate) fn softmax_row(row: &mut [f32]) {
    let top = max(row);
    for x in row.iter_mut() {
        *x = exp(*x - top);
    }
    let scale = 1.0 / sum(row);
    for x in row.iter_mut() {
        *x *= scale;
    }
}

/// A matrix in memory: start and the distances between rows and between columns.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) start: *const f32,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl Matrix {
    /// Row-major with `stride` numbers from row to row.
    pub(crate) fn rows(values: &[f32], stride: usize) -> Self {
        Self { start: values.as_ptr(), rows: stride, columns: 1 }
    }

    pub(crate) fn transposed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, ..self }
    }
}

/// `out[m, n] = beta · out + alpha · a[m, k] · b[k, n]`, `out` row-major with `stride` numbers a row.
///
/// # Safety
/// `a` and `b` cover the stated sizes; `out` covers `(m − 1) · stride + n` numbers and overlaps neither.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn multiply(
    (m, n, k): (usize, usize, usize),
    out: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: Matrix,
    b: Matrix,
    alpha: f32,
    parallelism: Parallelism,
) {
    if m == 0 || n == 0 {
        return;
    }
    debug_assert!(out.len() >= (m - 1) * stride + n);
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            accumulate,
            a.start,
            a.columns as isize,
            a.rows as isize,
            b.start,
            b.columns as isize,
            b.rows as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        )
    }
}

/// All threads of the current rayon pool.
pub(crate) fn all_threads() -> Parallelism {
    Parallelism::Rayon(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// erf by its Taylor series in f64, good on the range tested.
    fn erf_series(x: f64) -> f64 {
        let (mut term, mut total) = (x, x);
        for n in 1..200 {
            term *= -x * x / n as f64;
            total += term / (2 * n + 1) as f64;
        }
        total * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn exp_is_accurate() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let want = (x as f64).exp();
            assert!(((exp(x) as f64 - want) / want).abs() < 3e-7, "exp({x})");
        }
        assert_eq!(exp(-10_000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn erf_is_accurate() {
        for i in -400..=400 {
            let x = i as f32 / 100.0;
            assert!((erf(x) as f64 - erf_series(x as f64)).abs() < 4e-7, "erf({x})");
        }
        assert!((erf(30.0) - 1.0).abs() < 4e-7);
    }

    #[test]
    fn sums_cover_the_tail() {
        for len in 0..40usize {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(sum(&x), (len * len.saturating_sub(1) / 2) as f32);
            if len > 0 {
                assert_eq!(max(&x), (len - 1) as f32);
            }
        }
    }
}
