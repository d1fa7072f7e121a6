//! Data for X-VLM: annotation formats, image decoding and augmentation, text cleaning, tokenising,
//! masking, batching, and [`scenes`], the built-in synthetic world.
//!
//! The way of one training sample reads top to bottom through these modules: [`records`] (a line of
//! a JSON-lines file becomes a [`Record`]) → [`image`] (header, decode, cache) → [`transform`] (crop, flip,
//! resize, and what that does to boxes) → [`augment`] → [`tokens`] and [`masking`] (text) → [`batch`] (collate) →
//! [`tensors`] (the one place that knows a tensor library). [`loader`] runs it ahead of the training
//! loop on worker threads; [`annotations`] reads the files that evaluation uses.
//!
//! *Architecture invariant:* everything random takes a generator from its caller, so a batch is a
//! function of (records, configuration, seed, step).
pub mod annotations;
pub mod augment;
pub mod batch;
mod config;
pub mod error;
pub mod image;
mod json;
pub mod loader;
pub mod masking;
mod order;
pub mod records;
pub mod resize;
pub mod scenes;
pub mod tensors;
pub mod tokens;
pub mod transform;

pub use augment::{Operation, RandAugment};
pub use batch::{BatchBuilder, CaptionBatch, GenerationBatch, RegionBatch, TextBatch};
pub use config::{BatchConfig, GenerationConfig, Target};
pub use error::{DataError, Place};
pub use image::{DecodeOptions, Encoded, ImageCache, Picture};
pub use loader::{Loader, LoaderConfig};
pub use masking::{Masked, MaskingGenerator};
pub use order::BrokenRecord;
pub use records::{Element, ImageSource, Origin, Record, read_jsonl, read_jsonl_lenient};
pub use tensors::{CaptionTensors, GenerationTensors, RegionTensors, TextTensors};
pub use tokens::{TextTokenizer, pre_caption, pre_question, text_key};
pub use transform::{RandomResizedCrop, Rect, Transform, View};
