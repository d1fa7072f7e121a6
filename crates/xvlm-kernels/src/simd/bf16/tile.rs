//! A tile of the result, whose sums stay in registers while the summed dimension passes by.

use std::arch::x86_64::*;

use half::bf16;

/// Rows of a tile: with [`COLUMNS`], 28 of the 32 vector registers hold sums, two a pair of rows of `b`, one of `a`.
pub(super) const ROWS: usize = 14;
/// Columns of a tile.
pub(super) const COLUMNS: usize = 2 * LANES;
/// Sums in a vector.
pub(super) const LANES: usize = 16;

/// Where a tile begins and ends.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Pairs of rows to sum over.
    pub(super) pairs: usize,
    /// `[pairs, rows]` pairs.
    pub(super) a: *const u32,
    /// `[pairs, columns]` pairs, the columns padded to vectors.
    pub(super) b: *const u32,
    /// Sums so far, unless this is the first part of `k`, and to be, unless it is the last.
    pub(super) sums: *mut f32,
    /// The result, after the last part of `k`.
    pub(super) out: *mut bf16,
    /// A number for each column; or null.
    pub(super) bias: *const bf16,
    /// Numbers from row to row of `sums` and `out`.
    pub(super) stride: usize,
    /// Columns there are.
    pub(super) columns: usize,
    pub(super) is_first: bool,
    pub(super) is_last: bool,
}

impl Place {
    /// Sums up `rows` rows of the tile.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW, VL and BF16; all pointers cover what their comments say; no other thread touches this
    /// part of `sums` and `out` meanwhile; `0 < rows ≤ ROWS` and `0 < columns ≤ COLUMNS`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn sum_up(self, rows: usize) {
        macro_rules! of {
            ($V:literal: $($R:literal)*) => {
                match rows {
                    // SAFETY: the caller's promise.
                    $($R => unsafe { self.tile::<$R, $V>() },)*
                    _ => unreachable!("no tile of so many rows"),
                }
            };
        }
        if self.columns > LANES {
            of!(2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        } else {
            of!(1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
    }

    /// # Safety
    /// As for [`Self::sum_up`], of `R` rows and no more columns than `V` vectors have.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn tile<const R: usize, const V: usize>(self) {
        let mut masks = [0; V];
        for (v, mask) in masks.iter_mut().enumerate() {
            *mask = first_lanes(self.columns.saturating_sub(v * LANES));
        }
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        if !self.is_first {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's promise, for the columns there are.
                    *sum = unsafe { _mm512_maskz_loadu_ps(masks[v], self.sums.add(r * self.stride + v * LANES)) };
                }
            }
        }
        for pair in 0..self.pairs {
            // SAFETY: below the number of pairs.
            let (a, row) = unsafe { (self.a.add(pair * R), self.b.add(pair * V * LANES)) };
            let mut b = [_mm512_setzero_si512(); V];
            for (v, b) in b.iter_mut().enumerate() {
                // SAFETY: the columns are padded to vectors.
                *b = unsafe { _mm512_loadu_si512(row.add(v * LANES).cast()) };
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: there are `R` rows.
                let a = _mm512_set1_epi32(unsafe { *a.add(r) }.cast_signed());
                for (sum, b) in sums.iter_mut().zip(&b) {
                    *sum = _mm512_dpbf16_ps(*sum, as_pairs(a), as_pairs(*b));
                }
            }
        }
        if !self.is_last {
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    // SAFETY: the caller's promise, for the columns there are.
                    unsafe { _mm512_mask_storeu_ps(self.sums.add(r * self.stride + v * LANES), masks[v], *sum) };
                }
            }
            return;
        }
        for v in 0..V {
            let bias = if self.bias.is_null() {
                // Which leaves the sum as it is, unlike +0.
                _mm512_set1_ps(-0.0)
            } else {
                // SAFETY: the caller's promise, for the columns there are.
                let bias = unsafe { _mm256_maskz_loadu_epi16(masks[v], self.bias.add(v * LANES).cast()) };
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bias)))
            };
            for (r, sums) in sums.iter().enumerate() {
                let rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sums[v], bias));
                // SAFETY: the caller's promise, for the columns there are; both types are 256 bits.
                unsafe {
                    let bits = std::mem::transmute::<__m256bh, __m256i>(rounded);
                    _mm256_mask_storeu_epi16(self.out.add(r * self.stride + v * LANES).cast(), masks[v], bits);
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

#[inline(always)]
fn as_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of plain numbers.
    unsafe { std::mem::transmute(bits) }
}
