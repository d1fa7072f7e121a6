//! Large sets of pictures: what the commands that work through them have in common.
//!
//! With --out, a command keeps its answers in NAME.jsonl as they come (see [`Sweep`]); at the end the result is in NAME.json, or
//! in the form of a data set's own tools.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use xvlm::tasks::{Sweep, SweepProblem, TaskError};
use xvlm::{Bundled, Predictor};

use crate::ModelArgs;
use crate::output::{CliError, say};
use crate::progress::Stage;
use crate::ranks::{self, RanksArgs};
use crate::signals;

/// How a large set is worked through.
#[derive(Args)]
pub(crate) struct SweepArgs {
    /// Folder for the answers, which are written as they come, and for the result file
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Go on from the answers in --out
    #[arg(long, requires = "out")]
    resume: bool,
    #[command(flatten)]
    ranks: RanksArgs,
}

/// What is worked through, and by whom.
pub(crate) struct Swept<'a> {
    /// What is counted, as progress names it.
    pub(crate) units: &'static str,
    pub(crate) model: &'a ModelArgs,
    /// The model if no folder is given.
    pub(crate) built_in: Bundled,
    /// Where the items come from, by the name of the option or file that says so.
    pub(crate) from: Option<(&'static str, String)>,
    /// Share of units that may be left out because they are broken.
    pub(crate) max_bad_fraction: f64,
    /// Whether there is no more than one item: nothing that processes could share.
    pub(crate) is_one: bool,
}

impl SweepArgs {
    /// Joins the processes that were started together if there is something to share or to keep, opens the model and lets `work`
    /// go through the set; nothing where another process tells the result.
    pub(crate) fn run<T>(
        &self,
        swept: Swept,
        work: impl FnOnce(&Predictor, &mut Sweep) -> Result<T, CliError>,
    ) -> Result<Option<T>, CliError> {
        let Swept { units, model, built_in, from, max_bad_fraction, is_one } = swept;
        let ranks = match is_one && self.out.is_none() {
            true => self.ranks.connect_if_told(&model.device)?,
            false => self.ranks.connect(&model.device)?,
        };
        let run = || {
            let predictor = model.open_or(built_in)?;
            // What is kept nowhere need not be saved.
            let stop = if self.out.is_some() { signals::asked_to_stop("what is at hand")? } else { Arc::default() };
            Stage::run(units, |counter| {
                let (folder, resume, ranks) = (self.out.clone(), self.resume, Arc::clone(&ranks));
                let about = about(&predictor, from);
                let mut sweep = Sweep { folder, resume, about, stop, ranks, max_bad_fraction, counter };
                work(&predictor, &mut sweep)
            })
        };
        let done = run();
        if let (Err(CliError::Library(TaskError::Sweep(SweepProblem::Stopped { .. }))), 0) = (&done, ranks.rank()) {
            say("what is done is kept: --resume goes on from there");
        }
        let done = ranks::or_abort(&*ranks, done)?;
        Ok(Some(done).filter(|_| ranks.rank() == 0))
    }

    /// Writes a result file, if there is a folder for it.
    pub(crate) fn write(
        &self,
        name: &str,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<Option<PathBuf>, CliError> {
        let Some(path) = self.out.as_deref().map(|folder| folder.join(name)) else { return Ok(None) };
        xvlm::weights::write_file_atomically(&path, write)?;
        Ok(Some(path))
    }

    /// Writes a result file that is one JSON document.
    pub(crate) fn write_json(&self, name: &str, result: &impl Serialize) -> Result<Option<PathBuf>, CliError> {
        self.write(name, |out| {
            serde_json::to_writer_pretty(&mut *out, result)?;
            writeln!(out)
        })
    }
}

/// What answers depend on beside the items and what is asked of them.
fn about(predictor: &Predictor, from: Option<(&'static str, String)>) -> Value {
    let model = predictor.model();
    let computed = [("weights", model.fingerprint().to_owned()), ("precision", model.precision().to_string())];
    computed.into_iter().chain(from).map(|(name, value)| (name.to_owned(), Value::String(value))).collect()
}

/// Options as [`xvlm::tasks::Work`] takes them. Through text: as values of JSON, numbers would get digits that nobody wrote.
pub(crate) fn options(options: &impl Serialize) -> Result<Value, CliError> {
    Ok(serde_json::from_str(&serde_json::to_string(options)?)?)
}

/// SHA-256 of an option that is too long to stand among the others, such as what was read of a file.
pub(crate) fn digest(option: &impl Serialize) -> Result<String, CliError> {
    let digest = Sha256::digest(serde_json::to_vec(option)?);
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}
