//! The comparison of boxes on the CPU: tile by tile, so that its loops are vectorized.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::overlap::{Comparison, Pairs, Sum, TILE, Tiles};
use super::{BoxFormat, TINY};
use crate::graph::Fresh;
use crate::host::{read, written};
use crate::real::Real;
use crate::simd::{sum, vectorized};

/// A number for each pair of a tile.
type Lanes = [f32; TILE];

/// A box for each pair of a tile.
type Quads = [Lanes; 4];

/// Pairs a thread takes at a time, about; a multiple of a tile.
const CHUNK: usize = 1024;

/// The values, and their slopes.
pub(super) fn compare<T: Real>(c: &Comparison, tiles: &Tiles, a: &Tensor, b: &Tensor) -> Result<(Fresh, Fresh)> {
    let (a, b) = (&*read::<T>(a)?, &*read::<T>(b)?);
    // A segment is compared by one thread: pairs of one row.
    let (segment, together) = match c.pairs {
        Pairs::Same(_) => (CHUNK, 1),
        Pairs::All(_, m) => (m.max(1), CHUNK.div_ceil(m.max(1))),
    };
    // Tiles of what every row is compared with are made once.
    let columns: Vec<Quads> = match c.pairs {
        Pairs::Same(_) => Vec::new(),
        Pairs::All(..) => b.par_chunks(4 * TILE).map(quads).collect(),
    };
    let of_a_tile = tiles.slots() * TILE;
    let mut slopes = None;
    let values = written(c.shape(), |out: &mut [T]| {
        slopes = Some(written(&tiles.shape()[..], |slopes: &mut [f32]| {
            let outs = out.par_chunks_mut(segment * c.values());
            let mut parts: Vec<&mut [f32]> = slopes.chunks_mut((segment.div_ceil(TILE) * of_a_tile).max(1)).collect();
            parts.resize_with(outs.len(), Default::default);
            outs.zip(parts).enumerate().with_min_len(together).for_each(|(i, (out, slopes))| {
                vectorized(
                    #[inline(always)]
                    || {
                        let tile = |t: usize| match c.pairs {
                            Pairs::Same(_) => {
                                let start = (i * segment + t * TILE) * 4;
                                (quads(&a[start..]), quads(&b[start..]))
                            }
                            Pairs::All(..) => (repeated(&a[i * 4..]), columns[t]),
                        };
                        match c.format {
                            BoxFormat::Cxcywh => compare_segment::<T, true>(c, tiles, tile, out, slopes),
                            BoxFormat::Xyxy => compare_segment::<T, false>(c, tiles, tile, out, slopes),
                        }
                    },
                );
            });
        }));
    });
    Ok((values, slopes.expect("written with the values")))
}

#[inline(always)]
fn compare_segment<T: Real, const CENTRES: bool>(
    c: &Comparison,
    tiles: &Tiles,
    tile: impl Fn(usize) -> (Quads, Quads),
    out: &mut [T],
    slopes: &mut [f32],
) {
    let size = tiles.slots() * TILE;
    for (t, out) in out.chunks_mut(TILE * c.values()).enumerate() {
        let (first, second) = tile(t);
        let mut giou = [0.0; TILE];
        let mut by = [[[0.0; TILE]; 4]; 2];
        let at = |quads: &Quads, i: usize| [quads[0][i], quads[1][i], quads[2][i], quads[3][i]];
        if size == 0 {
            for (i, giou) in giou.iter_mut().enumerate() {
                (*giou, ..) = generalised_iou::<CENTRES>(at(&first, i), at(&second, i));
            }
        } else {
            for i in 0..TILE {
                let (value, [a0, a1, a2, a3], [b0, b1, b2, b3]) =
                    generalised_iou::<CENTRES>(at(&first, i), at(&second, i));
                giou[i] = value;
                (by[0][0][i], by[0][1][i], by[0][2][i], by[0][3][i]) = (a0, a1, a2, a3);
                (by[1][0][i], by[1][1][i], by[1][2][i], by[1][3][i]) = (b0, b1, b2, b3);
            }
        }
        let slots: &mut [Lanes] = slopes[t * size..][..size].as_chunks_mut().0;
        if c.losses {
            let mut distance = [0.0; TILE];
            for k in 0..4 {
                for i in 0..TILE {
                    distance[i] += (first[k][i] - second[k][i]).abs();
                }
            }
            for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                *out = [T::narrow(distance[i]), T::narrow(1.0 - giou[i])];
            }
            for side in (0..2).filter(|&side| tiles.sides[side]) {
                let (own, other) = if side == 0 { (&first, &second) } else { (&second, &first) };
                let slots = &mut slots[tiles.first_slot(side)..];
                for k in 0..4 {
                    for i in 0..TILE {
                        slots[k][i] = sign(own[k][i] - other[k][i]);
                        slots[4 + k][i] = -by[side][k][i];
                    }
                }
            }
        } else {
            for (out, &giou) in out.iter_mut().zip(&giou) {
                *out = T::narrow(giou);
            }
            for side in (0..2).filter(|&side| tiles.sides[side]) {
                slots[tiles.first_slot(side)..][..4].copy_from_slice(&by[side]);
            }
        }
    }
}

/// The first boxes of a slice, at most as many as a tile has; zeros after them.
#[inline(always)]
fn quads<T: Real>(boxes: &[T]) -> Quads {
    let mut quads = [[0.0; TILE]; 4];
    if let Some((tile, _)) = boxes.as_chunks::<4>().0.split_first_chunk::<TILE>() {
        // Of a known length, so that it is vectorized.
        for (i, bounds) in tile.iter().enumerate() {
            for k in 0..4 {
                quads[k][i] = bounds[k].widen();
            }
        }
    } else {
        for (i, bounds) in boxes.chunks_exact(4).enumerate() {
            for k in 0..4 {
                quads[k][i] = bounds[k].widen();
            }
        }
    }
    quads
}

#[inline(always)]
fn repeated<T: Real>(bounds: &[T]) -> Quads {
    [0, 1, 2, 3].map(|k| [bounds[k].widen(); TILE])
}

/// 1, 0 or −1.
#[inline(always)]
fn sign(x: f32) -> f32 {
    f32::from(u8::from(x > 0.0)) - f32::from(u8::from(x < 0.0))
}

/// What a minimum of `x` and another number takes of `x`'s gradient: all, half where they are equal, or nothing.
#[inline(always)]
fn is_less(x: f32, other: f32) -> f32 {
    if x < other {
        1.0
    } else if x == other {
        0.5
    } else {
        0.0
    }
}

/// GIoU of two boxes and its slopes by the numbers of each; not a number if one of them is not. Without branches, so that
/// loops over it are vectorized.
#[inline(always)]
fn generalised_iou<const CENTRES: bool>(a: [f32; 4], b: [f32; 4]) -> (f32, [f32; 4], [f32; 4]) {
    let inverse = |area: f32| if area <= TINY { 0.0 } else { 1.0 / area };
    let span = |b: [f32; 4], axis: usize| match CENTRES {
        true => Span { low: b[axis] - b[axis + 2] * 0.5, high: b[axis] + b[axis + 2] * 0.5 },
        false => Span { low: b[axis], high: b[axis + 2] },
    };
    let (ax, ay, bx, by) = (span(a, 0), span(a, 1), span(b, 0), span(b, 1));
    let (inner_x, inner_y) = (ax.inner(bx), ay.inner(by));
    let (outer_x, outer_y) = (ax.outer(bx), ay.outer(by));
    let intersection = inner_x.length() * inner_y.length();
    let union = ax.length() * ay.length() + bx.length() * by.length() - intersection;
    let hull = outer_x.length() * outer_y.length();
    let (per_union, per_hull) = (inverse(union), inverse(hull));
    let value = intersection * per_union - (hull - union) * per_hull;

    let by_union = per_hull - intersection * per_union * per_union;
    // The intersection is a part of the union, too.
    let by_intersection = per_union - by_union;
    let by_hull = -union * per_hull * per_hull;
    // By the two numbers of a box along an axis; `across` is the other axis.
    let slopes =
        |own: Span, other: Span, own_across: Span, inner: Span, inner_across: Span, outer: Span, outer_across: Span| {
            let by_inner = by_intersection * inner.slope() * inner_across.length();
            let by_side = by_union * own.slope() * own_across.length();
            let by_outer = by_hull * outer.slope() * outer_across.length();
            // Moving the low edge down is what moving the high edge up is.
            let by_low = by_inner * is_less(other.low, own.low) + by_side + by_outer * is_less(own.low, other.low);
            let by_high = by_inner * is_less(own.high, other.high) + by_side + by_outer * is_less(other.high, own.high);
            if CENTRES { (by_high - by_low, (by_high + by_low) * 0.5) } else { (-by_low, by_high) }
        };
    let (a0, a2) = slopes(ax, bx, ay, inner_x, inner_y, outer_x, outer_y);
    let (a1, a3) = slopes(ay, by, ax, inner_y, inner_x, outer_y, outer_x);
    let (b0, b2) = slopes(bx, ax, by, inner_x, inner_y, outer_x, outer_y);
    let (b1, b3) = slopes(by, ay, bx, inner_y, inner_x, outer_y, outer_x);
    (value, [a0, a1, a2, a3], [b0, b1, b2, b3])
}

/// A box along one axis.
#[derive(Clone, Copy)]
struct Span {
    low: f32,
    high: f32,
}

impl Span {
    #[inline(always)]
    fn length(self) -> f32 {
        let length = self.high - self.low;
        if length < 0.0 { 0.0 } else { length }
    }

    /// The slope of the length by the high edge, as that of PyTorch's `clamp`.
    #[inline(always)]
    fn slope(self) -> f32 {
        if self.high - self.low < 0.0 { 0.0 } else { 1.0 }
    }

    #[inline(always)]
    fn inner(self, other: Self) -> Self {
        Self { low: self.low.max(other.low), high: self.high.min(other.high) }
    }

    #[inline(always)]
    fn outer(self, other: Self) -> Self {
        Self { low: self.low.min(other.low), high: self.high.max(other.high) }
    }
}

/// Tiles of a row that a thread sums over the rows at a time.
const TOGETHER: usize = 8;

/// The gradient of the boxes of a side: slopes weighted by the gradient of the values, and summed.
pub(super) fn weighted<T: Real>(
    over: Sum,
    tiles: &Tiles,
    side: usize,
    slopes: &Tensor,
    gradient: &Tensor,
) -> Result<Fresh> {
    let (slopes, gradients) = (&*read::<f32>(slopes)?, &*read::<T>(gradient)?);
    let (rows, columns, values) = (tiles.rows, tiles.columns, tiles.values);
    let (first, size) = (tiles.first_slot(side) * TILE, tiles.slots() * TILE);
    // The slopes of a tile by the four numbers, for one of the values.
    let slopes_of = |row: usize, t: usize, value: usize| -> &Quads {
        let start = (row * tiles.across() + t) * size + first + value * 4 * TILE;
        let (lanes, _) = slopes[start..].as_chunks::<TILE>();
        lanes.first_chunk().expect("four numbers a box")
    };
    let boxes = if let Sum::Columns = over { rows } else { columns };
    Ok(written((boxes, 4), |out: &mut [T]| match over {
        Sum::Columns => {
            out.par_chunks_mut(4).enumerate().with_min_len(CHUNK.div_ceil(columns.max(1))).for_each(|(row, out)| {
                vectorized(
                    #[inline(always)]
                    || {
                        let mut total = [[0.0; TILE]; 4];
                        for (t, g) in gradients[row * columns..][..columns].chunks(TILE).enumerate() {
                            add_weighted(&mut total, &lanes(g, 1), slopes_of(row, t, 0));
                        }
                        for (out, lanes) in out.iter_mut().zip(&total) {
                            *out = T::narrow(sum(lanes));
                        }
                    },
                )
            })
        }
        Sum::Rows => out.par_chunks_mut(4 * TILE * TOGETHER).enumerate().for_each(|(chunk, out)| {
            vectorized(
                #[inline(always)]
                || {
                    let mut totals = [[[0.0; TILE]; 4]; TOGETHER];
                    let totals = &mut totals[..out.len().div_ceil(4 * TILE)];
                    for row in 0..rows {
                        for (t, total) in totals.iter_mut().enumerate() {
                            let t = chunk * TOGETHER + t;
                            let end = columns.min((t + 1) * TILE);
                            let g = &gradients[(row * columns + t * TILE) * values..(row * columns + end) * values];
                            for value in 0..values {
                                add_weighted(total, &lanes(&g[value..], values), slopes_of(row, t, value));
                            }
                        }
                    }
                    for (out, total) in out.chunks_mut(4 * TILE).zip(totals) {
                        for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                            for (out, lanes) in out.iter_mut().zip(total.iter()) {
                                *out = T::narrow(lanes[i]);
                            }
                        }
                    }
                },
            )
        }),
    }))
}

/// Every `step`-th number of a slice, and zeros after them.
#[inline(always)]
fn lanes<T: Real>(values: &[T], step: usize) -> Lanes {
    let mut lanes = [0.0; TILE];
    if step == 1
        && let Some(values) = values.first_chunk::<TILE>()
    {
        // Of a known length, so that it is vectorized.
        for i in 0..TILE {
            lanes[i] = values[i].widen();
        }
    } else {
        for i in 0..values.len().div_ceil(step).min(TILE) {
            lanes[i] = values[i * step].widen();
        }
    }
    lanes
}

/// `total += weights · slopes`.
#[inline(always)]
fn add_weighted(total: &mut Quads, weights: &Lanes, slopes: &Quads) {
    // One loop over all lanes is vectorized; four short ones are unrolled.
    let weights = [*weights; 4];
    let (total, weights, slopes) = (total.as_flattened_mut(), weights.as_flattened(), slopes.as_flattened());
    for ((total, weight), slope) in total.iter_mut().zip(weights).zip(slopes) {
        *total += weight * slope;
    }
}
