//! The loop on a small model: resuming, checkpoints, and how it stops.

mod best;
mod interrupted;
mod learning;
mod refused;

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

#[derive(Default)]
struct Warnings(Vec<String>);

impl Progress for Warnings {
    fn warning(&mut self, message: &str) {
        self.0.push(message.to_owned());
    }
}
