use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::error::check_shape;
use crate::host::{is_host_f32, read, slice};
use crate::simd::{Matrix, add_assign, all_threads, multiply, vectorized};

/// `x · wᵀ + b`: `x [.., K]`, `weight [N, K]`, `bias [N]` → `[.., N]`.
///
/// # Errors
/// If the last dimension of `x` is not `K` or `bias` is not `[N]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (n, _) = weight.dims2()?;
    let inner = x.dims().last().copied().unwrap_or(0);
    check_shape("linear", "weight", weight, &[n, inner])?;
    check_shape("linear", "bias", bias, &[n])?;
    if is_host_f32(&[x, weight, bias]) {
        return x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Linear);
    }
    let rows = x.elem_count() / inner.max(1);
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = n;
    x.reshape((rows, inner))?.matmul(&weight.t()?)?.broadcast_add(bias)?.reshape(shape)
}

struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
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
        let (n, k) = w_layout.shape().dims2()?;
        let (x, w, b) = (slice(x, x_layout)?, slice(w, w_layout)?, slice(b, b_layout)?);
        let m = x.len() / k;
        let mut out = Vec::with_capacity(m * n);
        for _ in 0..m {
            out.extend_from_slice(b);
        }
        // SAFETY: `x` is [m, k], `w` is [n, k] and `out` [m, n], all row-major and distinct.
        unsafe {
            let weights = Matrix::rows(w, k).transposed();
            multiply((m, n, k), &mut out, n, true, Matrix::rows(x, k), weights, 1.0, all_threads());
        }
        let mut shape = x_layout.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = n;
        }
        Ok((CpuStorage::F32(out), shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (n, k) = weight.dims2()?;
        let grad = grad.contiguous()?;
        let (x_values, w_values, g_values) = (read::<f32>(x)?, read::<f32>(weight)?, read::<f32>(&grad)?);
        let m = x_values.len() / k;
        let device = x.device();
        let product = |dims: (usize, usize, usize), a: Matrix, b: Matrix| {
            let mut out = vec![0f32; dims.0 * dims.1];
            // SAFETY: the slices have the sizes computed above, and the output is fresh.
            unsafe { multiply(dims, &mut out, dims.1, false, a, b, 1.0, all_threads()) };
            out
        };
        let dx = x.track_op().then(|| product((m, k, n), Matrix::rows(&g_values, n), Matrix::rows(&w_values, k)));
        let dw = weight
            .track_op()
            .then(|| product((n, k, m), Matrix::rows(&g_values, n).transposed(), Matrix::rows(&x_values, k)));
        let db = bias.track_op().then(|| column_sums(&g_values, n));
        Ok((
            dx.map(|v| Tensor::from_vec(v, x.shape(), device)).transpose()?,
            dw.map(|v| Tensor::from_vec(v, weight.shape(), device)).transpose()?,
            db.map(|v| Tensor::from_vec(v, bias.shape(), device)).transpose()?,
        ))
    }
}

/// Sums over the rows of a `[_, n]` matrix, in an order that does not depend on the number of threads.
pub(crate) fn column_sums(values: &[f32], n: usize) -> Vec<f32> {
    const ROWS: usize = 256;
    let partial: Vec<Vec<f32>> = values
        .par_chunks(ROWS * n)
        .map(|rows| {
            vectorized(
                #[inline(always)]
                || {
                    let mut total = vec![0f32; n];
                    for row in rows.chunks_exact(n) {
                        add_assign(&mut total, row);
                    }
                    total
                },
            )
        })
        .collect();
    let mut total = vec![0f32; n];
    for part in &partial {
        add_assign(&mut total, part);
    }
    total
}
