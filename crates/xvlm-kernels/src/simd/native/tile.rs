//! A tile of the result, whose sums stay in registers while the summed dimension passes by.

use std::arch::x86_64::*;

use half::bf16;

/// Rows of a tile: with [`COLUMNS`], 28 of the 32 vector registers hold sums, two a row of `b`, one a number of `a`.
pub(super) const ROWS: usize = 14;
/// Columns of a tile.
pub(super) const COLUMNS: usize = 2 * LANES;
/// Sums in a vector.
pub(super) const LANES: usize = 16;

/// Where a tile begins and ends.
#[derive(Clone, Copy)]
pub(crate) struct Place<T> {
    /// Words to sum over.
    pub(super) words: usize,
    /// `[words, rows]`.
    pub(super) a: *const u32,
    /// `[words, columns]`, the columns padded to vectors.
    pub(super) b: *const u32,
    /// Sums so far, unless this is the first part of `k`, and to be, unless it is the last.
    pub(super) sums: *mut f32,
    /// The result, after the last part of `k`.
    pub(super) out: *mut T,
    /// A number for each column; or null.
    pub(super) bias: *const T,
    /// Numbers from row to row of `sums` and `out`.
    pub(super) stride: usize,
    /// Columns there are.
    pub(super) columns: usize,
    pub(super) is_first: bool,
    pub(super) is_last: bool,
}

/// What differs between the float types, in functions that are inlined where the instructions are enabled.
pub(crate) trait Steps: Copy {
    /// `sum + a · b`, of words.
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn add_product(sum: __m512, a: __m512i, b: __m512i) -> __m512;

    /// Reads the `lanes` of a vector, widened.
    ///
    /// # Safety
    /// As for [`Self::add_product`]; the lanes are there.
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

/// Calls `tile` with constants for the variable number of rows and the number of vectors.
macro_rules! tile_of {
    ($place:expr, $rows:expr, $V:literal: $($R:literal)*) => {
        match $rows {
            $($R => $place.tile::<$R, $V>(),)*
            _ => unreachable!("no tile of so many rows"),
        }
    };
}

macro_rules! sum_up {
    ($T:ty, $features:literal) => {
        impl Place<$T> {
            /// Sums up `rows` rows of the tile.
            ///
            /// # Safety
            /// The CPU has the instructions; all pointers cover what their comments say; no other thread touches this part
            /// of `sums` and `out` meanwhile; `0 < rows ≤ ROWS` and `0 < columns ≤ COLUMNS`.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn sum_up(self, rows: usize) {
                // SAFETY: the caller's promise.
                unsafe {
                    if self.columns > LANES {
                        tile_of!(self, rows, 2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
                    } else {
                        tile_of!(self, rows, 1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
                    }
                }
            }
        }
    };
}

sum_up!(f32, "avx512f,avx512bw,avx512vl");
sum_up!(bf16, "avx512f,avx512bw,avx512vl,avx512bf16");

impl<T: Steps> Place<T> {
    /// # Safety
    /// As for `sum_up`, of `R` rows and no more columns than `V` vectors have.
    #[inline(always)]
    unsafe fn tile<const R: usize, const V: usize>(self) {
        // SAFETY: the caller's promise, for the rows, the columns and the words there are; `b` is padded to vectors.
        unsafe {
            let mut masks = [0; V];
            for (v, mask) in masks.iter_mut().enumerate() {
                *mask = first_lanes(self.columns.saturating_sub(v * LANES));
            }
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            if !self.is_first {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = f32::read(self.sums.add(r * self.stride + v * LANES), masks[v]);
                    }
                }
            }
            let (mut a, mut row) = (self.a, self.b);
            for _ in 0..self.words {
                let mut b = [_mm512_setzero_si512(); V];
                for (v, b) in b.iter_mut().enumerate() {
                    *b = _mm512_loadu_si512(row.add(v * LANES).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_epi32((*a.add(r)).cast_signed());
                    for (sum, b) in sums.iter_mut().zip(&b) {
                        *sum = T::add_product(*sum, a, *b);
                    }
                }
                (a, row) = (a.add(R), row.add(V * LANES));
            }
            if !self.is_last {
                for (r, sums) in sums.iter().enumerate() {
                    for (v, sum) in sums.iter().enumerate() {
                        f32::write(self.sums.add(r * self.stride + v * LANES), masks[v], *sum);
                    }
                }
                return;
            }
            for (v, mask) in masks.iter().enumerate() {
                let bias = if self.bias.is_null() {
                    // Which leaves the sum as it is, unlike +0.
                    _mm512_set1_ps(-0.0)
                } else {
                    T::read(self.bias.add(v * LANES), *mask)
                };
                for (r, sums) in sums.iter().enumerate() {
                    T::write(self.out.add(r * self.stride + v * LANES), *mask, _mm512_add_ps(sums[v], bias));
                }
            }
        }
    }
}

/// The first `count` lanes of a vector.
#[inline(always)]
pub(super) fn first_lanes(count: usize) -> __mmask16 {
    if count < LANES { (1 << count) - 1 } else { !0 }
}
