//! The float types that fused operations read and write on the CPU.

use candle_core::WithDType;
use half::bf16;
use half::vec::HalfBitsVecExt;
use pulp::Simd;
use pulp::bytemuck::{cast_slice, cast_slice_mut};

/// A float type of storage; arithmetic is always `f32`.
pub(crate) trait Real: WithDType {
    fn widen(self) -> f32;
    fn narrow(x: f32) -> Self;
    /// Less than a vector, widened, with zeros behind.
    fn partial_load<S: Simd>(simd: S, from: &[Self]) -> S::f32s;
    /// The first numbers of a vector, narrowed.
    fn partial_store<S: Simd>(simd: S, vector: S::f32s, to: &mut [Self]);
    /// Memory that the system hands out as zeros, which costs nothing before it is used.
    fn zeros(len: usize) -> Vec<Self>;
}

impl Real for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn partial_load<S: Simd>(simd: S, from: &[Self]) -> S::f32s {
        simd.partial_load_f32s(from)
    }

    #[inline(always)]
    fn partial_store<S: Simd>(simd: S, vector: S::f32s, to: &mut [Self]) {
        simd.partial_store_f32s(to, vector);
    }

    fn zeros(len: usize) -> Vec<Self> {
        vec![0.0; len]
    }
}

impl Real for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Rounds to the nearest, to even in the middle; without a branch, so that loops over it are vectorized.
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
    }

    #[inline(always)]
    fn partial_load<S: Simd>(simd: S, from: &[Self]) -> S::f32s {
        let mut vector = [simd.splat_f32s(0.0)];
        for (lane, x) in cast_slice_mut::<S::f32s, f32>(&mut vector).iter_mut().zip(from) {
            *lane = x.widen();
        }
        vector[0]
    }

    #[inline(always)]
    fn partial_store<S: Simd>(_: S, vector: S::f32s, to: &mut [Self]) {
        for (to, lane) in to.iter_mut().zip(cast_slice::<S::f32s, f32>(&[vector])) {
            *to = Self::narrow(*lane);
        }
    }

    fn zeros(len: usize) -> Vec<Self> {
        vec![0u16; len].reinterpret_into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                let (ours, theirs) = (<bf16 as Real>::narrow(x), bf16::from_f32(x));
                assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{x}: {ours} {theirs}");
            }
            let x = bf16::from_bits(high);
            assert!(x.widen() == x.to_f32() || x.is_nan());
        }
    }
}
