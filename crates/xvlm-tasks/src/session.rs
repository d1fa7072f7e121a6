//! What runs of training have in common beside the loop: how they are started and resumed, and the models they leave.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use xvlm_data::TextTokenizer;
use xvlm_train::ranks::{self, Alone, Communicator};
use xvlm_train::{Job, Progress, RunFolder, Summary, TrainConfig};
use xvlm_weights::StoredType;

use crate::error::{ConfigProblem, TaskError};
use crate::model::{Model, ModelConfig};

/// How a run is started, and how it is asked to stop.
pub struct Session {
    /// Go on from the newest checkpoint that is whole; from the beginning if there is none.
    pub resume: bool,
    /// Becomes true when training should save and stop after the iteration it is at.
    pub stop: Arc<AtomicBool>,
    /// The processes that train together.
    pub ranks: Arc<dyn Communicator>,
}

impl Session {
    /// One process that is not asked to stop.
    pub fn alone(resume: bool) -> Self {
        Self { resume, stop: Arc::default(), ranks: Arc::new(Alone) }
    }

    /// Whether this process is the one that writes and tells.
    pub(crate) fn is_first_rank(&self) -> bool {
        self.ranks.rank() == 0
    }

    /// For the training loop.
    pub(crate) fn job<'a>(&self, run: &'a RunFolder) -> Job<'a> {
        Job { run, resume: self.resume, ranks: Arc::clone(&self.ranks), stop: Arc::clone(&self.stop) }
    }
}

/// The configuration of a run, which its folder keeps. Fields are JSON pointers; what does not exist does not matter.
pub(crate) trait Kept: Serialize + DeserializeOwned {
    /// What each of several processes may have otherwise.
    const OWN: &'static [&'static str];

    /// What may change when a run is resumed: what only says how long to go on, how quickly, and what to leave behind. What may
    /// not change of `train`, the checkpoint knows.
    const FREE: &'static [&'static str];

    /// Checks that a run that is resumed is configured as it was when it began, and that all processes run the same.
    fn check(&self, run: &RunFolder, session: &Session, progress: &mut dyn Progress) -> Result<(), TaskError> {
        if session.is_first_rank() && session.resume {
            self.check_begun(run, progress)?;
        }
        Ok(ranks::compare(&*session.ranks, [("configuration", without(self, Self::OWN).to_string())])?)
    }

    /// Keeps it in the folder of a run.
    fn keep(&self, run: &RunFolder) -> Result<(), TaskError> {
        let path = path(run);
        let problem =
            |error: &dyn Display| ConfigProblem { file: path.display().to_string(), message: error.to_string() };
        let text = serde_norway::to_string(self).map_err(|error| problem(&error))?;
        Ok(xvlm_weights::write_file_atomically(&path, |out| out.write_all(text.as_bytes()))?)
    }

    /// Compares with what the folder keeps, but for what is [`Self::FREE`]. What did not exist yet when the run began was its
    /// default; this is told.
    fn check_begun(&self, run: &RunFolder, progress: &mut dyn Progress) -> Result<(), TaskError> {
        let path = path(run);
        if run.checkpoints()?.is_empty() || !path.exists() {
            return Ok(());
        }
        let problem = |message: String| ConfigProblem { file: path.display().to_string(), message };
        let text = std::fs::read_to_string(&path).map_err(|error| problem(error.to_string()))?;
        let mut before: Value = serde_norway::from_str(&text).map_err(|error| problem(error.to_string()))?;
        // A file of a version with other fields is compared as it is.
        if let Ok(whole) = serde_norway::from_str::<Self>(&text) {
            let whole = without(&whole, &[]);
            let new = fields_without("", &before, &whole);
            if !new.is_empty() {
                let (file, new) = (path.display(), new.join(", "));
                progress.warning(&format!("{file}: the run began without {new}: the defaults, for what was before"));
            }
            before = whole;
        }
        take(&mut before, Self::FREE);
        for (field, now) in without(self, Self::FREE).as_object().into_iter().flatten() {
            if let Some((field, expected, found)) = xvlm_train::difference(field, &before[field.as_str()], now) {
                return Err(problem(format!("{field}: expected {expected}, as the run began, found {found}")).into());
            }
        }
        Ok(())
    }
}

fn path(run: &RunFolder) -> PathBuf {
    run.path().join("config.yaml")
}

/// The fields of a configuration that an older form of it does not have.
fn fields_without(place: &str, old: &Value, new: &Value) -> Vec<String> {
    let fields = new.as_object().into_iter().flatten().flat_map(|(name, value)| {
        let place = if place.is_empty() { name.clone() } else { format!("{place}.{name}") };
        match old.get(name) {
            Some(old) if old.is_object() => fields_without(&place, old, value),
            Some(_) => Vec::new(),
            None => vec![format!("{place} = {value}")],
        }
    });
    if old.is_object() { fields.collect() } else { Vec::new() }
}

/// A configuration without some of its fields.
fn without(config: &impl Serialize, fields: &[&str]) -> Value {
    let mut value = serde_json::to_value(config).unwrap_or_default();
    take(&mut value, fields);
    value
}

fn take(config: &mut Value, fields: &[&str]) {
    for field in fields {
        config.pointer_mut(field).map(Value::take);
    }
}

/// What a finished run leaves.
pub(crate) struct Finished<'a> {
    pub(crate) run: &'a RunFolder,
    pub(crate) train: &'a TrainConfig,
    pub(crate) summary: &'a Summary,
    pub(crate) model: ModelConfig,
    pub(crate) tokenizer: &'a TextTokenizer,
    pub(crate) stored: StoredType,
}

impl Finished<'_> {
    /// Writes the model of the last iteration, `weights`, to `out/model`, and that of the best checkpoint to `out/best`.
    pub(crate) fn write(
        &self,
        out: &Path,
        weights: Vec<(String, Tensor)>,
        progress: &mut dyn Progress,
    ) -> Result<(), TaskError> {
        let write = |name: &str, weights: Vec<(String, Tensor)>| {
            Model::write(&out.join(name), &self.model, weights, self.tokenizer, self.stored)
        };
        let best = self.run.best()?.filter(|_| self.train.keep_best).map(|(best, _)| best.iteration);
        let best = match best {
            Some(iteration) if iteration < self.summary.iterations => Some(self.run.weights(iteration)),
            best => best.map(|_| Ok(weights.clone())),
        };
        write("model", weights)?;
        match best {
            Some(Ok(weights)) => write("best", weights)?,
            Some(Err(error)) => progress.warning(&format!("{error}; this model is not written")),
            None => {}
        }
        Ok(())
    }
}

/// Tells what was broken of what all processes have drawn; `counts` and `examples` are those of this one.
pub(crate) fn tell_broken(
    (drawn, broken): (u64, u64),
    examples: impl IntoIterator<Item = String>,
    session: &Session,
    progress: &mut dyn Progress,
) -> Result<(), TaskError> {
    let [drawn, broken] = ranks::sum(&*session.ranks, [drawn as f64, broken as f64])?;
    if session.is_first_rank() && broken > 0.0 {
        progress.warning(&format!("{broken} of {drawn} records that were drawn are broken:"));
        examples.into_iter().for_each(|record| progress.warning(&format!("  {record}")));
    }
    Ok(())
}
