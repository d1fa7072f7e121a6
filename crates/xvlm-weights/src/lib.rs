//! Weights on disk: a model as a folder, safetensors in and out, checkpoints of other programs, and the strict
//! assignment of tensors to parameters.
//!
//! A model is a folder with `config.json`, `model.safetensors` and `tokenizer.json`. This crate knows names, shapes
//! and bytes; what the tensors mean, and what the configuration says, it does not know.
//!
//! Weights are mapped into memory, not read in ([`StoredTensors`]): a number is touched once, on its way to the place and the
//! type that it is computed with.
//!
//! Nothing is loaded in part: [`assign`] either gives every parameter its tensor or changes none, and a file or a
//! folder is written aside first and then renamed, so that a reader sees the old one or the new one.
//!
//! Files of others are not trusted: no pickle is ever executed, and no size in a file is believed before it is held
//! against the bytes that are there.

mod assign;
mod atomic;
mod checkpoint;
mod convert;
mod error;
mod folder;
mod interpolate;
mod names;
mod stored;
mod tensors;

pub use assign::{LoadReport, LoadRules, assign, compare};
pub use atomic::write_file_atomically;
pub use checkpoint::{Checkpoint, CheckpointKind, TensorInfo, first_non_finite, write_pytorch};
pub use convert::{Because, Conversion, ConversionReport, Layout};
pub use error::{NamedShape, Reshaped, WeightsError};
pub use folder::{ModelFiles, ModelFolder};
pub use interpolate::{geometric_grid, resize_positions, resize_relative_positions};
pub use names::{Origin, TextLayers, is_buffer, tied_to};
pub use stored::{StoredTensors, read_safetensors};
pub use tensors::{StoredType, write_safetensors, write_safetensors_with};
