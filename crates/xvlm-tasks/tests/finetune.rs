//! Fine-tuning, from a tiny pre-trained model to a model folder of each task.

mod common;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use candle_core::Device;
use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm_data::scenes::{self, Split, SynthOptions};
use xvlm_tasks::finetune::{self, FinetuneKind};
use xvlm_tasks::{FinetuneConfig, Model, PretrainConfig, Session, TaskError, pretrain};
use xvlm_train::{Progress, Silent, Summary, read_metrics};
use xvlm_weights::ModelFolder;

use common::tiny_model;

/// A world, and in `pretrained` a tiny model that knows nothing about it.
static WORLD: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = TempDir::new().unwrap();
    let options = SynthOptions { scenes: 12, seed: 3, split: Split::Seen, embed_images: false };
    scenes::write(&dir.path().join("world"), &options, &mut |_| ()).unwrap();
    let config = json!({
        "train_file": [dir.path().join("world/pretrain.jsonl")],
        "model": tiny_model(0),
        "regions": { "iter_perc": 0.0 },
        "data": { "batch_size": 4 },
        "train": { "iterations": 1, "tensorboard": false },
    });
    let config = PretrainConfig::from_yaml("test", &config.to_string(), &[]).unwrap();
    pretrain::run(&config, &dir.path().join("pretrained"), &Session::alone(false), &Device::Cpu, &mut Silent).unwrap();
    dir
});

fn in_world(file: &str) -> PathBuf {
    WORLD.path().join("world").join(file)
}

/// What the section `task` of a kind's configuration has, beside its name.
fn task(kind: FinetuneKind) -> Value {
    let root = in_world("");
    let files = |file: &str| json!([in_world(file)]);
    let mut task = match kind {
        FinetuneKind::Retrieval => json!({
            "train_file": files("retrieval.json"), "test_file": files("retrieval.json"), "image_root": root,
            "batch_size_test": 4, "batch_size_test_text": 4, "k_test": 4,
        }),
        FinetuneKind::Vqa => json!({
            "train_file": files("vqa.json"), "test_file": files("vqa.json"),
            "answer_list": in_world("answer_list.json"), "vqa_root": root, "vg_root": root,
            "batch_size_test": 4, "k_test": 4, "questions_per_image": 3,
        }),
        FinetuneKind::Nlvr => json!({
            "train_file": files("nlvr.json"), "test_file": files("nlvr.json"), "image_root": root, "batch_size_test": 4,
        }),
        FinetuneKind::NlvrPretrain | FinetuneKind::CaptioningPretrain => json!({
            "train_file": files("pretrain.jsonl"), "train_dataset_size": 12,
        }),
        FinetuneKind::BboxPretrain => json!({
            "train_file_regions": files("pretrain.jsonl"), "train_dataset_size": 12,
        }),
        FinetuneKind::WeakGrounding => json!({
            "train_file": files("grounding.json"), "test_file": files("grounding.json"), "image_root": root,
            "vlue_test": true, "block_num": 1, "batch_size_test": 4,
        }),
        FinetuneKind::Bbox => json!({
            "train_file": files("grounding.json"), "test_file": files("grounding.json"), "image_root": root,
            "vlue_test": true, "batch_size_test": 4,
        }),
        FinetuneKind::Captioning | FinetuneKind::CaptioningScst => json!({
            "train_file": files("captions.json"), "test_file": files("captions.json"), "image_root": root,
            "val_gt_file": in_world("captions.json"), "test_gt_file": in_world("captions.json"),
            "prompt": "a picture of", "search": { "beams": 2, "min_tokens": 1, "max_tokens": 6 }, "batch_size_test": 4,
        }),
    };
    let more = match kind {
        FinetuneKind::Captioning => json!({ "label_smoothing": 0.1 }),
        FinetuneKind::CaptioningScst => {
            json!({ "sc_train_sample_n": 2, "sc_baseline_type": "greedy" })
        }
        _ => json!({}),
    };
    let fields = task.as_object_mut().unwrap();
    fields.insert("name".to_owned(), json!(kind.name()));
    fields.extend(more.as_object().unwrap().clone());
    task
}

fn config(kind: FinetuneKind, train: Value) -> FinetuneConfig {
    let data = match kind {
        FinetuneKind::NlvrPretrain | FinetuneKind::CaptioningPretrain => json!({ "batch_size": 4 }),
        FinetuneKind::BboxPretrain => json!({ "batch_size": 4, "max_images": 4, "max_regions": 8 }),
        _ => json!({
            "batch_size": 4, "crop": null, "augment": null, "region_augment": null, "random_crop": false, "hflip": false,
        }),
    };
    let config = json!({
        "task": task(kind),
        "init_from": WORLD.path().join("pretrained/model"),
        "model": tiny_model(0),
        "data": data,
        "train": train,
    });
    FinetuneConfig::from_yaml("test", &config.to_string(), &[]).unwrap()
}

/// What was told.
#[derive(Default)]
struct Told(Vec<String>);

impl Progress for Told {
    fn warning(&mut self, message: &str) {
        self.0.push(message.to_owned());
    }
}

fn run(config: &FinetuneConfig, out: &Path, resume: bool) -> Result<(Summary, Vec<String>), TaskError> {
    let mut told = Told::default();
    let summary = finetune::run(config, None, out, &Session::alone(resume), &Device::Cpu, &mut told)?;
    Ok((summary, told.0))
}

#[test]
fn a_plan_tells_what_a_run_will_be() {
    for kind in FinetuneKind::ALL {
        let config = config(kind, quick(6));
        let (plan, first) = finetune::plan(&config, None, 2, false, &mut Silent).unwrap();
        assert_eq!((plan.task, plan.schedule.iterations, plan.schedule.ranks), (kind.name(), 6, 2));
        let (parameters, memory, data) = (&plan.parameters, &plan.memory, &plan.data);
        assert_eq!((memory.weights, memory.moments), (4 * parameters.total, 8 * parameters.trainable), "{plan:?}");
        assert_eq!((memory.masters, memory.reduction), (0, memory.moments));
        let passes = (6 * data.items_per_step) as f64 / data.items as f64;
        assert!(data.epochs == passes && !data.validated, "{data:?}");
        let pictures = first.pictures.len();
        assert_eq!((first.side, first.pixels.len()), (32, pictures * 3 * 32 * 32), "{}", kind.name());
        assert_eq!(memory.pixels, 4 * first.pixels.len() as u64);
        let said = || first.pictures.iter().flatten();
        // A batch of regions has no room for the texts of its last pictures.
        let is_told = first.pictures.iter().all(|said| !said.is_empty()) || kind == FinetuneKind::BboxPretrain;
        assert!(is_told && said().all(|said| said.text.contains(' ')), "{}: {:?}", kind.name(), first.pictures);
        let has_boxes = matches!(kind, FinetuneKind::Bbox | FinetuneKind::BboxPretrain);
        assert_eq!(said().any(|said| said.bounds.is_some()), has_boxes, "{}", kind.name());
    }
    // What the run would refuse, the plan refuses.
    let mut config = config(FinetuneKind::Vqa, quick(6));
    config.init_from = Some(in_world("none"));
    let error = finetune::plan(&config, None, 1, false, &mut Silent).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("none/config.json"), "{error}");
    config.init_from = None;
    let error = finetune::plan(&config, None, 1, false, &mut Silent).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("init_from: expected the folder of a model to start from"), "{error}");
}

/// Steps that are long enough to learn a few pictures by heart.
fn quick(iterations: u64) -> Value {
    json!({
        "iterations": iterations, "log_every": 10, "tensorboard": false,
        "optimizer": { "lr": 3e-3, "lr_mult": 1.0 }, "schedule": { "warmup": 2 },
    })
}

#[test]
fn every_task_is_learnt_and_leaves_a_model() {
    for kind in FinetuneKind::ALL {
        let out = TempDir::new().unwrap();
        // What is drawn anew in each step, and what is rewarded, is not learnt in so few; what compares samples of a batch, and boxes, slowly.
        let (iterations, share) = match kind {
            FinetuneKind::CaptioningScst | FinetuneKind::NlvrPretrain | FinetuneKind::Nlvr => (3, f64::INFINITY),
            FinetuneKind::Retrieval | FinetuneKind::WeakGrounding | FinetuneKind::Bbox | FinetuneKind::BboxPretrain => {
                (60, 0.97)
            }
            _ => (60, 0.9),
        };
        let (summary, told) = run(&config(kind, quick(iterations)), out.path(), false).unwrap();
        assert_eq!(summary.iterations, iterations, "{kind:?}");
        let is_random = told.iter().any(|line| line.starts_with("random, since "));
        let has_own_heads = matches!(kind, FinetuneKind::Nlvr | FinetuneKind::NlvrPretrain);
        assert_eq!(is_random, has_own_heads, "{kind:?}: {told:?}");
        let rows = read_metrics(&out.path().join("metrics.jsonl")).unwrap();
        let total = |row: usize| rows[row].losses.values().sum::<f64>();
        let last = rows.len() - 1;
        assert!(total(last) < share * total(0), "{kind:?}: {} to {}", total(0), total(last));
        let model = Model::open(&out.path().join("model"), &Device::Cpu).unwrap();
        assert_eq!(model.config().model.task, kind.model_task());
    }
}

#[test]
fn a_run_that_is_resumed_ends_in_the_same_model() {
    let kind = FinetuneKind::Vqa;
    let (whole, parts) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let train = |iterations: u64| {
        let mut train = quick(6);
        train["checkpoint_every"] = json!(2);
        train["keep_best"] = json!(false);
        (config(kind, train), iterations)
    };
    run(&train(6).0, whole.path(), false).unwrap();
    let stop = {
        let mut session = Session::alone(false);
        session.stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        session
    };
    let summary = finetune::run(&train(6).0, None, parts.path(), &stop, &Device::Cpu, &mut Silent).unwrap();
    assert!(summary.stopped && summary.iterations < 6 && !parts.path().join("model").exists());
    run(&train(6).0, parts.path(), true).unwrap();
    let weights = |out: &TempDir| ModelFolder::open(&out.path().join("model")).unwrap().tensors().unwrap();
    let (expected, found) = (weights(&whole), weights(&parts));
    for (name, expected) in &expected {
        let numbers = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(numbers(expected), numbers(&found[name]), "{name}");
    }
    let mut other = train(6).0;
    other.model.temp = 0.1;
    let error = run(&other, parts.path(), true).unwrap_err().to_string();
    assert!(error.contains("model.temp: expected 0.07, as the run began, found 0.1"), "{error}");
}

#[test]
fn the_best_checkpoint_is_that_of_the_best_validation() {
    for kind in [FinetuneKind::Retrieval, FinetuneKind::Nlvr, FinetuneKind::Captioning, FinetuneKind::CaptioningScst] {
        let out = TempDir::new().unwrap();
        let mut train = quick(4);
        train["checkpoint_every"] = json!(2);
        let mut config = config(kind, train);
        match &mut config.task {
            finetune::FinetuneTask::Retrieval(task) => task.val_file = task.test_file.clone(),
            finetune::FinetuneTask::Nlvr(task) => task.val_file = task.test_file.clone(),
            finetune::FinetuneTask::Captioning(task) => task.val_file = task.test_file.clone(),
            finetune::FinetuneTask::CaptioningScst(task) => task.val_file = task.test_file.clone(),
            other => panic!("{other:?}"),
        }
        run(&config, out.path(), false).unwrap();
        let best = xvlm_train::RunFolder::new(out.path()).unwrap().best().unwrap().unwrap().0;
        assert_eq!(best.by, xvlm_train::Criterion::Score, "{kind:?}");
        assert!(best.score >= 0.0 && [2, 4].contains(&best.iteration), "{kind:?}: {best:?}");
        Model::open(&out.path().join("best"), &Device::Cpu).unwrap();
    }
}

#[test]
fn rewards_tell_the_best_where_nothing_is_validated() {
    let out = TempDir::new().unwrap();
    let mut train = quick(4);
    (train["checkpoint_every"], train["log_every"]) = (json!(2), json!(2));
    let config = config(FinetuneKind::CaptioningScst, train);
    run(&config, out.path(), false).unwrap();
    let best = xvlm_train::RunFolder::new(out.path()).unwrap().best().unwrap().unwrap().0;
    let rows = read_metrics(&out.path().join("metrics.jsonl")).unwrap();
    let highest = rows.iter().map(|row| row.losses["reward"]).fold(f64::NEG_INFINITY, f64::max);
    assert_eq!((best.by, best.score), (xvlm_train::Criterion::Observation, highest));

    let mut long = config;
    if let finetune::FinetuneTask::CaptioningScst(task) = &mut long.task {
        task.search.max_tokens = 48;
    }
    let error = run(&long, &out.path().join("long"), false).unwrap_err().to_string();
    assert!(error.contains("task.search.max_tokens: expected room for the prompt and the caption in 48"), "{error}");
}

#[test]
fn there_is_a_model_to_start_from_and_room_for_its_choices() {
    let mut config = config(FinetuneKind::NlvrPretrain, quick(1));
    let out = TempDir::new().unwrap();
    if let finetune::FinetuneTask::NlvrPretrain(task) = &mut config.task {
        task.data.batch_size = 2;
    }
    let error = run(&config, out.path(), false).unwrap_err().to_string();
    assert!(error.contains("data.batch_size: expected at least 3"), "{error}");
    config.init_from = None;
    let error = run(&config, out.path(), false).unwrap_err().to_string();
    assert!(error.contains("init_from: expected") && error.contains("--built-in"), "{error}");
}

#[test]
fn epochs_are_counted_in_items() {
    let out = TempDir::new().unwrap();
    let train = json!({ "epochs": 2, "tensorboard": false });
    let items = xvlm_data::annotations::read_nlvr(in_world("nlvr.json")).unwrap().len() as u64;
    let (summary, _) = run(&config(FinetuneKind::Nlvr, train), out.path(), false).unwrap();
    assert_eq!(summary.iterations, 2 * items.div_ceil(4));
}

#[test]
fn what_is_broken_is_counted_and_named() {
    let dir = TempDir::new().unwrap();
    let broken = dir.path().join("vqa.json");
    let mut items: Value = serde_json::from_slice(&std::fs::read(in_world("vqa.json")).unwrap()).unwrap();
    items[1]["image"] = json!("images/none.png");
    items[2].as_object_mut().unwrap().remove("question");
    std::fs::write(&broken, items.to_string()).unwrap();
    let set = |max_bad_fraction: f64| {
        let mut config = config(FinetuneKind::Vqa, quick(10));
        if let finetune::FinetuneTask::Vqa(task) = &mut config.task {
            task.train_file = vec![broken.clone()];
            task.questions_per_image = 1;
            task.data.max_bad_fraction = max_bad_fraction;
            task.data.batch_size = 40;
        }
        config
    };
    let (_, told) = run(&set(0.1), &dir.path().join("run"), false).unwrap();
    let says = |part: &str| told.iter().any(|line| line.contains(part));
    assert!(says("left out: 1 items") && says("question"), "{told:?}");
    assert!(says("records that were drawn are broken") && says("none.png"), "{told:?}");
    let error = run(&set(0.0), &dir.path().join("strict"), false).unwrap_err().to_string();
    assert!(error.contains("task.train_file: expected at most 0 % of items to be broken, found 1 of"), "{error}");

    std::fs::write(&broken, "[]").unwrap();
    let error = run(&set(0.1), &dir.path().join("empty"), false).unwrap_err().to_string();
    assert!(error.contains("task.train_file: expected at least one item, found none"), "{error}");
    let mut nothing = config(FinetuneKind::Vqa, quick(1));
    nothing.train = None;
    let error = run(&nothing, &dir.path().join("nothing"), false).unwrap_err().to_string();
    assert!(error.contains("train: expected a section"), "{error}");
}
