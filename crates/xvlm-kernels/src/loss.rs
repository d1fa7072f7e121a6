//! Softmax and cross entropy.

use candle_core::shape::Dim;
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::error::KernelError;
use crate::host::{is_host_f32, read, slice};
use crate::simd::{exp, max, sum, vectorized};

/// Softmax along a dimension, differentiable on every device; sums are f32 for half types.
pub fn softmax<I: Dim>(x: &Tensor, dim: I) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "softmax")?;
    let wide = widen(x)?;
    let exponent = wide.broadcast_sub(&wide.detach().max_keepdim(dim)?)?.exp()?;
    exponent.broadcast_div(&exponent.sum_keepdim(dim)?)?.to_dtype(x.dtype())
}

/// Logarithm of the softmax along a dimension, differentiable on every device.
pub fn log_softmax<I: Dim>(x: &Tensor, dim: I) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "log_softmax")?;
    let wide = widen(x)?;
    let shifted = wide.broadcast_sub(&wide.detach().max_keepdim(dim)?)?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(dim)?.log()?)
}

fn widen(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32),
        _ => Ok(x.clone()),
    }
}

/// The label of a position that does not count.
pub const IGNORE: i64 = -100;

/// Mean cross entropy over the rows whose label is not [`IGNORE`]: `logits [M, V]`, one label a row. With `smoothing` ε a
/// row's target is `1 − ε` on its label and `ε / V` on every other class (the original's `LabelSmoothSoftmaxCEV1`; PyTorch's
/// own smoothing adds the `ε / V` on the label too). 0 if no row counts.
///
/// # Errors
/// If the number of labels is not `M`, or a label is neither [`IGNORE`] nor below `V`.
pub fn cross_entropy(logits: &Tensor, labels: &[i64], smoothing: f32) -> Result<Tensor> {
    let (m, v) = logits.dims2()?;
    let valid = |&label: &i64| label == IGNORE || (0..v as i64).contains(&label);
    if labels.len() != m || !labels.iter().all(valid) {
        let bad = labels.iter().find(|label| !valid(label));
        let found = bad.map_or_else(|| format!("{} labels", labels.len()), |label| format!("label {label}"));
        let expected = format!("{m} labels below {v} (or {IGNORE})");
        return Err(KernelError::Value { op: "cross_entropy", argument: "labels", expected, found }.into());
    }
    let counted = labels.iter().filter(|&&label| label != IGNORE).count();
    if counted == 0 {
        return logits.sum_all()? * 0.0;
    }
    if is_host_f32(&[logits]) {
        let op = CrossEntropy { labels: labels.to_vec(), counted, smoothing };
        return logits.contiguous()?.apply_op1(op);
    }
    let log_probabilities = log_softmax(logits, D::Minus1)?;
    let (rows, classes): (Vec<u32>, Vec<u32>) = labels
        .iter()
        .enumerate()
        .filter(|(_, l)| **l != IGNORE)
        .map(|(row, &label)| (row as u32, label as u32))
        .unzip();
    let kept = log_probabilities.index_select(&Tensor::new(rows, logits.device())?, 0)?;
    let classes = Tensor::new(classes, logits.device())?.unsqueeze(1)?;
    let chosen = kept.gather(&classes, 1)?.sum_all()?;
    let share = f64::from(smoothing) / v as f64;
    let spread = (kept.sum_all()? * share)?;
    ((chosen * (1.0 - f64::from(smoothing) - share))? + spread)? / -(counted as f64)
}

struct CrossEntropy {
    labels: Vec<i64>,
    counted: usize,
    smoothing: f32,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, v) = layout.shape().dims2()?;
        let logits = slice(logits, layout)?;
        let losses: Vec<f32> = logits
            .par_chunks(v)
            .zip(&self.labels)
            .map(|(row, &label)| {
                if label == IGNORE {
                    return 0.0;
                }
                vectorized(
                    #[inline(always)]
                    || {
                        let top = max(row);
                        let mut total = 0.0;
                        for &x in row {
                            total += exp(x - top);
                        }
                        let log_sum = total.ln() + top;
                        let spread = self.smoothing * (log_sum - sum(row) / v as f32);
                        let on_label = 1.0 - self.smoothing - self.smoothing / v as f32;
                        on_label * (log_sum - row[label as usize]) + spread
                    },
                )
            })
            .collect();
        let mean = losses.iter().sum::<f32>() / self.counted as f32;
        Ok((CpuStorage::F32(vec![mean]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, v) = logits.dims2()?;
        let scale = grad.to_scalar::<f32>()? / self.counted as f32;
        let values = read::<f32>(logits)?;
        let mut out = values.to_vec();
        out.par_chunks_mut(v).zip(&self.labels).for_each(|(row, &label)| {
            if label == IGNORE {
                row.fill(0.0);
                return;
            }
            vectorized(
                #[inline(always)]
                || {
                    crate::simd::softmax_row(row);
                    let share = self.smoothing / v as f32;
                    for x in row.iter_mut() {
                        *x = *x * (1.0 - share) - share;
                    }
                    row[label as usize] -= 1.0 - self.smoothing - share;
                    for x in row.iter_mut() {
                        *x *= scale;
                    }
                },
            )
        });
        Ok(Some(Tensor::from_vec(out, logits.shape(), logits.device())?))
    }
}
