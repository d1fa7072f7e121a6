//! `xvlm pretrain`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use xvlm::tasks::{PretrainConfig, pretrain};
use xvlm::train::Summary;

use crate::DeviceArgs;
use crate::output::{self, CliError};
use crate::progress::Training;

/// Pre-train a model on image-text pairs and on boxes with texts
///
/// The folder of the run gets metrics.jsonl (a row of losses every `train.log_every` iterations), checkpoints, and at
/// the end the finished model in model/.
#[derive(Args)]
pub(crate) struct Pretrain {
    /// Configuration file (YAML)
    #[arg(long, value_name = "FILE", conflicts_with = "preset", required_unless_present = "preset")]
    config: Option<PathBuf>,
    /// Configuration that is built in: scenes-align and scenes (the two stages of the built-in
    /// model) or base-4m (the paper's)
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Folder of the run
    #[arg(long, value_name = "DIR", required_unless_present = "print_config")]
    out: Option<PathBuf>,
    /// Go on from the newest checkpoint in the folder of the run
    #[arg(long)]
    resume: bool,
    /// Replace one value of the configuration, such as train.optimizer.lr=1e-4; the value is YAML; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the preset and do nothing else
    #[arg(long, requires = "preset", conflicts_with_all = ["out", "resume", "set", "json"])]
    print_config: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// How a run ended.
#[derive(Serialize)]
struct Report {
    model: PathBuf,
    metrics: PathBuf,
    iterations: u64,
    optimizer_steps: u64,
    out_of_time: bool,
    stopped: bool,
    losses: BTreeMap<String, f64>,
    images_per_second: f64,
    elapsed_seconds: f64,
}

impl Pretrain {
    pub(crate) fn run(self) -> Result<(), CliError> {
        if let (true, Some(name)) = (self.print_config, &self.preset) {
            return output::print_text(PretrainConfig::preset_text(name)?);
        }
        let config = match (&self.config, &self.preset) {
            (Some(path), _) => PretrainConfig::open(path, &self.set)?,
            (None, preset) => PretrainConfig::preset(preset.as_deref().unwrap_or_default(), &self.set)?,
        };
        let out = self.out.unwrap_or_default();
        let summary = pretrain::run(&config, &out, self.resume, &self.device.open()?, &mut Training::new())?;
        let Summary { iterations, optimizer_steps, out_of_time, stopped, losses, images_per_second, elapsed } = summary;
        let report = Report {
            model: out.join("model"),
            metrics: out.join("metrics.jsonl"),
            iterations,
            optimizer_steps,
            out_of_time,
            stopped,
            losses: losses.into_iter().collect(),
            images_per_second,
            elapsed_seconds: elapsed.as_secs_f64(),
        };
        output::print(self.json, &report, |report| {
            let mut rows = vec![
                ("model".to_owned(), Some(report.model.display().to_string())),
                ("iterations".to_owned(), Some(report.iterations.to_string())),
                ("images per second".to_owned(), Some(format!("{:.0}", report.images_per_second))),
                ("minutes".to_owned(), Some(format!("{:.1}", report.elapsed_seconds / 60.0))),
            ];
            rows.extend(report.losses.iter().map(|(name, loss)| (format!("loss {name}"), Some(format!("{loss:.4}")))));
            output::table(&rows)
        })
    }
}
