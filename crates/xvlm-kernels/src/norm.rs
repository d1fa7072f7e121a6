//! Layer normalisation (Ba, Kiros and Hinton 2016).

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, differentiable, make_again};
use crate::host::{read, written};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::add_assign;
use crate::simd::row::{SUMS, each, load, rows_together, store, total};

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
    let inputs = [x, weight, bias];
    let (y, moments) = forward(inputs, None, eps as f32)?;
    let y = differentiable(OP, inputs, y, move |[x, weight, bias], gradient| {
        let (dx, parameters) = backward([x, weight], None, &moments, gradient)?;
        let parameter = |row: usize, of: &Tensor| of.track_op().then(|| parameters.get(row)).transpose();
        Ok([x.track_op().then_some(dx), parameter(0, weight)?, parameter(1, bias)?])
    })?;
    let inputs = inputs.map(Tensor::clone);
    make_again(&y, move || Ok(forward(inputs.each_ref(), None, eps as f32)?.0));
    Ok(y)
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
    differentiable(OP, [x, residual, parameters], y, move |[x, residual, parameters], gradient| {
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

/// Rows a thread takes at a time on the way back; it does not depend on the number of threads, nor then do sums over rows.
fn rows_at_a_time(width: usize) -> usize {
    ((1 << 14) / width.max(1)).max(32)
}

/// Rows of `x`, or of the sum of `x` and a residual.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    x: &'a [T],
    residual: Option<&'a [T]>,
}

impl<'a, T: Real> Rows<'a, T> {
    #[inline(always)]
    fn slice(self, range: Range<usize>) -> Self {
        Self {
            x: &self.x[range.clone()],
            residual: self.residual.map(
                #[inline(always)]
                |residual| &residual[range],
            ),
        }
    }

    #[inline(always)]
    fn load<S: Simd>(self, simd: S, at: Range<usize>, pad: f32) -> S::f32s {
        let x = load(simd, &self.x[at.clone()], pad);
        match self.residual {
            Some(residual) => simd.add_f32s(x, load(simd, &residual[at], 0.0)),
            None => x,
        }
    }

    /// x − mean, and 0 where there is no number.
    #[inline(always)]
    fn centred<S: Simd>(self, simd: S, at: Range<usize>, mean: f32) -> S::f32s {
        simd.sub_f32s(self.load(simd, at, mean), simd.splat_f32s(mean))
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
    let rows = Rows { x, residual: residual.as_deref() };
    // So few that the threads end together even where there are no more than 49 rows.
    let chunk = ((1 << 13) / width).max(8);
    let mut statistics = vec![0f32; x.len() / width * 2];
    let y = written(shape, |out: &mut [T]| {
        let parts = out.par_chunks_mut(chunk * width).zip(statistics.par_chunks_mut(chunk * 2)).enumerate();
        parts.for_each(|(part, (out, statistics))| {
            let start = part * chunk * width;
            let rows = rows.slice(start..start + out.len());
            pulp::Arch::new().dispatch(Forward { rows, weight, bias, eps, out, statistics })
        });
    });
    let statistics = Tensor::from_vec(statistics, (x.len() / width, 2), &candle_core::Device::Cpu)?;
    Ok((y, statistics))
}

struct Forward<'a, T> {
    rows: Rows<'a, T>,
    weight: &'a [T],
    bias: &'a [T],
    eps: f32,
    out: &'a mut [T],
    /// Of each row the mean and the reciprocal of the standard deviation.
    statistics: &'a mut [f32],
}

impl<T: Real> WithSimd for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, weight, bias, eps, out, statistics } = self;
        let width = weight.len();
        let together = rows_together(width);
        let parts = out.chunks_mut(together * width).zip(statistics.chunks_mut(together * 2)).enumerate();
        for (part, (out, statistics)) in parts {
            let start = part * together * width;
            let rows = rows.slice(start..start + out.len());
            for (i, statistics) in statistics.chunks_exact_mut(2).enumerate() {
                let row = rows.slice(i * width..(i + 1) * width);
                let mut sums = [simd.splat_f32s(0.0); SUMS];
                each(
                    simd,
                    width,
                    #[inline(always)]
                    |at, i| sums[i] = simd.add_f32s(sums[i], row.load(simd, at, 0.0)),
                );
                statistics[0] = total(simd, sums) / width as f32;
            }
            for (i, statistics) in statistics.chunks_exact_mut(2).enumerate() {
                let row = rows.slice(i * width..(i + 1) * width);
                let mut squares = [simd.splat_f32s(0.0); SUMS];
                each(
                    simd,
                    width,
                    #[inline(always)]
                    |at, i| {
                        let centred = row.centred(simd, at, statistics[0]);
                        squares[i] = simd.mul_add_e_f32s(centred, centred, squares[i]);
                    },
                );
                statistics[1] = 1.0 / (total(simd, squares) / width as f32 + eps).sqrt();
            }
            for (i, (out, statistics)) in out.chunks_exact_mut(width).zip(statistics.chunks_exact(2)).enumerate() {
                let row = rows.slice(i * width..(i + 1) * width);
                let scale = simd.splat_f32s(statistics[1]);
                each(
                    simd,
                    width,
                    #[inline(always)]
                    |at, _| {
                        let normal = simd.mul_f32s(row.centred(simd, at.clone(), statistics[0]), scale);
                        let (weight, bias) = (load(simd, &weight[at.clone()], 0.0), load(simd, &bias[at.clone()], 0.0));
                        store(simd, simd.mul_add_e_f32s(normal, weight, bias), &mut out[at]);
                    },
                );
            }
        }
    }
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
    let (rows, statistics) = (Rows { x, residual: residual.as_deref() }, &*read::<f32>(moments)?);
    let chunk = rows_at_a_time(width);
    let mut sums: Vec<Vec<f32>> = Vec::new();
    let dx = written(shape, |dx: &mut [T]| {
        let parts = dx.par_chunks_mut(chunk * width).zip(statistics.par_chunks(chunk * 2)).enumerate();
        let parts = parts.map(|(part, (dx, statistics))| {
            let here = part * chunk * width..part * chunk * width + dx.len();
            let (rows, gradient) = (rows.slice(here.clone()), &gradient[here]);
            pulp::Arch::new().dispatch(Backward { rows, weight, statistics, gradient, dx })
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

struct Backward<'a, T> {
    rows: Rows<'a, T>,
    weight: &'a [T],
    statistics: &'a [f32],
    gradient: &'a [T],
    dx: &'a mut [T],
}

impl<T: Real> WithSimd for Backward<'_, T> {
    /// The gradients of weight and bias, summed over these rows.
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let Self { rows, weight, statistics, gradient, dx } = self;
        let width = weight.len();
        let mut parameters = vec![0f32; 2 * width];
        let (dw, db) = parameters.split_at_mut(width);
        let inputs = gradient.chunks_exact(width).zip(statistics.chunks_exact(2));
        for (i, (dx, (gradient, statistics))) in dx.chunks_exact_mut(width).zip(inputs).enumerate() {
            let row = rows.slice(i * width..(i + 1) * width);
            let (mean, scale) = (statistics[0], simd.splat_f32s(statistics[1]));
            let (mut shifts, mut slopes) = ([simd.splat_f32s(0.0); SUMS], [simd.splat_f32s(0.0); SUMS]);
            each(
                simd,
                width,
                #[inline(always)]
                |at, i| {
                    let normal = simd.mul_f32s(row.centred(simd, at.clone(), mean), scale);
                    let g = load(simd, &gradient[at.clone()], 0.0);
                    let scaled = simd.mul_f32s(g, load(simd, &weight[at.clone()], 0.0));
                    shifts[i] = simd.add_f32s(shifts[i], scaled);
                    slopes[i] = simd.mul_add_e_f32s(scaled, normal, slopes[i]);
                    let (dw, db) = (&mut dw[at.clone()], &mut db[at]);
                    store(simd, simd.mul_add_e_f32s(g, normal, load(simd, dw, 0.0)), dw);
                    store(simd, simd.add_f32s(g, load(simd, db, 0.0)), db);
                },
            );
            let shift = simd.splat_f32s(total(simd, shifts) / width as f32);
            let slope = simd.splat_f32s(total(simd, slopes) / width as f32);
            each(
                simd,
                width,
                #[inline(always)]
                |at, _| {
                    let normal = simd.mul_f32s(row.centred(simd, at.clone(), mean), scale);
                    let g = load(simd, &gradient[at.clone()], 0.0);
                    let scaled = simd.mul_f32s(g, load(simd, &weight[at.clone()], 0.0));
                    let rest = simd.mul_add_e_f32s(normal, slope, shift);
                    store(simd, simd.mul_f32s(scale, simd.sub_f32s(scaled, rest)), &mut dx[at]);
                },
            );
        }
        parameters
    }
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
