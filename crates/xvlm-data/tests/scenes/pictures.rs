//! Objects, where they are and how they look.

use super::*;

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
