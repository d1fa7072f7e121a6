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
//!
//! Bytes are the third type: with AVX-512 VNNI, one `vpdpbusd` multiplies 64 pairs of an unsigned and a signed byte and adds
//! them four by four to sixteen whole numbers, which are exact up to a `k` of 66 311 (2³¹ / (255 · 127)) and wrap beyond. What
//! they stand for, [`Scales`] say.
//!
//! A factor that is used often, such as a weight, is packed once ([`Panels`]). What is done with a sum before it is written
//! ([`Finish`]) is done while it is in the nearest cache.

#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(target_arch = "x86_64")]
mod tile;

#[cfg(target_arch = "x86_64")]
pub(crate) use blocks::{Multiplier, Native, Panels};
#[cfg(target_arch = "x86_64")]
pub(crate) use pack::{numbers, transposed};
#[cfg(target_arch = "x86_64")]
pub(crate) use tile::{LANES, Lanes, Steps, Walk, add_products, first_lanes, tile_of};

use crate::activation::Curve;
use crate::numbers::Lines;

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

/// The second factor of a product.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) enum Second<'a, T> {
    Plain(Factor<'a, T>),
    Packed(&'a Panels<T>),
    /// Used once.
    Lines(&'a Lines<'a, T>),
}

/// `out [m, n] = finish(a · b)`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) struct Product<'a, T: Native> {
    /// `m`, `n` and `k`.
    pub(crate) size: (usize, usize, usize),
    /// Its lines are the `m` rows.
    pub(crate) a: Factor<'a, T>,
    /// Its lines are the `n` columns.
    pub(crate) b: Second<'a, T>,
    pub(crate) finish: Finish<'a, T::Out>,
    /// Written and never read.
    pub(crate) out: &'a mut [T::Out],
}

/// What becomes of the sums of a product before they are written: `then(sum + bias)`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) struct Finish<'a, O> {
    /// What the sums of bytes stand for; for them, and for nothing else.
    pub(crate) scales: Option<Scales<'a>>,
    /// `[n]`.
    pub(crate) bias: Option<&'a [O]>,
    pub(crate) then: Then<'a, O>,
}

impl<'a, O> Finish<'a, O> {
    /// A bias and nothing else.
    pub(crate) fn bias(bias: Option<&'a [O]>) -> Self {
        Self { scales: None, bias, then: Then::Nothing }
    }
}

/// See [`Finish`].
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) enum Then<'a, O> {
    Nothing,
    Activate(Curve),
    /// Adds `[m, n]`.
    Add(&'a [O]),
}

/// A product of quantised matrices: where a row of the first is `scale · (byte − zero)` and a column of the second
/// `scale · byte`, it is `scale · scale · (sum of products − zero · sum of the column)`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) struct Scales<'a> {
    /// Scale and zero of each of the `m` rows.
    pub(crate) rows: &'a [(f32, i32)],
    /// Scale of each of the `n` columns.
    pub(crate) columns: &'a [f32],
    /// Sum of each of the `n` columns.
    pub(crate) sums: &'a [i32],
}

/// A number of factors.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait Native {
    /// A number of results.
    type Out;
}

#[cfg(not(target_arch = "x86_64"))]
impl Native for f32 {
    type Out = Self;
}

#[cfg(not(target_arch = "x86_64"))]
impl Native for half::bf16 {
    type Out = Self;
}

#[cfg(not(target_arch = "x86_64"))]
impl Native for i8 {
    type Out = f32;
}

/// There are none without instructions.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) struct Panels<T>(std::convert::Infallible, std::marker::PhantomData<T>);

#[cfg(not(target_arch = "x86_64"))]
impl<T> Panels<T> {
    pub(crate) fn size(&self) -> (usize, usize) {
        match self.0 {}
    }

    pub(crate) fn unpacked(&self) -> Vec<T> {
        match self.0 {}
    }
}

/// No other processor's instructions are known here.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) struct Multiplier<T>(std::convert::Infallible, std::marker::PhantomData<T>);

#[cfg(not(target_arch = "x86_64"))]
impl<T: Native> Multiplier<T> {
    pub(crate) fn find() -> Option<Self> {
        None
    }

    pub(crate) fn pack(&self, _: Factor<T>, _: (usize, usize)) -> Panels<T> {
        match self.0 {}
    }

    pub(crate) fn pack_lines(&self, _: &Lines<T>, _: (usize, usize)) -> Panels<T> {
        match self.0 {}
    }

    pub(crate) fn multiply(self, _: Product<T>) {
        match self.0 {}
    }
}
