//! Shifted-window attention with relative-position bias (Swin).

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::attention::Head;
use crate::error::{KernelError, check_shape};
use crate::host::{Disjoint, is_host_f32, read, slice};
use crate::loss::softmax;
use crate::simd::{add_assign, vectorized};

/// The geometry of a window attention: a grid of `height × width` tokens cut into `window × window` windows after a
/// cyclic shift by `shift` towards the origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowShape {
    /// Rows of tokens.
    pub height: usize,
    /// Columns of tokens.
    pub width: usize,
    /// Side of a window; divides both.
    pub window: usize,
    /// Cyclic shift; 0 or less than `window`.
    pub shift: usize,
}

/// What separates tokens that meet in a window only because of the cyclic shift.
const APART: f32 = -100.0;

impl WindowShape {
    fn check(&self) -> Result<()> {
        let Self { height, width, window, shift } = *self;
        let divides = window > 0 && height.is_multiple_of(window) && width.is_multiple_of(window) && shift < window;
        if divides {
            return Ok(());
        }
        Err(KernelError::Value {
            op: "window_attention",
            argument: "shape",
            expected: "a window that divides the grid, and a shift below the window".into(),
            found: format!("{self:?}"),
        }
        .into())
    }

    fn area(&self) -> usize {
        self.window * self.window
    }

    fn windows(&self) -> usize {
        self.height * self.width / self.area()
    }

    /// Tokens (row-major, image order) of each window, `windows × area`.
    fn tokens(&self) -> Vec<u32> {
        let Self { height, width, window, shift } = *self;
        let mut order = Vec::with_capacity(height * width);
        for top in (0..height).step_by(window) {
            for left in (0..width).step_by(window) {
                for y in top..top + window {
                    for x in left..left + window {
                        order.push((((y + shift) % height) * width + (x + shift) % width) as u32);
                    }
                }
            }
        }
        order
    }

    /// `[windows, area, area]`: 0 between tokens of one region, [`APART`] between tokens of different regions.
    fn mask(&self) -> Vec<f32> {
        let Self { height, width, window, shift } = *self;
        let band = |i: usize, size: usize| usize::from(i + window >= size) + usize::from(i + shift >= size);
        let mut mask = Vec::with_capacity(height * width * self.area());
        for top in (0..height).step_by(window) {
            for left in (0..width).step_by(window) {
                let region = |i: usize| (band(top + i / window, height), band(left + i % window, width));
                for a in 0..self.area() {
                    mask.extend((0..self.area()).map(|b| if region(a) == region(b) { 0.0 } else { APART }));
                }
            }
        }
        mask
    }
}

/// Multi-head attention inside windows, over tokens in image order.
///
/// `qkv [N, H·W, 3·C]` as in [`crate::self_attention`]; `bias [heads, window², window²]` is added to the scores of every
/// window. With a shift, tokens that the cyclic shift brings together do not see each other (Liu et al. 2021, §3.2).
/// Returns `[N, H·W, C]`.
///
/// # Errors
/// On a wrong shape, or a window that does not divide the grid.
pub fn window_attention(qkv: &Tensor, bias: &Tensor, shape: WindowShape) -> Result<Tensor> {
    shape.check()?;
    let (heads, area, _) = bias.dims3()?;
    let (n, tokens, packed) = qkv.dims3()?;
    check_shape("window_attention", "bias", bias, &[heads, shape.area(), shape.area()])?;
    check_shape("window_attention", "qkv", qkv, &[n, shape.height * shape.width, packed])?;
    if !packed.is_multiple_of(3 * heads) {
        let expected = format!("a divisor of {}", packed / 3);
        let found = heads.to_string();
        return Err(KernelError::Value { op: "window_attention", argument: "heads", expected, found }.into());
    }
    if is_host_f32(&[qkv, bias]) {
        let op = WindowAttention { order: shape.tokens(), mask: (shape.shift > 0).then(|| shape.mask()) };
        return qkv.contiguous()?.apply_op2(&bias.contiguous()?, op);
    }
    let (device, dtype) = (qkv.device(), qkv.dtype());
    let (windows, c) = (shape.windows(), packed / 3);
    let order = shape.tokens();
    let mut place = vec![0u32; order.len()];
    for (i, &token) in order.iter().enumerate() {
        place[token as usize] = i as u32;
    }
    let split = qkv
        .index_select(&Tensor::new(order, device)?, 1)?
        .reshape((n * windows, area, 3, heads, c / heads))?
        .permute((2, 0, 3, 1, 4))?;
    let (q, k, v) = (split.get(0)?.contiguous()?, split.get(1)?.contiguous()?, split.get(2)?.contiguous()?);
    let scale = ((c / heads) as f64).powf(-0.5);
    let mut scores = (q.matmul(&k.t()?.contiguous()?)? * scale)?.broadcast_add(&bias.unsqueeze(0)?)?;
    if shape.shift > 0 {
        let mask = Tensor::from_vec(shape.mask(), (1, windows, 1, area, area), device)?.to_dtype(dtype)?;
        scores = scores.reshape((n, windows, heads, area, area))?.broadcast_add(&mask)?;
        scores = scores.reshape((n * windows, heads, area, area))?;
    }
    let mixed = softmax(&scores, D::Minus1)?.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((n, tokens, c))?;
    mixed.index_select(&Tensor::new(place, device)?, 1)
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
