//! Building batches ahead of the training loop, on threads, without giving up determinism.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::DataError;

/// How far and by how many threads to work ahead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoaderConfig {
    /// Number of threads; 0 counts as 1. Default 2.
    pub workers: usize,
    /// Most batches being built or waiting; 0 counts as 1. Default 4.
    pub ahead: usize,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        Self { workers: 2, ahead: 4 }
    }
}

/// An endless supply of `build(step)`, `build(step + 1)`, …: always in this order, whichever worker is
/// done first. Errors take their batch's place; a panic of `build` becomes
/// [`DataError::WorkerPanic`]. Dropping it stops the workers after the batches they are at.
#[derive(Debug)]
pub struct Loader<T> {
    shared: Arc<Shared<T>>,
    workers: Vec<JoinHandle<()>>,
    waited: Duration,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    ahead: u64,
}

#[derive(Debug)]
struct State<T> {
    /// The step the consumer gets next.
    due: u64,
    /// The step the next free worker takes.
    next: u64,
    ready: BTreeMap<u64, Result<T, DataError>>,
    /// How many threads there are to build what is not ready.
    workers: usize,
    stopped: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing panics while the lock is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while<'a>(
        &'a self,
        state: MutexGuard<'a, State<T>>,
        condition: impl FnMut(&mut State<T>) -> bool,
    ) -> MutexGuard<'a, State<T>> {
        let waited = self.changed.wait_while(state, condition);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, build: &(impl Fn(u64) -> Result<T, DataError> + ?Sized)) {
        loop {
            let too_far = |state: &mut State<T>| !state.stopped && state.next >= state.due.saturating_add(self.ahead);
            let mut state = self.wait_while(self.lock(), too_far);
            if state.stopped {
                return;
            }
            let step = state.next;
            state.next += 1;
            drop(state);
            // What a panic carries is dropped when the consumer has its message: that may panic, too, and end this thread.
            let (built, _panic) = match catch_unwind(AssertUnwindSafe(|| build(step))) {
                Ok(built) => (built, None),
                Err(panic) => {
                    let message = panic_message(&*panic);
                    (Err(DataError::WorkerPanic { step, message }), Some(panic))
                }
            };
            self.lock().ready.insert(step, built);
            self.changed.notify_all();
        }
    }
}

/// A worker that is there.
struct Working<'a, T>(&'a Shared<T>);

impl<T> Drop for Working<'_, T> {
    fn drop(&mut self) {
        self.0.lock().workers -= 1;
        self.0.changed.notify_all();
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "of no text".to_owned())
}

impl<T: Send + 'static> Loader<T> {
    /// Starts with step 0; see [`Self::starting_at`].
    ///
    /// # Errors
    ///
    /// See [`Self::starting_at`].
    pub fn new(
        config: LoaderConfig,
        build: impl Fn(u64) -> Result<T, DataError> + Send + Sync + 'static,
    ) -> Result<Self, DataError> {
        Self::starting_at(0, config, build)
    }

    /// Starts with `step`. `build` must depend on its argument alone, as
    /// [`BatchBuilder`](crate::BatchBuilder)'s batches do; then a run resumed at a step sees what an
    /// uninterrupted one would have seen.
    ///
    /// # Errors
    ///
    /// [`DataError::Thread`] when the system starts no thread.
    pub fn starting_at(
        step: u64,
        config: LoaderConfig,
        build: impl Fn(u64) -> Result<T, DataError> + Send + Sync + 'static,
    ) -> Result<Self, DataError> {
        let state = State { due: step, next: step, ready: BTreeMap::new(), workers: 0, stopped: false };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), ahead: config.ahead.max(1) as u64 });
        let build = Arc::new(build);
        // Made first: dropped on an error, it stops the workers that did start.
        let mut loader = Self { shared, workers: Vec::new(), waited: Duration::ZERO };
        for worker in 0..config.workers.max(1) {
            let (shared, build) = (Arc::clone(&loader.shared), Arc::clone(&build));
            let thread = std::thread::Builder::new().name(format!("loader {worker}"));
            loader.shared.lock().workers += 1;
            let handle = thread.spawn(move || {
                let _working = Working(&*shared);
                shared.work(&*build);
            });
            loader.workers.push(handle.map_err(DataError::Thread)?);
        }
        Ok(loader)
    }
}

impl<T> Loader<T> {
    /// The next step's batch; waits until it is built.
    ///
    /// # Errors
    ///
    /// What building it led to, or [`DataError::WorkerPanic`]; the step after it comes next. If no worker is left, the same
    /// error for each step.
    #[expect(
        clippy::should_implement_trait,
        reason = "there is always a next one, so an iterator's Option would say nothing"
    )]
    pub fn next(&mut self) -> Result<T, DataError> {
        let mut state = self.shared.lock();
        loop {
            let due = state.due;
            if let Some(built) = state.ready.remove(&due) {
                state.due += 1;
                drop(state);
                self.shared.changed.notify_all();
                return built;
            }
            if state.workers == 0 {
                let message = "the threads of all workers have ended".to_owned();
                return Err(DataError::WorkerPanic { step: due, message });
            }
            let start = Instant::now();
            state = self.shared.wait_while(state, |state| !state.ready.contains_key(&due) && state.workers > 0);
            self.waited += start.elapsed();
        }
    }

    /// How long [`Self::next`] has waited in all for batches that were not built yet: what a training loop loses to its data.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

/// Waits for the batches that are being built. Where one needs a shard of a store that does not answer, that takes as long as
/// [`StorageOptions`](crate::StorageOptions) let it be asked.
impl<T> Drop for Loader<T> {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            // If it panicked, the consumer was told.
            let _ = worker.join();
        }
    }
}
