//! Attention on the CPU.

use candle_core::{Result, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::Instructions;
use super::glance::Glance;
use super::head::{Bias, Extent, Source, Span, Target, attend, with_scratch};
use crate::dropout::{Dropout, Part};
use crate::graph::{Fresh, differentiable};
use crate::host::{Disjoint, read, written};
use crate::real::Real;
use crate::simd::max;

pub(super) fn self_attention<T: Instructions>(
    qkv: &Tensor,
    key_bias: &Tensor,
    heads: usize,
    causal: bool,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let packed = Packed { dropout, ..Packed::of_self(qkv, heads, causal)? };
    let bias = anchored(key_bias)?;
    let result = packed.forward(&read::<T>(qkv)?, &read::<T>(qkv)?, &bias);
    differentiable("self_attention", [qkv], result, move |[qkv], gradient| {
        Ok([Some(packed.backward_self(&read::<T>(qkv)?, &read::<T>(gradient)?, &bias).detached())])
    })
}

pub(super) fn cross_attention<T: Instructions>(
    q: &Tensor,
    kv: &Tensor,
    index: &[u32],
    key_bias: &Tensor,
    heads: usize,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let packed = Packed { dropout, ..Packed::of_cross(q, kv, index, heads)? };
    let bias = anchored(key_bias)?;
    let result = packed.forward(&read::<T>(q)?, &read::<T>(kv)?, &bias);
    differentiable("cross_attention", [q, kv], result, move |[q, kv], gradient| {
        let (dq, dkv) = packed.backward_cross(&read::<T>(q)?, &read::<T>(kv)?, &read::<T>(gradient)?, &bias);
        Ok([Some(dq.detached()), Some(dkv.detached())])
    })
}

/// [`super::cached_attention`] over a cache `[B, capacity, 2·C]` that holds the new keys and values already.
pub(super) fn cached_attention<T: Instructions>(
    qkv: &Tensor,
    cache: &Tensor,
    past: usize,
    key_bias: &Tensor,
    heads: usize,
) -> Result<Tensor> {
    let packed = Packed::of_cached(qkv, cache, past, heads)?;
    Ok(packed.forward(&read::<T>(qkv)?, &read::<T>(cache)?, &anchored(key_bias)?).detached())
}

/// Biases less the largest of their row, to which a softmax is blind: where all keys are hidden, the large number that hides
/// them would take the scores' digits.
fn anchored(key_bias: &Tensor) -> Result<Vec<f32>> {
    let keys = key_bias.dims()[1];
    let mut bias = read::<f32>(key_bias)?.to_vec();
    for row in bias.chunks_exact_mut(keys.max(1)) {
        let top = max(row);
        if top.is_finite() {
            row.iter_mut().for_each(|x| *x -= top);
        }
    }
    Ok(bias)
}

/// Where queries, keys and values lie in the tensors of one call.
struct Packed {
    /// Sequences of queries.
    rows: usize,
    /// Sequences of keys and values.
    images: usize,
    heads: usize,
    /// For all heads: the sizes of one.
    extent: Extent,
    /// Distances between the rows of queries and between those of keys; keys are `keys_at` behind a row's start, values
    /// another `C`.
    q_stride: usize,
    kv_stride: usize,
    keys_at: usize,
    /// Rows of a sequence of keys, those unused among them.
    capacity: usize,
    /// The keys and values that each sequence of queries looks at, where these are not its own.
    index: Option<Vec<u32>>,
    dropout: Option<Dropout>,
}

impl Packed {
    fn of_self(qkv: &Tensor, heads: usize, causal: bool) -> Result<Self> {
        let (rows, length, packed) = qkv.dims3()?;
        let c = packed / 3;
        let extent = Extent { queries: length, keys: length, width: c / heads, causal: causal.then_some(0) };
        let (q_stride, kv_stride, keys_at, capacity) = (packed, packed, c, length);
        Ok(Self {
            rows,
            images: rows,
            heads,
            extent,
            q_stride,
            kv_stride,
            keys_at,
            capacity,
            index: None,
            dropout: None,
        })
    }

    fn of_cross(q: &Tensor, kv: &Tensor, index: &[u32], heads: usize) -> Result<Self> {
        let (rows, queries, c) = q.dims3()?;
        let (images, keys, _) = kv.dims3()?;
        let extent = Extent { queries, keys, width: c / heads, causal: None };
        let (q_stride, kv_stride, keys_at, capacity) = (c, 2 * c, 0, keys);
        let index = Some(index.to_vec());
        Ok(Self { rows, images, heads, extent, q_stride, kv_stride, keys_at, capacity, index, dropout: None })
    }

    fn of_cached(qkv: &Tensor, cache: &Tensor, past: usize, heads: usize) -> Result<Self> {
        let (rows, queries, packed) = qkv.dims3()?;
        let (_, capacity, _) = cache.dims3()?;
        let c = packed / 3;
        let extent = Extent { queries, keys: past + queries, width: c / heads, causal: Some(past) };
        let (q_stride, kv_stride, keys_at) = (packed, 2 * c, 0);
        Ok(Self {
            rows,
            images: rows,
            heads,
            extent,
            q_stride,
            kv_stride,
            keys_at,
            capacity,
            index: None,
            dropout: None,
        })
    }

    fn c(&self) -> usize {
        self.heads * self.extent.width
    }

    fn image(&self, row: usize) -> usize {
        self.index.as_ref().map_or(row, |index| index[row] as usize)
    }

    fn span(&self, start: usize, stride: usize, head: usize) -> Span<'static> {
        let width = self.extent.width;
        Span { start: start + head * width, stride, width, order: None }
    }

    fn queries(&self, row: usize, head: usize) -> Span<'static> {
        self.span(row * self.extent.queries * self.q_stride, self.q_stride, head)
    }

    fn outputs(&self, row: usize, head: usize) -> Span<'static> {
        self.span(row * self.extent.queries * self.c(), self.c(), head)
    }

    /// Keys and values.
    fn looked_at(&self, image: usize, head: usize) -> [Span<'static>; 2] {
        let start = image * self.capacity * self.kv_stride + self.keys_at;
        [start, start + self.c()].map(|start| self.span(start, self.kv_stride, head))
    }

    /// What is dropped of the probabilities of a head.
    fn dropped(&self, row: usize, head: usize) -> Option<Part> {
        self.dropout.map(|dropout| dropout.part(row * self.heads + head))
    }

    fn bias<'a>(&self, bias: &'a [f32], row: usize) -> &'a [f32] {
        &bias[row * self.extent.keys..][..self.extent.keys]
    }

    /// Items for threads, so many at a time that the work is worth a thread.
    fn items(&self, count: usize) -> impl IndexedParallelIterator<Item = usize> + use<> {
        const WORTH: usize = 1 << 15;
        let Extent { queries, keys, width, .. } = self.extent;
        (0..count).into_par_iter().with_min_len(WORTH / (queries * keys * width).max(1) + 1)
    }

    fn forward<T: Instructions>(&self, queries: &[T], looked_at: &[T], bias: &[f32]) -> Fresh {
        let extent = &self.extent;
        let arch = Arch::new();
        written((self.rows, extent.queries, self.c()), |out: &mut [T]| {
            let out = Disjoint::new(out);
            self.items(self.rows * self.heads).for_each(|item| {
                let (row, head) = (item / self.heads, item % self.heads);
                let q = Source { values: queries, span: self.queries(row, head) };
                let [k, v] = self.looked_at(self.image(row), head).map(|span| Source { values: looked_at, span });
                let bias = self.bias(bias, row);
                // SAFETY: the rows of an output lie inside `out`, and each belongs to one item.
                let out = unsafe { Target::new(out, self.outputs(row, head)) };
                let dropped = self.dropped(row, head);
                if extent.queries == 1 && dropped.is_none() {
                    // To copy the keys would cost more than to look at them where they lie.
                    arch.dispatch(Glance { extent, q, k, v, bias, out });
                } else {
                    attend(arch, extent, [q, k, v], Bias::Keys(bias), dropped, out);
                }
            });
        })
    }

    fn backward_self<T: Real>(&self, qkv: &[T], gradient: &[T], bias: &[f32]) -> Fresh {
        written((self.rows, self.extent.queries, self.q_stride), |out: &mut [T]| {
            let out = Disjoint::new(out);
            self.items(self.rows * self.heads).for_each(|item| {
                let (row, head) = (item / self.heads, item % self.heads);
                // SAFETY: `out` is as large as `qkv`, and a row and a head belong to one item.
                unsafe { self.backward(row, &[row], head, (qkv, qkv), gradient, bias, (out, out)) };
            });
        })
    }

    fn backward_cross<T: Real>(&self, q: &[T], kv: &[T], gradient: &[T], bias: &[f32]) -> (Fresh, Fresh) {
        let mut rows_of = vec![Vec::new(); self.images];
        (0..self.rows).for_each(|row| rows_of[self.image(row)].push(row));
        let mut dkv = None;
        let dq = written((self.rows, self.extent.queries, self.c()), |dq: &mut [T]| {
            let dq = Disjoint::new(dq);
            dkv = Some(written((self.images, self.extent.keys, 2 * self.c()), |dkv: &mut [T]| {
                let dkv = Disjoint::new(dkv);
                self.items(self.images * self.heads).for_each(|item| {
                    let (image, head) = (item / self.heads, item % self.heads);
                    // SAFETY: the results are as large as `q` and `kv`; an image and a head belong to one item, and a row
                    // of queries looks at one image.
                    unsafe { self.backward(image, &rows_of[image], head, (q, kv), gradient, bias, (dq, dkv)) };
                });
            }));
        });
        (dq, dkv.expect("written with the gradient of the queries"))
    }

    /// Gradients of one head for one image and the rows of queries that look at it, in their order.
    ///
    /// # Safety
    /// The gradients are as large as the queries and as what is looked at, and nothing else touches those of this head for
    /// this image and these rows meanwhile.
    #[allow(clippy::too_many_arguments)]
    unsafe fn backward<T: Real>(
        &self,
        image: usize,
        rows: &[usize],
        head: usize,
        (queries, looked_at): (&[T], &[T]),
        gradient: &[T],
        bias: &[f32],
        (d_queries, d_looked_at): (Disjoint<T>, Disjoint<T>),
    ) {
        let arch = Arch::new();
        with_scratch(&self.extent, true, |scratch| {
            let spans = self.looked_at(image, head);
            let [k, v] = spans.map(|span| Source { values: looked_at, span });
            scratch.look_at(arch, k, v);
            for &row in rows {
                let span = self.queries(row, head);
                let q = Source { values: queries, span };
                let gradient = Source { values: gradient, span: self.outputs(row, head) };
                // SAFETY: the caller's promise.
                let dq = unsafe { Target::new(d_queries, span) };
                let bias = Bias::Keys(self.bias(bias, row));
                scratch.backward(arch, q, bias, self.dropped(row, head), gradient, dq, None);
            }
            // SAFETY: the caller's promise; keys and values lie side by side.
            let [dk, dv] = spans.map(|span| unsafe { Target::new(d_looked_at, span) });
            scratch.finish(arch, dk, dv);
        });
    }
}
