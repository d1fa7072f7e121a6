//! Layer normalisation (Ba, Kiros and Hinton 2016).

use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, differentiable};
use crate::host::{read, written};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::{add_assign, dot, moments, sum, vectorized};

/// Layer normalisation over the last dimension: `x [.., C]`, `weight [C]`, `bias [C]`. Statistics are f32 for half types.
///
/// # Errors
/// If `x` has no columns, or `weight` or `bias` is not `[C]`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    const OP: &str = "layer_norm";
    check_parameters(OP, x, weight, bias)?;
    if Path::of(OP, &[("x", x), ("weight", weight), ("bias", bias)])? == Path::Composed {
        return composed(x, weight, bias, eps);
    }
    let [x, weight, bias] = &[x.contiguous()?, weight.contiguous()?, bias.contiguous()?];
    let (y, moments) = forward([x, weight, bias], None, eps as f32)?;
    differentiable(OP, [x, weight, bias], y, move |[x, weight, bias], _, gradient| {
        let (dx, parameters) = backward([x, weight], None, &moments, gradient)?;
        let parameter = |row: usize, of: &Tensor| of.track_op().then(|| parameters.get(row)).transpose();
        Ok([x.track_op().then_some(dx), parameter(0, weight)?, parameter(1, bias)?])
    })
}

/// `layer_norm(x + residual)`, what follows each half of a layer that normalises last, such as BERT's: `x [.., C]`,
/// `residual` of the same shape, `weight [C]`, `bias [C]`. The sum is f32 for half types and is not kept.
///
/// # Errors
/// If `x` has no columns, `residual` has not its shape, or `weight` or `bias` is not `[C]`.
pub fn add_layer_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    const OP: &str = "add_layer_norm";
    check_shape(OP, "residual", residual, x.dims())?;
    check_parameters(OP, x, weight, bias)?;
    let arguments = [("x", x), ("residual", residual), ("weight", weight), ("bias", bias)];
    if Path::of(OP, &arguments)? == Path::Composed {
        return composed(&(x + residual)?, weight, bias, eps);
    }
    let [x, residual] = &[x.contiguous()?, residual.contiguous()?];
    let [weight, bias] = &[weight.contiguous()?, bias.contiguous()?];
    let (y, moments) = forward([x, weight, bias], Some(residual), eps as f32)?;
    // An operation has three inputs: weight and bias are one of them.
    let parameters = &Tensor::stack(&[weight, bias], 0)?;
    let weight = weight.detach();
    differentiable(OP, [x, residual, parameters], y, move |[x, residual, parameters], _, gradient| {
        let (dx, dparameters) = backward([x, &weight], Some(residual), &moments, gradient)?;
        let to = |summand: &Tensor| summand.track_op().then(|| dx.clone());
        Ok([to(x), to(residual), parameters.track_op().then_some(dparameters)])
    })
}

fn check_parameters(op: &'static str, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<()> {
    let Some(&width) = x.dims().last().filter(|width| **width > 0) else {
        let (expected, found) = ("[.., C] with C above 0".into(), x.dims().to_vec());
        return Err(KernelError::Shape { op, argument: "x", expected, found }.into());
    };
    check_shape(op, "weight", weight, &[width])?;
    check_shape(op, "bias", bias, &[width])
}

fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let statistics = if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype };
    let x = x.to_dtype(statistics)?;
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normalised = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    normalised.to_dtype(dtype)?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// The result, and of each row the mean and the reciprocal of the standard deviation `[rows, 2]` in `f32`.
fn forward(inputs: [&Tensor; 3], residual: Option<&Tensor>, eps: f32) -> Result<(Fresh, Tensor)> {
    fused!(inputs[0], T => forward_on_host::<T>(inputs, residual, eps); gpu::forward(inputs, residual, eps))
}

/// The gradient of `x` (and of the residual), and that of weight and bias as `[2, C]`.
fn backward(
    inputs: [&Tensor; 2],
    residual: Option<&Tensor>,
    moments: &Tensor,
    gradient: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (dx, parameters) = fused!(inputs[0], T => {
        backward_on_host::<T>(inputs, residual, moments, gradient)
    }; gpu::backward(inputs, residual, moments, gradient))?;
    Ok((dx.detached(), parameters.detached()))
}

/// Rows a thread takes at a time; it does not depend on the number of threads, nor then do sums over rows.
fn rows_at_a_time(width: usize) -> usize {
    ((1 << 14) / width.max(1)).max(32)
}

/// `x + residual` of one row.
#[inline(always)]
fn load<T: Real>(row: &mut [f32], x: &[T], residual: Option<&[T]>) {
    match residual {
        Some(residual) => {
            for ((sum, x), residual) in row.iter_mut().zip(x).zip(residual) {
                *sum = x.widen() + residual.widen();
            }
        }
        None => {
            for (sum, x) in row.iter_mut().zip(x) {
                *sum = x.widen();
            }
        }
    }
}

fn forward_on_host<T: Real>(
    [x, weight, bias]: [&Tensor; 3],
    residual: Option<&Tensor>,
    eps: f32,
) -> Result<(Fresh, Tensor)> {
    let (width, shape) = (weight.elem_count().max(1), x.shape());
    let (x, weight, bias) = (&*read::<T>(x)?, &*read::<T>(weight)?, &*read::<T>(bias)?);
    let residual = residual.map(read::<T>).transpose()?;
    let residual = residual.as_deref();
    let rows = rows_at_a_time(width);
    let mut statistics = vec![0f32; x.len() / width * 2];
    let y = written(shape, |out: &mut [T]| {
        let parts = out.par_chunks_mut(rows * width).zip(statistics.par_chunks_mut(rows * 2)).enumerate();
        parts.for_each(|(part, (out, statistics))| {
            vectorized(
                #[inline(always)]
                || {
                    let mut row = vec![0f32; width];
                    let outputs = out.chunks_exact_mut(width).zip(statistics.chunks_exact_mut(2)).enumerate();
                    for (i, (out, statistics)) in outputs {
                        let start = (part * rows + i) * width;
                        let here = start..start + width;
                        load(&mut row, &x[here.clone()], residual.map(|residual| &residual[here]));
                        let (mean, scale) = moments(&row, eps);
                        statistics.copy_from_slice(&[mean, scale]);
                        for (((out, x), w), b) in out.iter_mut().zip(&row).zip(weight).zip(bias) {
                            *out = T::narrow(((x - mean) * scale).mul_add(w.widen(), b.widen()));
                        }
                    }
                },
            )
        });
    });
    let statistics = Tensor::from_vec(statistics, (x.len() / width, 2), &candle_core::Device::Cpu)?;
    Ok((y, statistics))
}

fn backward_on_host<T: Real>(
    [x, weight]: [&Tensor; 2],
    residual: Option<&Tensor>,
    moments: &Tensor,
    gradient: &Tensor,
) -> Result<(Fresh, Fresh)> {
    let (width, shape) = (weight.elem_count().max(1), x.shape());
    let (x, weight, gradient) = (&*read::<T>(x)?, &*read::<T>(weight)?, &*read::<T>(gradient)?);
    let residual = residual.map(read::<T>).transpose()?;
    let (residual, statistics) = (residual.as_deref(), &*read::<f32>(moments)?);
    let rows = rows_at_a_time(width);
    let mut sums: Vec<Vec<f32>> = Vec::new();
    let dx = written(shape, |dx: &mut [T]| {
        let parts = dx.par_chunks_mut(rows * width).enumerate();
        let parts = parts.map(|(part, dx)| {
            vectorized(
                #[inline(always)]
                || {
                    let mut parameters = vec![0f32; 2 * width];
                    let (dw, db) = parameters.split_at_mut(width);
                    let (mut normal, mut scaled) = (vec![0f32; width], vec![0f32; width]);
                    for (i, dx) in dx.chunks_exact_mut(width).enumerate() {
                        let row = part * rows + i;
                        let here = row * width..(row + 1) * width;
                        let (mean, scale) = (statistics[2 * row], statistics[2 * row + 1]);
                        load(&mut normal, &x[here.clone()], residual.map(|residual| &residual[here.clone()]));
                        let outputs = normal.iter_mut().zip(&mut scaled).zip(dw.iter_mut()).zip(db.iter_mut());
                        for ((((normal, scaled), dw), db), (g, w)) in outputs.zip(gradient[here].iter().zip(weight)) {
                            let g = g.widen();
                            *normal = (*normal - mean) * scale;
                            *scaled = g * w.widen();
                            *dw = g.mul_add(*normal, *dw);
                            *db += g;
                        }
                        let shift = sum(&scaled) / width as f32;
                        let slope = dot(&scaled, &normal) / width as f32;
                        for ((dx, scaled), normal) in dx.iter_mut().zip(&scaled).zip(&normal) {
                            *dx = T::narrow(scale * (scaled - shift - normal * slope));
                        }
                    }
                    parameters
                },
            )
        });
        sums = parts.collect();
    });
    let mut total = vec![0f32; 2 * weight.len()];
    sums.iter().for_each(|part| add_assign(&mut total, part));
    let parameters = written((2, weight.len()), |out: &mut [T]| {
        out.iter_mut().zip(&total).for_each(|(out, &x)| *out = T::narrow(x));
    });
    Ok((dx, parameters))
}

#[cfg(gpu)]
mod gpu {
    use candle_core::{DType, Result, Tensor};

    use crate::columns::{rows_per_part, totals_on_gpu};
    use crate::gpu::{Arg, Buffer, Grid, Kernel, Team, launch};
    use crate::graph::Fresh;

    fn kernel(name: &'static str) -> Kernel {
        Kernel { file: "norm", name }
    }

    pub(super) fn forward(
        [x, weight, bias]: [&Tensor; 3],
        residual: Option<&Tensor>,
        eps: f32,
    ) -> Result<(Fresh, Tensor)> {
        let width = weight.elem_count();
        let rows = x.elem_count() / width.max(1);
        let team = Team::of(rows, width, x.dtype());
        let (mut out, mut moments) = (Buffer::like(x, x.shape())?, Buffer::new(x, DType::F32, (rows, 2))?);
        let arguments = &mut [
            Arg::In(x),
            residual.map_or(Arg::Absent, Arg::In),
            Arg::In(weight),
            Arg::In(bias),
            Arg::Out(&mut out),
            Arg::Out(&mut moments),
            Arg::size(rows)?,
            Arg::size(width)?,
            Arg::U32(team.lanes),
            Arg::F32(eps),
        ];
        launch(kernel("layer_norm"), x, x.dtype(), team.grid, arguments)?;
        Ok((out.into(), Fresh::from(moments).detached()))
    }

    pub(super) fn backward(
        [x, weight]: [&Tensor; 2],
        residual: Option<&Tensor>,
        moments: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Fresh, Fresh)> {
        const THREADS: u32 = 256;
        let width = weight.elem_count();
        let rows = x.elem_count() / width.max(1);
        let team = Team::of(rows, width, x.dtype());
        let residual = || residual.map_or(Arg::Absent, Arg::In);
        let mut dx = Buffer::like(x, x.shape())?;
        let arguments = &mut [
            Arg::In(x),
            residual(),
            Arg::In(weight),
            Arg::In(moments),
            Arg::In(gradient),
            Arg::Out(&mut dx),
            Arg::size(rows)?,
            Arg::size(width)?,
            Arg::U32(team.lanes),
        ];
        launch(kernel("layer_norm_backward"), x, x.dtype(), team.grid, arguments)?;

        let rows_per_part = rows_per_part(rows);
        let parts = rows.div_ceil(rows_per_part);
        let mut partial = Buffer::new(x, DType::F32, (parts, 2 * width))?;
        let grid = Grid { blocks: [width.div_ceil(THREADS as usize), parts, 1], threads: THREADS, shared: 0 };
        let arguments = &mut [
            Arg::In(x),
            residual(),
            Arg::In(moments),
            Arg::In(gradient),
            Arg::Out(&mut partial),
            Arg::size(rows)?,
            Arg::size(width)?,
            Arg::size(rows_per_part)?,
        ];
        launch(kernel("layer_norm_parameters"), x, x.dtype(), grid, arguments)?;
        Ok((dx.into(), totals_on_gpu(x, &partial, parts, (2, width))?))
    }
}
