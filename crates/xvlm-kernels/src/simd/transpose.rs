//! The transpose of small matrices.

/// The side of the blocks that are transposed at once.
pub(crate) const BLOCK: usize = 4;

/// `out[j, i] = from[i, j]`: `from [rows, columns]`, both sizes multiples of [`BLOCK`], with `strides` from row to row of
/// `from` and of `out`.
#[inline(always)]
pub(crate) fn transpose(from: &[f32], out: &mut [f32], (rows, columns): (usize, usize), strides: (usize, usize)) {
    let whole = rows.is_multiple_of(BLOCK) && columns.is_multiple_of(BLOCK);
    assert!(whole && columns <= strides.0 && rows <= strides.1);
    if rows == 0 || columns == 0 {
        return;
    }
    assert!((rows - 1) * strides.0 + columns <= from.len() && (columns - 1) * strides.1 + rows <= out.len());
    for i in (0..rows).step_by(BLOCK) {
        for j in (0..columns).step_by(BLOCK) {
            // SAFETY: the block lies inside both matrices, which end inside their slices.
            unsafe { block(from.as_ptr().add(i * strides.0 + j), out.as_mut_ptr().add(j * strides.1 + i), strides) };
        }
    }
}

/// # Safety
/// Four rows of four numbers lie at `from` and at `out`, at the distances `strides`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn block(from: *const f32, out: *mut f32, strides: (usize, usize)) {
    use std::arch::x86_64::{_MM_TRANSPOSE4_PS as transpose_in_place, _mm_loadu_ps as load, _mm_storeu_ps as store};
    // SAFETY: the caller's promise; these instructions are part of x86-64.
    unsafe {
        let row = |i: usize| load(from.add(i * strides.0));
        let (mut a, mut b, mut c, mut d) = (row(0), row(1), row(2), row(3));
        transpose_in_place(&mut a, &mut b, &mut c, &mut d);
        store(out, a);
        store(out.add(strides.1), b);
        store(out.add(2 * strides.1), c);
        store(out.add(3 * strides.1), d);
    }
}

/// # Safety
/// Four rows of four numbers lie at `from` and at `out`, at the distances `strides`.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
unsafe fn block(from: *const f32, out: *mut f32, strides: (usize, usize)) {
    for i in 0..BLOCK {
        for j in 0..BLOCK {
            // SAFETY: the caller's promise.
            unsafe { *out.add(j * strides.1 + i) = *from.add(i * strides.0 + j) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        let (rows, columns) = (8, 12);
        let from: Vec<f32> = (0..rows * (columns + 1)).map(|i| i as f32).collect();
        let mut out = vec![-1.0; columns * (rows + 2)];
        transpose(&from, &mut out, (rows, columns), (columns + 1, rows + 2));
        for j in 0..columns {
            for i in 0..rows {
                assert_eq!(out[j * (rows + 2) + i], from[i * (columns + 1) + j]);
            }
            assert_eq!(out[j * (rows + 2) + rows..][..2], [-1.0; 2]);
        }
    }
}
