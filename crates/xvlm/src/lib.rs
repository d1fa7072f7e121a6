//! X-VLM (Zeng, Zhang and Li: *Multi-Grained Vision Language Pre-Training*, ICML 2022) in one crate: find what a phrase
//! means in a picture, describe it, answer about it, search with it, fill in blanks.
//!
//! ```
//! use xvlm::{Device, Picture, Predictor};
//!
//! # fn main() -> Result<(), xvlm::Error> {
//! // The small model that comes with the crate; `Predictor::from_folder` opens any other.
//! let predictor = Predictor::bundled(&Device::Cpu)?;
//! let picture = Picture::from_bytes(include_bytes!("../assets/example.png"), &"example.png")?;
//!
//! // The picture is encoded once; then it can be asked anything.
//! let view = predictor.look(&picture)?;
//! for found in view.ground(&["the red circle", "the shape on the left"])? {
//!     println!("{}: {:?}, probability {:?}", found.text, found.bounds, found.probability);
//! }
//! println!("{}", view.caption()?.text);
//! # Ok(())
//! # }
//! ```
//!
//! The layers below are re-exported as modules: [`kernels`], [`encoders`], [`losses`], [`metrics`], [`data`],
//! [`weights`], [`train`] and [`tasks`].

pub mod alt;
#[cfg(feature = "bundled")]
mod bundled;
#[cfg(feature = "hub")]
mod hub;
mod predictor;

#[cfg(feature = "bundled")]
pub use bundled::Bundled;
pub use candle_core::Device;
#[cfg(feature = "hub")]
pub use hub::Hub;
pub use predictor::{
    Answer, Grounding, Heated, Judgement, LikelyAnswer, Match, PixelBox, Predictor, Proposal, RankedAnswers, View,
    Views,
};
pub use xvlm_data::Picture;
pub use xvlm_tasks::captioning::Writing;
pub use xvlm_tasks::embed::{Index, Query, SearchOptions};
pub use xvlm_tasks::fill::{Completing, Completion, Exercise, Grade};
pub use xvlm_tasks::grounding::{HeatMap, Layers, StretchedHeat};
pub use xvlm_tasks::vqa::{AnswerList, Ranking};
pub use xvlm_tasks::{Compute, ConfigProblem, Model, Precision, Sampling, Search, TaskError as Error, Written};
pub use {
    xvlm_data as data, xvlm_encoders as encoders, xvlm_kernels as kernels, xvlm_losses as losses,
    xvlm_metrics as metrics, xvlm_tasks as tasks, xvlm_train as train, xvlm_weights as weights,
};

/// The device of a name: `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// If the name is none of these, or there is no such device (the default build knows the CPU only).
pub fn device(name: &str) -> Result<Device, Error> {
    let ordinal = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" => Some(0),
        Some(("cuda", number)) => number.parse().ok(),
        _ => None,
    };
    let problem = |message: String| ConfigProblem { file: "device".to_owned(), message };
    let Some(ordinal) = ordinal else {
        return Err(problem(format!("expected cpu, cuda or cuda:N, found {name}")).into());
    };
    if cfg!(not(feature = "cuda")) {
        return Err(problem(format!("expected cpu, as this build has no feature `cuda`, found {name}")).into());
    }
    Device::new_cuda(ordinal).map_err(|error| problem(format!("{name}: {error}")).into())
}

/// The examples of the README.
#[cfg(all(doctest, feature = "bundled"))]
#[doc = include_str!("../../../README.md")]
struct Readme;
