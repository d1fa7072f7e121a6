//! The loader gives the same in the same order whatever its workers do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

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
