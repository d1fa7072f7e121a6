//! What stops a run is named: numbers that are not finite, in a picture, in a weight or on the way to the losses; workers that
//! die; a configuration that is not the one it began with.

mod common;

use std::fs;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm_data::scenes::{self, Split, SynthOptions};
use xvlm_data::{CaptionTensors, Loader, LoaderConfig};
use xvlm_tasks::Session;
use xvlm_tasks::pretrain::{self, Batch, PretrainBatches, Pretraining};
use xvlm_tasks::{PretrainConfig, TaskError};
use xvlm_train::ranks::{Alone, Communicator};
use xvlm_train::{
    Batches, BoxError, Job, Progress, RunFolder, Silent, Step, TrainConfig, TrainError, Trainable, train,
};

/// A folder with pictures, and the configuration of a small run on them.
fn world(train: Value) -> (TempDir, PretrainConfig) {
    let dir = TempDir::new().unwrap();
    let options = SynthOptions { scenes: 16, seed: 3, split: Split::Seen, embed_images: true };
    scenes::write(&dir.path().join("world"), &options, &mut |_| ()).unwrap();
    let config = json!({
        "train_file": [dir.path().join("world/pretrain.jsonl")],
        "model": common::tiny_model(0),
        "regions": { "iter_perc": 1.0 },
        "data": { "batch_size": 12, "max_images": 3 },
        "train": train,
    });
    (dir, PretrainConfig::from_yaml("test", &config.to_string(), &[]).unwrap())
}

/// An untrained model and the first batch of each stream.
fn first_batches() -> (Pretraining, Vec<Batch>) {
    let (dir, mut config) = world(json!({}));
    let builder = Arc::new(pretrain::open_batches(&mut config, Some(dir.path()), &mut Silent).unwrap());
    let mut batches = PretrainBatches::new(builder, &config, 0).unwrap();
    let batches = batches.next().unwrap().into_iter().flatten().collect();
    (Pretraining::new(&config.model, 1, &Device::Cpu).unwrap(), batches)
}

fn first(pretraining: &Pretraining, batch: &Batch) -> Option<String> {
    let (tape, ranks) = (Default::default(), Arc::new(Alone) as Arc<dyn Communicator>);
    let mut step = Step { rng: &mut ChaCha8Rng::seed_from_u64(0), tape: &tape, ranks: &ranks };
    pretraining.first_not_finite(batch, &mut step)
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    let (pretraining, batches) = first_batches();
    assert_eq!(batches.len(), 2);
    batches.iter().for_each(|batch| assert_eq!(first(&pretraining, batch), None));
}

#[test]
fn the_record_of_a_bad_picture_is_named() {
    let (pretraining, mut batches) = first_batches();
    for batch in &mut batches {
        let image = 2;
        let (pixels, origin) = match batch {
            Batch::Captions(batch) => (&mut batch.pixels, batch.origins[image].clone()),
            Batch::Regions(batch) => (&mut batch.pixels, batch.origins[image].clone()),
        };
        let mut numbers = pixels.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        numbers[image * 3 * 32 * 32 + 5] = f32::INFINITY;
        *pixels = Tensor::from_vec(numbers, pixels.shape(), &Device::Cpu).unwrap();
        assert_eq!(first(&pretraining, batch), Some(format!("pixels of {origin}")));
        assert!(origin.contains("pretrain.jsonl:"), "{origin}");
    }
}

#[test]
fn a_bad_weight_is_named() {
    let (pretraining, batches) = first_batches();
    let name = "text_encoder.bert.encoder.layer.1.output.dense.bias";
    let (_, bias) = pretraining.parameters().iter().find(|(other, _)| other == name).unwrap();
    let mut numbers = bias.to_vec1::<f32>().unwrap();
    numbers[7] = f32::NAN;
    bias.set(&Tensor::new(numbers, &Device::Cpu).unwrap()).unwrap();
    assert_eq!(first(&pretraining, &batches[1]), Some(format!("parameter {name}")));
}

#[test]
fn the_first_output_is_named() {
    let (pretraining, batches) = first_batches();
    // Finite, but what they make is not.
    for (name, expected) in [
        ("text_encoder.bert.encoder.layer.0.output.LayerNorm.weight", "output of layer.0"),
        ("vision_encoder.layers.0.blocks.1.mlp.fc1.weight", "output of layers.0.blocks.1"),
    ] {
        let (_, weight) = pretraining.parameters().iter().find(|(other, _)| other == name).unwrap();
        let before = weight.as_detached_tensor().copy().unwrap();
        weight.set(&before.ones_like().unwrap().affine(f64::from(f32::MAX), 0.0).unwrap()).unwrap();
        assert_eq!(first(&pretraining, &batches[1]).as_deref(), Some(expected));
        weight.set(&before).unwrap();
    }
}

#[test]
fn a_run_that_explodes_says_where_and_keeps_what_was_good() {
    let train = |lr: f64| json!({ "iterations": 12, "checkpoint_every": 1, "clip": null, "optimizer": { "lr": lr }, "schedule": { "warmup": 3 } });
    let (dir, config) = world(train(1e30));
    let run = |config: &PretrainConfig, resume| {
        pretrain::run(config, &dir.path().join("run"), &Session::alone(resume), &Device::Cpu, &mut Silent)
    };
    let error = run(&config, false).unwrap_err();
    let TaskError::Train(TrainError::NotFinite { tensor: Some(_), records, checkpoint: Some(checkpoint), .. }) = &error
    else {
        panic!("{error}")
    };
    // The first step is at a learning rate of 0.
    assert!(checkpoint.ends_with("0000001"), "{}", checkpoint.display());
    assert!(records.iter().all(|record| record.contains("pretrain.jsonl:")), "{records:?}");
    assert_eq!(error.to_string().matches("pretrain.jsonl:").count(), records.len().min(8), "{error}");
    // It is the same each time, from the checkpoint before.
    assert_eq!(run(&config, true).unwrap_err().to_string(), error.to_string());
}

#[test]
fn a_worker_that_dies_is_told_and_loses_nothing() {
    struct Dying(Loader<u64>, CaptionTensors);
    impl Batches<Batch> for Dying {
        fn next(&mut self) -> Result<Vec<Vec<Batch>>, BoxError> {
            self.0.next()?;
            Ok(vec![vec![Batch::Captions(self.1.clone())]])
        }
    }
    let (pretraining, mut batches) = first_batches();
    let Batch::Captions(batch) = batches.remove(0) else { panic!("images come first") };
    let dir = TempDir::new().unwrap();
    let run = RunFolder::new(dir.path()).unwrap();
    let build = |step| if step == 3 { panic!("out of luck") } else { Ok(step) };
    let config = TrainConfig { iterations: 6, checkpoint_every: 2, ..TrainConfig::default() };
    let loader = |start| Loader::starting_at(start, LoaderConfig::default(), build);
    let dying = |start| -> Result<Box<dyn Batches<Batch>>, BoxError> { Ok(Box::new(Dying(loader(start)?, batch))) };
    let error = train(&pretraining, dying, &config, &Job::alone(&run, false), &mut Silent).err().unwrap().to_string();
    assert!(error.starts_with("iteration 4: batches: ") && error.ends_with("found a panic: out of luck"), "{error}");
    assert_eq!(run.checkpoints().unwrap().last().unwrap().0, 2);
}

#[derive(Default)]
struct Warnings(Vec<String>);

impl Progress for Warnings {
    fn warning(&mut self, message: &str) {
        self.0.push(message.to_owned());
    }
}

#[test]
fn a_refused_resume_leaves_the_configuration_alone() {
    let train = |iterations: u64, seed: u64| json!({ "iterations": iterations, "seed": seed });
    let (dir, config) = world(train(1, 1));
    let folder = dir.path().join("run");
    let run = |train: Value| {
        let train = serde_json::from_value(train).unwrap();
        let config = PretrainConfig { train, ..config.clone() };
        pretrain::run(&config, &folder, &Session::alone(true), &Device::Cpu, &mut Silent)
    };
    run(train(1, 1)).unwrap();
    let kept = || fs::read_to_string(folder.join("config.yaml")).unwrap();
    let before = kept();
    // The checkpoint is of another seed.
    assert!(matches!(run(train(2, 2)), Err(TaskError::Train(TrainError::Changed { .. }))));
    assert_eq!(kept(), before);
    // Somebody else is at it.
    let lock = fs::File::open(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    assert!(matches!(run(train(2, 1)), Err(TaskError::Train(TrainError::Locked { .. }))));
    assert_eq!(kept(), before);
    drop(lock);
    run(train(2, 1)).unwrap();
    assert_ne!(kept(), before);
}

#[test]
fn a_setting_that_is_new_was_its_default() {
    let (dir, config) = world(json!({ "iterations": 1 }));
    let run = |config: &PretrainConfig, resume, warnings: &mut Warnings| {
        pretrain::run(config, &dir.path().join("run"), &Session::alone(resume), &Device::Cpu, warnings)
    };
    let mut warnings = Warnings::default();
    run(&config, false, &mut warnings).unwrap();
    run(&config, true, &mut warnings).unwrap();
    assert_eq!(warnings.0, [""; 0]);

    let path = dir.path().join("run/config.yaml");
    let text = fs::read_to_string(&path).unwrap();
    let older = text.replace("  label_share: 0.0\n", "");
    assert_ne!(text, older);
    fs::write(&path, &older).unwrap();
    let mut changed = config.clone();
    changed.data.label_share = 0.5;
    let error = run(&changed, true, &mut warnings).unwrap_err().to_string();
    assert!(error.contains("config.yaml: data.label_share: expected 0.0, as the run began, found 0.5"), "{error}");
    warnings.0.clear();
    run(&config, true, &mut warnings).unwrap();
    assert_eq!(warnings.0.len(), 1, "{:?}", warnings.0);
    assert!(warnings.0[0].contains("config.yaml: the run began without data.label_share = 0.0"), "{:?}", warnings.0);
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}
