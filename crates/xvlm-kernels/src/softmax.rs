//! Softmax and its logarithm.

use candle_core::shape::Dim;
use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

use crate::graph::{Fresh, differentiable};
use crate::host::{read, written};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::{exp, fold, max, sum, vectorized};

/// Softmax along a dimension, in the type of `x`; sums are f32 for half types. A row that is −∞ throughout has none: NaN.
pub fn softmax<I: Dim>(x: &Tensor, dim: I) -> Result<Tensor> {
    along("softmax", Kind::Softmax, x, dim)
}

/// Logarithm of the softmax along a dimension, in f32 for half types.
pub fn log_softmax<I: Dim>(x: &Tensor, dim: I) -> Result<Tensor> {
    along("log_softmax", Kind::Logarithm, x, dim)
}

/// In `f32` if it was of a half type.
pub(crate) fn widened(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32),
        _ => Ok(x.clone()),
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Softmax,
    Logarithm,
}

fn along<I: Dim>(op: &'static str, kind: Kind, x: &Tensor, dim: I) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), op)?;
    if Path::for_tensor(x) == Path::Composed {
        let wide = widened(x)?;
        if wide.elem_count() == 0 {
            return if let Kind::Softmax = kind { Ok(x.clone()) } else { Ok(wide) };
        }
        let shifted = wide.broadcast_sub(&wide.detach().max_keepdim(dim)?)?;
        let exponent = shifted.exp()?;
        let total = exponent.sum_keepdim(dim)?;
        return match kind {
            Kind::Softmax => exponent.broadcast_div(&total)?.to_dtype(x.dtype()),
            Kind::Logarithm => shifted.broadcast_sub(&total.log()?),
        };
    }
    if dim + 1 < x.rank() {
        return along(op, kind, &x.transpose(dim, D::Minus1)?, D::Minus1)?.transpose(dim, D::Minus1)?.contiguous();
    }
    let x = &x.contiguous()?;
    let y = fused!(x, T => match kind {
        Kind::Softmax => softmax_on_host::<T>(x),
        Kind::Logarithm => logarithm_on_host::<T>(x),
    }; gpu::forward(kind, x))?;
    differentiable(op, [x], y, move |[x], y, gradient| {
        let dx: Fresh = fused!(x, T => match kind {
            Kind::Softmax => softmax_backward_on_host::<T>(y, gradient),
            Kind::Logarithm => logarithm_backward_on_host::<T>(y, gradient),
        }; gpu::backward(kind, x, y, gradient))?;
        Ok([Some(dx.detached())])
    })
}

/// Computes rows of `Out` from rows of an `A` and of a `B`; `scratch` has the width of a row.
fn map_rows<A: Real, B: Real, Out: Real>(
    (a, b): (&Tensor, &Tensor),
    row: impl Fn(&mut [Out], &[A], &[B], &mut [f32]) + Sync,
) -> Result<Fresh> {
    /// Numbers a thread takes at a time, about.
    const CHUNK: usize = 1 << 14;
    let shape = a.shape();
    let (a, b) = (&*read::<A>(a)?, &*read::<B>(b)?);
    let width = shape.dims().last().copied().unwrap_or(1).max(1);
    let chunk = CHUNK.next_multiple_of(width);
    Ok(written(shape, |out: &mut [Out]| {
        let parts = out.par_chunks_mut(chunk).zip(a.par_chunks(chunk)).zip(b.par_chunks(chunk));
        parts.for_each(|((out, a), b)| {
            vectorized(
                #[inline(always)]
                || {
                    let mut scratch = vec![0f32; width];
                    let rows = out.chunks_exact_mut(width).zip(a.chunks_exact(width)).zip(b.chunks_exact(width));
                    for ((out, a), b) in rows {
                        row(out, a, b, &mut scratch);
                    }
                },
            );
        });
    }))
}

fn softmax_on_host<T: Real>(x: &Tensor) -> Result<Fresh> {
    map_rows(
        (x, x),
        #[inline(always)]
        |out: &mut [T], x: &[T], _: &[T], powers| {
            let top = max(x);
            for (power, x) in powers.iter_mut().zip(x) {
                *power = exp(x.widen() - top);
            }
            let scale = 1.0 / sum(powers);
            for (out, power) in out.iter_mut().zip(&*powers) {
                *out = T::narrow(power * scale);
            }
        },
    )
}

fn logarithm_on_host<T: Real>(x: &Tensor) -> Result<Fresh> {
    map_rows(
        (x, x),
        #[inline(always)]
        |out: &mut [f32], x: &[T], _: &[T], _| {
            let (top, log_total) = log_sum_exp(x);
            for (out, x) in out.iter_mut().zip(x) {
                *out = x.widen() - top - log_total;
            }
        },
    )
}

fn softmax_backward_on_host<T: Real>(y: &Tensor, gradient: &Tensor) -> Result<Fresh> {
    map_rows(
        (y, gradient),
        #[inline(always)]
        |out: &mut [T], y: &[T], g: &[T], _| {
            let projected = |total: f32, y: T, g: T| y.widen().mul_add(g.widen(), total);
            let mean = fold(y, g, 0.0, projected, |a, b| a + b);
            for ((out, y), g) in out.iter_mut().zip(y).zip(g) {
                *out = T::narrow(y.widen() * (g.widen() - mean));
            }
        },
    )
}

fn logarithm_backward_on_host<T: Real>(y: &Tensor, gradient: &Tensor) -> Result<Fresh> {
    map_rows(
        (y, gradient),
        #[inline(always)]
        |out: &mut [T], y: &[f32], g: &[f32], _| {
            let total = sum(g);
            for ((out, y), g) in out.iter_mut().zip(y).zip(g) {
                *out = T::narrow(g - exp(*y) * total);
            }
        },
    )
}

/// ln Σ eˣ in two parts: the largest number, and what to add to it. Reads the numbers from memory once.
#[inline(always)]
pub(crate) fn log_sum_exp<T: Real>(x: &[T]) -> (f32, f32) {
    /// Numbers that stay in the nearest cache between the search for their maximum and their sum.
    const BLOCK: usize = 2048;
    let (mut top, mut total) = (f32::NEG_INFINITY, 0f32);
    for block in x.chunks(BLOCK) {
        let new_top = top.max(max(block));
        // As long as all are −∞ their powers are 0 whatever is subtracted, while ∞ − ∞ is none.
        let shift = if new_top == f32::NEG_INFINITY { 0.0 } else { new_top };
        let power = |total: f32, x: T, _| total + exp(x.widen() - shift);
        total = total * exp(top - shift) + fold(block, block, 0.0, power, |a, b| a + b);
        top = new_top;
    }
    (top, total.ln())
}

#[cfg(gpu)]
mod gpu {
    use candle_core::{DType, Result, Tensor};

    use super::Kind;
    use crate::gpu::{Arg, Buffer, Kernel, Team, launch};
    use crate::graph::Fresh;

    pub(super) fn forward(kind: Kind, x: &Tensor) -> Result<Fresh> {
        let (name, dtype) = match kind {
            Kind::Softmax => ("softmax", x.dtype()),
            Kind::Logarithm => ("log_softmax", DType::F32),
        };
        let out = Buffer::new(x, dtype, x.shape())?;
        run(name, x, vec![Arg::In(x)], out)
    }

    pub(super) fn backward(kind: Kind, x: &Tensor, y: &Tensor, gradient: &Tensor) -> Result<Fresh> {
        let name = match kind {
            Kind::Softmax => "softmax_backward",
            Kind::Logarithm => "log_softmax_backward",
        };
        run(name, x, vec![Arg::In(y), Arg::In(gradient)], Buffer::like(x, x.shape())?)
    }

    fn run(name: &'static str, x: &Tensor, inputs: Vec<Arg>, mut out: Buffer) -> Result<Fresh> {
        let width = x.dims().last().copied().unwrap_or(1);
        let rows = x.elem_count() / width.max(1);
        let team = Team::of(rows, width, x.dtype());
        let mut arguments: Vec<Arg> = inputs.into_iter().chain([Arg::Out(&mut out)]).collect();
        arguments.extend([Arg::size(rows)?, Arg::size(width)?, Arg::U32(team.lanes)]);
        launch(Kernel { file: "softmax", name }, x, x.dtype(), team.grid, &mut arguments)?;
        drop(arguments);
        Ok(out.into())
    }
}
