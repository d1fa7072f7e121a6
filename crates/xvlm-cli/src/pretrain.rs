//! `xvlm pretrain`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde::Serialize;
use xvlm::Device;
use xvlm::tasks::PretrainConfig;
use xvlm::tasks::pretrain::{self, Session};
use xvlm::train::Summary;
use xvlm::train::ranks::Communicator;

use crate::DeviceArgs;
use crate::dry_run;
use crate::output::{self, CliError};
use crate::plot;
use crate::progress::Training;
use crate::ranks::{RanksArgs, or_abort};
use crate::signals;

/// Pre-train a model on image-text pairs and on boxes with texts
///
/// The folder of the run gets metrics.jsonl (a row of losses every `train.log_every` iterations), the same in
/// tensorboard/, checkpoints, and at the end the finished model in model/, that of the best checkpoint in best/, and the
/// losses in losses.png and losses.svg.
///
/// SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 let it finish the iteration it is at, save, and exit with 0; --resume then goes
/// on as if nothing had happened. A second SIGTERM or SIGINT ends it at once.
#[derive(Args)]
pub(crate) struct Pretrain {
    /// Configuration file (YAML)
    #[arg(long, value_name = "FILE", conflicts_with = "preset", required_unless_present = "preset")]
    config: Option<PathBuf>,
    /// Configuration that is built in: scenes-align and scenes (the two stages of the built-in
    /// model), base-4m and base-16m (the paper's)
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Folder of the run
    #[arg(long, value_name = "DIR", required_unless_present_any = ["print_config", "dry_run"])]
    out: Option<PathBuf>,
    /// Go on from the newest checkpoint in the folder of the run
    #[arg(long)]
    resume: bool,
    /// Replace one value of the configuration, such as train.optimizer.lr=1e-4; the value is YAML; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print what the run is going to be (parameters, memory, FLOPs, data, schedule, first batches), draw the first batches
    /// into first-batch.png if there is an --out, and stop
    #[arg(long, conflicts_with_all = ["resume", "ranks"])]
    dry_run: bool,
    /// Number of processes that a --dry-run is about
    #[arg(long, value_name = "N", requires = "dry_run", value_parser = clap::value_parser!(u16).range(1..))]
    processes: Option<u16>,
    /// Print the whole configuration and do nothing else; a preset in which nothing is replaced as it is written
    #[arg(long, conflicts_with_all = ["out", "resume", "json", "dry_run"])]
    print_config: bool,
    #[command(flatten)]
    ranks: RanksArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// How a run ended.
#[derive(Serialize)]
struct Report {
    /// If the run is finished.
    model: Option<PathBuf>,
    /// The model of the best checkpoint, if it is finished and has one.
    best: Option<PathBuf>,
    metrics: PathBuf,
    iterations: u64,
    optimizer_steps: u64,
    out_of_time: bool,
    stopped: bool,
    losses: BTreeMap<String, f64>,
    images_per_second: f64,
    elapsed_seconds: f64,
    peak_memory_mib: Option<u64>,
}

impl Pretrain {
    pub(crate) fn run(self) -> Result<(), CliError> {
        if let (true, Some(name), []) = (self.print_config, &self.preset, self.set.as_slice()) {
            return output::print_text(PretrainConfig::preset_text(name)?);
        }
        let config = match (&self.config, &self.preset) {
            (Some(path), _) => PretrainConfig::open(path, &self.set)?,
            (None, preset) => PretrainConfig::preset(preset.as_deref().unwrap_or_default(), &self.set)?,
        };
        if self.print_config {
            return output::print_text(&config.to_yaml()?);
        }
        if self.dry_run {
            return dry_run::run(&config, self.processes.unwrap_or(1).into(), self.out.as_deref(), self.json);
        }
        let device = self.device.open_for_rank()?;
        let ranks = self.ranks.connect(&self.device)?;
        or_abort(&*ranks, self.train(&config, &device, &ranks))
    }

    /// One rank's part. Rank 0 says how it went.
    fn train(&self, config: &PretrainConfig, device: &Device, ranks: &Arc<dyn Communicator>) -> Result<(), CliError> {
        let out = self.out.as_deref().unwrap_or(Path::new(""));
        let session = Session { resume: self.resume, stop: signals::asked_to_stop()?, ranks: Arc::clone(ranks) };
        let summary = pretrain::run(config, out, &session, device, &mut Training::new())?;
        if ranks.rank() > 0 {
            return Ok(());
        }
        // The model is finished: a figure that cannot be written is no reason to fail.
        if let Err(error) = plot::write_into(out) {
            output::say(&format!("no figure of the losses: {error}"));
        }
        let Summary {
            iterations,
            optimizer_steps,
            out_of_time,
            stopped,
            losses,
            images_per_second,
            elapsed,
            peak_memory_mib,
        } = summary;
        let report = Report {
            model: (!stopped).then(|| out.join("model")),
            best: (!stopped && config.train.keep_best).then(|| out.join("best")).filter(|best| best.exists()),
            metrics: out.join("metrics.jsonl"),
            iterations,
            optimizer_steps,
            out_of_time,
            stopped,
            losses: losses.into_iter().collect(),
            images_per_second,
            elapsed_seconds: elapsed.as_secs_f64(),
            peak_memory_mib,
        };
        output::print(self.json, &report, |report| {
            let model = report.model.as_ref().map(|model| model.display().to_string());
            let mut rows = vec![
                ("model".to_owned(), Some(model.unwrap_or_else(|| "none yet: go on with --resume".to_owned()))),
                ("iterations".to_owned(), Some(report.iterations.to_string())),
                ("images per second".to_owned(), Some(format!("{:.0}", report.images_per_second))),
                ("minutes".to_owned(), Some(format!("{:.1}", report.elapsed_seconds / 60.0))),
            ];
            if let Some(mebibytes) = report.peak_memory_mib {
                rows.push(("peak memory".to_owned(), Some(format!("{mebibytes} MiB"))));
            }
            rows.extend(report.losses.iter().map(|(name, loss)| (format!("loss {name}"), Some(format!("{loss:.4}")))));
            output::table(&rows)
        })
    }
}
