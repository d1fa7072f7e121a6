//! Packing a factor into panels `[words, lines]`: a word is a number of four bytes, or two of two bytes or four of one that
//! follow each other in the summed dimension.

use std::arch::x86_64::*;

use super::Factor;
use super::tile::{LANES, first_lanes};

/// How many rows ahead of those it packs [`interleave`] asks the memory for, which does not see by itself what comes,
const AHEAD: usize = 32;
/// and how many vectors ahead [`transpose`] does, in each of its rows.
const VECTORS_AHEAD: usize = 4;

/// A factor in memory.
#[derive(Clone, Copy)]
pub(super) struct Source<T> {
    start: *const T,
    /// Numbers from line to line, or from one number of a line to the next if that is `across`.
    stride: usize,
    pub(super) across: bool,
}

// SAFETY: what it points to is only read.
unsafe impl<T: Sync> Send for Source<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Source<T> {}

/// Numbers in a word.
pub(crate) const fn numbers<T>() -> usize {
    size_of::<u32>() / size_of::<T>()
}

impl<T: Copy> Source<T> {
    /// A factor of `lines` lines of `k` numbers.
    ///
    /// # Panics
    /// If it has another size, or its numbers are bytes and its lines lie across.
    pub(super) fn of(factor: Factor<T>, lines: usize, k: usize) -> Self {
        let (values, stride, across) = match factor {
            Factor::Along(values) => (values, k, false),
            Factor::Across(values) => (values, lines, true),
        };
        assert!(values.len() == lines * k, "a factor of {lines} lines of {k} numbers");
        assert!(!across || numbers::<T>() <= 2, "bytes along their lines");
        Self { start: values.as_ptr(), stride, across }
    }

    /// Packs the numbers `depth..depth + depths` of the lines from `line` on into `out [words, width]`: `lines` of
    /// them, and whatever for the rest of the width, but zeros for what a last word lacks.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL; the lines, one at least, and the depths are there; `out` has room.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn pack(
        self,
        (line, lines): (usize, usize),
        (depth, depths): (usize, usize),
        width: usize,
        out: *mut u32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.across {
                let start = self.start.add(depth * self.stride + line);
                if width > LANES {
                    interleave::<T, 2>(start, self.stride, lines, depths, width, out)
                } else {
                    interleave::<T, 1>(start, self.stride, lines, depths, width, out)
                }
            } else {
                for from in (0..lines).step_by(LANES) {
                    let start = self.start.add((line + from) * self.stride + depth);
                    let lanes = first_lanes(width - from);
                    transpose(start, self.stride, (lines - from).min(LANES), depths, lanes, width, out.add(from));
                }
            }
        }
    }
}

/// Packs `lines` lines that lie side by side, `stride` numbers from one number of a line to the next, into `V` vectors.
///
/// # Safety
/// As for [`Source::pack`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn interleave<T, const V: usize>(
    start: *const T,
    stride: usize,
    lines: usize,
    depths: usize,
    width: usize,
    out: *mut u32,
) {
    let mut masks = [(0, 0); V];
    for (v, masks) in masks.iter_mut().enumerate() {
        *masks = (first_lanes(lines.saturating_sub(v * LANES)), first_lanes(width - v * LANES));
    }
    // SAFETY: the caller's promise; lanes that are not there are not read.
    let pack = |row: *const T, next: Option<*const T>, out: *mut u32| unsafe {
        for (v, (there, lanes)) in masks.iter().enumerate() {
            let read = |row: *const T| {
                let from = row.add(v * LANES);
                if numbers::<T>() == 1 {
                    _mm512_maskz_loadu_epi32(*there, from.cast())
                } else {
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(*there, from.cast()))
                }
            };
            let second = next.map_or(_mm512_setzero_si512(), read);
            let word = _mm512_or_si512(read(row), _mm512_slli_epi32::<16>(second));
            _mm512_mask_storeu_epi32(out.add(v * LANES).cast(), *lanes, word);
        }
    };
    let (mut row, mut out) = (start, out);
    let after = |row: *const T| row.wrapping_add(stride);
    let prefetch = |row: *const T| _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(AHEAD * stride).cast());
    for _ in 0..depths / numbers::<T>() {
        prefetch(row);
        let next = if numbers::<T>() == 1 { None } else { Some(after(row)) };
        next.inspect(|next| prefetch(*next));
        pack(row, next, out);
        (row, out) = (after(next.unwrap_or(row)), out.wrapping_add(width));
    }
    if !depths.is_multiple_of(numbers::<T>()) {
        pack(row, None, out);
    }
}

/// Packs `lines` lines, `stride` numbers from one to the next, as the `lanes` of a vector, and `width` words on the next.
///
/// # Safety
/// As for [`Source::pack`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn transpose<T>(
    start: *const T,
    stride: usize,
    lines: usize,
    depths: usize,
    lanes: __mmask16,
    width: usize,
    out: *mut u32,
) {
    let step = numbers::<T>() * LANES;
    let pack = |depth: usize, depths: usize| {
        let there = if depths < 64 { (1u64 << depths) - 1 } else { !0 };
        let mut rows = [_mm512_setzero_si512(); LANES];
        for (line, row) in rows.iter_mut().enumerate() {
            // Where there are no more lines, the last once more, for lanes that nobody reads.
            // SAFETY: the caller's promise; numbers that are not there are not read.
            *row = unsafe {
                let from = start.add(line.min(lines - 1) * stride + depth);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(VECTORS_AHEAD * step).cast());
                match numbers::<T>() {
                    1 => _mm512_maskz_loadu_epi32(there as __mmask16, from.cast()),
                    2 => _mm512_maskz_loadu_epi16(there as __mmask32, from.cast()),
                    _ => _mm512_maskz_loadu_epi8(there, from.cast()),
                }
            };
        }
        let columns = transposed(rows);
        for (word, column) in columns.iter().enumerate() {
            if word < depths.div_ceil(numbers::<T>()) {
                // SAFETY: the caller's promise.
                unsafe {
                    let out = out.add((depth / numbers::<T>() + word) * width);
                    _mm512_mask_storeu_epi32(out.cast(), lanes, *column);
                }
            }
        }
    };
    for depth in (0..depths / step * step).step_by(step) {
        pack(depth, step);
    }
    let rest = depths % step;
    if rest > 0 {
        pack(depths - rest, rest);
    }
}

/// 16 rows become columns: first blocks of four by four, then the places of the blocks.
#[target_feature(enable = "avx512f")]
pub(crate) fn transposed(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    // Quarter l of `fours[4q + i]` is column 4l + i of the rows from 4q on.
    let mut fours = [_mm512_setzero_si512(); LANES];
    for q in 0..4 {
        let [a, b, c, d] = [rows[4 * q], rows[4 * q + 1], rows[4 * q + 2], rows[4 * q + 3]];
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        fours[4 * q] = _mm512_unpacklo_epi64(ab_low, cd_low);
        fours[4 * q + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        fours[4 * q + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        fours[4 * q + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    let mut columns = fours;
    for i in 0..4 {
        let [a, b, c, d] = [fours[i], fours[4 + i], fours[8 + i], fours[12 + i]];
        // The even and the odd quarters of two vectors.
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        columns[i] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        columns[8 + i] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        columns[4 + i] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        columns[12 + i] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
    columns
}
