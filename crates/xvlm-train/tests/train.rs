//! The loop on a small model: resuming, checkpoints, and how it stops.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_train::{
    Batches, BoxError, Criterion, FinishedWeights, Job, Losses, MetricsRow, OptimizerConfig, Progress, RunFolder,
    ScheduleConfig, Silent, Step, StepReport, Summary, TrainConfig, TrainError, Trainable, Warmup, loss_curves,
    read_metrics, train,
};

const INPUTS: usize = 4;
const ROWS: usize = 8;

/// `y = x · wᵀ + b`, with dropout of inputs, and a second output that only some batches train.
struct Regression {
    parameters: Vec<(String, Var)>,
}

struct Points {
    x: Tensor,
    y: Tensor,
    second: bool,
}

impl Regression {
    fn new() -> Self {
        let names = ["first.weight", "first.bias", "second.weight", "second.bias"];
        let parameters = names.iter().enumerate().map(|(i, name)| {
            let shape: &[usize] = if i % 2 == 0 { &[1, INPUTS] } else { &[1] };
            let value = Tensor::full(0.1 * i as f32, shape, &Device::Cpu).unwrap();
            (name.to_string(), Var::from_tensor(&value).unwrap())
        });
        Self { parameters: parameters.collect() }
    }

    fn numbers(&self) -> Vec<f32> {
        let flat = |(_, var): &(String, Var)| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        self.parameters.iter().flat_map(flat).collect()
    }
}

impl Trainable for Regression {
    type Batch = Points;

    fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    fn losses(&self, batch: &Points, step: &mut Step) -> Result<Losses, BoxError> {
        let kept: Vec<f32> = (0..INPUTS * ROWS).map(|_| f32::from(u8::from(step.rng.random_bool(0.9)))).collect();
        let x = (&batch.x * Tensor::from_vec(kept, (ROWS, INPUTS), &Device::Cpu)?)?;
        let loss = |i: usize| -> candle_core::Result<Tensor> {
            let [weight, bias] = [i, i + 1].map(|i| self.parameters[i].1.as_tensor());
            (xvlm_kernels::linear(&x, weight, bias)?.squeeze(1)? - &batch.y)?.sqr()?.mean_all()
        };
        let mut losses = vec![("first", loss(0)?)];
        if batch.second {
            losses.push(("second", loss(2)?));
        }
        Ok(Losses(losses))
    }

    fn samples(batch: &Points) -> usize {
        batch.y.elem_count()
    }
}

/// Batches that follow from the iteration alone; at `fails_at`, there is an error, and at `breaks_at`, targets of NaN.
#[derive(Clone, Copy)]
struct Stream {
    iteration: u64,
    fails_at: Option<u64>,
    breaks_at: Option<u64>,
}

const STREAM: Stream = Stream { iteration: 0, fails_at: None, breaks_at: None };

impl Stream {
    fn from(self, iteration: u64) -> Result<Box<dyn Batches<Points>>, BoxError> {
        Ok(Box::new(Self { iteration, ..self }))
    }
}

impl Batches<Points> for Stream {
    fn next(&mut self) -> Result<Vec<Vec<Points>>, BoxError> {
        let iteration = self.iteration;
        self.iteration += 1;
        if self.fails_at == Some(iteration) {
            return Err("the power is gone".into());
        }
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        rng.set_stream(iteration);
        let streams = if rng.random_bool(0.5) { 2 } else { 1 };
        let batch = |second| {
            let x: Vec<f32> = (0..INPUTS * ROWS).map(|_| rng.random_range(-1.0..1.0)).collect();
            let mut y: Vec<f32> = x.chunks(INPUTS).map(|x| 1.0 + x[0] - 2.0 * x[1] + 0.5 * x[3]).collect();
            if self.breaks_at == Some(iteration) {
                y[3] = f32::NAN;
            }
            let x = Tensor::from_vec(x, (ROWS, INPUTS), &Device::Cpu)?;
            Ok(vec![Points { x, y: Tensor::from_vec(y, ROWS, &Device::Cpu)?, second }])
        };
        [false, true].into_iter().take(streams).map(batch).collect()
    }
}

fn config() -> TrainConfig {
    TrainConfig {
        iterations: 20,
        optimizer: OptimizerConfig { lr: 0.05, lr_mult_names: vec!["second".into()], ..OptimizerConfig::default() },
        schedule: ScheduleConfig { warmup: Warmup::Iterations(4), ..ScheduleConfig::default() },
        log_every: 4,
        checkpoint_every: 5,
        keep_best: false,
        ..TrainConfig::default()
    }
}

fn go(
    model: &Regression,
    stream: Stream,
    config: &TrainConfig,
    at: &Path,
    resume: bool,
) -> Result<Summary, TrainError> {
    let run = RunFolder::new(at)?;
    let trained = train(model, |iteration| stream.from(iteration), config, &Job::alone(&run, resume), &mut Silent)?;
    Ok(trained.summary)
}

/// A run that ends before iteration `iteration`, as if killed there.
fn killed(at: &Path, iteration: u64) {
    let stream = Stream { fails_at: Some(iteration), ..STREAM };
    let error = go(&Regression::new(), stream, &config(), at, false).unwrap_err();
    assert!(matches!(error, TrainError::Batches { iteration: found, .. } if found == iteration + 1), "{error}");
}

/// What of metrics does not depend on the time.
fn lasting(at: &Path) -> Vec<MetricsRow> {
    let timeless = |row| MetricsRow { images_per_second: 0.0, elapsed_seconds: 0.0, peak_memory_mib: None, ..row };
    read_metrics(&at.join("metrics.jsonl")).unwrap().into_iter().map(timeless).collect()
}

fn checkpoints(at: &Path) -> Vec<u64> {
    RunFolder::new(at).unwrap().checkpoints().unwrap().into_iter().map(|(iteration, _)| iteration).collect()
}

fn bytes(at: &Path, iteration: u64, file: &str) -> Vec<u8> {
    fs::read(at.join("checkpoints").join(format!("{iteration:07}")).join(file)).unwrap()
}

#[test]
fn learns() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = TrainConfig { iterations: 600, ..config() };
    config.optimizer.weight_decay = 0.0;
    let summary = go(&Regression::new(), STREAM, &config, dir.path(), false).unwrap();
    assert_eq!(summary.iterations, 600);
    assert!(summary.optimizer_steps > 800 && !summary.out_of_time);
    let curves = loss_curves(&lasting(dir.path()));
    assert_eq!(curves.iter().map(|curve| curve.name.as_str()).collect::<Vec<_>>(), ["first", "second"]);
    let [first, last] = [curves[0].points[0].1, curves[0].points.last().unwrap().1];
    assert!(last < 0.3 * first, "{first} to {last}");
}

#[test]
fn a_resumed_run_is_the_same_run_to_the_bit() {
    let [whole, parts] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let straight = Regression::new();
    go(&straight, STREAM, &config(), whole.path(), false).unwrap();

    // Killed after a report that no checkpoint has: it is taken back.
    killed(parts.path(), 13);
    assert_eq!(lasting(parts.path()).last().unwrap().iteration, 12);
    let resumed = Regression::new();
    go(&resumed, STREAM, &config(), parts.path(), true).unwrap();

    assert_eq!(straight.numbers(), resumed.numbers());
    assert_ne!(straight.numbers(), Regression::new().numbers());
    assert_eq!(lasting(whole.path()), lasting(parts.path()));
    for file in ["weights.safetensors", "optimizer.safetensors"] {
        assert_eq!(bytes(whole.path(), 20, file), bytes(parts.path(), 20, file), "{file}");
    }
}

#[test]
fn each_time_training_goes_on_there_is_an_event_file() {
    let [dir, without] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let files = |at: &Path| fs::read_dir(at.join("tensorboard")).map_or(0, |files| files.count());
    killed(dir.path(), 13);
    assert_eq!(files(dir.path()), 1);
    for _ in ["to its end", "with nothing left to do"] {
        go(&Regression::new(), STREAM, &config(), dir.path(), true).unwrap();
        assert_eq!(files(dir.path()), 2);
    }
    go(&Regression::new(), STREAM, &TrainConfig { tensorboard: false, ..config() }, without.path(), false).unwrap();
    assert_eq!(files(without.path()), 0);
}

#[test]
fn resuming_a_finished_run_brings_its_model() {
    let dir = tempfile::tempdir().unwrap();
    let [trained, resumed] = [Regression::new(), Regression::new()];
    let first = go(&trained, STREAM, &config(), dir.path(), false).unwrap();
    let again = go(&resumed, STREAM, &config(), dir.path(), true).unwrap();
    assert_eq!(trained.numbers(), resumed.numbers());
    assert_eq!((again.iterations, again.optimizer_steps), (20, first.optimizer_steps));
    assert_eq!(first.losses, again.losses);
}

#[test]
fn the_seed_matters() {
    let numbers = |seed| {
        let dir = tempfile::tempdir().unwrap();
        let model = Regression::new();
        go(&model, STREAM, &TrainConfig { seed, ..config() }, dir.path(), false).unwrap();
        model.numbers()
    };
    assert_eq!(numbers(1), numbers(1));
    assert_ne!(numbers(1), numbers(2));
}

#[test]
fn a_parameter_without_gradient_stays() {
    let dir = tempfile::tempdir().unwrap();
    let model = Regression::new();
    // Only iterations without a second batch.
    struct First(Stream);
    impl Batches<Points> for First {
        fn next(&mut self) -> Result<Vec<Vec<Points>>, BoxError> {
            self.0.next().map(|batches| batches.into_iter().take(1).collect())
        }
    }
    let run = RunFolder::new(dir.path()).unwrap();
    train(&model, |_| Ok(Box::new(First(STREAM))), &config(), &Job::alone(&run, false), &mut Silent).unwrap();
    let (before, after) = (Regression::new().numbers(), model.numbers());
    assert_ne!(before[..5], after[..5]);
    assert_eq!(before[5..], after[5..]);
}

#[test]
fn keeps_the_last_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    go(&Regression::new(), STREAM, &config(), dir.path(), false).unwrap();
    assert_eq!(checkpoints(dir.path()), [15, 20]);
    let names: Vec<_> = fs::read_dir(dir.path().join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let iterations: Vec<_> = lasting(dir.path()).iter().map(|row| row.iteration).collect();
    assert_eq!(iterations, [4, 5, 8, 10, 12, 15, 16, 20]);
}

/// Damages the newest checkpoint (of iteration 10) in one way; resuming must go on from the one before, to the same end.
/// Returns the warnings.
fn survives(damage: impl Fn(&Path)) -> Vec<String> {
    let [whole, broken] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    go(&Regression::new(), STREAM, &config(), whole.path(), false).unwrap();
    killed(broken.path(), 12);
    assert_eq!(checkpoints(broken.path()), [5, 10]);
    damage(&broken.path().join("checkpoints/0000010"));

    let mut from = None;
    let run = RunFolder::new(broken.path()).unwrap();
    let start = |iteration| {
        from = Some(iteration);
        STREAM.from(iteration)
    };
    let mut warned = Warnings::default();
    train(&Regression::new(), start, &config(), &Job::alone(&run, true), &mut warned).unwrap();
    assert_eq!(from, Some(5));
    assert_eq!(checkpoints(broken.path()), [15, 20]);
    assert_eq!(lasting(whole.path()), lasting(broken.path()));
    assert_eq!(bytes(whole.path(), 20, "weights.safetensors"), bytes(broken.path(), 20, "weights.safetensors"));
    assert_eq!(fs::read_dir(broken.path().join("checkpoints")).unwrap().count(), 2);
    warned.0
}

#[derive(Default)]
struct Warnings(Vec<String>);

impl Progress for Warnings {
    fn warning(&mut self, message: &str) {
        self.0.push(message.to_owned());
    }
}

#[test]
fn survives_a_kill_while_writing() {
    survives(|checkpoint| {
        // The folder has its name only when it is whole.
        let aside = checkpoint.with_file_name(".writing-x1y2z3");
        fs::rename(checkpoint, &aside).unwrap();
        fs::remove_file(aside.join("state.json")).unwrap();
    });
}

#[test]
fn survives_a_kill_while_removing() {
    survives(|checkpoint| fs::rename(checkpoint, checkpoint.with_file_name(".removing-0000010")).unwrap());
}

#[test]
fn survives_missing_and_cut_files() {
    for file in ["weights.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"] {
        let warned = survives(|checkpoint| fs::remove_file(checkpoint.join(file)).unwrap());
        let said = format!("0000010/{file}: expected a file, found none; this checkpoint is not used");
        assert!(warned.len() == 1 && warned[0].ends_with(&said), "{warned:?}");
        for share in [0, 2] {
            survives(|checkpoint| {
                let file = fs::OpenOptions::new().write(true).open(checkpoint.join(file)).unwrap();
                let len = file.metadata().unwrap().len();
                file.set_len(len * share / 3).unwrap();
            });
        }
    }
}

#[test]
fn survives_a_flipped_bit() {
    for file in ["weights.safetensors", "optimizer.safetensors", "state.json"] {
        let warned = survives(|checkpoint| {
            let mut bytes = fs::read(checkpoint.join(file)).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(checkpoint.join(file), bytes).unwrap();
        });
        let told = warned.len() == 1 && warned[0].contains(&format!("0000010/{file}: expected "));
        assert!(told && warned[0].matches("SHA-256 ").count() == 2, "{warned:?}");
    }
}

/// A model whose score has its highest value on the way to the lowest losses, and cannot be computed after an iteration.
struct Scored(Regression, Option<u64>);

impl Trainable for Scored {
    type Batch = Points;

    fn parameters(&self) -> &[(String, Var)] {
        self.0.parameters()
    }

    fn losses(&self, batch: &Points, step: &mut Step) -> Result<Losses, BoxError> {
        self.0.losses(batch, step)
    }

    fn samples(batch: &Points) -> usize {
        Regression::samples(batch)
    }

    fn score(&self, iteration: u64, weights: FinishedWeights) -> Result<Option<f64>, BoxError> {
        if self.1 == Some(iteration) {
            return Err("a picture is gone".into());
        }
        Ok(Some(score_of(&weights()?)))
    }
}

fn score_of(weights: &[(String, Tensor)]) -> f64 {
    let (_, weight) = weights.iter().find(|(name, _)| name == "first.weight").unwrap();
    -f64::from((weight.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0] - 0.3).abs())
}

#[test]
fn the_best_is_kept_and_the_same_after_an_interruption() {
    let [whole, parts] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let config = TrainConfig { keep_checkpoints: 1, keep_best: true, ..config() };
    let go = |at: &Path, resume, fails_at| {
        let (run, stream) = (RunFolder::new(at).unwrap(), Stream { fails_at, ..STREAM });
        let job = &Job::alone(&run, resume);
        train(&Scored(Regression::new(), None), |start| stream.from(start), &config, job, &mut Silent).map(|_| run)
    };
    let run = go(whole.path(), false, None).unwrap();
    let (best, path) = run.best().unwrap().unwrap();
    assert!(best.by == Criterion::Score && best.iteration < 20, "{best:?}");
    assert_eq!(checkpoints(whole.path()), [best.iteration, 20]);
    assert!(path.join("weights.safetensors").exists());
    assert_eq!(best.score, score_of(&run.weights(best.iteration).unwrap()));
    let rows = lasting(whole.path());
    let scored: Vec<(u64, f64)> = rows.iter().filter_map(|row| Some((row.iteration, row.score?))).collect();
    assert_eq!(scored.iter().map(|(iteration, _)| *iteration).collect::<Vec<_>>(), [5, 10, 15, 20]);
    assert!(scored.contains(&(best.iteration, best.score)), "{scored:?}");

    // After the best, and once more at the end.
    assert!(go(parts.path(), false, Some(best.iteration + 2)).is_err());
    assert!(go(parts.path(), true, Some(18)).is_err());
    go(parts.path(), true, None).unwrap();
    let told = |at: &Path| fs::read_to_string(at.join("checkpoints/best.json")).unwrap();
    assert_eq!(told(whole.path()), told(parts.path()));
    assert_eq!(checkpoints(parts.path()), checkpoints(whole.path()));
    assert_eq!(bytes(whole.path(), 20, "weights.safetensors"), bytes(parts.path(), 20, "weights.safetensors"));
}

#[test]
fn the_score_is_that_of_the_weights_that_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { keep_best: true, ema_decay: Some(0.9), ..config() };
    let (run, model) = (RunFolder::new(dir.path()).unwrap(), Scored(Regression::new(), None));
    train(&model, |start| STREAM.from(start), &config, &Job::alone(&run, false), &mut Silent).unwrap();
    let (best, _) = run.best().unwrap().unwrap();
    assert_eq!(best.score, score_of(&run.weights(best.iteration).unwrap()));
    let trained = -f64::from((model.0.numbers()[0] - 0.3).abs());
    assert_ne!(lasting(dir.path()).last().unwrap().score, Some(trained));
}

#[test]
fn a_checkpoint_that_cannot_be_scored_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (run, config) = (RunFolder::new(dir.path()).unwrap(), TrainConfig { keep_best: true, ..config() });
    let go = |fails_at| {
        let model = Scored(Regression::new(), fails_at);
        train(&model, |start| STREAM.from(start), &config, &Job::alone(&run, true), &mut Silent)
    };
    let error = go(Some(10)).err().unwrap();
    assert!(matches!(error, TrainError::Model { iteration: 10, .. }), "{error}");
    assert_eq!(checkpoints(dir.path()), [5, 10]);
    assert_eq!(go(None).unwrap().summary.iterations, 20);
}

/// A model of which a number that grows is observed, whatever its losses.
struct Observed(Regression, Cell<f64>);

impl Trainable for Observed {
    type Batch = Points;

    fn parameters(&self) -> &[(String, Var)] {
        self.0.parameters()
    }

    fn losses(&self, batch: &Points, step: &mut Step) -> Result<Losses, BoxError> {
        self.1.set(self.1.get() + 1.0);
        self.0.losses(batch, step)
    }

    fn observations(&self) -> Vec<(&'static str, f64)> {
        vec![("other", -2.0 * self.1.get()), ("reward", self.1.get())]
    }

    fn judged_by(&self) -> Option<&'static str> {
        Some("reward")
    }

    fn samples(batch: &Points) -> usize {
        Regression::samples(batch)
    }
}

#[test]
fn an_observation_tells_the_best_in_place_of_losses() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { keep_best: true, log_every: 5, ..config() };
    let (run, model) = (RunFolder::new(dir.path()).unwrap(), Observed(Regression::new(), Cell::new(0.0)));
    train(&model, |start| STREAM.from(start), &config, &Job::alone(&run, false), &mut Silent).unwrap();
    let (best, _) = run.best().unwrap().unwrap();
    let last = lasting(dir.path()).pop().unwrap();
    assert_eq!((best.iteration, best.by, best.score), (20, Criterion::Observation, last.losses["reward"]));
}

#[test]
fn without_a_score_the_losses_tell_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { keep_best: true, log_every: 5, ..config() };
    go(&Regression::new(), STREAM, &config, dir.path(), false).unwrap();
    let (best, _) = RunFolder::new(dir.path()).unwrap().best().unwrap().unwrap();
    let rows = lasting(dir.path());
    let sum = |row: &MetricsRow| (row.losses.len(), -row.losses.values().sum::<f64>(), row.iteration);
    let expected = rows.iter().map(sum).max_by(|a, b| a.partial_cmp(b).unwrap()).unwrap();
    assert_eq!((best.losses, best.score, best.iteration), expected);
    assert_eq!(best.by, Criterion::Losses);
}

/// A model that gets worse all the time.
struct Falling(Regression, Cell<f64>);

impl Trainable for Falling {
    type Batch = Points;

    fn parameters(&self) -> &[(String, Var)] {
        self.0.parameters()
    }

    fn losses(&self, batch: &Points, step: &mut Step) -> Result<Losses, BoxError> {
        self.0.losses(batch, step)
    }

    fn samples(batch: &Points) -> usize {
        Regression::samples(batch)
    }

    fn score(&self, _: u64, _: FinishedWeights) -> Result<Option<f64>, BoxError> {
        self.1.set(self.1.get() - 1.0);
        Ok(Some(self.1.get()))
    }
}

#[test]
fn what_is_gone_or_not_kept_is_not_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::new(dir.path()).unwrap();
    let config = |iterations, keep_best| TrainConfig { iterations, keep_best, keep_checkpoints: 9, ..config() };
    let go = |config: TrainConfig, score: f64| {
        let (model, job) = (Falling(Regression::new(), Cell::new(score)), Job::alone(&run, true));
        train(&model, |start| STREAM.from(start), &config, &job, &mut Silent).unwrap();
        run.best().unwrap().map(|(best, _)| best.iteration)
    };
    assert_eq!(go(config(15, true), 0.0), Some(5));
    fs::remove_dir_all(dir.path().join("checkpoints/0000005")).unwrap();
    assert_eq!(go(config(20, true), -100.0), Some(20));
    assert_eq!(go(config(25, false), -200.0), None);
    let state = String::from_utf8(bytes(dir.path(), 25, "state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["standing"]["judge"], serde_json::json!({ "since": {}, "best": null }));
}

#[test]
fn a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not() {
    let [whole, parts] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let config = TrainConfig { keep_best: true, ..config() };
    go(&Regression::new(), STREAM, &config, whole.path(), false).unwrap();

    /// Asks for it while it builds the batches of the iteration after so many.
    struct Asking(Stream, u64, Arc<AtomicBool>);
    impl Batches<Points> for Asking {
        fn next(&mut self) -> Result<Vec<Vec<Points>>, BoxError> {
            self.2.store(self.0.iteration == self.1, Ordering::Relaxed);
            self.0.next()
        }
    }
    let run = RunFolder::new(parts.path()).unwrap();
    // Between reports and checkpoints; at a report; at a checkpoint; at the end, which is not an interruption.
    for (i, (at, stopped)) in [(6, true), (7, true), (12, true), (14, true), (19, false)].into_iter().enumerate() {
        let stop = Arc::new(AtomicBool::new(false));
        let job = Job { stop: Arc::clone(&stop), ..Job::alone(&run, i > 0) };
        let batches = |iteration| -> Result<Box<dyn Batches<Points>>, BoxError> {
            Ok(Box::new(Asking(Stream { iteration, ..STREAM }, at, Arc::clone(&stop))))
        };
        let summary = train(&Regression::new(), batches, &config, &job, &mut Silent).unwrap().summary;
        assert_eq!((summary.iterations, summary.stopped, summary.out_of_time), (at + 1, stopped, false));
        assert_eq!(checkpoints(parts.path()).last(), Some(&(at + 1)));
    }
    assert_eq!(lasting(whole.path()), lasting(parts.path()));
    for file in ["weights.safetensors", "optimizer.safetensors"] {
        assert_eq!(bytes(whole.path(), 20, file), bytes(parts.path(), 20, file), "{file}");
    }
    let told = |at: &Path| fs::read_to_string(at.join("checkpoints/best.json")).unwrap();
    assert_eq!(told(whole.path()), told(parts.path()));
}

#[test]
fn two_processes_do_not_train_in_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    let lock = fs::File::create(dir.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let error = go(&Regression::new(), STREAM, &config(), dir.path(), false).unwrap_err();
    assert!(matches!(&error, TrainError::Locked { path } if path.ends_with("lock")), "{error}");
    drop(lock);
    go(&Regression::new(), STREAM, &config(), dir.path(), false).unwrap();
}

#[test]
fn some_records_are_named_and_the_others_counted() {
    let records = |count: usize| {
        let records = (1..=count).map(|i| format!("a.jsonl:{i}")).collect();
        let (loss, tensor, of_ranks) = ("itc", None, if count > 8 { 4 } else { 1 });
        let value = f64::NAN;
        TrainError::NotFinite { iteration: 1, loss, value, tensor, records, of_ranks, checkpoint: None }.to_string()
    };
    assert!(records(8).contains("; the batch was made of a.jsonl:1, a.jsonl:2,"), "{}", records(8));
    assert!(records(8).contains("a.jsonl:8; there"), "{}", records(8));
    assert!(records(11).contains("a.jsonl:8 and 3 more; there"), "{}", records(11));
    let said = "; it is in the batch of one of 4 ranks: this rank's was made of a.jsonl:1,";
    assert!(records(11).contains(said), "{}", records(11));
}

#[test]
fn survives_a_half_written_row() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let path = dir.path().join("metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}{{\"iteration\":1")).unwrap();
    assert_eq!(lasting(dir.path()).last().unwrap().iteration, 12);
    go(&Regression::new(), STREAM, &config(), dir.path(), true).unwrap();
    assert_eq!(lasting(dir.path()).len(), 8);

    fs::write(&path, format!("{text}{{\"iteration\":1\n")).unwrap();
    let error = read_metrics(&path).unwrap_err();
    assert!(error.to_string().contains("metrics.jsonl: line 6: expected a row of metrics"), "{error}");
}

#[test]
fn does_not_begin_anew_when_all_checkpoints_are_damaged() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    for (_, checkpoint) in RunFolder::new(dir.path()).unwrap().checkpoints().unwrap() {
        fs::remove_file(checkpoint.join("weights.safetensors")).unwrap();
    }
    let error = go(&Regression::new(), STREAM, &config(), dir.path(), true).unwrap_err();
    assert!(error.to_string().ends_with("0000010/weights.safetensors: expected a file, found none"), "{error}");
}

#[test]
fn stops_at_nan_and_keeps_what_was_good() {
    let dir = tempfile::tempdir().unwrap();
    let model = Regression::new();
    let stream = Stream { breaks_at: Some(12), ..STREAM };
    let error = go(&model, stream, &config(), dir.path(), false).unwrap_err();
    let TrainError::NotFinite { iteration: 13, loss, value, checkpoint: Some(checkpoint), .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*loss, "first");
    assert!(value.is_nan() && checkpoint.ends_with("checkpoints/0000010"));
    assert!(error.to_string().starts_with("iteration 13: first: expected a finite number, found NaN; the last"));
    assert!(model.numbers().iter().all(|number| number.is_finite()));
    assert_eq!(checkpoints(dir.path()), [5, 10]);

    // With better data, it goes on.
    go(&model, STREAM, &config(), dir.path(), true).unwrap();
    assert_eq!(checkpoints(dir.path()), [15, 20]);
}

#[test]
fn stops_at_an_infinite_gradient() {
    struct Root(Vec<(String, Var)>);
    impl Trainable for Root {
        type Batch = ();
        fn parameters(&self) -> &[(String, Var)] {
            &self.0
        }
        fn losses(&self, _: &(), _: &mut Step) -> Result<Losses, BoxError> {
            Ok(Losses(vec![("root", self.0[0].1.sqrt()?)]))
        }
        fn samples(_: &()) -> usize {
            1
        }
    }
    struct Units;
    impl Batches<()> for Units {
        fn next(&mut self) -> Result<Vec<Vec<()>>, BoxError> {
            Ok(vec![vec![()]])
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::new(dir.path()).unwrap();
    let model = Root(vec![("x".into(), Var::new(0f32, &Device::Cpu).unwrap())]);
    let error = train(&model, |_| Ok(Box::new(Units)), &config(), &Job::alone(&run, false), &mut Silent).err().unwrap();
    assert_eq!(
        error.to_string(),
        "iteration 1: gradient norm: expected a finite number, found inf; the first tensor with such numbers is gradient of x; there is \
         no checkpoint yet"
    );
    assert_eq!(model.0[0].1.to_scalar::<f32>().unwrap(), 0.0);
}

#[test]
fn does_not_run_over_another_run() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let error = go(&Regression::new(), STREAM, &config(), dir.path(), false).unwrap_err();
    assert!(matches!(error, TrainError::Occupied { .. }), "{error}");
    assert_eq!(checkpoints(dir.path()), [5, 10]);
}

#[test]
fn a_changed_configuration_is_named() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let mut changed = config();
    changed.optimizer.betas.1 = 0.999;
    let error = go(&Regression::new(), STREAM, &changed, dir.path(), true).unwrap_err();
    assert!(error.to_string().contains("optimizer.betas = [0.9,0.98], found [0.9,0.999] now"), "{error}");
    // How long, and what to write when, may change.
    let longer = TrainConfig { iterations: 24, log_every: 3, keep_checkpoints: 9, ..config() };
    assert_eq!(go(&Regression::new(), STREAM, &longer, dir.path(), true).unwrap().iterations, 24);
}

#[test]
fn another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let mut model = Regression::new();
    model.parameters[1] = ("first.bias".into(), Var::new(&[0f32, 0.0], &Device::Cpu).unwrap());
    let error = go(&model, STREAM, &config(), dir.path(), true).unwrap_err();
    let said = "weights.safetensors: tensor first.bias: expected F32 [2], found F32 [1]";
    assert!(error.to_string().ends_with(said), "{error}");
    model.parameters[1].0 = "bias".into();
    let error = go(&model, STREAM, &config(), dir.path(), true).unwrap_err();
    assert!(error.to_string().ends_with("tensor bias: expected F32 [2], found none"), "{error}");
    model.parameters.truncate(1);
    let error = go(&model, STREAM, &config(), dir.path(), true).unwrap_err();
    assert!(error.to_string().ends_with("expected 1 tensors, found 4"), "{error}");
}

#[test]
fn parameters_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Regression::new();
    model.parameters[3].1 = model.parameters[1].1.clone();
    let error = go(&model, STREAM, &config(), dir.path(), false).unwrap_err();
    assert_eq!(error.to_string(), "parameter second.bias: expected a tensor of its own, found that of first.bias");
    model.parameters[3] = ("second.bias".into(), Var::new(&[0f64], &Device::Cpu).unwrap());
    let error = go(&model, STREAM, &config(), dir.path(), false).unwrap_err();
    assert_eq!(error.to_string(), "parameter second.bias: expected dtype F32, BF16 or F16, found F64");
}

#[test]
fn reports() {
    #[derive(Default)]
    struct Heard {
        start: Option<(u64, u64)>,
        steps: Vec<(u64, usize)>,
        finished: bool,
    }
    impl Progress for Heard {
        fn start(&mut self, of: u64, at: u64) {
            self.start = Some((of, at));
        }
        fn step(&mut self, report: &StepReport) {
            assert!(report.images_per_second > 0.0 && report.grad_norm > 0.0);
            assert_eq!((report.of, report.eta.is_zero()), (20, report.iteration == 20));
            self.steps.push((report.iteration, report.losses.len()));
        }
        fn finish(&mut self, summary: &Summary) {
            self.finished = summary.iterations == 20;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let (run, mut heard) = (RunFolder::new(dir.path()).unwrap(), Heard::default());
    train(&Regression::new(), |start| STREAM.from(start), &config(), &Job::alone(&run, true), &mut heard).unwrap();
    assert_eq!(heard.start, Some((20, 10)));
    assert_eq!(heard.steps.iter().map(|step| step.0).collect::<Vec<_>>(), [12, 15, 16, 20]);
    assert!(heard.finished && heard.steps.iter().any(|step| step.1 == 2));
}

#[test]
fn a_time_limit_ends_the_run_with_a_low_rate_and_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let limit = Duration::from_secs(1);
    let config = TrainConfig {
        iterations: 1_000_000_000,
        checkpoint_every: 1_000_000_000,
        time_limit_minutes: Some(limit.as_secs_f64() / 60.0),
        ..config()
    };
    let summary = go(&Regression::new(), STREAM, &config, dir.path(), false).unwrap();
    assert!(summary.out_of_time && summary.elapsed >= limit);
    assert_eq!(checkpoints(dir.path()), [summary.iterations]);
    let rates: Vec<_> = lasting(dir.path()).iter().map(|row| row.lr).collect();
    assert!(rates[0] > 0.2 * config.optimizer.lr, "{}", rates[0]);
    assert!(*rates.last().unwrap() < 0.3 * config.optimizer.lr, "{rates:?}");
    // The time is up for a resumed run, too.
    assert_eq!(go(&Regression::new(), STREAM, &config, dir.path(), true).unwrap().iterations, summary.iterations);
}
