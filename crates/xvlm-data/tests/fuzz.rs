//! Files that are damaged in every way do no harm: nothing panics, hangs, or takes memory on the word of a file.
//!
//! Each target changes valid files at random, from a fixed seed, for `XVLM_FUZZ_SECONDS` (default 1). A new target is a
//! test that calls [`fuzz`] with its name, valid files to begin with, and what is to survive.

mod shard_files;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shard_files::{gzip, img2dataset, lines, open_with, parquet, tar, visit, zstd};
use xvlm_data::annotations::Reading;
use xvlm_data::scenes::{self, Split, SynthOptions};
use xvlm_data::shards::index_shard;
use xvlm_data::{
    DatasetConfig, DecodeOptions, Encoded, Index, RecordKeys, Rect, ShardLimits, SourceConfig, TextTokenizer,
};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Longest time for one input, which takes a few milliseconds if nothing is wrong.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most memory for one input of some kilobytes: Zstandard's window may be 100 MB.
const MOST_BYTES: usize = 256 << 20;

/// Gives `run` the seeds, and then what becomes of them by random changes.
fn fuzz(name: &str, seeds: &[Vec<u8>], run: impl Fn(&[u8]) + Send + 'static) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let seconds = std::env::var("XVLM_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    let (send_input, inputs) = mpsc::channel::<Vec<u8>>();
    let (send_done, done) = mpsc::channel();
    std::thread::spawn(move || {
        for input in inputs {
            MEMORY.reset_peak_usage();
            let before = MEMORY.current_usage();
            let survived = catch_unwind(AssertUnwindSafe(|| run(&input))).is_ok();
            let taken = MEMORY.peak_usage().saturating_sub(before);
            if send_done.send((survived, taken)).is_err() {
                return;
            }
        }
    });
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut count = 0;
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    while count < seeds.len() || Instant::now() < end {
        let mut input = seeds[count % seeds.len()].clone();
        if count >= seeds.len() {
            for _ in 0..rng.random_range(1..=6) {
                change(&mut input, seeds, &mut rng);
            }
        }
        send_input.send(input.clone()).unwrap();
        let problem = match done.recv_timeout(PATIENCE) {
            Err(_) => Some(format!("takes longer than {PATIENCE:?}")),
            Ok((false, _)) => Some("panics".to_owned()),
            Ok((_, taken)) if taken > MOST_BYTES => Some(format!("takes {taken} bytes of memory")),
            Ok(_) => None,
        };
        if let Some(problem) = problem {
            let path = std::env::temp_dir().join(format!("xvlm-fuzz-{}-{count}", name.replace(' ', "-")));
            fs::write(&path, &input).unwrap();
            panic!("{name}, input {count}: {problem}; it is in {}", path.display());
        }
        count += 1;
    }
    assert!(count >= seeds.len());
}

/// One random change.
fn change(input: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) {
    const NUMBERS: [u64; 12] =
        [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 33, u64::MAX >> 1, u64::MAX];
    const TEXTS: [&[u8]; 10] =
        [b"NaN", b"1e999", b"-1", b"null", b"[[[[", b"{\"", b"\\u0000", b"../../", b"\n", b"\xff\xfe"];
    if input.is_empty() {
        input.push(rng.random());
        return;
    }
    let at = rng.random_range(0..input.len());
    let until = (at + rng.random_range(1..=64)).min(input.len());
    match rng.random_range(0..9) {
        0 => input[at] ^= 1 << rng.random_range(0..8),
        1 => input[at] = rng.random(),
        2 => input.truncate(at),
        3 => drop(input.drain(at..until)),
        4 => {
            let part = input[at..until].to_vec();
            let to = rng.random_range(0..=input.len());
            input.splice(to..to, part);
        }
        5 => {
            let number = NUMBERS.choose(rng).unwrap().to_le_bytes();
            let width = [1, 2, 4, 8].choose(rng).unwrap().min(&(input.len() - at)).to_owned();
            input[at..at + width].copy_from_slice(&number[..width]);
            if rng.random() {
                input[at..at + width].reverse();
            }
        }
        6 => drop(input.splice(at..at, TEXTS.choose(rng).unwrap().iter().copied())),
        7 => input[at..until].fill([0, b' ', 0xff, b'7'].choose(rng).copied().unwrap()),
        _ => {
            let other = seeds.choose(rng).unwrap();
            let from = rng.random_range(0..=other.len());
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
    }
}

/// A file of its own for a target.
struct Scratch {
    folder: tempfile::TempDir,
    name: String,
}

impl Scratch {
    fn new(name: &str) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), name: name.to_owned() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }
}

/// Reads all records of the input as a shard of this name.
fn reads_shard(name: &str) -> impl Fn(&[u8]) + Send + 'static {
    let scratch = Scratch::new(name);
    move |bytes| {
        fs::write(scratch.path(), bytes).unwrap();
        let limits = ShardLimits { max_spool_bytes: 1 << 24, max_record_bytes: 1 << 20, ..ShardLimits::default() };
        let config = DatasetConfig { limits, ..DatasetConfig::default() };
        if let Ok(dataset) = open_with(SourceConfig::files([scratch.path().to_str().unwrap()]), &config) {
            let (records, errors) = visit(&dataset);
            assert!(records.len() + errors.len() <= bytes.len().max(1 << 16));
            for error in errors {
                assert!(error.to_string().contains(scratch.path().to_str().unwrap()), "{error}");
                assert!(!error.reason().is_empty());
            }
        }
    }
}

fn json_seeds() -> Vec<Vec<u8>> {
    let rich = r#"{"image": "data:image/png;base64,aW1hZ2U=", "caption": ["one", "two"], "elems": [{"bb": [1, 2.5, 3e1, 4], "caption": "part",
        "attributes": ["red", "small"], "label": "thing"}], "questions": [["what?", "this"], {"question": "who?", "answer": ["me", "you"]}]}"#;
    let rich = rich.replace('\n', " ");
    vec![
        lines(0..5).into_bytes(),
        format!("{rich}\n\n{{\"image_rpath\": \"a/b.jpg\", \"caption\": \"x\\u00e4\"}}\n").into_bytes(),
    ]
}

fn tar_seeds() -> Vec<Vec<u8>> {
    let long = format!("{}/x.jpg", "folder".repeat(30));
    let plain = tar(&[
        ("0.jpg", b"image"),
        ("0.txt", b"text 0"),
        ("1.jpg", b"image"),
        ("1.json", b"{\"caption\": \"text 1\"}"),
    ]);
    let named = tar(&[(&long, b"image"), (&long.replace("jpg", "txt"), b"text 2")]);
    let mut pax = tar::Builder::new(Vec::new());
    pax.append_pax_extensions([("path", &b"long.jpg"[..]), ("size", b"5")]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(5);
    header.set_cksum();
    pax.append(&header, &b"image"[..]).unwrap();
    vec![plain, named, pax.into_inner().unwrap()]
}

#[test]
fn json_lines() {
    fuzz("json lines", &json_seeds(), reads_shard("a.jsonl"));
}

#[test]
fn archives() {
    // A header whose checksum is wrong is none; those that are right have to be tried too.
    let read = reads_shard("a.tar");
    fuzz("archives", &tar_seeds(), move |bytes| {
        read(bytes);
        let mut right = bytes.to_vec();
        for block in right.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
            let mut header = tar::Header::new_old();
            header.as_mut_bytes().copy_from_slice(block);
            header.set_cksum();
            block.copy_from_slice(header.as_bytes());
        }
        read(&right);
    });
}

#[test]
fn tables() {
    let schema = "message table {
        optional binary caption (UTF8); optional binary jpg; optional binary elems (UTF8); optional binary status (UTF8); }";
    let columns: Vec<Vec<Option<&[u8]>>> = vec![
        vec![Some(b"one"), None, Some(b"three")],
        vec![Some(b"image"), Some(b"image"), None],
        vec![Some(b"[{\"bb\": [0, 0, 1, 1], \"caption\": \"x\"}]"), None, None],
        vec![Some(b"success"), None, Some(b"failed")],
    ];
    let seeds = [
        parquet(schema, &columns, 2, parquet::basic::Compression::UNCOMPRESSED),
        img2dataset(0..20, 7),
        parquet(schema, &columns, 3, parquet::basic::Compression::GZIP(parquet::basic::GzipLevel::default())),
    ];
    fuzz("tables", &seeds, reads_shard("a.parquet"));
}

#[test]
fn gzip_files() {
    let seeds: Vec<_> = json_seeds().iter().chain(&tar_seeds()).map(|content| gzip(content)).collect();
    fuzz("gzip", &seeds, reads_shard("a.gz"));
}

#[test]
fn zstd_files() {
    let seeds: Vec<_> = json_seeds().iter().chain(&tar_seeds()).map(|content| zstd(content)).collect();
    fuzz("zstd", &seeds, reads_shard("a.zst"));
}

#[test]
fn index_files() {
    let scratch = Scratch::new("a.jsonl");
    fs::write(scratch.path(), format!("{}\nbroken\n{}", lines(0..3), lines(3..9))).unwrap();
    let index = index_shard(&scratch.path(), &RecordKeys::default(), &ShardLimits::default()).unwrap();
    index.write(&scratch.path()).unwrap();
    let mut seed = fs::read(Index::path_of(&scratch.path())).unwrap();
    // The checksum is made right each time, so that what is behind it is tried.
    seed.truncate(seed.len() - 4);
    fuzz("index files", &[seed], move |bytes| {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        fs::write(Index::path_of(&scratch.path()), [bytes, &crc.sum().to_le_bytes()].concat()).unwrap();
        if let Some(index) = Index::read(&scratch.path(), &RecordKeys::default()) {
            assert!(index.len() <= bytes.len());
        }
        let dataset = std::sync::Arc::new(shard_files::open(&scratch.path()).unwrap());
        let order = xvlm_data::Order::new(dataset, xvlm_data::Need::Captions, 1).unwrap();
        for position in 0..20 {
            if let Err(error) = order.record(position) {
                assert!(!error.to_string().is_empty());
            }
        }
    });
}

#[test]
fn image_files() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/decode.safetensors");
    let files = candle_core::safetensors::load(golden, &candle_core::Device::Cpu).unwrap();
    let mut files: Vec<_> = files.into_iter().filter(|(name, _)| name.starts_with("file.")).collect();
    files.sort_by(|(a, _), (b, _)| a.cmp(b));
    let seeds: Vec<Vec<u8>> = files.iter().map(|(_, file)| file.to_vec1().unwrap()).collect();
    fuzz("image files", &seeds, |bytes| {
        // More is refused by the header alone, which is no damage.
        let options = DecodeOptions { max_pixels: 1 << 22, ..DecodeOptions::upright() };
        let Ok(image) = Encoded::new(bytes, &"it", options) else { return };
        if let Ok(picture) = image.decode() {
            assert_eq!((picture.width(), picture.height()), (image.width(), image.height()));
            let (width, height) = (image.width().div_ceil(2), image.height().div_ceil(2));
            let part = Rect { x: image.width() - width, y: image.height() - height, width, height };
            assert!(image.decode_part(part).unwrap() == picture.part(part));
        }
    });
}

#[test]
fn lists_of_items() {
    let world = tempfile::tempdir().unwrap();
    let options = SynthOptions { scenes: 2, seed: 5, split: Split::Seen, embed_images: false };
    scenes::write(world.path(), &options, &mut |_| ()).unwrap();
    let names = ["grounding", "retrieval", "vqa", "fill", "captions", "nlvr", "scenes"];
    let seeds = names.map(|name| fs::read(world.path().join(name).with_extension("json")).unwrap());
    let scratch = Scratch::new("list.json");
    fuzz("lists of items", &seeds, move |bytes| {
        fs::write(scratch.path(), bytes).unwrap();
        let (strict, lenient, files) = (Reading::strict(), Reading::default(), [scratch.path()]);
        for reading in [strict, lenient] {
            let lengths = [
                reading.grounding(&files).map(|loaded| loaded.items.len()),
                reading.retrieval(&files).map(|loaded| loaded.items.len()),
                reading.captions(&files).map(|loaded| loaded.items.len()),
                reading.vqa(&files).map(|loaded| loaded.items.len()),
                reading.nlvr(&files).map(|loaded| loaded.items.len()),
                reading.fill(&files).map(|loaded| loaded.items.len()),
            ];
            for length in lengths {
                assert!(length.map_or_else(|error| !error.to_string().is_empty(), |length| length <= bytes.len()));
            }
        }
    });
}

#[test]
fn pickles() {
    let golden = |name: &str| fs::read(format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let seeds = ["refs_python2_0.p", "refs_python2_2.p", "refs_python3.p"].map(golden);
    let scratch = Scratch::new("refs(unc).p");
    fuzz("pickles", &seeds, move |bytes| {
        fs::write(scratch.path(), bytes).unwrap();
        let read = Reading::default().grounding(&[scratch.path()]);
        assert!(read.map_or_else(|error| !error.to_string().is_empty(), |loaded| loaded.items.len() <= bytes.len()));
    });
}

#[test]
fn tokenizer_files() {
    let tokenizer = TextTokenizer::from_vocabulary(&["red".to_owned(), "circle".to_owned()]).unwrap();
    fuzz("tokenizer files", &[tokenizer.to_bytes()], |bytes| {
        if let Ok(tokenizer) = TextTokenizer::from_bytes("it", bytes) {
            let _ = tokenizer.encode("a red circle, left of it", 40, true);
        }
    });
}
