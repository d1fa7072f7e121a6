//! Scaled dot-product attention over packed projections.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor};
use gemm::Parallelism;
use rayon::prelude::*;

use crate::error::{KernelError, check_shape};
use crate::host::{Disjoint, is_host_f32, read, slice};
use crate::loss::softmax;
use crate::simd::{Matrix, dot, multiply, softmax_row, vectorized};

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
    if dropout.is_none() && is_host_f32(&[qkv, key_bias]) {
        let op = SelfAttention { heads, causal, key_bias: key_bias.contiguous()?.detach() };
        return qkv.contiguous()?.apply_op1(op);
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
    if dropout.is_none() && is_host_f32(&[q, kv, key_bias]) {
        let op = CrossAttention { heads, index: index.to_vec(), key_bias: key_bias.contiguous()?.detach() };
        return q.contiguous()?.apply_op2(&kv.contiguous()?, op);
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

/// One head of one sequence, as views into packed buffers: starts of the head's columns and distances between rows.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) q_stride: usize,
    pub(crate) kv_stride: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) width: usize,
}

impl Head<'_> {
    fn scale(&self) -> f32 {
        (self.width as f32).powf(-0.5)
    }

    /// Attention probabilities `[queries, keys]`; `bias(query, row)` adds to a row of scores before the softmax.
    #[inline(always)]
    pub(crate) fn probabilities(&self, out: &mut [f32], bias: impl Fn(usize, &mut [f32])) {
        let dims = (self.queries, self.keys, self.width);
        let (q, k) = (Matrix::rows(self.q, self.q_stride), Matrix::rows(self.k, self.kv_stride).transposed());
        // SAFETY: the slices start at this head's first row and reach beyond its last.
        unsafe { multiply(dims, out, self.keys, false, q, k, self.scale(), Parallelism::None) };
        for (i, row) in out.chunks_exact_mut(self.keys).enumerate() {
            bias(i, row);
            softmax_row(row);
        }
    }

    /// `probabilities · v` into `out`, rows `stride` apart.
    pub(crate) fn mix(&self, probabilities: &[f32], out: &mut [f32], stride: usize) {
        let (p, v) = (Matrix::rows(probabilities, self.keys), Matrix::rows(self.v, self.kv_stride));
        let dims = (self.queries, self.width, self.keys);
        // SAFETY: as above; `out` is a fresh buffer.
        unsafe { multiply(dims, out, stride, false, p, v, 1.0, Parallelism::None) };
    }

    /// Gradients of one head. `grad` is the gradient of the output, rows `grad_stride` apart. On return `scratch` holds
    /// the gradient of the scores (before scaling); `dq` is written, `dk` and `dv` are written or added to.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        probabilities: &[f32],
        grad: &[f32],
        grad_stride: usize,
        scratch: &mut [f32],
        (dq, dq_stride): (&mut [f32], usize),
        (dk, dv, dkv_stride): (&mut [f32], &mut [f32], usize),
        accumulate: bool,
    ) {
        let (t, l, d) = (self.queries, self.keys, self.width);
        let g = Matrix::rows(grad, grad_stride);
        let p = Matrix::rows(probabilities, l);
        let none = Parallelism::None;
        // SAFETY: the slices start at this head and reach beyond its last row; outputs are distinct.
        unsafe {
            multiply((l, d, t), dv, dkv_stride, accumulate, p.transposed(), g, 1.0, none);
            let v = Matrix::rows(self.v, self.kv_stride).transposed();
            multiply((t, l, d), scratch, l, false, g, v, 1.0, none);
        }
        for (ds, p) in scratch.chunks_exact_mut(l).zip(probabilities.chunks_exact(l)) {
            let inner = dot(ds, p);
            for (ds, p) in ds.iter_mut().zip(p) {
                *ds = p * (*ds - inner);
            }
        }
        let ds = Matrix::rows(scratch, l);
        // SAFETY: as above.
        unsafe {
            let k = Matrix::rows(self.k, self.kv_stride);
            multiply((t, d, l), dq, dq_stride, false, ds, k, self.scale(), none);
            let q = Matrix::rows(self.q, self.q_stride);
            multiply((l, d, t), dk, dkv_stride, accumulate, ds.transposed(), q, self.scale(), none);
        }
    }
}

struct SelfAttention {
    heads: usize,
    causal: bool,
    key_bias: Tensor,
}

impl SelfAttention {
    fn head<'a>(&self, qkv: &'a [f32], t: usize, c: usize, head: usize) -> Head<'a> {
        let width = c / self.heads;
        let at = |part: usize| &qkv[part * c + head * width..];
        let (q, k, v) = (at(0), at(1), at(2));
        Head { q, k, v, q_stride: 3 * c, kv_stride: 3 * c, queries: t, keys: t, width }
    }

    #[inline(always)]
    fn probabilities(&self, head: &Head, bias: &[f32], out: &mut [f32]) {
        head.probabilities(out, |query, row| {
            crate::simd::add_assign(row, bias);
            if self.causal {
                row[query + 1..].fill(f32::NEG_INFINITY);
            }
        });
    }
}

impl CustomOp1 for SelfAttention {
    fn name(&self) -> &'static str {
        "self-attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, t, packed) = layout.shape().dims3()?;
        let c = packed / 3;
        let qkv = slice(qkv, layout)?;
        let bias = read::<f32>(&self.key_bias)?;
        let bias = &*bias;
        let mut out = vec![0f32; b * t * c];
        out.par_chunks_mut((t * c).max(1)).enumerate().for_each_init(
            || vec![0f32; t * t],
            |scores, (i, out)| {
                let qkv = &qkv[i * t * packed..][..t * packed];
                for h in 0..self.heads {
                    let head = self.head(qkv, t, c, h);
                    vectorized(
                        #[inline(always)]
                        || self.probabilities(&head, &bias[i * t..][..t], scores),
                    );
                    head.mix(scores, &mut out[h * head.width..], c);
                }
            },
        );
        Ok((CpuStorage::F32(out), (b, t, c).into()))
    }

    fn bwd(&self, qkv: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (b, t, packed) = qkv.dims3()?;
        let c = packed / 3;
        let grad = grad.contiguous()?;
        let (values, grads, bias) = (read::<f32>(qkv)?, read::<f32>(&grad)?, read::<f32>(&self.key_bias)?);
        let (values, grads, bias) = (&*values, &*grads, &*bias);
        let mut out = vec![0f32; b * t * packed];
        out.par_chunks_mut((t * packed).max(1)).enumerate().for_each_init(
            || (vec![0f32; t * t], vec![0f32; t * t]),
            |(scores, scratch), (i, out)| {
                let qkv = &values[i * t * packed..][..t * packed];
                let grad = &grads[i * t * c..][..t * c];
                let out = Disjoint::new(out);
                for h in 0..self.heads {
                    let head = self.head(qkv, t, c, h);
                    let offset = h * head.width;
                    let len = (t - 1) * packed + head.width;
                    // SAFETY: the three parts of a row lie side by side, so no two of these views share a number
                    // that both write; all end inside `out`.
                    let [dq, dk, dv] = [0, 1, 2].map(|part| unsafe { out.slice_mut(part * c + offset, len) });
                    vectorized(
                        #[inline(always)]
                        || {
                            self.probabilities(&head, &bias[i * t..][..t], scores);
                            let (q, kv) = ((dq, packed), (dk, dv, packed));
                            head.backward(scores, &grad[offset..], c, scratch, q, kv, false);
                        },
                    );
                }
            },
        );
        Ok(Some(Tensor::from_vec(out, qkv.shape(), qkv.device())?))
    }
}

struct CrossAttention {
    heads: usize,
    index: Vec<u32>,
    key_bias: Tensor,
}

/// Sizes of one cross-attention call: queries and keys of a pair, and the full width.
#[derive(Clone, Copy)]
struct CrossShape {
    t: usize,
    l: usize,
    c: usize,
}

impl CrossAttention {
    fn head<'a>(&self, q: &'a [f32], kv: &'a [f32], shape: CrossShape, pair: usize, head: usize) -> Head<'a> {
        let CrossShape { t, l, c } = shape;
        let width = c / self.heads;
        let kv = &kv[self.index[pair] as usize * l * 2 * c + head * width..];
        let q = &q[pair * t * c + head * width..];
        Head { q, k: kv, v: &kv[c..], q_stride: c, kv_stride: 2 * c, queries: t, keys: l, width }
    }
}

impl CustomOp2 for CrossAttention {
    fn name(&self) -> &'static str {
        "cross-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        kv: &CpuStorage,
        kv_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (pairs, t, c) = q_layout.shape().dims3()?;
        let (_, l, _) = kv_layout.shape().dims3()?;
        let (q, kv) = (slice(q, q_layout)?, slice(kv, kv_layout)?);
        let bias = read::<f32>(&self.key_bias)?;
        let bias = &*bias;
        let shape = CrossShape { t, l, c };
        let mut out = vec![0f32; pairs * t * c];
        out.par_chunks_mut((t * c).max(1)).enumerate().for_each_init(
            || vec![0f32; t * l],
            |scores, (pair, out)| {
                for h in 0..self.heads {
                    let head = self.head(q, kv, shape, pair, h);
                    vectorized(
                        #[inline(always)]
                        || head.probabilities(scores, |_, row| crate::simd::add_assign(row, &bias[pair * l..][..l])),
                    );
                    head.mix(scores, &mut out[h * head.width..], c);
                }
            },
        );
        Ok((CpuStorage::F32(out), (pairs, t, c).into()))
    }

    fn bwd(&self, q: &Tensor, kv: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, t, c) = q.dims3()?;
        let (n, l, _) = kv.dims3()?;
        let shape = CrossShape { t, l, c };
        let grad = grad.contiguous()?;
        let (q_values, kv_values, grads, bias) =
            (read::<f32>(q)?, read::<f32>(kv)?, read::<f32>(&grad)?, read::<f32>(&self.key_bias)?);
        let (q_values, kv_values, grads, bias) = (&*q_values, &*kv_values, &*grads, &*bias);
        let mut pairs_of = vec![Vec::new(); n];
        for (pair, &image) in self.index.iter().enumerate() {
            pairs_of[image as usize].push(pair);
        }
        let mut dq = vec![0f32; q_values.len()];
        let mut dkv = vec![0f32; kv_values.len()];
        let dq_shared = Disjoint::new(&mut dq);
        dkv.par_chunks_mut((l * 2 * c).max(1)).zip(&pairs_of).for_each_init(
            || (vec![0f32; t * l], vec![0f32; t * l]),
            |(scores, scratch), (dkv, pairs)| {
                let dkv = Disjoint::new(dkv);
                for &pair in pairs {
                    for h in 0..self.heads {
                        let head = self.head(q_values, kv_values, shape, pair, h);
                        let (offset, width) = (h * head.width, head.width);
                        let grad = &grads[pair * t * c + offset..];
                        let len = (l - 1) * 2 * c + width;
                        // SAFETY: a pair belongs to one image, an image to one thread, and the heads' columns, keys
                        // and values lie side by side: nothing is written through two views.
                        let (dq, dk, dv) = unsafe {
                            (
                                dq_shared.slice_mut(pair * t * c + offset, (t - 1) * c + width),
                                dkv.slice_mut(offset, len),
                                dkv.slice_mut(c + offset, len),
                            )
                        };
                        vectorized(
                            #[inline(always)]
                            || {
                                let bias = &bias[pair * l..][..l];
                                head.probabilities(scores, |_, row| crate::simd::add_assign(row, bias));
                                head.backward(scores, grad, c, scratch, (dq, c), (dk, dv, 2 * c), true);
                            },
                        );
                    }
                }
            },
        );
        Ok((Some(Tensor::from_vec(dq, q.shape(), q.device())?), Some(Tensor::from_vec(dkv, kv.shape(), kv.device())?)))
    }
}
