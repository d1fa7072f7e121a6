//! The loop with half types, means of weights, frozen parameters and accumulated gradients.

use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_train::{
    Batches, BoxError, Job, Losses, OptimizerConfig, Precision, RunFolder, ScheduleConfig, Silent, Step, TrainConfig,
    TrainError, Trainable, Trained, Warmup, read_metrics, train,
};

const INPUTS: usize = 4;
const ROWS: usize = 8;

/// Two linear maps, one after the other.
struct Maps {
    dtype: DType,
    parameters: Vec<(String, Var)>,
}

impl Maps {
    fn new(precision: Precision) -> Self {
        let dtype = precision.dtype();
        let shapes: [(&str, &[usize]); 4] =
            [("inner.weight", &[3, INPUTS]), ("inner.bias", &[3]), ("outer.weight", &[1, 3]), ("outer.bias", &[1])];
        let parameters = shapes.into_iter().enumerate().map(|(i, (name, shape))| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|j| ((i + 5 * j) as f32).sin()).collect();
            let values = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            (name.to_owned(), Var::from_tensor(&values).unwrap())
        });
        Self { dtype, parameters: parameters.collect() }
    }

    fn numbers(&self) -> Vec<f32> {
        let wide = |(_, var): &(String, Var)| var.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
        self.parameters.iter().flat_map(|parameter| wide(parameter).to_vec1::<f32>().unwrap()).collect()
    }
}

impl Trainable for Maps {
    type Batch = (Tensor, Tensor);

    fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    fn losses(&self, (x, y): &Self::Batch, step: &mut Step) -> Result<Losses, BoxError> {
        let [weight, bias, outer, outer_bias] = [0, 1, 2, 3].map(|i: usize| self.parameters[i].1.as_tensor().clone());
        let x = x.to_dtype(self.dtype)?;
        let inner = step.tape.segment(move || xvlm_kernels::linear(&x, &weight, &bias)?.tanh())?;
        let found = xvlm_kernels::linear(&inner, &outer, &outer_bias)?.squeeze(1)?.to_dtype(DType::F32)?;
        Ok(Losses(vec![("loss", (found - y)?.sqr()?.mean_all()?)]))
    }

    fn samples((x, _): &Self::Batch) -> usize {
        x.dims()[0]
    }
}

/// Batches that follow from the iteration alone, each in so many parts; at `fails_at`, there is an error.
#[derive(Clone, Copy)]
struct Stream {
    iteration: u64,
    parts: usize,
    fails_at: Option<u64>,
}

const STREAM: Stream = Stream { iteration: 0, parts: 1, fails_at: None };

impl Batches<(Tensor, Tensor)> for Stream {
    fn next(&mut self) -> Result<Vec<Vec<(Tensor, Tensor)>>, BoxError> {
        if self.fails_at == Some(self.iteration) {
            return Err("the power is gone".into());
        }
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        rng.set_stream(self.iteration);
        self.iteration += 1;
        let x: Vec<f32> = (0..INPUTS * ROWS).map(|_| rng.random_range(-1.0..1.0)).collect();
        let y: Vec<f32> = x.chunks(INPUTS).map(|x| 1.0 + x[0] - 2.0 * x[1] + 0.5 * x[3]).collect();
        let x = Tensor::from_vec(x, (ROWS, INPUTS), &Device::Cpu)?.chunk(self.parts, 0)?;
        let y = Tensor::from_vec(y, ROWS, &Device::Cpu)?.chunk(self.parts, 0)?;
        Ok(vec![x.into_iter().zip(y).collect()])
    }
}

fn config(precision: Precision) -> TrainConfig {
    TrainConfig {
        iterations: 30,
        optimizer: OptimizerConfig { lr: 0.01, lr_mult: 1.0, ..OptimizerConfig::default() },
        schedule: ScheduleConfig { warmup: Warmup::Iterations(2), ..ScheduleConfig::default() },
        precision,
        log_every: 5,
        checkpoint_every: 10,
        ..TrainConfig::default()
    }
}

fn go(model: &Maps, stream: Stream, config: &TrainConfig, at: &Path, resume: bool) -> Result<Trained, TrainError> {
    let run = RunFolder::new(at)?;
    let batches = |iteration| Ok(Box::new(Stream { iteration, ..stream }) as Box<dyn Batches<_>>);
    train(model, batches, config, &Job::alone(&run, resume), &mut Silent)
}

fn numbers(weights: &[(String, Tensor)]) -> Vec<f32> {
    weights.iter().flat_map(|(_, weights)| weights.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Trains at once, and again with an interruption: the same bits in the model, in what it hands out and in its checkpoint.
fn resumes_to_the_bit(stream: Stream, config: &TrainConfig, files: &[&str]) {
    let [whole, parts] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [straight, resumed] = [Maps::new(config.precision), Maps::new(config.precision)];
    let expected = go(&straight, stream, config, whole.path(), false).unwrap();
    let killed = Stream { fails_at: Some(17), ..stream };
    assert!(go(&Maps::new(config.precision), killed, config, parts.path(), false).is_err());
    let found = go(&resumed, stream, config, parts.path(), true).unwrap();
    assert_eq!(straight.numbers(), resumed.numbers());
    assert_ne!(straight.numbers(), Maps::new(config.precision).numbers());
    assert_eq!(numbers(&expected.weights), numbers(&found.weights));
    assert_eq!(expected.summary.optimizer_steps, found.summary.optimizer_steps);
    for file in files {
        let bytes = |at: &Path| fs::read(at.join("checkpoints/0000030").join(file)).unwrap();
        assert_eq!(bytes(whole.path()), bytes(parts.path()), "{file}");
    }
    let scales = |at: &Path| -> Vec<_> {
        read_metrics(&at.join("metrics.jsonl")).unwrap().iter().map(|row| row.loss_scale).collect()
    };
    assert_eq!(scales(whole.path()), scales(parts.path()));
}

#[test]
fn a_run_of_a_half_type_resumes_to_the_bit() {
    for precision in [Precision::Bf16, Precision::F16] {
        resumes_to_the_bit(STREAM, &config(precision), &["weights.safetensors", "optimizer.safetensors"]);
    }
}

#[test]
fn means_of_weights_resume_to_the_bit() {
    for precision in [Precision::F32, Precision::Bf16] {
        let config = TrainConfig { ema_decay: Some(0.9), ..config(precision) };
        resumes_to_the_bit(STREAM, &config, &["weights.safetensors", "ema.safetensors"]);
    }
    // The finished model has the means; what is trained is another.
    let dir = tempfile::tempdir().unwrap();
    let model = Maps::new(Precision::F32);
    let config = TrainConfig { ema_decay: Some(0.9), ..config(Precision::F32) };
    let trained = go(&model, STREAM, &config, dir.path(), false).unwrap();
    let difference = largest_difference(&numbers(&trained.weights), &model.numbers());
    assert!((1e-4..0.1).contains(&difference), "{difference}");
}

#[test]
fn accumulated_gradients_resume_to_the_bit() {
    let config = TrainConfig { accumulate: 2, ..config(Precision::F32) };
    resumes_to_the_bit(Stream { parts: 2, ..STREAM }, &config, &["weights.safetensors", "optimizer.safetensors"]);
}

#[test]
fn parts_of_a_batch_make_the_step_of_the_whole() {
    let run = |parts| {
        let dir = tempfile::tempdir().unwrap();
        let model = Maps::new(Precision::F32);
        let config = TrainConfig { accumulate: parts, ..config(Precision::F32) };
        let trained = go(&model, Stream { parts, ..STREAM }, &config, dir.path(), false).unwrap();
        assert_eq!(trained.summary.optimizer_steps, 30);
        (model.numbers(), trained.summary.losses[0].1)
    };
    let ((whole, loss), (halves, mean)) = (run(1), run(2));
    assert!(largest_difference(&whole, &halves) < 1e-6 && (loss - mean).abs() < 1e-6, "{whole:?} {halves:?}");
}

#[test]
fn half_types_learn_what_f32_learns() {
    let run = |precision| {
        let dir = tempfile::tempdir().unwrap();
        let trained = go(&Maps::new(precision), STREAM, &config(precision), dir.path(), false).unwrap();
        assert!(trained.weights.iter().all(|(_, weights)| weights.dtype() == DType::F32));
        (trained.summary.losses[0].1, numbers(&trained.weights))
    };
    let (loss, weights) = run(Precision::F32);
    for precision in [Precision::Bf16, Precision::F16] {
        let (found, found_weights) = run(precision);
        assert!((found - loss).abs() < 0.03 * loss, "{precision:?}: {found} for {loss}");
        assert!(largest_difference(&found_weights, &weights) < 0.03, "{precision:?}: {found_weights:?} {weights:?}");
    }
}

#[test]
fn f16_leaves_out_steps_that_overflow() {
    let dir = tempfile::tempdir().unwrap();
    // Large targets: the first gradients, times the scale, are more than 65504.
    struct Large(Stream);
    impl Batches<(Tensor, Tensor)> for Large {
        fn next(&mut self) -> Result<Vec<Vec<(Tensor, Tensor)>>, BoxError> {
            let batches = self.0.next()?.into_iter().map(|batches| {
                batches.into_iter().map(|(x, y)| Ok((x, (y * 100.0)?))).collect::<Result<Vec<_>, BoxError>>()
            });
            batches.collect()
        }
    }
    let (model, run) = (Maps::new(Precision::F16), RunFolder::new(dir.path()).unwrap());
    let config = TrainConfig { log_every: 1, ..config(Precision::F16) };
    let trained =
        train(&model, |_| Ok(Box::new(Large(STREAM))), &config, &Job::alone(&run, false), &mut Silent).unwrap();
    let rows = read_metrics(&run.metrics_path()).unwrap();
    let scales: Vec<f64> = rows.iter().map(|row| row.loss_scale.unwrap()).collect();
    let left_out = rows.iter().filter(|row| row.grad_norm == 0.0).count();
    assert!(left_out > 2 && rows.iter().all(|row| row.grad_norm.is_finite()), "{scales:?}");
    // Halved at each, and at no other.
    assert_eq!(*scales.last().unwrap(), 65536.0 / f64::from(1 << left_out));
    assert_eq!(trained.summary.optimizer_steps, 30 - left_out as u64);
    assert!(model.numbers().iter().all(|number| number.is_finite()));
    assert_ne!(model.numbers(), Maps::new(Precision::F16).numbers());
    let state = fs::read_to_string(dir.path().join("checkpoints/0000030/state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["loss_scale"][0], *scales.last().unwrap());
}

/// A gradient that is infinite whatever the loss is multiplied by.
struct Root(Vec<(String, Var)>);

impl Trainable for Root {
    type Batch = ();
    fn parameters(&self) -> &[(String, Var)] {
        &self.0
    }
    fn losses(&self, (): &(), _: &mut Step) -> Result<Losses, BoxError> {
        Ok(Losses(vec![("root", self.0[0].1.sqrt()?)]))
    }
    fn samples((): &()) -> usize {
        1
    }
}

struct Units;

impl Batches<()> for Units {
    fn next(&mut self) -> Result<Vec<Vec<()>>, BoxError> {
        Ok(vec![vec![()]])
    }
}

#[test]
fn f16_stops_when_no_scale_helps() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::new(dir.path()).unwrap();
    let root = Var::from_tensor(&Tensor::new(0f32, &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap()).unwrap();
    let model = Root(vec![("x".into(), root)]);
    let config = config(Precision::F16);
    let error = train(&model, |_| Ok(Box::new(Units)), &config, &Job::alone(&run, false), &mut Silent).err().unwrap();
    // 65536 was halved sixteen times.
    assert!(matches!(&error, TrainError::NotFinite { iteration: 17, loss, .. } if loss == "gradient norm"), "{error}");
}

#[test]
fn frozen_parameters_stay_through_checkpoints() {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut config = config(precision);
        config.optimizer.frozen_names = vec!["inner".into()];
        resumes_to_the_bit(STREAM, &config, &["weights.safetensors", "optimizer.safetensors"]);
        let dir = tempfile::tempdir().unwrap();
        let model = Maps::new(precision);
        let before = model.numbers();
        let trained = go(&model, STREAM, &config, dir.path(), false).unwrap();
        let inner = 3 * INPUTS + 3;
        assert_eq!(model.numbers()[..inner], before[..inner]);
        assert_eq!(numbers(&trained.weights)[..inner], before[..inner]);
        assert_ne!(model.numbers()[inner..], before[inner..]);
        let size = |file: &str| fs::metadata(dir.path().join("checkpoints/0000030").join(file)).unwrap().len();
        assert!(size("weights.safetensors") > 4 * before.len() as u64);
        let optimizer = fs::read(dir.path().join("checkpoints/0000030/optimizer.safetensors")).unwrap();
        assert!(!optimizer.windows(5).any(|part| part == b"inner"), "moments of what is not trained");
    }
}
