//! Ranks that are threads of one process.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Tensor};

use super::Communicator;
use crate::error::TrainError;

/// One of several threads that train together: for tests of what runs on several ranks.
///
/// A rank whose handle is dropped has left: those who wait for it get an error.
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What each rank gives in this round.
    given: Vec<Option<Tensor>>,
    /// How many have seen what all gave.
    seen: usize,
    left: BTreeSet<usize>,
}

impl Threads {
    /// A handle for each of `size` ranks, to be moved to a thread of its own.
    pub fn new(size: usize) -> Vec<Self> {
        let state = State { given: vec![None; size], seen: 0, left: BTreeSet::new() };
        let shared = Arc::new(Shared { size, state: Mutex::new(state), changed: Condvar::new() });
        (0..size).map(|rank| Self { rank, shared: Arc::clone(&shared) }).collect()
    }

    /// What all ranks give, in their order.
    fn exchange(&self, operation: &'static str, tensor: &Tensor) -> Result<Vec<Tensor>, TrainError> {
        let Shared { size, changed, .. } = &*self.shared;
        // A copy: its owner may change the numbers of a variable before the last rank has looked.
        let own = tensor.copy().map_err(TrainError::tensor(operation))?.detach();
        let mut state = self.lock();
        while state.given[self.rank].is_some() {
            state = wait(changed, state);
        }
        state.given[self.rank] = Some(own);
        changed.notify_all();
        while state.given.iter().any(Option::is_none) {
            if let Some(left) = state.left.iter().find(|rank| state.given[**rank].is_none()) {
                let source = format!("rank {left} has left").into();
                return Err(TrainError::Ranks { rank: self.rank, operation, source });
            }
            state = wait(changed, state);
        }
        let all = state.given.iter().flatten().cloned().collect();
        state.seen += 1;
        if state.seen == *size {
            (state.seen, state.given) = (0, vec![None; *size]);
            changed.notify_all();
        }
        Ok(all)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait<'a>(changed: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    changed.wait(state).unwrap_or_else(PoisonError::into_inner)
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor, TrainError> {
        let all = self.exchange("all-reduce", tensor)?;
        let narrow = matches!(tensor.dtype(), DType::BF16 | DType::F16);
        let dtype = if narrow { DType::F32 } else { tensor.dtype() };
        let sum = || {
            let sum = Tensor::zeros(tensor.shape(), dtype, tensor.device())?;
            all.iter().try_fold(sum, |sum, one| sum + one.to_dtype(dtype)?)?.to_dtype(tensor.dtype())
        };
        sum().map_err(TrainError::tensor("all-reduce"))
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, TrainError> {
        let all = self.exchange("all-gather", tensor)?;
        Tensor::cat(&all, 0).map_err(TrainError::tensor("all-gather"))
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Tensor, TrainError> {
        Ok(self.exchange("broadcast", tensor)?.swap_remove(root))
    }

    fn barrier(&self) -> Result<(), TrainError> {
        let nothing = Tensor::zeros((), DType::U8, &candle_core::Device::Cpu).map_err(TrainError::tensor("barrier"))?;
        self.exchange("barrier", &nothing).map(drop)
    }

    /// Ends this thread, by a panic without a message; the others get errors.
    fn abort(&self, code: i32) -> ! {
        self.leave();
        std::panic::resume_unwind(Box::new(code))
    }
}

impl Threads {
    fn leave(&self) {
        self.lock().left.insert(self.rank);
        self.shared.changed.notify_all();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.leave();
    }
}
