//! Attention of one head over one sequence or window, on the CPU: forward by AVX-512 where that knows how (`native`), with
//! dropout and elsewhere as here, as are all gradients.
//!
//! The rows of a head are copied, widened, into a scratch that stays in a core's cache, and the products run there. Queries
//! are taken a tile at a time, and the scores of a tile are stored key by key (see [`super::softmax`]).

use std::cell::Cell;
use std::ops::Range;

use pulp::Arch;

use super::Instructions;
use super::softmax::{Softmax, SoftmaxBackward};
use crate::dropout::Part;
use crate::host::Disjoint;
use crate::real::Real;
use crate::simd::add_assign;
use crate::simd::product::{LANES, Plus, Product, Rows};
use crate::simd::transpose::transpose;

/// Where the rows of a head are.
#[derive(Clone, Copy)]
pub(crate) struct Span<'a> {
    /// The first number of row 0.
    pub(crate) start: usize,
    /// From row to row.
    pub(crate) stride: usize,
    /// Numbers of a row.
    pub(crate) width: usize,
    /// The row of each position, where it is another than the position itself.
    pub(crate) order: Option<&'a [u32]>,
}

impl Span<'_> {
    #[inline(always)]
    fn row(&self, position: usize) -> Range<usize> {
        let row = self.order.map_or(position, |order| order[position] as usize);
        let start = self.start + row * self.stride;
        start..start + self.width
    }
}

/// Rows to read.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a, T> {
    pub(crate) values: &'a [T],
    pub(crate) span: Span<'a>,
}

impl<'a, T: Real> Source<'a, T> {
    #[inline(always)]
    pub(crate) fn row(&self, position: usize) -> &'a [T] {
        &self.values[self.span.row(position)]
    }

    /// `scale` times the rows of these positions, into rows `stride` apart.
    #[inline(always)]
    fn copy(&self, positions: Range<usize>, scale: f32, out: &mut [f32], stride: usize) {
        let width = self.span.width;
        for (i, position) in positions.enumerate() {
            let (out, row) = (&mut out[i * stride..][..width], &self.row(position)[..width]);
            for j in 0..width {
                out[j] = scale * row[j].widen();
            }
        }
    }
}

/// Rows to write, of a tensor that other threads write other rows of.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a, T> {
    values: Disjoint<T>,
    span: Span<'a>,
}

impl<'a, T: Real> Target<'a, T> {
    /// # Safety
    /// The rows lie inside the slice behind `values`, which outlives every use of this, and nothing else reads or writes
    /// them meanwhile.
    pub(crate) unsafe fn new(values: Disjoint<T>, span: Span<'a>) -> Self {
        Self { values, span }
    }

    /// The row of a position.
    #[inline(always)]
    pub(crate) fn row(&mut self, position: usize) -> &mut [T] {
        let place = self.span.row(position);
        // SAFETY: the promise of `new`; the mutable borrow keeps two rows from being held at once.
        unsafe { self.values.slice_mut(place.start, place.len()) }
    }

    /// Writes the rows of these positions: those of `from`, `stride` apart, times the scale of each.
    #[inline(always)]
    fn write(&mut self, positions: Range<usize>, from: &[f32], stride: usize, scale: impl Fn(usize) -> f32) {
        let width = self.span.width;
        for (i, position) in positions.enumerate() {
            let scale = scale(i);
            let (out, from) = (&mut self.row(position)[..width], &from[i * stride..][..width]);
            for j in 0..width {
                out[j] = T::narrow(scale * from[j]);
            }
        }
    }
}

/// What is added to the scores.
#[derive(Clone, Copy)]
pub(crate) enum Bias<'a> {
    /// One number for each key.
    Keys(&'a [f32]),
    /// One for each pair, `[keys, queries]`; and, for positions that lie in several regions, one for each region and query
    /// with the region of each key.
    Pairs { table: Rows<'a>, regions: Option<(&'a [u8], Rows<'a>)> },
}

/// Most scores of a tile, unless that is one vector wide: what stays in the nearest caches.
const SCORES: usize = 1 << 14;

/// Sizes of a head's attention.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) width: usize,
    /// With `Some(past)` a query sees the keys up to its own position + `past`.
    pub(crate) causal: Option<usize>,
}

impl Extent {
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// The distance between rows of the scratch.
    pub(super) fn stride(&self) -> usize {
        self.width.next_multiple_of(LANES)
    }

    /// Most vectors of queries in a tile: four of them fill the registers of a product; fewer where the scores of many keys
    /// would be more than `most`.
    fn tile_vectors(&self, most: usize) -> usize {
        (most / (LANES * self.keys.max(1))).clamp(1, 4)
    }

    /// Most queries of a tile, padded to whole vectors.
    pub(super) fn tile(&self, most: usize) -> usize {
        self.queries.div_ceil(LANES).min(self.tile_vectors(most)) * LANES
    }

    /// The queries, cut into tiles of about equal size.
    pub(super) fn tiles(&self, most: usize) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
        let (queries, vectors) = (self.queries, self.queries.div_ceil(LANES));
        let count = vectors.div_ceil(self.tile_vectors(most));
        let end = move |tile: usize| (vectors * tile / count * LANES).min(queries);
        (0..count).map(move |tile| end(tile)..end(tile + 1))
    }

    /// How many keys, from the first on, any of these queries sees.
    pub(super) fn seen(&self, queries: &Range<usize>) -> usize {
        self.causal.map_or(self.keys, |past| self.keys.min(past + queries.end))
    }
}

/// Vectors of the scratch: aligned so that none crosses a line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Lends `work` memory of this thread: so many numbers, or more.
pub(super) fn lend<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut memory = SCRATCH.take();
    if memory.len() * LANES < len {
        memory.resize(len.div_ceil(LANES), Line([0.0; LANES]));
    }
    // SAFETY: a `Line` is sixteen numbers and nothing else.
    let numbers = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<f32>(), memory.len() * LANES) };
    let result = work(numbers);
    SCRATCH.set(memory);
    result
}

/// Lends `work` a scratch of this thread.
pub(crate) fn with_scratch<R>(extent: &Extent, backward: bool, work: impl FnOnce(&mut Scratch) -> R) -> R {
    lend(Scratch::len(extent, backward), |numbers| work(&mut Scratch::new(numbers, extent, backward)))
}

/// Attention of all queries over all keys. Of the probabilities, in the order `[queries, keys]`, `dropped` leaves some.
pub(crate) fn attend<T: Instructions>(
    arch: Arch,
    extent: &Extent,
    [q, k, v]: [Source<T>; 3],
    bias: Bias,
    dropped: Option<Part>,
    out: Target<T>,
) {
    #[cfg(target_arch = "x86_64")]
    if dropped.is_none() && super::native::fits::<T>(extent) {
        return super::native::attend(extent, [q, k, v], bias, out);
    }
    with_scratch(extent, false, |scratch| {
        scratch.look_at(arch, k, v);
        scratch.forward(arch, q, bias, dropped, out);
    });
}

/// The rows of a head as the products need them. Rows are `stride` apart, those of scores and of transposes as far as a tile
/// has queries.
pub(crate) struct Scratch<'a> {
    extent: Extent,
    stride: usize,
    k: &'a mut [f32],
    v: &'a mut [f32],
    q: &'a mut [f32],
    q_transposed: &'a mut [f32],
    scores: &'a mut [f32],
    scales: &'a mut [f32],
    /// A tile's output, or the gradient of its queries.
    out: &'a mut [f32],
    gradient: &'a mut [f32],
    gradient_transposed: &'a mut [f32],
    slopes: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// Whether `dk` and `dv` hold sums already.
    summed: bool,
}

impl<'a> Scratch<'a> {
    /// The numbers of a matrix with a row for each key, of one with a row for each query of a tile, and of scores.
    fn sizes(extent: &Extent) -> [usize; 3] {
        let (stride, tile) = (extent.stride(), extent.tile(SCORES));
        [extent.keys * stride, tile * stride, extent.keys * tile]
    }

    fn len(extent: &Extent, backward: bool) -> usize {
        let [keys, queries, scores] = Self::sizes(extent);
        let forward = 2 * keys + 3 * queries + scores + extent.tile(SCORES);
        forward + if backward { 2 * keys + 2 * queries + scores } else { 0 }
    }

    fn new(numbers: &'a mut [f32], extent: &Extent, backward: bool) -> Self {
        let [keys, queries, scores] = Self::sizes(extent);
        let mut rest = numbers;
        let mut take = |len: usize| {
            let (taken, others) = std::mem::take(&mut rest).split_at_mut(len);
            rest = others;
            taken
        };
        let or_none = |len: usize| if backward { len } else { 0 };
        Self {
            extent: *extent,
            stride: extent.stride(),
            k: take(keys),
            v: take(keys),
            q: take(queries),
            q_transposed: take(queries),
            scores: take(scores),
            scales: take(extent.tile(SCORES)),
            out: take(queries),
            gradient: take(or_none(queries)),
            gradient_transposed: take(or_none(queries)),
            slopes: take(or_none(scores)),
            dk: take(or_none(keys)),
            dv: take(or_none(keys)),
            summed: false,
        }
    }

    /// Takes in the keys and values that the next calls are about.
    pub(crate) fn look_at<T: Real>(&mut self, arch: Arch, k: Source<T>, v: Source<T>) {
        let (keys, stride) = (self.extent.keys, self.stride);
        arch.dispatch(
            #[inline(always)]
            || {
                k.copy(0..keys, 1.0, self.k, stride);
                v.copy(0..keys, 1.0, self.v, stride);
            },
        );
        self.summed = false;
    }

    /// Takes in queries, and leaves what [`Softmax`] makes of their scores.
    fn weigh<T: Real>(&mut self, arch: Arch, queries: &Range<usize>, q: Source<T>, bias: Bias) {
        let Extent { width, causal, .. } = self.extent;
        let (stride, tile, seen) = (self.stride, padded(queries), self.extent.seen(queries));
        let scale = self.extent.scale();
        arch.dispatch(
            #[inline(always)]
            || {
                q.copy(queries.clone(), scale, self.q, stride);
                transpose(self.q, self.q_transposed, (tile, stride), (stride, tile));
            },
        );
        arch.dispatch(Product {
            size: (seen, tile, width),
            a: Rows { values: self.k, stride },
            transposed: false,
            b: Rows { values: self.q_transposed, stride: tile },
            plus: match bias {
                Bias::Keys(bias) => Plus::Column(bias),
                Bias::Pairs { table, .. } => Plus::Matrix(table.columns_from(queries.start)),
            },
            out: self.scores,
            stride: tile,
        });
        let scores = &mut self.scores[..seen * tile];
        if let Bias::Pairs { regions: Some((region_of, apart)), .. } = bias {
            let apart = apart.columns_from(queries.start);
            arch.dispatch(
                #[inline(always)]
                || {
                    for (row, &region) in scores.chunks_exact_mut(tile).zip(region_of) {
                        add_assign(row, &apart.values[usize::from(region) * apart.stride..][..tile]);
                    }
                },
            );
        }
        if let Some(past) = causal {
            hide_later(scores, queries, past);
        }
        arch.dispatch(Softmax { scores, scales: &mut self.scales[..tile] });
    }

    /// Attention of these queries over the keys taken in. Of the probabilities, in the order `[queries, keys]`, `dropped` leaves
    /// some.
    pub(super) fn forward<T: Real>(
        &mut self,
        arch: Arch,
        q: Source<T>,
        bias: Bias,
        dropped: Option<Part>,
        mut out: Target<T>,
    ) {
        let stride = self.stride;
        for queries in self.extent.tiles(SCORES) {
            self.weigh(arch, &queries, q, bias);
            drop(self.scores, &self.extent, &queries, dropped);
            arch.dispatch(Product {
                size: (queries.len(), stride, self.extent.seen(&queries)),
                a: Rows { values: self.scores, stride: padded(&queries) },
                transposed: true,
                b: Rows { values: self.v, stride },
                plus: Plus::Nothing,
                out: self.out,
                stride,
            });
            arch.dispatch(
                #[inline(always)]
                || out.write(queries.clone(), self.out, stride, |i| self.scales[i]),
            );
        }
    }

    /// Gradients of these queries, and of the keys and values, which are added up until [`Self::finish`]. The gradient of the
    /// scores is added to `bias_gradient`, `[keys, queries]` with the distance of its rows.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward<T: Real>(
        &mut self,
        arch: Arch,
        q: Source<T>,
        bias: Bias,
        dropped: Option<Part>,
        gradient: Source<T>,
        mut dq: Target<T>,
        mut bias_gradient: Option<(&mut [f32], usize)>,
    ) {
        let (stride, width) = (self.stride, self.extent.width);
        // From the last on, which sees all keys.
        for queries in self.extent.tiles(SCORES).rev() {
            let (tile, seen) = (padded(&queries), self.extent.seen(&queries));
            self.weigh(arch, &queries, q, bias);
            arch.dispatch(
                #[inline(always)]
                || {
                    gradient.copy(queries.clone(), 1.0, self.gradient, stride);
                    transpose(self.gradient, self.gradient_transposed, (tile, stride), (stride, tile));
                },
            );
            arch.dispatch(Product {
                size: (seen, tile, width),
                a: Rows { values: self.v, stride },
                transposed: false,
                b: Rows { values: self.gradient_transposed, stride: tile },
                plus: Plus::Nothing,
                out: self.slopes,
                stride: tile,
            });
            drop(self.slopes, &self.extent, &queries, dropped);
            let (weights, gradients) = (&mut self.scores[..seen * tile], &mut self.slopes[..seen * tile]);
            let sums = bias_gradient.as_mut().map(|(sums, stride)| (&mut sums[queries.start..], *stride));
            arch.dispatch(SoftmaxBackward { weights, scales: &self.scales[..tile], gradients, sums });
            drop(self.scores, &self.extent, &queries, dropped);
            let sums = [(&mut *self.dv, &*self.scores, &*self.gradient), (&mut *self.dk, &*self.slopes, &*self.q)];
            for (out, pairs, rows) in sums {
                arch.dispatch(Product {
                    size: (seen, stride, queries.len()),
                    a: Rows { values: pairs, stride: tile },
                    transposed: false,
                    b: Rows { values: rows, stride },
                    plus: if self.summed { Plus::Result } else { Plus::Nothing },
                    out,
                    stride,
                });
            }
            self.summed = true;
            arch.dispatch(Product {
                size: (queries.len(), stride, seen),
                a: Rows { values: self.slopes, stride: tile },
                transposed: true,
                b: Rows { values: self.k, stride },
                plus: Plus::Nothing,
                out: self.out,
                stride,
            });
            let scale = self.extent.scale();
            arch.dispatch(
                #[inline(always)]
                || dq.write(queries.clone(), self.out, stride, |_| scale),
            );
        }
    }

    /// Writes the gradients of the keys and of the values.
    pub(crate) fn finish<T: Real>(&mut self, arch: Arch, mut dk: Target<T>, mut dv: Target<T>) {
        if !self.summed {
            self.dk.fill(0.0);
            self.dv.fill(0.0);
        }
        let (keys, stride) = (self.extent.keys, self.stride);
        arch.dispatch(
            #[inline(always)]
            || {
                dk.write(0..keys, self.dk, stride, |_| 1.0);
                dv.write(0..keys, self.dv, stride, |_| 1.0);
            },
        );
    }
}

/// Hides, in scores stored key by key, each key from the queries before it.
pub(super) fn hide_later(scores: &mut [f32], queries: &Range<usize>, past: usize) {
    let tile = padded(queries);
    for (key, row) in scores.chunks_exact_mut(tile).enumerate().skip(past + queries.start) {
        let before = key - past - queries.start;
        row[..before.min(tile)].fill(f32::NEG_INFINITY);
    }
}

/// Drops some of the numbers of these queries, stored key by key.
fn drop(values: &mut [f32], extent: &Extent, queries: &Range<usize>, dropped: Option<Part>) {
    let Some(part) = dropped else { return };
    let rows = values.chunks_exact_mut(padded(queries)).take(extent.seen(queries));
    for (key, row) in rows.enumerate() {
        part.multiply(row, (queries.start * extent.keys + key) as u32, extent.keys as u32);
    }
}

/// Queries of a tile, with those that fill its last vector.
pub(super) fn padded(queries: &Range<usize>) -> usize {
    queries.len().next_multiple_of(LANES)
}
