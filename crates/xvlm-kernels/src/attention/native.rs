//! Attention of one head by AVX-512.
//!
//! Factors of products are made of words, as in [`crate::simd::native`]: an `f32`, or two `bf16` that one instruction
//! multiplies and adds up. The rows of a head, whose distances are such that few of them fit the nearest cache together, are copied
//! into a scratch; queries are taken a tile at a time. Their transpose times the keys gives the scores key by key, `[keys,
//! queries]`, so that a softmax sums within the lanes of vectors; the probabilities of two keys make a word for the
//! product with the values, whose rows are interleaved likewise.
//!
//! Accuracy: scores, powers, and sums are `f32`. A `bf16` probability is rounded (2⁻⁹ of it) before it is multiplied by the
//! values, as is the result; denormal `bf16` numbers are taken for 0.

// Counted loops: what an iterator calls is not always inlined, and then its vectors are not kept in registers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;
use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::head::{Bias, Extent, Source, Target, hide_later, lend, padded};
use crate::real::Real;
use crate::simd::native::{LANES, Lanes, Steps, Walk, add_products, first_lanes, numbers, tile_of, transposed};

/// Most scores of a tile, unless that is one vector wide: what the second cache has room for beside the other matrices.
const SCORES: usize = 1 << 16;

/// A float type with instructions for attention.
pub(crate) trait Instructions: Real + Steps + Lanes {
    /// 2ˣ for `x` in −½..½ as a polynomial, the highest power first, within what the type can tell from the truth.
    const EXP2: &[f32];

    /// Two vectors of numbers as words: the first alone if a word is one number.
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn words(numbers: [__m512; 2]) -> __m512i;

    /// Runs a step compiled for the instructions.
    ///
    /// # Safety
    /// The CPU has them, and what the step asks for holds.
    unsafe fn run(step: impl Step);
}

/// A part of the work, in functions that are inlined where the instructions are enabled.
pub(crate) trait Step {
    /// # Safety
    /// As for [`Instructions::run`].
    unsafe fn work(self);
}

impl Instructions for f32 {
    // Within 2e-9.
    const EXP2: &[f32] =
        &[1.534_581_2e-4, 1.339_993e-3, 9.618_489e-3, 5.550_328_6e-2, 2.402_264_6e-1, 6.931_472e-1, 1.0];

    #[inline(always)]
    unsafe fn words([first, _]: [__m512; 2]) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_castps_si512(first) }
    }

    unsafe fn run(step: impl Step) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        unsafe fn compiled(step: impl Step) {
            // SAFETY: the caller's promise.
            unsafe { step.work() }
        }
        // SAFETY: the caller's promise.
        unsafe { compiled(step) }
    }
}

impl Instructions for bf16 {
    // Within 3e-6.
    const EXP2: &[f32] = &[9.570_102e-3, 5.591_786e-2, 2.402_474_4e-1, 6.931_218e-1, 9.999_993e-1];

    #[inline(always)]
    unsafe fn words([first, second]: [__m512; 2]) -> __m512i {
        // SAFETY: the caller's promise; both types are 512 bits of plain numbers.
        unsafe {
            // All of the first, then all of the second.
            let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
            let mut order = [0u16; 2 * LANES];
            for i in 0..LANES {
                order[2 * i] = i as u16;
                order[2 * i + 1] = (LANES + i) as u16;
            }
            _mm512_permutexvar_epi16(_mm512_loadu_si512(order.as_ptr().cast()), halves)
        }
    }

    unsafe fn run(step: impl Step) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn compiled(step: impl Step) {
            // SAFETY: the caller's promise.
            unsafe { step.work() }
        }
        // SAFETY: the caller's promise.
        unsafe { compiled(step) }
    }
}

/// Whether heads of this size are computed here on this CPU: their rows are whole words.
pub(super) fn fits<T: Instructions>(extent: &Extent) -> bool {
    extent.width.is_multiple_of(numbers::<T>()) && extent.keys > 0 && T::is_native()
}

/// Attention of all queries over all keys.
///
/// # Panics
/// If the head does not [fit](fits), or a row or the bias ends too early.
pub(super) fn attend<T: Instructions>(extent: &Extent, [q, k, v]: [Source<T>; 3], bias: Bias, mut out: Target<T>) {
    assert!(fits::<T>(extent));
    let (tile, words, stride) = (extent.tile(SCORES), extent.width / numbers::<T>(), extent.stride());
    let k_stride = words.next_multiple_of(LANES);
    let v_size = extent.keys.div_ceil(numbers::<T>()) * stride;
    let sizes = [extent.keys * k_stride, v_size, words * tile, extent.keys * tile, tile];
    lend(sizes.iter().sum(), |memory| {
        let (k_words, rest) = memory.split_at_mut(sizes[0]);
        let (v_words, rest) = rest.split_at_mut(sizes[1]);
        let (q_words, rest) = rest.split_at_mut(sizes[2]);
        let (scores, rest) = rest.split_at_mut(sizes[3]);
        let scales = &mut rest[..tile];
        let k_words = k_words.as_mut_ptr().cast::<u32>();
        // SAFETY: the instructions are there; each matrix has the size that the steps expect of it.
        unsafe {
            T::run(CopyKeys { k, keys: extent.keys, words, stride: k_stride, out: k_words });
            T::run(PackValues { v, keys: extent.keys, stride, out: v_words.as_mut_ptr().cast() });
            for queries in extent.tiles(SCORES) {
                let (tile, seen) = (padded(&queries), extent.seen(&queries));
                let q_words = q_words.as_mut_ptr().cast::<u32>();
                T::run(PackQueries { q, queries: queries.clone(), words, tile, out: q_words });
                let start = scores.as_mut_ptr();
                let (scale, first_query) = (extent.scale(), queries.start);
                let (k, q, of) = (k_words, q_words, PhantomData::<T>);
                T::run(Scores { k, k_stride, seen, q, words, tile, scale, bias, first_query, scores: start, of });
                if let Some(past) = extent.causal {
                    hide_later(&mut scores[..seen * tile], &queries, past);
                }
                let start = scores.as_mut_ptr();
                T::run(Softmax::<T> { scores: start, seen, tile, scales: scales.as_mut_ptr(), of });
                let v_words = v_words.as_ptr().cast();
                T::run(Mix { p: start.cast(), seen, tile, v: v_words, stride, scales, queries, out: &mut out });
            }
        }
    });
}

/// Asks the memory for a line of it. Whoever reads a row of a head asks for that of the head beside it, which mostly comes next and whose
/// rows lie too far apart for the CPU to see them coming.
#[inline(always)]
fn fetch<T>(line: *const T) {
    // SAFETY: an instruction of every x86-64, which no address makes fail.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
}

/// Keys as they are, `[keys, stride]` words, of which `words` are used.
struct CopyKeys<'a, T> {
    k: Source<'a, T>,
    keys: usize,
    words: usize,
    stride: usize,
    out: *mut u32,
}

impl<T: Instructions> Step for CopyKeys<'_, T> {
    #[inline(always)]
    unsafe fn work(self) {
        let Self { k, keys, words, stride, out } = self;
        for key in 0..keys {
            let row = k.row(key).as_ptr().cast::<i32>();
            for word in (0..words).step_by(LANES) {
                // SAFETY: the lanes are inside the row, and `out` is as large as it says.
                unsafe {
                    fetch(row.wrapping_add(words + word));
                    let numbers = _mm512_maskz_loadu_epi32(first_lanes(words - word), row.add(word));
                    _mm512_storeu_si512(out.add(key * stride + word).cast(), numbers);
                }
            }
        }
    }
}

/// Queries as `[words, tile]`, with zeros behind the last.
struct PackQueries<'a, T> {
    q: Source<'a, T>,
    queries: Range<usize>,
    words: usize,
    tile: usize,
    out: *mut u32,
}

impl<T: Instructions> Step for PackQueries<'_, T> {
    #[inline(always)]
    unsafe fn work(self) {
        let Self { q, queries, words, tile, out } = self;
        for group in (0..tile).step_by(LANES) {
            for block in (0..words).step_by(LANES) {
                // SAFETY: a row has so many words, and `out` is as large as it says.
                unsafe {
                    let mask = first_lanes(words - block);
                    let mut rows = [_mm512_setzero_si512(); LANES];
                    for i in 0..LANES.min(queries.len() - group) {
                        let row = q.row(queries.start + group + i).as_ptr().cast::<i32>();
                        fetch(row.wrapping_add(words + block));
                        rows[i] = _mm512_maskz_loadu_epi32(mask, row.add(block));
                    }
                    let columns = transposed(rows);
                    for i in 0..LANES.min(words - block) {
                        _mm512_storeu_si512(out.add((block + i) * tile + group).cast(), columns[i]);
                    }
                }
            }
        }
    }
}

/// Values as words of keys that follow each other, `[words, stride]`, with zeros behind the last number and the last key.
struct PackValues<'a, T> {
    v: Source<'a, T>,
    keys: usize,
    stride: usize,
    out: *mut u32,
}

impl<T: Instructions> Step for PackValues<'_, T> {
    #[inline(always)]
    unsafe fn work(self) {
        let Self { v, keys, stride, out } = self;
        let width = v.span.width;
        for word in 0..keys.div_ceil(numbers::<T>()) {
            let key = word * numbers::<T>();
            let first = v.row(key).as_ptr();
            let second = (numbers::<T>() == 2 && key + 1 < keys).then(|| v.row(key + 1).as_ptr());
            for column in (0..width).step_by(LANES) {
                let lanes = first_lanes(width - column);
                // SAFETY: the lanes are inside the rows, and `out` is as large as it says.
                unsafe {
                    fetch(first.wrapping_add(width + column));
                    if let Some(second) = second {
                        fetch(second.wrapping_add(width + column));
                    }
                    let read = |row: *const T| {
                        if numbers::<T>() == 1 {
                            _mm512_maskz_loadu_epi32(lanes, row.add(column).cast())
                        } else {
                            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row.add(column).cast()))
                        }
                    };
                    let mut words = read(first);
                    if let Some(second) = second {
                        words = _mm512_or_si512(words, _mm512_slli_epi32::<16>(read(second)));
                    }
                    _mm512_storeu_si512(out.add(word * stride + column).cast(), words);
                }
            }
        }
    }
}

/// Calls `$this.tile` for rows `0..$count` in tiles of about the same size, as high as sums of `$vectors` vectors fit the
/// registers, beside those vectors of a row and a number.
macro_rules! by_tiles {
    ($this:expr, $vectors:expr, $count:expr, $first:ident => $arguments:tt) => {
        let most = match $vectors {
            1 | 2 => 14,
            3 => 9,
            _ => 6,
        };
        let tiles = $count.div_ceil(most);
        let mut $first = 0;
        for i in 0..tiles {
            let rows = $count / tiles + usize::from(i < $count % tiles);
            match $vectors {
                1 => tile_of!($this, rows, $arguments, 1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
                2 => tile_of!($this, rows, $arguments, 2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
                3 => tile_of!($this, rows, $arguments, 3: 1 2 3 4 5 6 7 8 9),
                _ => tile_of!($this, rows, $arguments, 4: 1 2 3 4 5 6),
            }
            $first += rows;
        }
    };
}

/// log₂e times the scores of the keys seen: `[seen, tile]`.
struct Scores<'a, T> {
    /// `[keys, k_stride]`
    k: *const u32,
    k_stride: usize,
    seen: usize,
    /// `[words, tile]`
    q: *const u32,
    words: usize,
    /// One to four vectors.
    tile: usize,
    scale: f32,
    bias: Bias<'a>,
    first_query: usize,
    scores: *mut f32,
    of: PhantomData<T>,
}

impl<T: Instructions> Step for Scores<'_, T> {
    #[inline(always)]
    unsafe fn work(self) {
        // SAFETY: the caller's promise.
        unsafe {
            by_tiles!(self, self.tile / LANES, self.seen, key => (key));
        }
    }
}

impl<T: Instructions> Scores<'_, T> {
    /// Of `R` keys, with `V` vectors of queries.
    ///
    /// # Safety
    /// The keys are there, and a tile is `V` vectors.
    #[inline(always)]
    unsafe fn tile<const R: usize, const V: usize>(&self, first_key: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            let k = Walk { start: self.k.add(first_key * self.k_stride), row: self.k_stride, word: 1 };
            add_products::<T, R, V>(self.words, k, (self.q, V * LANES), &mut sums, || ());
            let (scale, log2_e) = (_mm512_set1_ps(self.scale * LOG2_E), _mm512_set1_ps(LOG2_E));
            for r in 0..R {
                let key = first_key + r;
                let mut plus = [_mm512_setzero_ps(); V];
                match self.bias {
                    Bias::Keys(bias) => plus = [_mm512_set1_ps(bias[key]); V],
                    Bias::Pairs { table, regions } => {
                        let row = &table.values[key * table.stride + self.first_query..][..V * LANES];
                        for v in 0..V {
                            plus[v] = _mm512_loadu_ps(row.as_ptr().add(v * LANES));
                        }
                        if let Some((region_of, apart)) = regions {
                            let start = usize::from(region_of[key]) * apart.stride + self.first_query;
                            let row = &apart.values[start..][..V * LANES];
                            for v in 0..V {
                                plus[v] = _mm512_add_ps(plus[v], _mm512_loadu_ps(row.as_ptr().add(v * LANES)));
                            }
                        }
                    }
                }
                for v in 0..V {
                    let score = _mm512_fmadd_ps(sums[r][v], scale, _mm512_mul_ps(plus[v], log2_e));
                    _mm512_storeu_ps(self.scores.add(key * self.tile + v * LANES), score);
                }
            }
        }
    }
}

/// `[seen, tile]` scores, times log₂e, become words of 2^(score − largest of its column), `[seen / numbers, tile]`; the softmax
/// is that times `scales`, the reciprocals of the columns' sums.
struct Softmax<T> {
    scores: *mut f32,
    seen: usize,
    tile: usize,
    scales: *mut f32,
    of: PhantomData<T>,
}

impl<T: Instructions> Step for Softmax<T> {
    #[inline(always)]
    unsafe fn work(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.tile / LANES {
                1 => self.columns::<1>(),
                2 => self.columns::<2>(),
                3 => self.columns::<3>(),
                _ => self.columns::<4>(),
            }
        }
    }
}

impl<T: Instructions> Softmax<T> {
    /// # Safety
    /// A tile is `V` vectors.
    #[inline(always)]
    unsafe fn columns<const V: usize>(self) {
        // SAFETY: the caller's promise. A row of words is written after the rows it is made of are read.
        unsafe {
            let mut top = [_mm512_set1_ps(f32::NEG_INFINITY); V];
            for key in 0..self.seen {
                for v in 0..V {
                    let score = _mm512_loadu_ps(self.scores.add((key * V + v) * LANES));
                    // The second of two if there is one that is no number: that stays for the sum.
                    top[v] = _mm512_max_ps(score, top[v]);
                }
            }
            let mut sum = [_mm512_setzero_ps(); V];
            for word in 0..self.seen.div_ceil(numbers::<T>()) {
                let key = word * numbers::<T>();
                let is_pair = numbers::<T>() == 2 && key + 1 < self.seen;
                for v in 0..V {
                    let from = self.scores.add((key * V + v) * LANES);
                    let first = exp2::<T>(_mm512_sub_ps(_mm512_loadu_ps(from), top[v]));
                    let mut pair = [first, _mm512_setzero_ps()];
                    sum[v] = _mm512_add_ps(sum[v], first);
                    if is_pair {
                        pair[1] = exp2::<T>(_mm512_sub_ps(_mm512_loadu_ps(from.add(V * LANES)), top[v]));
                        sum[v] = _mm512_add_ps(sum[v], pair[1]);
                    }
                    _mm512_storeu_si512(self.scores.add((word * V + v) * LANES).cast(), T::words(pair));
                }
            }
            for v in 0..V {
                _mm512_storeu_ps(self.scales.add(v * LANES), _mm512_div_ps(_mm512_set1_ps(1.0), sum[v]));
            }
        }
    }
}

/// 2ˣ for `x` up to 0; 0 below −126.
#[inline(always)]
unsafe fn exp2<T: Instructions>(x: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let r = _mm512_sub_ps(x, n);
        let mut p = _mm512_set1_ps(T::EXP2[0]);
        for i in 1..T::EXP2.len() {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(T::EXP2[i]));
        }
        let there = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
        _mm512_maskz_scalef_ps(there, p, n)
    }
}

/// Each query's sum of the values, weighed.
struct Mix<'a, 'b, 'c, T> {
    /// `[seen / numbers, tile]`
    p: *const u32,
    seen: usize,
    tile: usize,
    /// `[keys / numbers, stride]`
    v: *const u32,
    stride: usize,
    scales: &'a [f32],
    queries: Range<usize>,
    out: &'b mut Target<'c, T>,
}

impl<T: Instructions> Step for Mix<'_, '_, '_, T> {
    #[inline(always)]
    unsafe fn work(mut self) {
        for column in (0..self.stride).step_by(4 * LANES) {
            // SAFETY: the caller's promise.
            unsafe {
                by_tiles!(self, ((self.stride - column) / LANES).min(4), self.queries.len(), row => (row, column));
            }
        }
    }
}

impl<T: Instructions> Mix<'_, '_, '_, T> {
    /// Of `R` queries, `V` vectors.
    ///
    /// # Safety
    /// They are there.
    #[inline(always)]
    unsafe fn tile<const R: usize, const V: usize>(&mut self, first: usize, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            let p = Walk { start: self.p.add(first), row: 1, word: self.tile };
            let words = self.seen.div_ceil(numbers::<T>());
            add_products::<T, R, V>(words, p, (self.v.add(column), self.stride), &mut sums, || ());
            for r in 0..R {
                let scale = _mm512_set1_ps(self.scales[first + r]);
                let out = &mut self.out.row(self.queries.start + first + r)[column..];
                for v in 0..V {
                    let lanes = first_lanes(out.len().saturating_sub(v * LANES));
                    let to = out.as_mut_ptr().wrapping_add(v * LANES);
                    T::write(to, lanes, _mm512_mul_ps(sums[r][v], scale));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::Arch;

    use super::super::head::{Span, with_scratch};
    use super::*;
    use crate::host::Disjoint;
    use crate::simd::product::Rows;

    /// Numbers in −1..1 that look random.
    fn numbers<T: Real>(len: usize, seed: u32) -> Vec<T> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            T::narrow((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        (0..len).map(|_| next()).collect()
    }

    /// Compares both ways, of which the portable one knows no words.
    fn agrees<T: Instructions>(extent: &Extent, bias: Bias, tolerance: f32) {
        if !fits::<T>(extent) {
            return;
        }
        let Extent { queries, keys, width, .. } = *extent;
        let stride = width + 6;
        let all: [Vec<T>; 3] = [queries, keys, keys].map(|rows| numbers(rows * stride, 1 + rows as u32));
        let span = Span { start: 4, stride, width, order: None };
        let [q, k, v] = all.each_ref().map(|values| Source { values, span });
        let run = |work: &dyn Fn(Target<T>)| {
            let mut out = vec![T::narrow(7.0); queries * stride];
            // SAFETY: the rows lie inside `out`, which nothing else touches.
            work(unsafe { Target::new(Disjoint::new(&mut out), span) });
            out
        };
        let native = run(&|out| attend(extent, [q, k, v], bias, out));
        let portable = run(&|out| {
            with_scratch(extent, false, |scratch| {
                scratch.look_at(Arch::new(), k, v);
                scratch.forward(Arch::new(), q, bias, None, out);
            });
        });
        for (i, (a, b)) in native.iter().zip(&portable).enumerate() {
            assert!(
                (a.widen() - b.widen()).abs() < tolerance,
                "{i} of {queries}x{keys}x{width}: {} {}",
                a.widen(),
                b.widen()
            );
        }
    }

    #[test]
    fn it_agrees_with_the_portable_way() {
        for (queries, keys, width) in
            [(49usize, 49, 32), (1, 3, 2), (40, 145, 64), (17, 1, 6), (100, 77, 130), (70, 1300, 16)]
        {
            let by_key: Vec<f32> =
                (0..keys).map(|key| if key % 5 == 1 { -10_000.0 } else { key as f32 / 99.0 }).collect();
            let stride = queries.next_multiple_of(LANES);
            let pairs: Vec<f32> = numbers(keys * stride, 5);
            let table = Rows { values: &pairs, stride };
            let region_of: Vec<u8> = (0..keys).map(|key| (key % 3) as u8).collect();
            let apart: Vec<f32> = (0..3 * stride).map(|i| if i % 2 == 0 { 0.0 } else { -100.0 }).collect();
            let regions = Some((&*region_of, Rows { values: &apart, stride }));
            for causal in [None, Some(0), Some(2)] {
                let extent = Extent { queries, keys, width, causal };
                for bias in [Bias::Keys(&by_key), Bias::Pairs { table, regions: None }, Bias::Pairs { table, regions }]
                {
                    agrees::<f32>(&extent, bias, 1e-5);
                    agrees::<bf16>(&extent, bias, 2e-2);
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let extent = Extent { queries: 2, keys: 3, width: 2, causal: None };
        if !fits::<f32>(&extent) {
            return;
        }
        let values = [1.0, 2.0, 3.0, f32::NAN, 5.0, 6.0];
        let span = Span { start: 0, stride: 2, width: 2, order: None };
        let (k, rest) = (Source { values: &values, span }, Source { values: &[0.5; 6], span });
        let mut out = [0f32; 4];
        // SAFETY: the rows lie inside `out`, which nothing else touches.
        attend(&extent, [rest, k, rest], Bias::Keys(&[0.0; 3]), unsafe { Target::new(Disjoint::new(&mut out), span) });
        assert!(out.iter().all(|x| x.is_nan()), "{out:?}");
    }
}
