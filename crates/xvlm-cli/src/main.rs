//! `xvlm`: X-VLM on the command line.
//!
//! One module a command. Results go to stdout, as text or (`--json`) as one JSON document; all else goes to stderr.
//! Of a question about a picture nothing is printed, and no file appears, before it has been answered.

mod alt;
mod caption;
mod data;
mod demo;
mod draw;
mod dry_run;
mod embed;
mod eval;
mod fill;
mod finetune;
mod ground;
mod judge;
mod matching;
mod output;
mod plot;
mod predict;
mod presets;
mod pretrain;
mod progress;
mod ranks;
mod report;
mod run;
mod score;
mod search;
mod signals;
mod synth;

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use xvlm::tasks::Model;
use xvlm::{Bundled, Compute, Device, Precision, Predictor};

use crate::output::CliError;

/// X-VLM: find what a phrase means in a picture, describe it, answer about it, search with it, fill in blanks.
#[derive(Parser)]
#[command(name = "xvlm", version, after_help = "Start with `xvlm demo`: it needs no arguments and no download.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Demo),
    Ground(ground::Ground),
    Caption(caption::Caption),
    Alt(alt::Alt),
    Answer(predict::Answer),
    Match(matching::Match),
    Fill(fill::Fill),
    Judge(judge::Judge),
    Embed(embed::Embed),
    Search(search::Search),
    Eval(eval::Eval),
    Score(score::Score),
    Synth(synth::Synth),
    Pretrain(pretrain::Pretrain),
    Finetune(finetune::Finetune),
    Plot(plot::Plot),
    Presets(presets::Presets),
    Data(data::Data),
}

impl Command {
    fn run(self) -> Result<(), CliError> {
        match self {
            Self::Demo(command) => command.run(),
            Self::Ground(command) => command.run(),
            Self::Caption(command) => command.run(),
            Self::Alt(command) => command.run(),
            Self::Answer(command) => command.run(),
            Self::Match(command) => command.run(),
            Self::Fill(command) => command.run(),
            Self::Judge(command) => command.run(),
            Self::Embed(command) => command.run(),
            Self::Search(command) => command.run(),
            Self::Eval(command) => command.run(),
            Self::Score(command) => command.run(),
            Self::Synth(command) => command.run(),
            Self::Pretrain(command) => command.run(),
            Self::Finetune(command) => command.run(),
            Self::Plot(command) => command.run(),
            Self::Presets(command) => command.run(),
            Self::Data(command) => command.run(),
        }
    }
}

/// Which model, and where it computes.
#[derive(Args)]
struct ModelArgs {
    /// Model folder (config.json, model.safetensors, tokenizer.json) [default: a small model that is built in; it
    /// knows the synthetic scenes of `xvlm synth` only. There is one for questions, one for statements about two pictures, and
    /// one for the rest]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Numbers to compute with: f32; bf16, half the memory and faster; or int8, weights of 8 bits, on the CPU. Answers of the
    /// latter two differ slightly
    #[arg(long, value_name = "NUMBERS", default_value_t)]
    precision: Precision,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Where to compute.
#[derive(Args)]
struct DeviceArgs {
    /// Where to compute: cpu, cuda (the first GPU) or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
}

impl DeviceArgs {
    fn open(&self) -> Result<Device, CliError> {
        Ok(xvlm::device(&self.device)?)
    }

    /// Whether it is a GPU, which need not be there.
    fn is_gpu(&self) -> Result<bool, CliError> {
        let is_number = |rest: &str| rest.strip_prefix(':').is_some_and(|number| number.parse::<usize>().is_ok());
        let is_gpu = self.device.strip_prefix("cuda").is_some_and(|rest| rest.is_empty() || is_number(rest));
        Ok(is_gpu || self.open()?.is_cuda())
    }

    /// The same for one of several processes: `cuda` is a GPU of its own.
    fn open_for_rank(&self) -> Result<Device, CliError> {
        match xvlm::train::ranks::local_rank().map_err(xvlm::Error::from)? {
            Some(rank) if self.device == "cuda" => Ok(xvlm::device(&format!("cuda:{rank}"))?),
            _ => self.open(),
        }
    }
}

impl ModelArgs {
    fn open(&self) -> Result<Predictor, CliError> {
        self.open_or(Bundled::General)
    }

    /// The model of the folder, or else one of those that are built in.
    fn open_or(&self, built_in: Bundled) -> Result<Predictor, CliError> {
        let compute = self.compute(&self.device.open_for_rank()?);
        Ok(match &self.model {
            Some(dir) => Predictor::from_folder(dir, compute)?,
            None => Predictor::bundled_for(built_in, compute)?,
        })
    }

    fn compute(&self, device: &Device) -> Compute {
        Compute::on(device).with(self.precision)
    }

    /// Whether no folder is given.
    fn is_built_in(&self) -> bool {
        self.model.is_none()
    }

    /// What reports call the model.
    fn name(&self) -> String {
        self.model.as_ref().map_or_else(|| "built in".to_owned(), |dir| dir.display().to_string())
    }
}

/// What tells the answers of a model from those of others: its weights and, unless it is f32, the precision.
fn weights(model: &Model) -> String {
    match model.precision() {
        Precision::F32 => model.fingerprint().to_owned(),
        narrow => format!("{} in {narrow}", model.fingerprint()),
    }
}

/// A share, from 0 to 1.
fn share<T: FromStr + PartialOrd + From<u8>>(text: &str) -> Result<T, String> {
    let share = text.parse().ok().filter(|share| (T::from(0)..=T::from(1)).contains(share));
    share.ok_or_else(|| format!("expected a number from 0 to 1, found {text}"))
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let done = xvlm::kernels::process::run(|| command.run());
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::say(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}
