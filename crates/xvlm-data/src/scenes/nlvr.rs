//! Statements about two pictures, true or false.

use rand::Rng;
use rand::seq::IndexedRandom;

use super::words::{NUMBERS, a, any, fill, frames};
use super::{Colour, HELD_OUT, Noun, Object, Scene, Shape};

/// A sentence about a left and a right picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// The sentence.
    pub sentence: String,
    /// Whether it is true.
    pub label: bool,
}

/// What a sentence says; sides count from 0, the left.
#[derive(Debug, Clone, Copy)]
enum Claim {
    Has(usize, Noun),
    Lacks(usize, Noun),
    Both(Noun),
    Either(Noun),
    One(Noun),
    Neither(Noun),
    Total(usize, Noun),
    MoreOn(usize, Noun),
    Exactly(usize, usize, Noun),
}

const KINDS: usize = 9;

impl Claim {
    fn holds(self, scenes: [&Scene; 2]) -> bool {
        let count = |noun| scenes.map(|scene| scene.count(noun));
        match self {
            Self::Has(side, noun) => count(noun)[side] > 0,
            Self::Lacks(side, noun) => count(noun)[side] == 0,
            Self::Both(noun) => count(noun).iter().all(|&n| n > 0),
            Self::Either(noun) => count(noun).iter().any(|&n| n > 0),
            Self::One(noun) => count(noun).iter().filter(|&&n| n > 0).count() == 1,
            Self::Neither(noun) => count(noun) == [0, 0],
            Self::Total(total, noun) => count(noun).iter().sum::<usize>() == total,
            Self::MoreOn(side, noun) => count(noun)[side] > count(noun)[1 - side],
            Self::Exactly(side, number, noun) => count(noun)[side] == number,
        }
    }

    fn say(self, rng: &mut impl Rng) -> String {
        let side = |side: usize| if side == 0 { "left" } else { "right" };
        let number = |n: usize| NUMBERS.get(n).copied().unwrap_or_default();
        let (frames, noun, i, n) = match self {
            Self::Has(i, noun) => (frames::SIDE_HAS, noun, i, 0),
            Self::Lacks(i, noun) => (frames::SIDE_LACKS, noun, i, 0),
            Self::Both(noun) => (frames::BOTH, noun, 0, 0),
            Self::Either(noun) => (frames::EITHER, noun, 0, 0),
            Self::One(noun) => (frames::ONE, noun, 0, 0),
            Self::Neither(noun) => (frames::NEITHER, noun, 0, 0),
            Self::Total(n, noun) => (frames::TOTAL, noun, 0, n),
            Self::MoreOn(i, noun) => (frames::MORE_ON, noun, i, 0),
            Self::Exactly(i, n, noun) => (frames::SIDE_COUNT, noun, i, n),
        };
        let (one, many) = (noun.say(rng), noun.plural(rng));
        let values = [
            ("a", a(&one)),
            ("z", one),
            ("m", many),
            ("i", side(i).to_owned()),
            ("j", side(1 - i).to_owned()),
            ("n", number(n).to_owned()),
        ];
        let values = values.each_ref().map(|(name, value)| (*name, value.as_str()));
        fill(frames, &values, rng)
    }
}

/// `count` statements about two scenes; true and false are equally likely for each kind.
pub fn statements(left: &Scene, right: &Scene, count: usize, rng: &mut impl Rng) -> Vec<Statement> {
    const TRIES: usize = 200;
    let scenes = [left, right];
    let wanted = (0..count).map(|_| (rng.random_range(0..KINDS), rng.random_bool(0.5)));
    let wanted: Vec<(usize, bool)> = wanted.collect();
    let statement = |(kind, label)| {
        let claims = (0..TRIES).filter_map(|_| claim(kind, scenes, rng));
        let mut claims = claims.filter(|claim| claim.holds(scenes) == label);
        let claim = claims.next();
        drop(claims);
        Some(Statement { sentence: claim?.say(rng), label })
    };
    wanted.into_iter().filter_map(statement).collect()
}

/// A claim of a kind, true or not.
fn claim(kind: usize, scenes: [&Scene; 2], rng: &mut impl Rng) -> Option<Claim> {
    let noun = noun(scenes, rng)?;
    // Of each kind of thing there are two or more to count.
    let group = Noun { colour: noun.colour.filter(|_| noun.shape.is_none()), ..noun };
    let side = rng.random_range(0..2);
    Some(match kind {
        0 => Claim::Has(side, noun),
        1 => Claim::Lacks(side, noun),
        2 => Claim::Both(noun),
        3 => Claim::Either(noun),
        4 => Claim::One(noun),
        5 => Claim::Neither(noun),
        6 => Claim::Total(rng.random_range(2..=5), group),
        7 => Claim::MoreOn(side, group),
        _ => Claim::Exactly(side, rng.random_range(2..=3), group),
    })
}

/// Something that may be in the pictures: a colour, a shape or both.
fn noun(scenes: [&Scene; 2], rng: &mut impl Rng) -> Option<Noun> {
    let objects: Vec<&Object> = scenes.iter().flat_map(|scene| &scene.objects).collect();
    let (one, two) = (objects.choose(rng)?, objects.choose(rng)?);
    let colour = if rng.random_bool(0.85) { one.colour } else { any(Colour::ALL, rng) };
    // Half of the time colour and shape of one object.
    let shape = if rng.random_bool(0.5) { one.shape } else { two.shape };
    let shape = if rng.random_bool(0.85) { shape } else { any(Shape::ALL, rng) };
    // As for questions: pairs that never occur are not talked about.
    let known = !HELD_OUT.contains(&(colour, shape)) || objects.iter().any(|o| o.is_held_out());
    let keep = rng.random_range(0..5);
    Some(Noun {
        colour: Some(colour).filter(|_| keep != 0),
        shape: Some(shape).filter(|_| keep != 1),
        ..Noun::default()
    })
    .filter(|_| known)
}
