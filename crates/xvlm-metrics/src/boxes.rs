//! Grounding: how well predicted boxes cover the true ones.

use serde::Serialize;

use crate::percent;

/// Scores of boxes; all 0 if there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct BoxScores {
    /// Boxes whose intersection over union is at least 0.5, in percent.
    #[serde(rename = "accuracy@0.5")]
    pub accuracy: f64,
    /// Mean intersection over union times 100.
    pub mean_iou: f64,
    /// Number of boxes.
    pub count: usize,
}

impl BoxScores {
    /// Scores from the intersection over union of each predicted box with the true one, as [`iou_xywh`] gives it.
    pub fn from_ious(ious: &[f32]) -> Self {
        let count = ious.len();
        let right = ious.iter().filter(|&&iou| iou >= 0.5).count();
        let sum: f64 = ious.iter().map(|&iou| f64::from(iou)).sum();
        Self { accuracy: percent(right, count), mean_iou: 100.0 * sum / count.max(1) as f64, count }
    }
}

/// Intersection over union, 0 to 1, of two boxes `(x, y, w, h)`: a corner and the sides, in any one unit.
///
/// A box with a side that is not positive, or a number that is not finite, covers nothing and overlaps with nothing.
pub fn iou_xywh(a: [f32; 4], b: [f32; 4]) -> f32 {
    let [a, b] = [a, b].map(|sides| sides.map(f64::from));
    let covers = |sides: [f64; 4]| sides.iter().all(|side| side.is_finite()) && sides[2] > 0.0 && sides[3] > 0.0;
    if !covers(a) || !covers(b) {
        return 0.0;
    }
    let overlap = |axis: usize| {
        let end = (a[axis] + a[axis + 2]).min(b[axis] + b[axis + 2]);
        (end - a[axis].max(b[axis])).max(0.0)
    };
    let shared = overlap(0) * overlap(1);
    (shared / (a[2] * a[3] + b[2] * b[3] - shared)) as f32
}

/// As [`iou_xywh`], for boxes in pixels and by the rule of the RefCOCO evaluation (`computeIoU` of the REFER toolkit): boxes
/// that share no more than one pixel along an axis do not overlap.
pub fn refer_iou(a: [f32; 4], b: [f32; 4]) -> f32 {
    let overlap = |axis: usize| (a[axis] + a[axis + 2]).min(b[axis] + b[axis + 2]) - a[axis].max(b[axis]);
    if overlap(0) > 1.0 && overlap(1) > 1.0 { iou_xywh(a, b) } else { 0.0 }
}

/// Whether a point lies in a box `(x, y, w, h)`, its border included: what pointing accuracy counts.
pub fn contains(xywh: [f32; 4], [x, y]: [f32; 2]) -> bool {
    let inside = |at: f32, start: f32, side: f32| at >= start && f64::from(at) <= f64::from(start) + f64::from(side);
    inside(x, xywh[0], xywh[2]) && inside(y, xywh[1], xywh[3])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_in_the_box_up_to_its_border() {
        let xywh = [10.0, 20.0, 30.0, 40.0];
        for (point, expected) in [
            ([10.0, 20.0], true),
            ([40.0, 60.0], true),
            ([25.0, 30.0], true),
            ([9.9, 30.0], false),
            ([25.0, 60.1], false),
            ([f32::NAN, 30.0], false),
        ] {
            assert_eq!(contains(xywh, point), expected, "{point:?}");
        }
    }

    #[test]
    fn one_shared_pixel_is_none() {
        let (a, b) = ([0.0, 0.0, 10.0, 10.0], [9.0, 0.0, 10.0, 10.0]);
        assert!(iou_xywh(a, b) > 0.0);
        assert_eq!(refer_iou(a, b), 0.0);
        let b = [8.0, 0.0, 10.0, 10.0];
        assert_eq!(refer_iou(a, b), iou_xywh(a, b));
    }

    #[test]
    fn overlaps_by_hand() {
        let unit = [0.0, 0.0, 2.0, 2.0];
        for (other, expected) in [
            (unit, 1.0),
            ([1.0, 0.0, 2.0, 2.0], 1.0 / 3.0), // 2 of 6
            ([1.0, 1.0, 2.0, 2.0], 1.0 / 7.0), // 1 of 7
            ([0.0, 0.0, 2.0, 1.0], 0.5),       // half of it
            ([0.5, 0.5, 1.0, 1.0], 0.25),      // inside
            ([2.0, 0.0, 2.0, 2.0], 0.0),       // side by side
            ([9.0, 9.0, 1.0, 1.0], 0.0),
            ([0.0, 0.0, 0.0, 2.0], 0.0),
            ([2.0, 2.0, -2.0, -2.0], 0.0),
            ([f32::NAN, 0.0, 2.0, 2.0], 0.0),
            ([0.0, 0.0, f32::NAN, 2.0], 0.0),
            ([0.0, 0.0, f32::INFINITY, f32::INFINITY], 0.0),
        ] {
            assert_eq!(iou_xywh(unit, other), expected as f32, "{other:?}");
            assert_eq!(iou_xywh(other, unit), expected as f32, "{other:?}");
        }
    }

    #[test]
    fn half_an_overlap_is_enough() {
        let scores = BoxScores::from_ious(&[0.5, 0.25, 1.0, 0.49]);
        assert_eq!((scores.accuracy, scores.count), (50.0, 4));
        assert!((scores.mean_iou - 56.0).abs() < 1e-5, "{}", scores.mean_iou);
        assert_eq!(BoxScores::from_ious(&[]), BoxScores::default());
    }
}
