//! Memory stays flat, however many records there are and however many are drawn.

mod shard_files;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::Arc;

use peak_alloc::PeakAlloc;
use xvlm_data::{Need, Order};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

#[test]
fn a_million_records_take_a_few_megabytes() {
    const RECORDS: u64 = 1_000_000;
    /// 13 bytes a record for the index and 4 for each of the two orders kept, one more being drawn and one being copied;
    /// what is left is for the vectors that grow while the index is made.
    const BOUND: usize = 32 << 20;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("many.jsonl");
    let mut out = BufWriter::new(File::create(&path).unwrap());
    let text = "a long text that is not to be kept in memory ".repeat(3);
    for n in 0..RECORDS {
        writeln!(out, "{{\"image_rpath\": \"images/{n}.jpg\", \"caption\": \"{text}{n}\"}}").unwrap();
    }
    out.flush().unwrap();
    drop(out);
    assert!(path.metadata().unwrap().len() > 4 * BOUND as u64);

    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let order = Order::new(Arc::new(shard_files::open(&path).unwrap()), Need::Captions, 1).unwrap();
    assert_eq!(order.len(), Some(RECORDS));
    let draw = |start: u64| {
        let numbers = (start..start + 40_000).map(|position| shard_files::number(&order.record(position).unwrap()));
        let mut numbers: Vec<usize> = numbers.collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 40_000);
    };
    draw(0);
    draw(RECORDS);
    let peak = MEMORY.peak_usage() - before;
    assert!(peak < BOUND, "{peak} bytes");
    for epoch in 2..5 {
        draw(epoch * RECORDS + 500_000);
    }
    let later = MEMORY.peak_usage() - before;
    assert!(later <= peak + (5 << 20), "{peak} bytes, and later {later}");
}
