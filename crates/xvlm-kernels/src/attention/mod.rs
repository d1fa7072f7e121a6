//! Scaled dot-product attention over packed projections.

use candle_core::{D, DType, Result, Tensor};

use crate::error::{KernelError, check_shape};
use crate::path::Path;
use crate::softmax::softmax;

#[cfg(gpu)]
mod gpu;
pub(crate) mod host;

/// Dropout on the attention probabilities: given the probabilities, returns them dropped out and rescaled.
pub type Dropped<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;

/// Multi-head self-attention.
///
/// `qkv [B, T, 3·C]` holds queries, keys and values side by side, each with its heads side by side; `key_bias [B, T]` is
/// added to the scores of every query (0 keeps a key, a large negative number hides it); with `causal` a position sees
/// itself and what is before it. Returns `[B, T, C]`.
///
/// # Errors
/// On a wrong shape, or if `C` is not a multiple of `heads`.
pub fn self_attention(
    qkv: &Tensor,
    key_bias: &Tensor,
    heads: usize,
    causal: bool,
    dropout: Option<Dropped>,
) -> Result<Tensor> {
    let (b, t, packed) = qkv.dims3()?;
    let width = head_width("self_attention", packed, 3, heads)?;
    check_shape("self_attention", "key_bias", key_bias, &[b, t])?;
    if dropout.is_none() {
        let key_bias = || key_bias.to_dtype(DType::F32)?.contiguous().map(|bias| bias.detach());
        match Path::for_tensor(qkv) {
            Path::HostF32 => return host::self_attention(&qkv.contiguous()?, key_bias()?, heads, causal),
            #[cfg(gpu)]
            Path::Gpu => return gpu::self_attention(&qkv.contiguous()?, key_bias()?, heads, causal),
            _ => {}
        }
    }
    let part = |i: usize| split_heads(&qkv.narrow(2, i * width * heads, width * heads)?, heads);
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let mut bias = key_bias.to_dtype(qkv.dtype())?.reshape((b, 1, 1, t))?;
    if causal {
        bias = bias.broadcast_add(&causal_bias(t, qkv)?)?;
    }
    composed(&q, &k, &v, &bias, dropout)
}

/// Multi-head cross-attention in which several texts may look at one image.
///
/// `q [P, T, C]`; `kv [N, L, 2·C]` holds keys and values side by side; row `p` of `q` looks at row `index[p]` of `kv`
/// through `key_bias [P, L]`. Returns `[P, T, C]`.
///
/// # Errors
/// On a wrong shape, an index that is not below `N`, or if `C` is not a multiple of `heads`.
pub fn cross_attention(
    q: &Tensor,
    kv: &Tensor,
    index: &[u32],
    key_bias: &Tensor,
    heads: usize,
    dropout: Option<Dropped>,
) -> Result<Tensor> {
    const OP: &str = "cross_attention";
    let (pairs, _, c) = q.dims3()?;
    let (n, l, _) = kv.dims3()?;
    let width = head_width(OP, c, 1, heads)?;
    check_shape(OP, "kv", kv, &[n, l, 2 * c])?;
    check_shape(OP, "key_bias", key_bias, &[pairs, l])?;
    if index.len() != pairs || index.iter().any(|&i| i as usize >= n) {
        let expected = format!("{pairs} numbers below {n}");
        return Err(KernelError::Value { op: OP, argument: "index", expected, found: format!("{index:?}") }.into());
    }
    if dropout.is_none() {
        let key_bias = || key_bias.to_dtype(DType::F32)?.contiguous().map(|bias| bias.detach());
        match Path::of(OP, &[("q", q), ("kv", kv)])? {
            Path::HostF32 => {
                return host::cross_attention(&q.contiguous()?, &kv.contiguous()?, index, key_bias()?, heads);
            }
            #[cfg(gpu)]
            Path::Gpu => return gpu::cross_attention(&q.contiguous()?, &kv.contiguous()?, index, key_bias()?, heads),
            _ => {}
        }
    }
    let rows = Tensor::new(index, q.device())?;
    let kv = kv.index_select(&rows, 0)?;
    let k = split_heads(&kv.narrow(2, 0, width * heads)?, heads)?;
    let v = split_heads(&kv.narrow(2, width * heads, width * heads)?, heads)?;
    let bias = key_bias.to_dtype(q.dtype())?.reshape((pairs, 1, 1, l))?;
    composed(&split_heads(q, heads)?, &k, &v, &bias, dropout)
}

fn head_width(op: &'static str, packed: usize, parts: usize, heads: usize) -> Result<usize> {
    if heads == 0 || packed == 0 || !packed.is_multiple_of(parts * heads) {
        let expected = format!("a divisor of the width ({packed} / {parts})");
        return Err(KernelError::Value { op, argument: "heads", expected, found: heads.to_string() }.into());
    }
    Ok(packed / parts / heads)
}

/// `[B, T, C]` → `[B, heads, T, C / heads]`.
fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, t, c) = x.dims3()?;
    x.reshape((b, t, heads, c / heads))?.transpose(1, 2)?.contiguous()
}

/// `[1, 1, T, T]`: 0 on and below the diagonal, −10000 above.
fn causal_bias(t: usize, like: &Tensor) -> Result<Tensor> {
    let values: Vec<f32> = (0..t * t).map(|i| if i % t > i / t { HIDDEN } else { 0.0 }).collect();
    Tensor::from_vec(values, (1, 1, t, t), like.device())?.to_dtype(like.dtype())
}

/// What the original adds to the score of a hidden position (`(1 − mask) · −10000`).
const HIDDEN: f32 = -10_000.0;

fn composed(q: &Tensor, k: &Tensor, v: &Tensor, bias: &Tensor, dropout: Option<Dropped>) -> Result<Tensor> {
    let (b, heads, t, width) = q.dims4()?;
    let scores = (q.matmul(&k.t()?.contiguous()?)? * (width as f64).powf(-0.5))?.broadcast_add(bias)?;
    let mut probabilities = softmax(&scores, D::Minus1)?;
    if let Some(dropout) = dropout {
        probabilities = dropout(&probabilities)?;
    }
    probabilities.matmul(v)?.transpose(1, 2)?.contiguous()?.reshape((b, t, heads * width))
}
