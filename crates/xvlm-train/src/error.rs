//! What can go wrong in training, each variant naming what was expected and what was found.

use std::io;
use std::path::{Path, PathBuf};

/// An error of a model or of its data, of which the loop knows only what it says.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file or folder could not be read or written.
    #[error("{}: {source}{}", path.display(), room(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A value of the configuration is out of its range.
    #[error("{field}: expected {expected}, found {found}")]
    Config {
        /// The value's place in [`TrainConfig`](crate::TrainConfig).
        field: &'static str,
        /// Its range.
        expected: &'static str,
        /// The value.
        found: String,
    },
    /// A parameter that cannot be trained.
    #[error("parameter {name}: expected {expected}, found {found}")]
    Parameter {
        /// The parameter.
        name: String,
        /// What a parameter must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// A new run was asked for where there is one.
    #[error("{}: expected a folder without checkpoints for a new run, found {found}; resume it, or choose another folder", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// Its newest checkpoint.
        found: String,
    },
    /// Another process trains in the folder.
    #[error("{}: expected a folder in which no other process trains, found one that does", path.display())]
    Locked {
        /// The file that it holds.
        path: PathBuf,
    },
    /// A file of a checkpoint is not what was written. Where a run is resumed: there are checkpoints, and all are damaged; this
    /// is about the newest.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Damaged {
        /// The damaged file.
        path: PathBuf,
        /// What it should be.
        expected: String,
        /// What is wrong with it.
        found: String,
    },
    /// A run cannot go on with another configuration than it began with.
    #[error("{}: the run began with {field} = {expected}, found {found} now", path.display())]
    Changed {
        /// The checkpoint's state.
        path: PathBuf,
        /// The value's place in [`TrainConfig`](crate::TrainConfig).
        field: String,
        /// The value in the checkpoint.
        expected: String,
        /// The value now.
        found: String,
    },
    /// A checkpoint of another model.
    #[error("{}: tensor {tensor}: expected {expected}, found {found}", path.display())]
    Mismatch {
        /// The checkpoint's file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the model has.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// A line of a metrics file cannot be read.
    #[error("{}: line {line}: expected a row of metrics, found {found}", path.display())]
    Metrics {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser said.
        found: String,
    },
    /// Batches could not be built.
    #[error("iteration {iteration}: batches: {source}")]
    Batches {
        /// The iteration they were for, from 1.
        iteration: u64,
        /// Why.
        source: BoxError,
    },
    /// The model could not be trained on a batch.
    #[error("iteration {iteration}: model: {source}")]
    Model {
        /// The iteration, from 1.
        iteration: u64,
        /// Why.
        source: BoxError,
    },
    /// A loss or the gradient is infinite or not a number. Nothing was updated or saved with it.
    #[error(
        "iteration {iteration}: {loss}: expected a finite number, found {value}{}",
        circumstances(tensor, records, *of_ranks, checkpoint)
    )]
    NotFinite {
        /// The iteration, from 1.
        iteration: u64,
        /// Name of the loss, or `gradient norm`.
        loss: &'static str,
        /// Its value.
        value: f64,
        /// The first tensor on the way to it that has such numbers, if it is known.
        tensor: Option<String>,
        /// Where the samples of this rank's batch come from.
        records: Vec<String>,
        /// Of how many ranks the batch may have been: a loss is one rank's, the gradient is that of all.
        of_ranks: usize,
        /// The last checkpoint, which is good.
        checkpoint: Option<Box<Path>>,
    },
    /// What started this process left something in its environment that makes no sense, or that this build cannot do.
    #[error("{variable}: expected {expected}, found {found}")]
    Environment {
        /// The variable of the environment, or what it was to say.
        variable: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// Processes that train together could not talk to each other.
    #[error("rank {rank}: {operation}: {source}")]
    Ranks {
        /// This process.
        rank: usize,
        /// What it asked for.
        operation: &'static str,
        /// Why it did not get it.
        source: BoxError,
    },
    /// Processes that train together were not started alike.
    #[error("rank {rank}: expected the {what} of rank 0, found another")]
    Unlike {
        /// The first process that differs from rank 0.
        rank: usize,
        /// In what.
        what: &'static str,
    },
    /// A tensor operation failed: a loss that is no scalar, a device that does not answer, or no memory.
    #[error("{name}: {source}")]
    Tensor {
        /// The parameter or loss.
        name: String,
        /// What the tensor library said.
        source: Box<candle_core::Error>,
    },
}

impl TrainError {
    /// For `map_err`: names the file of an input or output error.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// For `map_err`: names the tensor of a failed operation.
    pub(crate) fn tensor(name: &str) -> impl FnOnce(candle_core::Error) -> Self {
        move |source| Self::Tensor { name: name.to_owned(), source: Box::new(source) }
    }
}

/// What there is to say where a disk is full.
fn room(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "; the checkpoints made before are whole: once there is room, the run can be resumed"
        }
        _ => "",
    }
}

/// How many records are named.
const NAMED: usize = 8;

/// What there is to say of a number that is not finite.
fn circumstances(
    tensor: &Option<String>,
    records: &[String],
    of_ranks: usize,
    checkpoint: &Option<Box<Path>>,
) -> String {
    let tensor = tensor.as_ref().map(|name| format!("; the first tensor with such numbers is {name}"));
    let more = match records.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let named = records[..records.len().min(NAMED)].join(", ");
    let batch = match of_ranks {
        0 | 1 => "the batch".to_owned(),
        ranks => format!("it is in the batch of one of {ranks} ranks: this rank's"),
    };
    let records = (!records.is_empty()).then(|| format!("; {batch} was made of {named}{more}"));
    let checkpoint = match checkpoint {
        Some(path) => format!("; the last checkpoint is {}", path.display()),
        None => "; there is no checkpoint yet".to_owned(),
    };
    format!("{}{}{checkpoint}", tensor.unwrap_or_default(), records.unwrap_or_default())
}
