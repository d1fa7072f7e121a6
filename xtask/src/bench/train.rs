//! `cargo xtask bench-train`: a step of pre-training beside the same step in PyTorch.
//!
//! Each side is a process of its own, so that its peak memory is its own, and steps alternate, so that whatever else the
//! machine does meets both. `benches/peers/train_step.py` says what a step is.

use std::io::BufRead;
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::{Args, ValueEnum};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xvlm::Precision;
use xvlm::data::{CaptionTensors, RegionTensors, TextTensors};
use xvlm::encoders::XvlmConfig;
use xvlm::kernels::{Gradients, Tape};
use xvlm::tasks::pretrain::{Batch, Pretraining};
use xvlm::train::ranks::{Alone, Communicator};
use xvlm::train::{self, Optimizer, TrainConfig, Trainable};

use super::Outcome;
use super::served::{self, Served};
use crate::Done;

/// Side of the pictures, in pixels and in patches of the last stage.
const RESOLUTION: usize = 224;
const PATCHES: usize = 7;
/// Tokens of a text, with padding, and most of them that are masked.
const TOKENS: usize = 40;
const MASKS: usize = 8;

/// Measure a step of pre-training of the base model, beside the same step in PyTorch
///
/// The first run downloads PyTorch (some GB), which stays in the folder of `--peers-dir`.
#[derive(Args)]
pub(crate) struct BenchTrain {
    /// Folder for the peer's Python environment
    #[arg(long = "peers-dir", value_name = "DIR", default_value = "target/peers")]
    peers: PathBuf,
    /// Measure without the peer
    #[arg(long)]
    alone: bool,
    /// Timed steps of each
    #[arg(long, value_name = "N", default_value_t = 7)]
    steps: usize,
    /// Pictures in a batch
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch: usize,
    #[command(flatten)]
    step: Step,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Do as many steps as each line of stdin says: one side of the comparison
    #[arg(long, hide = true)]
    serve: bool,
}

#[derive(Args, Clone, Serialize)]
struct Step {
    /// The stream whose step is measured
    #[arg(long, value_enum, default_value_t = Stream::ImageText)]
    stream: Stream,
    /// What is computed in; parameters for optimizing are f32
    #[arg(long, value_name = "f32|bf16", value_parser = trainable, default_value_t = Precision::F32)]
    precision: Precision,
    /// Keep of each block only its result, here; the peer keeps everything
    #[arg(long)]
    recompute: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Stream {
    ImageText,
    Region,
}

/// A precision that there is training in.
fn trainable(text: &str) -> Result<Precision, String> {
    let precision = text.parse()?;
    for_training(precision).map(|_| precision)
}

fn for_training(precision: Precision) -> Result<train::Precision, String> {
    match precision {
        Precision::F32 => Ok(train::Precision::F32),
        Precision::Bf16 => Ok(train::Precision::Bf16),
        Precision::Int8 => Err("precision of training: expected f32 or bf16, found int8".to_owned()),
    }
}

/// The name that the command line has for a value.
fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// What a side answers.
#[derive(Deserialize)]
pub(crate) struct Timed {
    pub(crate) seconds: f64,
    /// Of all threads.
    cpu_seconds: f64,
    /// Bytes, since it began.
    pub(crate) peak_memory: u64,
}

/// The peer's steps, and the versions of its parts; or why there are none.
type OfPeer = Result<(Vec<Timed>, Value), String>;

#[derive(Serialize)]
struct Side {
    images_per_second: f64,
    images_per_cpu_second: f64,
    peak_memory_bytes: u64,
}

impl Side {
    /// The median step, and the most memory.
    fn of(steps: &[Timed], batch: usize) -> Self {
        let rate = |seconds: fn(&Timed) -> f64| batch as f64 / served::median(steps.iter().map(seconds).collect());
        Self {
            images_per_second: rate(|step| step.seconds),
            images_per_cpu_second: rate(|step| step.cpu_seconds),
            peak_memory_bytes: steps.iter().map(|step| step.peak_memory).max().unwrap_or(0),
        }
    }
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    step: Step,
    batch: usize,
    steps: usize,
    /// Of the peer's parts.
    versions: Option<Value>,
    ours: Side,
    peer: Option<Side>,
}

impl BenchTrain {
    pub(crate) fn run(self) -> Done {
        if self.serve {
            return serve(&self.step, self.batch);
        }
        let (of_ours, of_peer) = self.measure()?;
        let of_peer = of_peer.transpose()?;
        let report = Report {
            step: self.step,
            batch: self.batch,
            steps: self.steps,
            ours: Side::of(&of_ours, self.batch),
            peer: of_peer.as_ref().map(|(steps, _)| Side::of(steps, self.batch)),
            versions: of_peer.map(|(_, versions)| versions),
        };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print(&report);
        }
        Ok(())
    }

    /// A row of `cargo xtask bench`.
    pub(crate) fn for_comparison(
        peers: PathBuf,
        alone: bool,
        steps: usize,
        batch: usize,
        precision: Precision,
    ) -> Self {
        let step = Step { stream: Stream::ImageText, precision, recompute: false };
        Self { peers, alone, steps, batch, step, json: false, serve: false }
    }

    /// The steps of our side, and those of the peer with its versions.
    pub(crate) fn measure(&self) -> Outcome<(Vec<Timed>, Option<OfPeer>)> {
        if self.steps == 0 || self.batch < 2 {
            return Err("--steps: expected at least 1, --batch: at least 2, for there to be negatives".into());
        }
        let mut peer = (!self.alone).then(|| self.start_peer().map_err(|error| error.to_string()));
        let (mut ours, _) = self.start_ours()?;
        let (mut of_ours, mut of_peer) = (Vec::new(), Vec::new());
        for round in 0..self.steps {
            // Each is first in every other round.
            for is_ours in [round % 2 == 0, round % 2 == 1] {
                if is_ours {
                    of_ours.push(step(&mut ours)?);
                } else if let Some(Ok((side, _))) = &mut peer {
                    match step(side) {
                        Ok(timed) => of_peer.push(timed),
                        Err(error) => peer = Some(Err(error.to_string())),
                    }
                }
            }
        }
        Ok((of_ours, peer.map(|peer| peer.map(|(_, mut ready)| (of_peer, ready["versions"].take())))))
    }

    /// Our side, ready for a first step.
    pub(crate) fn start_ours(&self) -> Outcome<(Served, Value)> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench-train", "--serve"]);
        if self.step.recompute {
            command.arg("--recompute");
        }
        self.pass_on(&mut command);
        Served::start("our side", command)
    }

    fn start_peer(&self) -> Outcome<(Served, Value)> {
        served::set_up(&self.peers)?;
        let mut command = Command::new(served::python(&self.peers));
        command.arg(served::scripts().join("train_step.py")).arg("--serve");
        command.args(["--threads", &std::thread::available_parallelism()?.to_string()]);
        self.pass_on(&mut command);
        Served::start("the peer", command)
    }

    fn pass_on(&self, command: &mut Command) {
        let Step { stream, precision, .. } = self.step;
        let batch = self.batch.to_string();
        command.args(["--stream", &name(stream), "--precision", precision.name(), "--batch", &batch]);
    }
}

/// One step of a side.
pub(crate) fn step(side: &mut Served) -> Outcome<Timed> {
    Ok(serde_json::from_value(side.ask("1")?)?)
}

/// Our side.
fn serve(step: &Step, batch: usize) -> Done {
    let device = Device::Cpu;
    let precision = for_training(step.precision)?;
    let config = TrainConfig { precision, recompute: step.recompute, clip: Some(1.0), ..TrainConfig::default() };
    let pretraining = Pretraining::to_train(&XvlmConfig::base(RESOLUTION), &config, &device)?;
    let mut optimizer = Optimizer::new(pretraining.parameters(), &config)?;
    let batch = draw(step.stream, batch, &device)?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let ranks: Arc<dyn Communicator> = Arc::new(Alone);
    let mut train = || -> Outcome<f64> {
        let tape = Rc::new(Tape::new(config.recompute));
        let step = &mut train::Step { rng: &mut rng, tape: &tape, ranks: &ranks };
        let losses = pretraining.losses(&batch, step).map_err(|error| error.to_string())?.0;
        let wide = |(_, loss): &(_, Tensor)| loss.to_dtype(DType::F32)?.reshape(1);
        let total = Tensor::cat(&losses.iter().map(wide).collect::<candle_core::Result<Vec<_>>>()?, 0)?.sum_all()?;
        drop(losses);
        let value = total.to_scalar::<f32>()?;
        let mut gradients = Gradients::default();
        tape.backward(total, &mut gradients, |_, _| Ok(()))?;
        optimizer.step(&gradients, 1e-4)?;
        Ok(value.into())
    };
    train()?;
    let count: usize = pretraining.parameters().iter().map(|(_, parameter)| parameter.elem_count()).sum();
    println!("{}", json!({ "ready": count }));
    for line in std::io::stdin().lock().lines() {
        let steps: usize = line?.trim().parse()?;
        let (cpu, start) = (served::cpu_time()?, Instant::now());
        let mut loss = 0.0;
        for _ in 0..steps {
            loss = train()?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let cpu_seconds = (served::cpu_time()? - cpu).as_secs_f64();
        let peak = train::peak_memory_mib().ok_or("peak memory: not told by the system")? << 20;
        let answer = json!({ "seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss, "peak_memory": peak });
        println!("{answer}");
    }
    Ok(())
}

/// A batch of the peer's sizes; the numbers do not matter.
fn draw(stream: Stream, images: usize, device: &Device) -> Outcome<Batch> {
    let rows = if stream == Stream::Region { 2 * images } else { images };
    let length = |row: usize| 12 + row * 37 % (TOKENS - 11);
    let id = |i: usize| if i % TOKENS < length(i / TOKENS) { 1000 + (i * 7919 % 29_000) as u32 } else { 0 };
    let masks = |row: usize| (0..(length(row) / 4).min(MASKS)).map(move |i| row * TOKENS + 1 + i);
    let masked: Vec<usize> = (0..rows).flat_map(masks).collect();
    let ids: Vec<u32> = (0..rows * TOKENS).map(id).collect();
    let mut masked_ids = ids.clone();
    masked.iter().for_each(|&place| masked_ids[place] = 103);
    let shape = (rows, TOKENS);
    let text = TextTensors {
        mask: Tensor::from_vec(ids.iter().map(|&id| f32::from(id > 0)).collect::<Vec<_>>(), shape, device)?,
        ids: Tensor::from_vec(ids.clone(), shape, device)?,
        masked_ids: Tensor::from_vec(masked_ids, shape, device)?,
        masked_positions: Tensor::from_iter(masked.iter().map(|&place| place as u32), device)?,
        masked_labels: masked.iter().map(|&place| ids[place].into()).collect(),
        keys: (0..rows as i64).collect(),
    };
    let pixels = Tensor::rand(-1f32, 1.0, (images, 3, RESOLUTION, RESOLUTION), device)?;
    Ok(match stream {
        Stream::ImageText => {
            Batch::Captions(CaptionTensors { pixels, text, generation: None, origins: vec![String::new(); rows] })
        }
        Stream::Region => {
            let tokens = 1 + PATCHES * PATCHES;
            let covers = |i: usize| f32::from(i % tokens < 2 || i * 7919 % 10 < 3);
            Batch::Regions(RegionTensors {
                pixels,
                text,
                image_index: (0..rows as u32).map(|row| row / 2).collect(),
                boxes: Tensor::rand(0.3f32, 0.7, (rows, 4), device)?,
                region_mask: Tensor::from_iter((0..rows * tokens).map(covers), device)?.reshape((rows, tokens))?,
                is_image: (0..rows).map(|row| row % 2 == 1).collect(),
                row_weights: vec![1.0; rows],
                origins: vec![String::new(); rows],
            })
        }
    })
}

fn print(report: &Report) {
    let Report { step, batch, steps, versions, ours, peer } = report;
    let (stream, precision) = (name(step.stream), step.precision);
    let kept = if step.recompute { "blocks computed again" } else { "everything kept" };
    println!("{stream}, {precision}, batch {batch}, {kept} on our side; medians of {steps} steps, taken in turn");
    if let Some(versions) = versions {
        println!("peer: {versions}");
    }
    let row = |what: &str, digits: usize, ours: f64, peer: Option<f64>| match peer {
        Some(peer) => println!("| {what} | {ours:.digits$} | {peer:.digits$} | {:.2} |", ours / peer),
        None => println!("| {what} | {ours:.digits$} | | |"),
    };
    println!("| | ours | peer | ratio |\n|---|---|---|---|");
    let gigabytes = |side: &Side| side.peak_memory_bytes as f64 / 1e9;
    row("images/s", 3, ours.images_per_second, peer.as_ref().map(|peer| peer.images_per_second));
    row("images per CPU second", 3, ours.images_per_cpu_second, peer.as_ref().map(|peer| peer.images_per_cpu_second));
    row("peak memory, GB", 2, gigabytes(ours), peer.as_ref().map(gigabytes));
}
