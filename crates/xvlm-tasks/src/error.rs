//! What can go wrong in a task.

use std::path::{Path, PathBuf};

use xvlm_data::{DataError, Place};
use xvlm_encoders::Task;
use xvlm_metrics::MetricsError;
use xvlm_train::TrainError;
use xvlm_weights::WeightsError;

/// The errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// Data that cannot be read or understood.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A model folder that cannot be read or written.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Answers that cannot be scored.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// Training that cannot go on.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A tensor operation that failed: wrong shapes, or a device that does not answer.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A configuration that cannot be read or understood.
    #[error(transparent)]
    Config(#[from] ConfigProblem),
    /// A data set that cannot be worked through.
    #[error(transparent)]
    Sweep(#[from] SweepProblem),
    /// A phrase to be completed that has no blank.
    #[error("text {text:?}: expected at least one blank, written ___ or [MASK], found none")]
    Blank {
        /// The phrase.
        text: String,
    },
    /// A phrase whose blanks are further apart than the longest text of the model.
    #[error("text {text:?}: expected blanks within {max_tokens} word pieces, found them further apart")]
    BlanksApart {
        /// The phrase.
        text: String,
        /// The longest text.
        max_tokens: usize,
    },
    /// Answers that are more or fewer than the blanks of their phrase.
    #[error("text {text:?}: expected {expected} answers, one for each blank, found {found}")]
    Answers {
        /// The phrase.
        text: String,
        /// The number of blanks.
        expected: usize,
        /// The number of answers.
        found: usize,
    },
    /// An answer that cannot be graded.
    #[error("text {text:?}: answer {answer:?}: expected {expected}")]
    Answer {
        /// The phrase.
        text: String,
        /// The answer.
        answer: String,
        /// What it should have been.
        expected: &'static str,
    },
    /// A model that is made for another task.
    #[error("{what}: expected a model for {}, found one for {}", names(expected), found.name())]
    Unfit {
        /// What it was asked for.
        what: &'static str,
        /// The tasks whose models can do it.
        expected: &'static [Task],
        /// The task it is made for.
        found: Task,
    },
    /// A data set without the items that a score needs.
    #[error("{what}: expected at least one item, found none")]
    Empty {
        /// What should hold items.
        what: String,
    },
    /// A file of a published model that cannot be had.
    #[error("{file} of {repository}, revision {revision}: {cause}")]
    Fetch {
        /// Where the model is published: `owner/name`.
        repository: String,
        /// Which state of it: a branch, tag or commit.
        revision: String,
        /// The file.
        file: String,
        /// What was expected and found, or what the network said.
        cause: String,
    },
}

fn names(tasks: &[Task]) -> String {
    tasks.iter().map(|task| task.name()).collect::<Vec<_>>().join(" or ")
}

/// A data file in which something else stands than should.
pub(crate) fn wrong_data(
    path: impl AsRef<Path>,
    place: Place,
    field: &str,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> TaskError {
    let (path, field) = (path.as_ref().into(), field.to_owned());
    DataError::Field { path, place, field, expected: expected.into(), found: found.into() }.into()
}

/// A configuration that cannot be read or understood.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {message}")]
pub struct ConfigProblem {
    /// The file, preset or option.
    pub file: String,
    /// What was expected and found, with the field.
    pub message: String,
}

/// What keeps a data set from being worked through.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SweepProblem {
    /// A file of answers that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Answers that are not to what is asked now.
    #[error("{}: {message}", path.display())]
    Answers {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// A file of answers that another process has.
    #[error("{}: another process writes here", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// Data of which too much is broken to score the rest.
    #[error("{left_out} of {units} are broken, more than {:.1} %; the first: {first}", 100.0 * limit)]
    TooManyBroken {
        /// Units that cannot be asked about.
        left_out: usize,
        /// Units in all.
        units: usize,
        /// The share that may be left out.
        limit: f64,
        /// What is wrong with the first.
        first: String,
    },
    /// It was asked to stop.
    #[error("stopped: {done} of {of} are done")]
    Stopped {
        /// Units that have answers.
        done: usize,
        /// Units in all.
        of: usize,
    },
}
