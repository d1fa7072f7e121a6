//! Differentiable tensor operations for X-VLM.
//!
//! Every operation is one public function over [`candle_core::Tensor`]s, of any strides. By device and float type it takes
//! one of three ways, each with its own gradients:
//!
//! - on the CPU, fused loops over `f32` or `bf16`, with arithmetic in `f32`;
//! - on NVIDIA GPUs (feature `cuda`), our own kernels over `f32`, `bf16` or `f16`, likewise with arithmetic in `f32`;
//! - for every other type and device, candle's own differentiable operations.
//!
//! None of them drops a gradient but where its documentation says so: [`cached_attention`] has none at all; and there is none
//! for the weights of a [`PackedLinear`] and a [`WindowBias`], which are for inference, for the biases of keys in attention,
//! the cover of [`patch_pool`] and the padding of an [`embedding`]. Each gives the same bits in every run on one machine: sums
//! have one order, which the number of threads does not change.
//!
//! Errors are [`candle_core::Error`]s; a wrong shape is a [`KernelError`] wrapped in one.

#![allow(unsafe_code)]

mod activation;
mod attention;
mod boxes;
mod columns;
mod cross_entropy;
mod dropout;
mod embedding;
mod error;
mod finite;
#[cfg(gpu)]
mod gpu;
mod gradients;
mod graph;
mod host;
mod linear;
mod mapped;
mod norm;
mod numbers;
mod optim;
mod packed;
mod patches;
mod path;
mod pool;
pub mod process;
mod real;
mod resize;
mod scaled;
mod simd;
mod softmax;
mod sum;
mod tape;
mod window;

pub use activation::{bias_gelu, gelu, quick_gelu};
pub use attention::{Dropped, KeyValueCache, cached_attention, cross_attention, self_attention};
pub use boxes::{
    BoxFormat, box_losses, cxcywh_to_xyxy, giou, iou, pairwise_giou, patch_rectangle, patch_rectangle_mask,
    xyxy_to_cxcywh,
};
pub use cross_entropy::{IGNORE, cross_entropy};
pub use dropout::{Dropout, add_branch, dropout};
pub use embedding::{embedding, stored_embedding};
pub use error::KernelError;
pub use finite::all_finite;
#[cfg(feature = "emulation")]
pub use gpu::emulated;
pub use gradients::Gradients;
pub use linear::{gelu_linear, linear, linear_without_bias, stacked_linear};
pub use mapped::MappedFile;
pub use norm::{add_layer_norm, layer_norm};
pub use numbers::{StoredBytes, StoredTensor, tensor_of_bytes};
pub use optim::{AdamW, Update, adamw_step, joined, round_into, split_into};
pub use packed::{Epilogue, PackedLinear, PackedWeights};
pub use patches::{merge_patches, split_patches};
pub use pool::{Cover, patch_pool};
pub use resize::resize_bicubic;
pub use scaled::scale_gradient;
pub use softmax::{log_softmax, softmax};
pub use tape::Tape;
pub use window::{WindowBias, WindowShape, relative_positions, window_attention, window_attention_with};
