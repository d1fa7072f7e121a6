//! The order of records: each once an epoch whatever the numbers, and the same whoever asks, and when.

mod shard_files;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use shard_files::{gzip, lines, number, open_with};
use tempfile::TempDir;
use xvlm_data::{
    DataError, Dataset, DatasetConfig, ImageSource, Need, Order, Origin, Place, Record, SourceConfig, StorageOptions,
};

/// A folder of shards of so many records each, numbered through.
fn shards(sizes: &[usize], compressed: bool) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut first = 0;
    for (shard, size) in sizes.iter().enumerate() {
        let text = lines(first..first + size);
        let content = if compressed { gzip(text.as_bytes()) } else { text.into_bytes() };
        fs::write(folder.path().join(format!("{shard:05}")), content).unwrap();
        first += size;
    }
    folder
}

fn dataset(folder: &Path, window: Option<usize>) -> Arc<Dataset> {
    let config = DatasetConfig { window, ..DatasetConfig::default() };
    Arc::new(open_with(SourceConfig::files([folder.to_str().unwrap()]), &config).unwrap())
}

fn drawn(order: &Order, positions: std::ops::Range<u64>) -> Vec<usize> {
    positions.map(|position| number(&order.record(position).unwrap())).collect()
}

fn sorted(mut numbers: Vec<usize>) -> Vec<usize> {
    numbers.sort_unstable();
    numbers
}

/// What the processes draw in each of the first epochs, if they share a common order.
fn shared_epochs(orders: &[Order], total: usize, epochs: usize) -> Vec<Vec<usize>> {
    let ranks = orders.len();
    (0..epochs)
        .map(|epoch| {
            let positions = epoch * total..(epoch + 1) * total;
            positions.map(|p| number(&orders[p % ranks].record((p / ranks) as u64).unwrap())).collect()
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_record_is_drawn_once_an_epoch(
        sizes in proptest::collection::vec(0usize..9, 1..8),
        ranks in proptest::sample::select(vec![1usize, 2, 3, 5]),
        window in proptest::option::of(1usize..4),
        compressed: bool,
        seed: u64,
    ) {
        let total: usize = sizes.iter().sum();
        prop_assume!(total > 0);
        let folder = shards(&sizes, compressed);
        let dataset = dataset(folder.path(), window);
        let all: Vec<usize> = (0..total).collect();
        let orders: Vec<Order> = (0..ranks)
            .map(|rank| Order::new(Arc::clone(&dataset), Need::Captions, seed).unwrap().for_rank(rank, ranks))
            .collect();
        if compressed && sizes.len() >= ranks && ranks > 1 {
            // Each process has every `ranks`-th shard, and goes through it at its own pace.
            for epoch in 0..3 {
                let mut union = Vec::new();
                for (rank, order) in orders.iter().enumerate() {
                    let own: usize = sizes.iter().skip(rank).step_by(ranks).sum();
                    if own == 0 {
                        let nothing = matches!(order.record(0), Err(DataError::Config { .. }));
                        prop_assert!(nothing);
                        continue;
                    }
                    union.extend(drawn(order, (epoch * own) as u64..((epoch + 1) * own) as u64));
                }
                prop_assert_eq!(sorted(union), all.clone());
            }
        } else {
            for epoch in shared_epochs(&orders, total, 3) {
                prop_assert_eq!(sorted(epoch), all.clone());
            }
        }
        prop_assert_eq!(dataset.count(Need::Captions), Some(total as u64));
    }

    #[test]
    fn a_position_says_all(
        sizes in proptest::collection::vec(1usize..9, 1..8),
        window in proptest::option::of(1usize..4),
        compressed: bool,
        seed: u64,
        start in 0u64..200,
    ) {
        let folder = shards(&sizes, compressed);
        let order = || Order::new(dataset(folder.path(), window), Need::Captions, seed).unwrap();
        let expected = drawn(&order(), 0..220);
        // One that is new goes on where it is told; several threads that are not in step get the same.
        prop_assert_eq!(drawn(&order(), start..start + 20), &expected[start as usize..start as usize + 20]);
        let shared = order();
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (shared, expected) = (&shared, &expected);
                scope.spawn(move || {
                    for position in (0..220).map(|i| (i * 37 + thread * 71) % 220) {
                        assert_eq!(number(&shared.record(position).unwrap()), expected[position as usize]);
                    }
                });
            }
        });
    }
}

#[test]
fn epochs_and_seeds_differ() {
    let folder = shards(&[50, 50], false);
    let dataset = dataset(folder.path(), None);
    let order = |seed| Order::new(Arc::clone(&dataset), Need::Captions, seed).unwrap();
    let (first, second, other) = (drawn(&order(1), 0..100), drawn(&order(1), 100..200), drawn(&order(2), 0..100));
    assert!(first != second && first != other);
    // Without a window that says otherwise, the records of all shards are mixed.
    let from_first = first[..50].iter().filter(|&&record| record < 50).count();
    assert!((10..40).contains(&from_first), "{from_first}");
}

#[test]
fn a_window_is_finished_before_the_next() {
    let folder = shards(&[10; 9], false);
    let order = Order::new(dataset(folder.path(), Some(2)), Need::Captions, 3).unwrap();
    let epoch = drawn(&order, 0..90);
    let mut windows = Vec::new();
    for window in epoch.chunks(20) {
        let mut shards: Vec<usize> = window.iter().map(|record| record / 10).collect();
        assert!(shards.windows(2).any(|pair| pair[0] != pair[1]) || window.len() == 10, "not mixed: {window:?}");
        shards.sort_unstable();
        shards.dedup();
        assert_eq!(shards.len(), window.len() / 10, "{window:?}");
        windows.extend(shards);
    }
    assert!(!windows.is_sorted(), "{windows:?}");
    let next: Vec<usize> = drawn(&order, 90..180).iter().map(|record| record / 10).collect();
    assert_ne!(next, epoch.iter().map(|record| record / 10).collect::<Vec<_>>());
}

#[test]
fn only_records_that_have_what_is_needed_take_part() {
    let record = |n: usize| Record {
        image: ImageSource::Bytes(Arc::default()),
        captions: n.is_multiple_of(2).then(|| format!("text {n}")).into_iter().collect(),
        elems: Vec::new(),
        questions: n.is_multiple_of(3).then(|| (format!("q {n}"), "a".to_owned())).into_iter().collect(),
        origin: Origin { file: Path::new("memory").into(), place: Place::Item(n) },
    };
    let dataset = Arc::new(Dataset::from_records((0..30).map(record).collect()));
    let order = |need| Order::new(Arc::clone(&dataset), need, 5).unwrap();
    let captions = order(Need::Captions);
    assert_eq!(captions.len(), Some(15));
    assert_eq!(sorted(drawn(&captions, 0..15)), (0..30).step_by(2).collect::<Vec<_>>());
    let questions = order(Need::Questions);
    let mut places: Vec<String> = (0..10).map(|p| questions.record(p).unwrap().origin.to_string()).collect();
    places.sort();
    places.dedup();
    assert_eq!(places.len(), 10);
    let elems = order(Need::Elems);
    assert!(elems.is_empty());
    assert!(elems.record(0).unwrap_err().to_string().contains("at least one with elems"));
}

#[test]
fn sources_are_mixed_by_their_weights() {
    let folders = [shards(&[40, 30], false), shards(&[25], false), shards(&[10; 6], true)];
    let weights = [0.7, 0.25, 0.05];
    let sources: Vec<SourceConfig> = folders
        .iter()
        .zip(weights)
        .map(|(folder, weight)| {
            let files = SourceConfig::files([folder.path().to_str().unwrap()]);
            SourceConfig { weight: Some(weight), ..files }
        })
        .collect();
    let dataset = Arc::new(Dataset::open(&sources, &DatasetConfig::default(), &StorageOptions::default()).unwrap());
    for ranks in [1, 2, 3] {
        // `[source][record]`: how often it was drawn.
        let mut counts: [BTreeMap<usize, usize>; 3] = Default::default();
        let per_rank = 3000;
        for rank in 0..ranks {
            let order = Order::new(Arc::clone(&dataset), Need::Captions, 11).unwrap().for_rank(rank, ranks);
            let mut own = [0usize; 3];
            for position in 0..per_rank {
                let record = order.record(position).unwrap();
                let source = folders.iter().position(|folder| record.origin.file.starts_with(folder.path())).unwrap();
                own[source] += 1;
                *counts[source].entry(number(&record)).or_default() += 1;
                if position % 256 == 255 {
                    for (count, weight) in own.iter().zip(weights) {
                        let expected = weight * (position + 1) as f64;
                        assert!((*count as f64 - expected).abs() <= 3.0, "{position}: {own:?}");
                    }
                }
            }
        }
        for (source, (counts, size)) in counts.iter().zip([70, 25, 60]).enumerate() {
            assert_eq!(counts.len(), size, "source {source} of {ranks} ranks: all of its records are drawn");
            let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
            // Within a source no record is drawn again before the others: processes may be an epoch apart at most.
            assert!(most - least <= ranks, "source {source} of {ranks} ranks: {least} to {most}");
        }
    }
    // Resuming goes on with the very next record.
    let order = || Order::new(Arc::clone(&dataset), Need::Captions, 11).unwrap();
    assert_eq!(drawn(&order(), 70_000..70_300), drawn(&order(), 69_900..70_300)[100..]);
}

#[test]
fn a_shard_is_fetched_by_its_own_process_only() {
    let folder = shards(&[5; 8], true);
    let dataset = dataset(folder.path(), Some(2));
    let order = Order::new(Arc::clone(&dataset), Need::Captions, 1).unwrap().for_rank(1, 4);
    let own = sorted(drawn(&order, 0..10));
    assert_eq!(own, [5, 6, 7, 8, 9, 25, 26, 27, 28, 29]);
    assert_eq!((dataset.found(), dataset.count(Need::Captions)), (10, None));
}

#[test]
fn a_list_of_single_shards_is_dealt_out_too() {
    let folder = shards(&[5; 8], true);
    let files: Vec<String> =
        (0..8).map(|shard| folder.path().join(format!("{shard:05}")).display().to_string()).collect();
    let sources: Vec<SourceConfig> = files[4..].iter().map(|file| SourceConfig::files([file])).collect();
    let sources = [vec![SourceConfig::files(&files[..4])], sources].concat();
    let dataset = Arc::new(Dataset::open(&sources, &DatasetConfig::default(), &StorageOptions::default()).unwrap());
    let order = Order::new(Arc::clone(&dataset), Need::Captions, 1).unwrap().for_rank(1, 4);
    assert_eq!(sorted(drawn(&order, 0..10)), [5, 6, 7, 8, 9, 25, 26, 27, 28, 29]);
    assert_eq!(dataset.found(), 10);
}
