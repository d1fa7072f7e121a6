//! Numbered boxes and heat in a picture.

use xvlm::data::Rect;
use xvlm::{Picture, PixelBox};

/// Colours that stand apart from each other, on light and on dark ground.
pub(crate) const PALETTE: [[u8; 3]; 8] = [
    [225, 29, 72],
    [37, 99, 235],
    [5, 150, 105],
    [217, 119, 6],
    [147, 51, 234],
    [8, 145, 178],
    [190, 24, 193],
    [77, 124, 15],
];

/// Digits of 5 × 7 pixels: a row a byte, the highest of five bits to the left.
const DIGITS: [[u8; 7]; 10] = [
    [0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110],
    [0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110],
    [0b01110, 0b10001, 0b00001, 0b00110, 0b01000, 0b10000, 0b11111],
    [0b11111, 0b00010, 0b00100, 0b00010, 0b00001, 0b10001, 0b01110],
    [0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010],
    [0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110],
    [0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110],
    [0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000],
    [0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110],
    [0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100],
];
const WHITE: [u8; 3] = [255; 3];

/// The colour of the box of this index.
pub(crate) fn colour(index: usize) -> [u8; 3] {
    PALETTE[index % PALETTE.len()]
}

/// Draws each box in a colour of its own, with its number (from 1) at its upper left corner.
pub(crate) fn number_boxes(picture: &mut Picture, boxes: &[PixelBox]) {
    for (index, bounds) in boxes.iter().enumerate() {
        frame(picture, index, bounds);
    }
    // Numbers last: no line crosses them.
    for (index, bounds) in boxes.iter().enumerate() {
        plate(picture, index, [bounds.xmin, bounds.ymin]);
    }
}

/// A pixel of a digit: legible, whatever the size of the picture.
fn unit(picture: &Picture) -> i64 {
    i64::from((picture.width().min(picture.height()) / 250).max(1))
}

fn frame(picture: &mut Picture, index: usize, bounds: &PixelBox) {
    let unit = unit(picture);
    let [left, top, right, bottom] =
        [bounds.xmin, bounds.ymin, bounds.xmax, bounds.ymax].map(|edge| edge.round() as i64);
    // White around the line keeps it apart from whatever is below.
    for (colour, inner, outer) in [(WHITE, -unit, 3 * unit), (colour(index), 0, 2 * unit)] {
        let (low, high) = (inner.min(0), outer);
        fill(picture, [left + low, top + low, right - low, top + high], colour);
        fill(picture, [left + low, bottom - high, right - low, bottom - low], colour);
        fill(picture, [left + low, top + low, left + high, bottom - low], colour);
        fill(picture, [right - high, top + low, right - low, bottom - low], colour);
    }
}

fn plate(picture: &mut Picture, index: usize, [left, top]: [f32; 2]) {
    let unit = unit(picture);
    let digits: Vec<usize> = (index + 1).to_string().bytes().map(|byte| usize::from(byte - b'0')).collect();
    let (width, height) = ((6 * digits.len() as i64 + 3) * unit, 11 * unit);
    let x = (left.round() as i64).min(i64::from(picture.width()) - width).max(0);
    let y = (top.round() as i64).min(i64::from(picture.height()) - height).max(0);
    fill(picture, [x, y, x + width, y + height], colour(index));
    for (i, digit) in digits.into_iter().enumerate() {
        for (row, bits) in (0i64..).zip(DIGITS[digit]) {
            for column in (0..5).filter(|column| bits >> (4 - column) & 1 == 1) {
                let (x, y) = (x + (2 + 6 * i as i64 + column) * unit, y + (2 + row) * unit);
                fill(picture, [x, y, x + unit, y + unit], WHITE);
            }
        }
    }
}

/// Five colours of matplotlib's inferno, whose lightness rises evenly.
const INFERNO: [[f32; 3]; 5] =
    [[0.0, 0.0, 4.0], [87.0, 16.0, 110.0], [188.0, 55.0, 84.0], [249.0, 142.0, 9.0], [252.0, 255.0, 164.0]];
/// How much the heat covers the picture where there is none, and where it is hottest.
const COVER: [f32; 2] = [0.5, 0.7];

/// Lays heat over a picture: one number a pixel, from 0 (or below) to the maximum. What is cold is darkened.
pub(crate) fn heat(picture: &mut Picture, values: &[f32]) {
    let hottest = values.iter().copied().fold(0.0, f32::max);
    for (pixel, &value) in picture.rgb_mut().chunks_exact_mut(3).zip(values) {
        let share = if hottest > 0.0 { (value / hottest).clamp(0.0, 1.0) } else { 0.0 };
        let at = share * (INFERNO.len() - 1) as f32;
        let low = (at as usize).min(INFERNO.len() - 2);
        let cover = COVER[0] + (COVER[1] - COVER[0]) * share;
        for (channel, byte) in pixel.iter_mut().enumerate() {
            let [from, to] = [INFERNO[low][channel], INFERNO[low + 1][channel]];
            let colour = from + (to - from) * (at - low as f32);
            *byte = ((1.0 - cover) * f32::from(*byte) + cover * colour).round() as u8;
        }
    }
}

/// Marks a point, and the box of this index with its number.
pub(crate) fn number_point(picture: &mut Picture, index: usize, bounds: &PixelBox, [x, y]: [f32; 2]) {
    frame(picture, index, bounds);
    let unit = unit(picture);
    let (x, y) = (x as i64, y as i64);
    for (colour, size) in [(WHITE, 4 * unit), (colour(index), 3 * unit)] {
        fill(picture, [x - size, y - unit, x + size, y + unit], colour);
        fill(picture, [x - unit, y - size, x + unit, y + size], colour);
    }
    plate(picture, index, [bounds.xmin, bounds.ymin]);
}

/// Pictures of one size in rows of at most `columns`, on white.
pub(crate) fn tiles(pictures: &[Picture], columns: usize) -> Option<Picture> {
    const GAP: u32 = 8;
    let first = pictures.first()?;
    let columns = columns.clamp(1, pictures.len());
    let rows = pictures.len().div_ceil(columns);
    let side = |count: usize, size: u32| count as u32 * (size + GAP) - GAP;
    let mut all = Picture::blank(side(columns, first.width()), side(rows, first.height()), WHITE);
    for (i, picture) in pictures.iter().enumerate() {
        let (x, y) = ((i % columns) as u32 * (first.width() + GAP), (i / columns) as u32 * (first.height() + GAP));
        all.put(picture, Rect { x, y, width: picture.width(), height: picture.height() });
    }
    Some(all)
}

/// Fills a rectangle (left, top, right, bottom), as far as it is inside.
fn fill(picture: &mut Picture, [left, top, right, bottom]: [i64; 4], colour: [u8; 3]) {
    let (width, height) = (i64::from(picture.width()), i64::from(picture.height()));
    let rgb = picture.rgb_mut();
    for y in top.max(0)..bottom.min(height) {
        for x in left.max(0)..right.min(width) {
            let at = 3 * (y * width + x) as usize;
            rgb[at..at + 3].copy_from_slice(&colour);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(boxes: &[[f32; 4]]) -> Picture {
        let mut picture = Picture::from_rgb(60, 40, vec![128; 60 * 40 * 3]).unwrap();
        let bounds = |&[xmin, ymin, xmax, ymax]: &[f32; 4]| PixelBox { xmin, ymin, xmax, ymax };
        number_boxes(&mut picture, &boxes.iter().map(bounds).collect::<Vec<_>>());
        picture
    }

    fn pixel(picture: &Picture, x: usize, y: usize) -> [u8; 3] {
        let at = 3 * (y * picture.width() as usize + x);
        [0, 1, 2].map(|channel| picture.rgb()[at + channel])
    }

    #[test]
    fn a_box_has_an_edge_and_a_number() {
        let picture = drawn(&[[10.0, 5.0, 50.0, 35.0]]);
        for (x, y, expected) in [
            (49, 20, colour(0)), // its right edge,
            (30, 34, colour(0)), // its lower edge,
            (47, 20, WHITE),     // white inside
            (50, 20, WHITE),     // and outside,
            (40, 20, [128; 3]),  // nothing further in
            (52, 20, [128; 3]),  // or out,
            (10, 5, colour(0)),  // the plate of the number,
            (14, 7, WHITE),      // the 1's upper end.
        ] {
            assert_eq!(pixel(&picture, x, y), expected, "{x}, {y}");
        }
    }

    #[test]
    fn the_hottest_pixel_is_the_lightest() {
        let mut picture = Picture::from_rgb(4, 1, [[200, 0, 0]; 4].concat()).unwrap();
        heat(&mut picture, &[-1.0, 0.1, 0.5, 1.0]);
        let light = |x| pixel(&picture, x, 0).iter().map(|&byte| u32::from(byte)).sum::<u32>();
        assert!(light(0) < light(1) && light(1) < light(2) && light(2) < light(3), "{:?}", picture.rgb());
        assert_eq!(pixel(&picture, 0, 0), [100, 0, 2]);
        let mut cold = Picture::from_rgb(1, 1, vec![200, 0, 0]).unwrap();
        heat(&mut cold, &[0.0]);
        assert_eq!(pixel(&cold, 0, 0), [100, 0, 2]);
    }

    #[test]
    fn pictures_are_put_side_by_side() {
        let one = |colour| Picture::blank(4, 3, [colour; 3]);
        let all = tiles(&[one(1), one(2), one(3)], 2).unwrap();
        assert_eq!((all.width(), all.height()), (16, 14));
        for (x, y, expected) in [(0, 0, 1), (15, 2, 2), (3, 11, 3), (4, 0, 255), (15, 13, 255)] {
            assert_eq!(pixel(&all, x, y), [expected; 3], "{x}, {y}");
        }
        assert!(tiles(&[], 2).is_none());
        number_point(&mut one(0), 11, &PixelBox { xmin: -1.0, ymin: 0.0, xmax: 9.0, ymax: 2.0 }, [f32::NAN, 50.0]);
    }

    #[test]
    fn boxes_may_reach_outside_or_be_empty() {
        let boxes = [[-10.0, -10.0, 500.0, 500.0], [59.9, 39.9, 60.0, 40.0], [3.0, 3.0, 3.0, 3.0]];
        drawn(&boxes);
        drawn(&[[0.0; 4]; 120]);
    }
}
