//! What X-VLM is trained for and used for: the only place where model, losses, data and metrics meet.
//!
//! [`pretrain`] trains; [`Model`] is what training leaves, opened for use. Each other module is one use: what it is trained
//! for, how a question is put to the model, what the answer is, and how well it does on a data set.

use std::path::Path;

pub(crate) use sweep::Item;

mod align;
pub mod captioning;
mod compute;
mod config;
pub mod convert;
pub mod embed;
mod error;
pub mod fill;
pub mod finetune;
mod finite;
mod generate;
pub mod grounding;
mod grouped;
pub mod matching;
mod model;
pub mod nlvr;
pub mod official;
pub mod plan;
pub mod presets;
pub mod pretrain;
pub mod retrieval;
mod search;
mod session;
pub mod sweep;
mod training;
pub mod vqa;
mod yaml;

pub use align::Negatives;
pub use compute::{Compute, Precision};
pub use config::{ItcGradient, Objective, PretrainConfig, RegionStream};
pub use error::{ConfigProblem, SweepProblem, TaskError};
pub use finetune::FinetuneConfig;
pub use generate::{Draw, LABEL_SMOOTHING, Source, Written, search_texts, writing_loss};
pub use model::{ImageTokens, Model, ModelConfig, Texts};
pub use search::{Sampling, Search, Sequence, TextSearch};
pub use session::Session;
pub use sweep::Sweep;
pub use training::Training;

/// How many images or texts go through the model at a time: enough to keep all cores busy.
const BATCH: usize = 32;

/// What is told while a data set is worked through: how many of how many items are done.
pub type Counter<'a> = &'a mut dyn FnMut(usize, usize);

/// An identifier as result files have it: a number if it is one, as in all published files.
fn json_id(id: &str) -> serde_json::Value {
    id.parse::<u64>().ok().filter(|number| number.to_string() == id).map_or_else(|| id.into(), Into::into)
}

/// The items of a file of a folder, if there are any.
fn some<T>(items: Vec<T>, data: &Path, file: &str) -> Result<Vec<T>, TaskError> {
    match items.is_empty() {
        true => Err(TaskError::Empty { what: data.join(file).display().to_string() }),
        false => Ok(items),
    }
}
