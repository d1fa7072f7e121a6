//! Differentiable tensor operations for X-VLM.
//!
//! Every operation is one public function over [`candle_core::Tensor`]s. On the CPU in `f32` it runs fused, with a
//! hand-written backward pass; for every other device or data type (CUDA, `f64`, `bf16`, …) the same function is composed
//! from candle's own differentiable operations. Neither path ever drops a gradient.
//!
//! Errors are [`candle_core::Error`]s; a wrong shape is a [`KernelError`] wrapped in one.

#![allow(unsafe_code)]

mod activation;
mod attention;
mod boxes;
mod columns;
mod embedding;
mod error;
#[cfg(gpu)]
mod gpu;
mod graph;
mod host;
mod linear;
mod loss;
mod norm;
mod optim;
mod path;
mod pool;
pub mod process;
mod real;
mod resize;
mod simd;
mod window;

pub use activation::{bias_gelu, gelu, quick_gelu};
pub use attention::{Dropped, cross_attention, self_attention};
pub use boxes::{
    BoxFormat, box_losses, cxcywh_to_xyxy, giou, iou, pairwise_giou, patch_rectangle, patch_rectangle_mask,
    xyxy_to_cxcywh,
};
pub use embedding::embedding;
pub use error::KernelError;
#[cfg(feature = "emulation")]
pub use gpu::emulated;
pub use linear::linear;
pub use loss::{IGNORE, cross_entropy, log_softmax, softmax};
pub use norm::layer_norm;
pub use optim::{AdamW, Update, adamw_step};
pub use pool::{Cover, patch_pool};
pub use resize::resize_bicubic;
pub use window::{WindowShape, window_attention};
