//! Cross entropy of logits with labels.

use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use crate::error::KernelError;
use crate::graph::{Fresh, differentiable};
use crate::host::{read, written};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::{exp, fold, vectorized};
use crate::softmax::{log_softmax, log_sum_exp, widened};

/// The label of a position that does not count.
pub const IGNORE: i64 = -100;

/// Mean cross entropy over the rows whose label is not [`IGNORE`]: `logits [M, V]`, one label a row; a scalar, in f32 for
/// half types. With `smoothing` ε a row's target is `1 − ε` on its label and `ε / V` on every other class (the original's
/// `LabelSmoothSoftmaxCEV1`; PyTorch's own smoothing adds the `ε / V` on the label too). 0 if no row counts.
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
    if Path::for_tensor(logits) == Path::Composed {
        return composed(logits, labels, smoothing);
    }
    let logits = &logits.contiguous()?;
    let targets = Arc::new(Targets::new(logits, labels, smoothing)?);
    let (loss, log_sums) = fused!(logits, T => targets.loss_on_host::<T>(logits); gpu::loss(&targets, logits))?;
    differentiable("cross_entropy", [logits], loss, move |[logits], gradient| {
        let d: Fresh = fused!(logits, T => {
            targets.gradient_on_host::<T>(logits, &log_sums, gradient)
        }; gpu::gradient(&targets, logits, &log_sums, gradient))?;
        Ok([Some(d.detached())])
    })
}

fn composed(logits: &Tensor, labels: &[i64], smoothing: f32) -> Result<Tensor> {
    let (rows, classes): (Vec<u32>, Vec<u32>) = labels
        .iter()
        .enumerate()
        .filter(|(_, label)| **label != IGNORE)
        .map(|(row, &label)| (row as u32, label as u32))
        .unzip();
    let counted = rows.len();
    if counted == 0 {
        // A factor that is a number would take the logits out of the graph.
        let sum = widened(logits)?.sum_all()?;
        return &sum * sum.zeros_like()?;
    }
    let kept = log_softmax(logits, D::Minus1)?.index_select(&Tensor::new(rows, logits.device())?, 0)?;
    let chosen = kept.gather(&Tensor::new(classes, logits.device())?.unsqueeze(1)?, 1)?.sum_all()?;
    let share = f64::from(smoothing) / logits.dim(1)? as f64;
    let spread = (kept.sum_all()? * share)?;
    ((chosen * (1.0 - f64::from(smoothing) - share))? + spread)? / -(counted as f64)
}

/// What the loss is taken against.
struct Targets {
    /// `[M]` in `u32`, where the logits are; [`Self::IGNORED`] for those that do not count.
    labels: Tensor,
    counted: usize,
    classes: usize,
    smoothing: f32,
}

impl Targets {
    const IGNORED: u32 = u32::MAX;

    fn new(logits: &Tensor, labels: &[i64], smoothing: f32) -> Result<Self> {
        let labels: Vec<u32> = labels.iter().map(|&label| u32::try_from(label).unwrap_or(Self::IGNORED)).collect();
        // A mean of nothing is 0.
        let counted = labels.iter().filter(|&&label| label != Self::IGNORED).count().max(1);
        Ok(Self {
            labels: Tensor::from_slice(&labels, labels.len(), logits.device())?,
            counted,
            classes: logits.dim(1)?,
            smoothing,
        })
    }

    /// What the target of a class other than the label is, and by how much that of the label is larger.
    fn shares(&self) -> (f32, f32) {
        let share = self.smoothing / self.classes as f32;
        (share, 1.0 - self.smoothing - share)
    }

    fn rows_at_a_time(&self) -> usize {
        (1 << 12) / self.classes.max(1) + 1
    }

    /// The loss, and of each row the two parts of ln Σ eˣ `[M, 2]`.
    fn loss_on_host<T: Real>(&self, logits: &Tensor) -> Result<(Fresh, Tensor)> {
        let (values, labels) = (&*read::<T>(logits)?, &*read::<u32>(&self.labels)?);
        let (share, extra) = self.shares();
        let mut log_sums = vec![0f32; 2 * labels.len()];
        let rows = values.par_chunks(self.classes.max(1)).zip(labels).zip(log_sums.par_chunks_mut(2));
        let losses = rows.with_min_len(self.rows_at_a_time()).map(|((row, &label), log_sum)| {
            if label == Self::IGNORED {
                return 0.0;
            }
            vectorized(
                #[inline(always)]
                || {
                    let (top, log_total) = log_sum_exp(row);
                    log_sum.copy_from_slice(&[top, log_total]);
                    let distance = |x: T| top - x.widen() + log_total;
                    let on_label = extra * distance(row[label as usize]);
                    if share == 0.0 {
                        return on_label;
                    }
                    on_label + share * fold(row, row, 0.0, |total, x, _| total + distance(x), |a, b| a + b)
                },
            )
        });
        let total: f64 = losses.collect::<Vec<f32>>().into_iter().map(f64::from).sum();
        let loss = written((), |out: &mut [f32]| out[0] = (total / self.counted as f64) as f32);
        Ok((loss, Tensor::from_vec(log_sums, (labels.len(), 2), logits.device())?))
    }

    fn gradient_on_host<T: Real>(&self, logits: &Tensor, log_sums: &Tensor, gradient: &Tensor) -> Result<Fresh> {
        let (values, labels) = (&*read::<T>(logits)?, &*read::<u32>(&self.labels)?);
        let (log_sums, width) = (&*read::<f32>(log_sums)?, self.classes.max(1));
        let (share, extra) = self.shares();
        let scale = read::<f32>(gradient)?[0] / self.counted as f32;
        let (of_power, constant) = (scale * (1.0 - share), scale * share);
        Ok(written(logits.shape(), |out: &mut [T]| {
            let rows = out.par_chunks_mut(width).zip(values.par_chunks(width)).zip(labels).zip(log_sums.par_chunks(2));
            rows.with_min_len(self.rows_at_a_time()).for_each(|(((out, row), &label), log_sum)| {
                if label == Self::IGNORED {
                    out.fill(T::narrow(0.0));
                    return;
                }
                let power = |x: T| exp(x.widen() - log_sum[0] - log_sum[1]);
                vectorized(
                    #[inline(always)]
                    || {
                        for (out, &x) in out.iter_mut().zip(row) {
                            *out = T::narrow(power(x).mul_add(of_power, -constant));
                        }
                    },
                );
                let label = label as usize;
                out[label] = T::narrow(power(row[label]).mul_add(of_power, -constant) - scale * extra);
            });
        }))
    }
}

#[cfg(gpu)]
mod gpu {
    use candle_core::{DType, Result, Tensor};

    use super::Targets;
    use crate::gpu::{Arg, Buffer, Grid, Kernel, launch};
    use crate::graph::Fresh;

    fn kernel(name: &'static str) -> Kernel {
        Kernel { file: "cross_entropy", name }
    }

    /// A block a row.
    fn grid(targets: &Targets) -> Grid {
        let threads = if targets.classes >= 8192 { 512 } else { 256 };
        Grid::line(targets.labels.elem_count(), threads)
    }

    pub(super) fn loss(targets: &Targets, logits: &Tensor) -> Result<(Fresh, Tensor)> {
        const THREADS: u32 = 512;
        let rows = targets.labels.elem_count();
        let mut losses = Buffer::new(logits, DType::F32, rows)?;
        let mut log_sums = Buffer::new(logits, DType::F32, (rows, 2))?;
        let arguments = &mut [
            Arg::In(logits),
            Arg::In(&targets.labels),
            Arg::Out(&mut losses),
            Arg::Out(&mut log_sums),
            Arg::size(targets.classes)?,
            Arg::F32(targets.smoothing),
        ];
        launch(kernel("cross_entropy"), logits, logits.dtype(), grid(targets), arguments)?;
        let mut loss = Buffer::new(logits, DType::F32, ())?;
        let arguments =
            &mut [Arg::Made(&losses), Arg::Out(&mut loss), Arg::size(rows)?, Arg::F32(targets.counted as f32)];
        launch(kernel("cross_entropy_mean"), logits, DType::F32, Grid::line(1, THREADS), arguments)?;
        Ok((loss.into(), Fresh::from(log_sums).detached()))
    }

    pub(super) fn gradient(targets: &Targets, logits: &Tensor, log_sums: &Tensor, gradient: &Tensor) -> Result<Fresh> {
        let mut out = Buffer::like(logits, logits.shape())?;
        let arguments = &mut [
            Arg::In(logits),
            Arg::In(&targets.labels),
            Arg::In(log_sums),
            Arg::In(gradient),
            Arg::Out(&mut out),
            Arg::size(targets.classes)?,
            Arg::F32(targets.smoothing),
            Arg::F32(targets.counted as f32),
        ];
        launch(kernel("cross_entropy_backward"), logits, logits.dtype(), grid(targets), arguments)?;
        Ok(out.into())
    }
}
