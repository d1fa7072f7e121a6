//! Numbered boxes in a picture.

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
    // One unit is a pixel of a digit: legible, whatever the size of the picture.
    let unit = i64::from((picture.width().min(picture.height()) / 250).max(1));
    for (index, bounds) in boxes.iter().enumerate() {
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
    // Numbers last: no line crosses them.
    for (index, bounds) in boxes.iter().enumerate() {
        let digits: Vec<usize> = (index + 1).to_string().bytes().map(|byte| usize::from(byte - b'0')).collect();
        let (width, height) = ((6 * digits.len() as i64 + 3) * unit, 11 * unit);
        let x = (bounds.xmin.round() as i64).min(i64::from(picture.width()) - width).max(0);
        let y = (bounds.ymin.round() as i64).min(i64::from(picture.height()) - height).max(0);
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
    fn boxes_may_reach_outside_or_be_empty() {
        let boxes = [[-10.0, -10.0, 500.0, 500.0], [59.9, 39.9, 60.0, 40.0], [3.0, 3.0, 3.0, 3.0]];
        drawn(&boxes);
        drawn(&[[0.0; 4]; 120]);
    }
}
