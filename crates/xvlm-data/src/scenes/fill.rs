//! Phrases with a blank that the picture decides.

use rand::Rng;

use super::words::{MANY, NUMBERS, fill, frames, plural, say};
use super::{Noun, Object, Phrase, Relation, Scene, Shape};

/// A text with one blank, `___`, for a single word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fill {
    /// The text.
    pub text: String,
    /// Every single word that fits; the canonical one comes first.
    pub answers: Vec<String>,
    /// What the blank asks for: `colour`, `shape`, `texture`, `size`, `relation` or `count`.
    pub kind: &'static str,
}

/// The words among them that are single.
fn single(words: &[&str]) -> Vec<String> {
    words.iter().filter(|word| !word.contains(' ')).map(|&word| word.to_owned()).collect()
}

/// A noun phrase whose words stand in the order size, texture, colour, shape, each a single word, so
/// that what belongs into a blank among them is beyond doubt.
fn phrase(object: &Object, blank: &str, rng: &mut impl Rng) -> String {
    let mut word = |name: &str, words: &[&str]| {
        let words: Vec<&str> = words.iter().copied().filter(|word| !word.contains(' ')).collect();
        if name == blank { "___" } else { words[usize::from(rng.random_bool(0.15)) % words.len()] }.to_owned()
    };
    let words = [
        word("size", object.size.words()),
        word("texture", object.texture.words()),
        word("colour", object.colour.words()),
        word("shape", object.shape.words()),
    ];
    format!("a {}", words.join(" "))
}

impl Scene {
    /// Phrases with a blank, of every kind that the scene allows.
    pub fn fill_phrases(&self, rng: &mut impl Rng) -> Vec<Fill> {
        let mut fills: Vec<Fill> = ["colour", "shape", "texture", "size"]
            .into_iter()
            .filter_map(|kind| self.fill_attribute(kind, rng))
            .collect();
        fills.extend(self.fill_relation(rng));
        fills.extend(self.fill_count(rng));
        fills
    }

    /// “a small striped ___ star left of a large solid blue circle”: the rest tells which object.
    fn fill_attribute(&self, kind: &'static str, rng: &mut impl Rng) -> Option<Fill> {
        const TRIES: usize = 16;
        let (keep, words): (u8, fn(&Object) -> &'static [&'static str]) = match kind {
            "colour" => (0b1101, |object| object.colour.words()),
            "shape" => (0b1110, |object| object.shape.words()),
            "texture" => (0b0111, |object| object.texture.words()),
            _ => (0b1011, |object| object.size.words()),
        };
        (0..TRIES).find_map(|_| {
            let (object, relation, anchor) = self.pair(rng)?;
            let rest = Phrase::Noun(Noun::some_of(object, keep)).selects(self);
            rest.filter(|&found| std::ptr::eq(&self.objects[found], object))?;
            let (one, two) = (phrase(object, kind, rng), phrase(anchor, "", rng));
            let values = [("a", one.as_str()), ("b", &two), ("r", say(relation.words(), rng))];
            let text = fill(frames::RELATION, &values, rng);
            Some(Fill { text, answers: single(words(object)), kind })
        })
    }

    /// “a red star is to the ___ of a blue circle”, “a red star ___ a blue circle”
    fn fill_relation(&self, rng: &mut impl Rng) -> Option<Fill> {
        let (object, relation, anchor) = self.pair(rng)?;
        let named = |object: &Object| self.count(Noun::label(object)) == 1;
        if !named(object) || !named(anchor) {
            return None;
        }
        let label = |object: &Object| super::words::a(&format!("{} {}", object.colour.word(), object.shape.word()));
        let (frames, answers) = match relation {
            Relation::Left | Relation::Right => (frames::FILL_SIDE, vec![relation.end().to_owned()]),
            _ => (frames::FILL_HEIGHT, single(relation.words())),
        };
        let text = fill(frames, &[("a", &label(object)), ("b", &label(anchor))], rng);
        Some(Fill { text, answers, kind: "relation" })
    }

    /// “there are ___ shapes”
    fn fill_count(&self, rng: &mut impl Rng) -> Option<Fill> {
        let several = |&shape: &Shape| self.count(Noun { shape: Some(shape), ..Noun::default() }) > 1;
        let group = Shape::ALL.iter().copied().find(several).filter(|_| rng.random_bool(0.5));
        let (many, count) = match group {
            Some(shape) => (plural(shape), self.count(Noun { shape: Some(shape), ..Noun::default() })),
            None => (say(MANY, rng).to_owned(), self.objects.len()),
        };
        let text = fill(frames::FILL_COUNT, &[("m", &many)], rng);
        let answer = NUMBERS.get(count).filter(|_| count > 1)?;
        Some(Fill { text, answers: vec![(*answer).to_owned()], kind: "count" })
    }
}
