//! The built-in models in every precision: the same questions, and answers that agree.

use xvlm::data::scenes::{SIDE, Scene, Split};
use xvlm::{AnswerList, Bundled, Compute, Device, Layers, Picture, Precision, Predictor, Ranking};

/// Scenes that are looked at.
const SCENES: u64 = 8;

fn scenes() -> Vec<(Scene, Picture)> {
    let scene = |number| Scene::generate(2022, number, Split::Seen);
    let picture = |scene: &Scene| Picture::from_rgb(SIDE as u32, SIDE as u32, scene.render()).unwrap();
    (0..SCENES).map(scene).map(|scene| (scene.clone(), picture(&scene))).collect()
}

fn open(model: Bundled, precision: Precision) -> Predictor {
    Predictor::bundled_for(model, Compute::on(&Device::Cpu).with(precision)).unwrap()
}

/// Everything that the models say about the scenes.
#[derive(Default)]
struct Said {
    /// From 0 to 1.
    probabilities: Vec<f32>,
    /// Edges in fractions of the picture.
    boxes: Vec<f32>,
    /// Points of heat, in fractions of the picture.
    points: Vec<f32>,
    similarities: Vec<f32>,
    embeddings: Vec<Vec<f32>>,
    captions: Vec<String>,
    answers: Vec<String>,
}

fn say(precision: Precision) -> Said {
    let [general, questions, statements] =
        [Bundled::General, Bundled::Questions, Bundled::Statements].map(|model| open(model, precision));
    assert_eq!(general.model().precision(), precision);
    let (scenes, side) = (scenes(), SIDE as f32);
    let colours = AnswerList::new(questions.model(), ["red", "green", "blue", "yes", "no"].map(String::from).to_vec());
    let colours = colours.unwrap();
    let mut said = Said::default();
    for (at, (scene, picture)) in scenes.iter().enumerate() {
        let view = general.look(picture).unwrap();
        let name =
            |object: &xvlm::data::scenes::Object| format!("the {} {}", object.colour.word(), object.shape.word());
        let names: Vec<String> = scene.objects.iter().map(name).collect();
        let texts: Vec<&str> = names.iter().map(String::as_str).collect();
        for found in view.ground(&texts).unwrap() {
            let b = found.bounds;
            said.boxes.extend([b.xmin, b.ymin, b.xmax, b.ymax].map(|edge| edge / side));
            said.probabilities.extend(found.probability);
        }
        for found in view.matches(&texts).unwrap() {
            said.probabilities.push(found.probability);
            said.similarities.push(found.similarity);
        }
        let heated = view.heat(&texts[..1], Layers::All).unwrap().remove(0);
        said.points.extend(heated.point.map(|at| at / side));
        said.probabilities.push(heated.probability);
        said.embeddings.push(view.embedding().unwrap());
        said.embeddings.extend(general.embed_texts(&texts).unwrap());
        said.captions.push(view.caption().unwrap().text);
        let blank = format!("a ___ {}", scene.objects[0].shape.word());
        said.answers.push(view.fill(&blank, 1).unwrap().remove(0).text());
        said.probabilities.push(view.fill(&blank, 1).unwrap()[0].probability);

        let view = questions.look(picture).unwrap();
        let question = format!("which colour does the {} have ?", scene.objects[0].shape.word());
        said.answers.push(view.answer(&[&question]).unwrap().remove(0).answer);
        let ranked = view.rank_answers(&[&question], &colours, Ranking::default(), 5).unwrap().remove(0);
        said.answers.push(ranked.answers[0].answer.clone());
        let other = &scenes[(at + 1) % scenes.len()].1;
        let judged = statements.judge(picture, other, &["there is a circle in both pictures"]).unwrap().remove(0);
        said.probabilities.push(judged.probability);
    }
    said
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Numbers that are further apart than `tolerance`.
fn apart(found: &[f32], expected: &[f32], tolerance: f32) -> Vec<(f32, f32)> {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().copied().zip(expected.iter().copied());
    pairs.filter(|(found, expected)| (found - expected).abs() > tolerance || !found.is_finite()).collect()
}

fn differing(found: &[String], expected: &[String]) -> usize {
    found.iter().zip(expected).filter(|(found, expected)| found != expected).count()
}

#[test]
fn narrow_numbers_say_what_wide_ones_say() {
    let expected = say(Precision::F32);
    for (precision, of_probabilities) in [(Precision::Bf16, 0.02), (Precision::Int8, 0.06)] {
        let found = say(precision);
        for (what, found, expected, tolerance) in [
            ("probabilities", &found.probabilities, &expected.probabilities, of_probabilities),
            ("boxes", &found.boxes, &expected.boxes, 0.01),
            ("points", &found.points, &expected.points, 0.05),
            ("similarities", &found.similarities, &expected.similarities, 0.02),
        ] {
            let apart = apart(found, expected, tolerance);
            assert!(apart.is_empty(), "{precision}: {what}: {apart:?}");
        }
        for (what, found, expected) in
            [("captions", &found.captions, &expected.captions), ("answers", &found.answers, &expected.answers)]
        {
            assert!(differing(found, expected) <= expected.len() / 4, "{precision}: {what}: {found:?} {expected:?}");
        }
        for (found, expected) in found.embeddings.iter().zip(&expected.embeddings) {
            assert!(cosine(found, expected) > 0.995, "{precision}: {}", cosine(found, expected));
            assert!((cosine(found, found) - 1.0).abs() < 1e-5);
        }
    }
}

#[test]
fn weights_are_the_same_whatever_they_are_computed_in() {
    let [wide, half, bytes] = Precision::ALL.map(|precision| open(Bundled::General, precision));
    assert_eq!(wide.model().fingerprint(), half.model().fingerprint());
    assert_eq!(wide.model().fingerprint(), bytes.model().fingerprint());
    assert_eq!(open(Bundled::General, Precision::default()).model().precision(), Precision::F32);
}
