//! Shards that are damaged, hostile or gone: what is wrong is named, and nothing else is lost.

mod shard_files;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use shard_files::{gzip, img2dataset, line, lines, numbers, open, open_with, place, read, tar, visit, zstd};
use xvlm_data::{
    DataError, Dataset, DatasetConfig, ImageSource, Need, Order, Place, ShardLimits, SourceConfig, StorageOptions,
};

const IMAGE: &[u8] = b"image";

#[test]
fn what_is_wrong_with_a_record_is_named() {
    let record =
        |elem: &str| format!("{{\"binary\": \"AAAA\", \"elems\": [{{\"caption\": \"x\", \"bb\": {elem}}}]}}\n");
    for (text, field) in [
        (record("[0, 0, NaN, 1]"), "JSON"),
        (record("[0, 0, 1e999, 1]"), "JSON"),
        (record("[0, 0, 1e300, 1]"), "elems[0].bb: expected a box"),
        (record("[3e38, 0, 3e38, 1]"), "elems[0].bb: expected a box"),
        (record("[0, 0, 0, 1]"), "elems[0].bb: expected a box"),
        (record("[0, 0, 1, -1]"), "elems[0].bb: expected a box"),
        (record("[0, 0, 1]"), "elems[0].bb: expected a box"),
        (record("\"here\""), "elems[0].bb: expected a box"),
        ("{\"binary\": \"AAAA\", \"caption\": \" \"}".to_owned(), "caption: expected"),
        ("{\"binary\": \"AAAA\", \"caption\": [\"a\", \"\"]}".to_owned(), "caption[1]: expected"),
        ("{\"binary\": \"AAAA\", \"caption\": 7}".to_owned(), "caption: expected"),
        ("{\"binary\": \"A?AA\", \"caption\": \"a\"}".to_owned(), "binary: expected base64"),
        ("{\"binary\": 7, \"caption\": \"a\"}".to_owned(), "binary: expected"),
        (
            "{\"binary\": \"AAAA\", \"questions\": [[\"what\"]], \"caption\": \"a\"}".to_owned(),
            "questions[0]: expected",
        ),
        ("[1, 2]".to_owned(), "record: expected an object"),
        ("{\"binary\": \"AAAA\", \"caption\": \"\u{1}\"}".to_owned(), "JSON"),
        ("[".repeat(100_000), "JSON"),
    ] {
        let (records, errors) = read("a.jsonl", format!("{}{text}\n{}", line(0), line(1)).as_bytes());
        assert_eq!(numbers(&records), [0, 1], "{text:.80}");
        assert_eq!(errors.len(), 1, "{text:.80}");
        let message = errors[0].to_string();
        assert!(message.contains("a.jsonl:2") && message.contains(field), "{text:.80}: {message}");
    }
    let bytes = [line(0).as_bytes(), b"{\"binary\": \"AAAA\", \"caption\": \"\xff\"}\n", line(1).as_bytes()].concat();
    let (records, errors) = read("a.jsonl", &bytes);
    assert_eq!((numbers(&records), errors.iter().map(place).collect()), (vec![0, 1], vec![Place::Line(2)]));
}

#[test]
fn paths_do_not_leave_their_root() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("set");
    fs::create_dir(&inside).unwrap();
    fs::write(folder.path().join("secret.png"), IMAGE).unwrap();
    fs::write(inside.join("fine.png"), IMAGE).unwrap();
    let secret = folder.path().join("secret.png");
    let rpath = |path: &str| json!({"image_rpath": path, "caption": "a"}).to_string();
    let any = |path: &str| json!({"image": path, "caption": "a"}).to_string();
    let text = [
        rpath("fine.png"),
        any("./sub/../fine.png"),
        rpath("../secret.png"),
        any("../secret.png"),
        rpath(secret.to_str().unwrap()),
        any(secret.to_str().unwrap()),
    ];
    let path = inside.join("a.jsonl");
    fs::write(&path, text.join("\n")).unwrap();
    let (records, errors) = visit(&open(&path).unwrap());
    assert_eq!(records.len() + errors.len(), 6);
    // `sub` need not be there for `..` to be resolved, but the system wants it to find the file.
    let refused: Vec<_> = errors.iter().filter(|error| error.to_string().contains("expected a path inside")).collect();
    assert_eq!(refused.len(), 4, "{errors:?}");
    let source = SourceConfig { image_root: Some("/".into()), ..SourceConfig::files([path.to_str().unwrap()]) };
    let (records, _) = visit(&open_with(source, &DatasetConfig::default()).unwrap());
    assert!(records.iter().any(|record| record.image == ImageSource::Path(secret.clone())), "{records:?}");
}

#[test]
fn what_is_cut_off_keeps_what_is_whole() {
    let text = lines(0..20_000);
    for (name, content) in [("a.jsonl.gz", gzip(text.as_bytes())), ("a.jsonl.zst", zstd(text.as_bytes()))] {
        let (records, errors) = read(name, &content[..content.len() * 2 / 3]);
        assert!(records.len() > 5_000 && records.len() < 20_000, "{name}: {}", records.len());
        assert_eq!(numbers(&records), (0..records.len()).collect::<Vec<_>>(), "{name}");
        assert!(errors.iter().any(|error| error.to_string().contains("a whole compressed file")), "{name}: {errors:?}");
    }
    let image = vec![7; 3000];
    let names: Vec<String> = (0..20).flat_map(|n| [format!("{n}.jpg"), format!("{n}.txt")]).collect();
    let texts: Vec<String> = (0..20).map(|n| format!("text {n}")).collect();
    let members: Vec<(&str, &[u8])> = (0..40)
        .map(|i| (names[i].as_str(), if i % 2 == 0 { image.as_slice() } else { texts[i / 2].as_bytes() }))
        .collect();
    let archive = tar(&members);
    let record = 512 + 3072 + 1024;
    for (end, whole) in [
        (10 * record + 100, 10),
        (10 * record + 1000, 10),
        (10 * record + 512 + 3072 + 100, 10),
        (10 * record + 512 + 3072 + 513, 10),
        (11 * record, 11),
    ] {
        let (records, errors) = read("a.tar", &archive[..end]);
        assert_eq!(numbers(&records), (0..whole).collect::<Vec<_>>(), "{end}");
        assert_eq!(errors.is_empty(), end == 11 * record, "{end}: {errors:?}");
        for error in &errors {
            assert!(error.to_string().contains("a.tar"), "{error}");
        }
    }
    let table = img2dataset(0..300, 70);
    let (records, errors) = read("a.parquet", &table[..table.len() - 9]);
    assert!(records.is_empty());
    assert!(errors[0].to_string().contains("a.parquet: expected a Parquet table"), "{errors:?}");
}

#[test]
fn a_damaged_header_costs_its_record_only() {
    let archive = tar(&[
        ("0.jpg", IMAGE),
        ("0.txt", b"text 0"),
        ("1.jpg", IMAGE),
        ("1.txt", b"text 1"),
        ("2.jpg", IMAGE),
        ("2.txt", b"text 2"),
    ]);
    for byte in [2048, 2048 + 124, 2048 + 150] {
        let mut damaged = archive.clone();
        damaged[byte] ^= 0x55;
        let (records, errors) = read("a.tar", &damaged);
        assert_eq!(numbers(&records), [0, 2], "{byte}");
        assert!(errors.iter().any(|error| place(error) == Place::Byte(2048)), "{byte}: {errors:?}");
    }
    // A size that no file has, in a header that is otherwise right.
    for size in [u64::from(u32::MAX), 0o777_7777_7777, u64::MAX / 2] {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..5].copy_from_slice(b"x.jpg");
        header.set_size(size);
        header.set_cksum();
        let damaged = [&archive[..2048], header.as_bytes(), &archive[2048..]].concat();
        let (records, errors) = read("a.tar", &damaged);
        assert_eq!(numbers(&records), [0, 1, 2], "{size}");
        assert_eq!(errors.iter().map(place).collect::<Vec<_>>(), [Place::Byte(2048)], "{errors:?}");
    }
}

#[test]
fn a_shard_that_cannot_be_read_costs_its_records_only() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for shard in 0..3 {
        fs::write(root.join(format!("{shard}.jsonl")), lines(10 * shard..10 * shard + 10)).unwrap();
    }
    #[cfg(unix)]
    {
        // A link to nothing stands for a file that cannot be opened.
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/nowhere", folder.path().join("b.jsonl")).unwrap();
        fs::write(folder.path().join("a.jsonl"), lines(0..4)).unwrap();
        let (records, errors) = visit(&open(folder.path()).unwrap());
        assert_eq!((records.len(), errors.len()), (4, 1));
        assert!(errors[0].to_string().contains("b.jsonl"), "{}", errors[0]);
    }
    // Named but not there: among others it is broken, alone it is a mistake.
    let dataset = open(&root.join("{0..3}.jsonl")).unwrap();
    assert_eq!((dataset.shards(), dataset.found()), (4, 30));
    assert_eq!(dataset.broken().total(), 10, "as many as the others have");
    assert!(dataset.broken().examples()[0].to_string().contains("3.jsonl"));
    assert!(dataset.check_broken(0.3).is_ok());
    let error = dataset.check_broken(0.01).unwrap_err();
    assert!(error.to_string().contains("3.jsonl"), "{error}");
    for missing in ["missing.jsonl", "{5..6}.jsonl"] {
        let error = open(&root.join(missing)).unwrap_err();
        assert!(matches!(&error, DataError::Io { .. }), "{error}");
    }
}

#[test]
fn shards_that_disappear_or_change_cost_their_records_only() {
    // More than are kept open, which go on being read from.
    const SHARDS: usize = 150;
    const OPEN: usize = 128;
    for gone in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let name = |shard: usize| folder.path().join(format!("{shard:03}.jsonl"));
        (0..SHARDS).for_each(|shard| fs::write(name(shard), lines(2 * shard..2 * shard + 2)).unwrap());
        let order = Order::new(Arc::new(open(folder.path()).unwrap()), Need::Captions, 7).unwrap();
        for shard in 0..SHARDS {
            fs::remove_file(name(shard)).unwrap();
            if !gone {
                fs::write(name(shard), lines(0..1)).unwrap();
            }
        }
        let drawn: Vec<_> = (0..2 * SHARDS as u64).map(|position| order.record(position)).collect();
        let good = drawn.iter().flatten().count();
        assert_eq!(good, 2 * OPEN);
        let errors: Vec<_> = drawn.iter().filter_map(|result| result.as_ref().err()).collect();
        assert_eq!(errors.len(), 2 * (SHARDS - OPEN));
        for error in errors {
            assert!(error.to_string().contains(".jsonl: "), "{error}");
            assert!(gone || error.to_string().contains("as when it was indexed"), "{error}");
        }
    }
}

#[test]
fn a_folder_or_a_pipe_is_no_shard() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("empty")).unwrap();
    let error = open(&folder.path().join("empty")).unwrap_err();
    assert!(error.to_string().contains("at least one shard"), "{error}");
    if cfg!(unix) {
        // Reading a pipe would wait for somebody to write into it.
        let pipe = folder.path().join("pipe.jsonl");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [&pipe, Path::new("/dev/null")] {
            let error = open(path).unwrap_err();
            assert!(error.to_string().contains("expected a file"), "{error}");
        }
    }
}

#[test]
fn what_is_too_large_is_refused() {
    let limits = ShardLimits { max_record_bytes: 100, max_spool_bytes: 100_000, ..ShardLimits::default() };
    let config = DatasetConfig { limits, ..DatasetConfig::default() };
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        visit(&open_with(SourceConfig::files([path.to_str().unwrap()]), &config).unwrap())
    };
    let huge = "x".repeat(1000);
    let text = format!("{}{{\"binary\": \"AAAA\", \"caption\": \"{huge}\"}}\n{}{huge}", line(0), line(1));
    let (records, errors) = read("a.jsonl", text.as_bytes());
    assert_eq!(numbers(&records), [0, 1]);
    assert_eq!(errors.iter().map(place).collect::<Vec<_>>(), [Place::Line(2), Place::Line(4)]);
    assert!(errors[0].to_string().contains("at most 100 bytes"), "{}", errors[0]);

    let (records, errors) = read("a.tar", &tar(&[("0.jpg", IMAGE), ("0.txt", huge.as_bytes())]));
    assert!(records.is_empty() && errors[0].to_string().contains("at most 100 bytes"), "{errors:?}");

    // A bomb: a hundred thousand bytes of a few hundred.
    for (name, bomb) in [("b.gz", gzip(&vec![b' '; 200_000])), ("b.zst", zstd(&vec![b' '; 200_000]))] {
        assert!(bomb.len() < 2_000);
        let (records, errors) = read(name, &bomb);
        assert!(records.is_empty());
        assert!(errors[0].to_string().contains("at most 100000 bytes when unpacked"), "{}", errors[0]);
    }
    let (_, errors) = read("c.gz", &gzip(&gzip(b"x")));
    assert!(errors[0].to_string().contains("compressed once"), "{}", errors[0]);
}

#[cfg(not(feature = "remote"))]
#[test]
fn a_url_needs_the_feature() {
    let error = open_with(SourceConfig::files(["s3://bucket/a.jsonl"]), &DatasetConfig::default()).unwrap_err();
    assert!(
        error.to_string().contains("s3://bucket/a.jsonl") && error.to_string().contains("--features remote"),
        "{error}"
    );
}

#[test]
fn a_damaged_part_of_a_table_costs_its_rows_only() {
    // Three groups of four rows; the images of the second are no Snappy any more.
    let mut table = img2dataset(0..12, 4);
    let metadata = {
        use parquet::file::reader::FileReader;
        let bytes = bytes_of(&table);
        parquet::file::serialized_reader::SerializedFileReader::new(bytes).unwrap().metadata().clone()
    };
    let (start, length) = metadata.row_group(1).column(2).byte_range();
    let end = (start + length) as usize;
    table[end - 12..end].fill(0xff);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    fs::write(&path, &table).unwrap();
    let dataset = Arc::new(open(&path).unwrap());
    let (records, errors) = visit(&dataset);
    assert_eq!(numbers(&records), [0, 1, 2, 3, 8, 9, 10, 11]);
    assert_eq!(errors.iter().map(place).collect::<Vec<_>>(), [Place::Row(4)], "{errors:?}");
    // All of its rows count.
    Order::new(Arc::clone(&dataset), Need::Captions, 1).unwrap().record(0).unwrap();
    assert_eq!((dataset.found(), dataset.broken().total()), (8, 4));
}

fn bytes_of(content: &[u8]) -> fs::File {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, content).unwrap();
    file
}

#[test]
fn a_shard_that_can_be_opened_later_is_as_if_it_always_could() {
    let folder = tempfile::tempdir().unwrap();
    let path = |shard: usize| folder.path().join(format!("{shard}.jsonl.gz"));
    for shard in 0..6 {
        fs::write(path(shard), gzip(lines(10 * shard..10 * shard + 10).as_bytes())).unwrap();
    }
    let good = fs::read(path(2)).unwrap();
    fs::write(path(2), gzip(&good)).unwrap();
    let open = |timeout| {
        let config = DatasetConfig { window: Some(2), ..DatasetConfig::default() };
        let storage = StorageOptions { timeout, ..StorageOptions::default() };
        let source = SourceConfig::files([folder.path().to_str().unwrap()]);
        Arc::new(Dataset::open(&[source], &config, &storage).unwrap())
    };
    let order = |dataset: &Arc<Dataset>| Order::new(Arc::clone(dataset), Need::Captions, 3).unwrap();
    // One that is tried again at once, and one that leaves it alone.
    let (dataset, patient) = (open(Duration::ZERO), open(Duration::from_secs(600)));
    let (order_of, patient) = (order(&dataset), order(&patient));
    for order in [&order_of, &patient] {
        let drawn: Vec<_> = (0..51).map(|position| order.record(position)).collect();
        let errors: Vec<_> = drawn.iter().filter_map(|result| result.as_ref().err()).collect();
        assert_eq!((drawn.iter().flatten().count(), errors.len()), (50, 1));
        assert!(matches!(errors[0], DataError::Unopened(_)) && errors[0].to_string().contains("2.jsonl.gz"));
        let again = (51..102).filter_map(|position| order.record(position).err()).next().unwrap();
        assert_eq!(again.reason(), errors[0].reason());
    }
    assert_eq!((dataset.found(), dataset.broken().total(), dataset.broken().reasons().len()), (50, 10, 1));

    // Whole at once: the next window is being fetched meanwhile.
    fs::write(folder.path().join(".aside"), good).unwrap();
    fs::rename(folder.path().join(".aside"), path(2)).unwrap();
    assert!((0..51).any(|position| patient.record(position).is_err()));
    (0..60).for_each(|position| drop(order_of.record(position)));
    let fresh = order(&open(Duration::ZERO));
    for position in 0..180 {
        let (record, expected) = (order_of.record(position).unwrap(), fresh.record(position).unwrap());
        assert_eq!(record, expected, "{position}");
    }
    assert_eq!((dataset.found(), dataset.broken().total()), (60, 0));
}

#[test]
fn no_room_for_temporary_files_says_nothing_of_the_shards() {
    let folder = tempfile::tempdir().unwrap();
    let spool = folder.path().join("spool");
    for (name, content) in [("a.jsonl.gz", gzip(lines(0..5).as_bytes())), ("a.parquet", img2dataset(0..5, 2))] {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        let limits = ShardLimits { spool_dir: Some(spool.clone()), ..ShardLimits::default() };
        let config = DatasetConfig { limits, ..DatasetConfig::default() };
        let source = SourceConfig::files([path.to_str().unwrap()]);
        let dataset = Arc::new(open_with(source, &config).unwrap());
        let order = Order::new(Arc::clone(&dataset), Need::Captions, 1).unwrap();
        for _ in 0..2 {
            let error = order.record(0).unwrap_err();
            assert!(matches!(&error, DataError::Spool { folder, .. } if *folder == spool), "{error:?}");
            assert!(error.to_string().contains("spool_dir"), "{error}");
        }
        assert!(matches!(dataset.write_indices(), Err(DataError::Spool { .. })));
        assert_eq!((dataset.found(), dataset.broken().total(), order.len()), (0, 0, None));
        fs::create_dir(&spool).unwrap();
        order.record(0).unwrap();
        assert_eq!((dataset.found(), dataset.broken().total()), (5, 0));
        fs::remove_dir(&spool).unwrap();
    }
}

#[test]
fn reasons_are_without_what_is_of_one_record() {
    let size = |width| DataError::ImageSize { name: format!("{width}.png"), limit: 100, width, height: 9 };
    assert_eq!(size(20).reason(), size(30).reason());
    let changed = |bytes: u32| DataError::Shard {
        path: "a".into(),
        place: Place::Whole,
        expected: format!("{bytes} bytes, as when it was indexed"),
        found: "1".to_owned(),
    };
    assert_eq!(changed(12).reason(), changed(345).reason());
    assert_eq!(changed(12).reason(), DataError::Unopened(Arc::new(changed(7))).reason());
}

#[test]
fn indices_are_written_of_all_shards_that_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.jsonl.gz"), gzip(&gzip(b"x"))).unwrap();
    fs::write(folder.path().join("b.jsonl"), lines(0..4)).unwrap();
    let error = open(folder.path()).unwrap().write_indices().unwrap_err();
    assert!(error.to_string().contains("a.jsonl.gz"), "{error}");
    assert!(folder.path().join("b.jsonl.idx").exists());
}
