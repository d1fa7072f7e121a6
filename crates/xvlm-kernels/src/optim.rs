//! The optimizer's arithmetic.

use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result, Tensor, Var};

use crate::host::{is_host_f32, read, slice, slice_mut};
use crate::simd::{dot, vectorized};

/// The numbers of one AdamW step (Loshchilov and Hutter 2019), as in transformers 4.12: moments corrected for bias, then
/// decay, decoupled and scaled by the learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// Factor on the gradient (for clipping).
    pub gradient_scale: f64,
}

/// Updates `parameter` and its moments in place from its gradient; all four have one shape and are `f32`.
///
/// # Errors
/// If shapes differ or a tensor is not `f32`.
pub fn adamw_step(
    parameter: &Var,
    first_moment: &Var,
    second_moment: &Var,
    gradient: &Tensor,
    settings: AdamW,
) -> Result<()> {
    let AdamW { lr, beta1, beta2, eps, weight_decay, step, gradient_scale } = settings;
    let correction1 = 1.0 - beta1.powf(step as f64);
    let correction2 = 1.0 - beta2.powf(step as f64);
    let step_size = lr * correction2.sqrt() / correction1;
    let gradient = gradient.detach().contiguous()?;
    if is_host_f32(&[parameter, first_moment, second_moment, &gradient]) {
        let scale = gradient_scale as f32;
        first_moment.inplace_op2(&gradient, &Moment { decay: beta1 as f32, scale, squared: false })?;
        second_moment.inplace_op2(&gradient, &Moment { decay: beta2 as f32, scale, squared: true })?;
        let op = Step { step_size: step_size as f32, eps: eps as f32, keep: (1.0 - lr * weight_decay) as f32 };
        return parameter.inplace_op3(first_moment, second_moment, &op);
    }
    let gradient = (gradient * gradient_scale)?;
    let first = ((first_moment.as_tensor() * beta1)? + (&gradient * (1.0 - beta1))?)?;
    let second = ((second_moment.as_tensor() * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
    let update = (&first / (second.sqrt()? + eps)?)?;
    let next = (parameter.as_tensor() - (update * step_size)?)?;
    parameter.set(&(next * (1.0 - lr * weight_decay))?)?;
    first_moment.set(&first)?;
    second_moment.set(&second)
}

/// Σ x², in f64 on the CPU: what the global norm for clipping is made of.
pub fn squared_norm(x: &Tensor) -> Result<f64> {
    if is_host_f32(&[x]) {
        let x = x.contiguous()?;
        let values = read::<f32>(&x)?;
        let values = &*values;
        return Ok(values
            .chunks(4096)
            .map(|chunk| {
                f64::from(vectorized(
                    #[inline(always)]
                    || dot(chunk, chunk),
                ))
            })
            .sum());
    }
    Ok(f64::from(x.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?))
}

struct Moment {
    decay: f32,
    scale: f32,
    squared: bool,
}

impl InplaceOp2 for Moment {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, m: &mut CpuStorage, m_layout: &Layout, g: &CpuStorage, g_layout: &Layout) -> Result<()> {
        let (m, g) = (slice_mut(m, m_layout)?, slice(g, g_layout)?);
        let (decay, scale) = (self.decay, self.scale);
        vectorized(
            #[inline(always)]
            || {
                for (m, &g) in m.iter_mut().zip(g) {
                    let g = g * scale;
                    *m = decay * *m + (1.0 - decay) * if self.squared { g * g } else { g };
                }
            },
        );
        Ok(())
    }
}

struct Step {
    step_size: f32,
    eps: f32,
    keep: f32,
}

impl InplaceOp3 for Step {
    fn name(&self) -> &'static str {
        "adamw-step"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        p_layout: &Layout,
        m: &CpuStorage,
        m_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<()> {
        let (p, m, v) = (slice_mut(p, p_layout)?, slice(m, m_layout)?, slice(v, v_layout)?);
        vectorized(
            #[inline(always)]
            || {
                for ((p, &m), &v) in p.iter_mut().zip(m).zip(v) {
                    *p = (*p - self.step_size * m / (v.sqrt() + self.eps)) * self.keep;
                }
            },
        );
        Ok(())
    }
}
