//! Captions and phrases.

use super::*;

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
