//! Softmax and its logarithm.

use std::marker::PhantomData;

use candle_core::shape::Dim;
use candle_core::{D, DType, Result, Tensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::graph::{Fresh, differentiable_by_result};
use crate::host::{read, written};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::row::{ROWS, SUMS, each, exp, load, max, rows_together, store, total};
use crate::simd::{self, fold};

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
        Kind::Softmax => map_rows::<Softmax, T, T, T>((x, x)),
        Kind::Logarithm => map_rows::<Logarithm, T, T, f32>((x, x)),
    }; gpu::forward(kind, x))?;
    differentiable_by_result(op, [x], y, move |[x], y, gradient| {
        let dx: Fresh = fused!(x, T => match kind {
            Kind::Softmax => map_rows::<SoftmaxBackward, T, T, T>((y, gradient)),
            Kind::Logarithm => map_rows::<LogarithmBackward, f32, f32, T>((y, gradient)),
        }; gpu::backward(kind, x, y, gradient))?;
        Ok([Some(dx.detached())])
    })
}

/// Computes at most [`ROWS`] rows of `Out` from as many of `A` and `B`; `scratch` has their size.
trait Compute<A, B, Out> {
    fn rows<S: Simd>(simd: S, width: usize, out: &mut [Out], inputs: (&[A], &[B]), scratch: &mut [f32]);
}

fn map_rows<C: Compute<A, B, Out>, A: Real, B: Real, Out: Real>((a, b): (&Tensor, &Tensor)) -> Result<Fresh> {
    /// Numbers a thread takes at a time, about.
    const CHUNK: usize = 1 << 14;
    let shape = a.shape();
    let (a, b) = (&*read::<A>(a)?, &*read::<B>(b)?);
    let width = shape.dims().last().copied().unwrap_or(1).max(1);
    let chunk = CHUNK.next_multiple_of(width);
    Ok(written(shape, |out: &mut [Out]| {
        let parts = out.par_chunks_mut(chunk).zip(a.par_chunks(chunk)).zip(b.par_chunks(chunk));
        parts.for_each(|((out, a), b)| {
            pulp::Arch::new().dispatch(Part { width, out, a, b, compute: PhantomData::<C> });
        });
    }))
}

/// The rows of one thread.
struct Part<'a, C, A, B, Out> {
    width: usize,
    out: &'a mut [Out],
    a: &'a [A],
    b: &'a [B],
    compute: PhantomData<C>,
}

impl<C: Compute<A, B, Out>, A, B, Out> WithSimd for Part<'_, C, A, B, Out> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { width, out, a, b, .. } = self;
        let size = rows_together(width) * width;
        let mut scratch = vec![0f32; size];
        for ((out, a), b) in out.chunks_mut(size).zip(a.chunks(size)).zip(b.chunks(size)) {
            C::rows(simd, width, out, (a, b), &mut scratch);
        }
    }
}

struct Softmax;

impl<T: Real> Compute<T, T, T> for Softmax {
    #[inline(always)]
    fn rows<S: Simd>(simd: S, width: usize, out: &mut [T], (x, _): (&[T], &[T]), powers: &mut [f32]) {
        let (mut tops, mut totals) = ([0f32; ROWS], [0f32; ROWS]);
        for (top, x) in tops.iter_mut().zip(x.chunks_exact(width)) {
            *top = max(simd, x);
        }
        let rows = x.chunks_exact(width).zip(powers.chunks_exact_mut(width));
        for ((x, powers), (top, sum)) in rows.zip(tops.iter().zip(&mut totals)) {
            let top = simd.splat_f32s(*top);
            let mut sums = [simd.splat_f32s(0.0); SUMS];
            each(
                simd,
                width,
                #[inline(always)]
                |at, i| {
                    let power = exp(simd, simd.sub_f32s(load(simd, &x[at.clone()], f32::NEG_INFINITY), top));
                    sums[i] = simd.add_f32s(sums[i], power);
                    store(simd, power, &mut powers[at]);
                },
            );
            *sum = total(simd, sums);
        }
        let rows = out.chunks_exact_mut(width).zip(powers.chunks_exact(width));
        for ((out, powers), total) in rows.zip(totals) {
            let scale = simd.splat_f32s(1.0 / total);
            each(
                simd,
                width,
                #[inline(always)]
                |at, _| store(simd, simd.mul_f32s(load(simd, &powers[at.clone()], 0.0), scale), &mut out[at]),
            );
        }
    }
}

struct Logarithm;

impl<T: Real> Compute<T, T, f32> for Logarithm {
    #[inline(always)]
    fn rows<S: Simd>(simd: S, width: usize, out: &mut [f32], (x, _): (&[T], &[T]), _: &mut [f32]) {
        let (mut tops, mut totals) = ([0f32; ROWS], [0f32; ROWS]);
        for (top, x) in tops.iter_mut().zip(x.chunks_exact(width)) {
            *top = max(simd, x);
        }
        for ((top, sum), x) in tops.iter().zip(&mut totals).zip(x.chunks_exact(width)) {
            let top = simd.splat_f32s(*top);
            let mut sums = [simd.splat_f32s(0.0); SUMS];
            each(
                simd,
                width,
                #[inline(always)]
                |at, i| {
                    let power = exp(simd, simd.sub_f32s(load(simd, &x[at], f32::NEG_INFINITY), top));
                    sums[i] = simd.add_f32s(sums[i], power);
                },
            );
            *sum = total(simd, sums);
        }
        let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
        for ((out, x), (top, total)) in rows.zip(tops.into_iter().zip(totals)) {
            let (top, log_total) = (simd.splat_f32s(top), simd.splat_f32s(total.ln()));
            each(
                simd,
                width,
                #[inline(always)]
                |at, _| {
                    let shifted = simd.sub_f32s(load(simd, &x[at.clone()], 0.0), top);
                    store(simd, simd.sub_f32s(shifted, log_total), &mut out[at]);
                },
            );
        }
    }
}

struct SoftmaxBackward;

impl<T: Real> Compute<T, T, T> for SoftmaxBackward {
    #[inline(always)]
    fn rows<S: Simd>(simd: S, width: usize, out: &mut [T], (y, g): (&[T], &[T]), _: &mut [f32]) {
        let mut means = [0f32; ROWS];
        for ((mean, y), g) in means.iter_mut().zip(y.chunks_exact(width)).zip(g.chunks_exact(width)) {
            let mut sums = [simd.splat_f32s(0.0); SUMS];
            each(
                simd,
                width,
                #[inline(always)]
                |at, i| {
                    let (y, g) = (load(simd, &y[at.clone()], 0.0), load(simd, &g[at], 0.0));
                    sums[i] = simd.mul_add_e_f32s(y, g, sums[i]);
                },
            );
            *mean = total(simd, sums);
        }
        let inputs = y.chunks_exact(width).zip(g.chunks_exact(width));
        for ((out, (y, g)), mean) in out.chunks_exact_mut(width).zip(inputs).zip(means) {
            let mean = simd.splat_f32s(mean);
            each(
                simd,
                width,
                #[inline(always)]
                |at, _| {
                    let (y, g) = (load(simd, &y[at.clone()], 0.0), load(simd, &g[at.clone()], 0.0));
                    store(simd, simd.mul_f32s(y, simd.sub_f32s(g, mean)), &mut out[at]);
                },
            );
        }
    }
}

struct LogarithmBackward;

impl<T: Real> Compute<f32, f32, T> for LogarithmBackward {
    #[inline(always)]
    fn rows<S: Simd>(simd: S, width: usize, out: &mut [T], (y, g): (&[f32], &[f32]), _: &mut [f32]) {
        let mut totals = [0f32; ROWS];
        for (sum, g) in totals.iter_mut().zip(g.chunks_exact(width)) {
            let mut sums = [simd.splat_f32s(0.0); SUMS];
            each(
                simd,
                width,
                #[inline(always)]
                |at, i| sums[i] = simd.add_f32s(sums[i], load(simd, &g[at], 0.0)),
            );
            *sum = total(simd, sums);
        }
        let inputs = y.chunks_exact(width).zip(g.chunks_exact(width));
        for ((out, (y, g)), total) in out.chunks_exact_mut(width).zip(inputs).zip(totals) {
            let total = simd.splat_f32s(total);
            each(
                simd,
                width,
                #[inline(always)]
                |at, _| {
                    let (power, g) = (exp(simd, load(simd, &y[at.clone()], 0.0)), load(simd, &g[at.clone()], 0.0));
                    store(simd, simd.sub_f32s(g, simd.mul_f32s(power, total)), &mut out[at]);
                },
            );
        }
    }
}

/// ln Σ eˣ in two parts: the largest number, and what to add to it. Reads the numbers from memory once.
#[inline(always)]
pub(crate) fn log_sum_exp<T: Real>(x: &[T]) -> (f32, f32) {
    /// Numbers that stay in the nearest cache between the search for their maximum and their sum.
    const BLOCK: usize = 2048;
    let (mut top, mut total) = (f32::NEG_INFINITY, 0f32);
    for block in x.chunks(BLOCK) {
        let new_top = top.max(simd::max(block));
        // As long as all are −∞ their powers are 0 whatever is subtracted, while ∞ − ∞ is none.
        let shift = if new_top == f32::NEG_INFINITY { 0.0 } else { new_top };
        let power = |total: f32, x: T, _| total + simd::exp(x.widen() - shift);
        total = total * simd::exp(top - shift) + fold(block, block, 0.0, power, |a, b| a + b);
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
