//! A thread that owns what may not leave it.

use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use crate::error::BoxError;

type Job<T> = Box<dyn FnOnce(&T) + Send>;

/// A thread that makes a `T`, keeps it, and does with it what the others ask for: one thing after another, in the order in
/// which they ask. So no two calls into a library ever overlap, and all come from the thread that initialised it.
pub(super) struct Owner<T> {
    jobs: Option<Sender<Job<T>>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: 'static> Owner<T> {
    /// Starts the thread; returns when `make` is done.
    pub(super) fn start(make: impl FnOnce() -> Result<T, BoxError> + Send + 'static) -> Result<Self, BoxError> {
        let (jobs, asked) = mpsc::channel::<Job<T>>();
        let (made, whether_made) = mpsc::channel();
        let work = move || {
            let owned = match make() {
                Ok(owned) => owned,
                Err(error) => {
                    let _ = made.send(Err(error));
                    return;
                }
            };
            let _ = made.send(Ok(()));
            asked.into_iter().for_each(|job| job(&owned));
        };
        let thread = thread::Builder::new().name("ranks".to_owned()).spawn(work)?;
        whether_made.recv().map_err(|_| ended())??;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// What `work` makes of it.
    pub(super) fn ask<R: Send + 'static>(&self, work: impl FnOnce(&T) -> R + Send + 'static) -> Result<R, BoxError> {
        let (answer, answered) = mpsc::channel();
        self.post(Box::new(move |owned| {
            let _ = answer.send(work(owned));
        }))?;
        Ok(answered.recv().map_err(|_| ended())?)
    }

    /// Lets `end`, which ends the process, run; ends it with `code` if that does not happen soon, because the thread is
    /// waiting for other ranks. What started them then ends those.
    #[cfg(feature = "mpi")]
    pub(super) fn end(&self, code: i32, end: impl FnOnce(&T) + Send + 'static) -> ! {
        if self.post(Box::new(end)).is_ok() {
            thread::sleep(std::time::Duration::from_secs(2));
        }
        std::process::exit(code)
    }

    fn post(&self, job: Job<T>) -> Result<(), BoxError> {
        let jobs = self.jobs.as_ref().ok_or_else(ended)?;
        Ok(jobs.send(job).map_err(|_| ended())?)
    }
}

fn ended() -> &'static str {
    "the thread that talks to other ranks has ended"
}

impl<T> Drop for Owner<T> {
    fn drop(&mut self) {
        self.jobs = None;
        // A process that panics does not wait for the others, who do not know; its end tells what started them.
        if let Some(thread) = self.thread.take().filter(|_| !thread::panicking()) {
            let _ = thread.join();
        }
    }
}
