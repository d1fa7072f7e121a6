//! Window attention on the CPU. The rows of a window are read and written where they lie in the image.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::{APART, WindowShape};
use crate::attention::Instructions;
use crate::attention::head::{Bias, Extent, Scratch, Source, Span, Target, attend, with_scratch};
use crate::graph::{Fresh, differentiable};
use crate::host::{Disjoint, read, written};
use crate::real::Real;
use crate::simd::product::{LANES, Rows};
use crate::simd::{add_assign, vectorized};

pub(super) fn window_attention<T: Instructions>(qkv: &Tensor, bias: &Tensor, shape: WindowShape) -> Result<Tensor> {
    let (images, _, packed) = qkv.dims3()?;
    let windows = Windows::new(images, bias.dims()[0], packed / 3, shape);
    let result = windows.forward(&read::<T>(qkv)?, &tables::<T>(bias)?);
    differentiable("window_attention", [qkv, bias], result, move |[qkv, bias], gradient| {
        let tables = tables::<T>(bias)?;
        let (dqkv, dbias) = windows.backward(&read::<T>(qkv)?, &tables, &read::<T>(gradient)?);
        Ok([Some(dqkv.detached()), Some(dbias.detached())])
    })
}

/// The same with biases that [`tables`] made, which have no gradient.
pub(super) fn prepared<T: Instructions>(
    qkv: &Tensor,
    tables: &Arc<Vec<f32>>,
    heads: usize,
    shape: WindowShape,
) -> Result<Tensor> {
    let (images, _, packed) = qkv.dims3()?;
    let windows = Windows::new(images, heads, packed / 3, shape);
    let result = windows.forward(&read::<T>(qkv)?, tables);
    let tables = Arc::clone(tables);
    differentiable("window_attention_with", [qkv], result, move |[qkv], gradient| {
        let (dqkv, _) = windows.backward(&read::<T>(qkv)?, &tables, &read::<T>(gradient)?);
        Ok([Some(dqkv.detached())])
    })
}

/// The same without gradients.
pub(super) fn once<T: Instructions>(qkv: &Tensor, tables: &[f32], heads: usize, shape: WindowShape) -> Result<Tensor> {
    let (images, _, packed) = qkv.dims3()?;
    Ok(Windows::new(images, heads, packed / 3, shape).forward(&read::<T>(qkv)?, tables).detached())
}

/// Biases `[heads, area, area]` key by key: `[heads, area, stride]`.
pub(super) fn tables<T: Real>(bias: &Tensor) -> Result<Vec<f32>> {
    /// Rows of a table that are written together.
    const KEYS: usize = 16;
    let (heads, area, _) = bias.dims3()?;
    let (bias, stride) = (&*read::<T>(bias)?, area.next_multiple_of(LANES));
    let mut tables = vec![0f32; heads * area * stride];
    tables.par_chunks_mut(area * stride).zip(bias.par_chunks(area * area)).for_each(|(table, bias)| {
        for (block, rows) in table.chunks_mut(KEYS * stride).enumerate() {
            for (query, bias) in bias.chunks_exact(area).enumerate() {
                for (row, x) in rows.chunks_exact_mut(stride).zip(&bias[block * KEYS..]) {
                    row[query] = x.widen();
                }
            }
        }
    });
    Ok(tables)
}

/// The same of what pairs have by their relative position, `[heads, (2·window − 1)²]`, in memory that was used before.
pub(super) fn tables_of_rows(rows: &Tensor, window: usize, memory: Vec<f32>) -> Result<Vec<f32>> {
    let (area, side) = (window * window, 2 * window - 1);
    let stride = area.next_multiple_of(LANES);
    let (rows, mut tables) = (&*read::<f32>(rows)?, memory);
    tables.resize(rows.len() / (side * side) * area * stride, 0.0);
    tables.par_chunks_mut(area * stride).zip(rows.par_chunks(side * side)).for_each(|(table, rows)| {
        for (key, out) in table.chunks_exact_mut(stride).enumerate() {
            let (v, u) = (key / window, key % window);
            for (y, out) in out[..area].chunks_exact_mut(window).enumerate() {
                let first = (y + window - 1 - v) * side + window - 1 - u;
                out.copy_from_slice(&rows[first..first + window]);
            }
            out[area..].fill(0.0);
        }
    });
    Ok(tables)
}

/// Items of work that there should be, if there are as many windows and heads: enough for any number of threads.
const ITEMS: usize = 128;

/// One call's windows.
struct Windows {
    images: usize,
    heads: usize,
    c: usize,
    shape: WindowShape,
    /// The tokens of each window.
    order: Vec<u32>,
    /// For windows inside, at the right edge, at the lower edge, and in the corner between.
    seams: [Option<Seams>; 4],
    extent: Extent,
    /// The distance between rows of a bias table.
    stride: usize,
}

/// What lies apart in a window at an edge that the shift made.
struct Seams {
    region_of: Vec<u8>,
    /// For each region: 0 for its own positions, [`APART`] for the others.
    apart: Vec<f32>,
}

impl Seams {
    fn new(shape: WindowShape, right: bool, lower: bool) -> Option<Self> {
        let WindowShape { window, shift, .. } = shape;
        if shift == 0 || !(right || lower) {
            return None;
        }
        let beyond = |i: usize, edge: bool| u8::from(edge && i >= window - shift);
        let region_of: Vec<u8> =
            (0..shape.area()).map(|i| 2 * beyond(i / window, lower) + beyond(i % window, right)).collect();
        let stride = shape.area().next_multiple_of(LANES);
        let apart = (0..4).flat_map(|region| {
            let of = |position: usize| match region_of.get(position) {
                Some(&own) if own != region => APART,
                _ => 0.0,
            };
            (0..stride).map(of).collect::<Vec<_>>()
        });
        Some(Self { apart: apart.collect(), region_of })
    }
}

impl Windows {
    fn new(images: usize, heads: usize, c: usize, shape: WindowShape) -> Self {
        let area = shape.area();
        Self {
            images,
            heads,
            c,
            shape,
            order: shape.tokens(),
            seams: [(false, false), (true, false), (false, true), (true, true)]
                .map(|(right, lower)| Seams::new(shape, right, lower)),
            extent: Extent { queries: area, keys: area, width: c / heads, causal: None },
            stride: area.next_multiple_of(LANES),
        }
    }

    fn tokens(&self) -> usize {
        self.shape.height * self.shape.width
    }

    /// Windows of all images.
    fn count(&self) -> usize {
        self.images * self.shape.windows()
    }

    /// A head's numbers in the bias tables.
    fn table(&self) -> usize {
        self.shape.area() * self.stride
    }

    /// The bias of a head in a window (counted over all images).
    fn bias<'a>(&'a self, tables: &'a [f32], window: usize, head: usize) -> Bias<'a> {
        let WindowShape { width, window: side, height, .. } = self.shape;
        let (across, down) = (width / side, height / side);
        let window = window % (across * down);
        let (right, lower) = (window % across == across - 1, window / across == down - 1);
        let seams = &self.seams[usize::from(right) + 2 * usize::from(lower)];
        let stride = self.stride;
        Bias::Pairs {
            table: Rows { values: &tables[head * self.table()..][..self.table()], stride },
            regions: seams.as_ref().map(|seams| (&*seams.region_of, Rows { values: &seams.apart, stride })),
        }
    }

    /// A head's rows of a window, in a tensor `[N, H·W, parts · C]`.
    fn span(&self, window: usize, head: usize, part: usize, parts: usize) -> Span<'_> {
        let (image, window) = (window / self.shape.windows(), window % self.shape.windows());
        let (area, width, stride) = (self.shape.area(), self.extent.width, parts * self.c);
        let start = image * self.tokens() * stride + part * self.c + head * width;
        Span { start, stride, width, order: Some(&self.order[window * area..][..area]) }
    }

    /// The smallest number of groups of heads that makes enough items of so many that there are for all heads.
    fn groups(&self, items: usize) -> usize {
        let enough = |groups: &usize| self.heads.is_multiple_of(*groups) && items * groups >= ITEMS;
        (1..self.heads).find(enough).unwrap_or(self.heads)
    }

    /// The heads of a group.
    fn group(&self, group: usize, groups: usize) -> std::ops::Range<usize> {
        let size = self.heads / groups;
        group * size..(group + 1) * size
    }

    fn forward<T: Instructions>(&self, qkv: &[T], tables: &[f32]) -> Fresh {
        let arch = Arch::new();
        let groups = self.groups(self.count());
        written((self.images, self.tokens(), self.c), |out: &mut [T]| {
            let out = Disjoint::new(out);
            (0..self.count() * groups).into_par_iter().for_each(|item| {
                let window = item / groups;
                for head in self.group(item % groups, groups) {
                    let parts = [0, 1, 2].map(|part| Source { values: qkv, span: self.span(window, head, part, 3) });
                    // SAFETY: inside `out`; a token belongs to one window of its image, and that and a head to one item.
                    let out = unsafe { Target::new(out, self.span(window, head, 0, 1)) };
                    attend(arch, &self.extent, parts, self.bias(tables, window, head), None, out);
                }
            });
        })
    }

    /// Gradients of the projections and of the bias.
    fn backward<T: Real>(&self, qkv: &[T], tables: &[f32], gradient: &[T]) -> (Fresh, Fresh) {
        let area = self.shape.area();
        // The bias is seen by all windows: its gradient is summed over runs of windows, and then over the runs, none of
        // which depends on the number of threads.
        let run = self.count().div_ceil(32).max(4);
        let runs = self.count().div_ceil(run);
        let groups = self.groups(runs);
        let mut sums = vec![0f32; runs * self.heads * self.table()];
        let dqkv = written((self.images, self.tokens(), 3 * self.c), |out: &mut [T]| {
            let out = Disjoint::new(out);
            let sums = sums.par_chunks_mut((self.heads / groups * self.table()).max(1));
            sums.enumerate().for_each(|(item, sums)| {
                let windows = item / groups * run..((item / groups + 1) * run).min(self.count());
                with_scratch(&self.extent, true, |scratch| {
                    for window in windows {
                        let heads = self.group(item % groups, groups).zip(sums.chunks_exact_mut(self.table()));
                        for (head, sums) in heads {
                            // SAFETY: inside `out`, as in `forward`.
                            let targets =
                                [0, 1, 2].map(|part| unsafe { Target::new(out, self.span(window, head, part, 3)) });
                            self.backward_head(scratch, window, head, (qkv, tables, gradient), targets, sums);
                        }
                    }
                });
            });
        });
        let dbias = written((self.heads, area, area), |out: &mut [T]| {
            out.par_chunks_mut(area * area).enumerate().for_each(|(head, out)| {
                let mut total = vec![0f32; self.table()];
                for run in sums.chunks_exact(self.heads * self.table()) {
                    vectorized(
                        #[inline(always)]
                        || add_assign(&mut total, &run[head * self.table()..][..self.table()]),
                    );
                }
                for (query, row) in out.chunks_exact_mut(area).enumerate() {
                    for (key, out) in row.iter_mut().enumerate() {
                        *out = T::narrow(total[key * self.stride + query]);
                    }
                }
            });
        });
        (dqkv, dbias)
    }

    fn backward_head<T: Real>(
        &self,
        scratch: &mut Scratch,
        window: usize,
        head: usize,
        (qkv, tables, gradient): (&[T], &[f32], &[T]),
        [dq, dk, dv]: [Target<T>; 3],
        sums: &mut [f32],
    ) {
        let arch = Arch::new();
        let part = |part| Source { values: qkv, span: self.span(window, head, part, 3) };
        let gradient = Source { values: gradient, span: self.span(window, head, 0, 1) };
        let bias = self.bias(tables, window, head);
        scratch.look_at(arch, part(1), part(2));
        scratch.backward(arch, part(0), bias, None, gradient, dq, Some((sums, self.stride)));
        scratch.finish(arch, dk, dv);
    }
}
