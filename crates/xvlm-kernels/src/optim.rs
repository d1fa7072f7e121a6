//! The optimizer's arithmetic.

use std::collections::HashSet;

use candle_core::{DType, Device, Result, Tensor, Var};
use half::bf16;
use rayon::prelude::*;

use crate::error::{KernelError, check_shape};
use crate::host::{change, memory, read, written};
use crate::real::Real;
use crate::simd::{squares, vectorized};

const OP: &str = "adamw_step";

/// What AdamW (Loshchilov and Hutter 2019) does alike to all parameters. As in transformers 4.12: moments corrected for bias,
/// then decay, decoupled and scaled by the learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// The norm that all gradients together are scaled down to if theirs is larger.
    pub max_norm: Option<f64>,
}

/// A parameter, and what moves it in one step.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// What is updated, in place.
    pub parameter: &'a Var,
    /// Of a parameter of `bf16` on the CPU the lower halves of the numbers ([`split_into`]): the two together are updated
    /// as `f32`.
    pub rest: Option<&'a Var>,
    /// The mean of its gradients, updated in place.
    pub first_moment: &'a Var,
    /// The mean of their squares, updated in place.
    pub second_moment: &'a Var,
    /// The gradient.
    pub gradient: &'a Tensor,
    /// Learning rate of this step.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Number of this step for this parameter, from 1.
    pub step: u64,
}

/// One step of all parameters. Returns the norm of all gradients together, before they are scaled; if it is not finite,
/// nothing was changed.
///
/// Parameters (with their rest) and moments are `f32`; gradients are `f32`, `bf16` or `f16`, and are widened. On the CPU and on a GPU the
/// gradients are read once for the norm, and parameters, moments and gradients once for the step; both are the same bits from
/// run to run. Other types go one tensor after the other.
///
/// # Errors
/// If the tensors of an update differ in shape, type or device, a variable is not contiguous, one is in two places, or a
/// parameter beside one with a rest is not `f32`, or `bf16` with a rest, on the CPU. Nothing was changed then.
pub fn adamw_step(settings: &AdamW, updates: &[Update]) -> Result<f64> {
    check(updates)?;
    // candle changes nothing in place that has no numbers.
    let updates: Vec<Update> = updates.iter().filter(|update| update.gradient.elem_count() > 0).copied().collect();
    let gradients = updates.iter().map(gradient).collect::<Result<Vec<_>>>()?;
    let Some(first) = updates.first() else { return Ok(0.0) };
    let is_f32 = |u: &Update| u.parameter.dtype() == DType::F32 || u.rest.is_some();
    let alike = |u: &Update| is_f32(u) && u.parameter.device().same_device(first.parameter.device());
    if updates.iter().all(alike) {
        #[cfg(gpu)]
        if crate::gpu::runs(first.parameter) && updates.iter().all(|update| update.rest.is_none()) {
            return on_gpu::step(settings, &updates, &gradients);
        }
        if first.parameter.device().is_cpu() {
            return step_on_host(settings, &updates, &gradients);
        }
    }
    let has_rests = updates.iter().any(|update| update.rest.is_some());
    if let Some(other) = updates.iter().find(|u| has_rests && !(is_f32(u) && u.parameter.device().is_cpu())) {
        let expected = "F32, or BF16 with a rest, on the CPU, where one has a rest".to_owned();
        let (dtype, at) = (other.parameter.dtype(), other.parameter.device().location());
        let found = format!("{dtype:?} of shape {:?} on {at:?}", other.parameter.dims());
        return Err(KernelError::Value { op: OP, argument: "parameter", expected, found }.into());
    }
    let squares = gradients.iter().map(sum_of_squares).collect::<Result<Vec<f64>>>()?;
    let norm = squares.iter().sum::<f64>().sqrt();
    if norm.is_finite() {
        let scale = settings.gradient_scale(norm);
        updates
            .iter()
            .zip(&gradients)
            .try_for_each(|(update, gradient)| step_composed(settings, scale, update, gradient))?;
    }
    Ok(norm)
}

impl AdamW {
    /// The factor on gradients of this norm, as `torch.nn.utils.clip_grad_norm_` has it, with its 1e-6.
    fn gradient_scale(&self, norm: f64) -> f64 {
        self.max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0))
    }
}

impl Update<'_> {
    /// The learning rate corrected for bias, and what decay leaves of the parameter.
    fn rates(&self, settings: &AdamW) -> (f64, f64) {
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        let step_size = self.lr * correction(settings.beta2).sqrt() / correction(settings.beta1);
        (step_size, 1.0 - self.lr * self.weight_decay)
    }
}

/// Checks shapes, types and devices, and that no number is changed twice.
fn check(updates: &[Update]) -> Result<()> {
    let mut changed = HashSet::new();
    for update in updates {
        let parameter = update.parameter;
        let variables =
            [("parameter", parameter), ("first_moment", update.first_moment), ("second_moment", update.second_moment)];
        for (argument, variable) in variables.into_iter().chain(update.rest.map(|rest| ("rest", rest))) {
            let wrong = |expected: String, found: String| KernelError::Value { op: OP, argument, expected, found };
            if variable.shape() != parameter.shape() {
                let (expected, found) = (format!("{:?}", parameter.dims()), variable.dims().to_vec());
                return Err(KernelError::Shape { op: OP, argument, expected, found }.into());
            }
            let dtype = match (argument, update.rest) {
                ("parameter", Some(_)) => DType::BF16,
                ("rest", _) => DType::I16,
                (_, Some(_)) => DType::F32,
                _ => parameter.dtype(),
            };
            if variable.dtype() != dtype || !variable.device().same_device(parameter.device()) {
                let describe = |dtype: DType, t: &Tensor| format!("{dtype:?} on {:?}", t.device().location());
                return Err(wrong(describe(dtype, parameter), describe(variable.dtype(), variable)).into());
            }
            if !variable.is_contiguous() {
                return Err(wrong("contiguous".into(), format!("{:?}", variable.layout())).into());
            }
            if !changed.insert(memory(variable)) {
                return Err(wrong("a variable of its own".into(), "one that is updated already".into()).into());
            }
        }
        let (argument, gradient) = ("gradient", update.gradient);
        if gradient.shape() != parameter.shape() {
            let (expected, found) = (format!("{:?}", parameter.dims()), gradient.dims().to_vec());
            return Err(KernelError::Shape { op: OP, argument, expected, found }.into());
        }
        if !gradient.dtype().is_float() || !gradient.device().same_device(parameter.device()) {
            let expected = format!("a float type on {:?}", parameter.device().location());
            let found = format!("{:?} on {:?}", gradient.dtype(), gradient.device().location());
            return Err(KernelError::Value { op: OP, argument, expected, found }.into());
        }
    }
    if let Some(i) = updates.iter().position(|update| changed.contains(&memory(update.gradient))) {
        let (expected, found) = ("apart from the variables".into(), format!("one that update {i} changes"));
        return Err(KernelError::Value { op: OP, argument: "gradient", expected, found }.into());
    }
    Ok(())
}

/// The gradient of an update as the loops read it: contiguous, of a type they know.
fn gradient(update: &Update) -> Result<Tensor> {
    let gradient = update.gradient.detach();
    let known = match gradient.dtype() {
        DType::F32 | DType::BF16 => true,
        #[cfg(gpu)]
        DType::F16 => crate::gpu::runs(update.parameter),
        _ => false,
    };
    if known { gradient } else { gradient.to_dtype(update.first_moment.dtype())? }.contiguous()
}

/// Numbers that a thread takes at a time; the loops of `cuda/optim.cu` take as many.
const CHUNK: usize = 1 << 14;

fn step_on_host(settings: &AdamW, updates: &[Update], gradients: &[Tensor]) -> Result<f64> {
    // In the order of the parameters, whichever thread is done first.
    let squares = gradients.par_iter().with_max_len(1).map(|gradient| match gradient.dtype() {
        DType::BF16 => Ok(squares_on_host(&read::<bf16>(gradient)?)),
        _ => Ok(squares_on_host(&read::<f32>(gradient)?)),
    });
    let norm = squares.collect::<Result<Vec<f64>>>()?.iter().sum::<f64>().sqrt();
    if norm.is_finite() {
        let scale = settings.gradient_scale(norm) as f32;
        updates.par_iter().zip(gradients).with_max_len(1).try_for_each(|(update, gradient)| {
            match gradient.dtype() {
                DType::BF16 => update_on_host(settings, scale, update, &read::<bf16>(gradient)?),
                _ => update_on_host(settings, scale, update, &read::<f32>(gradient)?),
            }
        })?;
    }
    Ok(norm)
}

/// Σ x²: in `f32` over a few thousand numbers, in `f64` over these sums.
fn squares_on_host<T: Real>(values: &[T]) -> f64 {
    const FEW: usize = 4096;
    let chunk = |values: &[T]| {
        vectorized(
            #[inline(always)]
            || {
                // A loop: the compiler does not take `sum` over to the instruction set of this one.
                let mut total = 0.0;
                for few in values.chunks(FEW) {
                    total += f64::from(squares(few));
                }
                total
            },
        )
    };
    values.par_chunks(CHUNK).map(chunk).collect::<Vec<f64>>().iter().sum()
}

fn update_on_host<T: Real>(settings: &AdamW, scale: f32, update: &Update, gradient: &[T]) -> Result<()> {
    let (step_size, keep) = update.rates(settings);
    let rule = Rule {
        scale,
        decay1: settings.beta1 as f32,
        decay2: settings.beta2 as f32,
        eps: settings.eps as f32,
        step_size: step_size as f32,
        keep: keep as f32,
    };
    let apply = |update_chunks: &mut dyn FnMut(&mut [f32], &mut [f32])| {
        change(update.first_moment, |first: &mut [f32]| {
            change(update.second_moment, |second: &mut [f32]| update_chunks(first, second))
        })?
    };
    match update.rest {
        None => change(update.parameter, |parameter: &mut [f32]| {
            apply(&mut |first, second| {
                let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
                let chunks = parameter.par_chunks_mut(CHUNK).zip(moments).zip(gradient.par_chunks(CHUNK));
                chunks.for_each(|((parameter, (first, second)), gradient)| {
                    vectorized(
                        #[inline(always)]
                        || rule.apply(parameter, first, second, gradient),
                    );
                });
            })
        })?,
        Some(rest) => change(update.parameter, |upper: &mut [bf16]| {
            change(rest, |lower: &mut [i16]| {
                apply(&mut |first, second| {
                    let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
                    let halves = upper.par_chunks_mut(CHUNK).zip(lower.par_chunks_mut(CHUNK));
                    halves.zip(moments).zip(gradient.par_chunks(CHUNK)).for_each(|((halves, moments), gradient)| {
                        let ((upper, lower), (first, second)) = (halves, moments);
                        vectorized(
                            #[inline(always)]
                            || rule.apply_to_halves(upper, lower, first, second, gradient),
                        );
                    });
                })
            })?
        })?,
    }
}

struct Rule {
    scale: f32,
    decay1: f32,
    decay2: f32,
    eps: f32,
    step_size: f32,
    keep: f32,
}

impl Rule {
    #[inline(always)]
    fn apply<T: Real>(&self, parameter: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[T]) {
        let Self { scale, decay1, decay2, eps, step_size, keep } = *self;
        for (((p, m), v), g) in parameter.iter_mut().zip(first).zip(second).zip(gradient) {
            let g = g.widen() * scale;
            *m = decay1 * *m + (1.0 - decay1) * g;
            *v = decay2 * *v + (1.0 - decay2) * (g * g);
            *p = (*p - step_size * *m / (v.sqrt() + eps)) * keep;
        }
    }

    #[inline(always)]
    fn apply_to_halves<T: Real>(
        &self,
        upper: &mut [bf16],
        lower: &mut [i16],
        first: &mut [f32],
        second: &mut [f32],
        gradient: &[T],
    ) {
        /// Numbers that are put together at a time.
        const FEW: usize = 512;
        let mut whole = [0f32; FEW];
        let halves = upper.chunks_mut(FEW).zip(lower.chunks_mut(FEW));
        let moments = first.chunks_mut(FEW).zip(second.chunks_mut(FEW));
        for (((upper, lower), (first, second)), gradient) in halves.zip(moments).zip(gradient.chunks(FEW)) {
            let whole = &mut whole[..upper.len()];
            whole.iter_mut().zip(upper.iter().zip(lower.iter())).for_each(|(x, (&up, &low))| *x = join(up, low));
            self.apply(whole, first, second, gradient);
            whole.iter().zip(upper.iter_mut().zip(lower)).for_each(|(&x, (up, low))| (*up, *low) = split(x));
        }
    }
}

/// The nearest number of `bf16`, of two the one away from 0, and what is to be added to its bits in the upper half of an
/// `f32` to have the bits of `x`: nothing is lost, but of a NaN, which is one in both types, the lower bits. Without a
/// branch, so that loops over it are vectorized.
#[inline(always)]
fn split(x: f32) -> (bf16, i16) {
    let bits = x.to_bits();
    let (nearest, rest) = (bits.wrapping_add(0x8000) >> 16, bits as i16);
    let quiet = (bits >> 16) | 0x40;
    let (upper, lower) = if x.is_nan() { (quiet, 0) } else { (nearest, rest) };
    (bf16::from_bits(upper as u16), lower)
}

/// The `f32` that [`split`] took apart.
#[inline(always)]
fn join(upper: bf16, lower: i16) -> f32 {
    f32::from_bits((u32::from(upper.to_bits()) << 16).wrapping_add(i32::from(lower).cast_unsigned()))
}

/// Takes numbers of `f32` apart: sets `parameter` to the nearest numbers of `bf16`, and `rest` (`i16`) to what
/// [`joined`] needs to find the same bits again; a NaN becomes a NaN in both. Both are contiguous, on the CPU.
///
/// # Errors
/// If shapes, types or devices are others.
pub fn split_into(parameter: &Var, rest: &Var, wide: &Tensor) -> Result<()> {
    check_halves("split_into", parameter, rest)?;
    check_shape("split_into", "wide", wide, parameter.dims())?;
    if parameter.elem_count() == 0 {
        return Ok(());
    }
    let wide = wide.detach().contiguous()?;
    let wide = &*read::<f32>(&wide)?;
    change(parameter, |upper: &mut [bf16]| {
        change(rest, |lower: &mut [i16]| {
            let halves = upper.par_iter_mut().zip(lower).with_min_len(CHUNK);
            halves.zip(wide).for_each(|((up, low), &x)| (*up, *low) = split(x));
        })
    })?
}

/// The numbers that [`split_into`] took apart, in `f32`.
///
/// # Errors
/// As [`split_into`].
pub fn joined(parameter: &Tensor, rest: &Tensor) -> Result<Tensor> {
    check_halves("joined", parameter, rest)?;
    let (upper, lower) = (parameter.detach(), rest.detach());
    let (upper, lower) = (&*read::<bf16>(&upper)?, &*read::<i16>(&lower)?);
    let whole = written(parameter.shape(), |out: &mut [f32]| {
        let halves = upper.par_iter().zip(lower).with_min_len(CHUNK);
        out.par_iter_mut().zip(halves).for_each(|(out, (&up, &low))| *out = join(up, low));
    });
    Ok(whole.detached())
}

fn check_halves(op: &'static str, parameter: &Tensor, rest: &Tensor) -> Result<()> {
    check_shape(op, "rest", rest, parameter.dims())?;
    for (argument, tensor, dtype) in [("parameter", parameter, DType::BF16), ("rest", rest, DType::I16)] {
        if tensor.dtype() != dtype || !tensor.device().is_cpu() || !tensor.is_contiguous() {
            let expected = format!("contiguous {dtype:?} on the CPU");
            let found = format!("{:?} on {:?}, {:?}", tensor.dtype(), tensor.device().location(), tensor.layout());
            return Err(KernelError::Value { op, argument, expected, found }.into());
        }
    }
    Ok(())
}

/// Sets a parameter to the numbers of its master, rounded to its type.
///
/// # Errors
/// If shapes or devices differ.
pub fn round_into(parameter: &Var, master: &Var) -> Result<()> {
    let master = master.as_detached_tensor();
    let fast = (parameter.dtype(), master.dtype()) == (DType::BF16, DType::F32)
        && parameter.shape() == master.shape()
        && parameter.is_contiguous()
        && master.is_contiguous()
        && [parameter.device(), master.device()].iter().all(|device| device.is_cpu());
    if !fast {
        return parameter.set(&master.to_dtype(parameter.dtype())?);
    }
    let master = &*read::<f32>(&master)?;
    change(parameter, |values: &mut [bf16]| {
        values.par_chunks_mut(CHUNK).zip(master.par_chunks(CHUNK)).for_each(|(out, values)| {
            vectorized(
                #[inline(always)]
                || out.iter_mut().zip(values).for_each(|(out, x)| *out = Real::narrow(*x)),
            );
        });
    })
}

/// Σ x² of a tensor, waited for.
fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let wide = if x.device().is_cpu() { DType::F64 } else { DType::F32 };
    x.to_dtype(wide)?.sqr()?.sum_all()?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_scalar()
}

fn step_composed(settings: &AdamW, scale: f64, update: &Update, gradient: &Tensor) -> Result<()> {
    let AdamW { beta1, beta2, eps, .. } = *settings;
    let Update { parameter, first_moment, second_moment, .. } = *update;
    let (step_size, keep) = update.rates(settings);
    let gradient = (gradient.to_dtype(parameter.dtype())? * scale)?;
    let first = ((first_moment.as_tensor() * beta1)? + (&gradient * (1.0 - beta1))?)?;
    let second = ((second_moment.as_tensor() * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
    let change = ((&first / (second.sqrt()? + eps)?)? * step_size)?;
    parameter.set(&((parameter.as_tensor() - change)? * keep)?.detach())?;
    first_moment.set(&first.detach())?;
    second_moment.set(&second.detach())
}

#[cfg(gpu)]
mod on_gpu {
    use super::*;
    use crate::gpu::{Arg, Buffer, Grid, Kernel, address_of, address_of_variable, launch};
    use crate::graph::Fresh;

    const THREADS: u32 = 256;

    fn kernel(name: &'static str) -> Kernel {
        Kernel { file: "optim", name }
    }

    /// One launch over all parameters: a block for each chunk of a parameter, which finds in two tables where that is.
    pub(super) fn step(settings: &AdamW, updates: &[Update], gradients: &[Tensor]) -> Result<f64> {
        let like = updates[0].parameter.as_tensor();
        let (mut tensors, mut chunks) = (Vec::new(), Vec::new());
        for (i, (update, gradient)) in updates.iter().zip(gradients).enumerate() {
            let (step_size, keep) = update.rates(settings);
            let bits = |rate: f64| i64::from((rate as f32).to_bits());
            let dtype = match gradient.dtype() {
                DType::F32 => 0,
                DType::BF16 => 1,
                _ => 2,
            };
            let count = gradient.elem_count();
            let addresses = [
                address_of_variable(update.parameter)?,
                address_of_variable(update.first_moment)?,
                address_of_variable(update.second_moment)?,
                address_of(gradient)?,
            ];
            tensors.extend(addresses.map(u64::cast_signed));
            tensors.extend([count as i64, dtype, bits(step_size), bits(keep)]);
            chunks.extend((0..count.div_ceil(CHUNK)).flat_map(|chunk| [i as i64, (chunk * CHUNK) as i64]));
        }
        let count = chunks.len() / 2;
        let (tensors, chunks) = (Tensor::new(tensors, like.device())?, Tensor::new(chunks, like.device())?);
        let (grid, one) = (Grid::line(count, THREADS), Grid::line(1, THREADS));
        let mut parts = Buffer::new(like, DType::F32, count)?;
        let arguments = &mut [Arg::In(&tensors), Arg::In(&chunks), Arg::Out(&mut parts)];
        launch(kernel("squares"), like, DType::F32, grid, arguments)?;
        let mut norm = Buffer::new(like, DType::F64, 1)?;
        let arguments = &mut [Arg::Made(&parts), Arg::Out(&mut norm), Arg::size(count)?];
        launch(kernel("norm"), like, DType::F32, one, arguments)?;
        let arguments = &mut [
            Arg::In(&tensors),
            Arg::In(&chunks),
            Arg::Made(&norm),
            Arg::F32(settings.max_norm.unwrap_or(f64::INFINITY) as f32),
            Arg::F32(settings.beta1 as f32),
            Arg::F32(settings.beta2 as f32),
            Arg::F32(settings.eps as f32),
        ];
        launch(kernel("adamw"), like, DType::F32, grid, arguments)?;
        // Waits for the step, so that nobody reads a variable before it is changed.
        Fresh::from(norm).detached().get(0)?.to_scalar()
    }
}
