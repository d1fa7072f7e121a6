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
mod cross_entropy;
mod embedding;
mod error;
#[cfg(gpu)]
mod gpu;
mod graph;
mod host;
mod linear;
mod norm;
mod optim;
mod path;
mod pool;
pub mod process;
mod real;
mod resize;
mod simd;
mod softmax;
mod window;

pub use activation::{bias_gelu, gelu, quick_gelu};
pub use attention::{Dropped, cross_attention, self_attention};
pub use boxes::{box_losses, cxcywh_to_xyxy, giou, iou, patch_rectangle, patch_rectangle_mask, xyxy_to_cxcywh};
pub use cross_entropy::{IGNORE, cross_entropy};
pub use embedding::embedding;
pub use error::KernelError;
#[cfg(feature = "emulation")]
pub use gpu::emulated;
pub use linear::{linear, linear_without_bias};
pub use norm::{add_layer_norm, layer_norm};
pub use optim::{AdamW, adamw_step, squared_norm};
pub use pool::patch_pool;
pub use resize::resize_bicubic;
pub use softmax::{log_softmax, softmax};
pub use window::{WindowShape, window_attention};
