//! Scaled dot-product attention over packed projections.

use candle_core::{D, DType, Result, Tensor};
use half::bf16;

use crate::dropout::Dropout;
use crate::error::{KernelError, check_shape};
use crate::host::cast;
use crate::path::Path;
use crate::softmax::softmax;

mod decode;
mod glance;
#[cfg(gpu)]
mod gpu;
pub(crate) mod head;
mod host;
#[cfg(target_arch = "x86_64")]
mod native;
mod softmax;

#[cfg(target_arch = "x86_64")]
pub(crate) use native::Instructions;

/// A float type; no other processor's instructions are known here.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait Instructions: crate::real::Real {}

#[cfg(not(target_arch = "x86_64"))]
impl<T: crate::real::Real> Instructions for T {}

pub use decode::{KeyValueCache, cached_attention};

/// What is done to the attention probabilities.
#[derive(Clone, Copy)]
pub enum Dropped<'a> {
    /// Dropout; its parts are the probabilities of a head, `[T, keys]` each.
    AtRandom(Dropout),
    /// A function that is given all of them, `[B, heads, T, keys]`, and returns what is to be multiplied by the values.
    By(&'a dyn Fn(&Tensor) -> Result<Tensor>),
}

impl Dropped<'_> {
    /// The path that knows how: fused loops do dropout themselves.
    fn path(this: Option<Self>, path: Path) -> Path {
        match (this, path) {
            (None, _) | (Some(Self::AtRandom(_)), Path::HostF32 | Path::HostBf16) => path,
            _ => Path::Composed,
        }
    }

    fn dropout(this: Option<Self>, op: &'static str) -> Result<Option<Dropout>> {
        match this {
            Some(Self::AtRandom(dropout)) => dropout.check(op).map(|()| Some(dropout)),
            _ => Ok(None),
        }
    }

    fn apply(self, probabilities: &Tensor) -> Result<Tensor> {
        match self {
            Self::By(function) => function(probabilities),
            Self::AtRandom(dropout) => {
                let (_, _, queries, keys) = probabilities.dims4()?;
                let factors = dropout.factors(probabilities.elem_count(), queries * keys);
                let factors = Tensor::from_vec(factors, probabilities.shape(), probabilities.device())?;
                probabilities * factors.to_dtype(probabilities.dtype())?
            }
        }
    }
}

/// Multi-head self-attention.
///
/// `qkv [B, T, 3·C]` holds queries, keys and values side by side, each with its heads side by side; `key_bias [B, T]` is
/// added to the scores of every query (0 keeps a key, a large negative number hides it; if all keys of a sequence are hidden,
/// all are seen alike); with `causal` a position sees itself and what is before it, and nothing else. Returns `[B, T, C]`:
/// softmax(q·kᵀ / √width + bias) · v of each head (Vaswani et al. 2017, §3.2). The bias gets no gradient.
///
/// On a CPU that has instructions for bf16, a probability of that type is rounded (2⁻⁹ of it) before it weighs a value, here as
/// in [`cross_attention`], [`cached_attention`] and [`window_attention`](crate::window_attention). It stays f32
/// without such instructions, with dropout, in heads of odd width, and, but for windows, where there is a single query.
///
/// # Errors
/// On a wrong shape, if `C` is not a multiple of `heads`, or, on a GPU, if a head has more than 128 numbers.
pub fn self_attention(
    qkv: &Tensor,
    key_bias: &Tensor,
    heads: usize,
    causal: bool,
    dropped: Option<Dropped>,
) -> Result<Tensor> {
    const OP: &str = "self_attention";
    let (b, t, packed) = qkv.dims3()?;
    let width = head_width(OP, packed, 3, heads)?;
    check_shape(OP, "key_bias", key_bias, &[b, t])?;
    let dropout = Dropped::dropout(dropped, OP)?;
    let path = Dropped::path(dropped, Path::for_tensor(qkv));
    if path == Path::Composed {
        let part = |i: usize| split_heads(&qkv.narrow(2, i * width * heads, width * heads)?, heads);
        let mut bias = key_bias.detach().to_dtype(qkv.dtype())?.reshape((b, 1, 1, t))?;
        if causal {
            bias = bias.broadcast_add(&causal_bias(0, t, qkv)?)?;
        }
        return composed(&part(0)?, &part(1)?, &part(2)?, &bias, dropped);
    }
    let (qkv, key_bias) = (&qkv.contiguous()?, as_bias(key_bias)?);
    match path {
        #[cfg(gpu)]
        Path::Gpu => gpu::self_attention(qkv, key_bias, heads, causal),
        Path::HostBf16 => host::self_attention::<bf16>(qkv, &key_bias, heads, causal, dropout),
        _ => host::self_attention::<f32>(qkv, &key_bias, heads, causal, dropout),
    }
}

/// Multi-head cross-attention in which several texts may look at one image. Probabilities of bf16 are as in
/// [`self_attention`].
///
/// `q [P, T, C]`; `kv [N, L, 2·C]` holds keys and values side by side; row `p` of `q` looks at row `index[p]` of `kv`
/// through `key_bias [P, L]`, which gets no gradient. Returns `[P, T, C]`.
///
/// # Errors
/// On a wrong shape, no keys, an index that is not below `N`, if `C` is not a multiple of `heads`, or, on a GPU, if a head has
/// more than 128 numbers.
pub fn cross_attention(
    q: &Tensor,
    kv: &Tensor,
    index: &[u32],
    key_bias: &Tensor,
    heads: usize,
    dropped: Option<Dropped>,
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
    if l == 0 {
        let expected = "[.., L, ..] with at least one key".into();
        return Err(KernelError::Shape { op: OP, argument: "kv", expected, found: kv.dims().to_vec() }.into());
    }
    let path = Path::of(OP, &[("q", q), ("kv", kv)])?;
    let dropout = Dropped::dropout(dropped, OP)?;
    let path = Dropped::path(dropped, path);
    if path == Path::Composed {
        let kv = kv.contiguous()?.index_select(&Tensor::from_slice(index, pairs, q.device())?, 0)?;
        let k = split_heads(&kv.narrow(2, 0, width * heads)?, heads)?;
        let v = split_heads(&kv.narrow(2, width * heads, width * heads)?, heads)?;
        let bias = key_bias.detach().to_dtype(q.dtype())?.reshape((pairs, 1, 1, l))?;
        return composed(&split_heads(q, heads)?, &k, &v, &bias, dropped);
    }
    let (q, kv, key_bias) = (&q.contiguous()?, &kv.contiguous()?, as_bias(key_bias)?);
    match path {
        #[cfg(gpu)]
        Path::Gpu => gpu::cross_attention(q, kv, index, key_bias, heads),
        Path::HostBf16 => host::cross_attention::<bf16>(q, kv, index, &key_bias, heads, dropout),
        _ => host::cross_attention::<f32>(q, kv, index, &key_bias, heads, dropout),
    }
}

/// As the kernels take it.
fn as_bias(key_bias: &Tensor) -> Result<Tensor> {
    cast(&key_bias.detach(), DType::F32)?.contiguous()
}

/// Numbers of a head, in rows of `parts` times all heads.
pub(crate) fn head_width(op: &'static str, packed: usize, parts: usize, heads: usize) -> Result<usize> {
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

/// `[1, 1, S, past + S]`: 0 for what each of `S` new positions sees, −∞ for what is after it.
fn causal_bias(past: usize, new: usize, like: &Tensor) -> Result<Tensor> {
    let keys = past + new;
    let bias = |i: usize| if i % keys > i / keys + past { f32::NEG_INFINITY } else { 0.0 };
    let values: Vec<f32> = (0..new * keys).map(bias).collect();
    Tensor::from_vec(values, (1, 1, new, keys), like.device())?.to_dtype(like.dtype())
}

fn composed(q: &Tensor, k: &Tensor, v: &Tensor, bias: &Tensor, dropped: Option<Dropped>) -> Result<Tensor> {
    let (b, heads, t, width) = q.dims4()?;
    if q.elem_count() == 0 {
        // candle takes no maximum of nothing; without numbers, one shape is like the other.
        return q.reshape((b, t, heads * width));
    }
    let scores = (q.matmul(&k.t()?.contiguous()?)? * (width as f64).powf(-0.5))?.broadcast_add(bias)?;
    let mut probabilities = softmax(&scores, D::Minus1)?;
    if let Some(dropped) = dropped {
        probabilities = dropped.apply(&probabilities)?;
    }
    probabilities.matmul(v)?.transpose(1, 2)?.contiguous()?.reshape((b, t, heads * width))
}
