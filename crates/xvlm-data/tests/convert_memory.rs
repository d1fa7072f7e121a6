//! What a conversion holds in memory does not grow with its texts.

mod common;

use std::fmt::Write;

use common::Folder;
use peak_alloc::PeakAlloc;
use serde_json::Value;
use xvlm_data::annotations::Conceptual;
use xvlm_data::convert::{ConvertOptions, Form, Job, convert};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

#[test]
fn memory_is_some_bytes_an_image() {
    const ROWS: usize = 60_000;
    let folder = Folder::new();
    // All rows have one image: {row/…} is 0 for each.
    folder.image("images/0.png", 8, 8);
    let mut rows = String::new();
    for row in 0..ROWS {
        writeln!(rows, "http://example.org/{row}.jpg\tcaption number {row} {}", "of some length ".repeat(12)).unwrap();
    }
    let size = rows.len();
    let path = folder.write("cc12m.tsv", rows);
    let set = Conceptual {
        rows: path.clone(),
        images: folder.path("images"),
        names: "{row/1000000000}.png".parse().unwrap(),
    };
    let job = Job { name: "cc12m".to_owned(), inputs: vec![path], settings: Value::Null };
    let options = ConvertOptions {
        form: Form::JsonPaths,
        records_per_shard: 5000,
        shuffle: Some(3),
        workers: 2,
        ..ConvertOptions::new(folder.path("out"))
    };
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let manifest = convert(&job, || set.open(), &options, &mut ()).unwrap();
    assert_eq!(manifest.records(), ROWS as u64);
    let used = ALLOCATOR.peak_usage() - before;
    // Two buffers of a MiB, those of the workers, and 12 bytes an image, which a growing list may hold thrice for a moment.
    let most = (4 << 20) + 36 * ROWS;
    assert!(used < most && most < size, "{used} of {most} bytes, {size} in the file");
}
