//! Attention on the CPU.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use gemm::Parallelism;
use rayon::prelude::*;

use crate::host::{Disjoint, read, slice};
use crate::simd::{Matrix, dot, multiply, softmax_row, vectorized};

pub(super) fn self_attention(qkv: &Tensor, key_bias: Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    qkv.apply_op1(SelfAttention { heads, causal, key_bias })
}

pub(super) fn cross_attention(
    q: &Tensor,
    kv: &Tensor,
    index: &[u32],
    key_bias: Tensor,
    heads: usize,
) -> Result<Tensor> {
    q.apply_op2(kv, CrossAttention { heads, index: index.to_vec(), key_bias })
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
