//! Pre-training with recomputation, half types, frozen parts and accumulated gradients, for every kind of encoder.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm_data::scenes::{self, Split, SynthOptions};
use xvlm_data::{BatchBuilder, BatchConfig, Dataset, GenerationConfig, ImageCache, Padding, TextTokenizer, read_jsonl};
use xvlm_data::{CaptionTensors, TextTensors};
use xvlm_encoders::Pass;
use xvlm_losses::Pair;
use xvlm_tasks::pretrain::{Batch, PretrainBatches, Pretraining};
use xvlm_tasks::{Objective, PretrainConfig};
use xvlm_train::ranks::{Alone, Communicator};
use xvlm_train::{
    Gradients, Job, OptimizerConfig, Precision, RunFolder, Silent, Step, Tape, TrainConfig, Trainable, Warmup,
};

const SIDE: usize = 32;
const FAMILIES: [&str; 3] = ["swin", "clip", "deit"];
const TEXTS: [&str; 2] = ["bert", "roberta"];

fn tokenizer() -> TextTokenizer {
    TextTokenizer::from_vocabulary(&scenes::vocabulary()).unwrap()
}

/// Batches of a few scenes.
fn builder(scenes: usize, config: BatchConfig) -> BatchBuilder {
    let dir = TempDir::new().unwrap();
    let options = SynthOptions { scenes, seed: 3, split: Split::Seen, embed_images: true };
    let out = dir.path().join("world");
    scenes::write(&out, &options, &mut |_| ()).unwrap();
    let records = Arc::new(Dataset::from_records(read_jsonl(out.join("pretrain.jsonl")).unwrap()));
    BatchBuilder::new(records, Arc::new(tokenizer()), config, Arc::new(ImageCache::new(1 << 24))).unwrap()
}

fn sizes() -> BatchConfig {
    BatchConfig {
        resolution: SIDE,
        final_stride: 8,
        batch_size: 4,
        max_images: 3,
        padding: Padding::None,
        generation: Some(GenerationConfig { questions_per_image: 1, ..GenerationConfig::default() }),
        ..BatchConfig::default()
    }
}

/// A batch of each stream.
fn batches() -> [Batch; 2] {
    batches_of(sizes())
}

fn batches_of(config: BatchConfig) -> [Batch; 2] {
    let builder = builder(6, config);
    [
        Batch::Captions(builder.captions(0).unwrap().to_tensors(&Device::Cpu).unwrap()),
        Batch::Regions(builder.regions(0).unwrap().to_tensors(&Device::Cpu).unwrap()),
    ]
}

/// The configuration of a tiny model of two families, with dropout and stochastic depth of one probability.
fn tiny(vision: &str, text: &str, drop: f64) -> Value {
    let tokenizer = tokenizer();
    let vision = match vision {
        "swin" => json!({"kind": "swin", "image_res": SIDE, "patch_size": 4, "embed_dim": 8, "depths": [2, 2],
            "num_heads": [1, 2], "window_size": 4, "ape": true, "sine_positions": 0.5, "drop_path_rate": drop,
            "initializer_range": 0.1}),
        family => json!({"kind": "vit", "family": family, "image_res": SIDE, "patch_size": 8, "hidden_size": 16,
            "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "local_attn_depth": 2,
            "norm_eps": 1e-5, "attention_dropout": drop,
            "hidden_act": if family == "clip" { "quick_gelu" } else { "gelu" }}),
    };
    json!({
        "vision_config": vision,
        "text_config": {
            "model_type": text, "pad_token_id": tokenizer.pad_id(), "vocab_size": tokenizer.vocab_size(),
            "hidden_size": 16, "num_hidden_layers": 4, "fusion_layer": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 48, "hidden_dropout_prob": drop,
            "attention_probs_dropout_prob": drop, "initializer_range": 0.1,
        },
        "embed_dim": 16,
    })
}

fn model(config: Value, precision: Precision, frozen: &[&str]) -> Pretraining {
    let frozen_names = frozen.iter().map(ToString::to_string).collect();
    let optimizer = OptimizerConfig { frozen_names, ..OptimizerConfig::default() };
    let train = TrainConfig { precision, optimizer, seed: 1, ..TrainConfig::default() };
    Pretraining::to_train(&serde_json::from_value(config).unwrap(), &train, &Device::Cpu).unwrap()
}

/// Losses and gradients by name.
#[derive(PartialEq, Debug)]
struct Found {
    losses: Vec<(&'static str, f32)>,
    gradients: BTreeMap<String, Vec<f32>>,
}

impl Found {
    fn of(model: &Pretraining, tape: &Rc<Tape>, losses: Vec<(&'static str, Tensor)>) -> Self {
        let mut gradients = Gradients::default();
        let mut total = Tensor::new(0f32, &Device::Cpu).unwrap();
        let mut values = Vec::new();
        for (name, loss) in losses {
            assert_eq!((name, loss.dtype()), (name, DType::F32));
            values.push((name, loss.to_scalar().unwrap()));
            total = (total + loss).unwrap();
        }
        tape.backward(total, &mut gradients, |_, _| Ok(())).unwrap();
        let numbers = |x: &Tensor| x.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap();
        let known = |(name, var)| gradients.get(var).map(|gradient| (String::clone(name), numbers(gradient)));
        let parameters = model.parameters().iter().map(|(name, var)| (name, var.as_tensor()));
        Self { losses: values, gradients: parameters.filter_map(known).collect() }
    }

    /// Of a training step, with whatever is random.
    fn in_training(model: &Pretraining, batch: &Batch, recompute: bool, seed: u64) -> Self {
        let (tape, ranks) = (Rc::new(Tape::new(recompute)), Arc::new(Alone) as Arc<dyn Communicator>);
        let mut step = Step { rng: &mut ChaCha8Rng::seed_from_u64(seed), tape: &tape, ranks: &ranks };
        let losses = model.losses(batch, &mut step).unwrap().0;
        Self::of(model, &tape, losses)
    }

    /// Without anything random: each text's negative is that of the next row.
    fn without_dropout(model: &Pretraining, batch: &Batch) -> Self {
        let tape = Rc::new(Tape::new(true));
        let mut negatives = |_: &Tensor, keys: &[i64]| {
            let rows = keys.len() as u32;
            let next = |row: u32| (row + 1) % rows;
            let with_text = (0..rows).map(|text| Pair { text, concept: next(text) });
            Ok(with_text.chain((0..rows).map(|concept| Pair { text: next(concept), concept })).collect())
        };
        let losses = model.losses_of(batch, &Pass::inference().on(&tape), &mut negatives).unwrap().0;
        Self::of(model, &tape, losses)
    }
}

#[test]
fn recomputed_gradients_are_the_same_bits() {
    let batches = batches();
    for (vision, text) in FAMILIES.into_iter().flat_map(|vision| TEXTS.map(|text| (vision, text))) {
        for precision in [Precision::F32, Precision::Bf16] {
            let model = model(tiny(vision, text, 0.2), precision, &[]);
            for batch in &batches {
                let [kept, recomputed] = [false, true].map(|again| Found::in_training(&model, batch, again, 5));
                assert!(kept == recomputed, "{vision}, {text}, {precision:?}");
                assert!(kept != Found::in_training(&model, batch, false, 6), "{vision}, {text}: nothing is dropped");
                // Some parts only one of the streams has.
                assert!(kept.gradients.len() * 10 > model.parameters().len() * 8, "{}", kept.gradients.len());
            }
        }
    }
}

/// The cosine of the angle between two vectors, and the length of the second.
fn compare(a: &[f32], b: &[f32]) -> (f64, f64) {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(1e-30), dot(b, b).sqrt())
}

#[test]
fn half_types_have_the_losses_and_gradients_of_f32() {
    let batches = batches();
    for (vision, text) in FAMILIES.into_iter().flat_map(|vision| TEXTS.map(|text| (vision, text))) {
        let wide = model(tiny(vision, text, 0.0), Precision::F32, &[]);
        for (precision, noise, angle) in [(Precision::Bf16, 0.02, 0.98), (Precision::F16, 0.005, 0.999)] {
            let half = model(tiny(vision, text, 0.0), precision, &[]);
            for batch in &batches {
                let (found, expected) = (Found::without_dropout(&half, batch), Found::without_dropout(&wide, batch));
                let of = format!("{vision}, {text}, {precision:?}");
                for ((name, found), (_, expected)) in found.losses.iter().zip(&expected.losses) {
                    assert!((found - expected).abs() < noise * expected, "{of}, {name}: {found} for {expected}");
                }
                let longest = expected.gradients.values().map(|g| compare(g, g).1).fold(0.0, f64::max);
                assert!(found.gradients.keys().eq(expected.gradients.keys()));
                for (name, expected) in &expected.gradients {
                    let (cosine, length) = compare(&found.gradients[name], expected);
                    // What is nothing but noise has no direction: the gradient of a key's bias is 0.
                    let counts = length > 1e-3 * longest && expected.len() > 1;
                    assert!(!counts || cosine > angle, "{of}, {name}: {cosine}, {length} of {longest}");
                }
            }
        }
    }
}

#[test]
fn the_built_in_model_computes_in_bf16() {
    let mut config = PretrainConfig::preset("scenes", &[]).unwrap();
    config.model.text_config.vocab_size = tokenizer().vocab_size();
    let build = |precision| model(serde_json::to_value(&config.model).unwrap(), precision, &[]);
    let (half, wide) = (build(Precision::Bf16), build(Precision::F32));
    for batch in batches_of(BatchConfig { resolution: 128, final_stride: 16, ..sizes() }) {
        let (found, expected) = (Found::without_dropout(&half, &batch), Found::without_dropout(&wide, &batch));
        for ((name, found), (_, expected)) in found.losses.iter().zip(&expected.losses) {
            assert!((found - expected).abs() < 0.02 * expected, "{name}: {found} for {expected}");
        }
        let longest = expected.gradients.values().map(|g| compare(g, g).1).fold(0.0, f64::max);
        for (name, expected) in expected.gradients.iter().filter(|(_, gradient)| gradient.len() > 1000) {
            let (cosine, length) = compare(&found.gradients[name], expected);
            assert!(length < 1e-3 * longest || cosine > 0.99, "{name}: {cosine}, {length} of {longest}");
        }
    }
}

/// Mean losses of the last third of a run on the built-in world.
fn trained(precision: Precision) -> BTreeMap<String, f64> {
    let mut config = PretrainConfig::preset("scenes", &[]).unwrap();
    config.model = serde_json::from_value(tiny("swin", "bert", 0.0)).unwrap();
    config.data = sizes();
    config.train.config = TrainConfig { iterations: 150, precision, log_every: 50, seed: 1, ..config.train.config };
    config.train.optimizer.lr = 3e-3;
    config.train.schedule.warmup = Warmup::Iterations(20);
    let builder = Arc::new(builder(60, sizes()));
    let model = Pretraining::to_train(&config.model, &config.train, &Device::Cpu).unwrap();
    let dir = TempDir::new().unwrap();
    let run = RunFolder::new(dir.path()).unwrap();
    let batches = |start| Ok(Box::new(PretrainBatches::new(builder, &config, start)?) as Box<_>);
    let trained = xvlm_train::train(&model, batches, &config.train, &Job::alone(&run, false), &mut Silent).unwrap();
    let rows = xvlm_train::read_metrics(&run.metrics_path()).unwrap();
    let fell = |name: &str| rows[0].losses[name] - rows[2].losses[name];
    assert!(fell("mlm") > 0.5 && fell("generation") > 0.5, "{rows:?}");
    trained.summary.losses.into_iter().collect()
}

#[test]
fn a_run_in_bf16_learns_what_one_in_f32_learns() {
    let (found, expected) = (trained(Precision::Bf16), trained(Precision::F32));
    for (name, expected) in &expected {
        assert!((found[name] - expected).abs() < 0.05 * expected, "{name}: {} for {expected}", found[name]);
    }
}

#[test]
fn frozen_parts_are_out_of_the_graph() {
    let [captions, regions] = batches();
    let frozen = model(tiny("swin", "bert", 0.1), Precision::F32, &["vision_encoder", "text_encoder.bert.embeddings"]);
    let Batch::Captions(batch) = &captions else { unreachable!() };
    let images = frozen.model().encode_image(&batch.pixels, &Pass::inference()).unwrap();
    assert!(!images.track_op());
    let whole = model(tiny("swin", "bert", 0.1), Precision::F32, &[]);
    for batch in [&captions, &regions] {
        let found = Found::in_training(&frozen, batch, true, 5);
        let mut expected = Found::in_training(&whole, batch, true, 5);
        let is_frozen = |name: &str| name.starts_with("vision_encoder") || name.contains("bert.embeddings");
        assert!(expected.gradients.keys().any(|name| is_frozen(name)));
        expected.gradients.retain(|name, _| !is_frozen(name));
        assert!(found == expected);
    }
}

/// Two of four images with their texts, of which each has one word to be guessed.
fn rows(batch: &CaptionTensors, first: usize, count: usize) -> Batch {
    let text = &batch.text;
    let of = |x: &Tensor| x.narrow(0, first, count).unwrap().contiguous().unwrap();
    let length = text.ids.dims()[1];
    let positions = text.masked_positions.to_vec1::<u32>().unwrap();
    let (mut masked_positions, mut masked_labels) = (Vec::new(), Vec::new());
    for row in first..first + count {
        let i = positions.iter().position(|position| *position as usize / length == row).unwrap();
        masked_positions.push(positions[i] - (first * length) as u32);
        masked_labels.push(text.masked_labels[i]);
    }
    let text = TextTensors {
        ids: of(&text.ids),
        mask: of(&text.mask),
        masked_ids: of(&text.masked_ids),
        masked_positions: Tensor::new(masked_positions, &Device::Cpu).unwrap(),
        masked_labels,
        keys: text.keys[first..first + count].to_vec(),
    };
    Batch::Captions(CaptionTensors { pixels: of(&batch.pixels), text, generation: None, origins: Vec::new() })
}

#[test]
fn halves_of_a_batch_have_the_gradients_of_the_whole() {
    let [Batch::Captions(batch), _] = batches() else { unreachable!() };
    let model = model(tiny("swin", "bert", 0.0), Precision::F32, &[]).with_objectives(&[Objective::Mlm]);
    let gradients = |batches: &[Batch]| {
        let mut gradients = Gradients::default();
        for batch in batches {
            let tape = Rc::new(Tape::new(false));
            let losses = model.losses_of(batch, &Pass::inference().on(&tape), &mut |_, _| Ok(Vec::new())).unwrap().0;
            let loss = (&losses[0].1 / batches.len() as f64).unwrap();
            tape.backward(loss, &mut gradients, |_, _| Ok(())).unwrap();
        }
        gradients
    };
    let (whole, halves) = (gradients(&[rows(&batch, 0, 4)]), gradients(&[rows(&batch, 0, 2), rows(&batch, 2, 2)]));
    for (name, var) in model.parameters() {
        let (Some(whole), Some(halves)) = (whole.get(var), halves.get(var)) else { continue };
        let difference = (whole - halves).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-6, "{name}: {difference}");
    }
}
