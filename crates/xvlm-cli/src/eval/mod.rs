//! `xvlm eval`: scores on annotated data. One module a task.

mod captioning;
mod fill;
mod grounding;
mod nlvr;
mod reading;
mod retrieval;
mod vqa;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use xvlm::tasks::finetune::{FinetuneKind, FinetuneTask};
use xvlm::tasks::sweep::LeftOut;
use xvlm::tasks::{FinetuneConfig, Model, Sweep, TaskError};
use xvlm::{Bundled, Precision};

pub(crate) use self::captioning::caption_rows;
pub(crate) use self::fill::fill_rows;
pub(crate) use self::grounding::{grounding_rows, pointing_rows};
pub(crate) use self::nlvr::statement_rows;
pub(crate) use self::retrieval::retrieval_rows;
pub(crate) use self::vqa::question_rows;
use crate::output::{self, CliError, Rows, table};
use crate::sweep::{SweepArgs, Swept};
use crate::{ModelArgs, share};

/// Score a model on annotated pictures
///
/// With --data, on a folder that `xvlm synth` wrote, or on one's own data in the same formats; with --config or --preset, on
/// the test files of a configuration for fine-tuning, one of the original's among them.
#[derive(Args)]
pub(crate) struct Eval {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Captioning(captioning::Captioning),
    Fill(fill::Fill),
    Grounding(grounding::Grounding),
    Nlvr(nlvr::Nlvr),
    Retrieval(retrieval::Retrieval),
    Vqa(vqa::Vqa),
}

impl Eval {
    pub(crate) fn run(self) -> Result<(), CliError> {
        match self.task {
            Task::Captioning(task) => task.run(),
            Task::Fill(task) => task.run(),
            Task::Grounding(task) => task.run(),
            Task::Nlvr(task) => task.run(),
            Task::Retrieval(task) => task.run(),
            Task::Vqa(task) => task.run(),
        }
    }
}

/// What all evaluations have in common.
#[derive(Args)]
pub(super) struct Common {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pub(super) sweep: SweepArgs,
    /// Share of broken items that may be left out of the scores; they are counted and named
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share::<f64>)]
    max_bad_fraction: f64,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Which data.
#[derive(Args)]
pub(super) struct DataArgs {
    /// Folder with the annotations, as `xvlm synth` writes them
    #[arg(long, value_name = "DIR", required_unless_present_any = ["config", "preset"])]
    data: Option<PathBuf>,
    /// Configuration file for fine-tuning, whose test files are taken
    #[arg(long, value_name = "FILE", conflicts_with_all = ["data", "preset"])]
    config: Option<PathBuf>,
    /// Configuration that is built in (see `xvlm presets`), whose test files are taken
    #[arg(long, value_name = "NAME", conflicts_with = "data")]
    preset: Option<String>,
    /// Replace one value of the configuration, such as task.image_root=coco; the value is YAML; repeatable
    #[arg(long, value_name = "KEY=VALUE", conflicts_with = "data")]
    set: Vec<String>,
}

/// Where annotations come from.
pub(super) enum Source<'a> {
    /// A folder as `xvlm synth` writes it.
    Folder(&'a Path),
    /// The test files of a configuration.
    Config(Box<FinetuneConfig>),
}

impl DataArgs {
    /// Where the annotations come from; `kind` says which task a configuration of the original is for.
    pub(super) fn open(&self, kind: FinetuneKind) -> Result<Source<'_>, CliError> {
        let config = match (&self.data, &self.config, &self.preset) {
            (Some(folder), ..) => return Ok(Source::Folder(folder)),
            (None, Some(path), _) => FinetuneConfig::open(path, kind, &self.set)?,
            (None, None, preset) => FinetuneConfig::preset(preset.as_deref().unwrap_or_default(), &self.set)?,
        };
        Ok(Source::Config(Box::new(config)))
    }

    /// Refuses a configuration of another task than is evaluated.
    pub(super) fn other_task(&self, task: &FinetuneTask) -> CliError {
        let option = if self.preset.is_some() { "--preset" } else { "--config" };
        let (expected, found) = ("a configuration for this task", task.kind().name().to_owned());
        CliError::Option { option, expected, found }
    }

    /// What the data are called in reports.
    pub(super) fn name(&self) -> String {
        let preset = self.preset.as_ref().map(|name| format!("preset {name}"));
        let file = self.data.as_ref().or(self.config.as_ref()).map(|path| path.display().to_string());
        file.or(preset).unwrap_or_default()
    }
}

#[derive(Serialize)]
struct Report<'a, T> {
    task: &'static str,
    model: String,
    precision: Precision,
    data: &'a str,
    #[serde(flatten)]
    scores: T,
    left_out: &'a [LeftOut],
}

impl Common {
    /// Opens the model and lets `work` evaluate it; nothing where another process tells the result.
    pub(super) fn evaluate<T>(
        &self,
        stage: &'static str,
        data: &str,
        work: impl FnOnce(&Model, &mut Sweep) -> Result<T, TaskError>,
    ) -> Result<Option<T>, CliError> {
        self.evaluate_or(Bundled::General, stage, data, work)
    }

    /// The same with another of the models that are built in, if no folder is given.
    pub(super) fn evaluate_or<T>(
        &self,
        built_in: Bundled,
        stage: &'static str,
        data: &str,
        work: impl FnOnce(&Model, &mut Sweep) -> Result<T, TaskError>,
    ) -> Result<Option<T>, CliError> {
        let (model, from, max_bad_fraction) = (&self.model, Some(("data", data.to_owned())), self.max_bad_fraction);
        let swept = Swept { units: stage, model, built_in, from, max_bad_fraction, is_one: false };
        self.sweep.run(swept, |predictor, sweep| work(predictor.model(), sweep).map_err(CliError::from))
    }

    /// Prints scores, and names what was left out.
    pub(super) fn print<T: Serialize>(
        &self,
        task: &'static str,
        data: &str,
        scores: T,
        left_out: &[LeftOut],
        rows: impl Fn(&T) -> Rows,
    ) -> Result<(), CliError> {
        for LeftOut { item, problem } in left_out.iter().take(8) {
            output::say(&format!("left out: item {item}: {problem}"));
        }
        let report = Report { task, model: self.model.name(), precision: self.model.precision, data, scores, left_out };
        output::print(self.json, &report, |report| {
            let mut rows = rows(&report.scores);
            rows.push(("computed in".to_owned(), Some(report.precision.to_string())));
            if !report.left_out.is_empty() {
                rows.push(count("left out", report.left_out.len()));
            }
            table(&rows)
        })
    }
}

/// A row of a score in percent.
pub(super) fn percent(name: impl Into<String>, score: f64) -> (String, Option<String>) {
    (name.into(), Some(format!("{score:.1} %")))
}

pub(super) fn count(name: &str, count: usize) -> (String, Option<String>) {
    (name.to_owned(), Some(count.to_string()))
}
