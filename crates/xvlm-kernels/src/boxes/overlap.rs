//! Generalised IoU and the box losses: values, with their slopes in the same pass, and the sums of the backward pass.

use candle_core::{DType, Result, Tensor};

use super::{BoxFormat, composed, host};
use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, differentiable_by_gradient};
use crate::path::{Path, fused};

/// Generalised IoU (Rezatofighi et al. 2019) of paired boxes `a [N, 4]`, `b [N, 4]` → `[N]`, in [−1, 1].
///
/// Values and gradients are finite for all boxes whose areas are:
/// - A box without area, or with a negative side (a high corner below the low one), has the area 0 and overlaps nothing.
/// - Where a union, or a hull, has no area (at most 1e-12), its ratio is 0 and passes no gradient: two equal points have a
///   GIoU of 0.
/// - Where an edge of one box lies on that of the other, each has half of the gradient of their minimum or maximum; a side,
///   or an overlap, of exactly 0 has the slope it has above 0. Both are PyTorch's rules for `max`, `min` and `clamp`, by
///   which the original computes.
///
/// Numbers of two bytes are widened to `f32` first.
///
/// # Errors
/// If the shapes are not `[N, 4]`, or types or devices differ.
pub fn giou(a: &Tensor, b: &Tensor, format: BoxFormat) -> Result<Tensor> {
    const OP: &str = "giou";
    let n = rows(OP, "a", a)?;
    check_shape(OP, "b", b, &[n, 4])?;
    compared(Comparison { op: OP, format, pairs: Pairs::Same(n), losses: false }, [("a", a), ("b", b)])
}

/// [`giou`] of every box of `a [N, 4]` with every box of `b [M, 4]` → `[N, M]`.
///
/// # Errors
/// As [`giou`].
pub fn pairwise_giou(a: &Tensor, b: &Tensor, format: BoxFormat) -> Result<Tensor> {
    const OP: &str = "pairwise_giou";
    let pairs = Pairs::All(rows(OP, "a", a)?, rows(OP, "b", b)?);
    compared(Comparison { op: OP, format, pairs, losses: false }, [("a", a), ("b", b)])
}

/// The two box losses of each pair (§3.3.2): `predicted [B, 4]`, `target [B, 4]`, both `cxcywh`, → `[B, 2]`: the sum of
/// absolute differences, whose slope is 0 where there is none, and 1 − [`giou`].
///
/// # Errors
/// If the shapes are not `[B, 4]`, or types or devices differ.
pub fn box_losses(predicted: &Tensor, target: &Tensor) -> Result<Tensor> {
    const OP: &str = "box_losses";
    let n = rows(OP, "predicted", predicted)?;
    check_shape(OP, "target", target, &[n, 4])?;
    let comparison = Comparison { op: OP, format: BoxFormat::Cxcywh, pairs: Pairs::Same(n), losses: true };
    compared(comparison, [("predicted", predicted), ("target", target)])
}

/// The number of boxes `[N, 4]`.
fn rows(op: &'static str, argument: &'static str, boxes: &Tensor) -> Result<usize> {
    match boxes.dims() {
        &[n, 4] => Ok(n),
        found => {
            let found = found.to_vec();
            Err(KernelError::Shape { op, argument, expected: "[N, 4]".into(), found }.into())
        }
    }
}

/// Which boxes are compared.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pairs {
    /// Each of N with its own.
    Same(usize),
    /// Each of N with each of M.
    All(usize, usize),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Comparison {
    op: &'static str,
    pub(super) format: BoxFormat,
    pub(super) pairs: Pairs,
    /// Two numbers a pair, L1 and 1 − GIoU, instead of GIoU alone.
    pub(super) losses: bool,
}

/// Pairs whose slopes lie together.
pub(super) const TILE: usize = 16;

/// The slopes of values by the numbers of the boxes, in tiles: `[rows, ⌈columns / TILE⌉, slots, TILE]` in `f32`, the last
/// tile of a row padded. A slot is a number of a box of a side that is differentiated, for one of the values of a pair:
/// sides, then values, then the four numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Whether the boxes of either side are differentiated.
    pub(super) sides: [bool; 2],
    /// Values of a pair.
    pub(super) values: usize,
}

impl Tiles {
    pub(super) fn slots(&self) -> usize {
        self.sides.iter().filter(|differentiated| **differentiated).count() * self.values * 4
    }

    /// Tiles a row.
    pub(super) fn across(&self) -> usize {
        self.columns.div_ceil(TILE)
    }

    /// The first slot of a side.
    pub(super) fn first_slot(&self, side: usize) -> usize {
        if side == 1 && self.sides[0] { self.values * 4 } else { 0 }
    }

    pub(super) fn shape(&self) -> [usize; 4] {
        [self.rows, self.across(), self.slots(), TILE]
    }
}

impl Comparison {
    fn tiles(&self, sides: [bool; 2]) -> Tiles {
        let (rows, columns) = match self.pairs {
            Pairs::Same(n) => (1, n),
            Pairs::All(n, m) => (n, m),
        };
        Tiles { rows, columns, sides, values: self.values() }
    }

    pub(super) fn values(&self) -> usize {
        if self.losses { 2 } else { 1 }
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        match self.pairs {
            Pairs::Same(n) if self.losses => vec![n, 2],
            Pairs::Same(n) => vec![n],
            Pairs::All(n, m) => vec![n, m],
        }
    }

    fn composed(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let shape = self.shape();
        // candle makes views of what has no numbers, which not all of its operations survive.
        if shape.contains(&0) {
            return Tensor::zeros(shape, a.dtype(), a.device());
        }
        match self.pairs {
            _ if self.losses => composed::losses(a, b),
            Pairs::Same(_) => composed::giou(a, b, self.format),
            Pairs::All(..) => composed::giou(&a.unsqueeze(1)?, &b.unsqueeze(0)?, self.format),
        }
    }
}

fn compared(comparison: Comparison, boxes: [(&'static str, &Tensor); 2]) -> Result<Tensor> {
    let path = Path::of(comparison.op, &boxes)?;
    let [(a_name, a), (b_name, b)] = boxes;
    if path == Path::Composed {
        if let DType::F16 | DType::BF16 = a.dtype() {
            let wide = [(a_name, &a.to_dtype(DType::F32)?), (b_name, &b.to_dtype(DType::F32)?)];
            return compared(comparison, wide)?.to_dtype(a.dtype());
        }
        return comparison.composed(a, b);
    }
    let (a, b) = (&a.contiguous()?, &b.contiguous()?);
    let tiles = comparison.tiles([a.track_op(), b.track_op()]);
    let (values, slopes) = forward(&comparison, &tiles, a, b)?;
    let slopes = slopes.detached();
    differentiable_by_gradient(comparison.op, [a, b], values, move |gradient| {
        let by = |side: usize| {
            // Pairs of one box each are a single row.
            let sum = match comparison.pairs {
                Pairs::All(..) if side == 0 => Sum::Columns,
                _ => Sum::Rows,
            };
            tiles.sides[side].then(|| backward(sum, &tiles, side, &slopes, gradient)).transpose()
        };
        Ok([by(0)?, by(1)?])
    })
}

/// Over what the gradient of a box is summed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sum {
    /// The columns of its row.
    Columns,
    /// The rows of its column.
    Rows,
}

/// The values, and their slopes.
fn forward(comparison: &Comparison, tiles: &Tiles, a: &Tensor, b: &Tensor) -> Result<(Fresh, Fresh)> {
    fused!(a, T => host::compare::<T>(comparison, tiles, a, b); on_gpu::compare(comparison, tiles, a, b))
}

/// The gradient of the boxes of a side.
fn backward(sum: Sum, tiles: &Tiles, side: usize, slopes: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let fresh: Fresh = fused!(
        gradient,
        T => host::weighted::<T>(sum, tiles, side, slopes, gradient)?;
        on_gpu::weighted(sum, tiles, side, slopes, gradient)?
    );
    Ok(fresh.detached())
}

#[cfg(gpu)]
mod on_gpu {
    use super::*;
    use crate::gpu::{Arg, Buffer, Grid, Kernel, launch};

    const THREADS: u32 = 256;

    fn kernel(name: &'static str) -> Kernel {
        Kernel { file: "boxes", name }
    }

    pub(super) fn compare(c: &Comparison, tiles: &Tiles, a: &Tensor, b: &Tensor) -> Result<(Fresh, Fresh)> {
        let mut values = Buffer::like(a, c.shape())?;
        let mut slopes = Buffer::new(a, DType::F32, &tiles.shape()[..])?;
        let lanes = tiles.rows * tiles.across() * TILE;
        let flag = |on: bool| Arg::U32(u32::from(on));
        let arguments = &mut [
            Arg::In(a),
            Arg::In(b),
            Arg::Out(&mut values),
            Arg::Out(&mut slopes),
            Arg::size(tiles.rows)?,
            Arg::size(tiles.columns)?,
            flag(matches!(c.pairs, Pairs::Same(_))),
            flag(c.format == BoxFormat::Cxcywh),
            flag(c.losses),
            flag(tiles.sides[0]),
            flag(tiles.sides[1]),
        ];
        launch(
            kernel("compare_boxes"),
            a,
            a.dtype(),
            Grid::line(lanes.div_ceil(THREADS as usize), THREADS),
            arguments,
        )?;
        Ok((values.into(), slopes.into()))
    }

    pub(super) fn weighted(sum: Sum, tiles: &Tiles, side: usize, slopes: &Tensor, gradient: &Tensor) -> Result<Fresh> {
        let boxes = if let Sum::Columns = sum { tiles.rows } else { tiles.columns };
        let mut out = Buffer::like(gradient, (boxes, 4))?;
        let mut arguments = vec![Arg::In(gradient), Arg::In(slopes), Arg::Out(&mut out)];
        arguments.extend([Arg::size(tiles.columns)?, Arg::size(tiles.slots())?, Arg::size(tiles.first_slot(side))?]);
        let (name, blocks) = match sum {
            Sum::Columns => ("sum_slopes_of_rows", boxes),
            Sum::Rows => {
                arguments.extend([Arg::size(tiles.rows)?, Arg::size(tiles.values)?]);
                ("sum_slopes_of_columns", boxes.div_ceil(THREADS as usize))
            }
        };
        launch(kernel(name), gradient, gradient.dtype(), Grid::line(blocks, THREADS), &mut arguments)?;
        Ok(out.into())
    }
}
