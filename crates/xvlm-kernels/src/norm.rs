use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::error::check_shape;
use crate::host::{is_host_f32, read, slice};
use crate::simd::{add_assign, dot, moments, sum, vectorized};

/// Rows a thread takes at a time; fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 64;

/// Layer normalisation over the last dimension: `x [.., C]`, `weight [C]`, `bias [C]`. Statistics are f32 for half types.
///
/// # Errors
/// If `weight` or `bias` is not `[C]`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    check_shape("layer_norm", "weight", weight, &[width])?;
    check_shape("layer_norm", "bias", bias, &[width])?;
    if is_host_f32(&[x, weight, bias]) {
        let op = LayerNorm { eps: eps as f32 };
        return x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op);
    }
    let dtype = x.dtype();
    let statistics = if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype };
    let x = x.to_dtype(statistics)?;
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normalised = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    normalised.to_dtype(dtype)?.broadcast_mul(weight)?.broadcast_add(bias)
}

struct LayerNorm {
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, b) = (slice(x, x_layout)?, slice(w, w_layout)?, slice(b, b_layout)?);
        let width = w.len();
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).for_each(|(out, x)| {
            vectorized(
                #[inline(always)]
                || {
                    for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                        let (mean, scale) = moments(x, self.eps);
                        for (((out, &x), &w), &b) in out.iter_mut().zip(x).zip(w).zip(b) {
                            *out = (x - mean) * scale * w + b;
                        }
                    }
                },
            )
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (dx, dw, db) = self.backward(&read::<f32>(x)?, &read::<f32>(weight)?, &read::<f32>(&grad)?);
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(dw, weight.shape(), device)?),
            Some(Tensor::from_vec(db, bias.shape(), device)?),
        ))
    }
}

impl LayerNorm {
    fn backward(&self, x: &[f32], w: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let width = w.len();
        let block = ROWS * width;
        let mut dx = vec![0f32; x.len()];
        let partial: Vec<(Vec<f32>, Vec<f32>)> = dx
            .par_chunks_mut(block)
            .zip(x.par_chunks(block))
            .zip(grad.par_chunks(block))
            .map(|((dx, x), g)| {
                vectorized(
                    #[inline(always)]
                    || {
                        let (mut dw, mut db) = (vec![0f32; width], vec![0f32; width]);
                        let (mut normal, mut scaled) = (vec![0f32; width], vec![0f32; width]);
                        let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(g.chunks_exact(width));
                        for ((dx, x), g) in rows {
                            let (mean, scale) = moments(x, self.eps);
                            for i in 0..width {
                                normal[i] = (x[i] - mean) * scale;
                                scaled[i] = g[i] * w[i];
                                dw[i] += g[i] * normal[i];
                                db[i] += g[i];
                            }
                            let mean_scaled = sum(&scaled) / width as f32;
                            let mean_projected = dot(&scaled, &normal) / width as f32;
                            for i in 0..width {
                                dx[i] = scale * (scaled[i] - mean_scaled - normal[i] * mean_projected);
                            }
                        }
                        (dw, db)
                    },
                )
            })
            .collect();
        let (mut dw, mut db) = (vec![0f32; width], vec![0f32; width]);
        for (part_w, part_b) in &partial {
            add_assign(&mut dw, part_w);
            add_assign(&mut db, part_b);
        }
        (dx, dw, db)
    }
}
