//! What is done to a picture on its way into the model, and what that does to boxes in it.

use std::ops::Range;

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::image::{Encoded, Picture};

/// A rectangle of whole pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

impl Rect {
    /// All of an image.
    #[must_use]
    pub fn whole(width: u32, height: u32) -> Self {
        Self { x: 0, y: 0, width, height }
    }

    /// Whether it has pixels and all of them are in an image of `width` × `height`.
    #[must_use]
    pub fn is_inside(&self, width: u32, height: u32) -> bool {
        let along = |from: u32, size: u32, side: u32| size > 0 && from < side && size <= side - from;
        along(self.x, self.width, width) && along(self.y, self.height, height)
    }
}

/// The part of a box `(x, y, w, h)` that is inside an image of `width` × `height` pixels; `None` if
/// the box reaches outside by more than a pixel (rounding in annotations), or nothing is inside.
#[must_use]
pub fn clip_box(bbox: [f32; 4], width: u32, height: u32) -> Option<[f32; 4]> {
    const SLACK: f64 = 1.0;
    let [x, y, w, h] = bbox.map(f64::from);
    let along = |lo: f64, size: f64, side: u32| {
        let side = f64::from(side);
        let inside = lo >= -SLACK && lo + size <= side + SLACK;
        let (from, to) = (lo.max(0.0), (lo + size).min(side));
        (inside && to > from).then_some((from as f32, (to - from) as f32))
    };
    let ((x, w), (y, h)) = (along(x, w, width)?, along(y, h, height)?);
    Some([x, y, w, h])
}

/// A box `(x, y, w, h)` in pixels of a view, before the view is resized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placed {
    bbox: [f64; 4],
    /// The view's width and height.
    size: [f64; 2],
}

impl Placed {
    /// The box as `(cx, cy, w, h)` in fractions of the view.
    #[must_use]
    pub fn centered(&self) -> [f32; 4] {
        let ([x, y, w, h], [width, height]) = (self.bbox, self.size);
        [(x + w / 2.0) / width, (y + h / 2.0) / height, w / width, h / height].map(|v| v as f32)
    }

    /// Which of `grid` × `grid` patches the box touches: `[1 + grid²]` of 0 and 1, the first always 1.
    #[must_use]
    pub fn region_mask(&self, grid: usize) -> Vec<f32> {
        let ([x, y, w, h], [width, height]) = (self.bbox, self.size);
        let columns = covered_patches(x, x + w, width, grid);
        let mut mask = vec![0.0; 1 + grid * grid];
        mask[0] = 1.0;
        for row in covered_patches(y, y + h, height, grid) {
            mask[1 + row * grid..][columns.clone()].fill(1.0);
        }
        mask
    }
}

/// The patches that the span `lo..hi` touches when a side of length `side` is cut into `grid` (X-VLM
/// `get_image_attns`); never empty.
#[must_use]
pub fn covered_patches(lo: f64, hi: f64, side: f64, grid: usize) -> Range<usize> {
    // Multiplied first: exact wherever the quotient is whole.
    let first = ((lo * grid as f64 / side).floor() as usize).min(grid.saturating_sub(1));
    let end = ((hi * grid as f64 / side).ceil() as usize).min(grid);
    first..end.max(first + 1)
}

/// What the model gets to see of an image: a part of it, perhaps mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// The part, in pixels of the image as stored.
    pub crop: Rect,
    /// Whether it is mirrored left to right.
    pub flip: bool,
}

impl View {
    /// The whole image, not mirrored.
    #[must_use]
    pub fn whole(width: u32, height: u32) -> Self {
        Self { crop: Rect::whole(width, height), flip: false }
    }

    /// Where a box of the image, `(x, y, w, h)` in pixels as stored, is in this view, clipped to it;
    /// `None` unless more than `min_share` of its area is left.
    #[must_use]
    pub fn place(&self, bbox: [f32; 4], min_share: f64) -> Option<Placed> {
        let [x, y, w, h] = bbox.map(f64::from);
        let [x0, y0, width, height] = [self.crop.x, self.crop.y, self.crop.width, self.crop.height].map(f64::from);
        let (left, top) = ((x - x0).max(0.0), (y - y0).max(0.0));
        let (right, bottom) = ((x + w - x0).min(width), (y + h - y0).min(height));
        if right <= left || bottom <= top {
            return None;
        }
        let (new_w, new_h) = (right - left, bottom - top);
        let left = if self.flip { width - right } else { left };
        let kept = new_w * new_h > min_share * w * h;
        kept.then_some(Placed { bbox: [left, top, new_w, new_h], size: [width, height] })
    }

    /// The view as a square picture of `resolution`, decoding no more of the file than it needs.
    ///
    /// # Errors
    ///
    /// [`DataError::Image`] if nothing can be decoded.
    ///
    /// # Panics
    ///
    /// If the crop is not inside the image, or `resolution` is 0.
    pub fn decode(&self, image: &Encoded<'_>, resolution: usize) -> Result<Picture, DataError> {
        let mut picture = image.decode_part(self.crop)?.resized_square(resolution);
        if self.flip {
            picture.mirror();
        }
        Ok(picture)
    }
}

/// A part of an image of random size, shape and place: torchvision's `RandomResizedCrop`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomResizedCrop {
    /// Least and largest share of the image's area.
    pub scale: [f64; 2],
    /// Least and largest ratio of width to height.
    #[serde(default = "RandomResizedCrop::usual_ratio")]
    pub ratio: [f64; 2],
}

impl RandomResizedCrop {
    /// Shapes are drawn so often, in the hope of one that fits into the image.
    const ATTEMPTS: usize = 10;

    fn usual_ratio() -> [f64; 2] {
        [3.0 / 4.0, 4.0 / 3.0]
    }

    /// A fifth to all of an image (X-VLM `pretrain_transform`).
    #[must_use]
    pub fn pretraining() -> Self {
        Self { scale: [0.2, 1.0], ratio: Self::usual_ratio() }
    }

    /// A half to all of an image (X-VLM `train_transform`).
    #[must_use]
    pub fn finetuning() -> Self {
        Self { scale: [0.5, 1.0], ratio: Self::usual_ratio() }
    }

    /// # Errors
    ///
    /// [`DataError::Config`] if a bound is not positive or the lower is above the upper, or if more than the image is asked for.
    pub fn check(&self) -> Result<(), DataError> {
        let ordered = |[low, high]: [f64; 2], most: f64| low > 0.0 && low <= high && high <= most;
        let wrong = |field, expected: &str, found: [f64; 2]| {
            Err(DataError::Config { field, expected: expected.to_owned(), found: format!("{found:?}") })
        };
        if !ordered(self.scale, 1.0) {
            return wrong("crop.scale", "[least, largest] share of the area, above 0 and at most 1", self.scale);
        }
        if !ordered(self.ratio, f64::MAX) {
            return wrong("crop.ratio", "[least, largest] ratio of width to height, above 0", self.ratio);
        }
        Ok(())
    }

    /// A part of an image of `width` × `height` pixels, neither 0. If no shape that is drawn fits, the largest central part whose ratio
    /// is allowed.
    pub fn draw(&self, width: u32, height: u32, rng: &mut impl Rng) -> Rect {
        let area = f64::from(width) * f64::from(height);
        let [narrow, wide] = self.ratio.map(f64::ln);
        let side = |length: f64| length.round_ties_even() as u32;
        for _ in 0..Self::ATTEMPTS {
            let target = area * rng.random_range(self.scale[0]..=self.scale[1]);
            let ratio = rng.random_range(narrow..=wide).exp();
            let (w, h) = (side((target * ratio).sqrt()), side((target / ratio).sqrt()));
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                let y = rng.random_range(0..=height - h);
                let x = rng.random_range(0..=width - w);
                return Rect { x, y, width: w, height: h };
            }
        }
        let ratio = f64::from(width) / f64::from(height);
        let (w, h) = if ratio < self.ratio[0] {
            (width, side(f64::from(width) / self.ratio[0]).clamp(1, height))
        } else if ratio > self.ratio[1] {
            (side(f64::from(height) * self.ratio[1]).clamp(1, width), height)
        } else {
            (width, height)
        };
        Rect { x: (width - w) / 2, y: (height - h) / 2, width: w, height: h }
    }
}

/// How views are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    /// The part that is cut out at random where texts tell the whole image; none: all of it.
    pub crop: Option<RandomResizedCrop>,
    /// Whether to cut out a part at random where texts tell parts of it.
    pub random_crop: bool,
    /// Whether to mirror half of the pictures.
    pub hflip: bool,
    /// Whether pictures whose texts tell left from right are never mirrored.
    pub careful_hflip: bool,
}

impl Transform {
    /// A part of an image of `width` × `height` that holds all of `keep`, a box `(x, y, w, h)` inside
    /// it; each edge is uniform between the image's and the box's. The whole without `random_crop`.
    pub fn crop_around(&self, keep: [f32; 4], width: u32, height: u32, rng: &mut impl Rng) -> Rect {
        if !self.random_crop {
            return Rect::whole(width, height);
        }
        let [x, y, w, h] = keep;
        let mut along = |lo: f32, size: f32, side: u32| {
            let from = rng.random_range(0..=(lo.max(0.0).floor() as u32).min(side.saturating_sub(1)));
            let least = ((lo + size).ceil() as u32).clamp(from + 1, side.max(from + 1));
            let to = rng.random_range(least..=side.max(least));
            (from, to - from)
        };
        let ((x, width), (y, height)) = (along(x, w, width), along(y, h, height));
        Rect { x, y, width, height }
    }

    /// Whether to mirror a picture that goes with these texts.
    pub fn flip<'a>(&self, texts: impl IntoIterator<Item = &'a str>, rng: &mut impl Rng) -> bool {
        let wanted = self.hflip && rng.random_bool(0.5);
        wanted && !(self.careful_hflip && texts.into_iter().any(tells_sides))
    }
}

/// Whether mirroring would make a text wrong. Like X-VLM (`left_or_right_in_caption`) this looks for
/// parts of words: "leftmost" counts, and so does the harmless "bright".
#[must_use]
pub fn tells_sides(text: &str) -> bool {
    let text = text.to_lowercase();
    text.contains("left") || text.contains("right")
}
