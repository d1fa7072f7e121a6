//! The comparison of boxes on the CPU: tile by tile, so that its loops are vectorized.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::overlap::{Comparison, Pairs, Sum, TILE, Tiles};
use super::{BoxFormat, TINY};
use crate::graph::Fresh;
use crate::host::{read, written};
use crate::real::Real;
use crate::simd::vectorized;

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
    let of_a_tile = tiles.slots() * TILE;
    let mut slopes = None;
    let values = written(c.shape(), |out: &mut [T]| {
        slopes = Some(written(&tiles.shape()[..], |slopes: &mut [f32]| {
            let outs = out.par_chunks_mut(segment * c.values());
            let mut parts: Vec<&mut [f32]> = slopes.chunks_mut((segment.div_ceil(TILE) * of_a_tile).max(1)).collect();
            parts.resize_with(outs.len(), Default::default);
            outs.zip(parts).enumerate().with_min_len(together).for_each(|(i, (out, slopes))| {
                let (a, b) = match c.pairs {
                    Pairs::Same(_) => (&a[i * segment * 4..], &b[i * segment * 4..]),
                    Pairs::All(..) => (&a[i * 4..][..4], b),
                };
                vectorized(
                    #[inline(always)]
                    || match c.format {
                        BoxFormat::Cxcywh => compare_segment::<T, true>(c, tiles, a, b, out, slopes),
                        BoxFormat::Xyxy => compare_segment::<T, false>(c, tiles, a, b, out, slopes),
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
    a: &[T],
    b: &[T],
    out: &mut [T],
    slopes: &mut [f32],
) {
    let one_with_all = matches!(c.pairs, Pairs::All(..));
    let size = tiles.slots() * TILE;
    for (t, out) in out.chunks_mut(TILE * c.values()).enumerate() {
        let pairs = out.len() / c.values();
        let second = quads(&b[t * TILE * 4..], pairs);
        let first = if one_with_all { repeated(a) } else { quads(&a[t * TILE * 4..], pairs) };
        let mut giou = [0.0; TILE];
        let mut by = [[[0.0; TILE]; 4]; 2];
        for i in 0..TILE {
            let at = |quads: &Quads| [quads[0][i], quads[1][i], quads[2][i], quads[3][i]];
            let (value, by_first, by_second) = generalised_iou::<CENTRES>(at(&first), at(&second));
            giou[i] = value;
            for k in 0..4 {
                by[0][k][i] = by_first[k];
                by[1][k][i] = by_second[k];
            }
        }
        let slots = slopes[t * size..][..size].as_chunks_mut().0;
        if c.losses {
            let mut distance = [0.0; TILE];
            for (p, t) in first.iter().zip(&second) {
                for ((sum, p), t) in distance.iter_mut().zip(p).zip(t) {
                    *sum += (p - t).abs();
                }
            }
            for ((out, &l1), &giou) in out.chunks_exact_mut(2).zip(&distance).zip(&giou) {
                (out[0], out[1]) = (T::narrow(l1), T::narrow(1.0 - giou));
            }
            for side in (0..2).filter(|&side| tiles.sides[side]) {
                let (own, other) = if side == 0 { (&first, &second) } else { (&second, &first) };
                let slots = &mut slots[tiles.first_slot(side)..];
                for k in 0..4 {
                    fill(
                        &mut slots[k],
                        #[inline(always)]
                        |i| sign(own[k][i] - other[k][i]),
                    );
                    fill(
                        &mut slots[4 + k],
                        #[inline(always)]
                        |i| -by[side][k][i],
                    );
                }
            }
        } else {
            out.iter_mut().zip(&giou).for_each(|(out, &giou)| *out = T::narrow(giou));
            for side in (0..2).filter(|&side| tiles.sides[side]) {
                slots[tiles.first_slot(side)..][..4].copy_from_slice(&by[side]);
            }
        }
    }
}

#[inline(always)]
fn fill(lanes: &mut Lanes, f: impl Fn(usize) -> f32) {
    lanes.iter_mut().enumerate().for_each(|(i, lane)| *lane = f(i));
}

/// The first boxes of a slice, at most as many as a tile has; zeros after them.
#[inline(always)]
fn quads<T: Real>(boxes: &[T], count: usize) -> Quads {
    let mut quads = [[0.0; TILE]; 4];
    for (i, bounds) in boxes.chunks_exact(4).take(count.min(TILE)).enumerate() {
        for k in 0..4 {
            quads[k][i] = bounds[k].widen();
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
    let positive = |x: f32| if x < 0.0 { 0.0 } else { x };
    // The slope of `positive`, as that of PyTorch's `clamp`.
    let open = |x: f32| if x < 0.0 { 0.0 } else { 1.0 };
    let inverse = |area: f32| if area <= TINY { 0.0 } else { 1.0 / area };
    let corners = |b: [f32; 4]| match CENTRES {
        true => [b[0] - b[2] * 0.5, b[1] - b[3] * 0.5, b[0] + b[2] * 0.5, b[1] + b[3] * 0.5],
        false => b,
    };
    let (a, b) = (corners(a), corners(b));
    // Along x and along y: the sides of both boxes, of their overlap and of their hull.
    let side_a = [a[2] - a[0], a[3] - a[1]];
    let side_b = [b[2] - b[0], b[3] - b[1]];
    let inner = [0, 1].map(|i| a[i + 2].min(b[i + 2]) - a[i].max(b[i]));
    let outer = [0, 1].map(|i| a[i + 2].max(b[i + 2]) - a[i].min(b[i]));
    let area = |sides: [f32; 2]| positive(sides[0]) * positive(sides[1]);
    let intersection = area(inner);
    let union = area(side_a) + area(side_b) - intersection;
    let hull = area(outer);
    let (per_union, per_hull) = (inverse(union), inverse(hull));
    let value = intersection * per_union - (hull - union) * per_hull;

    let by_union = per_hull - intersection * per_union * per_union;
    // The intersection is a part of the union, too.
    let by_intersection = per_union - by_union;
    let by_hull = -union * per_hull * per_hull;
    let (mut by_a, mut by_b) = ([0.0; 4], [0.0; 4]);
    for axis in 0..2 {
        let (low, high, across) = (axis, axis + 2, 1 - axis);
        let by_inner = by_intersection * open(inner[axis]) * positive(inner[across]);
        let by_outer = by_hull * open(outer[axis]) * positive(outer[across]);
        for (by, own, other, side) in [(&mut by_a, a, b, side_a), (&mut by_b, b, a, side_b)] {
            let by_side = by_union * open(side[axis]) * positive(side[across]);
            let by_low = by_inner * is_less(other[low], own[low]) + by_side + by_outer * is_less(own[low], other[low]);
            let by_high =
                by_inner * is_less(own[high], other[high]) + by_side + by_outer * is_less(other[high], own[high]);
            (by[low], by[high]) = match CENTRES {
                true => (by_high - by_low, (by_high + by_low) * 0.5),
                false => (-by_low, by_high),
            };
        }
    }
    (value, by_a, by_b)
}

/// The gradient of the boxes of a side: slopes weighted by the gradient of the values, and summed.
pub(super) fn weighted<T: Real>(
    sum: Sum,
    tiles: &Tiles,
    side: usize,
    slopes: &Tensor,
    gradient: &Tensor,
) -> Result<Fresh> {
    let (slopes, gradients) = (&*read::<f32>(slopes)?, &*read::<T>(gradient)?);
    let (rows, columns, values) = (tiles.rows, tiles.columns, tiles.values);
    let (first, size) = (tiles.first_slot(side) * TILE, tiles.slots() * TILE);
    // The slopes of a tile by the four numbers, for one of the values.
    let slopes_of = |row: usize, t: usize, value: usize| {
        slopes[(row * tiles.across() + t) * size + first + value * 4 * TILE..][..4 * TILE].as_chunks::<TILE>().0
    };
    let boxes = if let Sum::Columns = sum { rows } else { columns };
    Ok(written((boxes, 4), |out: &mut [T]| match sum {
        Sum::Columns => {
            out.par_chunks_mut(4).enumerate().with_min_len(CHUNK.div_ceil(columns.max(1))).for_each(|(row, out)| {
                vectorized(
                    #[inline(always)]
                    || {
                        let mut total = [[0.0; TILE]; 4];
                        for (t, g) in gradients[row * columns..][..columns].chunks(TILE).enumerate() {
                            add_weighted(&mut total, &lanes(g, 1), slopes_of(row, t, 0));
                        }
                        out.iter_mut().zip(&total).for_each(|(out, lanes)| *out = T::narrow(lanes.iter().sum()));
                    },
                )
            })
        }
        Sum::Rows => out.par_chunks_mut(4 * TILE).enumerate().for_each(|(t, out)| {
            vectorized(
                #[inline(always)]
                || {
                    let mut total = [[0.0; TILE]; 4];
                    let pairs = out.len() / 4;
                    for row in 0..rows {
                        for value in 0..values {
                            let g = &gradients[(row * columns + t * TILE) * values + value..];
                            let g = &g[..(pairs - 1) * values + 1];
                            add_weighted(&mut total, &lanes(g, values), slopes_of(row, t, value));
                        }
                    }
                    for (i, out) in out.chunks_exact_mut(4).enumerate() {
                        out.iter_mut().zip(&total).for_each(|(out, lanes)| *out = T::narrow(lanes[i]));
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
    lanes.iter_mut().zip(values.iter().step_by(step)).for_each(|(lane, x)| *lane = x.widen());
    lanes
}

/// `total += weights · slopes`.
#[inline(always)]
fn add_weighted(total: &mut Quads, weights: &Lanes, slopes: &[Lanes]) {
    for (total, slopes) in total.iter_mut().zip(slopes) {
        for ((total, weight), slope) in total.iter_mut().zip(weights).zip(slopes) {
            *total += weight * slope;
        }
    }
}
