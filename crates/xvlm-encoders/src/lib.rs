//! The parts of X-VLM (Zeng, Zhang and Li, ICML 2022) and [`Xvlm`], their composition.
//!
//! - [`Vision`]: a vision transformer, image → patch tokens: [`Swin`], or a [`Vit`] as in CLIP or DeiT.
//! - [`Bert`] (or RoBERTa): a text encoder in its lower layers, a cross-modal encoder (with cross attention to patch tokens)
//!   from the fusion layer upwards; with a [`MlmHead`] and a causal mask a decoder.
//! - [`Decoding`]: texts written token by token, with what was computed for earlier tokens.
//! - [`Head`]: the two-layer perceptrons for matching, boxes and statements about two images.
//! - [`Parameters`]: where trainable numbers live, and how they are initialised; [`Blueprint`]: the same without numbers.
//! - [`cost`]: what a training step costs in memory and in products of matrices.
//! - [`Pass`]: what differs between training and inference; holds the generator of all randomness.
//!
//! *Architecture invariant:* nothing here has seen a label or a file.

mod bert;
mod config;
pub mod cost;
mod decoding;
mod heads;
mod layers;
mod parameters;
mod pass;
mod swin;
mod vision;
mod vit;
mod xvlm;

pub use bert::{Attention, Bert, Concepts};
pub use config::{
    Activation, BertConfig, ConfigError, SwinConfig, Task, TextModel, VisionConfig, VitConfig, VitFamily, XvlmConfig,
};
pub use decoding::Decoding;
pub use heads::{Head, MlmHead};
pub use layers::{LayerNorm, Linear, Words};
pub use parameters::{Blueprint, Parameters};
pub use pass::Pass;
pub use swin::Swin;
pub use vision::{Regions, Vision};
pub use vit::Vit;
pub use xvlm::Xvlm;
