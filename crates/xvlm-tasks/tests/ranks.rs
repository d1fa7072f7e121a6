//! Two ranks learn what one process learns from the batches of both: as threads, and (feature `mpi`) as processes.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use serde_json::json;
use tempfile::TempDir;
use xvlm_data::scenes::{self, Split, SynthOptions};
use xvlm_data::{
    BatchBuilder, BatchConfig, CaptionBatch, Dataset, ImageCache, Padding, RegionBatch, TextBatch, TextTokenizer,
    read_jsonl,
};
use xvlm_encoders::Pass;
use xvlm_losses::Pair;
use xvlm_tasks::ItcGradient;
use xvlm_tasks::pretrain::{Batch, Pretraining};
use xvlm_train::ranks::{Alone, Communicator, Threads};
use xvlm_train::{
    Batches, BoxError, Job, Losses, MetricsRow, OptimizerConfig, RunFolder, Silent, Step, TrainConfig, Trainable,
    read_metrics,
};

/// What one rank has of a step. A batch of two ranks is the rows of the first, then those of the second.
const HALVES: usize = 2;

/// Pre-training whose negatives come from the half of the batch that a rank would have.
struct InHalves {
    pretraining: Pretraining,
    halves: usize,
}

impl Trainable for InHalves {
    type Batch = Batch;

    fn parameters(&self) -> &[(String, Var)] {
        self.pretraining.parameters()
    }

    fn losses(&self, batch: &Batch, step: &mut Step) -> Result<Losses, BoxError> {
        let mut negatives = |_: &Tensor, keys: &[i64]| {
            let half = keys.len() / self.halves;
            let next = |row: usize| (row - row % half + (row % half + 1) % half) as u32;
            let rows = 0..keys.len();
            let concepts = rows.clone().map(|row| Pair { text: row as u32, concept: next(row) });
            Ok(concepts.chain(rows.map(|row| Pair { text: next(row), concept: row as u32 })).collect())
        };
        let pass = Pass::inference().on(step.tape);
        let mut losses = self.pretraining.losses_among(batch, &pass, &mut negatives, step.ranks)?;
        if let Batch::Regions(_) = batch {
            let of_regions = BTreeMap::from([("itc", "region_itc"), ("itm", "region_itm"), ("mlm", "region_mlm")]);
            losses.0.iter_mut().for_each(|(name, _)| *name = of_regions.get(name).unwrap_or(name));
        }
        Ok(losses)
    }

    fn samples(batch: &Batch) -> usize {
        Pretraining::samples(batch)
    }
}

/// The batches of both ranks, or those of one.
struct Stream {
    builders: Vec<BatchBuilder>,
    only: Option<usize>,
    at: u64,
}

impl Batches<Batch> for Stream {
    fn next(&mut self) -> Result<Vec<Vec<Batch>>, BoxError> {
        let at = self.at;
        self.at += 1;
        let mut captions = self.builders.iter().map(|builder| builder.captions(at)).collect::<Result<Vec<_>, _>>()?;
        let mut regions = self.builders.iter().map(|builder| builder.regions(at)).collect::<Result<Vec<_>, _>>()?;
        trim(captions.iter_mut().map(|batch| &mut batch.text).collect());
        trim(regions.iter_mut().map(|batch| &mut batch.text).collect());
        let (captions, regions) = match self.only {
            Some(rank) => (captions.swap_remove(rank), regions.swap_remove(rank)),
            None => (joined_captions(captions), joined_regions(regions)),
        };
        let captions = Batch::Captions(captions.to_tensors(&Device::Cpu)?);
        Ok(vec![vec![captions], vec![Batch::Regions(regions.to_tensors(&Device::Cpu)?)]])
    }
}

/// As many masked tokens on one rank as on the other: of these the loss is a mean on each.
fn trim(mut texts: Vec<&mut TextBatch>) {
    let least = texts.iter().map(|text| text.masked_labels.len()).min().unwrap();
    assert!(least > 0);
    for text in &mut texts {
        text.masked_labels.truncate(least);
        text.masked_positions.truncate(least);
    }
}

fn joined_texts(parts: Vec<TextBatch>) -> TextBatch {
    let len = parts.iter().map(|part| part.len).max().unwrap();
    let mut all = TextBatch { len, ..TextBatch::default() };
    for part in parts {
        for row in 0..part.rows {
            let tokens = row * part.len..(row + 1) * part.len;
            all.ids.extend(&part.ids[tokens.clone()]);
            all.mask.extend(&part.mask[tokens.clone()]);
            all.masked_ids.extend(&part.masked_ids[tokens]);
            let padded = (all.rows + row + 1) * len;
            all.ids.resize(padded, 0);
            all.mask.resize(padded, 0.0);
            all.masked_ids.resize(padded, 0);
        }
        let place = |&position: &u32| {
            let (row, column) = (position as usize / part.len, position as usize % part.len);
            ((all.rows + row) * len + column) as u32
        };
        all.masked_positions.extend(part.masked_positions.iter().map(place).collect::<Vec<_>>());
        all.masked_labels.extend(&part.masked_labels);
        all.rows += part.rows;
        all.keys.extend(part.keys);
    }
    all
}

fn joined_captions(parts: Vec<CaptionBatch>) -> CaptionBatch {
    CaptionBatch {
        pixels: parts.iter().flat_map(|part| part.pixels.clone()).collect(),
        images: parts.iter().map(|part| part.images).sum(),
        origins: Vec::new(),
        text: joined_texts(parts.into_iter().map(|part| part.text).collect()),
        generation: None,
    }
}

fn joined_regions(parts: Vec<RegionBatch>) -> RegionBatch {
    let before = |i: usize| parts[..i].iter().map(|part| part.images as u32).sum::<u32>();
    let index = |(i, part): (usize, &RegionBatch)| part.image_index.iter().map(|at| before(i) + at).collect::<Vec<_>>();
    RegionBatch {
        pixels: parts.iter().flat_map(|part| part.pixels.clone()).collect(),
        images: parts.iter().map(|part| part.images).sum(),
        origins: Vec::new(),
        image_index: parts.iter().enumerate().flat_map(index).collect(),
        boxes: parts.iter().flat_map(|part| part.boxes.clone()).collect(),
        region_mask: parts.iter().flat_map(|part| part.region_mask.clone()).collect(),
        patches: parts[0].patches,
        is_image: parts.iter().flat_map(|part| part.is_image.clone()).collect(),
        row_weights: parts.iter().flat_map(|part| part.row_weights.clone()).collect(),
        text: joined_texts(parts.into_iter().map(|part| part.text).collect()),
    }
}

/// Trains for a few iterations on one rank, or on both halves of the batches in one process.
fn learn(world: &Path, out: &Path, ranks: Arc<dyn Communicator>, itc_gradient: ItcGradient) -> Vec<(String, Tensor)> {
    let records = Arc::new(Dataset::from_records(read_jsonl(world.join("pretrain.jsonl")).unwrap()));
    let tokenizer = Arc::new(TextTokenizer::from_vocabulary(&scenes::vocabulary()).unwrap());
    let mut model = common::tiny_model(tokenizer.vocab_size());
    model["vision_config"]["ape"] = json!(true);
    let data = BatchConfig {
        resolution: 32,
        final_stride: 8,
        batch_size: 4,
        max_images: 3,
        // Filled up with rows that ITC leaves out, more of them on one rank than on the other.
        max_regions: 16,
        padding: Padding::Masked,
        whole_image_text: false,
        ..BatchConfig::default()
    };
    let builder = |rank| {
        let cache = Arc::new(ImageCache::new(1 << 24));
        let builder = BatchBuilder::new(Arc::clone(&records), Arc::clone(&tokenizer), data.clone(), cache);
        builder.unwrap().for_rank(rank, HALVES)
    };
    let builders: Vec<BatchBuilder> = (0..HALVES).map(builder).collect();
    let config = TrainConfig {
        iterations: 4,
        // Above the rounding of gradients that are 0, such as those of the keys' biases: Adam would make steps of it.
        optimizer: OptimizerConfig { lr: 1e-3, eps: 1e-5, ..OptimizerConfig::default() },
        schedule: serde_json::from_value(json!({"warmup": 0})).unwrap(),
        log_every: 1,
        ..TrainConfig::default()
    };
    let pretraining = Pretraining::new(&serde_json::from_value(model).unwrap(), 1 + ranks.rank() as u64, &Device::Cpu);
    let halves = HALVES / ranks.size();
    let model = InHalves { pretraining: pretraining.unwrap().with_itc_gradient(itc_gradient), halves };
    let only = (halves == 1).then(|| ranks.rank());
    let run = RunFolder::new(out).unwrap();
    let job = Job { ranks, ..Job::alone(&run, false) };
    let batches = |at| Ok(Box::new(Stream { builders, only, at }) as Box<dyn Batches<Batch>>);
    xvlm_train::train(&model, batches, &config, &job, &mut Silent).unwrap().weights
}

/// Scenes for [`learn`].
fn world(dir: &TempDir) -> std::path::PathBuf {
    let out = dir.path().join("world");
    let options = SynthOptions { scenes: 24, seed: 3, split: Split::Seen, embed_images: true };
    scenes::write(&out, &options, &mut |_| ()).unwrap();
    out
}

/// The same in two threads; the weights of both.
fn as_threads(world: &Path, out: &Path, itc_gradient: ItcGradient) -> Vec<Vec<(String, Vec<f32>)>> {
    std::thread::scope(|scope| {
        let learn = |ranks: Threads| numbers(learn(world, out, Arc::new(ranks), itc_gradient));
        let ranks: Vec<_> = Threads::new(HALVES).into_iter().map(|ranks| scope.spawn(move || learn(ranks))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn numbers(weights: Vec<(String, Tensor)>) -> Vec<(String, Vec<f32>)> {
    let flat = |weights: Tensor| weights.flatten_all().unwrap().to_vec1().unwrap();
    weights.into_iter().map(|(name, weights)| (name, flat(weights))).collect()
}

/// The largest difference of any weight, with its name.
fn farthest(a: &[(String, Vec<f32>)], b: &[(String, Vec<f32>)]) -> (f32, String) {
    assert_eq!(a.len(), b.len());
    type Named = (String, Vec<f32>);
    let far = |((name, a), (other, b)): (&Named, &Named)| {
        assert_eq!((name, a.len()), (other, b.len()));
        (a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max), name.clone())
    };
    a.iter().zip(b).map(far).max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

fn metrics(out: &Path) -> Vec<MetricsRow> {
    read_metrics(&out.join("metrics.jsonl")).unwrap()
}

fn assert_same_losses(found: &[MetricsRow], expected: &[MetricsRow]) {
    assert_eq!(expected.len(), 4);
    assert_eq!(expected[0].losses.len(), 8, "three of either stream, and two of boxes");
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.losses.keys().collect::<Vec<_>>(), expected.losses.keys().collect::<Vec<_>>());
        for (name, expected_loss) in &expected.losses {
            let difference = (found.losses[name] - expected_loss).abs();
            assert!(difference < 1e-5, "iteration {}: {name} {difference:e} off", expected.iteration);
        }
        let difference = (found.grad_norm - expected.grad_norm).abs() / expected.grad_norm;
        assert!(difference < 1e-5, "iteration {}: gradient norm {difference:e} off", expected.iteration);
    }
}

#[test]
fn two_ranks_learn_what_one_learns_from_both_their_batches() {
    let dir = TempDir::new().unwrap();
    let (world, path) = (world(&dir), |name: &str| dir.path().join(name));
    let alone = numbers(learn(&world, &path("alone"), Arc::new(Alone), ItcGradient::Whole));
    let ranks = as_threads(&world, &path("ranks"), ItcGradient::Whole);
    assert_eq!(ranks[0], ranks[1], "the same bits on both ranks");
    assert_same_losses(&metrics(&path("ranks")), &metrics(&path("alone")));
    let (difference, name) = farthest(&ranks[0], &alone);
    assert!(difference < 1e-5, "{name} is {difference:e} off");
    // As in the official code, the losses begin as they do alone, but ITC pulls half as much.
    let original = as_threads(&world, &path("original"), ItcGradient::Original);
    assert_ne!(metrics(&path("original"))[0].grad_norm, metrics(&path("alone"))[0].grad_norm);
    assert!(farthest(&original[0], &alone).0 > 1e-4);
}

/// The same in processes that `mpirun` starts.
#[cfg(feature = "mpi")]
mod processes {
    use super::*;
    use std::process::Command;
    use xvlm_train::ranks::Mpi;

    const FOLDER: &str = "XVLM_TEST_FOLDER";

    /// Runs one of the tests below, which are no tests of their own, on two ranks; what it wrote to stderr, and whether it
    /// succeeded.
    fn mpirun(rank: &str, folder: &Path) -> (String, bool) {
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]);
        command.arg(std::env::current_exe().unwrap()).args([rank, "--exact", "--ignored", "--nocapture"]);
        let output = command.env(FOLDER, folder).output().expect("mpirun is installed");
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (format!("{}{}", text(&output.stdout), text(&output.stderr)), output.status.success())
    }

    #[test]
    fn two_processes_learn_what_one_learns_from_both_their_batches() {
        let dir = TempDir::new().unwrap();
        let world = world(&dir);
        let alone = numbers(learn(&world, &dir.path().join("alone"), Arc::new(Alone), ItcGradient::Whole));
        let (said, succeeded) = mpirun("processes::rank_that_learns", dir.path());
        assert!(succeeded, "{said}");
        assert_same_losses(&metrics(&dir.path().join("ranks")), &metrics(&dir.path().join("alone")));
        let weights = |rank: usize| {
            let weights = candle_core::safetensors::load(dir.path().join(format!("{rank}.safetensors")), &Device::Cpu);
            let mut weights = weights.unwrap();
            numbers(alone.iter().map(|(name, _)| (name.clone(), weights.remove(name).unwrap())).collect())
        };
        assert_eq!(weights(0), weights(1), "the same bits on both ranks");
        let (difference, name) = farthest(&weights(0), &alone);
        assert!(difference < 1e-5, "{name} is {difference:e} off");
    }

    #[test]
    #[ignore = "one of two processes of another test"]
    fn rank_that_learns() {
        let folder = std::path::PathBuf::from(std::env::var_os(FOLDER).unwrap());
        let ranks: Arc<dyn Communicator> = Arc::new(Mpi::start().unwrap());
        let rank = ranks.rank();
        let weights = learn(&folder.join("world"), &folder.join("ranks"), ranks, ItcGradient::Whole);
        let weights = weights.into_iter().collect();
        candle_core::safetensors::save(&weights, folder.join(format!("{rank}.safetensors"))).unwrap();
    }

    #[test]
    fn what_processes_tell_each_other() {
        let dir = TempDir::new().unwrap();
        let (said, succeeded) = mpirun("processes::rank_that_talks", dir.path());
        assert!(succeeded, "{said}");
    }

    #[test]
    #[ignore = "one of two processes of another test"]
    fn rank_that_talks() {
        use candle_core::DType;
        let ranks = Mpi::start().unwrap();
        let rank = ranks.rank();
        assert_eq!(ranks.size(), 2);
        let own = Tensor::new(&[[1i64 + rank as i64, 10], [3, 4 * rank as i64]], &Device::Cpu).unwrap();
        let numbers = |tensor: Tensor| tensor.to_dtype(DType::I64).unwrap().to_vec2::<i64>().unwrap();
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16, DType::U8, DType::U32, DType::I64] {
            let own = own.to_dtype(dtype).unwrap();
            assert_eq!(numbers(ranks.all_reduce(&own).unwrap()), [[3, 20], [6, 4]], "{dtype:?}");
            assert_eq!(numbers(ranks.all_gather(&own).unwrap()), [[1, 10], [3, 0], [2, 10], [3, 4]], "{dtype:?}");
            assert_eq!(numbers(ranks.broadcast(&own, 1).unwrap()), [[2, 10], [3, 4]], "{dtype:?}");
        }
        ranks.barrier().unwrap();
        assert!(Mpi::start().is_err(), "MPI is initialised once");
    }

    #[test]
    fn one_rank_ends_all() {
        let dir = TempDir::new().unwrap();
        // What `mpirun` says of it is now and then lost on its way.
        let (said, succeeded) = mpirun("processes::rank_that_aborts", dir.path());
        assert!(!succeeded, "{said}");
        assert!(dir.path().join("aborts").exists(), "{said}");
        assert!(!dir.path().join("late").exists(), "{said}");
    }

    #[test]
    #[ignore = "one of two processes of another test"]
    fn rank_that_aborts() {
        let folder = std::path::PathBuf::from(std::env::var_os(FOLDER).unwrap());
        let ranks = Mpi::start().unwrap();
        if ranks.rank() == 1 {
            std::fs::write(folder.join("aborts"), "").unwrap();
            ranks.abort(7);
        }
        // Nobody answers.
        let _ = ranks.barrier();
        std::fs::write(folder.join("late"), "").unwrap();
    }
}
