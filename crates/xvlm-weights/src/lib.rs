//! Weights on disk: a model as a folder, safetensors in and out, and the strict assignment of tensors to parameters.
//!
//! A model is a folder with `config.json`, `model.safetensors` and `tokenizer.json`. This crate knows names, shapes
//! and bytes; what the tensors mean, and what the configuration says, it does not know.
//!
//! Nothing is loaded in part: [`assign`] either gives every parameter its tensor or changes none, and a file or a
//! folder is written aside first and then renamed, so that a reader sees the old one or the new one.

mod assign;
mod atomic;
mod error;
mod folder;
mod tensors;

pub use assign::{LoadReport, LoadRules, assign};
pub use atomic::write_file_atomically;
pub use error::{NamedShape, Reshaped, WeightsError};
pub use folder::{ModelFiles, ModelFolder};
pub use tensors::{StoredType, read_safetensors, write_safetensors};
