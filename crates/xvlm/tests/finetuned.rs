//! Fine-tuning from the bundled model makes it better at each task: on a few pictures, which it learns by heart.
#![cfg(feature = "bundled")]

use std::path::PathBuf;
use std::sync::LazyLock;

use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm::data::annotations::{read_captions, read_grounding, read_nlvr, read_retrieval, read_vqa};
use xvlm::data::scenes::{self, Split, SynthOptions};
use xvlm::tasks::captioning::Writing;
use xvlm::tasks::finetune;
use xvlm::tasks::{FinetuneConfig, Model, Session, Sweep, captioning, grounding, nlvr, retrieval, vqa};
use xvlm::train::Silent;
use xvlm::{Bundled, Device};

static WORLD: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = TempDir::new().unwrap();
    let options = SynthOptions { scenes: 16, seed: 11, split: Split::Seen, embed_images: false };
    scenes::write(&dir.path().join("world"), &options, &mut |_| ()).unwrap();
    dir
});

fn file(name: &str) -> PathBuf {
    WORLD.path().join("world").join(name)
}

/// The preset of the built-in world for a task, on a few pictures.
fn config(preset: &str, annotations: &str, roots: &[&str], iterations: u64) -> FinetuneConfig {
    let set = |field: &str, value: Value| format!("{field}={value}");
    let mut overrides = vec![
        set("task.train_file", json!([file(annotations)])),
        set("train.iterations", json!(iterations)),
        set("train.schedule.warmup", json!(5)),
        set("train.tensorboard", json!(false)),
        set("train.keep_best", json!(false)),
        set("data.batch_size", json!(8)),
    ];
    overrides.extend(roots.iter().map(|root| set(&format!("task.{root}"), json!(file("")))));
    FinetuneConfig::preset(preset, &overrides).unwrap()
}

/// What a score of the task's model is before training, and after.
fn scores(config: &FinetuneConfig, score: impl Fn(&Model, &mut Sweep) -> f64) -> (f64, f64) {
    let start = Bundled::General.files().unwrap();
    let mut untrained = config.clone();
    let train = untrained.train.as_mut().unwrap();
    train.iterations = 1;
    train.optimizer.lr = 1e-12;
    let of = |config: &FinetuneConfig| {
        let out = TempDir::new().unwrap();
        let session = Session::alone(false);
        finetune::run(config, Some(&start), out.path(), &session, &Device::Cpu, &mut Silent).unwrap();
        let model = Model::open(&out.path().join("model"), &Device::Cpu).unwrap();
        score(&model, &mut Sweep::new(&mut |_, _| {}))
    };
    (of(&untrained), of(config))
}

#[test]
fn retrieval() {
    // Short captions, of which many fit several pictures.
    let config = config("scenes-retrieval", "captions.json", &["image_root"], 40);
    let items: Vec<_> = read_retrieval(file("captions.json")).unwrap();
    let (before, after) = scores(&config, |model, sweep| {
        retrieval::evaluate(model, &items, retrieval::Options::new(4), sweep).unwrap().scores.r_mean
    });
    assert!(after > before, "{before} to {after}");
}

#[test]
fn questions() {
    let config = config("scenes-vqa", "vqa.json", &["vqa_root", "vg_root"], 60);
    let items = read_vqa(file("vqa.json")).unwrap();
    let (before, after) = scores(&config, |model, sweep| {
        let done = vqa::evaluate(model, items.clone(), &vqa::Options::default(), sweep).unwrap();
        done.scores.exact.unwrap().right
    });
    assert!(after > before + 20.0, "{before} to {after}");
}

#[test]
fn statements() {
    let config = config("scenes-nlvr2", "nlvr.json", &["image_root"], 60);
    let items = read_nlvr(file("nlvr.json")).unwrap();
    let (before, after) = scores(&config, |model, sweep| {
        nlvr::evaluate(model, items.clone(), &nlvr::Options::default(), sweep).unwrap().scores.accuracy
    });
    assert!(after > before + 10.0, "{before} to {after}");
}

#[test]
fn boxes() {
    let config = config("scenes-bbox", "grounding.json", &["image_root"], 60);
    let items = read_grounding(file("grounding.json")).unwrap();
    let (before, after) = scores(&config, |model, sweep| {
        grounding::evaluate(model, items.clone(), &grounding::BoxOptions::default(), sweep).unwrap().scores.all.mean_iou
    });
    assert!(after > before, "{before} to {after}");
}

/// Without boxes there is little to learn from a few pictures that the bundled model does not know; it must not be lost.
#[test]
fn heat() {
    let config = config("scenes-grounding-weak", "grounding.json", &["image_root"], 40);
    let items = read_grounding(file("grounding.json")).unwrap();
    let (before, after) = scores(&config, |model, sweep| {
        let options = grounding::WeakOptions::default();
        grounding::evaluate_weakly(model, items.clone(), &options, sweep).unwrap().scores.pointing
    });
    assert!(before >= 60.0 && after > before - 10.0, "{before} to {after}");
}

#[test]
fn captions() {
    let score = |model: &Model, sweep: &mut Sweep| {
        let items = read_captions(file("captions.json")).unwrap();
        let mut writing = Writing::of(model.config());
        writing.search.beams = 1;
        captioning::evaluate(model, items, &writing, 16, sweep).unwrap().scores.unwrap().cider
    };
    let learnt = config("scenes-captioning", "captions.json", &["image_root"], 60);
    let (before, after) = scores(&learnt, score);
    assert!(after > before, "{before} to {after}");
    let rewarded = config("scenes-captioning-scst", "captions.json", &["image_root"], 40);
    let (before, after) = scores(&rewarded, score);
    assert!(after > before, "{before} to {after}");
}
