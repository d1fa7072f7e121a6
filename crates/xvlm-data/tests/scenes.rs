//! The synthetic world keeps its promises. What the texts say is read anew here, from their words
//! and with plain geometry, independently of the code that wrote them.

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

// --- the world ----------------------------------------------------------------------------------

#[test]
fn the_same_seed_gives_the_same() {
    for split in SPLITS {
        for index in [0, 1, 17, 1 << 40] {
            let (one, two) = (Scene::generate(3, index, split), Scene::generate(3, index, split));
            assert_eq!(one, two);
            assert_eq!(one.render(), two.render());
            assert_eq!(texts(&one, &two, &mut rng(1)), texts(&one, &two, &mut rng(1)));
            assert_ne!(one.objects, Scene::generate(4, index, split).objects);
            assert_ne!(one.objects, Scene::generate(3, index + 1, split).objects);
        }
    }
}

#[test]
fn scenes_are_fair() {
    for split in SPLITS {
        let (mut shared, mut all) = (0, 0);
        for scene in scenes(500, split) {
            assert!((3..=5).contains(&scene.objects.len()));
            for object in &scene.objects {
                let [x, y, width, height] = object.bbox;
                assert!(x >= 0.0 && y >= 0.0, "{object:?}");
                assert!(x + width <= SIDE as f32 && y + height <= SIDE as f32, "{object:?}");
                let range = match object.size {
                    Size::Small => 34.0..=40.0,
                    Size::Medium => 48.0..=56.0,
                    Size::Large => 66.0..=76.0,
                };
                assert!(range.contains(&width.max(height)), "{object:?}");
            }
            let salient = scene.salient();
            assert!(Relation::between(salient[0], salient[1]).is_some());
            let shares = |i: usize, o: &Object| {
                let later = scene.objects[i + 1..].iter();
                later.filter(|p| p.shape == o.shape || p.colour == o.colour).count() > 0
            };
            shared += usize::from(scene.objects.iter().enumerate().any(|(i, o)| shares(i, o)));
            all += 1;
        }
        assert!(shared * 2 > all, "{shared} of {all} scenes have distractors");
    }
}

#[test]
fn held_out_pairs_are_held_out() {
    for values in [HELD_OUT.map(|pair| pair.0 as usize), HELD_OUT.map(|pair| pair.1 as usize)] {
        assert_eq!(BTreeSet::from(values).len(), 8);
    }
    let held_out = |scene: &Scene| scene.objects.iter().filter(|o| o.is_held_out()).count();
    assert!(scenes(2000, Split::Seen).all(|scene| held_out(&scene) == 0));
    assert!(scenes(2000, Split::Unseen).all(|scene| held_out(&scene) >= 2));

    // Nor does a text of a seen scene speak of them, not even to deny them.
    let pairs = HELD_OUT.iter().flat_map(|&(colour, shape)| {
        let names = shape.words().iter();
        names.map(move |name| format!(" {} {name} ", colour.word()))
    });
    let pairs: Vec<String> = pairs.collect();
    let all: Vec<Scene> = scenes(200, Split::Seen).collect();
    let mut rng = rng(5);
    for two in all.windows(2) {
        for text in texts(&two[0], &two[1], &mut rng) {
            let spaced = format!(" {} ", split(&text).join(" "));
            assert!(!pairs.iter().any(|pair| spaced.contains(pair)), "{text}");
        }
    }
}

/// Which pixels an object changes.
fn drawn(scene: &Scene) -> Vec<bool> {
    let empty = Scene { objects: Vec::new(), ..scene.clone() };
    let (with, without) = (scene.render(), empty.render());
    with.chunks(3).zip(without.chunks(3)).map(|(a, b)| a != b).collect()
}

fn alone(object: Object) -> Scene {
    let background = Background { colour: Tint::White, pattern: Pattern::Plain };
    Scene { id: 0, background, objects: vec![object] }
}

#[test]
fn boxes_are_tight() {
    let mut boxes = BTreeSet::new();
    for object in scenes(1500, Split::Unseen).flat_map(|scene| scene.objects) {
        let [x, y, width, height] = object.bbox.map(|value| value as usize);
        if !boxes.insert((object.shape, width, height)) {
            continue;
        }
        let drawn = drawn(&alone(object));
        let at = |i: usize| (i % SIDE, i / SIDE);
        let pixels: Vec<_> = (0..drawn.len()).filter(|&i| drawn[i]).map(at).collect();
        let left = pixels.iter().map(|p| p.0).min().unwrap();
        let right = pixels.iter().map(|p| p.0).max().unwrap();
        let top = pixels.iter().map(|p| p.1).min().unwrap();
        let bottom = pixels.iter().map(|p| p.1).max().unwrap();
        let found = [left, top, right + 1 - left, bottom + 1 - top];
        assert_eq!(found, [x, y, width, height], "{object:?}");
    }
    assert!(boxes.len() > 150, "{} boxes", boxes.len());
}

#[test]
fn objects_are_visible() {
    for scene in scenes(60, Split::Seen) {
        let masks: Vec<Vec<bool>> = scene.objects.iter().map(|&o| drawn(&alone(o))).collect();
        for (i, mask) in masks.iter().enumerate() {
            let hidden = |p: &usize| masks[i + 1..].iter().any(|later| later[*p]);
            let all: Vec<usize> = (0..mask.len()).filter(|&p| mask[p]).collect();
            let covered = all.iter().filter(|p| hidden(p)).count();
            assert!(covered * 100 <= 28 * all.len(), "object {i} of {scene:?}");
        }
    }
}

// --- texts --------------------------------------------------------------------------------------

#[test]
fn the_vocabulary_is_closed() {
    let vocabulary = vocabulary();
    assert!(vocabulary.is_sorted() && vocabulary.len() > 200, "{}", vocabulary.len());
    let (known, mut used) = (BTreeSet::from_iter(&vocabulary), BTreeSet::new());
    let mut rng = rng(2);
    for split_ in SPLITS {
        let all: Vec<Scene> = scenes(1000, split_).collect();
        for two in all.windows(2) {
            for text in texts(&two[0], &two[1], &mut rng) {
                for word in split(&text) {
                    assert!(known.contains(&word), "{word:?} of {text:?}");
                    used.insert(word);
                }
            }
        }
    }
    let idle: Vec<&&String> = known.iter().filter(|word| !used.contains(**word)).collect();
    // Numbers and ordinals beyond what occurs.
    assert!(idle.len() <= 10, "{idle:?} are never used");
}

#[test]
fn captions_are_right_and_wrong_ones_are_found_out() {
    let mut rng = rng(3);
    for scene in SPLITS.into_iter().flat_map(|split| scenes(1500, split)) {
        let mut captions = scene.captions(&mut rng);
        captions.extend(scene.retrieval_captions(&mut rng));
        captions.push(scene.relation_caption(&mut rng));
        for caption in captions {
            let check = check_caption(&scene, &caption);
            // A list tells no relation.
            let told = check.relation_right || !relation_told(&caption);
            let right = check.objects_right && check.colours_right && check.details_right && told;
            assert!(right, "{caption}\n{check:?}\n{scene:?}");
            assert!(check.mentions.iter().all(|mention| mention.object.is_some()));
        }
        let canonical = scene.canonical_caption();
        assert!(check_caption(&scene, &canonical).all_right(), "{canonical}");
        assert!(split(&canonical).len() <= 16);

        let [first, second] = [scene.salient()[0], scene.salient()[1]];
        let said = |o: &Object| format!("{} {}", o.colour.word(), o.shape.word());
        let relation = Relation::between(first, second).unwrap();
        let say = |one: &str, relation: Relation, two: &str| {
            check_caption(&scene, &format!("a {one} {} a {two}", relation.word()))
        };
        let (one, two) = (said(first), said(second));
        let label = |o: &Object| Noun { colour: Some(o.colour), shape: Some(o.shape), ..Noun::default() };
        if scene.count(label(first)) == 1 && scene.count(label(second)) == 1 {
            let inverted = say(&one, relation.inverse(), &two);
            assert!(inverted.colours_right && !inverted.relation_right && !inverted.all_right());
            let exchanged = say(&two, relation, &one);
            assert!(exchanged.colours_right && !exchanged.relation_right);
        }
        let absent = |has: &dyn Fn(&Object, Colour) -> bool| {
            let colours = Colour::ALL.iter().copied();
            let mut absent = colours.filter(|&c| !scene.objects.iter().any(|o| has(o, c)));
            absent.next().unwrap()
        };
        let wrong = absent(&|o, c| o.colour == c && o.shape == first.shape);
        let recoloured = say(&format!("{} {}", wrong.word(), first.shape.word()), relation, &two);
        assert!(recoloured.objects_right && !recoloured.colours_right && !recoloured.all_right());
        let shapes = Shape::ALL.iter();
        let wrong = shapes.copied().find(|s| scene.objects.iter().all(|o| o.shape != *s)).unwrap();
        let reshaped = say(&format!("{} {}", first.colour.word(), wrong.word()), relation, &two);
        assert!(!reshaped.objects_right && !reshaped.all_right());
        let sizes = Size::ALL.iter().copied();
        let wrong = sizes.filter(|&s| scene.count(Noun { size: Some(s), ..label(first) }) == 0);
        for wrong in wrong {
            let resized = say(&format!("{} {one}", wrong.word()), relation, &two);
            assert!(resized.relation_right && !resized.details_right && !resized.all_right());
        }
        assert!(!check_caption(&scene, &format!("a {one} and a {two}")).all_right());
        assert!(!check_caption(&scene, &format!("a {one}")).all_right());
        assert!(!check_caption(&scene, &format!("{canonical} left of")).all_right());
        assert!(!check_caption(&scene, &format!("{canonical} and {canonical}")).all_right());
    }
}

fn relation_told(caption: &str) -> bool {
    let after = ["to its", "on its", "above it", "over it", "below it", "under it", "beneath it"];
    let words = Relation::ALL.iter().flat_map(|relation| relation.words());
    let caption = format!(" {caption} ");
    words.chain(&after).any(|words| caption.contains(&format!(" {words} ")))
}

#[test]
fn any_text_can_be_checked() {
    let vocabulary = vocabulary();
    let mut rng = rng(4);
    let empty = Scene { objects: Vec::new(), ..Scene::generate(0, 0, Split::Seen) };
    let full = Scene::generate(1, 1, Split::Seen);
    for scene in [&empty, &alone(full.objects[0]), &full] {
        for _ in 0..3000 {
            let count = rng.random_range(0..30);
            let words = (0..count).filter_map(|_| vocabulary.choose(&mut rng));
            let text = words.map(String::as_str).collect::<Vec<_>>().join(" ");
            let check = check_caption(scene, &text);
            assert!(!check.all_right() || !check.mentions.is_empty());
        }
        for text in ["", "   ", "…", "Ünïcödé 🟥 İ", "a red", "left of", "to its left", "with stripes"] {
            assert!(!check_caption(scene, text).all_right());
        }
        texts(scene, &full, &mut rng);
        texts(&full, scene, &mut rng);
    }
}

#[test]
fn referring_expressions_refer() {
    let (mut rng, mut kinds) = (rng(6), [0usize; 3]);
    for scene in SPLITS.into_iter().flat_map(|split| scenes(1000, split)) {
        let expressions = scene.referring_expressions(2, &mut rng);
        let named: BTreeSet<usize> = expressions.iter().map(|e| e.object).collect();
        assert!(named.len() + 2 >= scene.objects.len(), "few are named in {scene:?}");
        for expression in expressions {
            let found = referents(&scene, &read(&expression.text));
            assert_eq!(found, [expression.object], "{} in {scene:?}", expression.text);
            assert_eq!(expression.phrase.selects(&scene), Some(expression.object));
            kinds[match expression.kind {
                ExpressionKind::Attribute => 0,
                ExpressionKind::Relation => 1,
                ExpressionKind::Ordinal => 2,
            }] += 1;
        }
    }
    let all: usize = kinds.iter().sum();
    for (count, share) in kinds.into_iter().zip([60, 25, 15]) {
        assert!((count * 100 / all).abs_diff(share) <= 5, "{kinds:?}");
    }
}

#[test]
fn answers_are_right() {
    let (mut rng, known) = (rng(8), answers());
    let (mut yes, mut no, mut checked) = (0usize, 0usize, BTreeSet::new());
    for scene in SPLITS.into_iter().flat_map(|split| scenes(700, split)) {
        for question in scene.questions(&mut rng) {
            let text = &question.question;
            assert!(known.binary_search(&question.answer).is_ok(), "{question:?}");
            yes += usize::from(question.answer == "yes");
            no += usize::from(question.answer == "no");
            let tokens = read(text);
            let relation_at = tokens.iter().position(|token| token.starts_with("relation:"));
            let fitting = scene.objects.iter().filter(|object| is(&tokens, object)).count();
            // “is … larger than …”, “which is larger , … or …”, “do … and … have …”
            let two = |by: &[&str]| {
                let from = tokens.iter().position(|t| t == ",").map_or(0, |at| at + 1);
                let tokens = &tokens[from..];
                let at = tokens.iter().position(|token| by.contains(&token.as_str())).unwrap();
                (referent(&scene, &tokens[..at]), referent(&scene, &tokens[at..]))
            };
            let yes_no = |is: bool| (if is { "yes" } else { "no" }).to_owned();
            let expected = match question.kind {
                "exists" => yes_no(fitting > 0),
                "count" => ["zero", "one", "two", "three", "four", "five"][fitting].to_owned(),
                "colour" => referent(&scene, &tokens).colour.word().to_owned(),
                "shape" => referent(&scene, &tokens).shape.word().to_owned(),
                "size" => {
                    let tokens = read(&text.replace("how big", "").replace("how large", ""));
                    referent(&scene, &tokens).size.word().to_owned()
                }
                "texture" => {
                    let tokens = read(&text.replace("solid , striped or dotted", ""));
                    referent(&scene, &tokens).texture.word().to_owned()
                }
                "is texture" => {
                    let at = tokens.len() - 2;
                    let texture = tokens[at].strip_prefix("texture:").unwrap();
                    yes_no(referent(&scene, &tokens[..at]).texture.word() == texture)
                }
                "place" => place(referent(&scene, &read(text.split("is the").nth(1).unwrap()))).replace('-', " "),
                "related" => {
                    let tokens = &tokens[relation_at.unwrap()..];
                    referent(&scene, tokens).shape.word().to_owned()
                }
                "is related" => {
                    let at = relation_at.unwrap();
                    let one = referent(&scene, &tokens[..at]);
                    let two = referent(&scene, &tokens[at + 1..]);
                    let to = relation(&tokens[at][9..]);
                    let distance = key(two, to) - key(one, to);
                    assert!(distance.abs() >= 24.0, "{text}");
                    yes_no(distance > 0.0)
                }
                "compare" => {
                    let by = ["larger", "bigger", "smaller"];
                    let (one, two) = two(&by);
                    let larger = !tokens.contains(&"smaller".to_owned());
                    assert_ne!(one.size, two.size);
                    yes_no((one.size > two.size) == larger)
                }
                "which" => {
                    let (one, two) = two(&["or"]);
                    let larger = !tokens.contains(&"smaller".to_owned());
                    let found = if (one.size > two.size) == larger { one } else { two };
                    format!("{} {}", found.colour.word(), found.shape.word())
                }
                "same colour" => {
                    let (one, two) = two(&["and"]);
                    yes_no(one.colour == two.colour)
                }
                "background" => scene.background.colour.word().to_owned(),
                kind => panic!("{kind} is not known here"),
            };
            assert_eq!(question.answer, expected, "{text} of {scene:?}");
            checked.insert(question.kind);
        }
    }
    assert_eq!(checked.len(), 14, "{checked:?}");
    assert!(yes.abs_diff(no) * 20 < yes + no, "{yes} yes, {no} no");
}

#[test]
fn blanks_have_one_answer() {
    let words = |kind: &str| -> Vec<&str> {
        match kind {
            "colour" => Colour::ALL.iter().map(|c| c.word()).collect(),
            "shape" => Shape::ALL.iter().map(|s| s.word()).collect(),
            "texture" => Texture::ALL.iter().map(|t| t.word()).collect(),
            "size" => Size::ALL.iter().map(|s| s.word()).collect(),
            _ => vec!["left", "right", "above", "below"],
        }
    };
    let (mut rng, mut kinds) = (rng(9), BTreeSet::new());
    for scene in SPLITS.into_iter().flat_map(|split| scenes(700, split)) {
        for fill in scene.fill_phrases(&mut rng) {
            assert_eq!(fill.text.matches("___").count(), 1);
            assert!(fill.answers.iter().all(|answer| split(answer) == [answer.as_str()]));
            kinds.insert(fill.kind);
            if fill.kind == "count" {
                let tokens = read(&fill.text);
                let count = scene.objects.iter().filter(|object| is(&tokens, object)).count();
                assert_eq!(fill.answers, [["two", "three", "four", "five"][count - 2]]);
                continue;
            }
            let fits = |word: &str| check_caption(&scene, &fill.text.replace("___", word)).all_right();
            for answer in &fill.answers {
                assert!(fits(answer), "{fill:?} with {answer}");
            }
            let mut fitting = words(fill.kind);
            fitting.retain(|word| fits(word));
            assert_eq!(fitting, [fill.answers[0].as_str()], "{fill:?} of {scene:?}");
        }
    }
    assert_eq!(kinds.len(), 6);
}

#[test]
fn statements_about_two_are_right() {
    let (mut rng, mut labels) = (rng(10), [0usize; 2]);
    for split_ in SPLITS {
        let all: Vec<Scene> = scenes(700, split_).collect();
        for two in all.windows(2) {
            for statement in statements(&two[0], &two[1], 3, &mut rng) {
                let text = &statement.sentence;
                let has = |words: &[&str]| words.iter().any(|words| text.contains(words));
                // Only the noun is to be read, not the sides.
                let noun = read(&text.replace("left", "").replace("right", ""));
                let counts = [&two[0], &two[1]].map(|scene| scene.objects.iter().filter(|o| is(&noun, o)).count());
                let right = text.find("right");
                let side = usize::from(right.is_some_and(|at| text.find("left").is_none_or(|l| at < l)));
                let numbers = ["zero", "one", "two", "three", "four", "five"];
                let number = || {
                    let text = text.replace("two images", "");
                    let mut words = text.split(' ');
                    words.find_map(|word| numbers.iter().position(|&n| n == word)).unwrap()
                };
                let there = counts.iter().filter(|&&count| count > 0).count();
                let truth = if has(&["both images", "each"]) {
                    there == 2
                } else if has(&["at least one", "one or both"]) {
                    there >= 1
                } else if has(&["exactly one image", "only one"]) {
                    there == 1
                } else if has(&["neither", "none"]) {
                    there == 0
                } else if has(&["in total", "together"]) {
                    counts[0] + counts[1] == number()
                } else if has(&["more"]) {
                    counts[side] > counts[1 - side]
                } else if has(&["exactly", "there are"]) {
                    counts[side] == number()
                } else if has(&[" not ", " no "]) {
                    counts[side] == 0
                } else {
                    counts[side] > 0
                };
                assert_eq!(statement.label, truth, "{text}");
                labels[usize::from(truth)] += 1;
            }
        }
    }
    assert!(labels[0].abs_diff(labels[1]) * 20 < labels[0] + labels[1], "{labels:?}");
}

#[test]
fn retrieval_captions_fit_their_picture_only() {
    let (mut rng, all) = (rng(11), scenes(200, Split::Seen).collect::<Vec<_>>());
    let (mut captions, mut strangers) = (0, 0);
    for (i, scene) in all.iter().enumerate() {
        for caption in scene.retrieval_captions(&mut rng).iter().take(2) {
            assert!(split(caption).len() <= 32, "{caption}");
            assert_eq!(check_caption(scene, caption).mentions.len(), scene.objects.len());
            let mut others = all.iter().enumerate().filter(|(j, _)| i != *j);
            strangers += usize::from(others.any(|(_, o)| check_caption(o, caption).all_right()));
            captions += 1;
        }
    }
    assert!(strangers * 200 <= captions, "{strangers} of {captions} fit another picture");
}

// --- files --------------------------------------------------------------------------------------

fn options(embed_images: bool) -> SynthOptions {
    SynthOptions { scenes: 24, seed: 5, split: Split::Unseen, embed_images }
}

/// All files below a folder with what is in them.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            found.push((name, std::fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn files_are_what_the_readers_expect() {
    let folder = tempfile::tempdir().unwrap();
    for embed_images in [false, true] {
        let out = folder.path().join(format!("deep/scenes-{embed_images}"));
        let mut done = Vec::new();
        write(&out, &options(embed_images), &mut |count| done.push(count)).unwrap();
        assert_eq!(done.last(), Some(&24));

        let all = read_scenes(out.join("scenes.json")).unwrap();
        let expected: Vec<Scene> = (0..24).map(|i| Scene::generate(5, i, Split::Unseen)).collect();
        assert_eq!(all, expected);

        let records = read_jsonl(out.join("pretrain.jsonl")).unwrap();
        let retrieval = annotations::read_retrieval(out.join("retrieval.json")).unwrap();
        let captions = annotations::read_captions(out.join("captions.json")).unwrap();
        assert_eq!([records.len(), retrieval.len(), captions.len()], [24; 3]);
        for (i, scene) in all.iter().enumerate() {
            assert_eq!(records[i].captions[0], scene.canonical_caption());
            assert_eq!(captions[i].captions[0], scene.canonical_caption());
            assert_eq!([captions[i].captions.len(), retrieval[i].captions.len()], [5, 5]);
            assert_eq!(records[i].elems.len(), scene.objects.len());
            assert!(!records[i].questions.is_empty());
            for (element, object) in records[i].elems.iter().zip(&scene.objects) {
                assert_eq!(element.bbox, object.bbox);
                assert_eq!(element.attributes.len(), 3);
                assert!(element.texts.len() >= 3);
            }
            let picture = image::open(&retrieval[i].image).unwrap().into_rgb8();
            assert_eq!(picture.into_raw(), scene.render());
        }
        let vqa = annotations::read_vqa(out.join("vqa.json")).unwrap();
        assert!(vqa.len() > 24 * 8);
        let fill = annotations::read_fill(out.join("fill.json")).unwrap();
        assert!(fill.len() > 24 * 3);
        let grounding = annotations::read_grounding(out.join("grounding.json")).unwrap();
        assert!(grounding.len() > 24 * 2);
        let images = vqa.iter().map(|item| &item.image).chain(grounding.iter().map(|i| &i.image));
        assert!(images.chain(fill.iter().map(|item| &item.image)).all(|image| image.is_file()));
        let ids: BTreeSet<&String> = grounding.iter().map(|item| &item.ref_id).collect();
        assert_eq!(ids.len(), grounding.len());
        let json = |name: &str| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(out.join(name)).unwrap()).unwrap()
        };
        assert_eq!(json("answer_list.json").as_array().unwrap().len(), answers().len());
        for pair in json("nlvr.json").as_array().unwrap() {
            assert!(pair["label"] == "True" || pair["label"] == "False");
            assert!(out.join(pair["images"][1].as_str().unwrap()).is_file());
        }
    }
}

#[test]
fn writing_is_repeatable_and_all_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    std::fs::create_dir(&one).unwrap();
    write(&one, &options(true), &mut |_| ()).unwrap();
    write(&two, &options(true), &mut |_| ()).unwrap();
    assert_eq!(contents(&one), contents(&two));

    // Written already, or in the way: refused, and nothing is left behind.
    let error = write(&one, &options(true), &mut |_| ()).unwrap_err();
    assert!(matches!(error, DataError::Config { field: "out", .. }), "{error}");
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(write(&file, &options(true), &mut |_| ()).is_err());
    assert!(write(Path::new("/"), &options(true), &mut |_| ()).is_err());
    assert_eq!(contents(&one), contents(&two));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);

    let none = SynthOptions { scenes: 0, ..options(true) };
    let out = folder.path().join("none");
    write(&out, &none, &mut |_| ()).unwrap();
    assert!(read_scenes(out.join("scenes.json")).unwrap().is_empty());
    assert!(read_scenes(folder.path().join("nowhere")).is_err());
    assert!(read_scenes(&file).is_err());
}
