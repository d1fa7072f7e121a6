//! The synthetic world keeps its promises. What the texts say is read anew here, from their words
//! and with plain geometry, independently of the code that wrote them.

mod files;
mod pictures;
mod questions;
mod words;

use std::collections::BTreeSet;
use std::path::Path;

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_data::scenes::{
    Background, Colour, ExpressionKind, HELD_OUT, Noun, Object, Pattern, Place, Relation, SIDE, Scene, Shape, Size,
    Split, SynthOptions, Texture, Tint, answers, check_caption, read_scenes, statements, vocabulary, write,
};
use xvlm_data::{DataError, annotations, read_jsonl};

const SPLITS: [Split; 2] = [Split::Seen, Split::Unseen];

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn scenes(count: u64, split: Split) -> impl Iterator<Item = Scene> {
    (0..count).map(move |index| Scene::generate(7, index, split))
}

/// Every text about a scene and its successor.
fn texts(scene: &Scene, next: &Scene, rng: &mut ChaCha8Rng) -> Vec<String> {
    let mut texts = scene.captions(rng);
    texts.extend(scene.retrieval_captions(rng));
    texts.push(scene.relation_caption(rng));
    for i in 0..scene.objects.len() {
        texts.extend(scene.region_descriptions(i, rng));
        texts.extend(scene.attributes(i));
    }
    texts.extend(scene.referring_expressions(3, rng).into_iter().map(|e| e.text));
    let questions = scene.questions(rng).into_iter();
    texts.extend(questions.flat_map(|q| [q.question, q.answer]));
    let fills = scene.fill_phrases(rng).into_iter();
    texts.extend(fills.map(|fill| fill.text.replace("___", &fill.answers.join(" "))));
    texts.extend(statements(scene, next, 4, rng).into_iter().map(|s| s.sentence));
    texts
}

/// As BERT's basic tokenizer splits.
fn split(text: &str) -> Vec<String> {
    let mut spaced = String::new();
    for c in text.to_lowercase().chars() {
        match c {
            c if c.is_alphanumeric() || c.is_whitespace() => spaced.push(c),
            c => spaced.extend([' ', c, ' ']),
        }
    }
    spaced.split_whitespace().map(str::to_owned).collect()
}

// --- reading texts ------------------------------------------------------------------------------

/// What a text says of one object.
fn is(tokens: &[String], object: &Object) -> bool {
    tokens.iter().all(|token| match token.split_once(':') {
        Some(("shape", word)) => word == object.shape.word(),
        Some(("colour", word)) => word == object.colour.word(),
        Some(("size", word)) => word == object.size.word(),
        Some(("texture", word)) => word == object.texture.word(),
        _ => true,
    })
}

/// Replaces what the words mean: “the big disc over a ring” → `the size:large shape:circle
/// relation:above a shape:ring`.
fn read(text: &str) -> Vec<String> {
    let mut table: Vec<(String, String)> = Vec::new();
    let mut add = |words: &[&str], meaning: &str| {
        let meaning = meaning.replace(' ', "-");
        table.extend(words.iter().map(|word| (format!(" {word} "), format!(" {meaning} "))));
    };
    for shape in Shape::ALL {
        let (word, s) = (shape.word(), if *shape == Shape::Cross { "es" } else { "s" });
        add(shape.words(), &format!("shape:{word}"));
        add(&[&format!("{word}{s}")], &format!("shape:{word}"));
    }
    Colour::ALL.iter().for_each(|c| add(c.words(), &format!("colour:{}", c.word())));
    Size::ALL.iter().for_each(|s| add(s.words(), &format!("size:{}", s.word())));
    Texture::ALL.iter().for_each(|t| add(t.words(), &format!("texture:{}", t.word())));
    add(&["with stripes", "that has stripes"], "texture:striped");
    add(&["with dots", "with spots", "that has dots"], "texture:dotted");
    Relation::ALL.iter().for_each(|r| add(r.words(), &format!("relation:{}", r.word())));
    add(&["largest", "biggest"], "extreme:large");
    add(&["smallest", "tiniest"], "extreme:small");
    add(&["leftmost"], "most:left of");
    add(&["rightmost"], "most:right of");
    add(&["topmost", "highest", "uppermost"], "most:above");
    add(&["lowest", "bottommost"], "most:below");
    add(&["from the left"], "from:left of");
    add(&["from the right"], "from:right of");
    add(&["from the top"], "from:above");
    add(&["from the bottom"], "from:below");
    for (before, after) in
        [("at the ", ""), ("on the ", ""), ("in the ", ""), ("near the ", " edge"), ("in the ", " corner")]
    {
        for place in Place::ALL {
            for word in place.words() {
                add(&[&format!("{before}{word}{after}")], &format!("place:{}", place.word()));
            }
        }
    }
    table.sort_by_key(|(words, _)| std::cmp::Reverse(words.len()));
    // Twice the spaces, so that neighbours do not share one.
    let mut text = format!("  {}  ", split(text).join("  "));
    for (words, meaning) in table {
        text = text.replace(&words.trim().replace(' ', "  ").pipe(|w| format!(" {w} ")), &meaning);
    }
    text.split_whitespace().map(str::to_owned).collect()
}

trait Pipe: Sized {
    fn pipe<T>(self, f: impl FnOnce(Self) -> T) -> T {
        f(self)
    }
}

impl Pipe for String {}

fn told<'a>(tokens: &'a [String], kind: &str) -> Option<&'a str> {
    let mut found = tokens.iter().filter_map(|token| token.strip_prefix(kind)?.strip_prefix(':'));
    found.next()
}

fn relation(word: &str) -> Relation {
    let is = |relation: &&Relation| relation.word().replace(' ', "-") == word;
    *Relation::ALL.iter().find(is).unwrap()
}

/// Smaller is more `to`.
fn key(object: &Object, to: Relation) -> f32 {
    let [x, y] = object.centre();
    match to {
        Relation::Left => x,
        Relation::Right => -x,
        Relation::Above => y,
        Relation::Below => -y,
    }
}

fn third(at: f32) -> usize {
    (at / (SIDE as f32 / 3.0)) as usize
}

fn place(object: &Object) -> String {
    let [x, y] = object.centre();
    Place::ALL[3 * third(y) + third(x)].word().replace(' ', "-")
}

/// All objects that a definite phrase may be taken for, in the loosest reading.
fn referents(scene: &Scene, tokens: &[String]) -> Vec<usize> {
    let relation_at = tokens.iter().position(|token| token.starts_with("relation:"));
    let (noun, anchor) = match relation_at {
        Some(at) => (&tokens[..at], Some((relation(&tokens[at][9..]), &tokens[at + 1..]))),
        None => (tokens, None),
    };
    let objects = scene.objects.iter().enumerate();
    let mut fitting: Vec<usize> = objects.filter(|(_, o)| is(noun, o)).map(|(i, _)| i).collect();
    if let Some((to, anchor)) = anchor {
        let anchors = referents(scene, anchor);
        assert_eq!(anchors.len(), 1, "{anchor:?}");
        let anchor = &scene.objects[anchors[0]];
        fitting.retain(|&i| key(&scene.objects[i], to) < key(anchor, to));
    }
    if let Some(to) = told(noun, "most") {
        let to = relation(to);
        let best = fitting.iter().map(|&i| key(&scene.objects[i], to)).fold(f32::MAX, f32::min);
        fitting.retain(|&i| key(&scene.objects[i], to) < best + 13.0);
    }
    if let Some(to) = told(noun, "from") {
        let to = relation(to);
        fitting.sort_by(|&i, &j| key(&scene.objects[i], to).total_cmp(&key(&scene.objects[j], to)));
        let rank = 1 + usize::from(noun.contains(&"third".to_owned()));
        fitting = vec![fitting[rank]];
    }
    if let Some(end) = told(noun, "extreme") {
        let sizes = fitting.iter().map(|&i| scene.objects[i].size);
        let size = if end == "large" { sizes.max() } else { sizes.min() };
        fitting.retain(|&i| Some(scene.objects[i].size) == size);
    }
    if let Some(told) = told(noun, "place") {
        fitting.retain(|&i| place(&scene.objects[i]) == told);
    }
    fitting
}

fn referent<'a>(scene: &'a Scene, text: &[String]) -> &'a Object {
    let found = referents(scene, text);
    assert_eq!(found.len(), 1, "{text:?} in {scene:?}");
    &scene.objects[found[0]]
}

fn alone(object: Object) -> Scene {
    let background = Background { colour: Tint::White, pattern: Pattern::Plain };
    Scene { id: 0, background, objects: vec![object] }
}
