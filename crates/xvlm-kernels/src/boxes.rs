//! Boxes: conversions, covered patches, and the L1 and generalised-IoU losses.

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};

use crate::error::check_shape;
use crate::host::{is_host_f32, read, slice};

/// The patches a box covers on a grid of `side × side`: `[left, top, right, bottom]`, half-open, at least one patch.
///
/// `bounds` is `cxcywh` in fractions of the image. An edge is rounded outwards: the low one down, the high one up.
pub fn patch_rectangle(bounds: [f32; 4], side: usize) -> [usize; 4] {
    let [cx, cy, w, h] = bounds;
    let span = |centre: f32, extent: f32| {
        let low = ((centre - extent / 2.0) * side as f32).floor().max(0.0) as usize;
        let low = low.min(side - 1);
        let high = ((centre + extent / 2.0) * side as f32).ceil().max(0.0) as usize;
        (low, high.min(side).max(low + 1))
    };
    let ((left, right), (top, bottom)) = (span(cx, w), span(cy, h));
    [left, top, right, bottom]
}

/// [`patch_rectangle`] as a row of `side²` zeros and ones, in image order.
pub fn patch_rectangle_mask(bounds: [f32; 4], side: usize) -> Vec<f32> {
    let [left, top, right, bottom] = patch_rectangle(bounds, side);
    let inside = |i: usize| (left..right).contains(&(i % side)) && (top..bottom).contains(&(i / side));
    (0..side * side).map(|i| f32::from(u8::from(inside(i)))).collect()
}

/// `(cx, cy, w, h)` → `(x0, y0, x1, y1)` over the last dimension, which is 4.
pub fn cxcywh_to_xyxy(boxes: &Tensor) -> Result<Tensor> {
    let centre = boxes.narrow(D::Minus1, 0, 2)?;
    let half = (boxes.narrow(D::Minus1, 2, 2)? * 0.5)?;
    Tensor::cat(&[&(&centre - &half)?, &(&centre + &half)?], D::Minus1)
}

/// `(x0, y0, x1, y1)` → `(cx, cy, w, h)` over the last dimension, which is 4.
pub fn xyxy_to_cxcywh(boxes: &Tensor) -> Result<Tensor> {
    let (low, high) = (boxes.narrow(D::Minus1, 0, 2)?, boxes.narrow(D::Minus1, 2, 2)?);
    Tensor::cat(&[&((&low + &high)? * 0.5)?, &(high - low)?], D::Minus1)
}

/// Intersection over union of paired boxes `xyxy [B, 4]` → `[B]`, and the areas of their unions `[B]`. Boxes without area give
/// finite values.
///
/// # Errors
/// If the shapes are not `[B, 4]`.
pub fn iou(a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    let n = a.dim(0)?;
    check_shape("iou", "a", a, &[n, 4])?;
    check_shape("iou", "b", b, &[n, 4])?;
    let (low, high) = (edges(a, 0)?.maximum(&edges(b, 0)?)?, edges(a, 2)?.minimum(&edges(b, 2)?)?);
    let intersection = area(&(high - low)?.relu()?)?;
    let own = |boxes: &Tensor| area(&(edges(boxes, 2)? - edges(boxes, 0)?)?);
    let union = ((own(a)? + own(b)?)? - &intersection)?;
    Ok(((intersection / (&union + f64::from(TINY))?)?, union))
}

/// Generalised IoU (Rezatofighi et al. 2019) of paired boxes `xyxy [B, 4]` → `[B]`, in [−1, 1]. Boxes without area give
/// finite values.
///
/// # Errors
/// If the shapes are not `[B, 4]`.
pub fn giou(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (iou, union) = iou(a, b)?;
    let (low, high) = (edges(a, 0)?.minimum(&edges(b, 0)?)?, edges(a, 2)?.maximum(&edges(b, 2)?)?);
    let hull = area(&(high - low)?)?;
    iou - ((&hull - &union)? / (&hull + f64::from(TINY))?)?
}

/// The low edges (from 0) or the high ones (from 2) of boxes `xyxy [B, 4]` → `[B, 2]`.
fn edges(boxes: &Tensor, from: usize) -> Result<Tensor> {
    boxes.narrow(1, from, 2)
}

/// Sides `[B, 2]` → areas `[B]`.
fn area(sides: &Tensor) -> Result<Tensor> {
    sides.narrow(1, 0, 1)?.mul(&sides.narrow(1, 1, 1)?)?.squeeze(1)
}

/// Keeps ratios of areas finite; far below the area of one pixel of any picture.
const TINY: f32 = 1e-12;

/// The two box losses of each pair (§3.3.2): `predicted [B, 4]`, `target [B, 4]`, both `cxcywh`, → `[B, 2]`: the sum of
/// absolute differences, and `1 − GIoU`. Gradients reach `predicted` only.
///
/// # Errors
/// If the shapes are not `[B, 4]`.
pub fn box_losses(predicted: &Tensor, target: &Tensor) -> Result<Tensor> {
    let n = predicted.dim(0)?;
    check_shape("box_losses", "predicted", predicted, &[n, 4])?;
    check_shape("box_losses", "target", target, &[n, 4])?;
    let target = target.detach();
    if is_host_f32(&[predicted, &target]) {
        return predicted.contiguous()?.apply_op2(&target.contiguous()?, BoxLosses);
    }
    let l1 = (predicted - &target)?.abs()?.sum_keepdim(1)?;
    let giou = giou(&cxcywh_to_xyxy(predicted)?, &cxcywh_to_xyxy(&target)?)?;
    Tensor::cat(&[&l1, &giou.affine(-1.0, 1.0)?.unsqueeze(1)?], 1)
}

struct BoxLosses;

/// GIoU of two `cxcywh` boxes and its gradient with respect to the first.
fn giou_with_gradient(p: [f32; 4], t: [f32; 4]) -> (f32, [f32; 4]) {
    let low = |b: [f32; 4], axis: usize| b[axis] - b[axis + 2] / 2.0;
    let high = |b: [f32; 4], axis: usize| b[axis] + b[axis + 2] / 2.0;
    let (mut overlap, mut hull_side) = ([0f32; 2], [0f32; 2]);
    // Derivatives of the overlap's and the hull's sides by the low and the high edge of `p`.
    let (mut d_overlap, mut d_hull) = ([[0f32; 2]; 2], [[0f32; 2]; 2]);
    for axis in 0..2 {
        let (p0, p1, t0, t1) = (low(p, axis), high(p, axis), low(t, axis), high(t, axis));
        overlap[axis] = (p1.min(t1) - p0.max(t0)).max(0.0);
        if overlap[axis] > 0.0 {
            d_overlap[axis] = [if p0 > t0 { -1.0 } else { 0.0 }, if p1 < t1 { 1.0 } else { 0.0 }];
        }
        hull_side[axis] = p1.max(t1) - p0.min(t0);
        d_hull[axis] = [if p0 < t0 { -1.0 } else { 0.0 }, if p1 > t1 { 1.0 } else { 0.0 }];
    }
    let intersection = overlap[0] * overlap[1];
    let union = p[2] * p[3] + t[2] * t[3] - intersection;
    let hull = hull_side[0] * hull_side[1];
    let (u, c) = (union + TINY, hull + TINY);
    let value = intersection / u - (hull - union) / c;
    let (by_intersection, by_union) = (1.0 / u, 1.0 / c - intersection / (u * u));
    let by_hull = -1.0 / c + (hull - union) / (c * c);
    let mut gradient = [0f32; 4];
    for axis in 0..2 {
        let other = 1 - axis;
        // Area by an edge: moving the high edge out adds the other side's length.
        let d_area = [-p[other + 2], p[other + 2]];
        let edge = [0, 1].map(|i| {
            let d_intersection = d_overlap[axis][i] * overlap[other];
            by_intersection * d_intersection
                + by_union * (d_area[i] - d_intersection)
                + by_hull * d_hull[axis][i] * hull_side[other]
        });
        gradient[axis] = edge[0] + edge[1];
        gradient[axis + 2] = (edge[1] - edge[0]) / 2.0;
    }
    (value, gradient)
}

fn quads(values: &[f32]) -> impl Iterator<Item = [f32; 4]> + '_ {
    values.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]])
}

impl CustomOp2 for BoxLosses {
    fn name(&self) -> &'static str {
        "box-losses"
    }

    fn cpu_fwd(
        &self,
        p: &CpuStorage,
        p_layout: &Layout,
        t: &CpuStorage,
        t_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (p, t) = (slice(p, p_layout)?, slice(t, t_layout)?);
        let out: Vec<f32> = quads(p)
            .zip(quads(t))
            .flat_map(|(p, t)| {
                let l1 = p.iter().zip(t).map(|(p, t)| (p - t).abs()).sum();
                [l1, 1.0 - giou_with_gradient(p, t).0]
            })
            .collect();
        let rows = out.len() / 2;
        Ok((CpuStorage::F32(out), (rows, 2).into()))
    }

    fn bwd(&self, p: &Tensor, t: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (p_values, t_values, grads) = (read::<f32>(p)?, read::<f32>(t)?, read::<f32>(&grad)?);
        let out: Vec<f32> = quads(&p_values)
            .zip(quads(&t_values))
            .zip(grads.chunks_exact(2))
            .flat_map(|((p, t), g)| {
                let (_, by_giou) = giou_with_gradient(p, t);
                [0, 1, 2, 3].map(|i| {
                    let difference = p[i] - t[i];
                    let sign = if difference == 0.0 { 0.0 } else { difference.signum() };
                    g[0] * sign - g[1] * by_giou[i]
                })
            })
            .collect();
        Ok((Some(Tensor::from_vec(out, p.shape(), p.device())?), None))
    }
}
