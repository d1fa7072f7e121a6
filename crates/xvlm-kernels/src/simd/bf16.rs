//! Matrix products of `bf16` by the instructions for them, where the processor has any.
//!
//! `vdpbf16ps` of AVX-512 BF16 multiplies 32 pairs of numbers and adds them two by two to 16 sums in `f32`: twice what a
//! multiplication of `f32` does in the same time. It wants the two numbers that are summed side by side, so both factors
//! are packed into panels of such pairs (`pack`), of which a tile of the result is made at a time, its sums in registers
//! (`tile`).
//!
//! Accuracy: each number of the result is one chain of fused multiply-adds in `f32` over the whole summed dimension `k`, in
//! an order that `k` alone decides: within `k · 2⁻²⁴ · Σ|aᵢ·bᵢ|` of the exact sum, then rounded once to `bf16`, to the
//! nearest (2⁻⁸ of it). The instructions take denormal numbers (below 2⁻¹²⁶) for 0, on their way in and out.

use half::bf16;

#[cfg(target_arch = "x86_64")]
mod native;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(target_arch = "x86_64")]
mod tile;

#[cfg(target_arch = "x86_64")]
pub(crate) use native::Native;

/// A factor of a product, by how the dimension that is summed lies in its memory. A line is a row of the first factor or a
/// column of the second.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) enum Factor<'a> {
    /// `[lines, k]`.
    Along(&'a [bf16]),
    /// `[k, lines]`.
    Across(&'a [bf16]),
}

/// `out [m, n] = a · b + bias [n]`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) struct Product<'a> {
    /// `m`, `n` and `k`.
    pub(crate) size: (usize, usize, usize),
    /// Its lines are the `m` rows.
    pub(crate) a: Factor<'a>,
    /// Its lines are the `n` columns.
    pub(crate) b: Factor<'a>,
    pub(crate) bias: Option<&'a [bf16]>,
    /// Written and never read.
    pub(crate) out: &'a mut [bf16],
}

/// No other processor's instructions are known here.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy)]
pub(crate) enum Native {}

#[cfg(not(target_arch = "x86_64"))]
impl Native {
    pub(crate) fn find() -> Option<Self> {
        None
    }

    pub(crate) fn multiply(self, _: Product) {
        match self {}
    }
}
