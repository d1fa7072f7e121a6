//! What can be said about a scene, and of which object it is true.
//!
//! A [`Phrase`] can both be said and be evaluated, so a phrase that is written into a file has been
//! checked against every object of its scene, with margins.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

use super::words::{
    BIGGEST, GROUNDS, MANY, NUMBERS, ORDINALS, SMALLEST, THINGS, a, fill, frames, list, pick, say, the, tokens,
};
use super::{Colour, MARGIN, Object, Place, Relation, SIDE, Scene, Shape, Size, Texture};

/// What is said about an object: any of its four facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Noun {
    /// What it is; without it, it is called a shape, an object, …
    pub shape: Option<Shape>,
    /// Its colour.
    pub colour: Option<Colour>,
    /// Its size.
    pub size: Option<Size>,
    /// Its texture.
    pub texture: Option<Texture>,
}

impl Noun {
    /// All facts of an object.
    #[must_use]
    pub fn of(object: &Object) -> Self {
        Self {
            shape: Some(object.shape),
            colour: Some(object.colour),
            size: Some(object.size),
            texture: Some(object.texture),
        }
    }

    /// Colour and shape.
    pub(super) fn label(object: &Object) -> Self {
        Self { size: None, texture: None, ..Self::of(object) }
    }

    /// Whether it is true of an object.
    #[must_use]
    pub fn fits(&self, object: &Object) -> bool {
        self.shape.is_none_or(|shape| shape == object.shape)
            && self.colour.is_none_or(|colour| colour == object.colour)
            && self.size.is_none_or(|size| size == object.size)
            && self.texture.is_none_or(|texture| texture == object.texture)
    }

    /// In words without an article: “small striped red circle”, “red circle with stripes”.
    pub(super) fn say(&self, rng: &mut impl Rng) -> String {
        let after = self.texture.map_or(&[][..], Texture::after);
        let after = if !after.is_empty() && rng.random_bool(0.2) { pick(after, rng) } else { "" };
        let words = [
            self.size.map_or("", |size| say(size.words(), rng)),
            self.texture.filter(|_| after.is_empty()).map_or("", |texture| say(texture.words(), rng)),
            self.colour.map_or("", Colour::word),
            say(self.shape.map_or(THINGS, Shape::words), rng),
            after,
        ];
        words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
    }

    /// In canonical words, for several: “small red circles”.
    pub(super) fn plural(&self, rng: &mut impl Rng) -> String {
        let noun = self.shape.map_or_else(|| say(MANY, rng).to_owned(), super::words::plural);
        let words = [
            self.size.map_or("", Size::word),
            self.texture.map_or("", Texture::word),
            self.colour.map_or("", Colour::word),
            &noun,
        ];
        words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
    }

    /// Some of the facts, chosen by the bits of `keep`: shape, colour, size, texture.
    pub(super) fn some_of(object: &Object, keep: u8) -> Self {
        let all = Self::of(object);
        Self {
            shape: all.shape.filter(|_| keep & 1 != 0),
            colour: all.colour.filter(|_| keep & 2 != 0),
            size: all.size.filter(|_| keep & 4 != 0),
            texture: all.texture.filter(|_| keep & 8 != 0),
        }
    }
}

/// A phrase that may single out an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phrase {
    /// “the small red star”
    Noun(Noun),
    /// “the circle left of the green square”
    Related(Noun, Relation, Noun),
    /// “the leftmost circle”
    Most(Relation, Noun),
    /// “the second shape from the left”; the rank counts from 0.
    Nth(usize, Relation, Noun),
    /// “the largest star”
    Largest(Noun),
    /// “the smallest star”
    Smallest(Noun),
    /// “the heart in the top left corner”
    At(Noun, Place),
}

impl Phrase {
    /// The one object that the phrase is true of, if that is beyond doubt: every other object that
    /// the noun fits is clearly something else.
    #[must_use]
    pub fn selects(&self, scene: &Scene) -> Option<usize> {
        let objects = &scene.objects;
        match *self {
            Self::Noun(noun) => only(scene, |object| Some(noun.fits(object))),
            Self::Related(noun, relation, anchor) => {
                let anchor = Self::Noun(anchor).selects(scene)?;
                let (index, anchor) = (anchor, &objects[anchor]);
                let found = only(scene, |object| {
                    if !noun.fits(object) || std::ptr::eq(object, anchor) {
                        Some(false)
                    } else if relation.is_clear(object, anchor) {
                        Some(true)
                    } else {
                        relation.is_denied(object, anchor).then_some(false)
                    }
                })?;
                (found != index).then_some(found)
            }
            Self::Most(relation, noun) => ranked(scene, relation, noun, 2, 0),
            Self::Nth(rank, relation, noun) => ranked(scene, relation, noun, 3, rank),
            Self::Largest(noun) => extreme(scene, noun, |a, b| a > b),
            Self::Smallest(noun) => extreme(scene, noun, |a, b| a < b),
            Self::At(noun, place) => only(scene, |object| match Place::of(object) {
                _ if !noun.fits(object) => Some(false),
                Some(found) => Some(found == place),
                None => place.is_far(object).then_some(false),
            }),
        }
    }

    /// In words, beginning with “the”.
    pub(super) fn say(&self, rng: &mut impl Rng) -> String {
        match self {
            Self::Noun(noun) => the(&noun.say(rng)),
            Self::Related(noun, relation, anchor) => {
                let (noun, anchor) = (noun.say(rng), anchor.say(rng));
                format!("the {noun} {} the {anchor}", say(relation.words(), rng))
            }
            Self::Most(relation, noun) => {
                format!("the {} {}", say(relation.most(), rng), noun.say(rng))
            }
            Self::Nth(rank, relation, noun) => {
                let ordinal = ORDINALS.get(*rank).copied().unwrap_or_default();
                format!("the {ordinal} {} from the {}", noun.say(rng), relation.end())
            }
            Self::Largest(noun) => format!("the {} {}", say(BIGGEST, rng), noun.say(rng)),
            Self::Smallest(noun) => format!("the {} {}", say(SMALLEST, rng), noun.say(rng)),
            Self::At(noun, place) => {
                format!("the {} {}", noun.say(rng), pick(place.phrases(), rng))
            }
        }
    }
}

/// The only object for which `is` says yes; no object may be in doubt.
fn only(scene: &Scene, is: impl Fn(&Object) -> Option<bool>) -> Option<usize> {
    let mut found = None;
    for (i, object) in scene.objects.iter().enumerate() {
        if is(object)? && found.replace(i).is_some() {
            return None;
        }
    }
    found
}

/// The object of rank `rank` in a direction, among at least `least` that the noun fits.
fn ranked(scene: &Scene, to: Relation, noun: Noun, least: usize, rank: usize) -> Option<usize> {
    let key = |&i: &usize| {
        let [x, y] = scene.objects[i].centre();
        match to {
            Relation::Left => x,
            Relation::Right => -x,
            Relation::Above => y,
            Relation::Below => -y,
        }
    };
    let mut fitting = fitting(scene, noun);
    fitting.sort_by(|a, b| key(a).total_cmp(&key(b)));
    let found = fitting.get(rank).filter(|_| fitting.len() >= least)?;
    let apart = |other: Option<&usize>| other.is_none_or(|o| (key(o) - key(found)).abs() >= MARGIN);
    let before = rank.checked_sub(1).and_then(|before| fitting.get(before));
    (apart(before) && apart(fitting.get(rank + 1))).then_some(*found)
}

/// The object whose size class beats that of every other that the noun fits.
fn extreme(scene: &Scene, noun: Noun, beats: impl Fn(Size, Size) -> bool) -> Option<usize> {
    let fitting = fitting(scene, noun);
    let size = |i: usize| scene.objects[i].size;
    let wins = |&i: &usize| fitting.iter().all(|&j| i == j || beats(size(i), size(j)));
    fitting.iter().copied().find(wins).filter(|_| fitting.len() > 1)
}

fn fitting(scene: &Scene, noun: Noun) -> Vec<usize> {
    let objects = scene.objects.iter().enumerate();
    objects.filter(|(_, object)| noun.fits(object)).map(|(i, _)| i).collect()
}

impl Place {
    /// Where an object is, if it is clearly in one of the nine parts of the picture.
    #[must_use]
    pub fn of(object: &Object) -> Option<Self> {
        const DOUBT: f32 = 6.0;
        let third = |at: f32| {
            let thirds = at / (SIDE as f32 / 3.0);
            let doubtful = [1.0, 2.0].iter().any(|border| (thirds - border).abs() < DOUBT / 64.0);
            (!doubtful).then_some(thirds.clamp(0.0, 2.0) as usize)
        };
        let [x, y] = object.centre();
        Self::ALL.get(3 * third(y)? + third(x)?).copied()
    }

    /// Whether an object is clearly not there, though it may be in doubt where it is.
    fn is_far(self, object: &Object) -> bool {
        let third = SIDE as f32 / 3.0;
        let part = Self::ALL.iter().position(|&place| place == self).unwrap_or_default();
        let [x, y] = object.centre();
        [(x, part % 3), (y, part / 3)]
            .into_iter()
            .any(|(at, part)| (at - (part as f32 + 0.5) * third).abs() > 0.75 * third)
    }
}

/// How a referring expression singles out its object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExpressionKind {
    /// By its own attributes.
    Attribute,
    /// By its relation to another object.
    Relation,
    /// By an ordinal, a superlative or its place.
    Ordinal,
}

/// A text that singles out one object.
#[derive(Debug, Clone, PartialEq)]
pub struct Expression {
    /// The text, such as “the small red star”.
    pub text: String,
    /// What it says.
    pub phrase: Phrase,
    /// The index of the object.
    pub object: usize,
    /// How it does it.
    pub kind: ExpressionKind,
}

impl Scene {
    /// The noun phrase, as short as possible, that is true of one object only, among those whose
    /// facts are `allowed` (bits as in [`Noun::some_of`]).
    pub(super) fn definite(&self, index: usize, allowed: u8, rng: &mut impl Rng) -> Option<Noun> {
        let nouns = self.definites(index, allowed);
        let facts = |noun: &Noun| {
            let Noun { shape, colour, size, texture } = noun;
            [shape.is_some(), colour.is_some(), size.is_some(), texture.is_some()].into_iter().filter(|&is| is).count()
        };
        let least = nouns.iter().map(facts).min()?;
        let short: Vec<Noun> = nouns.into_iter().filter(|noun| facts(noun) == least).collect();
        short.choose(rng).copied()
    }

    /// All nouns that are true of one object only.
    fn definites(&self, index: usize, allowed: u8) -> Vec<Noun> {
        let keeps = (1..16u8).filter(|keep| keep & !allowed == 0);
        let nouns = keeps.map(|keep| Noun::some_of(&self.objects[index], keep));
        nouns.filter(|&noun| Phrase::Noun(noun).selects(self) == Some(index)).collect()
    }

    /// Phrases that single out objects: for each object up to `each`, about 60 % by attributes, 25 %
    /// by a relation and 15 % by ordinals, superlatives and places.
    pub fn referring_expressions(&self, each: usize, rng: &mut impl Rng) -> Vec<Expression> {
        let mut expressions: Vec<Expression> = Vec::new();
        for object in 0..self.objects.len() {
            for _ in 0..each {
                let kind = match rng.random_range(0..100) {
                    0..58 => ExpressionKind::Attribute,
                    58..84 => ExpressionKind::Relation,
                    _ => ExpressionKind::Ordinal,
                };
                let Some((phrase, kind)) = self.refer(object, kind, rng) else {
                    continue;
                };
                let text = phrase.say(rng);
                if expressions.iter().all(|other| other.text != text) {
                    expressions.push(Expression { text, phrase, object, kind });
                }
            }
        }
        expressions
    }

    /// A phrase for an object, of the wanted kind if there is one.
    fn refer(&self, object: usize, kind: ExpressionKind, rng: &mut impl Rng) -> Option<(Phrase, ExpressionKind)> {
        use ExpressionKind::{Attribute, Ordinal, Relation};
        let mut kinds = vec![Attribute, Relation, Ordinal];
        kinds.sort_by_key(|&other| other != kind);
        kinds.into_iter().find_map(|kind| {
            let phrases = match kind {
                Attribute => self.definites(object, 15).into_iter().map(Phrase::Noun).collect(),
                Relation => self.related(object, rng),
                Ordinal => self.ordinal(object),
            };
            Some((*phrases.choose(rng)?, kind))
        })
    }

    /// Relations of an object to others, that single it out.
    fn related(&self, object: usize, rng: &mut impl Rng) -> Vec<Phrase> {
        let mut phrases = Vec::new();
        for anchor in (0..self.objects.len()).filter(|&anchor| anchor != object) {
            let relation = super::Relation::between(&self.objects[object], &self.objects[anchor]);
            let definite = self.definite(anchor, 15, rng);
            let (Some(relation), Some(definite)) = (relation, definite) else {
                continue;
            };
            for keep in [0b0000, 0b0001, 0b0010, 0b0011, 0b0101, 0b1001] {
                let noun = Noun::some_of(&self.objects[object], keep);
                phrases.push(Phrase::Related(noun, relation, definite));
            }
        }
        self.keep(phrases, object)
    }

    /// Ordinals, superlatives and places that single an object out.
    fn ordinal(&self, object: usize) -> Vec<Phrase> {
        let mut phrases = Vec::new();
        for keep in [0b0000, 0b0001, 0b0010, 0b0011] {
            let noun = Noun::some_of(&self.objects[object], keep);
            phrases.extend([Phrase::Largest(noun), Phrase::Smallest(noun)]);
            phrases.extend(Place::of(&self.objects[object]).map(|place| Phrase::At(noun, place)));
            for &relation in Relation::ALL {
                phrases.push(Phrase::Most(relation, noun));
                phrases.extend((1..3).map(|rank| Phrase::Nth(rank, relation, noun)));
            }
        }
        self.keep(phrases, object)
    }

    fn keep(&self, mut phrases: Vec<Phrase>, object: usize) -> Vec<Phrase> {
        phrases.retain(|phrase| phrase.selects(self) == Some(object));
        phrases
    }

    /// What an object may be called, not always singling it out: its label, all it is, where it is.
    pub fn region_descriptions(&self, object: usize, rng: &mut impl Rng) -> Vec<String> {
        let Some(object) = self.objects.get(object) else {
            return Vec::new();
        };
        let mut texts = vec![Noun::label(object).say(rng), a(&Noun::of(object).say(rng))];
        let one_more = if rng.random_bool(0.5) { 0b0111 } else { 0b1011 };
        texts.push(a(&Noun::some_of(object, one_more).say(rng)));
        if let Some(place) = Place::of(object) {
            let noun = the(&Noun::some_of(object, rng.random_range(1..4)).say(rng));
            let values = [("a", noun.as_str()), ("p", pick(place.phrases(), rng))];
            texts.push(fill(frames::PLACED, &values, rng));
        }
        texts
    }

    /// The words that are true of an object: colour, size, texture.
    #[must_use]
    pub fn attributes(&self, object: usize) -> Vec<String> {
        let words = |object: &Object| [object.colour.word(), object.size.word(), object.texture.word()];
        let words = self.objects.get(object).map(words).into_iter().flatten();
        words.map(str::to_owned).collect()
    }

    /// One short sentence in a fixed style, a function of the scene: the two most salient objects
    /// ([`Scene::salient`]) with colour and shape, and how the first lies to the second, such as “a
    /// red circle left of a blue star”.
    #[must_use]
    pub fn canonical_caption(&self) -> String {
        let label = |object: &Object| a(&format!("{} {}", object.colour.word(), object.shape.word()));
        match self.salient()[..] {
            [] => a(&format!("{} {}", self.background.colour.word(), GROUNDS[0])),
            [only] => label(only),
            [first, second, ..] => {
                let relation = Relation::between(first, second);
                let relation = relation.map_or("and", Relation::word);
                format!("{} {relation} {}", label(first), label(second))
            }
        }
    }

    /// Captions of the whole picture: the canonical one, then relations, lists, details and the number of objects.
    pub fn captions(&self, rng: &mut impl Rng) -> Vec<String> {
        let mut captions = vec![self.canonical_caption()];
        captions.push(self.relation_caption(rng));
        for _ in 0..2 {
            captions.extend(self.pair(rng).map(|(a, relation, b)| {
                let keep = [0b0111, 0b1011, 0b1111];
                let mut noun = |object: &Object| Noun::some_of(object, *keep.choose(rng).unwrap_or(&3));
                let (a, b) = (noun(a), noun(b));
                statement(a, relation, b, rng)
            }));
            captions.push(self.list_caption(rng));
            captions.extend(self.detailed_caption(rng));
        }
        captions.extend(self.whole(rng));
        captions.extend(self.counted_caption(rng));
        captions
    }

    /// What the canonical caption says, in other words.
    pub fn relation_caption(&self, rng: &mut impl Rng) -> String {
        match self.salient()[..] {
            [first, second, ..] if Relation::between(first, second).is_some() => {
                let (a, b) = (Noun::label(first), Noun::label(second));
                statement(a, Relation::between(first, second).unwrap_or(Relation::Left), b, rng)
            }
            _ => self.canonical_caption(),
        }
    }

    /// Five captions that name every object with its colour and its size or texture, and tell a
    /// relation: among hundreds of scenes each fits its own only.
    pub fn retrieval_captions(&self, rng: &mut impl Rng) -> Vec<String> {
        (0..5).map(|_| self.whole(rng).unwrap_or_else(|| self.canonical_caption())).collect()
    }

    /// All objects and a relation.
    fn whole(&self, rng: &mut impl Rng) -> Option<String> {
        let (a, relation, b) = self.pair(rng)?;
        short(|| {
            let mut noun = |object: &Object| {
                let textured = object.texture != Texture::Solid && rng.random_bool(0.4);
                Noun::some_of(object, if textured { 0b1011 } else { 0b0111 })
            };
            let (first, second) = (noun(a), noun(b));
            let others: Vec<Noun> = self.others(a, b).into_iter().map(noun).collect();
            let sentence = statement(first, relation, second, rng);
            more(frames::MORE, &sentence, &others, "", rng)
        })
    }

    fn list_caption(&self, rng: &mut impl Rng) -> String {
        let mut objects: Vec<&Object> = self.objects.iter().collect();
        objects.shuffle(rng);
        let keep = [0b0011, 0b0111, 0b1011];
        let noun = |object| Noun::some_of(object, *keep.choose(rng).unwrap_or(&3));
        let nouns: Vec<Noun> = objects.into_iter().map(noun).collect();
        let ground = self.ground(rng);
        let number = NUMBERS.get(nouns.len()).copied().unwrap_or_default();
        let values = [("l", &*enumerate(&nouns, rng)), ("n", number), ("m", pick(MANY, rng)), ("g", &ground)];
        fill(frames::LIST, &values, rng)
    }

    /// The number of objects and a relation: what is to be counted is in the picture only.
    fn counted_caption(&self, rng: &mut impl Rng) -> Option<String> {
        let (a, relation, b) = self.pair(rng)?;
        let number = NUMBERS.get(self.objects.len())?;
        let count = fill(frames::FILL_COUNT, &[("m", say(MANY, rng))], rng).replace("___", number);
        Some(format!("{count} : {}", statement(Noun::label(a), relation, Noun::label(b), rng)))
    }

    /// Two objects with all their facts, the others, and the background.
    fn detailed_caption(&self, rng: &mut impl Rng) -> Option<String> {
        let (a, relation, b) = self.pair(rng)?;
        let others: Vec<Noun> = self.others(a, b).into_iter().map(Noun::label).collect();
        short(|| {
            let sentence = statement(Noun::of(a), relation, Noun::of(b), rng);
            let ground = self.ground(rng);
            more(frames::DETAILED, &sentence, &others, &ground, rng)
        })
    }

    /// Two objects, in random order, that lie clearly to each other.
    pub(super) fn pair(&self, rng: &mut impl Rng) -> Option<(&Object, Relation, &Object)> {
        let pairs = self.objects.iter().flat_map(|a| {
            let with = move |b| Some((a, Relation::between(a, b)?, b));
            self.objects.iter().filter_map(with)
        });
        pairs.collect::<Vec<_>>().choose(rng).copied()
    }

    fn others(&self, a: &Object, b: &Object) -> Vec<&Object> {
        let is = |object: &&Object| !std::ptr::eq(*object, a) && !std::ptr::eq(*object, b);
        self.objects.iter().filter(is).collect()
    }

    /// “a checked mint background”
    fn ground(&self, rng: &mut impl Rng) -> String {
        let pattern = if rng.random_bool(0.7) { say(self.background.pattern.words(), rng) } else { "" };
        let words = format!("{pattern} {} {}", self.background.colour.word(), say(GROUNDS, rng));
        a(words.trim_start())
    }
}

/// `a` lies to `b` as `relation` says, seen from either.
fn statement(first: Noun, relation: Relation, second: Noun, rng: &mut impl Rng) -> String {
    let (one, two) = (a(&first.say(rng)), a(&second.say(rng)));
    let (words, after) = (relation.words(), relation.after());
    // The canonical word half of the time.
    let relation = if rng.random_bool(0.4) { words[0] } else { pick(words, rng) };
    if rng.random_bool(0.15) {
        fill(frames::AFTER, &[("a", &one), ("b", &two), ("p", pick(after, rng))], rng)
    } else {
        fill(frames::RELATION, &[("a", &one), ("b", &two), ("r", relation)], rng)
    }
}

/// The first caption of at most 32 words and punctuation marks.
fn short(mut caption: impl FnMut() -> String) -> Option<String> {
    const WORDS: usize = 32;
    const TRIES: usize = 32;
    let captions = (0..TRIES).map(|_| caption());
    captions.into_iter().find(|caption| tokens(caption).len() <= WORDS)
}

/// A sentence and what else there is.
fn more(frames: &[&'static str], sentence: &str, others: &[Noun], ground: &str, rng: &mut impl Rng) -> String {
    let others = enumerate(others, rng);
    if others.is_empty() {
        return sentence.to_owned();
    }
    fill(frames, &[("s", sentence), ("l", &others), ("g", ground)], rng)
}

fn enumerate(nouns: &[Noun], rng: &mut impl Rng) -> String {
    list(&nouns.iter().map(|noun| a(&noun.say(rng))).collect::<Vec<_>>())
}
