//! Questions about a scene and their answers.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

use super::words::{GROUNDS, NUMBERS, a, any, fill, frames, say, the};
use super::{Colour, HELD_OUT, Noun, Object, Phrase, Place, Relation, Scene, Shape, Size, Texture, Tint};

/// A question and its one answer, of one or two words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The question.
    pub question: String,
    /// The answer.
    pub answer: String,
    /// What is asked for, such as `count`.
    pub kind: &'static str,
}

/// Every answer that a question may have, sorted.
#[must_use]
pub fn answers() -> Vec<String> {
    let mut answers: Vec<String> = vec!["yes".to_owned(), "no".to_owned()];
    let mut extend = |words: Vec<&str>| answers.extend(words.into_iter().map(str::to_owned));
    extend(NUMBERS[..=5].to_vec());
    extend(Shape::ALL.iter().map(|shape| shape.word()).collect());
    extend(Colour::ALL.iter().map(|colour| colour.word()).collect());
    extend(Size::ALL.iter().map(|size| size.word()).collect());
    extend(Texture::ALL.iter().map(|texture| texture.word()).collect());
    extend(Tint::ALL.iter().map(|tint| tint.word()).collect());
    extend(Place::ALL.iter().map(|place| place.word()).collect());
    for colour in Colour::ALL {
        answers.extend(Shape::ALL.iter().map(|shape| format!("{} {}", colour.word(), shape.word())));
    }
    answers.sort_unstable();
    answers.dedup();
    answers
}

/// Tries before a question of a kind is given up.
const TRIES: usize = 24;

impl Scene {
    /// How many objects a noun is true of.
    #[must_use]
    pub fn count(&self, noun: Noun) -> usize {
        self.objects.iter().filter(|object| noun.fits(object)).count()
    }

    /// Colour and shape of no object of the scene, mostly those of two of its objects.
    pub(super) fn absent(&self, rng: &mut impl Rng) -> Option<Noun> {
        // Where no held-out pair occurs, none is asked for: the answer would always be no.
        let held_out = self.objects.iter().any(Object::is_held_out);
        (0..TRIES).find_map(|_| {
            let (one, two) = (self.objects.choose(rng)?, self.objects.choose(rng)?);
            let near = rng.random_bool(0.7);
            let colour = if near { one.colour } else { any(Colour::ALL, rng) };
            let shape = if near { two.shape } else { any(Shape::ALL, rng) };
            let noun = Noun { colour: Some(colour), shape: Some(shape), ..Noun::default() };
            let fine = held_out || !HELD_OUT.contains(&(colour, shape));
            (fine && self.count(noun) == 0).then_some(noun)
        })
    }

    /// Questions of every kind that the scene allows, at most one a kind but two for existence and
    /// for counts; yes and no are equally likely.
    pub fn questions(&self, rng: &mut impl Rng) -> Vec<Question> {
        let ask = Ask(self);
        let mut questions: Vec<Question> = [
            ask.exists(rng),
            ask.exists(rng),
            ask.count(rng),
            ask.count(rng),
            ask.attribute("colour", frames::COLOUR, 0b1101, |o| o.colour.word(), rng),
            ask.attribute("shape", frames::SHAPE, 0b1110, |o| o.shape.word(), rng),
            ask.attribute("size", frames::SIZE, 0b1011, |o| o.size.word(), rng),
            ask.attribute("texture", frames::TEXTURE, 0b0111, |o| o.texture.word(), rng),
            ask.is_textured(rng),
            ask.place(rng),
            ask.related(rng),
            ask.is_related(rng),
            ask.compare(rng),
            ask.which(rng),
            ask.same_colour(rng),
            ask.ground(rng),
        ]
        .into_iter()
        .flatten()
        .collect();
        questions.shuffle(rng);
        questions.dedup_by(|a, b| a.question == b.question);
        questions
    }
}

/// One function a kind of question.
struct Ask<'a>(&'a Scene);

fn question(kind: &'static str, question: String, answer: impl Into<String>) -> Option<Question> {
    Some(Question { question, answer: answer.into(), kind })
}

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

impl Ask<'_> {
    /// An object and a phrase for it that uses the allowed facts only.
    fn someone(&self, allowed: u8, rng: &mut impl Rng) -> Option<(usize, String)> {
        let index = rng.random_range(0..self.0.objects.len().max(1));
        self.0.objects.get(index)?;
        Some((index, the(&self.0.definite(index, allowed, rng)?.say(rng))))
    }

    /// Two objects that can be named.
    fn two(&self, rng: &mut impl Rng) -> Option<(&Object, String, &Object, String)> {
        let (i, one) = self.someone(0b1011, rng)?;
        let (j, two) = self.someone(0b1011, rng)?;
        (i != j).then(|| (&self.0.objects[i], one, &self.0.objects[j], two))
    }

    fn exists(&self, rng: &mut impl Rng) -> Option<Question> {
        let yes = rng.random_bool(0.5);
        let noun = match yes {
            true => Noun::label(self.0.objects.choose(rng)?),
            false => self.0.absent(rng)?,
        };
        let text = fill(frames::EXISTS, &[("a", &a(&noun.say(rng)))], rng);
        question("exists", text, yes_no(yes))
    }

    fn count(&self, rng: &mut impl Rng) -> Option<Question> {
        let object = self.0.objects.choose(rng)?;
        let mut noun = Noun::some_of(object, *[0, 1, 1, 2, 2, 2, 4, 8].choose(rng)?);
        if rng.random_bool(0.2) {
            noun = Noun { shape: Some(any(Shape::ALL, rng)), ..Noun::default() };
        }
        let text = fill(frames::COUNT, &[("m", &noun.plural(rng))], rng);
        question("count", text, *NUMBERS.get(self.0.count(noun))?)
    }

    fn attribute(
        &self,
        kind: &'static str,
        frames: &[&'static str],
        allowed: u8,
        answer: impl Fn(&Object) -> &'static str,
        rng: &mut impl Rng,
    ) -> Option<Question> {
        let (index, noun) = (0..TRIES).find_map(|_| self.someone(allowed, rng))?;
        question(kind, fill(frames, &[("t", &noun)], rng), answer(&self.0.objects[index]))
    }

    fn is_textured(&self, rng: &mut impl Rng) -> Option<Question> {
        let (index, noun) = (0..TRIES).find_map(|_| self.someone(0b0111, rng))?;
        let (yes, own) = (rng.random_bool(0.5), self.0.objects[index].texture);
        let others: Vec<Texture> = Texture::ALL.iter().copied().filter(|&t| t != own).collect();
        let texture = if yes { own } else { *others.choose(rng)? };
        let values = [("t", noun.as_str()), ("w", say(texture.words(), rng))];
        question("is texture", fill(frames::IS_TEXTURE, &values, rng), yes_no(yes))
    }

    fn place(&self, rng: &mut impl Rng) -> Option<Question> {
        let (place, noun) = (0..TRIES).find_map(|_| {
            let (index, noun) = self.someone(0b1111, rng)?;
            Some((Place::of(&self.0.objects[index])?, noun))
        })?;
        question("place", fill(frames::WHERE, &[("t", &noun)], rng), place.word())
    }

    fn related(&self, rng: &mut impl Rng) -> Option<Question> {
        (0..TRIES).find_map(|_| {
            let index = rng.random_range(0..self.0.objects.len().max(1));
            self.0.objects.get(index)?;
            let anchor = self.0.definite(index, 0b1111, rng)?;
            let relation = any(Relation::ALL, rng);
            // One object lies there, and no other may be thought to.
            let found = Phrase::Related(Noun::default(), relation, anchor).selects(self.0)?;
            let values = [("r", say(relation.words(), rng)), ("t", &the(&anchor.say(rng)))];
            let answer = self.0.objects[found].shape.word();
            question("related", fill(frames::WHAT_IS, &values, rng), answer)
        })
    }

    fn is_related(&self, rng: &mut impl Rng) -> Option<Question> {
        let yes = rng.random_bool(0.5);
        (0..TRIES).find_map(|_| {
            let (one, t, two, u) = self.two(rng)?;
            let relation = Relation::between(one, two)?;
            let relation = if yes { relation } else { relation.inverse() };
            let values = [("t", t.as_str()), ("r", say(relation.words(), rng)), ("u", &u)];
            question("is related", fill(frames::IS_IT, &values, rng), yes_no(yes))
        })
    }

    fn compare(&self, rng: &mut impl Rng) -> Option<Question> {
        let yes = rng.random_bool(0.5);
        (0..TRIES).find_map(|_| {
            let (one, t, two, u) = self.two(rng).filter(|(a, _, b, _)| a.size != b.size)?;
            let larger = (one.size > two.size) == yes;
            let frames = if larger { frames::LARGER } else { frames::SMALLER };
            question("compare", fill(frames, &[("t", &t), ("u", &u)], rng), yes_no(yes))
        })
    }

    fn which(&self, rng: &mut impl Rng) -> Option<Question> {
        (0..TRIES).find_map(|_| {
            let (one, t, two, u) = self.two(rng).filter(|(a, _, b, _)| a.size != b.size)?;
            let differ = (one.colour, one.shape) != (two.colour, two.shape);
            let larger = rng.random_bool(0.5);
            let frames = if larger { frames::WHICH_LARGER } else { frames::WHICH_SMALLER };
            let found = if (one.size > two.size) == larger { one } else { two };
            let answer = format!("{} {}", found.colour.word(), found.shape.word());
            differ.then(|| question("which", fill(frames, &[("t", &t), ("u", &u)], rng), answer))?
        })
    }

    fn same_colour(&self, rng: &mut impl Rng) -> Option<Question> {
        let mut ask = |yes: bool| {
            (0..TRIES).find_map(|_| {
                let (i, t) = self.someone(0b1101, rng)?;
                let (j, u) = self.someone(0b1101, rng)?;
                let same = self.0.objects[i].colour == self.0.objects[j].colour;
                let text = fill(frames::SAME_COLOUR, &[("t", &t), ("u", &u)], rng);
                (i != j && same == yes).then(|| question("same colour", text, yes_no(yes)))?
            })
        };
        // Only scenes that allow both answers are asked: else “no” would be the better guess.
        let (yes, no) = (ask(true)?, ask(false)?);
        Some(if rng.random_bool(0.5) { yes } else { no })
    }

    fn ground(&self, rng: &mut impl Rng) -> Option<Question> {
        let text = fill(frames::GROUND, &[("g", say(GROUNDS, rng))], rng);
        question("background", text, self.0.background.colour.word())
    }
}
