//! Attention on GPUs: launches of `cuda/attention.cu`.

use candle_core::{DType, Result, Tensor};

use crate::gpu::attention::{kernels, scale};
use crate::gpu::{Arg, Buffer, launch};
use crate::graph::{Fresh, differentiable_by_result};

/// [`super::self_attention`] over a contiguous `qkv` and an `f32` key bias.
pub(super) fn self_attention(qkv: &Tensor, key_bias: Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (b, t, packed) = qkv.dims3()?;
    let c = packed / 3;
    let past = if causal { 0 } else { EVERYWHERE };
    let layout = Layout { rows: b, images: b, queries: t, keys: t, kv_rows: t, q_stride: packed, kv_stride: packed };
    let call = Call { layout, k_at: c, heads, width: c / heads, past };
    let (out, log_sums) = call.forward_remembering(qkv, qkv, None, &key_bias)?;
    differentiable_by_result("self_attention", [qkv], out, move |[qkv], out, gradient| {
        let mut d_qkv = Buffer::like(qkv, qkv.shape())?;
        let saved = Saved { key_bias: &key_bias, out, log_sums: &log_sums, gradient };
        let deltas = call.backward_queries(qkv, qkv, None, &saved, &mut d_qkv)?;
        call.backward_keys(qkv, qkv, None, &saved, &deltas, &mut d_qkv)?;
        Ok([Some(Fresh::from(d_qkv).detached())])
    })
}

/// [`super::cross_attention`] over contiguous `q` and `kv` and an `f32` key bias.
pub(super) fn cross_attention(
    q: &Tensor,
    kv: &Tensor,
    index: &[u32],
    key_bias: Tensor,
    heads: usize,
) -> Result<Tensor> {
    let (rows, t, c) = q.dims3()?;
    let (images, l, _) = kv.dims3()?;
    let layout = Layout { rows, images, queries: t, keys: l, kv_rows: l, q_stride: c, kv_stride: 2 * c };
    let call = Call { layout, k_at: 0, heads, width: c / heads, past: EVERYWHERE };
    let lookers = Lookers::new(index, images, q)?;
    let (out, log_sums) = call.forward_remembering(q, kv, Some(&lookers.index), &key_bias)?;
    differentiable_by_result("cross_attention", [q, kv], out, move |[q, kv], out, gradient| {
        let saved = Saved { key_bias: &key_bias, out, log_sums: &log_sums, gradient };
        let mut dq = Buffer::like(q, q.shape())?;
        let deltas = call.backward_queries(q, kv, Some(&lookers.index), &saved, &mut dq)?;
        let d_kv = || {
            let mut d_kv = Buffer::like(kv, kv.shape())?;
            call.backward_keys(q, kv, Some(&lookers), &saved, &deltas, &mut d_kv)?;
            Ok::<_, candle_core::Error>(Fresh::from(d_kv).detached())
        };
        let d_kv = kv.track_op().then(d_kv).transpose()?;
        Ok([Some(Fresh::from(dq).detached()), d_kv])
    })
}

/// [`super::cached_attention`]: the new positions' queries in `qkv [B, S, 3·C]` over the keys and values of the first
/// `past + S` positions in `cache [B, capacity, 2·C]`, both contiguous, with `key_bias [B, past + S]` in `f32`: new position
/// `i` sees those up to `past + i`. Returns `[B, S, C]` without a gradient.
pub(super) fn cached_attention(
    qkv: &Tensor,
    cache: &Tensor,
    past: usize,
    key_bias: Tensor,
    heads: usize,
) -> Result<Tensor> {
    let (b, s, packed) = qkv.dims3()?;
    let (_, capacity, kv_stride) = cache.dims3()?;
    let layout =
        Layout { rows: b, images: b, queries: s, keys: past + s, kv_rows: capacity, q_stride: packed, kv_stride };
    let call = Call { layout, k_at: 0, heads, width: kv_stride / 2 / heads, past };
    Ok(call.forward(qkv, cache, None, &key_bias, Arg::Absent)?.detached())
}

/// As how many positions behind a query every key is seen; see `Sequence` of attention.cu.
const EVERYWHERE: usize = 1 << 30;

/// Sizes, and how far a position is from the next, in numbers.
#[derive(Clone, Copy)]
struct Layout {
    rows: usize,
    images: usize,
    queries: usize,
    keys: usize,
    kv_rows: usize,
    q_stride: usize,
    kv_stride: usize,
}

#[derive(Clone, Copy)]
struct Call {
    layout: Layout,
    /// Where in a position of `kv` the keys start.
    k_at: usize,
    heads: usize,
    width: usize,
    /// How many positions behind a query are seen.
    past: usize,
}

/// What the backward pass is given.
struct Saved<'a> {
    key_bias: &'a Tensor,
    out: &'a Tensor,
    log_sums: &'a Tensor,
    gradient: &'a Tensor,
}

/// Which row looks at which image.
struct Lookers {
    /// `[rows]`: the image.
    index: Tensor,
    /// `[images + 1]`: where in `rows` those of an image start.
    starts: Tensor,
    /// The rows of each image in ascending order, image by image.
    rows: Tensor,
}

impl Lookers {
    fn new(index: &[u32], images: usize, near: &Tensor) -> Result<Self> {
        let mut starts = vec![0u32; images + 1];
        index.iter().for_each(|&image| starts[image as usize + 1] += 1);
        (0..images).for_each(|image| starts[image + 1] += starts[image]);
        let mut rows: Vec<u32> = (0..index.len() as u32).collect();
        rows.sort_by_key(|&row| index[row as usize]);
        // One copy to the GPU for the three.
        let all = Tensor::new([index, &starts, &rows].concat(), near.device())?;
        let part = |start, len| all.narrow(0, start, len);
        let pairs = index.len();
        Ok(Self { index: part(0, pairs)?, starts: part(pairs, images + 1)?, rows: part(pairs + images + 1, pairs)? })
    }
}

impl Call {
    fn sizes(&self) -> Result<[Arg<'static>; 10]> {
        let Layout { queries, keys, kv_rows, q_stride, kv_stride, .. } = self.layout;
        let size = Arg::size;
        Ok([
            size(queries)?,
            size(keys)?,
            size(kv_rows)?,
            size(q_stride)?,
            size(kv_stride)?,
            size(self.k_at)?,
            size(self.heads)?,
            size(self.width)?,
            size(self.past)?,
            Arg::F32(scale(self.width)),
        ])
    }

    /// The result `[rows, queries, C]`. For the backward pass it writes `log_sums [rows, heads, queries]`.
    fn forward(
        &self,
        q: &Tensor,
        kv: &Tensor,
        index: Option<&Tensor>,
        key_bias: &Tensor,
        log_sums: Arg,
    ) -> Result<Fresh> {
        let Layout { rows, queries, .. } = self.layout;
        let kernels = kernels!("attention", self.width)?;
        let grid = kernels.forward_grid(q.dtype(), queries, rows, self.heads);
        let mut out = Buffer::like(q, (rows, queries, self.heads * self.width))?;
        let mut arguments = vec![Arg::In(q), Arg::In(kv), index.map_or(Arg::Absent, Arg::In), Arg::In(key_bias)];
        arguments.extend([Arg::Out(&mut out), log_sums]);
        arguments.extend(self.sizes()?);
        launch(kernels.forward, q, q.dtype(), grid, &mut arguments)?;
        Ok(out.into())
    }

    /// The result, and what the backward pass needs of it.
    fn forward_remembering(
        &self,
        q: &Tensor,
        kv: &Tensor,
        index: Option<&Tensor>,
        key_bias: &Tensor,
    ) -> Result<(Fresh, Tensor)> {
        let Layout { rows, queries, .. } = self.layout;
        let mut log_sums = Buffer::new(q, DType::F32, (rows, self.heads, queries))?;
        let out = self.forward(q, kv, index, key_bias, Arg::Out(&mut log_sums))?;
        Ok((out, Fresh::from(log_sums).detached()))
    }

    /// Writes `dq`, and returns for each query of each head the product of its result and its gradient.
    fn backward_queries(
        &self,
        q: &Tensor,
        kv: &Tensor,
        index: Option<&Tensor>,
        saved: &Saved,
        dq: &mut Buffer,
    ) -> Result<Buffer> {
        let Layout { rows, queries, .. } = self.layout;
        let kernels = kernels!("attention", self.width)?;
        let grid = kernels.backward_grid(q.dtype(), queries, rows, self.heads);
        let mut deltas = Buffer::new(q, DType::F32, (rows, self.heads, queries))?;
        let mut arguments = vec![Arg::In(q), Arg::In(kv), index.map_or(Arg::Absent, Arg::In), Arg::In(saved.key_bias)];
        arguments.extend([Arg::In(saved.out), Arg::In(saved.gradient), Arg::In(saved.log_sums)]);
        arguments.extend([Arg::Out(&mut deltas), Arg::Out(dq)]);
        arguments.extend(self.sizes()?);
        launch(kernels.queries, q, q.dtype(), grid, &mut arguments)?;
        Ok(deltas)
    }

    /// Writes the gradients of keys and values.
    fn backward_keys(
        &self,
        q: &Tensor,
        kv: &Tensor,
        lookers: Option<&Lookers>,
        saved: &Saved,
        deltas: &Buffer,
        d_kv: &mut Buffer,
    ) -> Result<()> {
        let Layout { images, keys, .. } = self.layout;
        let kernels = kernels!("attention", self.width)?;
        let grid = kernels.backward_grid(q.dtype(), keys, images, self.heads);
        let mut arguments = vec![Arg::In(q), Arg::In(kv)];
        arguments.extend(match lookers {
            Some(Lookers { starts, rows, .. }) => [Arg::In(starts), Arg::In(rows)],
            None => [Arg::Absent, Arg::Absent],
        });
        arguments.extend([Arg::In(saved.key_bias), Arg::In(saved.gradient), Arg::In(saved.log_sums)]);
        arguments.extend([Arg::Made(deltas), Arg::Out(d_kv)]);
        arguments.extend(self.sizes()?);
        launch(kernels.keys, q, q.dtype(), grid, &mut arguments)
    }
}
