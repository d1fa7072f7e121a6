//! The loader gives the same in the same order whatever its workers do.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::time::{Duration, Instant};

use xvlm_data::{DataError, Loader, LoaderConfig};

/// Work that takes a while, more or less at random.
fn build(step: u64) -> Result<u64, DataError> {
    std::thread::sleep(Duration::from_micros(step.wrapping_mul(7919) % 700));
    Ok(step * step)
}

fn config(workers: usize, ahead: usize) -> LoaderConfig {
    LoaderConfig { workers, ahead }
}

#[test]
fn order_does_not_depend_on_workers() {
    for (workers, ahead) in [(0, 0), (1, 1), (1, 4), (3, 2), (3, 8)] {
        let mut loader = Loader::new(config(workers, ahead), build).unwrap();
        for step in 0..60 {
            assert_eq!(loader.next().unwrap(), step * step);
        }
    }
}

#[test]
fn it_goes_on_where_it_should() {
    let mut loader = Loader::starting_at(40, config(2, 3), build).unwrap();
    for step in 40..60 {
        assert_eq!(loader.next().unwrap(), step * step);
    }
}

#[test]
fn it_works_no_further_ahead_than_told() {
    let furthest = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&furthest);
    let build = move |step| {
        seen.fetch_max(step, Ordering::SeqCst);
        Ok(step)
    };
    let mut loader = Loader::new(config(3, 4), build).unwrap();
    for step in 0..20 {
        std::thread::sleep(Duration::from_millis(2));
        assert!(furthest.load(Ordering::SeqCst) < step + 4);
        assert_eq!(loader.next().unwrap(), step);
    }
}

#[test]
fn errors_and_panics_keep_their_place() {
    let build = |step: u64| match step {
        3 => Err(DataError::EmptyText { text: "three".to_owned() }),
        5 => panic!("five is {}", "too much"),
        _ => Ok(step),
    };
    let mut loader = Loader::new(config(2, 4), build).unwrap();
    for step in 0..8 {
        match (step, loader.next()) {
            (3, Err(DataError::EmptyText { text })) => assert_eq!(text, "three"),
            (5, Err(DataError::WorkerPanic { step, message })) => {
                assert_eq!((step, message.as_str()), (5, "five is too much"));
            }
            (_, Ok(found)) => assert_eq!(found, step),
            (_, found) => panic!("step {step}: {found:?}"),
        }
    }
}

#[test]
fn dropping_it_ends_its_workers() {
    struct Counted(Arc<AtomicUsize>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let dropped = Arc::new(AtomicUsize::new(0));
    let guard = Counted(Arc::clone(&dropped));
    let build = move |step| {
        let _ = &guard;
        build(step)
    };
    let mut loader = Loader::new(config(3, 6), build).unwrap();
    loader.next().unwrap();
    drop(loader);
    assert_eq!(dropped.load(Ordering::SeqCst), 1, "no thread holds the closure any more");
}

/// Long enough for a thread to do what it should not.
const PAUSE: Duration = Duration::from_millis(60);
/// Longer than anything here takes, even on a busy machine.
const FOREVER: Duration = Duration::from_secs(60);

/// Runs it on a thread of its own, and fails if it hangs.
fn in_time<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || done.send(run()));
    result.recv_timeout(FOREVER).expect("it should end")
}

fn wait_while(condition: impl Fn() -> bool) {
    while condition() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn workers_that_are_gone_are_not_waited_for() {
    /// What a panic carries, and what ends the thread that drops it.
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            if !std::thread::panicking() {
                panic!("a panic after the panic");
            }
        }
    }
    for workers in [1, 2] {
        let build = move |step: u64| match step {
            0 => Ok(step),
            _ => std::panic::panic_any(Bomb),
        };
        let mut loader = Loader::new(config(workers, 4), build).unwrap();
        in_time(move || {
            assert_eq!(loader.next().unwrap(), 0);
            for expected in 1..6 {
                match loader.next() {
                    Err(DataError::WorkerPanic { step, .. }) => assert!(step <= expected),
                    found => panic!("step {expected}: {found:?}"),
                }
            }
            let last = loader.next().unwrap_err().to_string();
            assert!(last.ends_with("found a panic: the threads of all workers have ended"), "{last}");
        });
    }
}

#[test]
fn workers_rest_while_nothing_is_taken() {
    let (built, dropped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    struct Batch(Arc<AtomicUsize>);
    impl Drop for Batch {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let (count, drops) = (Arc::clone(&built), Arc::clone(&dropped));
    let build = move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok(Batch(Arc::clone(&drops)))
    };
    let mut loader = Loader::new(config(3, 5), build).unwrap();
    for taken in 0..4 {
        let counted = Arc::clone(&built);
        in_time(move || wait_while(|| counted.load(Ordering::SeqCst) < taken + 5));
        std::thread::sleep(PAUSE);
        assert_eq!(built.load(Ordering::SeqCst), taken + 5, "five wait, and no more are built until one is taken");
        drop(loader.next().unwrap());
    }
    in_time(|| drop(loader));
    assert_eq!(dropped.load(Ordering::SeqCst), built.load(Ordering::SeqCst), "what nobody took is freed");
}

#[test]
fn errors_lose_no_batch_after_them() {
    for (workers, ahead) in [(1, 1), (1, 4), (3, 2), (4, 8)] {
        let build = |step: u64| match step % 5 {
            1 => Err(DataError::EmptyText { text: step.to_string() }),
            3 => panic!("{step}"),
            _ => build(step),
        };
        let mut loader = Loader::new(config(workers, ahead), build).unwrap();
        in_time(move || {
            for step in 0..100 {
                match (step % 5, loader.next()) {
                    (1, Err(DataError::EmptyText { text })) => assert_eq!(text, step.to_string()),
                    (3, Err(DataError::WorkerPanic { step: found, .. })) => assert_eq!(found, step),
                    (_, Ok(found)) => assert_eq!(found, step * step),
                    (_, found) => panic!("step {step}: {found:?}"),
                }
            }
        });
    }
}

#[test]
fn it_ends_at_any_moment() {
    // While all workers wait for room: nothing was ever taken.
    let loader = Loader::new(config(4, 2), build).unwrap();
    std::thread::sleep(PAUSE);
    in_time(|| drop(loader));
    // At once, while workers start; and after a few batches.
    for taken in 0..20 {
        let mut loader = Loader::new(config(3, 3), build).unwrap();
        in_time(move || (0..taken).for_each(|step| assert_eq!(loader.next().unwrap(), step * step)));
    }
    // While a worker is at a batch: it is finished, and none is begun after it.
    let (inside, go_on) = (Arc::new(Barrier::new(2)), Arc::new(AtomicBool::new(false)));
    let begun = Arc::new(AtomicUsize::new(0));
    let (at, free, count) = (Arc::clone(&inside), Arc::clone(&go_on), Arc::clone(&begun));
    let build = move |step: u64| {
        count.fetch_add(1, Ordering::SeqCst);
        if step == 0 {
            at.wait();
            wait_while(|| !free.load(Ordering::SeqCst));
        }
        Ok(step)
    };
    let loader = Loader::new(config(1, 4), build).unwrap();
    inside.wait();
    let ending = std::thread::spawn(move || in_time(|| drop(loader)));
    std::thread::sleep(PAUSE);
    assert!(!ending.is_finished(), "the batch that is being built is waited for");
    go_on.store(true, Ordering::SeqCst);
    ending.join().unwrap();
    assert_eq!(begun.load(Ordering::SeqCst), 1);
}

#[test]
fn it_tells_how_long_it_was_waited_for() {
    let slow = |step: u64| {
        std::thread::sleep(PAUSE);
        Ok(step)
    };
    let mut loader = Loader::new(config(1, 2), slow).unwrap();
    assert_eq!(loader.waited(), Duration::ZERO);
    let start = Instant::now();
    (0..3).for_each(|_| drop(loader.next()));
    let (waited, all) = (loader.waited(), start.elapsed());
    assert!(Duration::ZERO < waited && waited <= all, "{waited:?} of {all:?}");
    // Batches that lie ready cost nothing, unless the machine stops just then.
    let ready = |_| {
        let built = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&built);
        let build = move |step: u64| {
            count.fetch_add(1, Ordering::SeqCst);
            Ok(step)
        };
        let mut loader = Loader::new(config(2, 8), build).unwrap();
        in_time(move || wait_while(|| built.load(Ordering::SeqCst) < 8));
        std::thread::sleep(PAUSE);
        (0..8).for_each(|_| drop(loader.next()));
        loader.waited()
    };
    assert!((0..10).map(ready).any(|waited| waited < PAUSE));
}
