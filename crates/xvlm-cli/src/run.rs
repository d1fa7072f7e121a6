//! What commands that train have in common.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde::Serialize;
use xvlm::Device;
use xvlm::tasks::{Session, TaskError};
use xvlm::train::Summary;

use crate::DeviceArgs;
use crate::output::{self, CliError};
use crate::plot;
use crate::ranks::{RanksArgs, or_abort};
use crate::signals;

/// Which run, and how.
#[derive(Args)]
pub(crate) struct RunArgs {
    /// Configuration file (YAML)
    #[arg(long, value_name = "FILE", conflicts_with = "preset", required_unless_present = "preset")]
    pub(crate) config: Option<PathBuf>,
    /// Configuration that is built in; `xvlm presets` lists them
    #[arg(long, value_name = "NAME")]
    pub(crate) preset: Option<String>,
    /// Folder of the run
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Go on from the newest checkpoint in the folder of the run
    #[arg(long)]
    resume: bool,
    /// Replace one value of the configuration, such as train.optimizer.lr=1e-4; the value is YAML; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Print the whole configuration and do nothing else; a preset in which nothing is replaced as it is written
    #[arg(long, conflicts_with_all = ["out", "resume", "json"])]
    pub(crate) print_config: bool,
    #[command(flatten)]
    ranks: RanksArgs,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
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

impl RunArgs {
    /// The preset that is to be printed as it is written.
    pub(crate) fn printed_preset(&self) -> Option<&str> {
        self.preset.as_deref().filter(|_| self.print_config && self.set.is_empty())
    }

    /// Trains: joins the processes, lets `train` have this one's part of the run, and says how it went.
    pub(crate) fn train(
        &self,
        keeps_best: bool,
        train: impl FnOnce(&Path, &Session, &Device) -> Result<Summary, TaskError>,
    ) -> Result<(), CliError> {
        let Some(out) = &self.out else {
            return Err(CliError::Option { option: "--out", expected: "a folder", found: "none".to_owned() });
        };
        let device = self.device.open_for_rank()?;
        let ranks = self.ranks.connect(&self.device)?;
        let run = || {
            let stop = signals::asked_to_stop("this iteration")?;
            let session = Session { resume: self.resume, stop, ranks: Arc::clone(&ranks) };
            Ok(train(out, &session, &device)?)
        };
        let summary = or_abort(&*ranks, run())?;
        match ranks.rank() {
            0 => self.report(out, keeps_best, summary),
            _ => Ok(()),
        }
    }

    fn report(&self, out: &Path, keeps_best: bool, summary: Summary) -> Result<(), CliError> {
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
            best: (!stopped && keeps_best).then(|| out.join("best")).filter(|best| best.exists()),
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
