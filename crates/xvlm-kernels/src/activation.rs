//! The activations of feed-forward layers.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::columns::column_sums;
use crate::error::check_shape;
use crate::graph::{Fresh, differentiable};
use crate::host::{read, written};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::{erf, exp, vectorized};

/// GELU in its erf form, `x · Φ(x)`, of any shape; within 1e-6 of the exact value in `f32`.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    activate("gelu", Curve::Gelu, x)
}

/// The gradient of what [`gelu`] was given, on a fused path: of `x`, and the gradient of the result, both contiguous.
pub(crate) fn gelu_gradient(x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    Ok(backward(Curve::Gelu, x, None, gradient)?.detached())
}

/// `gelu(x + bias)`: `x [.., C]`, `bias [C]`.
///
/// # Errors
/// If `bias` is not `[C]`.
pub fn bias_gelu(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    const OP: &str = "bias_gelu";
    check_shape(OP, "bias", bias, &[x.dims().last().copied().unwrap_or(1)])?;
    if Path::of(OP, &[("x", x), ("bias", bias)])? == Path::Composed {
        return x.broadcast_add(bias)?.gelu_erf();
    }
    let (x, bias) = (&x.contiguous()?, &bias.contiguous()?);
    let y = forward(Curve::Gelu, x, Some(bias))?;
    differentiable(OP, [x, bias], y, |[x, bias], gradient| {
        let dx = backward(Curve::Gelu, x, Some(bias), gradient)?.detached();
        let db = bias.track_op().then(|| column_sums(&dx)).transpose()?;
        Ok([Some(dx), db])
    })
}

/// `x · σ(1.702 x)`: CLIP's cheap stand-in for GELU.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    activate("quick_gelu", Curve::QuickGelu, x)
}

fn activate(op: &'static str, curve: Curve, x: &Tensor) -> Result<Tensor> {
    if Path::for_tensor(x) == Path::Composed {
        return curve.composed(x);
    }
    let x = &x.contiguous()?;
    differentiable(op, [x], forward(curve, x, None)?, move |[x], gradient| {
        Ok([Some(backward(curve, x, None, gradient)?.detached())])
    })
}

#[derive(Clone, Copy)]
pub(crate) enum Curve {
    Gelu,
    QuickGelu,
}

impl Curve {
    fn composed(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gelu => x.gelu_erf(),
            // As a hyperbolic tangent the sigmoid overflows nowhere, nor does its gradient.
            Self::QuickGelu => x * (x * 0.851)?.tanh()?.affine(0.5, 0.5)?,
        }
    }

    #[cfg(gpu)]
    fn kernel(self, backward: bool) -> crate::gpu::Kernel {
        let name = match (self, backward) {
            (Self::Gelu, false) => "gelu",
            (Self::Gelu, true) => "gelu_backward",
            (Self::QuickGelu, false) => "quick_gelu",
            (Self::QuickGelu, true) => "quick_gelu_backward",
        };
        crate::gpu::Kernel { file: "activation", name }
    }
}

/// The curve at a point.
#[inline(always)]
pub(crate) fn value(curve: Curve, x: f32) -> f32 {
    match curve {
        Curve::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
        Curve::QuickGelu => x / (1.0 + exp(-1.702 * x)),
    }
}

#[inline(always)]
fn slope(curve: Curve, x: f32) -> f32 {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    match curve {
        Curve::Gelu => {
            let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
            cdf + x * INV_SQRT_2PI * exp(-0.5 * x * x)
        }
        Curve::QuickGelu => {
            let gate = 1.0 / (1.0 + exp(-1.702 * x));
            gate + 1.702 * x * gate * (1.0 - gate)
        }
    }
}

/// `curve(x + bias)`.
fn forward(curve: Curve, x: &Tensor, bias: Option<&Tensor>) -> Result<Fresh> {
    fused!(x, T => {
        // A constant curve in each loop, so that the loop has no branch.
        match curve {
            Curve::Gelu => on_host::<T>(x, bias, None, #[inline(always)] |x, _| value(Curve::Gelu, x)),
            Curve::QuickGelu => on_host::<T>(x, bias, None, #[inline(always)] |x, _| value(Curve::QuickGelu, x)),
        }
    }; on_gpu(curve, x, bias, None))
}

/// `gradient · curve'(x + bias)`.
fn backward(curve: Curve, x: &Tensor, bias: Option<&Tensor>, gradient: &Tensor) -> Result<Fresh> {
    let gradient = Some(gradient);
    fused!(x, T => match curve {
        Curve::Gelu => on_host::<T>(x, bias, gradient, #[inline(always)] |x, g| g * slope(Curve::Gelu, x)),
        Curve::QuickGelu => on_host::<T>(x, bias, gradient, #[inline(always)] |x, g| g * slope(Curve::QuickGelu, x)),
    }; on_gpu(curve, x, bias, gradient))
}

/// `f(x + bias, gradient)` of each number; without a gradient `f` is handed `x + bias` twice.
fn on_host<T: Real>(
    x: &Tensor,
    bias: Option<&Tensor>,
    gradient: Option<&Tensor>,
    f: impl Fn(f32, f32) -> f32 + Sync,
) -> Result<Fresh> {
    /// Numbers a thread takes at a time, about.
    const CHUNK: usize = 1 << 14;
    let values = &*read::<T>(x)?;
    let gradients = gradient.map(read::<T>).transpose()?;
    let gradients = gradients.as_deref().unwrap_or(values);
    let shifts = bias.map(read::<T>).transpose()?;
    let shifts = shifts.as_deref();
    let width = shifts.map_or(CHUNK, <[T]>::len).max(1);
    let chunk = CHUNK.next_multiple_of(width);
    Ok(written(x.shape(), |out: &mut [T]| {
        let parts = out.par_chunks_mut(chunk).zip(values.par_chunks(chunk)).zip(gradients.par_chunks(chunk));
        parts.for_each(|((out, x), g)| {
            vectorized(
                #[inline(always)]
                || match shifts {
                    Some(shifts) => {
                        let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(g.chunks_exact(width));
                        for ((out, x), g) in rows {
                            for (((out, x), g), b) in out.iter_mut().zip(x).zip(g).zip(shifts) {
                                *out = T::narrow(f(x.widen() + b.widen(), g.widen()));
                            }
                        }
                    }
                    None => {
                        for ((out, x), g) in out.iter_mut().zip(x).zip(g) {
                            *out = T::narrow(f(x.widen(), g.widen()));
                        }
                    }
                },
            );
        });
    }))
}

#[cfg(gpu)]
fn on_gpu(curve: Curve, x: &Tensor, bias: Option<&Tensor>, gradient: Option<&Tensor>) -> Result<Fresh> {
    use crate::gpu::{Arg, Buffer, Grid, launch};
    const THREADS: u32 = 256;
    // What a thread works on: four packs of sixteen bytes.
    let per_thread = 64 / x.dtype().size_in_bytes();
    let count = x.elem_count();
    let width = bias.map_or(1, Tensor::elem_count);
    let mut out = Buffer::like(x, x.shape())?;
    let grid = Grid::line(count.div_ceil(THREADS as usize * per_thread), THREADS);
    let mut arguments = vec![Arg::In(x), bias.map_or(Arg::Absent, Arg::In)];
    arguments.extend(gradient.map(Arg::In));
    arguments.extend([Arg::Out(&mut out), Arg::size(count)?, Arg::size(width)?]);
    launch(curve.kernel(gradient.is_some()), x, x.dtype(), grid, &mut arguments)?;
    Ok(out.into())
}
