//! A tile of the result, whose sums stay in registers while the summed dimension passes by.

// Counted loops: what an iterator calls is not always inlined, and then its vectors are not kept in registers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use half::bf16;

use super::blocks::Native;
use super::{Finish, Scales, Then};
use crate::activation::{Curve, value as curve_value};

/// Rows of a tile: with [`COLUMNS`], 28 of the 32 vector registers hold sums, two a row of `b`, one a number of `a`.
pub(super) const ROWS: usize = 14;
/// Columns of a tile.
pub(super) const COLUMNS: usize = 2 * LANES;
/// Sums in a vector.
pub(crate) const LANES: usize = 16;

/// Where a tile begins and ends.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a, T: Native> {
    /// Words to sum over.
    pub(super) words: usize,
    /// `[words, rows]`.
    pub(super) a: *const u32,
    /// `[words, columns]`, the columns padded to vectors.
    pub(super) b: *const u32,
    /// What to ask the memory for meanwhile, and how many words to go on with each word of `b`.
    pub(super) ahead: *const u32,
    pub(super) ahead_step: usize,
    /// Sums so far, unless this is the first part of `k`, and to be, unless it is the last.
    pub(super) sums: *mut f32,
    /// The result, after the last part of `k`.
    pub(super) out: *mut T::Out,
    /// Of the whole result.
    pub(super) finish: &'a Finish<'a, T::Out>,
    /// First row and column of the tile in it.
    pub(super) at: (usize, usize),
    /// Numbers from row to row of `sums` and `out`.
    pub(super) stride: usize,
    /// Columns there are.
    pub(super) columns: usize,
    pub(super) is_first: bool,
    pub(super) is_last: bool,
}

/// What differs between the types of factors, in functions that are inlined where the instructions are enabled.
pub(crate) trait Steps: Native {
    /// `sum + a · b`, of words. Sums of bytes are the bits of whole numbers.
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn add_product(sum: __m512, a: __m512i, b: __m512i) -> __m512;
}

/// Vectors of results in memory.
pub(crate) trait Lanes: Copy {
    /// Reads the `lanes` of a vector, widened.
    ///
    /// # Safety
    /// The CPU has the instructions; the lanes are there.
    unsafe fn read(from: *const Self, lanes: __mmask16) -> __m512;

    /// Writes the `lanes` of a vector, rounded.
    ///
    /// # Safety
    /// As for [`Self::read`].
    unsafe fn write(to: *mut Self, lanes: __mmask16, vector: __m512);
}

impl Steps for f32 {
    #[inline(always)]
    unsafe fn add_product(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum) }
    }
}

impl Lanes for f32 {
    #[inline(always)]
    unsafe fn read(from: *const Self, lanes: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(lanes, from) }
    }

    #[inline(always)]
    unsafe fn write(to: *mut Self, lanes: __mmask16, vector: __m512) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_mask_storeu_ps(to, lanes, vector) }
    }
}

impl Steps for bf16 {
    #[inline(always)]
    unsafe fn add_product(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: the caller's promise; both types are 512 bits of plain numbers.
        unsafe {
            let as_pairs = |bits: __m512i| std::mem::transmute::<__m512i, __m512bh>(bits);
            _mm512_dpbf16_ps(sum, as_pairs(a), as_pairs(b))
        }
    }
}

impl Lanes for bf16 {
    #[inline(always)]
    unsafe fn read(from: *const Self, lanes: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn write(to: *mut Self, lanes: __mmask16, vector: __m512) {
        // SAFETY: the caller's promise; both types are 256 bits of plain numbers.
        unsafe {
            let bits = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(vector));
            _mm256_mask_storeu_epi16(to.cast(), lanes, bits)
        }
    }
}

impl Steps for i8 {
    #[inline(always)]
    unsafe fn add_product(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sum), a, b)) }
    }
}

/// The first factor of a tile.
#[derive(Clone, Copy)]
pub(crate) struct Walk {
    /// A word of its first row.
    pub(crate) start: *const u32,
    /// Words from row to row, and from one word of a row to the next.
    pub(crate) row: usize,
    pub(crate) word: usize,
}

/// Adds the products of the `words` words of `R` rows of `a` and of `V` vectors at `b`, the next `b_step` words on, to `sums`. What
/// there is to do beside each of them is done `meanwhile`.
///
/// # Safety
/// The CPU has the instructions, and the words are there.
#[inline(always)]
pub(crate) unsafe fn add_products<T: Steps, const R: usize, const V: usize>(
    words: usize,
    a: Walk,
    (mut b, b_step): (*const u32, usize),
    sums: &mut [[__m512; V]; R],
    mut meanwhile: impl FnMut(),
) {
    let mut word = a.start;
    for _ in 0..words {
        meanwhile();
        // SAFETY: the caller's promise.
        unsafe {
            let mut vectors = [_mm512_setzero_si512(); V];
            for v in 0..V {
                vectors[v] = _mm512_loadu_si512(b.add(v * LANES).cast());
            }
            for r in 0..R {
                let number = _mm512_set1_epi32((*word.add(r * a.row)).cast_signed());
                for v in 0..V {
                    sums[r][v] = T::add_product(sums[r][v], number, vectors[v]);
                }
            }
        }
        // The last step may leave them behind their matrices, where nothing is read.
        (word, b) = (word.wrapping_add(a.word), b.wrapping_add(b_step));
    }
}

/// Calls `$this.tile::<rows, $V>(..)` with a constant for the variable number of rows.
macro_rules! tile_of {
    ($this:expr, $rows:expr, $arguments:tt, $V:literal: $($R:literal)*) => {
        match $rows {
            $($R => $this.tile::<$R, $V> $arguments,)*
            _ => unreachable!("no tile of so many rows"),
        }
    };
}
pub(crate) use tile_of;

macro_rules! sum_up {
    ($T:ty, $features:literal) => {
        impl Place<'_, $T> {
            /// Sums up `rows` rows of the tile.
            ///
            /// # Safety
            /// The CPU has the instructions; all pointers cover what their comments say; no other thread touches this part
            /// of `sums` and `out` meanwhile; `0 < rows ≤ ROWS` and `0 < columns ≤ COLUMNS`.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn sum_up(self, rows: usize) {
                let mut unfinished = Unfinished([MaybeUninit::uninit(); ROWS * COLUMNS]);
                let sums = unfinished.0.as_mut_ptr().cast();
                // SAFETY: the caller's promise.
                unsafe {
                    if self.columns > LANES {
                        tile_of!(self, rows, (sums), 2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
                    } else {
                        tile_of!(self, rows, (sums), 1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
                    }
                    if self.is_last && !self.is_plain() {
                        self.finish(rows, sums);
                    }
                }
            }
        }
    };
}

sum_up!(f32, "avx512f,avx512bw,avx512vl");
sum_up!(bf16, "avx512f,avx512bw,avx512vl,avx512bf16");
sum_up!(i8, "avx512f,avx512bw,avx512vl,avx512vnni");

/// The sums of a tile, before they are finished.
#[repr(align(64))]
struct Unfinished([MaybeUninit<f32>; ROWS * COLUMNS]);

impl<T: Steps<Out: Lanes>> Place<'_, T> {
    /// Whether the sums need nothing but a bias.
    #[inline(always)]
    fn is_plain(&self) -> bool {
        self.finish.scales.is_none() && matches!(self.finish.then, Then::Nothing)
    }

    #[inline(always)]
    fn masks<const V: usize>(&self) -> [__mmask16; V] {
        std::array::from_fn(
            #[inline(always)]
            |v| first_lanes(self.columns.saturating_sub(v * LANES)),
        )
    }

    /// A vector of the bias.
    ///
    /// # Safety
    /// As for `sum_up`.
    #[inline(always)]
    unsafe fn bias(&self, v: usize, mask: __mmask16) -> __m512 {
        match self.finish.bias {
            // SAFETY: the caller's promise.
            Some(bias) => unsafe { T::Out::read(bias.as_ptr().add(self.at.1 + v * LANES), mask) },
            // Which leaves the sum as it is, unlike +0.
            // SAFETY: the caller's promise.
            None => unsafe { _mm512_set1_ps(-0.0) },
        }
    }

    /// Sums that are to be finished go into `unfinished`.
    ///
    /// # Safety
    /// As for `sum_up`, of `R` rows and no more columns than `V` vectors have; `unfinished` has room.
    #[inline(always)]
    unsafe fn tile<const R: usize, const V: usize>(self, unfinished: *mut f32) {
        // SAFETY: the caller's promise, for the rows, the columns and the words there are; `b` is padded to vectors.
        unsafe {
            let masks = self.masks::<V>();
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            if !self.is_first {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = f32::read(self.sums.add(r * self.stride + v * LANES), masks[v]);
                    }
                }
            }
            let a = Walk { start: self.a, row: 1, word: R };
            let mut ahead = self.ahead;
            add_products::<T, R, V>(
                self.words,
                a,
                (self.b, V * LANES),
                &mut sums,
                #[inline(always)]
                || {
                    _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                    ahead = ahead.wrapping_add(self.ahead_step);
                },
            );
            if !self.is_last {
                for (r, sums) in sums.iter().enumerate() {
                    for (v, sum) in sums.iter().enumerate() {
                        f32::write(self.sums.add(r * self.stride + v * LANES), masks[v], *sum);
                    }
                }
            } else if self.is_plain() {
                for (v, mask) in masks.iter().enumerate() {
                    let bias = self.bias(v, *mask);
                    for (r, sums) in sums.iter().enumerate() {
                        let sum = _mm512_add_ps(sums[v], bias);
                        T::Out::write(self.out.add(r * self.stride + v * LANES), *mask, sum);
                    }
                }
            } else {
                for (r, sums) in sums.iter().enumerate() {
                    for (v, sum) in sums.iter().enumerate() {
                        f32::write(unfinished.add(r * COLUMNS + v * LANES), !0, *sum);
                    }
                }
            }
        }
    }

    /// Finishes `rows` rows of `sums [rows, COLUMNS]`.
    ///
    /// # Safety
    /// As for `sum_up`.
    #[inline(always)]
    unsafe fn finish(self, rows: usize, sums: *const f32) {
        // SAFETY: the caller's promise, for the rows and the columns there are.
        unsafe {
            for (v, mask) in self.masks::<{ COLUMNS / LANES }>().into_iter().enumerate().filter(|(_, mask)| *mask != 0)
            {
                let (row, column) = (self.at.0, self.at.1 + v * LANES);
                let bias = self.bias(v, mask);
                for r in 0..rows {
                    let mut sum = f32::read(sums.add(r * COLUMNS + v * LANES), !0);
                    if let Some(Scales { rows, columns, sums }) = self.finish.scales {
                        let (scale, zero) = rows[row + r];
                        let moved = _mm512_maskz_loadu_epi32(mask, sums.as_ptr().add(column));
                        let moved = _mm512_mullo_epi32(moved, _mm512_set1_epi32(zero));
                        let product = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(sum), moved));
                        let scales = f32::read(columns.as_ptr().add(column), mask);
                        sum = _mm512_mul_ps(product, _mm512_mul_ps(_mm512_set1_ps(scale), scales));
                    }
                    let at = r * self.stride + v * LANES;
                    let sum = _mm512_add_ps(sum, bias);
                    let done = match self.finish.then {
                        Then::Nothing => sum,
                        Then::Activate(curve) => activated(curve, sum),
                        Then::Add(more) => {
                            let more = more.as_ptr().add(row * self.stride + column);
                            _mm512_add_ps(T::Out::read(more.add(r * self.stride), mask), sum)
                        }
                    };
                    T::Out::write(self.out.add(at), mask, done);
                }
            }
        }
    }
}

/// The curve at each lane, by a loop that the compiler makes vectors of.
#[inline(always)]
fn activated(curve: Curve, vector: __m512) -> __m512 {
    // SAFETY: both types are 512 bits of plain numbers.
    let mut lanes = unsafe { std::mem::transmute::<__m512, [f32; LANES]>(vector) };
    match curve {
        Curve::Gelu => {
            for x in &mut lanes {
                *x = curve_value(Curve::Gelu, *x);
            }
        }
        Curve::QuickGelu => {
            for x in &mut lanes {
                *x = curve_value(Curve::QuickGelu, *x);
            }
        }
    }
    // SAFETY: as above.
    unsafe { std::mem::transmute::<[f32; LANES], __m512>(lanes) }
}

/// The first `count` lanes of a vector.
#[inline(always)]
pub(crate) fn first_lanes(count: usize) -> __mmask16 {
    if count < LANES { (1 << count) - 1 } else { !0 }
}
