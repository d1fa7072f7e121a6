//! The words of the world: what can be drawn, and how it is called.
//!
//! Every text is put together from the tables here, so [`vocabulary`] is complete by construction.

use rand::Rng;
use rand::seq::IndexedRandom;
use serde::{Deserialize, Serialize};

/// An enumeration whose members have words; the first word is the canonical one.
macro_rules! worded {
    ($(#[$doc:meta])* $name:ident { $($variant:ident: $first:literal $(, $other:literal)*;)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $name {
            $(#[doc = concat!("“", $first, "”.")] $variant,)+
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// What it is called; the canonical word comes first.
            #[must_use]
            pub fn words(self) -> &'static [&'static str] {
                match self {
                    $(Self::$variant => &[$first $(, $other)*],)+
                }
            }

            /// Its canonical word.
            #[must_use]
            pub fn word(self) -> &'static str {
                self.words()[0]
            }
        }
    };
}

worded! {
    /// What an object is.
    Shape {
        Circle: "circle", "disc", "round shape";
        Square: "square", "box", "quadrangle";
        Triangle: "triangle", "three cornered shape";
        Star: "star", "five pointed star";
        Heart: "heart", "love heart";
        Cross: "cross", "plus", "plus sign";
        Ring: "ring", "hoop", "donut";
        Crescent: "crescent", "moon", "crescent moon";
    }
}

worded! {
    /// An object's colour; colours have one word each.
    Colour {
        Red: "red";
        Orange: "orange";
        Yellow: "yellow";
        Green: "green";
        Blue: "blue";
        Purple: "purple";
        Pink: "pink";
        Black: "black";
    }
}

worded! {
    /// An object's size.
    Size {
        Small: "small", "little", "tiny";
        Medium: "medium", "medium sized", "middle sized";
        Large: "large", "big", "huge";
    }
}

worded! {
    /// What an object is filled with.
    Texture {
        Solid: "solid", "plain", "filled";
        Striped: "striped", "stripy", "banded";
        Dotted: "dotted", "spotted", "speckled";
    }
}

worded! {
    /// A background's colour.
    Tint {
        White: "white";
        Grey: "grey";
        Beige: "beige";
        Mint: "mint";
        Lavender: "lavender";
    }
}

worded! {
    /// A background's pattern.
    Pattern {
        Plain: "plain";
        Gradient: "shaded", "fading";
        Checks: "checked", "checkered";
        Lines: "lined", "ruled";
    }
}

worded! {
    /// Where one object is, seen from another.
    Relation {
        Left: "left of", "to the left of", "on the left of", "on the left side of";
        Right: "right of", "to the right of", "on the right of", "on the right side of";
        Above: "above", "over", "higher than";
        Below: "below", "under", "beneath", "underneath", "lower than";
    }
}

worded! {
    /// A part of the picture.
    Place {
        TopLeft: "top left", "upper left";
        Top: "top";
        TopRight: "top right", "upper right";
        Left: "left";
        Middle: "middle", "centre";
        Right: "right";
        BottomLeft: "bottom left", "lower left";
        Bottom: "bottom";
        BottomRight: "bottom right", "lower right";
    }
}

impl Texture {
    /// The same said after the noun.
    pub(crate) fn after(self) -> &'static [&'static str] {
        match self {
            Self::Solid => &[],
            Self::Striped => &["with stripes", "that has stripes"],
            Self::Dotted => &["with dots", "with spots", "that has dots"],
        }
    }
}

impl Relation {
    /// The same said after both nouns: “a star with a ring *on its left*”.
    pub(crate) fn after(self) -> &'static [&'static str] {
        match self {
            Self::Left => &["to its left", "on its left"],
            Self::Right => &["to its right", "on its right"],
            Self::Above => &["above it", "over it"],
            Self::Below => &["below it", "under it", "beneath it"],
        }
    }

    /// The same as a superlative.
    pub(crate) fn most(self) -> &'static [&'static str] {
        match self {
            Self::Left => &["leftmost"],
            Self::Right => &["rightmost"],
            Self::Above => &["topmost", "highest", "uppermost"],
            Self::Below => &["lowest", "bottommost"],
        }
    }

    /// The end of the picture that it points to.
    pub(crate) fn end(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
            Self::Above => "top",
            Self::Below => "bottom",
        }
    }
}

impl Place {
    /// “in the top left corner”, “at the top”, …
    pub(crate) fn phrases(self) -> &'static [&'static str] {
        match self {
            Self::TopLeft => &["in the top left corner", "at the top left", "in the upper left"],
            Self::Top => &["at the top", "near the top edge"],
            Self::TopRight => &["in the top right corner", "at the top right", "in the upper right"],
            Self::Left => &["on the left", "near the left edge"],
            Self::Middle => &["in the middle", "in the centre"],
            Self::Right => &["on the right", "near the right edge"],
            Self::BottomLeft => &["in the bottom left corner", "at the bottom left", "in the lower left"],
            Self::Bottom => &["at the bottom", "near the bottom edge"],
            Self::BottomRight => &["in the bottom right corner", "at the bottom right", "in the lower right"],
        }
    }
}

/// Numbers from zero.
pub(crate) const NUMBERS: &[&str] =
    &["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
/// Ordinals; the index is the rank counted from 0.
pub(crate) const ORDINALS: &[&str] = &["first", "second", "third", "fourth", "fifth"];
/// Any object at all.
pub(crate) const THINGS: &[&str] = &["shape", "object", "figure", "thing"];
/// Many of them.
pub(crate) const MANY: &[&str] = &["shapes", "objects", "figures", "things"];
/// What is behind the objects.
pub(crate) const GROUNDS: &[&str] = &["background", "backdrop"];
/// Superlatives of size: for the largest, for the smallest.
pub(crate) const BIGGEST: &[&str] = &["largest", "biggest"];
/// The other end.
pub(crate) const SMALLEST: &[&str] = &["smallest", "tiniest"];

/// Frames: `{name}` is replaced by [`fill`].
pub(crate) mod frames {
    /// `{a}` relation `{r}` `{b}`.
    pub(crate) const RELATION: &[&str] = &[
        "{a} is {r} {b}",
        "{a} {r} {b}",
        "there is {a} {r} {b}",
        "{a} sits {r} {b}",
        "{a} lies {r} {b}",
        "{a} appears {r} {b}",
        "{a} is placed {r} {b}",
        "{a} is located {r} {b}",
        "{a} is positioned {r} {b}",
        "{a} is found {r} {b}",
        "{a} is drawn {r} {b}",
        "{a} is visible {r} {b}",
        "{a} can be seen {r} {b}",
        "{a} rests {r} {b}",
        "{a} floats {r} {b}",
        "{a} stands {r} {b}",
        "in this scene {a} is {r} {b}",
        "a picture of {a} {r} {b}",
        "an image of {a} {r} {b}",
        "a drawing of {a} {r} {b}",
        "a sketch of {a} {r} {b}",
        "an illustration showing {a} {r} {b}",
        "the picture shows {a} {r} {b}",
        "this image shows {a} {r} {b}",
        "the artist drew {a} {r} {b}",
        "here is {a} {r} {b}",
        "you can see {a} {r} {b}",
        "we see {a} {r} {b}",
    ];
    /// The same seen from `{b}`, with the relation `{p}` said last.
    pub(crate) const AFTER: &[&str] = &[
        "{b} with {a} {p}",
        "{b} has {a} {p}",
        "{b} which has {a} {p}",
        "there is {b} with {a} {p}",
        "a picture of {b} with {a} {p}",
    ];
    /// All objects `{l}`, their number `{n}`, `{m}` for “shapes”.
    pub(crate) const LIST: &[&str] = &[
        "{l}",
        "{n} {m} : {l}",
        "there are {n} {m} : {l}",
        "a picture with {n} {m} , {l}",
        "a picture of {l}",
        "an image with {l}",
        "a simple graphic of {l}",
        "a colourful scene with {l}",
        "some geometric {m} : {l}",
        "a group of {n} {m} , namely {l}",
        "everything in view : {l}",
        "we see {l}",
        "the drawing contains {l}",
        "{l} on {g}",
        "{n} {m} on {g} : {l}",
    ];
    /// A relation `{s}`, the other objects `{l}`.
    pub(crate) const MORE: &[&str] = &[
        "{s} , with {l}",
        "{s} , and {l}",
        "{s} , also {l}",
        "{s} , together with {l}",
        "{s} , along with {l}",
        "{s} , besides {l}",
        "{s} , accompanied by {l}",
        "{s} , next to {l}",
        "{s} , as well as {l}",
    ];
    /// A relation `{s}`, the other objects `{l}`, the background `{g}`.
    pub(crate) const DETAILED: &[&str] = &[
        "{s} , with {l} , on {g}",
        "{s} , and {l} , on {g}",
        "on {g} : {s} , with {l}",
        "on {g} : {s} , and also {l}",
        "{s} , together with {l} , all on {g}",
        "{s} , with {l} , in front of {g}",
        "{s} , while {l} can also be seen against {g}",
        "{s} , and additionally {l} , painted on {g}",
    ];
    /// An object `{a}` at a place `{p}`.
    pub(crate) const PLACED: &[&str] =
        &["{a} {p}", "{a} {p} of the picture", "{a} {p} of the image", "{a} located {p}", "{a} that is {p}"];

    /// Is there `{a}`?
    pub(crate) const EXISTS: &[&str] = &[
        "is there {a} ?",
        "is there {a} in the picture ?",
        "does the picture show {a} ?",
        "does the image contain {a} ?",
        "can you see {a} ?",
        "do you see {a} ?",
        "is {a} visible ?",
        "does {a} appear anywhere ?",
    ];
    /// How many `{m}`?
    pub(crate) const COUNT: &[&str] = &[
        "how many {m} are there ?",
        "how many {m} are in the picture ?",
        "how many {m} can you see ?",
        "what number of {m} is shown ?",
        "what is the number of {m} ?",
        "count the {m} .",
    ];
    /// The colour of `{t}`?
    pub(crate) const COLOUR: &[&str] = &[
        "what colour is {t} ?",
        "what is the colour of {t} ?",
        "which colour does {t} have ?",
        "what color is {t} ?",
        "name the colour of {t} .",
    ];
    /// The shape of `{t}`?
    pub(crate) const SHAPE: &[&str] = &[
        "what shape is {t} ?",
        "what is {t} ?",
        "what is the shape of {t} ?",
        "which shape does {t} have ?",
        "what kind of shape is {t} ?",
        "what type of object is {t} ?",
    ];
    /// The size of `{t}`?
    pub(crate) const SIZE: &[&str] =
        &["what size is {t} ?", "how big is {t} ?", "how large is {t} ?", "what is the size of {t} ?"];
    /// The texture of `{t}`?
    pub(crate) const TEXTURE: &[&str] = &[
        "what texture does {t} have ?",
        "what pattern does {t} have ?",
        "is {t} solid , striped or dotted ?",
        "what is the texture of {t} ?",
    ];
    /// Where is `{t}`?
    pub(crate) const WHERE: &[&str] = &[
        "where is {t} ?",
        "in which part of the picture is {t} ?",
        "where in the image is {t} ?",
        "whereabouts is {t} situated ?",
    ];
    /// What is `{r}` `{t}`?
    pub(crate) const WHAT_IS: &[&str] =
        &["what is {r} {t} ?", "which shape is {r} {t} ?", "what shape can be seen {r} {t} ?"];
    /// Is `{t}` `{r}` `{u}`?
    pub(crate) const IS_IT: &[&str] = &["is {t} {r} {u} ?", "does {t} lie {r} {u} ?"];
    /// Is `{t}` larger than `{u}`?
    pub(crate) const LARGER: &[&str] = &["is {t} larger than {u} ?", "is {t} bigger than {u} ?"];
    /// Is `{t}` smaller than `{u}`?
    pub(crate) const SMALLER: &[&str] = &["is {t} smaller than {u} ?"];
    /// Which of the two is larger?
    pub(crate) const WHICH_LARGER: &[&str] = &["which is larger , {t} or {u} ?", "which is bigger , {t} or {u} ?"];
    /// Which of the two is smaller?
    pub(crate) const WHICH_SMALLER: &[&str] = &["which is smaller , {t} or {u} ?"];
    /// The background's colour?
    pub(crate) const GROUND: &[&str] = &["what colour is the {g} ?", "what is the colour of the {g} ?"];
    /// Do `{t}` and `{u}` have the same …?
    pub(crate) const SAME_COLOUR: &[&str] =
        &["do {t} and {u} have the same colour ?", "are {t} and {u} of the same colour ?"];
    /// Is `{t}` of texture `{w}`?
    pub(crate) const IS_TEXTURE: &[&str] = &["is {t} {w} ?"];

    /// `{i}` is “left” or “right”; it shows `{a}`.
    pub(crate) const SIDE_HAS: &[&str] = &[
        "the {i} image shows {a}",
        "the {i} image contains {a}",
        "there is {a} in the {i} image",
        "the image on the {i} has {a}",
    ];
    /// `{i}` does not show `{a}`.
    pub(crate) const SIDE_LACKS: &[&str] = &["the {i} image does not show {a}", "there is no {z} in the {i} image"];
    /// Both show `{a}`.
    pub(crate) const BOTH: &[&str] = &[
        "both images show {a}",
        "both images contain {a}",
        "each image contains {a}",
        "there is {a} in each of the two images",
    ];
    /// At least one of them shows `{a}`.
    pub(crate) const EITHER: &[&str] = &["at least one image shows {a}", "one or both of the images contain {a}"];
    /// Exactly one of them shows `{a}`.
    pub(crate) const ONE: &[&str] = &["exactly one image shows {a}", "only one of the two images contains {a}"];
    /// None of them shows `{a}`.
    pub(crate) const NEITHER: &[&str] = &["neither image shows {a}", "none of the images contains {a}"];
    /// `{n}` `{m}` in both together.
    pub(crate) const TOTAL: &[&str] =
        &["there are {n} {m} in total", "the two images contain {n} {m} in total", "together the images show {n} {m}"];
    /// More `{m}` on side `{i}` than on side `{j}`.
    pub(crate) const MORE_ON: &[&str] = &[
        "the {i} image contains more {m} than the {j} image",
        "there are more {m} in the {i} image than in the {j} image",
    ];
    /// `{n}` `{m}` on side `{i}`.
    pub(crate) const SIDE_COUNT: &[&str] =
        &["the {i} image contains exactly {n} {m}", "there are {n} {m} in the {i} image"];

    /// The number of `{m}`, `___`.
    pub(crate) const FILL_COUNT: &[&str] = &[
        "there are ___ {m}",
        "there are ___ {m} in the picture",
        "a picture with ___ {m}",
        "the picture shows ___ {m}",
    ];
    /// Blanks between things beside each other.
    pub(crate) const FILL_SIDE: &[&str] = &[
        "{a} is to the ___ of {b}",
        "{a} to the ___ of {b}",
        "there is {a} on the ___ side of {b}",
        "{a} is on the ___ of {b}",
    ];
    /// Blanks between things above each other.
    pub(crate) const FILL_HEIGHT: &[&str] = &["{a} is ___ {b}", "{a} ___ {b}", "there is {a} ___ {b}"];

    /// All frames.
    pub(crate) const ALL: &[&[&str]] = &[
        RELATION,
        AFTER,
        LIST,
        MORE,
        DETAILED,
        PLACED,
        EXISTS,
        COUNT,
        COLOUR,
        SHAPE,
        SIZE,
        TEXTURE,
        WHERE,
        WHAT_IS,
        IS_IT,
        LARGER,
        SMALLER,
        WHICH_LARGER,
        WHICH_SMALLER,
        GROUND,
        SAME_COLOUR,
        IS_TEXTURE,
        SIDE_HAS,
        SIDE_LACKS,
        BOTH,
        EITHER,
        ONE,
        NEITHER,
        TOTAL,
        MORE_ON,
        SIDE_COUNT,
        FILL_COUNT,
        FILL_SIDE,
        FILL_HEIGHT,
    ];
}

/// Words that no table holds: the glue that code adds.
const GLUE: &str = "a an the and from yes no , . ? :";

/// The canonical word four times in five.
pub(crate) fn say(words: &[&'static str], rng: &mut impl Rng) -> &'static str {
    match words {
        [] => "",
        [first, ..] if rng.random_bool(0.8) => first,
        _ => pick(words, rng),
    }
}

/// Any of the words.
pub(crate) fn pick(words: &[&'static str], rng: &mut impl Rng) -> &'static str {
    words.choose(rng).copied().unwrap_or_default()
}

/// Any of the members of an enumeration, such as [`Shape::ALL`].
pub(crate) fn any<T: Copy>(all: &[T], rng: &mut impl Rng) -> T {
    all[rng.random_range(0..all.len())]
}

/// A random frame with its `{names}` replaced.
pub(crate) fn fill(frames: &[&'static str], values: &[(&str, &str)], rng: &mut impl Rng) -> String {
    let mut text = pick(frames, rng).to_owned();
    for (name, value) in values {
        text = text.replace(&format!("{{{name}}}"), value);
    }
    text
}

/// `words` with “a” or “an”.
pub(crate) fn a(words: &str) -> String {
    let vowel = words.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {words}", if vowel { "an" } else { "a" })
}

/// `words` with “the”.
pub(crate) fn the(words: &str) -> String {
    format!("the {words}")
}

/// “a, b and c”.
pub(crate) fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(" , ")),
    }
}

/// The plural of a canonical shape word.
pub(crate) fn plural(shape: Shape) -> String {
    let ending = if shape == Shape::Cross { "es" } else { "s" };
    format!("{}{ending}", shape.word())
}

/// Splits as BERT's basic tokenizer does: lower case, white space, each punctuation mark by itself.
pub(crate) fn tokens(text: &str) -> Vec<String> {
    let mut tokens = vec![String::new()];
    for c in text.chars().flat_map(char::to_lowercase) {
        let last = tokens.len() - 1;
        if c.is_alphanumeric() {
            tokens[last].push(c);
        } else {
            if !c.is_whitespace() {
                tokens.push(c.into());
            }
            tokens.push(String::new());
        }
    }
    tokens.retain(|token| !token.is_empty());
    tokens
}

/// Every word and punctuation mark that a text, a question or an answer may hold, sorted.
#[must_use]
pub fn vocabulary() -> Vec<String> {
    let mut texts: Vec<&str> = vec![GLUE];
    fn add<T: Copy>(texts: &mut Vec<&str>, all: &[T], words: impl Fn(T) -> &'static [&'static str]) {
        texts.extend(all.iter().flat_map(|&item| words(item)));
    }
    add(&mut texts, Shape::ALL, Shape::words);
    add(&mut texts, Colour::ALL, Colour::words);
    add(&mut texts, Size::ALL, Size::words);
    add(&mut texts, Texture::ALL, Texture::words);
    add(&mut texts, Texture::ALL, Texture::after);
    add(&mut texts, Tint::ALL, Tint::words);
    add(&mut texts, Pattern::ALL, Pattern::words);
    add(&mut texts, Relation::ALL, Relation::words);
    add(&mut texts, Relation::ALL, Relation::after);
    add(&mut texts, Relation::ALL, Relation::most);
    add(&mut texts, Place::ALL, Place::words);
    add(&mut texts, Place::ALL, Place::phrases);
    let tables = [NUMBERS, ORDINALS, THINGS, MANY, GROUNDS, BIGGEST, SMALLEST];
    texts.extend(tables.into_iter().flatten());
    let plurals: Vec<String> = Shape::ALL.iter().map(|&shape| plural(shape)).collect();
    texts.extend(plurals.iter().map(String::as_str));

    let mut words: Vec<String> = texts.into_iter().flat_map(tokens).collect();
    for frame in frames::ALL.iter().copied().flatten() {
        let parts = frame.split_whitespace();
        let parts = parts.filter(|part| !part.starts_with(['{', '_']));
        words.extend(parts.map(str::to_owned));
    }
    words.sort_unstable();
    words.dedup();
    words
}
