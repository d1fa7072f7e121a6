//! Window attention on the CPU.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::WindowShape;
use crate::attention::host::Head;
use crate::host::{Disjoint, read, slice};
use crate::simd::{add_assign, vectorized};

pub(super) fn window_attention(qkv: &Tensor, bias: &Tensor, shape: WindowShape) -> Result<Tensor> {
    qkv.apply_op2(bias, WindowAttention { order: shape.tokens(), mask: (shape.shift > 0).then(|| shape.mask()) })
}

struct WindowAttention {
    order: Vec<u32>,
    mask: Option<Vec<f32>>,
}

/// Buffers of one thread.
struct Scratch {
    qkv: Vec<f32>,
    out: Vec<f32>,
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    grad: Vec<f32>,
    d_qkv: Vec<f32>,
}

impl Scratch {
    fn new(area: usize, c: usize) -> Self {
        let rows = |width: usize| vec![0f32; area * width];
        Self {
            qkv: rows(3 * c),
            out: rows(c),
            scores: rows(area),
            d_scores: rows(area),
            grad: rows(c),
            d_qkv: rows(3 * c),
        }
    }
}

fn gather(tokens: &[u32], from: &[f32], width: usize, into: &mut [f32]) {
    for (into, &token) in into.chunks_exact_mut(width).zip(tokens) {
        into.copy_from_slice(&from[token as usize * width..][..width]);
    }
}

impl WindowAttention {
    fn head<'a>(qkv: &'a [f32], area: usize, c: usize, heads: usize, head: usize) -> Head<'a> {
        let width = c / heads;
        let at = |part: usize| &qkv[part * c + head * width..];
        let (q, k, v) = (at(0), at(1), at(2));
        Head { q, k, v, q_stride: 3 * c, kv_stride: 3 * c, queries: area, keys: area, width }
    }

    #[inline(always)]
    fn probabilities(&self, head: &Head, bias: &[f32], window: usize, out: &mut [f32]) {
        let area = head.keys;
        let mask = self.mask.as_ref().map(|m| &m[window * area * area..][..area * area]);
        head.probabilities(out, |query, row| {
            add_assign(row, &bias[query * area..][..area]);
            if let Some(mask) = mask {
                add_assign(row, &mask[query * area..][..area]);
            }
        });
    }
}

impl CustomOp2 for WindowAttention {
    fn name(&self) -> &'static str {
        "window-attention"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, tokens, packed) = qkv_layout.shape().dims3()?;
        let (heads, area, _) = bias_layout.shape().dims3()?;
        let c = packed / 3;
        let windows = tokens / area;
        let (qkv, bias) = (slice(qkv, qkv_layout)?, slice(bias, bias_layout)?);
        let mut out = vec![0f32; n * tokens * c];
        let shared = Disjoint::new(&mut out);
        (0..n * windows).into_par_iter().for_each_init(
            || Scratch::new(area, c),
            |s, i| {
                let (image, window) = (i / windows, i % windows);
                let members = &self.order[window * area..][..area];
                gather(members, &qkv[image * tokens * packed..][..tokens * packed], packed, &mut s.qkv);
                for h in 0..heads {
                    let head = Self::head(&s.qkv, area, c, heads, h);
                    let bias = &bias[h * area * area..][..area * area];
                    vectorized(
                        #[inline(always)]
                        || self.probabilities(&head, bias, window, &mut s.scores),
                    );
                    head.mix(&s.scores, &mut s.out[h * head.width..], c);
                }
                for (row, &token) in s.out.chunks_exact(c).zip(members) {
                    // SAFETY: every token of every image belongs to exactly one window.
                    unsafe { shared.slice_mut((image * tokens + token as usize) * c, c) }.copy_from_slice(row);
                }
            },
        );
        Ok((CpuStorage::F32(out), (n, tokens, c).into()))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, tokens, packed) = qkv.dims3()?;
        let (heads, area, _) = bias.dims3()?;
        let c = packed / 3;
        let grad = grad.contiguous()?;
        let (values, biases, grads) = (read::<f32>(qkv)?, read::<f32>(bias)?, read::<f32>(&grad)?);
        let (values, biases, grads) = (&*values, &*biases, &*grads);
        let mut out = vec![0f32; values.len()];
        let block = area * area;
        let per_image: Vec<Vec<f32>> = out
            .par_chunks_mut((tokens * packed).max(1))
            .enumerate()
            .map_init(
                || Scratch::new(area, c),
                |s, (image, out)| {
                    let mut d_bias = vec![0f32; heads * block];
                    for window in 0..tokens / area {
                        let members = &self.order[window * area..][..area];
                        gather(members, &values[image * tokens * packed..][..tokens * packed], packed, &mut s.qkv);
                        gather(members, &grads[image * tokens * c..][..tokens * c], c, &mut s.grad);
                        let d_qkv = Disjoint::new(&mut s.d_qkv);
                        for h in 0..heads {
                            let head = Self::head(&s.qkv, area, c, heads, h);
                            let offset = h * head.width;
                            let len = (area - 1) * packed + head.width;
                            // SAFETY: the three parts of a row lie side by side: no number is written through two views.
                            let [dq, dk, dv] = [0, 1, 2].map(|part| unsafe { d_qkv.slice_mut(part * c + offset, len) });
                            vectorized(
                                #[inline(always)]
                                || {
                                    self.probabilities(&head, &biases[h * block..][..block], window, &mut s.scores);
                                    let (q, kv) = ((dq, packed), (dk, dv, packed));
                                    head.backward(&s.scores, &s.grad[offset..], c, &mut s.d_scores, q, kv, false);
                                    add_assign(&mut d_bias[h * block..][..block], &s.d_scores);
                                },
                            );
                        }
                        for (row, &token) in s.d_qkv.chunks_exact(packed).zip(members) {
                            out[token as usize * packed..][..packed].copy_from_slice(row);
                        }
                    }
                    d_bias
                },
            )
            .collect();
        let mut d_bias = vec![0f32; heads * block];
        for part in &per_image {
            add_assign(&mut d_bias, part);
        }
        Ok((
            Some(Tensor::from_vec(out, qkv.shape(), qkv.device())?),
            Some(Tensor::from_vec(d_bias, bias.shape(), bias.device())?),
        ))
    }
}
