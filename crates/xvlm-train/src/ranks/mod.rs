//! Several processes that train one model, each a *rank* with batches of its own.
//!
//! [`connect`] finds the others, by what the program that started this process left in its environment
//! ([`Launch`]). What they tell each other goes through a [`Communicator`]; [`Gather`] is how a loss sees the samples of
//! all.

mod gather;
mod launch;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
#[cfg(any(feature = "mpi", feature = "nccl"))]
mod owner;
mod reduce;
#[cfg(any(feature = "nccl", test))]
mod rendezvous;
mod share;
mod threads;

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::error::TrainError;

pub use gather::Gather;
pub use launch::{Engine, Launch, local_rank};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use share::compare;
pub use threads::Threads;

pub(crate) use reduce::Reducer;
pub(crate) use share::{agree, check_alike, merge, share};

/// What ranks tell each other. Every rank calls the same methods in the same order, with tensors of the same shape and type;
/// each call returns when this rank's part is done.
///
/// Tensors may lie on any device the communicator knows; results lie where the tensor did, and have no gradient. Numbers of
/// `bf16` and `f16` are added in `f32`.
///
/// After an error the others may be waiting for this rank: [`Self::abort`] is what ends them.
pub trait Communicator: Send + Sync {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn size(&self) -> usize;

    /// The sum of every rank's tensor, number by number; the same bits on all ranks.
    ///
    /// # Errors
    /// [`TrainError::Ranks`] if a rank does not answer, or the tensor is of a type that cannot be sent.
    fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor, TrainError>;

    /// The tensors of all ranks, joined along the first dimension in the order of ranks: `[N, ..]` → `[size·N, ..]`.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, TrainError>;

    /// The tensor of rank `root`; the others give one of the same shape and type.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Tensor, TrainError>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    fn barrier(&self) -> Result<(), TrainError>;

    /// Ends the processes of all ranks: for a rank that cannot go on while others wait for it.
    fn abort(&self, code: i32) -> !;
}

/// One process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor, TrainError> {
        Ok(tensor.clone())
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, TrainError> {
        Ok(tensor.clone())
    }

    fn broadcast(&self, tensor: &Tensor, _root: usize) -> Result<Tensor, TrainError> {
        Ok(tensor.clone())
    }

    fn barrier(&self) -> Result<(), TrainError> {
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

/// Joins the processes that were started together; waits until all are there. `device` is where this one computes.
///
/// # Errors
/// [`TrainError::Environment`] if this build does not have the engine, or the environment does not say who takes part;
/// [`TrainError::Ranks`] if the others are not found.
pub fn connect(engine: Engine, device: &Device) -> Result<Arc<dyn Communicator>, TrainError> {
    let _ = device;
    match engine {
        Engine::Alone => Ok(Arc::new(Alone)),
        #[cfg(feature = "mpi")]
        Engine::Mpi => Ok(Arc::new(Mpi::start()?)),
        #[cfg(feature = "nccl")]
        Engine::Nccl => Ok(Arc::new(Nccl::start(device)?)),
        #[allow(unreachable_patterns, reason = "a build with all features has all engines")]
        other => Err(launch::lacks(other)),
    }
}

/// The sum over all ranks of a few numbers of the host.
///
/// # Errors
/// As [`Communicator::all_reduce`].
pub fn sum<const N: usize>(ranks: &dyn Communicator, numbers: [f64; N]) -> Result<[f64; N], TrainError> {
    if ranks.size() == 1 {
        return Ok(numbers);
    }
    let failed = TrainError::tensor("numbers of all ranks");
    let summed = ranks.all_reduce(&Tensor::new(&numbers, &Device::Cpu).map_err(failed)?)?;
    let summed = summed.to_vec1::<f64>().map_err(TrainError::tensor("numbers of all ranks"))?;
    Ok(std::array::from_fn(|i| summed[i]))
}
