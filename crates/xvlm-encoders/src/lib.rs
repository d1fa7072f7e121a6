//! The parts of X-VLM (Zeng, Zhang and Li, ICML 2022) and [`Xvlm`], their composition.
//!
//! - [`Swin`]: a vision transformer, image → patch tokens.
//! - [`Bert`]: a text encoder in its lower layers, a cross-modal encoder (with cross attention to patch tokens) from the
//!   fusion layer upwards.
//! - [`Head`]: the two-layer perceptrons for matching and boxes.
//! - [`Parameters`]: where trainable numbers live, and how they are initialised.
//! - [`Pass`]: what differs between training and inference; holds the generator of all randomness.
//!
//! *Architecture invariant:* nothing here has seen a label or a file.

mod bert;
mod config;
mod heads;
mod layers;
mod parameters;
mod pass;
mod swin;
mod xvlm;

pub use bert::{Attention, Bert, Concepts};
pub use config::{BertConfig, ConfigError, SwinConfig, XvlmConfig};
pub use heads::{Head, MlmHead};
pub use layers::{LayerNorm, Linear};
pub use parameters::Parameters;
pub use pass::Pass;
pub use swin::Swin;
pub use xvlm::{Regions, Xvlm};
