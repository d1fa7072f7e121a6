//! The loop on several ranks, which are threads here.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use candle_core::{Device, Tensor, Var};
use rand::Rng;
use xvlm_train::ranks::{Alone, Communicator, Gather, Threads, compare};
use xvlm_train::{
    Batches, BoxError, Job, Losses, Precision, Progress, RunFolder, Step, StepReport, Summary, TrainConfig, TrainError,
    Trainable, read_metrics,
};

const RANKS: usize = 3;

/// Some weights that are to become what the batches say; `second` is trained by rank 0 only.
struct Model {
    parameters: Vec<(String, Var)>,
    fails: Option<Fails>,
}

/// What goes wrong on rank 1 in iteration 4.
#[derive(Clone, Copy, PartialEq)]
enum Fails {
    Loss,
    NotFinite,
    Batches,
}

impl Model {
    fn new(rank: usize, precision: Precision) -> Self {
        let parameter = |(i, name): (usize, &str)| {
            let value = Tensor::full(0.1 + (rank + i) as f32, 7, &Device::Cpu).unwrap();
            (name.to_owned(), Var::from_tensor(&value.to_dtype(precision.dtype()).unwrap()).unwrap())
        };
        let names = ["first", "second", "frozen", "third"];
        Self { parameters: names.into_iter().enumerate().map(parameter).collect(), fails: None }
    }
}

struct Targets {
    iteration: u64,
    numbers: Tensor,
}

impl Trainable for Model {
    type Batch = Targets;

    fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    fn losses(&self, batch: &Targets, step: &mut Step) -> Result<Losses, BoxError> {
        let is_here = step.ranks.rank() == 1 && batch.iteration == 4;
        if self.fails == Some(Fails::Loss) && is_here {
            return Err("the power is gone".into());
        }
        let noise = step.rng.random::<f32>() as f64;
        let factor = if self.fails == Some(Fails::NotFinite) && is_here { f64::NAN } else { 1.0 };
        let loss = |i: usize| -> candle_core::Result<Tensor> {
            let weights = self.parameters[i].1.as_tensor();
            let wanted = (&batch.numbers + noise)?.to_dtype(weights.dtype())?;
            (weights - wanted)?.sqr()?.mean_all()? * factor
        };
        let mut losses = vec![("first", (loss(0)? + loss(3)?)?)];
        if step.ranks.rank() == 0 {
            losses.push(("second", loss(1)?));
        }
        Ok(Losses(losses))
    }

    fn samples(_: &Targets) -> usize {
        5
    }
}

struct Stream {
    rank: usize,
    iteration: u64,
    fails: bool,
}

impl Batches<Targets> for Stream {
    fn next(&mut self) -> Result<Vec<Vec<Targets>>, BoxError> {
        self.iteration += 1;
        if self.fails && self.iteration == 4 {
            return Err("the cable is cut".into());
        }
        let numbers = |i: usize| {
            let numbers = (0..7).map(|n| (self.iteration as usize * 3 + self.rank * 5 + i + n) as f32 * 0.37 % 1.0);
            Ok(Targets { iteration: self.iteration, numbers: Tensor::from_iter(numbers, &Device::Cpu)? })
        };
        Ok(vec![(0..2).map(numbers).collect::<Result<_, BoxError>>()?])
    }
}

fn config(iterations: u64, precision: Precision) -> TrainConfig {
    let mut config = TrainConfig { iterations, precision, accumulate: 2, ..TrainConfig::default() };
    config.optimizer.lr = 0.05;
    config.optimizer.frozen_names = vec!["frozen".into()];
    config.schedule = serde_json::from_value(serde_json::json!({"warmup": 2})).unwrap();
    (config.ema_decay, config.log_every, config.checkpoint_every) = (Some(0.9), 2, 3);
    config
}

/// Counts what it hears.
#[derive(Default)]
struct Heard(usize);

impl Progress for Heard {
    fn start(&mut self, _: u64, _: u64) {
        self.0 += 1;
    }

    fn step(&mut self, _: &StepReport) {
        self.0 += 1;
    }

    fn finish(&mut self, _: &Summary) {
        self.0 += 1;
    }
}

type Weights = Vec<(String, Vec<f32>)>;
type Ended = Result<(Summary, Weights, usize), TrainError>;

/// One rank's part.
fn part(
    ranks: Arc<dyn Communicator>,
    out: &Path,
    config: &TrainConfig,
    resume: bool,
    fails: Option<Fails>,
    stop: Arc<AtomicBool>,
) -> Ended {
    let rank = ranks.rank();
    let model = Model { fails, ..Model::new(rank, config.precision) };
    let run = RunFolder::new(out)?;
    let batches = |iteration| {
        let fails = fails == Some(Fails::Batches) && rank == 1;
        Ok(Box::new(Stream { rank, iteration, fails }) as Box<dyn Batches<Targets>>)
    };
    let mut heard = Heard::default();
    let job = Job { ranks, stop, ..Job::alone(&run, resume) };
    let trained = xvlm_train::train(&model, batches, config, &job, &mut heard)?;
    let numbers = |(name, weights): (String, Tensor)| (name, weights.to_vec1().unwrap());
    Ok((trained.summary, trained.weights.into_iter().map(numbers).collect(), heard.0))
}

/// All ranks' parts.
fn together(out: &Path, config: &TrainConfig, resume: bool, fails: Option<Fails>) -> Vec<Ended> {
    thread::scope(|scope| {
        let part = |ranks: Threads| part(Arc::new(ranks), out, config, resume, fails, Arc::default());
        let ranks: Vec<_> = Threads::new(RANKS).into_iter().map(|ranks| scope.spawn(move || part(ranks))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn all_ranks_end_in_the_same_weights_and_rank_0_tells() {
    for precision in [Precision::F32, Precision::Bf16] {
        let dir = tempfile::tempdir().unwrap();
        let ends: Vec<_> =
            together(dir.path(), &config(8, precision), false, None).into_iter().map(Result::unwrap).collect();
        for (rank, (summary, weights, heard)) in ends.iter().enumerate() {
            assert_eq!(weights, &ends[0].1, "rank {rank}");
            assert_eq!(summary.losses, ends[0].0.losses);
            assert_eq!(*heard > 0, rank == 0);
        }
        let weights: HashMap<_, _> = ends[0].1.iter().cloned().collect();
        let start = Model::new(0, Precision::F32).parameters;
        let of = |i: usize| start[i].1.to_vec1::<f32>().unwrap();
        assert!(weights["frozen"].iter().zip(of(2)).all(|(a, b)| (a - b).abs() < 0.01), "frozen as on rank 0");
        assert_ne!(weights["second"], of(1), "trained, although on one rank only");
        let rows = read_metrics(&dir.path().join("metrics.jsonl")).unwrap();
        assert_eq!(rows.iter().map(|row| row.iteration).collect::<Vec<_>>(), [2, 3, 4, 6, 8]);
        assert!(rows.iter().all(|row| row.losses.contains_key("first") && row.losses.contains_key("second")));
    }
}

#[test]
fn a_run_that_is_resumed_ends_in_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let config = config(8, Precision::Bf16);
    let expected = together(&whole, &config, false, None).swap_remove(0).unwrap();
    assert!(together(&cut, &config, false, Some(Fails::Loss)).iter().all(Result::is_err));
    let found = together(&cut, &config, true, None);
    for ended in found {
        let (summary, weights, _) = ended.unwrap();
        assert_eq!((summary.iterations, summary.losses, weights), (8, expected.0.losses.clone(), expected.1.clone()));
    }
    let checkpoint = |run: &Path, file: &str| fs::read(run.join("checkpoints/0000008").join(file)).unwrap();
    for file in ["weights.safetensors", "optimizer.safetensors"] {
        assert!(checkpoint(&whole, file) == checkpoint(&cut, file), "{file}");
    }
}

#[test]
fn an_error_on_one_rank_ends_all() {
    for (fails, expected) in [
        (Fails::Loss, "the power is gone"),
        (Fails::NotFinite, "expected a finite number, found NaN"),
        (Fails::Batches, "the cable is cut"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let errors = together(dir.path(), &config(8, Precision::F32), false, Some(fails)).into_iter();
        let errors: Vec<_> = errors.map(|ended| ended.err().unwrap().to_string()).collect();
        assert!(errors[1].contains(expected), "{}", errors[1]);
        assert!(errors[0].contains("has left") && errors[2].contains("has left"), "{errors:?}");
    }
}

#[test]
fn ranks_that_are_not_alike_are_named() {
    let refused = |config_of: fn(usize) -> TrainConfig| {
        let dir = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            let part = |ranks: Threads| {
                let (path, config) = (dir.path(), config_of(ranks.rank()));
                scope.spawn(move || part(Arc::new(ranks), path, &config, false, None, Arc::default()).err().unwrap())
            };
            let ranks: Vec<_> = Threads::new(RANKS).into_iter().map(part).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap().to_string()).collect::<Vec<_>>()
        })
    };
    let lr = refused(|rank| {
        let mut config = config(8, Precision::F32);
        config.optimizer.lr *= if rank == 2 { 2.0 } else { 1.0 };
        config
    });
    assert_eq!(lr, ["rank 2: expected the configuration of the training of rank 0, found another"; RANKS]);
    let error = thread::scope(|scope| {
        let say = |ranks: Threads| {
            scope.spawn(move || compare(&ranks, [("data", "a".into()), ("model", ranks.rank().to_string())]))
        };
        let ranks: Vec<_> = Threads::new(2).into_iter().map(say).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap().unwrap_err().to_string()).collect::<Vec<_>>()
    });
    assert_eq!(error, ["rank 1: expected the model of rank 0, found another"; 2]);
}

#[test]
fn one_rank_can_stop_all() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(1_000_000, Precision::F32);
    let stop = Arc::new(AtomicBool::new(false));
    let ends: Vec<_> = thread::scope(|scope| {
        let part = |ranks: Threads| {
            let stop = if ranks.rank() == 2 { Arc::clone(&stop) } else { Arc::default() };
            let (config, path) = (&config, dir.path());
            scope.spawn(move || part(Arc::new(ranks), path, config, false, None, stop).unwrap())
        };
        let ranks: Vec<_> = Threads::new(RANKS).into_iter().map(part).collect();
        while !dir.path().join("metrics.jsonl").exists() {
            thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for (summary, weights, _) in &ends {
        assert!(summary.stopped && summary.iterations == ends[0].0.iterations && weights == &ends[0].1);
    }
    let saved = RunFolder::new(dir.path()).unwrap().checkpoints().unwrap();
    assert_eq!(saved.last().unwrap().0, ends[0].0.iterations);
}

#[test]
fn the_gradient_of_gathered_rows_reaches_the_own_ones() {
    let gathered = thread::scope(|scope| {
        let work = |ranks: Threads| {
            let ranks: Arc<dyn Communicator> = Arc::new(ranks);
            // Another number of rows on each rank: 1, 2 and 3.
            let rows = ranks.rank() + 1;
            let own = Tensor::full(rows as f64, (rows, 2), &Device::Cpu).unwrap();
            let own = Var::from_tensor(&own).unwrap();
            let gather = Gather::new(&ranks, rows).unwrap();
            let all = gather.join(&own).unwrap();
            let factors = Tensor::arange(0f64, 12.0, &Device::Cpu).unwrap().reshape((6, 2)).unwrap();
            let gradients = (&all * &factors).unwrap().sum_all().unwrap().backward().unwrap();
            let gradient = gradients.get(&own).unwrap().to_vec2::<f64>().unwrap();
            assert_eq!(gradient, factors.to_vec2::<f64>().unwrap()[gather.own()]);
            assert_eq!(gather.total(), 6);
            assert_eq!(gather.join_numbers(&vec![rows as i64; rows]).unwrap(), [1, 2, 2, 3, 3, 3]);
            assert!(
                gather.join(&Tensor::zeros((rows + 1, 2), candle_core::DType::F64, &Device::Cpu).unwrap()).is_err()
            );
            all.to_vec2::<f64>().unwrap()
        };
        let ranks: Vec<_> = Threads::new(RANKS).into_iter().map(|ranks| scope.spawn(move || work(ranks))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    for all in &gathered {
        assert_eq!(all.iter().map(|row| row[1]).collect::<Vec<_>>(), [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]);
    }
    let alone: Arc<dyn Communicator> = Arc::new(Alone);
    let own = Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert_eq!(Gather::new(&alone, 2).unwrap().join(&own).unwrap().id(), own.id());
}
