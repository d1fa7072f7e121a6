//! What X-VLM is trained for and used for: the only place where model, losses, data and metrics meet.
//!
//! [`pretrain`] trains; [`Model`] is what training leaves, opened for use. Each other module is one use: how a question is
//! put to the model, what the answer is, and how well it does on a data set.

pub mod captioning;
mod config;
mod error;
pub mod fill;
mod generate;
pub mod grounding;
mod model;
pub mod pretrain;
pub mod retrieval;
pub mod vqa;

pub use config::{Objective, PretrainConfig, RegionStream};
pub use error::{ConfigProblem, TaskError};
pub use generate::{Search, Written};
pub use model::{ImageTokens, Model, ModelConfig};

/// How many images or texts go through the model at a time: enough to keep all cores busy.
const BATCH: usize = 32;

/// What is told while a data set is worked through: how many of how many items are done.
pub type Counter<'a> = &'a mut dyn FnMut(usize, usize);
