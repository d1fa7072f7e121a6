//! The built-in synthetic world: pictures of coloured shapes about which everything is known.
//!
//! A [`Scene`] is a few objects on a background. From it follow, with nothing left to chance but
//! the wording, the picture ([`Scene::render`]) and texts of every grain: captions of the whole,
//! descriptions of parts, phrases that single out one object, questions with answers, statements
//! about two pictures that are true or false, and phrases with a blank. [`write()`] makes files of
//! them in the formats of [`crate::records`] and [`crate::annotations`]; [`check_caption`] judges a
//! caption that a model wrote.
//!
//! Eight pairs of a colour and a shape ([`HELD_OUT`]) never occur in [`Split::Seen`]: in
//! [`Split::Unseen`] they tell whether a model composes what it knows.
//!
//! Everything is a function of (seed, index, split), on every machine.

mod check;
mod draw;
mod fill;
mod grammar;
mod nlvr;
mod questions;
mod words;
mod write;

use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub use check::{CaptionCheck, Mention, check_caption};
pub use fill::Fill;
pub use grammar::{Expression, ExpressionKind, Noun, Phrase};
pub use nlvr::{Statement, statements};
pub use questions::{Question, answers};
pub use words::{Colour, Pattern, Place, Relation, Shape, Size, Texture, Tint, vocabulary};
pub use write::{SynthOptions, read_scenes, write};

/// Width and height of a picture in pixels.
pub const SIDE: usize = 192;

/// Pairs that never occur in [`Split::Seen`]; each colour and each shape once.
pub const HELD_OUT: [(Colour, Shape); 8] = [
    (Colour::Red, Shape::Star),
    (Colour::Orange, Shape::Heart),
    (Colour::Yellow, Shape::Cross),
    (Colour::Green, Shape::Circle),
    (Colour::Blue, Shape::Triangle),
    (Colour::Purple, Shape::Square),
    (Colour::Pink, Shape::Ring),
    (Colour::Black, Shape::Crescent),
];

/// Centres this far apart along an axis, in pixels, may be told to be left of, above, …
const CLEAR: f32 = 24.0;
/// … if they are this many times as far apart along it as along the other axis.
const DOMINANT: f32 = 1.4;
/// Centres at least this far on the other side deny a relation.
const DENIED: f32 = 12.0;
/// What superlatives and ordinals of position need between neighbours, in pixels.
const MARGIN: f32 = 14.0;
/// The share of each object that must be visible.
const VISIBLE: f32 = 0.75;

/// What is behind the objects: pale, so that it cannot be taken for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Background {
    /// Its colour.
    pub colour: Tint,
    /// Its pattern.
    pub pattern: Pattern,
}

/// One object.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Object {
    /// What it is.
    pub shape: Shape,
    /// Its colour.
    pub colour: Colour,
    /// Its size class; the longer side of the box is 34–40, 48–56 or 66–76 pixels.
    pub size: Size,
    /// What it is filled with.
    pub texture: Texture,
    /// `(x, y, w, h)` in pixels: its full extent, also where another object covers it.
    pub bbox: [f32; 4],
}

/// A picture as what is in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scene {
    /// The index it was generated with.
    pub id: u64,
    /// What is behind the objects.
    pub background: Background,
    /// The objects in the order they are drawn: later ones cover earlier ones.
    pub objects: Vec<Object>,
}

/// Which pairs of colour and shape occur.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// All pairs but [`HELD_OUT`].
    Seen,
    /// All pairs, and in each scene two objects of [`HELD_OUT`].
    Unseen,
}

impl Object {
    /// The middle of its box.
    #[must_use]
    pub fn centre(&self) -> [f32; 2] {
        let [x, y, width, height] = self.bbox;
        [x + width / 2.0, y + height / 2.0]
    }

    /// Whether its colour and shape are one of [`HELD_OUT`].
    #[must_use]
    pub fn is_held_out(&self) -> bool {
        HELD_OUT.contains(&(self.colour, self.shape))
    }
}

impl Relation {
    /// How far `a`'s centre lies from `b`'s in this direction, and how far along the other axis.
    fn offset(self, a: &Object, b: &Object) -> (f32, f32) {
        let ([ax, ay], [bx, by]) = (a.centre(), b.centre());
        let (dx, dy) = (bx - ax, by - ay);
        match self {
            Self::Left => (dx, dy.abs()),
            Self::Right => (-dx, dy.abs()),
            Self::Above => (dy, dx.abs()),
            Self::Below => (-dy, dx.abs()),
        }
    }

    /// Whether nobody would doubt that `a` is there, seen from `b`.
    #[must_use]
    pub fn is_clear(self, a: &Object, b: &Object) -> bool {
        let (along, across) = self.offset(a, b);
        along >= CLEAR && along >= DOMINANT * across
    }

    /// Whether nobody would say that `a` is there, seen from `b`.
    #[must_use]
    pub fn is_denied(self, a: &Object, b: &Object) -> bool {
        self.offset(a, b).0 <= -DENIED
    }

    /// The relation that is clear between two objects.
    #[must_use]
    pub fn between(a: &Object, b: &Object) -> Option<Self> {
        Self::ALL.iter().copied().find(|relation| relation.is_clear(a, b))
    }

    /// The same seen from the other object.
    #[must_use]
    pub fn inverse(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
            Self::Above => Self::Below,
            Self::Below => Self::Above,
        }
    }
}

/// The generator for one purpose (`stream` 0 to 3) of one scene.
fn generator(seed: u64, index: u64, split: Split, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let split = u64::from(split == Split::Unseen);
    rng.set_stream(index.wrapping_mul(8) + 4 * split + stream);
    rng
}

impl Scene {
    /// The scene of an index: three to five objects, in about half of the scenes with shapes or
    /// colours in common.
    #[must_use]
    pub fn generate(seed: u64, index: u64, split: Split) -> Self {
        let mut rng = generator(seed, index, split, 0);
        // About two thirds of the attempts succeed.
        loop {
            let objects = place(objects(split, &mut rng), &mut rng);
            if let Some(objects) = objects.filter(|objects| is_fair(objects)) {
                let (colour, pattern) = (words::any(Tint::ALL, &mut rng), words::any(Pattern::ALL, &mut rng));
                return Self { id: index, background: Background { colour, pattern }, objects };
            }
        }
    }

    /// The objects in the order of their salience: larger sizes first, then from left to right.
    #[must_use]
    pub fn salient(&self) -> Vec<&Object> {
        salient(&self.objects)
    }
}

fn salient(objects: &[Object]) -> Vec<&Object> {
    let mut sorted: Vec<&Object> = objects.iter().collect();
    sorted.sort_by(|a, b| {
        let from_left = a.centre()[0].total_cmp(&b.centre()[0]);
        b.size.cmp(&a.size).then(from_left)
    });
    sorted
}

/// Whether everything is visible enough, and it is clear which two objects stand out and how they lie.
fn is_fair(objects: &[Object]) -> bool {
    let [first, second, rest @ ..] = &salient(objects)[..] else {
        return false;
    };
    let tie = |a: &Object, b: &Object| a.size == b.size && (a.centre()[0] - b.centre()[0]).abs() < MARGIN;
    Relation::between(first, second).is_some()
        && !tie(first, second)
        && !rest.first().is_some_and(|third| tie(second, third))
        && (0..objects.len()).all(|i| visible(objects, i) >= VISIBLE)
}

/// The share of an object's pixels that no later object covers.
fn visible(objects: &[Object], index: usize) -> f32 {
    let (object, later) = (&objects[index], &objects[index + 1..]);
    let over: Vec<&Object> = later.iter().filter(|other| overlap(object, other) > 0.0).collect();
    if over.is_empty() {
        return 1.0;
    }
    let inside = object.pixels().filter(|&(x, y)| object.distance(x, y) < 0.0);
    let (mut all, mut seen) = (0u32, 0u32);
    for (x, y) in inside {
        all += 1;
        seen += u32::from(over.iter().all(|other| other.distance(x, y) >= 0.5));
    }
    seen as f32 / all.max(1) as f32
}

/// The area that the boxes of two objects share.
fn overlap(a: &Object, b: &Object) -> f32 {
    let along = |i: usize| {
        let end = (a.bbox[i] + a.bbox[i + 2]).min(b.bbox[i] + b.bbox[i + 2]);
        (end - a.bbox[i].max(b.bbox[i])).max(0.0)
    };
    along(0) * along(1)
}

/// Objects that have no place yet; some share their shape or their colour.
fn objects(split: Split, rng: &mut ChaCha8Rng) -> Vec<Object> {
    let count = rng.random_range(3..=5);
    let (mut shapes, mut colours) = (Shape::ALL.to_vec(), Colour::ALL.to_vec());
    shapes.shuffle(rng);
    colours.shuffle(rng);
    // Distractors: few shapes or few colours for all objects.
    match rng.random_range(0..8) {
        0 | 1 => shapes.truncate(2),
        2 | 3 => colours.truncate(2),
        4 => (shapes.truncate(3), colours.truncate(3)).1,
        _ => {}
    }
    let twins = rng.random_bool(0.12);
    let mut held_out = HELD_OUT.to_vec();
    held_out.shuffle(rng);
    held_out.truncate(if split == Split::Unseen { 2 } else { 0 });

    let mut objects: Vec<Object> = Vec::with_capacity(count);
    for i in 0..count {
        let (colour, shape) = match held_out.get(i) {
            Some(&pair) => pair,
            None if twins && i == count - 1 => (objects[i - 1].colour, objects[i - 1].shape),
            None => other_pair(&objects, &colours, &shapes, split, rng),
        };
        let size = match rng.random_range(0..10) {
            0..4 => Size::Small,
            4..7 => Size::Medium,
            _ => Size::Large,
        };
        let texture =
            *[Texture::Solid, Texture::Solid, Texture::Striped, Texture::Dotted].choose(rng).unwrap_or(&Texture::Solid);
        let side = match size {
            Size::Small => rng.random_range(34..=40u8),
            Size::Medium => rng.random_range(48..=56u8),
            Size::Large => rng.random_range(66..=76u8),
        };
        let [width, height] = draw::dimensions(shape, f32::from(side));
        objects.push(Object { shape, colour, size, texture, bbox: [0.0, 0.0, width, height] });
    }
    objects.shuffle(rng);
    objects
}

/// A pair that no object has yet, of the wanted colours and shapes if they suffice.
fn other_pair(
    objects: &[Object],
    colours: &[Colour],
    shapes: &[Shape],
    split: Split,
    rng: &mut ChaCha8Rng,
) -> (Colour, Shape) {
    const TRIES: usize = 40;
    for attempt in 0.. {
        let wanted = attempt < TRIES;
        let colour = colours.choose(rng).copied().filter(|_| wanted);
        let shape = shapes.choose(rng).copied().filter(|_| wanted);
        let pair = (
            colour.unwrap_or_else(|| words::any(Colour::ALL, rng)),
            shape.unwrap_or_else(|| words::any(Shape::ALL, rng)),
        );
        let taken = objects.iter().any(|object| (object.colour, object.shape) == pair);
        if !taken && (split == Split::Unseen || !HELD_OUT.contains(&pair)) {
            return pair;
        }
    }
    unreachable!("the loop above has no end")
}

/// Finds a place for each object; boxes overlap little.
fn place(mut objects: Vec<Object>, rng: &mut ChaCha8Rng) -> Option<Vec<Object>> {
    const TRIES: usize = 60;
    /// The largest share of the smaller box that another box may cover.
    const OVERLAP: f32 = 0.3;
    let area = |object: &Object| object.bbox[2] * object.bbox[3];
    for i in 0..objects.len() {
        let fits = (0..TRIES).any(|_| {
            let [_, _, width, height] = objects[i].bbox;
            objects[i].bbox[0] = rng.random_range(0..=SIDE as u32 - width as u32) as f32;
            objects[i].bbox[1] = rng.random_range(0..=SIDE as u32 - height as u32) as f32;
            let object = &objects[i];
            objects[..i].iter().all(|other| overlap(object, other) <= OVERLAP * area(object).min(area(other)))
        });
        if !fits {
            return None;
        }
    }
    Some(objects)
}
