//! The operations as they are written without `xvlm-kernels`: in candle's own, one after the other.

use candle_core::{D, DType, Result, Tensor};
use xvlm::kernels::{AdamW, Update, WindowShape};

/// Softmax along the last dimension.
///
/// # Errors
/// If candle fails.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let exponent = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    exponent.broadcast_div(&exponent.sum_keepdim(D::Minus1)?)
}

/// Logarithm of the softmax along the last dimension.
///
/// # Errors
/// If candle fails.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// `x · σ(1.702 x)`.
///
/// # Errors
/// If candle fails.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    x / ((x * -1.702)?.exp()? + 1.0)?
}

/// Layer normalisation over the last dimension.
///
/// # Errors
/// If candle fails.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// `x · wᵀ + b` over the last dimension.
///
/// # Errors
/// If candle fails.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = n;
    x.reshape(((), k))?.matmul(&weight.t()?)?.broadcast_add(bias)?.reshape(shape)
}

/// Mean cross entropy with label smoothing: `logits [M, V]`, `labels [M]`.
///
/// # Errors
/// If candle fails.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, smoothing: f64) -> Result<Tensor> {
    let (rows, classes) = logits.dims2()?;
    let logs = log_softmax(logits)?;
    let share = smoothing / classes as f64;
    let chosen = (logs.gather(&labels.unsqueeze(1)?, 1)?.sum_all()? * (1.0 - smoothing - share))?;
    (chosen + (logs.sum_all()? * share)?)? / -(rows as f64)
}

/// Dropout.
///
/// # Errors
/// If candle fails.
pub fn dropout(x: &Tensor, probability: f64) -> Result<Tensor> {
    let kept = Tensor::rand(0f32, 1f32, x.shape(), x.device())?.ge(probability)?.to_dtype(x.dtype())?;
    x * (kept / (1.0 - probability))?
}

fn attend(q: &Tensor, k: &Tensor, v: &Tensor, bias: &Tensor, dropped: Option<f64>) -> Result<Tensor> {
    let (b, heads, t, width) = q.dims4()?;
    let scores = (q.matmul(&k.t()?.contiguous()?)? * (width as f64).powf(-0.5))?.broadcast_add(bias)?;
    let mut probabilities = softmax(&scores)?;
    if let Some(probability) = dropped {
        probabilities = dropout(&probabilities, probability)?;
    }
    probabilities.matmul(v)?.transpose(1, 2)?.contiguous()?.reshape((b, t, heads * width))
}

fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, t, c) = x.dims3()?;
    x.reshape((b, t, heads, c / heads))?.transpose(1, 2)?.contiguous()
}

/// Self-attention over packed projections `[B, T, 3·C]`; `bias` can be added to `[B, heads, T, T]`. Probabilities are dropped with
/// that of `dropped`.
///
/// # Errors
/// If candle fails.
pub fn self_attention(qkv: &Tensor, bias: &Tensor, heads: usize, dropped: Option<f64>) -> Result<Tensor> {
    let parts = qkv.chunk(3, 2)?;
    let part = |i: usize| split_heads(&parts[i], heads);
    attend(&part(0)?, &part(1)?, &part(2)?, bias, dropped)
}

/// Cross-attention of `q [P, T, C]` at the rows `index [P]` of `kv [N, L, 2·C]`.
///
/// # Errors
/// If candle fails.
pub fn cross_attention(q: &Tensor, kv: &Tensor, index: &Tensor, bias: &Tensor, heads: usize) -> Result<Tensor> {
    let kv = kv.index_select(index, 0)?.chunk(2, 2)?;
    attend(&split_heads(q, heads)?, &split_heads(&kv[0], heads)?, &split_heads(&kv[1], heads)?, bias, None)
}

/// The mask of a shifted window attention, `[1, windows, 1, area, area]`.
///
/// # Errors
/// If candle fails.
pub fn window_mask(shape: WindowShape, like: &Tensor) -> Result<Tensor> {
    let WindowShape { height, width, window, shift } = shape;
    let area = window * window;
    let band = |i: usize, size: usize| usize::from(i + window >= size) + usize::from(i + shift >= size);
    let mut mask = Vec::with_capacity(height * width * area);
    for top in (0..height).step_by(window) {
        for left in (0..width).step_by(window) {
            let region = |i: usize| (band(top + i / window, height), band(left + i % window, width));
            for a in 0..area {
                mask.extend((0..area).map(|b| if region(a) == region(b) { 0f32 } else { -100.0 }));
            }
        }
    }
    Tensor::from_vec(mask, (1, height * width / area, 1, area, area), like.device())?.to_dtype(like.dtype())
}

/// Shifted-window attention as Swin's reference has it: roll, partition, attend, put back, roll back.
///
/// # Errors
/// If candle fails.
pub fn window_attention(qkv: &Tensor, bias: &Tensor, shape: WindowShape, mask: Option<&Tensor>) -> Result<Tensor> {
    let WindowShape { height, width, window, shift } = shape;
    let (n, _, packed) = qkv.dims3()?;
    let (heads, area, _) = bias.dims3()?;
    let c = packed / 3;
    let (rows, columns) = (height / window, width / window);
    let grid = qkv.reshape((n, height, width, packed))?;
    let grid = if shift > 0 { grid.roll(-(shift as i32), 1)?.roll(-(shift as i32), 2)? } else { grid };
    let windows = grid.reshape((n, rows, window, columns, window, packed))?.transpose(2, 3)?.contiguous()?;
    let windows = windows.reshape((n * rows * columns, area, 3, heads, c / heads))?.permute((2, 0, 3, 1, 4))?;
    let part = |i: usize| windows.get(i)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scale = ((c / heads) as f64).powf(-0.5);
    let mut scores = (q.matmul(&k.t()?.contiguous()?)? * scale)?.broadcast_add(&bias.unsqueeze(0)?)?;
    if let Some(mask) = mask {
        let split = scores.reshape((n, rows * columns, heads, area, area))?;
        scores = split.broadcast_add(mask)?.reshape((n * rows * columns, heads, area, area))?;
    }
    let mixed = softmax(&scores)?.matmul(&v)?.transpose(1, 2)?.contiguous()?;
    let grid = mixed.reshape((n, rows, columns, window, window, c))?.transpose(2, 3)?.contiguous()?;
    let grid = grid.reshape((n, height, width, c))?;
    let grid = if shift > 0 { grid.roll(shift as i32, 1)?.roll(shift as i32, 2)? } else { grid };
    grid.reshape((n, height * width, c))
}

/// Patch pooling: `patches [N, L, C]`, `index [B]`, `mask [B, L]` → `[B, 1 + L, C]`.
///
/// # Errors
/// If candle fails.
pub fn patch_pool(patches: &Tensor, index: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let tokens = patches.index_select(index, 0)?;
    let count = mask.sum_keepdim(1)?.maximum(1f64)?;
    let mean = mask.broadcast_div(&count)?.unsqueeze(1)?.matmul(&tokens)?;
    Tensor::cat(&[&mean, &tokens], 1)
}

/// Generalised IoU of paired or broadcast corners: the last dimension of both is `x0, y0, x1, y1`.
///
/// # Errors
/// If candle fails.
pub fn giou(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let low = |boxes: &Tensor| boxes.narrow(D::Minus1, 0, 2);
    let high = |boxes: &Tensor| boxes.narrow(D::Minus1, 2, 2);
    let area = |sides: Tensor| sides.narrow(D::Minus1, 0, 1)?.mul(&sides.narrow(D::Minus1, 1, 1)?)?.squeeze(D::Minus1);
    let top = high(a)?.broadcast_minimum(&high(b)?)?;
    let overlap = area(top.broadcast_sub(&low(a)?.broadcast_maximum(&low(b)?)?)?.relu()?)?;
    let union = area((high(a)? - low(a)?)?)?.broadcast_add(&area((high(b)? - low(b)?)?)?)?.sub(&overlap)?;
    let edge = high(a)?.broadcast_maximum(&high(b)?)?;
    let hull = area(edge.broadcast_sub(&low(a)?.broadcast_minimum(&low(b)?)?)?)?;
    overlap.div(&union)? - (&hull - &union)?.div(&hull)?
}

/// `cx, cy, w, h` as corners.
///
/// # Errors
/// If candle fails.
pub fn corners(boxes: &Tensor) -> Result<Tensor> {
    let centre = boxes.narrow(D::Minus1, 0, 2)?;
    let half = (boxes.narrow(D::Minus1, 2, 2)? * 0.5)?;
    Tensor::cat(&[(&centre - &half)?, (&centre + &half)?], D::Minus1)
}

/// L1 and 1 − GIoU of paired `cx, cy, w, h`, as `[B, 2]`.
///
/// # Errors
/// If candle fails.
pub fn box_losses(predicted: &Tensor, target: &Tensor) -> Result<Tensor> {
    let l1 = (predicted - target)?.abs()?.sum_keepdim(1)?;
    let giou = giou(&corners(predicted)?, &corners(target)?)?.affine(-1.0, 1.0)?.unsqueeze(1)?;
    Tensor::cat(&[l1, giou], 1)
}

/// Zeros where keys are seen, in the shape that is added to scores: `[B, 1, 1, L]` of an f32 key bias `[B, L]`.
///
/// # Errors
/// If candle fails.
pub fn score_bias(key_bias: &Tensor, dtype: DType) -> Result<Tensor> {
    key_bias.to_dtype(dtype)?.unsqueeze(1)?.unsqueeze(1)
}

/// A causal bias `[1, 1, T, T]`.
///
/// # Errors
/// If candle fails.
pub fn causal_bias(t: usize, like: &Tensor) -> Result<Tensor> {
    let hidden = (0..t * t).map(|i| if i % t > i / t { -10_000f32 } else { 0.0 }).collect();
    Tensor::from_vec::<_, f32>(hidden, (1, 1, t, t), like.device())?.to_dtype(like.dtype())
}

/// A step of AdamW with clipping, parameter by parameter.
///
/// # Errors
/// If candle fails.
pub fn adamw(settings: &AdamW, updates: &[Update]) -> Result<()> {
    let squares = updates.iter().map(|update| update.gradient.detach().sqr()?.sum_all());
    let norm = Tensor::stack(&squares.collect::<Result<Vec<_>>>()?, 0)?.sum_all()?.to_scalar::<f32>()?.sqrt();
    let scale = settings.max_norm.map_or(1.0, |longest| (longest / (f64::from(norm) + 1e-6)).min(1.0));
    let AdamW { beta1, beta2, eps, .. } = *settings;
    for update in updates {
        let &Update { parameter, first_moment, second_moment, lr, weight_decay, step, .. } = update;
        let gradient = (update.gradient.detach() * scale)?;
        let first = ((first_moment.as_detached_tensor() * beta1)? + (&gradient * (1.0 - beta1))?)?;
        let second = ((second_moment.as_detached_tensor() * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let size = lr * (1.0 - beta2.powf(step as f64)).sqrt() / (1.0 - beta1.powf(step as f64));
        let moved = (parameter.as_detached_tensor() - ((&first / (second.sqrt()? + eps)?)? * size)?)?;
        parameter.set(&(moved * (1.0 - lr * weight_decay))?)?;
        first_moment.set(&first)?;
        second_moment.set(&second)?;
    }
    Ok(())
}
