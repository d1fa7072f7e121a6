//! Data for X-VLM: annotation formats, image decoding and augmentation, text cleaning, tokenising,
//! masking, batching, and [`scenes`], the built-in synthetic world.
//!
//! The way of one training sample reads top to bottom through these modules: [`storage`] and [`shards`] (files and
//! objects become records that can be read in any order) → [`Dataset`] and [`Order`] (which is next) → [`records`] (a
//! JSON object becomes a [`Record`]) → [`image`] (header, decode, cache) → [`transform`] (crop, flip,
//! resize, and what that does to boxes) → [`augment`] → [`tokens`] and [`masking`] (text) → [`batch`] (collate) →
//! [`tensors`] (the one place that knows a tensor library). [`loader`] runs it ahead of the training loop on worker
//! threads; [`check`](mod@check) looks through a data set before. [`annotations`] reads the files of published data sets,
//! [`convert`] makes shards of them, and [`vocabulary`] learns word pieces from texts.
//!
//! *Architecture invariant:* everything random takes a generator from its caller, so a batch is a
//! function of (records, configuration, seed, step).
pub mod annotations;
pub mod augment;
pub mod batch;
mod broken;
pub mod check;
mod config;
pub mod convert;
pub mod dataset;
pub mod error;
pub mod image;
mod json;
pub mod loader;
pub mod masking;
mod order;
pub mod records;
pub mod resize;
pub mod scenes;
pub mod shards;
pub mod storage;
pub mod tensors;
pub mod tokens;
pub mod transform;
pub mod vocabulary;

pub use augment::{Operation, RandAugment};
pub use batch::{BatchBuilder, CaptionBatch, GenerationBatch, ItemBatches, ItemConfig, RegionBatch, TextBatch};
pub use broken::{BrokenRecord, Tally};
pub use config::{BatchConfig, FlipTexts, GenerationConfig, Padding, Target};
pub use dataset::{Dataset, DatasetConfig, SourceConfig};
pub use error::{DataError, Place};
pub use image::{DecodeOptions, Encoded, ImageCache, Picture};
pub use loader::{Loader, LoaderConfig};
pub use masking::{Masked, MaskingGenerator};
pub use order::Order;
pub use records::{Element, ImageSource, Origin, Record, RecordKeys, read_jsonl};
pub use shards::{Form, Index, Need, ShardLimits, ShardWriter};
pub use storage::{Location, StorageOptions};
pub use tensors::{CaptionTensors, GenerationTensors, RegionTensors, TextTensors};
pub use tokens::{TextTokenizer, pre_caption, pre_question, text_key};
pub use transform::{RandomResizedCrop, Rect, Transform, View};
