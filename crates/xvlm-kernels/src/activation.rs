use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::host::{is_host_f32, read, slice};
use crate::simd::{erf, exp, vectorized};

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 14;

/// GELU in its erf form, `x · Φ(x)`, of any shape; within 1e-6 of the exact value on the CPU in `f32`.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if is_host_f32(&[x]) {
        return x.contiguous()?.apply_op1(Gelu);
    }
    x.gelu_erf()
}

/// `x · σ(1.702 x)`: CLIP's cheap stand-in for GELU.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    // As a hyperbolic tangent the sigmoid overflows nowhere, nor does its gradient.
    let gate = (x * 0.851)?.tanh()?.affine(0.5, 0.5)?;
    x * gate
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| {
            vectorized(
                #[inline(always)]
                || {
                    for (out, &x) in out.iter_mut().zip(x) {
                        *out = 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
                    }
                },
            )
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (values, grads) = (read(x)?, read(&grad)?);
        let mut out = vec![0f32; values.len()];
        out.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).zip(grads.par_chunks(CHUNK)).for_each(
            |((out, x), g)| {
                vectorized(
                    #[inline(always)]
                    || {
                        const INV_SQRT_2PI: f32 = 0.398_942_3;
                        for ((out, &x), &g) in out.iter_mut().zip(x).zip(g) {
                            let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
                            *out = g * (cdf + x * INV_SQRT_2PI * exp(-0.5 * x * x));
                        }
                    },
                )
            },
        );
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}
