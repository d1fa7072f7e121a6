//! What the measurements share: inputs drawn from a seed, and the comparison of an operation with what it could cost.

pub mod plain;

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor, Var};
use criterion::Criterion;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use xvlm::kernels;

/// The device that operations are measured on: the first GPU if the benches are built with `cuda`, else the CPU.
///
/// # Panics
/// If they are built for a GPU and there is none.
pub fn device() -> Device {
    if cfg!(feature = "cuda") { Device::new_cuda(0).expect("a GPU to measure on") } else { Device::Cpu }
}

/// Numbers between −1 and 1 of a float type on a device, as a variable.
///
/// # Errors
/// If the tensor cannot be made.
pub fn random_at(shape: &[usize], dtype: DType, device: &Device) -> Result<Var> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
}

/// The settings of all measurements: few samples, for a machine of two cores.
pub fn criterion() -> Criterion {
    Criterion::default().sample_size(20).configure_from_args()
}

/// What an operation must do at least.
#[derive(Clone, Copy, Debug)]
pub enum Floor {
    /// Move so many bytes between memory and processor: the floor is a copy that moves as many.
    Bytes(usize),
    /// So many multiplications and additions: the floor is one large matrix product of as many, in the same float type.
    Flops(usize),
}

/// A part of a measurement that is run again and again.
type Work<'a> = Box<dyn Fn() + 'a>;

impl Floor {
    /// The work of the floor, on data of its own.
    fn work(self, dtype: DType, device: &Device) -> Result<Work<'static>> {
        /// Rows and columns of the product's second factor: large enough for full speed.
        const SIDE: usize = 768;
        match self {
            Self::Bytes(bytes) if device.is_cpu() => {
                const CHUNK: usize = 1 << 16;
                let from = vec![1u8; bytes / 2];
                let into = std::sync::Mutex::new(vec![0u8; bytes / 2]);
                Ok(Box::new(move || {
                    let mut into = into.lock().expect("one thread takes it");
                    let chunks = into.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
                    chunks.for_each(|(into, from)| into.copy_from_slice(from));
                }))
            }
            Self::Bytes(bytes) => {
                let from = Tensor::ones(bytes / 8, DType::F32, device)?;
                Ok(Box::new(move || drop(from.copy().expect("a copy"))))
            }
            Self::Flops(flops) => {
                let rows = (flops / (2 * SIDE * SIDE)).max(1);
                let a = random_at(&[rows, SIDE], dtype, device)?.detach();
                let b = random_at(&[SIDE, SIDE], dtype, device)?.detach();
                Ok(Box::new(move || drop(a.matmul(&b).expect("a product"))))
            }
        }
    }
}

/// An operation with what it is measured against.
pub struct Case<'a> {
    /// What it is called, with its sizes.
    pub name: String,
    /// The operation.
    pub ours: Box<dyn Fn() -> Result<Tensor> + 'a>,
    /// The same written in candle's own operations.
    pub plain: Box<dyn Fn() -> Result<Tensor> + 'a>,
    /// The least that the forward pass must do, and that forward and backward pass must.
    pub floors: [Floor; 2],
    /// The float type of the operation.
    pub dtype: DType,
}

/// Measurements of operations, and the report on them.
pub struct Comparison {
    criterion: Criterion,
    device: Device,
    /// Names to measure contain this.
    filter: Option<String>,
    /// Whether to compare as well: not where benches are merely run as tests.
    is_bench: bool,
    rows: Vec<String>,
}

impl Default for Comparison {
    fn default() -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        Self {
            criterion: criterion(),
            device: device(),
            filter: arguments.iter().find(|argument| !argument.starts_with('-')).cloned(),
            is_bench: arguments.iter().any(|argument| argument == "--bench"),
            rows: Vec::new(),
        }
    }
}

impl Comparison {
    /// Measures a case twice over: each part by criterion, and all parts in turn, which is what the report is made of, since
    /// only what ran in the same minute is comparable.
    ///
    /// # Errors
    /// If a tensor cannot be made.
    ///
    /// # Panics
    /// If the operation fails.
    pub fn measure(&mut self, case: &Case) -> Result<()> {
        if self.filter.as_ref().is_some_and(|filter| !case.name.contains(filter)) {
            return Ok(());
        }
        let device = &self.device;
        let wait = || device.synchronize().expect("the device");
        let forward = |operation: &dyn Fn() -> Result<Tensor>| {
            drop(operation().expect(&case.name));
            wait();
        };
        let training = |operation: &dyn Fn() -> Result<Tensor>| {
            drop(operation().and_then(|output| output.backward()).expect(&case.name));
            wait();
        };
        let floors = [case.floors[0].work(case.dtype, device)?, case.floors[1].work(case.dtype, device)?];
        let parts: [(&str, Work); 6] = [
            ("forward", Box::new(|| forward(&case.ours))),
            ("plain forward", Box::new(|| forward(&case.plain))),
            (
                "floor of forward",
                Box::new(|| {
                    floors[0]();
                    wait();
                }),
            ),
            ("training", Box::new(|| training(&case.ours))),
            ("plain training", Box::new(|| training(&case.plain))),
            (
                "floor of training",
                Box::new(|| {
                    floors[1]();
                    wait();
                }),
            ),
        ];
        let mut group = self.criterion.benchmark_group(&case.name);
        for (name, part) in &parts {
            group.bench_function(*name, |bencher| bencher.iter(part));
        }
        group.finish();
        if self.is_bench {
            let [forward, plain_forward, floor, training, plain_training, training_floor] = in_turn(&parts);
            let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64();
            self.rows.push(format!(
                "| {} | {:.1?} | {:.1} | {:.0} % | {:.1?} | {:.1} | {:.0} % |",
                case.name,
                forward,
                ratio(plain_forward, forward),
                100.0 * ratio(floor, forward),
                training,
                ratio(plain_training, training),
                100.0 * ratio(training_floor, training),
            ));
        }
        Ok(())
    }

    /// Something measured by criterion alone.
    pub fn criterion(&mut self) -> &mut Criterion {
        &mut self.criterion
    }

    /// Prints the table of all comparisons.
    pub fn report(self) {
        self.criterion.final_summary();
        if !self.rows.is_empty() {
            println!(
                "medians of parts measured in turn; speed over plain candle operations; share of the floor reached\n"
            );
            println!("| operation | forward | × plain | of floor | with gradients | × plain | of floor |");
            println!("|---|---|---|---|---|---|---|");
            self.rows.iter().for_each(|row| println!("{row}"));
        }
    }
}

/// Median durations of the parts, run one after the other in many rounds.
fn in_turn<const N: usize>(parts: &[(&str, Work); N]) -> [Duration; N] {
    const ROUNDS: usize = 15;
    /// A sample takes at least this long, so that the clock does not count.
    const SAMPLE: Duration = Duration::from_millis(2);
    let repeats = parts.each_ref().map(|(_, part)| {
        part();
        let start = Instant::now();
        part();
        (SAMPLE.as_nanos() / start.elapsed().as_nanos().max(1)).max(1) as u32
    });
    let mut samples = [(); N].map(|()| Vec::with_capacity(ROUNDS));
    for _ in 0..ROUNDS {
        for (((_, part), samples), &repeats) in parts.iter().zip(&mut samples).zip(&repeats) {
            // What ran before has emptied the caches of this part's data.
            part();
            let start = Instant::now();
            (0..repeats).for_each(|_| part());
            samples.push(start.elapsed() / repeats);
        }
    }
    samples.map(|mut samples| {
        samples.sort();
        samples[ROUNDS / 2]
    })
}

/// Runs `work` as a program of measurements does: see [`kernels::process::run`].
///
/// # Panics
/// If an input of a measurement cannot be made.
pub fn run(work: impl FnOnce(&mut Comparison) -> Result<()> + Send) {
    kernels::process::run(|| {
        let mut comparison = Comparison::default();
        work(&mut comparison).expect("inputs of a measurement");
        comparison.report();
    });
}
