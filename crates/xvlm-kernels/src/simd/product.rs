//! Products of small matrices that lie in a cache, where packing them for a general GEMM costs more than the product.
//!
//! A tile of the result stays in vector registers while the summed dimension passes by: per step a few vectors of `b` are
//! loaded, one number of `a` for each row is broadcast, and every pair is multiplied and added.

use pulp::{Simd, WithSimd};

/// The columns of `b` and of the result are padded to a multiple of this: a vector of the widest instruction set.
pub(crate) const LANES: usize = 16;

/// A row-major matrix, with the distance between its rows.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) stride: usize,
}

impl Rows<'_> {
    /// Without its first columns.
    pub(crate) fn columns_from(self, column: usize) -> Self {
        Self { values: &self.values[column..], ..self }
    }
}

/// What is added to a product.
#[derive(Clone, Copy)]
pub(crate) enum Plus<'a> {
    Nothing,
    /// What is in the result already.
    Result,
    /// A matrix of the result's size.
    Matrix(Rows<'a>),
    /// One number for each row.
    Column(&'a [f32]),
}

/// `out[m, n] = a[m, k] · b[k, n] + plus`; `n` is a multiple of [`LANES`].
pub(crate) struct Product<'a> {
    /// `m`, `n` and `k`.
    pub(crate) size: (usize, usize, usize),
    pub(crate) a: Rows<'a>,
    /// Whether `a` is stored as `[k, m]`.
    pub(crate) transposed: bool,
    pub(crate) b: Rows<'a>,
    pub(crate) plus: Plus<'a>,
    pub(crate) out: &'a mut [f32],
    pub(crate) stride: usize,
}

/// Fails unless a matrix of this size ends inside the slice.
#[inline(always)]
fn check(values: &[f32], stride: usize, rows: usize, columns: usize) {
    assert!(rows == 0 || (columns <= stride || rows == 1) && (rows - 1) * stride + columns <= values.len());
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { size: (m, n, k), a, transposed, b, plus, out, stride } = self;
        assert!(n.is_multiple_of(LANES) && LANES.is_multiple_of(S::F32_LANES));
        if transposed {
            check(a.values, a.stride, k, m)
        } else {
            check(a.values, a.stride, m, k)
        }
        check(b.values, b.stride, k, n);
        check(out, stride, m, n);
        match plus {
            Plus::Matrix(plus) => check(plus.values, plus.stride, m, n),
            Plus::Column(plus) => assert!(plus.len() >= m),
            Plus::Nothing | Plus::Result => {}
        }
        let place = Place {
            k,
            a: a.values.as_ptr(),
            a_stride: a.stride,
            b: b.values.as_ptr(),
            b_stride: b.stride,
            plus: match plus {
                Plus::Nothing => RawPlus::Nothing,
                Plus::Result => RawPlus::Matrix(out.as_ptr(), stride),
                Plus::Matrix(plus) => RawPlus::Matrix(plus.values.as_ptr(), plus.stride),
                Plus::Column(plus) => RawPlus::Column(plus.as_ptr()),
            },
            out: out.as_mut_ptr(),
            stride,
        };
        // SAFETY: all matrices have the sizes checked above, and the mutable borrow keeps `out` apart from the others.
        unsafe { if transposed { place.all::<S, true>(simd, m, n) } else { place.all::<S, false>(simd, m, n) } }
    }
}

#[derive(Clone, Copy)]
enum RawPlus {
    Nothing,
    Matrix(*const f32, usize),
    Column(*const f32),
}

#[derive(Clone, Copy)]
struct Place {
    k: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    plus: RawPlus,
    out: *mut f32,
    stride: usize,
}

/// Calls `$place.tile::<S, T, rows, $V>(..)` with a constant for the variable number of rows.
macro_rules! tile_of {
    ($place:expr, $simd:expr, $rows:expr, $S:ty, $T:expr, $V:literal: $($R:literal)*) => {
        match $rows {
            $($R => $place.tile::<$S, $T, $R, $V>($simd),)*
            _ => unreachable!("no tile of so many rows"),
        }
    };
}

impl Place {
    /// The same place, `row` rows and `column` columns further.
    #[inline(always)]
    unsafe fn at<const T: bool>(self, row: usize, column: usize) -> Self {
        // SAFETY: the caller stays inside the matrices.
        unsafe {
            Self {
                // Without a summed dimension there is nothing of these two.
                a: self.a.wrapping_add(if T { row } else { row * self.a_stride }),
                b: self.b.wrapping_add(column),
                plus: match self.plus {
                    RawPlus::Nothing => RawPlus::Nothing,
                    RawPlus::Matrix(plus, stride) => RawPlus::Matrix(plus.add(row * stride + column), stride),
                    RawPlus::Column(plus) => RawPlus::Column(plus.add(row)),
                },
                out: self.out.add(row * self.stride + column),
                ..self
            }
        }
    }

    /// The whole product; `T`: `a` is transposed.
    ///
    /// # Safety
    /// The matrices have the sizes that `m`, `n`, `k` and the strides say.
    #[inline(always)]
    unsafe fn all<S: Simd, const T: bool>(self, simd: S, m: usize, n: usize) {
        let mut column = 0;
        while column < n {
            // As many sums as there are registers for, beside those for a row of `b` and for a number of `a`; at least
            // eight, to hide the latency of an addition.
            let (vectors, most) = if S::REGISTER_COUNT < 32 {
                (2, 6)
            } else if S::F32_LANES < LANES {
                (4, 6)
            } else {
                match (n - column) / LANES {
                    1 => (1, 12),
                    2 => (2, 12),
                    3 => (3, 8),
                    _ => (4, 6),
                }
            };
            assert!(vectors * S::F32_LANES <= n - column, "no tile passes the last column");
            let tiles = m.div_ceil(most).max(1);
            let mut row = 0;
            for tile in 0..tiles {
                let rows = m / tiles + usize::from(tile < m % tiles);
                // SAFETY: rows and columns below `m` and `n`.
                unsafe {
                    let place = self.at::<T>(row, column);
                    if rows == 0 {
                        return;
                    }
                    if S::REGISTER_COUNT < 32 {
                        tile_of!(place, simd, rows, S, T, 2: 1 2 3 4 5 6);
                    } else if S::F32_LANES < LANES {
                        tile_of!(place, simd, rows, S, T, 4: 1 2 3 4 5 6);
                    } else {
                        match vectors {
                            1 => tile_of!(place, simd, rows, S, T, 1: 1 2 3 4 5 6 7 8 9 10 11 12),
                            2 => tile_of!(place, simd, rows, S, T, 2: 1 2 3 4 5 6 7 8 9 10 11 12),
                            3 => tile_of!(place, simd, rows, S, T, 3: 1 2 3 4 5 6 7 8),
                            _ => tile_of!(place, simd, rows, S, T, 4: 1 2 3 4 5 6),
                        }
                    }
                }
                row += rows;
            }
            column += vectors * S::F32_LANES;
        }
    }

    /// `R` rows and `V` vectors of the result.
    ///
    /// # Safety
    /// The matrices reach that far.
    // Counted loops: what an iterator calls is not always inlined, and then the sums are not kept in registers.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn tile<S: Simd, const T: bool, const R: usize, const V: usize>(self, simd: S) {
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        let (mut a, mut b) = (self.a, self.b);
        for _ in 0..self.k {
            let mut row = [simd.splat_f32s(0.0); V];
            for v in 0..V {
                // SAFETY: inside `b`.
                row[v] = unsafe { b.add(v * S::F32_LANES).cast::<S::f32s>().read_unaligned() };
            }
            for r in 0..R {
                // SAFETY: inside `a`.
                let x = simd.splat_f32s(unsafe { *a.add(if T { r } else { r * self.a_stride }) });
                for v in 0..V {
                    sums[r][v] = simd.mul_add_e_f32s(x, row[v], sums[r][v]);
                }
            }
            // The last step leaves them behind their matrices, where nothing is read.
            a = a.wrapping_add(if T { self.a_stride } else { 1 });
            b = b.wrapping_add(self.b_stride);
        }
        for r in 0..R {
            for v in 0..V {
                let (sum, column) = (sums[r][v], v * S::F32_LANES);
                // SAFETY: inside `plus` and `out`.
                unsafe {
                    let sum = match self.plus {
                        RawPlus::Nothing => sum,
                        RawPlus::Matrix(plus, stride) => {
                            let plus = plus.add(r * stride + column).cast::<S::f32s>().read_unaligned();
                            simd.add_f32s(sum, plus)
                        }
                        RawPlus::Column(plus) => simd.add_f32s(sum, simd.splat_f32s(*plus.add(r))),
                    };
                    self.out.add(r * self.stride + column).cast::<S::f32s>().write_unaligned(sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole numbers, so that the order of the sums does not matter.
    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + seed * 5) % 11) as f32 - 5.0).collect()
    }

    fn multiplies<S: Simd>(simd: S) {
        for (m, n, k) in
            [(1, 16, 1), (7, 32, 5), (13, 48, 9), (25, 64, 3), (14, 112, 6), (0, 16, 3), (5, 80, 0), (3, 0, 2)]
        {
            for transposed in [false, true] {
                let (rows, columns) = if transposed { (k, m) } else { (m, k) };
                let (a, b, plus) = (numbers(rows * (columns + 3), 1), numbers(k * (n + 1), 2), numbers(m * (n + 2), 3));
                let a = Rows { values: &a, stride: columns + 3 };
                let b = Rows { values: &b, stride: n + 1 };
                let matrix = Rows { values: &plus, stride: n + 2 };
                for which in 0..4 {
                    let before = numbers(m * (n + 4), 4);
                    let mut out = before.clone();
                    let plus = [Plus::Nothing, Plus::Result, Plus::Matrix(matrix), Plus::Column(matrix.values)][which];
                    let stride = n + 4;
                    simd.vectorize(Product { size: (m, n, k), a, transposed, b, plus, out: &mut out, stride });
                    for i in 0..m {
                        for j in 0..n {
                            let a = |l: usize| a.values[if transposed { l * a.stride + i } else { i * a.stride + l }];
                            let product: f32 = (0..k).map(|l| a(l) * b.values[l * b.stride + j]).sum();
                            let plus = match plus {
                                Plus::Nothing => 0.0,
                                Plus::Result => before[i * stride + j],
                                Plus::Matrix(plus) => plus.values[i * plus.stride + j],
                                Plus::Column(plus) => plus[i],
                            };
                            assert_eq!(out[i * stride + j], product + plus, "{m} {n} {k} {transposed} {which}");
                        }
                        assert_eq!(out[i * stride + n..][..4], before[i * stride + n..][..4]);
                    }
                }
            }
        }
    }

    #[test]
    fn products_are_exact_on_every_instruction_set() {
        struct Best;
        impl WithSimd for Best {
            type Output = ();
            fn with_simd<S: Simd>(self, simd: S) {
                multiplies(simd);
            }
        }
        pulp::Arch::new().dispatch(Best);
        multiplies(pulp::Scalar);
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            multiplies(simd);
        }
    }
}
