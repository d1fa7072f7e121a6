//! From a scene to pixels.
//!
//! A shape is the set where a distance function is negative, so one evaluation a pixel gives its
//! anti-aliased edge and its outline. Functions after Inigo Quilez, "2D distance functions".

use super::{Colour, Object, Pattern, SIDE, Scene, Shape, Texture, Tint};

type Rgb = [f32; 3];

/// Width of the darker outline in pixels.
const OUTLINE: f32 = 1.5;
/// Distance of stripes and of dots in pixels: they survive scaling from 192 to 128 pixels.
const STRIPE_PERIOD: f32 = 12.0;
const DOT_PERIOD: f32 = 12.0;

const fn rgb(colour: Colour) -> Rgb {
    match colour {
        Colour::Red => [214.0, 24.0, 32.0],
        Colour::Orange => [250.0, 132.0, 8.0],
        Colour::Yellow => [246.0, 214.0, 0.0],
        Colour::Green => [20.0, 150.0, 54.0],
        Colour::Blue => [28.0, 76.0, 226.0],
        Colour::Purple => [122.0, 34.0, 168.0],
        Colour::Pink => [252.0, 98.0, 184.0],
        Colour::Black => [26.0, 26.0, 30.0],
    }
}

const fn tint(tint: Tint) -> Rgb {
    match tint {
        Tint::White => [252.0, 252.0, 252.0],
        Tint::Grey => [194.0, 196.0, 200.0],
        Tint::Beige => [238.0, 222.0, 190.0],
        Tint::Mint => [196.0, 238.0, 214.0],
        Tint::Lavender => [220.0, 210.0, 248.0],
    }
}

/// Corners of the star: outer radius 1, inner radius 0.45.
const STAR: [[f32; 2]; 10] = [
    [0.0, -1.0],
    [0.264_503, -0.364_058],
    [0.951_057, -0.309_017],
    [0.427_975, 0.139_058],
    [0.587_785, 0.809_017],
    [0.0, 0.45],
    [-0.587_785, 0.809_017],
    [-0.427_975, 0.139_058],
    [-0.951_057, -0.309_017],
    [-0.264_503, -0.364_058],
];
const TRIANGLE: [[f32; 2]; 3] = [[0.0, -0.9], [1.0, 0.9], [-1.0, 0.9]];

/// The box of a shape in its own coordinates, y downwards: `[left, top, right, bottom]`.
const fn extent(shape: Shape) -> [f32; 4] {
    match shape {
        Shape::Triangle => [-1.0, -0.9, 1.0, 0.9],
        Shape::Star => [-0.951_057, -1.0, 0.951_057, 0.809_017],
        Shape::Heart => [-0.603_553, -1.103_553, 0.603_553, 0.0],
        // The horns: where the circles of radius 1 and 0.75, 0.55 apart, meet.
        Shape::Crescent => [-1.0, -1.0, 0.672_727, 1.0],
        _ => [-1.0, -1.0, 1.0, 1.0],
    }
}

/// Width and height of a shape whose longer side is `side` pixels, in whole pixels.
pub(super) fn dimensions(shape: Shape, side: f32) -> [f32; 2] {
    let [left, top, right, bottom] = extent(shape);
    let (width, height) = (right - left, bottom - top);
    let scale = side / width.max(height);
    [(width * scale).round(), (height * scale).round()]
}

fn polygon(corners: &[[f32; 2]], x: f32, y: f32) -> f32 {
    let (mut square, mut sign) = (f32::INFINITY, 1.0);
    let mut before = corners[corners.len() - 1];
    for &corner in corners {
        let (ex, ey) = (before[0] - corner[0], before[1] - corner[1]);
        let (wx, wy) = (x - corner[0], y - corner[1]);
        let along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0.0, 1.0);
        let (bx, by) = (wx - ex * along, wy - ey * along);
        square = square.min(bx * bx + by * by);
        let sides = [y >= corner[1], y < before[1], ex * wy > ey * wx];
        if sides == [true; 3] || sides == [false; 3] {
            sign = -sign;
        }
        before = corner;
    }
    sign * square.sqrt()
}

/// Distance to the shape's edge in its own coordinates, negative inside.
fn distance(shape: Shape, x: f32, y: f32) -> f32 {
    let radius = |x: f32, y: f32| (x * x + y * y).sqrt();
    match shape {
        Shape::Circle => radius(x, y) - 1.0,
        Shape::Square => x.abs().max(y.abs()) - 1.0,
        Shape::Triangle => polygon(&TRIANGLE, x, y),
        Shape::Star => polygon(&STAR, x, y),
        Shape::Heart => {
            let (x, y) = (x.abs(), -y);
            if x + y > 1.0 {
                radius(x - 0.25, y - 0.75) - 0.353_553
            } else {
                let middle = 0.5 * (x + y).max(0.0);
                let edge = radius(x, y - 1.0).min(radius(x - middle, y - middle));
                if x > y { edge } else { -edge }
            }
        }
        Shape::Cross => {
            let (x, y) = (x.abs(), y.abs());
            (x - 1.0).max(y - 0.36).min((x - 0.36).max(y - 1.0))
        }
        Shape::Ring => {
            let radius = radius(x, y);
            (radius - 1.0).max(0.5 - radius)
        }
        Shape::Crescent => (radius(x, y) - 1.0).max(0.75 - radius(x - 0.55, y)),
    }
}

impl Object {
    /// Distance in pixels from the middle of a pixel to the object's edge, negative inside.
    pub(super) fn distance(&self, x: usize, y: usize) -> f32 {
        let [left, top, right, bottom] = extent(self.shape);
        let [bx, by, width, height] = self.bbox;
        let (sx, sy) = (width / (right - left), height / (bottom - top));
        let at = |pixel: usize, from: f32, scale: f32| (pixel as f32 + 0.5 - from) / scale;
        distance(self.shape, left + at(x, bx, sx), top + at(y, by, sy)) * sx.min(sy)
    }

    /// The pixels of its box that are inside the picture, row by row.
    pub(super) fn pixels(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let [x, y, width, height] = self.bbox;
        // Float to integer saturates, so boxes read from a file cannot lead outside either.
        let range = |from: f32, size: f32| from as usize..((from + size).ceil() as usize).min(SIDE);
        let (columns, rows) = (range(x, width), range(y, height));
        rows.flat_map(move |y| columns.clone().map(move |x| (x, y)))
    }

    /// What the object looks like at a pixel, its edge aside.
    fn ink(&self, x: usize, y: usize) -> Rgb {
        let [bx, by, width, height] = self.bbox;
        let (x, y) = (x as f32 + 0.5 - bx - width / 2.0, y as f32 + 0.5 - by - height / 2.0);
        let light = match self.texture {
            Texture::Solid => 0.0,
            Texture::Striped => {
                let across = (x + y) * std::f32::consts::FRAC_1_SQRT_2;
                let phase = (across + STRIPE_PERIOD / 4.0).rem_euclid(STRIPE_PERIOD);
                2.7 - (phase - STRIPE_PERIOD / 2.0).abs() + 0.5
            }
            Texture::Dotted => {
                let row = (y / DOT_PERIOD).round();
                let shift = if row.rem_euclid(2.0) == 0.0 { 0.0 } else { DOT_PERIOD / 2.0 };
                let dx = (x + shift + DOT_PERIOD / 2.0).rem_euclid(DOT_PERIOD) - DOT_PERIOD / 2.0;
                let dy = y - row * DOT_PERIOD;
                3.4 - (dx * dx + dy * dy).sqrt() + 0.5
            }
        };
        mix(rgb(self.colour), [255.0; 3], 0.9 * light.clamp(0.0, 1.0))
    }
}

fn mix(from: Rgb, to: Rgb, share: f32) -> Rgb {
    std::array::from_fn(|i| from[i] + (to[i] - from[i]) * share)
}

impl Scene {
    /// The picture: RGB, `[SIDE][SIDE][3]`; later objects cover earlier ones.
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        let base = tint(self.background.colour);
        let shade = |x: usize, y: usize| match self.background.pattern {
            Pattern::Plain => 1.0,
            Pattern::Gradient => 1.0 - 0.16 * y as f32 / SIDE as f32,
            Pattern::Checks => 1.0 - 0.07 * ((x / 24 + y / 24) % 2) as f32,
            Pattern::Lines => 1.0 - 0.14 * f32::from(u8::from(y % 16 < 2)),
        };
        let byte = |value: f32| (value + 0.5) as u8;
        let mut pixels = Vec::with_capacity(SIDE * SIDE * 3);
        for y in 0..SIDE {
            for x in 0..SIDE {
                let shade = shade(x, y);
                pixels.extend(base.map(|value| byte(value * shade)));
            }
        }
        for object in &self.objects {
            for (x, y) in object.pixels() {
                let distance = object.distance(x, y);
                let coverage = (0.5 - distance).clamp(0.0, 1.0);
                if coverage > 0.0 {
                    let outline = (distance + OUTLINE + 0.5).clamp(0.0, 1.0);
                    let dark = rgb(object.colour).map(|value| value * 0.6);
                    let ink = mix(object.ink(x, y), dark, outline);
                    let pixel = &mut pixels[(y * SIDE + x) * 3..][..3];
                    for (value, ink) in pixel.iter_mut().zip(ink) {
                        let under = f32::from(*value);
                        *value = byte(under + (ink - under) * coverage);
                    }
                }
            }
        }
        pixels
    }
}
