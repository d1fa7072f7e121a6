//! Judging a caption that a model wrote.
//!
//! The caption is read word by word against a lexicon of everything the grammar can say; the
//! longest entry wins. Words outside the lexicon are skipped.

use std::sync::LazyLock;

use super::words::{GROUNDS, MANY, NUMBERS, THINGS, tokens};
use super::{Colour, Noun, Object, Pattern, Relation, Scene, Shape, Size, Texture, Tint};

/// An object that a caption mentions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mention {
    /// What the caption says of it.
    pub noun: Noun,
    /// The index of the object of the scene that it is taken for; `None` if there is no way to take
    /// all mentions for different objects.
    pub object: Option<usize>,
}

/// What is right about a caption. Each mention must be of another object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CaptionCheck {
    /// What the caption mentions, in its order.
    pub mentions: Vec<Mention>,
    /// The mentioned shapes are there; there are at least two mentions (one in a scene of one object).
    pub objects_right: bool,
    /// The mentioned shapes are there in the colours told, and every mention tells a colour.
    pub colours_right: bool,
    /// At least one relation is told (in a scene of two objects or more), and all that are told hold
    /// between objects of the shapes and colours mentioned.
    pub relation_right: bool,
    /// Nothing else is wrong: sizes, textures, number of objects, background.
    pub details_right: bool,
}

impl CaptionCheck {
    /// Whether everything is right.
    #[must_use]
    pub fn all_right(&self) -> bool {
        self.objects_right && self.colours_right && self.relation_right && self.details_right
    }
}

#[derive(Clone, Copy)]
enum Meaning {
    Shape(Option<Shape>),
    Colour(Colour),
    Size(Size),
    Texture(Texture),
    /// Said after the noun.
    TextureAfter(Texture),
    Tint(Tint),
    Pattern(Pattern),
    Ground,
    Relation(Relation),
    /// Said after both nouns.
    RelationAfter(Relation),
    Number(usize),
    Many,
}

static LEXICON: LazyLock<Vec<(Vec<String>, Meaning)>> = LazyLock::new(|| {
    let mut entries = Vec::new();
    let mut add = |words: &[&str], meaning: Meaning| {
        entries.extend(words.iter().map(|words| (tokens(words), meaning)));
    };
    Shape::ALL.iter().for_each(|&s| add(s.words(), Meaning::Shape(Some(s))));
    add(THINGS, Meaning::Shape(None));
    Colour::ALL.iter().for_each(|&c| add(c.words(), Meaning::Colour(c)));
    Size::ALL.iter().for_each(|&s| add(s.words(), Meaning::Size(s)));
    // “plain” may belong to a background or to an object: what follows decides.
    Pattern::ALL.iter().for_each(|&p| add(p.words(), Meaning::Pattern(p)));
    for &texture in Texture::ALL {
        add(texture.words(), Meaning::Texture(texture));
        add(texture.after(), Meaning::TextureAfter(texture));
    }
    Tint::ALL.iter().for_each(|&t| add(t.words(), Meaning::Tint(t)));
    add(GROUNDS, Meaning::Ground);
    for &relation in Relation::ALL {
        add(relation.words(), Meaning::Relation(relation));
        add(relation.after(), Meaning::RelationAfter(relation));
    }
    (0..).zip(NUMBERS).for_each(|(n, word)| add(&[word], Meaning::Number(n)));
    add(MANY, Meaning::Many);
    // Stable, so of equals the first stays first.
    entries.sort_by_key(|(words, _)| std::cmp::Reverse(words.len()));
    entries
});

/// What a caption says.
#[derive(Default)]
struct Reading {
    nouns: Vec<Noun>,
    /// (mention, relation, mention)
    relations: Vec<(usize, Relation, usize)>,
    /// Something told makes no sense, such as a relation to nothing or a red blue star.
    confused: bool,
    /// What is told of the number of objects and of the background holds.
    rest_right: bool,
}

fn read(scene: &Scene, text: &str) -> Reading {
    let words = tokens(text);
    let mut reading = Reading { rest_right: true, ..Reading::default() };
    let (mut noun, mut tint, mut pattern, mut number) = (Noun::default(), None, None, None);
    let mut relation = None;
    let mut at = 0;
    while at < words.len() {
        let rest = &words[at..];
        let Some((entry, meaning)) = LEXICON.iter().find(|(entry, _)| rest.starts_with(entry)) else {
            at += 1;
            continue;
        };
        at += entry.len();
        let confused = match *meaning {
            Meaning::Colour(colour) => noun.colour.replace(colour).is_some(),
            Meaning::Size(size) => noun.size.replace(size).is_some(),
            Meaning::Texture(texture) => noun.texture.replace(texture).is_some(),
            Meaning::Shape(shape) => {
                reading.nouns.push(Noun { shape, ..std::mem::take(&mut noun) });
                pattern = None;
                if let Some(relation) = relation.take() {
                    let last = reading.nouns.len() - 1;
                    match last.checked_sub(1) {
                        Some(before) => reading.relations.push((before, relation, last)),
                        None => reading.confused = true,
                    }
                }
                tint.take().is_some()
            }
            Meaning::TextureAfter(texture) => match reading.nouns.last_mut() {
                Some(noun) => noun.texture.replace(texture).is_some(),
                None => true,
            },
            Meaning::Relation(told) => relation.replace(told).is_some(),
            Meaning::RelationAfter(told) => match reading.nouns.len() {
                count @ 2.. => {
                    reading.relations.push((count - 1, told, count - 2));
                    false
                }
                _ => true,
            },
            Meaning::Tint(told) => tint.replace(told).is_some(),
            Meaning::Pattern(told) => {
                if told == Pattern::Plain {
                    noun.texture = Some(Texture::Solid);
                }
                pattern.replace(told).is_some()
            }
            Meaning::Ground => {
                noun = Noun::default();
                let ground = scene.background;
                reading.rest_right &= tint.take().is_none_or(|tint| tint == ground.colour)
                    && pattern.take().is_none_or(|pattern| pattern == ground.pattern);
                false
            }
            Meaning::Number(told) => number.replace(told).is_some(),
            Meaning::Many => {
                reading.rest_right &= number.take().is_none_or(|n| n == scene.objects.len());
                false
            }
        };
        reading.confused |= confused;
    }
    reading.confused |= relation.is_some() || noun != Noun::default() || tint.is_some();
    reading
}

/// A way to take each noun for another object.
fn assign(
    scene: &Scene,
    nouns: &[Noun],
    fits: &dyn Fn(Noun, &Object) -> bool,
    relations: &[(usize, Relation, usize)],
) -> Option<Vec<usize>> {
    fn extend(
        taken: &mut Vec<usize>,
        scene: &Scene,
        nouns: &[Noun],
        fits: &dyn Fn(Noun, &Object) -> bool,
        relations: &[(usize, Relation, usize)],
    ) -> bool {
        let Some(&noun) = nouns.get(taken.len()) else {
            return relations
                .iter()
                .all(|&(a, relation, b)| relation.holds(&scene.objects[taken[a]], &scene.objects[taken[b]]));
        };
        (0..scene.objects.len()).any(|i| {
            if taken.contains(&i) || !fits(noun, &scene.objects[i]) {
                return false;
            }
            taken.push(i);
            let done = extend(taken, scene, nouns, fits, relations);
            if !done {
                taken.pop();
            }
            done
        })
    }
    // More mentions than objects cannot succeed, and would take long to find out.
    let mut taken = Vec::new();
    let possible = nouns.len() <= scene.objects.len();
    (possible && extend(&mut taken, scene, nouns, fits, relations)).then_some(taken)
}

impl Relation {
    /// Whether it may be said that `a` is there, seen from `b`: by a dozen pixels, and more so than
    /// along the other axis.
    #[must_use]
    pub fn holds(self, a: &Object, b: &Object) -> bool {
        let (along, across) = self.offset(a, b);
        along >= super::DENIED && along >= across
    }
}

/// Judges a caption of a scene; strict, and right about any text whatever.
#[must_use]
pub fn check_caption(scene: &Scene, text: &str) -> CaptionCheck {
    let Reading { nouns, relations, confused, rest_right } = read(scene, text);
    let by_shape = |noun: Noun, object: &Object| noun.shape == Some(object.shape);
    let by_colour = |noun: Noun, object: &Object| by_shape(noun, object) && noun.colour == Some(object.colour);
    let by_all = |noun: Noun, object: &Object| by_colour(noun, object) && noun.fits(object);
    let way = |fits: &dyn Fn(Noun, &Object) -> bool, relations: &[_]| assign(scene, &nouns, fits, relations);

    let wanted = scene.objects.len().min(2);
    let enough = !nouns.is_empty() && nouns.len() >= wanted;
    let related = !relations.is_empty() || wanted < 2;
    let best = way(&by_all, &relations)
        .or_else(|| way(&by_colour, &relations))
        .or_else(|| way(&by_colour, &[]))
        .or_else(|| way(&by_shape, &[]));
    let object = |i: usize| best.as_ref().map(|best| best[i]);
    let mentions = nouns.iter().enumerate();
    CaptionCheck {
        mentions: mentions.map(|(i, &noun)| Mention { noun, object: object(i) }).collect(),
        objects_right: enough && way(&by_shape, &[]).is_some(),
        colours_right: enough && way(&by_colour, &[]).is_some(),
        relation_right: enough && related && !confused && way(&by_colour, &relations).is_some(),
        details_right: enough && rest_right && !confused && way(&by_all, &relations).is_some(),
    }
}
