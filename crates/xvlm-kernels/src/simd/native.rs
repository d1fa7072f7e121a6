//! Matrix products by the instructions that this processor has for a float type.
//!
//! With AVX-512, a tile of 14 × 32 sums stays in registers while both factors pass by, packed into panels (`pack`, `tile`).
//! `f32` takes a multiplication and addition of sixteen numbers for a vector of sums; `bf16`, with AVX-512 BF16, one
//! `vdpbf16ps`, which multiplies 32 pairs of numbers and adds them two by two to sixteen sums in `f32` in the same time. It
//! wants the two numbers that are summed side by side, which is why panels are made of words: an `f32`, or two `bf16`.
//!
//! Accuracy: each number of the result is one chain of fused multiply-adds in `f32` over the whole summed dimension `k`, in
//! an order that `k` alone decides: within `k · 2⁻²⁴ · Σ|aᵢ·bᵢ|` of the exact sum, then, for `bf16`, rounded once to the
//! nearest (2⁻⁸ of it). The instructions for `bf16` take denormal numbers (below 2⁻¹²⁶) for 0, on their way in and out.

#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(target_arch = "x86_64")]
mod tile;

#[cfg(target_arch = "x86_64")]
pub(crate) use blocks::{Multiplier, Native};

/// A factor of a product, by how the dimension that is summed lies in its memory. A line is a row of the first factor or a
/// column of the second.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) enum Factor<'a, T> {
    /// `[lines, k]`.
    Along(&'a [T]),
    /// `[k, lines]`.
    Across(&'a [T]),
}

/// `out [m, n] = a · b + bias [n]`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) struct Product<'a, T> {
    /// `m`, `n` and `k`.
    pub(crate) size: (usize, usize, usize),
    /// Its lines are the `m` rows.
    pub(crate) a: Factor<'a, T>,
    /// Its lines are the `n` columns.
    pub(crate) b: Factor<'a, T>,
    pub(crate) bias: Option<&'a [T]>,
    /// Written and never read.
    pub(crate) out: &'a mut [T],
}

/// A float type.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait Native {}

#[cfg(not(target_arch = "x86_64"))]
impl<T> Native for T {}

/// No other processor's instructions are known here.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) struct Multiplier<T>(std::convert::Infallible, std::marker::PhantomData<T>);

#[cfg(not(target_arch = "x86_64"))]
impl<T> Multiplier<T> {
    pub(crate) fn find() -> Option<Self> {
        None
    }

    pub(crate) fn multiply(self, _: Product<T>) {
        match self.0 {}
    }
}
