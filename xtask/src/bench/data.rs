//! `cargo xtask bench-data`: the data streams of pre-training beside PyTorch's DataLoader.
//!
//! Both read the same shards, with the same number of workers, and do the same work; `benches/peers` says what that is
//! and sets the peer up. Passes alternate, so that whatever else the machine does meets both.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use candle_core::Tensor;
use clap::Args;
use serde::{Deserialize, Serialize};
use xvlm::Device;
use xvlm::data::{
    BatchBuilder, BatchConfig, CaptionBatch, DataError, Dataset, DatasetConfig, ImageCache, Loader, LoaderConfig,
    RegionBatch, SourceConfig, StorageOptions, TextTokenizer,
};

use super::Outcome;
use super::served::{self, Served};
use crate::Done;

/// Measure how many pictures a second the data streams give, beside PyTorch's DataLoader
///
/// The first run downloads PyTorch (some GB) and makes the pictures; both stay in the folder of `--peers-dir`.
#[derive(Args)]
pub(crate) struct BenchData {
    /// Folder for the peer's Python environment and the shards
    #[arg(long = "peers-dir", value_name = "DIR", default_value = "target/peers")]
    peers: PathBuf,
    /// Measure without the peer
    #[arg(long)]
    alone: bool,
    /// Threads here, processes there
    #[arg(long, value_name = "N", default_value_t = 2)]
    workers: usize,
    /// Pictures in a pass
    #[arg(long, value_name = "N", default_value_t = 1024)]
    images: usize,
    /// Passes of each
    #[arg(long, value_name = "N", default_value_t = 7)]
    passes: usize,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// The two streams of pre-training, by the peer's names for them.
#[derive(Clone, Copy)]
enum Stream {
    ImageText,
    Regions,
}

impl Stream {
    const ALL: [Self; 2] = [Self::ImageText, Self::Regions];

    fn name(self) -> &'static str {
        match self {
            Self::ImageText => "image-text",
            Self::Regions => "region",
        }
    }
}

/// One pass over some pictures.
#[derive(Clone, Copy, Deserialize)]
struct Pass {
    images: usize,
    seconds: f64,
    /// Of all threads and processes.
    cpu_seconds: f64,
}

#[derive(Clone, Copy, Serialize)]
struct Rate {
    images_per_second: f64,
    images_per_cpu_second: f64,
}

impl Rate {
    /// Medians over passes.
    fn of(passes: &[Pass]) -> Self {
        let median = |rate: fn(&Pass) -> f64| served::median(passes.iter().map(rate).collect());
        Self {
            images_per_second: median(|pass| pass.images as f64 / pass.seconds),
            images_per_cpu_second: median(|pass| pass.images as f64 / pass.cpu_seconds),
        }
    }
}

#[derive(Serialize)]
struct Row {
    stream: &'static str,
    ours: Rate,
    peer: Option<Rate>,
}

#[derive(Serialize)]
struct Report {
    workers: usize,
    passes: usize,
    /// Of the peer's parts.
    versions: Option<serde_json::Value>,
    rows: Vec<Row>,
}

impl BenchData {
    pub(crate) fn run(self) -> Done {
        if self.passes == 0 || self.images == 0 {
            return Err("--passes, --images: expected at least 1, found 0".into());
        }
        let shards = self.set_up()?;
        let mut peer =
            if self.alone { None } else { Some(start_peer(&self.peers, &shards, self.workers, self.images)?) };
        let ours = Ours::new(&shards, self.workers)?;
        let mut rows = Vec::new();
        for stream in Stream::ALL {
            ours.pass(stream, self.images)?;
            let (mut of_ours, mut of_peer) = (Vec::new(), Vec::new());
            for _ in 0..self.passes {
                of_ours.push(ours.pass(stream, self.images)?);
                if let Some((peer, _)) = &mut peer {
                    of_peer.push(serde_json::from_value(peer.ask(stream.name())?)?);
                }
            }
            let peer = peer.is_some().then(|| Rate::of(&of_peer));
            rows.push(Row { stream: stream.name(), ours: Rate::of(&of_ours), peer });
        }
        let versions = peer.map(|(_, versions)| versions);
        let report = Report { workers: self.workers, passes: self.passes, versions, rows };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print(&report);
        }
        Ok(())
    }

    /// Makes what is not there yet; gives the folder of the shards.
    fn set_up(&self) -> Outcome<PathBuf> {
        served::set_up(&self.peers)?;
        let shards = self.peers.join("shards");
        if !shards.join("vocab.txt").is_file() {
            let mut command = Command::new(served::python(&self.peers));
            served::succeed(command.arg(served::scripts().join("make_jpegs.py")).arg(&shards))?;
        }
        Ok(shards)
    }
}

/// PyTorch's DataLoader, waiting for the names of streams; it has warmed up when this returns.
fn start_peer(peers: &Path, shards: &Path, workers: usize, images: usize) -> Outcome<(Served, serde_json::Value)> {
    let mut command = Command::new(served::python(peers));
    command.arg(served::scripts().join("data_loader.py")).arg(shards).arg("--serve");
    command.args(["--workers", &workers.to_string(), "--images", &images.to_string()]);
    let (peer, mut ready) = Served::start("the peer", command)?;
    Ok((peer, ready["versions"].take()))
}

/// The streams of this workspace.
struct Ours {
    builder: Arc<BatchBuilder>,
    workers: usize,
}

impl Ours {
    fn new(shards: &Path, workers: usize) -> Outcome<Self> {
        let tokenizer = TextTokenizer::from_file(shards.join("vocab.txt"))?;
        // Nothing is kept: each picture is decoded each time, as over there.
        let cache = Arc::new(ImageCache::new(0));
        let source = SourceConfig::files([shards.display().to_string()]);
        let dataset = Dataset::open(&[source], &DatasetConfig::default(), &StorageOptions::default())?;
        let builder = BatchBuilder::new(Arc::new(dataset), Arc::new(tokenizer), BatchConfig::default(), cache)?;
        Ok(Self { builder: Arc::new(builder), workers })
    }

    /// Builds as many batches as hold so many pictures, and not one more: no work of a pass is outside of it.
    fn pass(&self, stream: Stream, images: usize) -> Outcome<Pass> {
        let in_batch = match stream {
            Stream::ImageText => self.builder.config().batch_size,
            Stream::Regions => self.builder.config().max_images,
        };
        let steps = images.div_ceil(in_batch) as u64;
        let builder = Arc::clone(&self.builder);
        let build = move |step| match stream {
            _ if step >= steps => Ok(None),
            Stream::ImageText => builder.captions(step).map(Batch::Captions).map(Some),
            Stream::Regions => builder.regions(step).map(Batch::Regions).map(Some),
        };
        let (cpu, wall) = (served::cpu_time()?, Instant::now());
        let mut loader = Loader::new(LoaderConfig { workers: self.workers, ahead: 2 * self.workers }, build)?;
        let mut images = 0;
        while let Some(batch) = loader.next()? {
            images += batch.into_tensors()?.dim(0)?;
        }
        let seconds = wall.elapsed().as_secs_f64();
        Ok(Pass { images, seconds, cpu_seconds: (served::cpu_time()? - cpu).as_secs_f64() })
    }
}

enum Batch {
    Captions(CaptionBatch),
    Regions(RegionBatch),
}

impl Batch {
    /// The pixels, when all of the batch is tensors.
    fn into_tensors(self) -> Result<Tensor, DataError> {
        Ok(match self {
            Self::Captions(batch) => batch.to_tensors(&Device::Cpu)?.pixels,
            Self::Regions(batch) => batch.to_tensors(&Device::Cpu)?.pixels,
        })
    }
}

fn print(report: &Report) {
    println!("{} workers each, medians of {} passes, taken in turn", report.workers, report.passes);
    if let Some(versions) = &report.versions {
        println!("peer: {versions}");
    }
    println!(
        "| stream | images/s | peer | ratio | images per CPU second | peer | ratio |\n|---|---|---|---|---|---|---|"
    );
    for Row { stream, ours, peer } in &report.rows {
        let columns = [
            (ours.images_per_second, peer.map(|peer| peer.images_per_second)),
            (ours.images_per_cpu_second, peer.map(|peer| peer.images_per_cpu_second)),
        ];
        let cells = columns.map(|(ours, peer)| match peer {
            Some(peer) => format!("{ours:.0} | {peer:.0} | {:.2}", ours / peer),
            None => format!("{ours:.0} | | "),
        });
        println!("| {stream} | {} |", cells.join(" | "));
    }
}
