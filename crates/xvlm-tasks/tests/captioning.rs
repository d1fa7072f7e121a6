//! Captions: how they are written, and how they are evaluated.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm_data::annotations::{CaptionItem, read_captions, read_references};
use xvlm_data::scenes::{self, Split, SynthOptions};
use xvlm_data::{Picture, TextTokenizer};
use xvlm_tasks::captioning::{self, CaptionScores, Writing};
use xvlm_tasks::pretrain::Pretraining;
use xvlm_tasks::{Model, ModelConfig, Sampling, Search, Sweep};
use xvlm_train::Trainable;
use xvlm_weights::StoredType;

/// A tiny model that was never trained.
fn model(dir: &Path) -> Model {
    let tokenizer = TextTokenizer::from_vocabulary(&scenes::vocabulary()).unwrap();
    let sizes = json!({
        "vision_config": {
            "kind": "swin",
            "image_res": 32, "patch_size": 8, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
        },
        "text_config": {
            "vocab_size": tokenizer.vocab_size(), "hidden_size": 16, "num_hidden_layers": 2, "fusion_layer": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 24,
        },
        "embed_dim": 16,
    });
    let sizes = serde_json::from_value(sizes).unwrap();
    let pretraining = Pretraining::new(&sizes, 7, &Device::Cpu).unwrap();
    let config = ModelConfig { max_tokens: 24, ..ModelConfig::of(sizes) };
    let weights = pretraining.parameters().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
    Model::write(&dir.join("model"), &config, weights, &tokenizer, StoredType::F32).unwrap();
    Model::open(&dir.join("model"), &Device::Cpu).unwrap()
}

fn pictures(count: u8) -> Vec<Picture> {
    let picture = |i: u8| Picture::from_rgb(40, 30, (0..40 * 30 * 3).map(|at| (at % 251) as u8 ^ (i * 37)).collect());
    (0..count).map(|i| picture(i).unwrap()).collect()
}

fn writing(model: &Model) -> Writing {
    let search = Search { min_tokens: 2, max_tokens: 6, ..Search::default() };
    Writing { search, ..Writing::of(model.config()) }
}

#[test]
fn what_is_drawn_follows_from_the_seed() {
    let dir = TempDir::new().unwrap();
    let model = model(dir.path());
    let images = model.encode(&pictures(3)).unwrap();
    let draw = |images, seed, sampling| {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        captioning::sample(&model, images, &writing(&model), sampling, 4, rng).unwrap()
    };
    let drawn = draw(&images, 5, Sampling::default());
    assert_eq!(drawn.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 4]);
    assert_eq!(drawn, draw(&images, 5, Sampling::default()));
    assert_ne!(drawn, draw(&images, 6, Sampling::default()));
    assert!(drawn.iter().all(|texts| texts.iter().any(|text| text.text != texts[0].text)), "{drawn:?}");
    // Whatever images come after it: nearly, since products of other sizes round otherwise.
    let alone = model.encode(&pictures(1)).unwrap();
    let first = draw(&alone, 5, Sampling::default()).remove(0);
    assert!(first.iter().zip(&drawn[0]).all(|(a, b)| a.text == b.text && (a.score - b.score).abs() < 1e-4));
    // Of one token there is nothing to draw: the likeliest text.
    let greedy = Writing { search: Search { beams: 1, ..writing(&model).search }, ..writing(&model) };
    let greedy = captioning::caption(&model, &images, &greedy).unwrap();
    let one = draw(&images, 5, Sampling { top_k: 1, ..Sampling::default() });
    assert!(one.iter().zip(&greedy).all(|(texts, greedy)| texts.iter().all(|text| text.text == greedy.text)));
}

#[test]
fn prompts_and_limits_are_heeded_or_refused() {
    let dir = TempDir::new().unwrap();
    let model = model(dir.path());
    let images = model.encode(&pictures(1)).unwrap();
    let of = |writing: &Writing| captioning::caption(&model, &images, writing).map(|mut written| written.remove(0));
    let usual = writing(&model);
    let text = of(&usual).unwrap().text;
    for prompt in ["", "two blue stars"] {
        let other = of(&Writing { prompt: prompt.to_owned(), ..usual.clone() }).unwrap();
        assert!(!other.text.contains("two blue stars"), "{text} {other:?}");
    }
    let refused = |writing: &Writing| of(writing).unwrap_err().to_string();
    let long = Writing { prompt: "a ".repeat(30), ..usual.clone() };
    assert!(refused(&long).contains("prompt: expected fewer than 24 tokens"), "{}", refused(&long));
    for (search, expected) in [
        (Search { beams: 0, ..usual.search }, "beams: expected at least 1"),
        (Search { max_tokens: 0, ..usual.search }, "max_tokens: expected at least 1"),
        (Search { min_tokens: 9, ..usual.search }, "min_tokens: expected at most max_tokens (6), found 9"),
        (Search { repetition_penalty: 0.0, ..usual.search }, "repetition_penalty: expected a positive number"),
    ] {
        let found = refused(&Writing { search, ..usual.clone() });
        assert!(found.contains(expected), "{found}");
    }
    let rng = &mut ChaCha8Rng::seed_from_u64(0);
    let wrong = Sampling { top_p: 2.0, ..Sampling::default() };
    let error = captioning::sample(&model, &images, &usual, wrong, 1, rng).unwrap_err().to_string();
    assert!(error.contains("top_p: expected above 0 and at most 1, found 2"), "{error}");
}

fn world(dir: &Path) -> PathBuf {
    let options = SynthOptions { scenes: 5, seed: 3, split: Split::Seen, embed_images: false };
    scenes::write(&dir.join("world"), &options, &mut |_| ()).unwrap();
    dir.join("world")
}

#[test]
fn a_data_set_is_described_and_scored() {
    let dir = TempDir::new().unwrap();
    let (model, world) = (model(dir.path()), world(dir.path()));
    let writing = writing(&model);
    let mut seen = (0, 0);
    let mut counter = |done, of| seen = (done, of);
    let whole = captioning::evaluate_folder(&model, &world, &writing, 2, &mut Sweep::new(&mut counter)).unwrap();
    assert_eq!((seen, whole.items.len(), whole.checks.len()), ((5, 5), 5, 5));
    let scores = whole.scores.unwrap();
    assert_eq!(scores.count, 5);
    assert!(scores.bleu1 <= 1.0 && scores.cider >= 0.0 && whole.truth.is_some() && whole.left_out.is_empty());

    // One picture is broken, another has no references: both are named, the rest is scored.
    let mut items = read_captions(world.join("captions.json")).unwrap();
    fs::write(&items[1].image, "no picture").unwrap();
    items[3].captions.clear();
    let folder = Some(dir.path().join("answers"));
    let mut counter = |_, _| {};
    let sweep = Sweep { folder, max_bad_fraction: 0.2, ..Sweep::new(&mut counter) };
    let part = captioning::evaluate(&model, items.clone(), &writing, 2, &mut { sweep }).unwrap();
    assert_eq!((part.items.len(), part.answers.len(), part.scores.unwrap().count), (4, 4, 3));
    let named: Vec<usize> = part.left_out.iter().map(|out| out.item).collect();
    assert_eq!(named, [1, 3]);
    assert!(part.left_out[1].problem.contains("image 3: expected reference captions"), "{:?}", part.left_out);

    assert_eq!(part.answers[0].text, whole.answers[0].text);
    assert_eq!(part.answers[1].text, whole.answers[2].text);
    // More broken than may be.
    let error = captioning::evaluate(&model, items.clone(), &writing, 2, &mut Sweep::new(&mut |_, _| {})).unwrap_err();
    assert!(error.to_string().contains("broken"), "{error}");
    // Without any references there are captions, and no scores.
    items.iter_mut().for_each(|item| item.captions.clear());
    let mut counter = |_, _| {};
    let mut sweep = Sweep { max_bad_fraction: 0.2, ..Sweep::new(&mut counter) };
    let bare = captioning::evaluate(&model, items, &writing, 2, &mut sweep).unwrap();
    assert!(bare.scores.is_none() && bare.answers.len() == 4 && bare.left_out.len() == 1);

    let mut results = Vec::new();
    captioning::write_results(&part.items, &part.answers, &mut results).unwrap();
    let results: Value = serde_json::from_slice(&results).unwrap();
    assert_eq!(results.as_array().unwrap().len(), 4);
    assert_eq!(results[1], json!({"image_id": 2, "caption": part.answers[1].text}));
}

#[test]
fn captions_are_scored_as_the_official_evaluation_does() {
    let references =
        [vec!["A red circle.".to_owned(), "The circle, red".to_owned()], vec!["Two blue stars!".to_owned()]];
    let references: Vec<&[String]> = references.iter().map(Vec::as_slice).collect();
    let perfect = CaptionScores::new(&["a red circle", "Two blue stars."], &references).unwrap();
    assert!((perfect.bleu3 - 1.0).abs() < 1e-6 && (perfect.rouge_l - 1.0).abs() < 1e-6, "{perfect:?}");
    let worse = CaptionScores::new(&["a red star", ". . ."], &references).unwrap();
    assert!(worse.cider < perfect.cider && worse.bleu1 < 1.0 && worse.count == 2);
    assert!(CaptionScores::new(&[], &[]).is_err());
    assert!(CaptionScores::new(&["a"], &[&[]]).is_err());
}

#[test]
fn references_can_come_from_a_file_of_their_own() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("gt.json");
    let content = json!({
        "annotations": [
            {"image_id": 9, "caption": "One.", "id": 1},
            {"image_id": 7, "caption": "Two.", "id": 2},
            {"image_id": 9, "caption": "Three.", "id": 3},
        ],
        "images": [{"id": 9}, {"id": 7}],
    });
    fs::write(&file, content.to_string()).unwrap();
    let references = read_references(&file).unwrap();
    assert_eq!(references["9"], ["One.", "Three."]);
    let item = |id: &str, image_index| CaptionItem {
        id: id.to_owned(),
        image: format!("{id}.jpg").into(),
        image_index,
        split: None,
        captions: vec!["Another.".to_owned()],
    };
    // Items of one image are one.
    let items = vec![item("7", 0), item("9", 1), item("7", 0), item("5", 2)];
    let given = captioning::with_references(items.clone(), references.clone(), "gt.json").unwrap();
    let captions: BTreeMap<&str, &[String]> =
        given.iter().map(|item| (item.id.as_str(), item.captions.as_slice())).collect();
    assert_eq!((given.len(), captions["7"], captions["5"].len()), (3, &["Two.".to_owned()][..], 0));
    let error = captioning::with_references(items[..1].to_vec(), references, "gt.json").unwrap_err().to_string();
    assert!(error.starts_with("gt.json: ") && error.contains("1 others, image 9"), "{error}");

    let content =
        json!({"images": [{"id": 3, "sentences": [{"raw": "One."}, {"raw": "Two."}]}, {"id": 4, "sentences": []}]});
    fs::write(&file, content.to_string()).unwrap();
    assert_eq!(read_references(&file).unwrap()["3"], ["One.", "Two."]);
    fs::write(&file, "{\"images\": []}").unwrap();
    let error = read_references(&file).unwrap_err().to_string();
    assert!(error.contains("annotations"), "{error}");
    fs::write(&file, "{\"annotations\": [{\"image_id\": 9}]}").unwrap();
    assert!(read_references(&file).unwrap_err().to_string().contains("caption"));
}
