//! Products of `bf16` matrices on processors with an instruction for them (AVX-512 BF16): it multiplies pairs of numbers and
//! adds to sums in `f32`, twice as many in a cycle as in `f32`.
//!
//! The columns of `b` are packed, a panel of 64 at a time, so that a vector holds pairs of 16 columns; of `a` a pair of a row is
//! broadcast. A tile of 6 rows and 64 columns of the result stays in registers while the summed dimension passes by.

use half::bf16;

/// A matrix with a summed dimension and another, row-major.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) values: &'a [bf16],
    /// Whether a row is along the summed dimension, and not across it.
    pub(crate) along: bool,
}

/// `out [m, n] = a [m, k] · b [k, n] + bias [n]`, in the order of sums that `k` alone decides. Returns whether it could: if not,
/// because of the processor or an odd `k`, nothing was done.
pub(crate) fn multiply(
    size: (usize, usize, usize),
    a: Operand,
    b: Operand,
    bias: Option<&[bf16]>,
    out: &mut [bf16],
) -> bool {
    let (m, n, k) = size;
    assert!(a.values.len() == m * k && b.values.len() == k * n && out.len() == m * n);
    assert!(bias.is_none_or(|bias| bias.len() == n));
    #[cfg(target_arch = "x86_64")]
    if x86::runs() && (k.is_multiple_of(2) || !a.along) && m > 0 && n > 0 {
        x86::multiply(size, a, b, bias, out);
        return true;
    }
    false
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::cell::Cell;
    use std::ops::Range;

    use half::bf16;
    use rayon::prelude::*;

    use super::Operand;
    use crate::host::Disjoint;
    use crate::real::Real;
    use crate::simd::vectorized;

    /// Numbers of a vector of sums.
    const LANES: usize = 16;
    /// Vectors of a panel's row.
    const VECTORS: usize = 4;
    /// Columns of a panel.
    const PANEL: usize = LANES * VECTORS;
    /// Rows of a tile.
    const ROWS: usize = 6;
    /// Sums that a task keeps: they stay in a core's cache, as does what is packed of `a` and `b`.
    const SUMS: usize = 768 * PANEL;

    pub(super) fn runs() -> bool {
        is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
    }

    /// How the result is cut into tasks, which changes no bit of it.
    struct Tasks {
        /// Rows of a task, and panels.
        rows: usize,
        panels: usize,
        /// Of the summed dimension, what is packed at a time.
        depth: usize,
    }

    impl Tasks {
        fn of((m, n, _): (usize, usize, usize), along: bool) -> Self {
            const LEAST_ROWS: usize = 8 * ROWS;
            let (mut rows, mut panels, depth) = if along { (768, 1, 2048) } else { (192, 4, 512) };
            let enough = 4 * rayon::current_num_threads();
            let count = |rows: usize, panels: usize| m.div_ceil(rows) * n.div_ceil(panels * PANEL);
            while count(rows, panels) < enough && panels > 1 {
                panels /= 2;
            }
            while count(rows, panels) < enough && rows > LEAST_ROWS {
                rows = (rows / 2).next_multiple_of(ROWS);
            }
            Self { rows, panels, depth }
        }
    }

    #[derive(Default)]
    struct Space {
        a: Vec<u32>,
        b: Vec<u32>,
        sums: Vec<f32>,
    }

    thread_local! {
        static SPACE: Cell<Space> = Cell::default();
    }

    pub(super) fn multiply(
        size: (usize, usize, usize),
        a: Operand,
        b: Operand,
        bias: Option<&[bf16]>,
        out: &mut [bf16],
    ) {
        let (m, n, k) = size;
        let Tasks { rows, panels, depth } = Tasks::of(size, a.along);
        let across = n.div_ceil(panels * PANEL);
        let out = Disjoint::new(out);
        (0..m.div_ceil(rows) * across).into_par_iter().for_each(|task| {
            let (row, column) = (task / across * rows, task % across * panels * PANEL);
            let (rows, columns) = (row..m.min(row + rows), column..n.min(column + panels * PANEL));
            let mut space = SPACE.take();
            let width = columns.len().next_multiple_of(PANEL);
            space.sums.resize((rows.len() * width).max(SUMS), 0.0);
            if k == 0 {
                space.sums.fill(0.0);
            }
            for start in (0..k).step_by(depth) {
                // SAFETY: the instructions are there, as `runs` has said.
                unsafe { add(size, a, b, start..k.min(start + depth), &rows, &columns, &mut space) };
            }
            for (i, row) in rows.enumerate() {
                // SAFETY: inside the result; its rows and columns belong to one task.
                let out = unsafe { out.slice_mut(row * n + columns.start, columns.len()) };
                let sums = &space.sums[i * width..][..columns.len()];
                let bias = bias.map(|bias| &bias[columns.clone()]);
                vectorized(
                    #[inline(always)]
                    || match bias {
                        Some(bias) => {
                            for ((out, x), bias) in out.iter_mut().zip(sums).zip(bias) {
                                *out = Real::narrow(x + bias.widen());
                            }
                        }
                        None => out.iter_mut().zip(sums).for_each(|(out, x)| *out = Real::narrow(*x)),
                    },
                );
            }
            SPACE.set(space);
        });
    }

    /// Adds to the sums of these rows and columns what a part of the summed dimension gives; the first part is not added to what
    /// was there.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn add(
        (m, n, k): (usize, usize, usize),
        a: Operand,
        b: Operand,
        depth: Range<usize>,
        rows: &Range<usize>,
        columns: &Range<usize>,
        space: &mut Space,
    ) {
        let pairs = depth.len().div_ceil(2);
        let width = columns.len().next_multiple_of(PANEL);
        // Where a pair of the first row is, and the distances from row to row and from pair to pair, in bytes.
        let (first, row_step, pair_step) = if a.along {
            (a.values[rows.start * k + depth.start..].as_ptr().cast::<u8>(), 2 * k, 4)
        } else {
            let padded = rows.len().next_multiple_of(LANES);
            space.a.resize((pairs * padded).max(space.a.len()), 0);
            pack_across(a.values, m, &depth, rows, padded, &mut space.a);
            (space.a.as_ptr().cast::<u8>(), 4, 4 * padded)
        };
        space.b.resize((pairs * PANEL).max(space.b.len()), 0);
        for start in columns.clone().step_by(PANEL) {
            let panel = start..columns.end.min(start + PANEL);
            match b.along {
                true => pack_along(b.values, k, &depth, &panel, &mut space.b),
                false => pack_across(b.values, n, &depth, &panel, PANEL, &mut space.b),
            }
            let sums = &mut space.sums[start - columns.start..];
            let vectors = panel.len().div_ceil(LANES);
            for row in (0..rows.len()).step_by(ROWS) {
                let tile = Tile {
                    pairs,
                    a: first.wrapping_add(row * row_step),
                    row_step,
                    pair_step,
                    b: space.b.as_ptr(),
                    sums: sums[row * width..].as_mut_ptr(),
                    stride: width,
                    adds: depth.start > 0,
                };
                // SAFETY: `a` and the sums reach to the last row of the tile, `b` was packed for a whole panel.
                unsafe { tile.run(ROWS.min(rows.len() - row), vectors) };
            }
        }
    }

    #[derive(Clone, Copy)]
    struct Tile {
        pairs: usize,
        a: *const u8,
        row_step: usize,
        pair_step: usize,
        b: *const u32,
        sums: *mut f32,
        stride: usize,
        adds: bool,
    }

    impl Tile {
        /// # Safety
        /// There are so many rows and vectors.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn run(self, rows: usize, vectors: usize) {
            macro_rules! by_rows {
                ($V:literal: $($R:literal)*) => {
                    match rows {
                        // SAFETY: the caller's promise.
                        $($R => unsafe { self.of::<$R, $V>() },)*
                        _ => unreachable!("no tile of so many rows"),
                    }
                };
            }
            match vectors {
                1 => by_rows!(1: 1 2 3 4 5 6),
                2 => by_rows!(2: 1 2 3 4 5 6),
                3 => by_rows!(3: 1 2 3 4 5 6),
                _ => by_rows!(4: 1 2 3 4 5 6),
            }
        }

        /// # Safety
        /// There are `R` rows and `V` vectors.
        // Counted loops: what an iterator calls is not always inlined, and then the sums are not kept in registers.
        #[allow(clippy::needless_range_loop)]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn of<const R: usize, const V: usize>(self) {
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            let (mut a, mut b) = (self.a, self.b);
            for _ in 0..self.pairs {
                let mut row = [_mm512_setzero_si512(); V];
                for v in 0..V {
                    // SAFETY: inside the panel.
                    row[v] = unsafe { _mm512_loadu_si512(b.add(v * LANES).cast()) };
                }
                for r in 0..R {
                    // SAFETY: inside `a`.
                    let pair = unsafe { a.add(r * self.row_step).cast::<i32>().read_unaligned() };
                    let pair = _mm512_set1_epi32(pair);
                    for v in 0..V {
                        // SAFETY: types of the same bits.
                        let (x, y) = unsafe { (std::mem::transmute(pair), std::mem::transmute(row[v])) };
                        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, y);
                    }
                }
                // The last step leaves them behind their matrices, where nothing is read.
                a = a.wrapping_add(self.pair_step);
                b = b.wrapping_add(PANEL);
            }
            for r in 0..R {
                for v in 0..V {
                    // SAFETY: inside the sums.
                    unsafe {
                        let place = self.sums.add(r * self.stride + v * LANES);
                        let sum = match self.adds {
                            true => _mm512_add_ps(_mm512_loadu_ps(place), sums[r][v]),
                            false => sums[r][v],
                        };
                        _mm512_storeu_ps(place, sum);
                    }
                }
            }
        }
    }

    /// Of each pair of rows in `depth` the columns, as pairs: `[pairs, padded]`, with zeros for what is not there.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn pack_across(
        values: &[bf16],
        stride: usize,
        depth: &Range<usize>,
        columns: &Range<usize>,
        padded: usize,
        out: &mut [u32],
    ) {
        for (pair, out) in depth.clone().step_by(2).zip(out.chunks_exact_mut(padded)) {
            let row = |i: usize| (i < depth.end).then(|| &values[i * stride..][columns.clone()]);
            let rows = [row(pair), row(pair + 1)];
            for (block, out) in out.chunks_exact_mut(LANES).enumerate() {
                let there = columns.len().saturating_sub(block * LANES).min(LANES);
                let mask = ((1u32 << there) - 1) as u16;
                let [low, high] = rows.map(|row| match row {
                    // SAFETY: the mask ends with the row; what it hides is not read.
                    Some(row) => unsafe {
                        let numbers = row.as_ptr().wrapping_add(block * LANES).cast();
                        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, numbers))
                    },
                    None => _mm512_setzero_si512(),
                });
                // SAFETY: a chunk is a vector.
                unsafe {
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
                };
            }
        }
    }

    /// Of rows that lie along `depth`, the pairs as columns: `[pairs, PANEL]`, with zeros for what is not there.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn pack_along(values: &[bf16], stride: usize, depth: &Range<usize>, rows: &Range<usize>, out: &mut [u32]) {
        for block in 0..VECTORS {
            for pair in (0..depth.len().div_ceil(2)).step_by(LANES) {
                let numbers = (depth.len() - 2 * pair).min(2 * LANES);
                let mask = ((1u64 << numbers) - 1) as u32;
                let mut vectors = [_mm512_setzero_si512(); LANES];
                for (i, vector) in vectors.iter_mut().enumerate() {
                    let row = rows.start + block * LANES + i;
                    if row < rows.end {
                        let from = values[row * stride + depth.start + 2 * pair..][..numbers].as_ptr().cast();
                        // SAFETY: the mask ends with the slice; what it hides is not read.
                        *vector = unsafe { _mm512_maskz_loadu_epi16(mask, from) };
                    }
                }
                let vectors = transposed(vectors);
                for (i, vector) in vectors.iter().enumerate().take(numbers.div_ceil(2)) {
                    let out = &mut out[(pair + i) * PANEL + block * LANES..][..LANES];
                    // SAFETY: the slice is a vector.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), *vector) };
                }
            }
        }
    }

    /// 16 × 16 numbers of 32 bits.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn transposed(r: [__m512i; 16]) -> [__m512i; 16] {
        let mut t = r;
        for i in (0..16).step_by(2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        let mut r = t;
        for i in (0..16).step_by(4) {
            r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for i in (0..16).step_by(8) {
            for j in 0..4 {
                t[i + j] = _mm512_shuffle_i32x4::<0x88>(r[i + j], r[i + j + 4]);
                t[i + j + 4] = _mm512_shuffle_i32x4::<0xdd>(r[i + j], r[i + j + 4]);
            }
        }
        for j in 0..8 {
            r[j] = _mm512_shuffle_i32x4::<0x88>(t[j], t[j + 8]);
            r[j + 8] = _mm512_shuffle_i32x4::<0xdd>(t[j], t[j + 8]);
        }
        r
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole numbers, so that neither the order of sums nor rounding matters.
    fn numbers(len: usize, seed: usize) -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f32(((i * 7 + seed * 5 + i / 13) % 3) as f32 - 1.0)).collect()
    }

    #[test]
    fn products_are_exact() {
        let sizes =
            [(1, 1, 2), (7, 5, 3), (6, 64, 32), (13, 70, 34), (200, 300, 7), (50, 130, 514), (5, 3, 4098), (2, 2, 0)];
        for (m, n, k) in sizes {
            for (a_along, b_along, with_bias) in
                [(true, true, true), (true, false, false), (false, false, true), (false, true, false)]
            {
                let (a, b, bias) = (numbers(m * k, 1), numbers(k * n, 2), numbers(n, 3));
                let bias = with_bias.then_some(&bias[..]);
                let mut out = vec![bf16::NAN; m * n];
                let operands = [(&a, a_along), (&b, b_along)].map(|(values, along)| Operand { values, along });
                if !multiply((m, n, k), operands[0], operands[1], bias, &mut out) {
                    continue;
                }
                for (place, found) in out.iter().enumerate() {
                    let (i, j) = (place / n, place % n);
                    let a = |l: usize| a[if a_along { i * k + l } else { l * m + i }].to_f32();
                    let b = |l: usize| b[if b_along { j * k + l } else { l * n + j }].to_f32();
                    let sum: f32 = (0..k).map(|l| a(l) * b(l)).sum();
                    let wanted = bf16::from_f32(sum + bias.map_or(0.0, |bias| bias[j].to_f32()));
                    assert_eq!(*found, wanted, "{m} {n} {k} {a_along} {b_along}: {i} {j}");
                }
            }
        }
    }
}
