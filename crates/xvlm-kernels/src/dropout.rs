//! Dropout (Srivastava et al. 2014) and stochastic depth (Huang et al. 2016).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, differentiable_by_gradient};
use crate::host::{read, written};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::vectorized;

/// Which numbers are dropped: each with a probability, the others are divided by what is left of it (inverted dropout).
///
/// The choice is a function of the seed and of a number's place, so that nothing is kept for the backward pass, and neither the
/// number of threads nor the device changes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Of a number to become 0; at least 0 and below 1.
    pub probability: f64,
    /// What the choice follows from.
    pub seed: u64,
}

/// Numbers that have one [`Part`].
const PART: usize = 1 << 14;

impl Dropout {
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        if (0.0..1.0).contains(&self.probability) {
            return Ok(());
        }
        let (expected, found) = ("at least 0 and below 1".into(), self.probability.to_string());
        Err(KernelError::Value { op, argument: "probability", expected, found }.into())
    }

    /// The choice among the numbers of one of several parts.
    pub(crate) fn part(&self, part: usize) -> Part {
        // SplitMix64 (Steele, Lea and Flood 2014), whose neighbouring numbers have nothing to do with each other.
        let mut z = self.seed.wrapping_add((part as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let least = (self.probability * (1u64 << 32) as f64) as u32;
        Part { keys: [z as u32, (z >> 32) as u32], least, scale: (1.0 / (1.0 - self.probability)) as f32 }
    }

    /// What `count` numbers in parts of `size` are multiplied by.
    pub(crate) fn factors(&self, count: usize, size: usize) -> Vec<f32> {
        let mut factors = vec![1f32; count];
        factors.par_chunks_mut(size.max(1)).enumerate().for_each(|(i, factors)| self.part(i).multiply(factors, 0, 1));
        factors
    }
}

/// The choice among up to 2³² numbers.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    keys: [u32; 2],
    /// What is drawn below it is dropped.
    least: u32,
    scale: f32,
}

impl Part {
    /// What the number at a place is multiplied by.
    #[inline(always)]
    pub(crate) fn factor(&self, place: u32) -> f32 {
        // lowbias32 (Wellons 2018), with a key before and amid its rounds.
        let mut x = place.wrapping_mul(0x9e37_79b9) ^ self.keys[0];
        x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
        x = (x ^ (x >> 15) ^ self.keys[1]).wrapping_mul(0x846c_a68b);
        x ^= x >> 16;
        if x < self.least { 0.0 } else { self.scale }
    }

    /// Multiplies numbers whose places are `start`, `start + step`, ..
    pub(crate) fn multiply(&self, values: &mut [f32], start: u32, step: u32) {
        let part = *self;
        vectorized(
            #[inline(always)]
            || {
                for (i, x) in (0u32..).zip(values.iter_mut()) {
                    *x *= part.factor(start.wrapping_add(i.wrapping_mul(step)));
                }
            },
        );
    }
}

/// Sets each number of `x` to 0 or scales it up, as `dropout` says.
///
/// # Errors
/// If the probability is not in 0..1.
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    const OP: &str = "dropout";
    dropout.check(OP)?;
    if !matches!(Path::for_tensor(x), Path::HostF32 | Path::HostBf16) {
        let factors = Tensor::from_vec(dropout.factors(x.elem_count(), PART), x.shape(), x.device())?;
        return x * factors.to_dtype(x.dtype())?;
    }
    let x = &x.contiguous()?;
    differentiable_by_gradient(OP, [x], drop(x, &dropout)?, move |gradient| {
        Ok([Some(drop(gradient, &dropout)?.detached())])
    })
}

fn drop(x: &Tensor, dropout: &Dropout) -> Result<Fresh> {
    fused!(x, T => {
        let values = &*read::<T>(x)?;
        Ok(written(x.shape(), |out: &mut [T]| {
            out.par_chunks_mut(PART).zip(values.par_chunks(PART)).enumerate().for_each(|(i, (out, values))| {
                let part = dropout.part(i);
                vectorized(
                    #[inline(always)]
                    || {
                        for (place, (out, x)) in (0u32..).zip(out.iter_mut().zip(values)) {
                            *out = T::narrow(part.factor(place) * x.widen());
                        }
                    },
                );
            });
        }))
    }; candle_core::bail!("dropout: no kernel of its own on a GPU"))
}

/// The end of a residual branch: `x + scale · branch`, both `[N, ..]`, with a scale for each of `N` samples if there are any.
/// Scales of 0 and of 1 over the probability to be kept are stochastic depth.
///
/// # Errors
/// If `branch` has not the shape of `x`, or there is not one scale a sample.
pub fn add_branch(x: &Tensor, branch: &Tensor, scales: Option<&[f32]>) -> Result<Tensor> {
    const OP: &str = "add_branch";
    check_shape(OP, "branch", branch, x.dims())?;
    let samples = x.dims().first().copied().unwrap_or(1);
    if let Some(scales) = scales.filter(|scales| scales.len() != samples) {
        let (expected, found) = (format!("{samples} numbers"), scales.len().to_string());
        return Err(KernelError::Value { op: OP, argument: "scales", expected, found }.into());
    }
    let path = Path::of(OP, &[("x", x), ("branch", branch)])?;
    if !matches!(path, Path::HostF32 | Path::HostBf16) {
        let Some(scales) = scales else { return x + branch };
        let mut shape = vec![1; x.rank()];
        shape[0] = samples;
        let scales = Tensor::from_slice(scales, shape, x.device())?.to_dtype(x.dtype())?;
        return x + branch.broadcast_mul(&scales)?;
    }
    let (x, branch, scales) = (&x.contiguous()?, &branch.contiguous()?, scales.map(<[f32]>::to_vec));
    let y = add_scaled(Some(x), branch, scales.as_deref().unwrap_or(&[1.0]))?;
    differentiable_by_gradient(OP, [x, branch], y, move |gradient| {
        let of_branch = match &scales {
            Some(scales) => add_scaled(None, gradient, scales)?.detached(),
            None => gradient.clone(),
        };
        Ok([Some(gradient.clone()), Some(of_branch)])
    })
}

/// `x + scale · branch`.
fn add_scaled(x: Option<&Tensor>, branch: &Tensor, scales: &[f32]) -> Result<Fresh> {
    fused!(branch, T => {
        let values = &*read::<T>(branch)?;
        let x = x.map(read::<T>).transpose()?;
        let x = x.as_deref();
        let size = values.len() / scales.len().max(1);
        let add = |out: &mut [T], start: usize, scale: f32| {
            let values = &values[start..start + out.len()];
            let x = x.map(|x| &x[start..start + out.len()]);
            vectorized(
                #[inline(always)]
                || match x {
                    Some(x) => {
                        for ((out, y), x) in out.iter_mut().zip(values).zip(x) {
                            *out = T::narrow(scale.mul_add(y.widen(), x.widen()));
                        }
                    }
                    None => out.iter_mut().zip(values).for_each(|(out, y)| *out = T::narrow(scale * y.widen())),
                },
            );
        };
        Ok(written(branch.shape(), |out: &mut [T]| {
            let samples = out.par_chunks_mut(size.max(1)).zip(scales).enumerate();
            samples.for_each(|(i, (out, &scale))| {
                let parts = out.par_chunks_mut(PART).enumerate();
                parts.for_each(|(j, out)| add(out, i * size + j * PART, scale));
            });
        }))
    }; candle_core::bail!("add_branch: no kernel of its own on a GPU"))
}
