//! Measurements by criterion: its settings, and the comparison of an operation with what it could cost.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};
use criterion::Criterion;
use rayon::prelude::*;
use xvlm::kernels;

use crate::{device, random_at};

/// The settings of all measurements: few samples, for a machine of two cores.
pub fn criterion() -> Criterion {
    Criterion::default().sample_size(20).configure_from_args()
}

/// Measures what criterion alone is handed, as the programs that are measured run their work.
///
/// # Panics
/// If an input cannot be made.
pub fn measure<E: std::fmt::Debug>(work: impl FnOnce(&mut Criterion) -> std::result::Result<(), E> + Send) {
    kernels::process::run(|| {
        let mut criterion = criterion();
        work(&mut criterion).expect("inputs of a measurement");
        criterion.final_summary();
    });
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
    /// Whether to compare as well: not where benches are merely run as tests, or listed.
    is_bench: bool,
    rows: Vec<String>,
}

impl Default for Comparison {
    fn default() -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let has = |option: &str| arguments.iter().any(|argument| argument == option);
        Self {
            criterion: criterion(),
            device: device(),
            filter: name_among(&arguments).cloned(),
            is_bench: has("--bench") && !has("--list"),
            rows: Vec::new(),
        }
    }
}

impl Comparison {
    /// Measures an operation forward, and with gradients as `training`.
    ///
    /// # Errors
    /// If a tensor cannot be made.
    ///
    /// # Panics
    /// If the operation fails.
    pub fn measure(&mut self, case: &Case) -> Result<()> {
        let forward = |operation: &dyn Fn() -> Result<Tensor>| drop(operation().expect(&case.name));
        let training = |operation: &dyn Fn() -> Result<Tensor>| {
            drop(operation().and_then(|output| output.backward()).expect(&case.name));
        };
        let [floor, training_floor] = case.floors;
        let ways: [Way; 2] = [
            ("forward", Box::new(|| forward(&case.ours)), Box::new(|| forward(&case.plain)), floor),
            ("training", Box::new(|| training(&case.ours)), Box::new(|| training(&case.plain)), training_floor),
        ];
        self.compare(&case.name, case.dtype, &ways)
    }

    /// Measures something that is not differentiated.
    ///
    /// # Errors
    /// If a tensor cannot be made.
    ///
    /// # Panics
    /// If the work fails.
    pub fn measure_step(
        &mut self,
        name: &str,
        floor: Floor,
        ours: &dyn Fn() -> Result<()>,
        plain: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let work = |work: &dyn Fn() -> Result<()>| work().expect(name);
        let way: Way = ("step", Box::new(|| work(ours)), Box::new(|| work(plain)), floor);
        self.compare(name, DType::F32, &[way])
    }

    /// Measures twice over: each part by criterion, and all parts in turn, which is what the report is made of, since only
    /// what ran in the same minute is comparable.
    fn compare(&mut self, name: &str, dtype: DType, ways: &[Way]) -> Result<()> {
        if self.filter.as_ref().is_some_and(|filter| !name.contains(filter)) {
            return Ok(());
        }
        let floors = ways.iter().map(|(.., floor)| floor.work(dtype, &self.device)).collect::<Result<Vec<_>>>()?;
        let (mut names, mut parts) = (Vec::new(), Vec::<&dyn Fn()>::new());
        for ((way, ours, plain, _), floor) in ways.iter().zip(&floors) {
            names.extend([(*way).to_owned(), format!("plain {way}"), format!("floor of {way}")]);
            parts.extend([&**ours, &**plain, &**floor]);
        }
        let device = &self.device;
        let run = |part: &dyn Fn()| {
            part();
            device.synchronize().expect("the device");
        };
        let mut group = self.criterion.benchmark_group(name);
        for (name, part) in names.iter().zip(&parts) {
            group.bench_function(name.as_str(), |bencher| bencher.iter(|| run(part)));
        }
        group.finish();
        if self.is_bench {
            let medians = in_turn(&parts.iter().map(|part| || run(part)).collect::<Vec<_>>());
            let columns = medians.chunks(3).map(|times| {
                let ratio = |time: Duration| time.as_secs_f64() / times[0].as_secs_f64();
                format!(" {:.1?} | {:.1} | {:.0} % |", times[0], ratio(times[1]), 100.0 * ratio(times[2]))
            });
            let columns: String = columns.collect();
            let missing = " | | |".repeat(2 - ways.len());
            self.rows.push(format!("| {name} |{columns}{missing}"));
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

/// The name to measure among criterion's arguments: what is neither an option nor the value of one.
fn name_among(arguments: &[String]) -> Option<&String> {
    let is_option = |argument: &str| argument.starts_with("--") && argument != "--bench";
    let before = std::iter::once("").chain(arguments.iter().map(String::as_str));
    let named = before.zip(arguments).find(|(before, name)| !name.starts_with('-') && !is_option(before));
    named.map(|(_, name)| name)
}

/// A way to measure: its name, ours, the plain one, and the floor.
type Way<'a> = (&'static str, Work<'a>, Work<'a>, Floor);

/// Median durations of the parts, run one after the other in many rounds.
fn in_turn(parts: &[impl Fn()]) -> Vec<Duration> {
    const ROUNDS: usize = 15;
    /// A sample takes at least this long, so that the clock does not count.
    const SAMPLE: Duration = Duration::from_millis(2);
    let repeats = |part: &dyn Fn()| {
        part();
        let start = Instant::now();
        part();
        (SAMPLE.as_nanos() / start.elapsed().as_nanos().max(1)).max(1) as u32
    };
    let repeats: Vec<u32> = parts.iter().map(|part| repeats(part)).collect();
    let mut samples = vec![Vec::with_capacity(ROUNDS); parts.len()];
    for _ in 0..ROUNDS {
        for ((part, samples), &repeats) in parts.iter().zip(&mut samples).zip(&repeats) {
            // What ran before has emptied the caches of this part's data.
            part();
            let start = Instant::now();
            (0..repeats).for_each(|_| part());
            samples.push(start.elapsed() / repeats);
        }
    }
    let median = |mut samples: Vec<Duration>| {
        samples.sort();
        samples[ROUNDS / 2]
    };
    samples.into_iter().map(median).collect()
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
