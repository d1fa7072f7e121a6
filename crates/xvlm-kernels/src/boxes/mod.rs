//! Boxes: conversions, covered patches, and how far two boxes agree.

mod composed;
mod host;
mod overlap;

use candle_core::{D, Result, Tensor};

pub use composed::iou;
pub use overlap::{box_losses, giou, pairwise_giou};

/// What the four numbers of a box are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoxFormat {
    /// `(cx, cy, w, h)`: the centre and the sides.
    Cxcywh,
    /// `(x0, y0, x1, y1)`: the low corner and the high one.
    Xyxy,
}

/// An area this small is none: far below that of one pixel of any picture, in fractions of it or in pixels.
const TINY: f32 = 1e-12;

/// The patches a box covers on a grid of `side × side`: `[left, top, right, bottom]`, half-open, at least one patch.
///
/// `bounds` is `cxcywh` in fractions of the image. An edge is rounded outwards: the low one down, the high one up.
pub fn patch_rectangle(bounds: [f32; 4], side: usize) -> [usize; 4] {
    let [cx, cy, w, h] = bounds;
    let span = |centre: f32, extent: f32| {
        let low = ((centre - extent / 2.0) * side as f32).floor().max(0.0) as usize;
        let low = low.min(side.saturating_sub(1));
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
