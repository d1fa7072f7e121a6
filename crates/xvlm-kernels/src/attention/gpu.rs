//! Attention on GPUs: launches of `cuda/attention.cu`.

use candle_core::{Result, Tensor, bail};

/// [`super::self_attention`] over a contiguous `qkv` and an `f32` key bias.
pub(super) fn self_attention(qkv: &Tensor, key_bias: Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    bail!("{qkv} {key_bias} {heads} {causal}")
}

/// [`super::cross_attention`] over contiguous `q` and `kv` and an `f32` key bias.
pub(super) fn cross_attention(
    q: &Tensor,
    kv: &Tensor,
    index: &[u32],
    key_bias: Tensor,
    heads: usize,
) -> Result<Tensor> {
    bail!("{q} {kv} {index:?} {key_bias} {heads}")
}

/// [`super::cached_attention`] over a contiguous `qkv` and a contiguous `cache [B, capacity, 2·C]` that holds the new keys
/// and values already, with an `f32` key bias `[B, past + S]`. Without a history.
pub(super) fn cached_attention(
    qkv: &Tensor,
    cache: &Tensor,
    past: usize,
    key_bias: Tensor,
    heads: usize,
) -> Result<Tensor> {
    bail!("{qkv} {cache} {past} {key_bias} {heads}")
}
