//! The comparison of boxes by candle's operations.

use candle_core::{Result, Tensor};

use super::{BoxFormat, TINY, cxcywh_to_xyxy};
use crate::error::check_shape;

/// Intersection over union of paired boxes `xyxy [B, 4]` → `[B]`, and the areas of their unions `[B]`. Boxes without area
/// are treated as by [`giou`](super::giou).
///
/// # Errors
/// If the shapes are not `[B, 4]`.
pub fn iou(a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    let n = a.dim(0)?;
    check_shape("iou", "a", a, &[n, 4])?;
    check_shape("iou", "b", b, &[n, 4])?;
    if n == 0 {
        let nothing = Tensor::zeros(0, a.dtype(), a.device())?;
        return Ok((nothing.clone(), nothing));
    }
    let (intersection, union) = intersection_and_union(a, b)?;
    Ok((ratio(&intersection, &union)?, union))
}

/// GIoU of boxes `[.., 4]`, whose other dimensions are broadcast against each other.
pub(super) fn giou(a: &Tensor, b: &Tensor, format: BoxFormat) -> Result<Tensor> {
    let corners = |boxes: &Tensor| match format {
        BoxFormat::Cxcywh => cxcywh_to_xyxy(boxes),
        BoxFormat::Xyxy => Ok(boxes.clone()),
    };
    let (a, b) = (&corners(a)?, &corners(b)?);
    let (intersection, union) = intersection_and_union(a, b)?;
    let (low, high) = (low(a)?.broadcast_minimum(&low(b)?)?, high(a)?.broadcast_maximum(&high(b)?)?);
    let hull = area(&low, &high)?;
    ratio(&intersection, &union)? - ratio(&(&hull - &union)?, &hull)?
}

/// `[B, 2]`: what [`box_losses`](super::box_losses) is.
pub(super) fn losses(predicted: &Tensor, target: &Tensor) -> Result<Tensor> {
    // As a difference of two, because the slope of candle's absolute value at 0 is 1.
    let distance = (predicted.maximum(target)? - predicted.minimum(target)?)?;
    let giou = giou(predicted, target, BoxFormat::Cxcywh)?;
    Tensor::stack(&[&distance.sum(1)?, &giou.affine(-1.0, 1.0)?], 1)
}

fn intersection_and_union(a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    let (inner_low, inner_high) = (low(a)?.broadcast_maximum(&low(b)?)?, high(a)?.broadcast_minimum(&high(b)?)?);
    let intersection = area(&inner_low, &inner_high)?;
    let both = area(&low(a)?, &high(a)?)?.broadcast_add(&area(&low(b)?, &high(b)?)?)?;
    let union = (both - &intersection)?;
    Ok((intersection, union))
}

fn low(boxes: &Tensor) -> Result<Tensor> {
    boxes.narrow(boxes.rank() - 1, 0, 2)
}

fn high(boxes: &Tensor) -> Result<Tensor> {
    boxes.narrow(boxes.rank() - 1, 2, 2)
}

/// Corners `[.., 2]` → areas `[..]`, 0 where the high one is below the low one.
fn area(low: &Tensor, high: &Tensor) -> Result<Tensor> {
    let sides = (high - low)?.relu()?;
    let last = sides.rank() - 1;
    sides.narrow(last, 0, 1)?.mul(&sides.narrow(last, 1, 1)?)?.squeeze(last)
}

/// A quotient of areas; 0, and constant, where the one below is none.
fn ratio(above: &Tensor, below: &Tensor) -> Result<Tensor> {
    let is_there = below.gt(f64::from(TINY))?;
    let quotient = (above / is_there.where_cond(below, &below.ones_like()?)?)?;
    is_there.where_cond(&quotient, &quotient.zeros_like()?)
}
