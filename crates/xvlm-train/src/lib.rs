//! The training loop of X-VLM: optimizer, schedule, checkpoints, metrics.
//!
//! [`train`] is the loop, to be read in one sitting; it knows a [`Trainable`] and its [`Batches`], not which ones. What it
//! does by default, and why, stands at the fields of [`TrainConfig`]. What it leaves on the disk is a [`RunFolder`].
//!
//! A run that was interrupted goes on from its last checkpoint as if nothing had happened, to the bit: weights, moments and
//! batches are those of that iteration, and randomness is a function of seed and iteration. (A time limit is the exception:
//! no two runs take the same time.)

mod best;
mod checkpoint;
mod config;
mod error;
mod events;
mod files;
mod metrics;
mod optimizer;
pub mod ranks;
mod run;
mod train;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{Tensor, Var};
use rand_chacha::ChaCha8Rng;

pub use best::{Best, Criterion};
pub use checkpoint::difference;
pub use config::{Decay, OptimizerConfig, Precision, ScheduleConfig, TrainConfig, Warmup};
pub use error::{BoxError, TrainError};
pub use events::EventFile;
pub use metrics::{LossCurve, MetricsRow, loss_curves, peak_memory_mib, read_metrics};
pub use optimizer::Optimizer;
pub use run::RunFolder;
pub use xvlm_kernels::{Gradients, Tape};

pub use train::{Job, Trained, train};

use ranks::Communicator;

/// A model with its losses. The loop knows nothing else about it.
pub trait Trainable {
    /// What one optimizer step learns from.
    type Batch: Send + 'static;

    /// A batch where the model computes; called when its turn comes, so that a device has room for one. As it is, unless
    /// implemented.
    ///
    /// # Errors
    /// What the device says; the loop stops with it.
    fn to_device(&self, batch: Self::Batch) -> Result<Self::Batch, BoxError> {
        Ok(batch)
    }

    /// The parameters with their names, in a fixed order; each listed once, and of the type the model computes in.
    fn parameters(&self) -> &[(String, Var)];

    /// The losses of one batch; their plain sum is minimised.
    ///
    /// # Errors
    /// Whatever keeps the model from computing them; the loop stops with it.
    fn losses(&self, batch: &Self::Batch, step: &mut Step) -> Result<Losses, BoxError>;

    /// Numbers of the batch whose losses were asked for last that are reported beside them and not minimised, such as a mean
    /// reward. None, unless implemented.
    fn observations(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }

    /// Number of samples in a batch: what images per second count.
    fn samples(batch: &Self::Batch) -> usize;

    /// Where the samples of a batch come from, for people to look them up when a loss is not finite.
    fn records(batch: &Self::Batch) -> Vec<String> {
        let _ = batch;
        Vec::new()
    }

    /// The first tensor on the way to the losses of a batch that has numbers that are not finite, by its name. Asked when a
    /// loss is not; `step` draws what it drew for the losses.
    fn first_not_finite(&self, batch: &Self::Batch, step: &mut Step) -> Option<String> {
        let _ = (batch, step);
        None
    }

    /// How good the model is after an iteration, a number that is higher for a better one: asked at each checkpoint, of all
    /// processes, to keep the best. `weights` computes the weights that the finished model would have, which are those to be
    /// judged. If there is no score, [`Self::judged_by`] tells the best, or else the losses do.
    ///
    /// # Errors
    /// Whatever keeps the model from being evaluated; the loop stops with it, once the checkpoint is there.
    fn score(&self, iteration: u64, weights: FinishedWeights) -> Result<Option<f64>, BoxError> {
        let _ = (iteration, weights);
        Ok(None)
    }

    /// Which of the [`Self::observations`] is higher for a better model: where there is no score, its mean since the checkpoint
    /// before is compared. None, unless implemented; minus the mean of the losses is then.
    fn judged_by(&self) -> Option<&'static str> {
        None
    }

    /// Constraints on parameters after an optimizer step, such as the bounds of a temperature.
    ///
    /// # Errors
    /// Whatever keeps the model from applying them; the loop stops with it.
    fn after_step(&self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// Computes every parameter's weights as a finished model would have them, as [`Optimizer::finished_weights`].
pub type FinishedWeights<'a> = &'a dyn Fn() -> Result<Vec<(String, Tensor)>, TrainError>;

/// What a model computes the losses of a batch with.
pub struct Step<'a> {
    /// Where all randomness of the step comes from; another on each rank.
    pub rng: &'a mut ChaCha8Rng,
    /// For the pieces of the forward pass, of which the backward pass will make the most.
    pub tape: &'a Rc<Tape>,
    /// The other processes, for losses that compare with their samples.
    pub ranks: &'a Arc<dyn Communicator>,
}

/// The losses of a batch by name: tensors of one element.
pub struct Losses(pub Vec<(&'static str, Tensor)>);

/// The batches of a run.
pub trait Batches<B> {
    /// The optimizer steps of the next iteration, all at the same learning rate: of each the batches that it averages the
    /// gradients of.
    ///
    /// # Errors
    /// Whatever keeps them from being built; the loop stops with it.
    fn next(&mut self) -> Result<Vec<Vec<B>>, BoxError>;
}

/// Where the loop tells how far it is. The methods do nothing unless implemented.
pub trait Progress {
    /// Training starts after iteration `at` of `of`; `at` is 0 unless a run is resumed.
    fn start(&mut self, of: u64, at: u64) {
        let _ = (of, at);
    }

    /// Something is wrong that does not stop the run.
    fn warning(&mut self, message: &str) {
        let _ = message;
    }

    /// Some iterations are done.
    fn step(&mut self, report: &StepReport) {
        let _ = report;
    }

    /// Training is over.
    fn finish(&mut self, summary: &Summary) {
        let _ = summary;
    }
}

/// A [`Progress`] that tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {}

/// How training went since the last report.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport<'a> {
    /// Iterations done since the run began.
    pub iteration: u64,
    /// Iterations of the whole run.
    pub of: u64,
    /// Mean of each loss over the batches that had it.
    pub losses: &'a [(String, f64)],
    /// [`Trainable::score`] after the last iteration, where it was asked for.
    pub score: Option<f64>,
    /// Learning rate of the last iteration, before multiplication for single parameters.
    pub lr: f64,
    /// Mean norm of the gradient of all parameters, before clipping.
    pub grad_norm: f64,
    /// Samples trained on per second.
    pub images_per_second: f64,
    /// What is left at the speed so far, or until the time limit.
    pub eta: Duration,
    /// Time trained since the run began, without interruptions.
    pub elapsed: Duration,
    /// The most memory that the process had at once so far, in MiB; none where the system does not tell it.
    pub peak_memory_mib: Option<u64>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Iterations done since the run began.
    pub iterations: u64,
    /// Optimizer steps since the run began.
    pub optimizer_steps: u64,
    /// Whether the time limit ended it before the configured number of iterations.
    pub out_of_time: bool,
    /// Whether it was asked to stop before that.
    pub stopped: bool,
    /// Mean of each loss in the last report.
    pub losses: Vec<(String, f64)>,
    /// Samples trained on per second since training was started or resumed.
    pub images_per_second: f64,
    /// Time trained since the run began, without interruptions.
    pub elapsed: Duration,
    /// The most memory that the process had at once so far, in MiB; none where the system does not tell it.
    pub peak_memory_mib: Option<u64>,
}
