//! Attention while a text is generated, position by position.

use candle_core::{DType, Device, Result, Tensor};
use half::bf16;

use super::{as_bias, causal_bias, composed, head_width, host, split_heads};
use crate::error::{KernelError, check_shape};
use crate::path::Path;

/// The keys and values of the positions decoded so far, for [`cached_attention`] of one layer.
#[derive(Debug)]
pub struct KeyValueCache {
    /// `[B, capacity, 2·C]`, keys and values side by side; written up to `len`.
    rows: Tensor,
    len: usize,
}

impl KeyValueCache {
    /// An empty cache for `batch` sequences of up to `capacity` positions of `width` (`C`) numbers, kept as `dtype` on `device`.
    ///
    /// # Errors
    /// If the device has no room for it.
    pub fn new(batch: usize, capacity: usize, width: usize, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self { rows: Tensor::zeros((batch, capacity, 2 * width), dtype, device)?, len: 0 })
    }

    /// Positions that are cached.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions there is room for.
    pub fn capacity(&self) -> usize {
        self.rows.dims()[1]
    }

    /// Makes row `i` the former row `rows[i]`: beams change places, double and end. The number of rows may change.
    ///
    /// # Errors
    /// On a number that is no row.
    pub fn select(&mut self, rows: &[u32]) -> Result<()> {
        let batch = self.rows.dims()[0];
        if rows.iter().any(|&row| row as usize >= batch) {
            let (expected, found) = (format!("numbers below {batch}"), format!("{rows:?}"));
            return Err(KernelError::Value { op: "KeyValueCache::select", argument: "rows", expected, found }.into());
        }
        self.rows = select_rows(&self.rows, rows)?;
        Ok(())
    }
}

/// Causal self-attention of `S` new positions, which see what is cached and, of the new ones, themselves and those before;
/// their keys and values are added to the cache. For inference only: the result has no history, and nothing gets a gradient.
///
/// `qkv [B, S, 3·C]` as in [`crate::self_attention`], `key_bias [B, cache.len() + S]`. Returns `[B, S, C]`: the last `S`
/// rows of what [`crate::self_attention`] makes of the whole sequence.
///
/// # Errors
/// On a wrong shape, another type or device than the cache's, if the cache has no room for `S` more, or, on a GPU, if a head
/// has more than 128 numbers. No position counts as cached then.
pub fn cached_attention(qkv: &Tensor, cache: &mut KeyValueCache, key_bias: &Tensor, heads: usize) -> Result<Tensor> {
    const OP: &str = "cached_attention";
    let (_, new, packed) = qkv.dims3()?;
    let (b, capacity, kv_width) = cache.rows.dims3()?;
    let past = cache.len;
    check_shape(OP, "qkv", qkv, &[b, new, kv_width / 2 * 3])?;
    let c = head_width(OP, packed, 3, heads)? * heads;
    check_shape(OP, "key_bias", key_bias, &[b, past + new])?;
    if past + new > capacity {
        let (expected, found) =
            (format!("one with room for {new} more"), format!("one with {past} of {capacity} used"));
        return Err(KernelError::Value { op: OP, argument: "cache", expected, found }.into());
    }
    let path = Path::of(OP, &[("qkv", qkv), ("cache", &cache.rows)])?;
    let qkv = &qkv.detach().contiguous()?;
    if qkv.elem_count() > 0 {
        cache.rows.slice_set(&qkv.narrow(2, c, 2 * c)?.contiguous()?, 1, past)?;
    }
    let result = match path {
        #[cfg(gpu)]
        Path::Gpu => super::gpu::cached_attention(qkv, &cache.rows, past, as_bias(key_bias)?, heads)?,
        Path::HostF32 => host::cached_attention::<f32>(qkv, &cache.rows, past, &as_bias(key_bias)?, heads)?,
        Path::HostBf16 => host::cached_attention::<bf16>(qkv, &cache.rows, past, &as_bias(key_bias)?, heads)?,
        Path::Composed => {
            let part = |first: usize| split_heads(&cache.rows.narrow(1, 0, past + new)?.narrow(2, first, c)?, heads);
            let bias = key_bias.detach().to_dtype(qkv.dtype())?.reshape((b, 1, 1, past + new))?;
            let bias = bias.broadcast_add(&causal_bias(past, new, qkv)?)?;
            composed(&split_heads(&qkv.narrow(2, 0, c)?, heads)?, &part(0)?, &part(c)?, &bias, None)?
        }
    };
    cache.len += new;
    Ok(result)
}

/// Rows of a tensor by number, of which there may be none: candle chooses none on a GPU only by a view.
fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    if rows.is_empty() {
        return x.narrow(0, 0, 0);
    }
    x.index_select(&Tensor::from_slice(rows, rows.len(), x.device())?, 0)
}
