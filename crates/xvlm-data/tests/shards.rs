//! Shards of every kind give the records that are in them, in whatever state they are.

mod shard_files;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;
use shard_files::{gzip, img2dataset, line, lines, numbers, open, open_with, parquet, place, read, tar, visit, zstd};
use xvlm_data::shards::index_shard;
use xvlm_data::storage::expand;
use xvlm_data::{
    DataError, DatasetConfig, Element, Form, ImageSource, Index, Location, Need, Order, Origin, Place, Record,
    RecordKeys, ShardLimits, ShardWriter, SourceConfig, StorageOptions, read_jsonl,
};

const IMAGE: &[u8] = b"image";

#[test]
fn lines_keep_their_numbers() {
    let text =
        format!("{}\r\n  \n{}not json\n\n{{\"caption\": \"no image\"}}\n{}", line(0), line(1), line(2).trim_end());
    let (records, errors) = read("a.jsonl", text.as_bytes());
    assert_eq!(numbers(&records), [0, 1, 2]);
    let places: Vec<Place> = records.iter().map(|record| record.origin.place.clone()).collect();
    assert_eq!(places, [Place::Line(1), Place::Line(4), Place::Line(8)]);
    assert_eq!(errors.iter().map(place).collect::<Vec<_>>(), [Place::Line(5), Place::Line(7)]);
    assert!(errors[0].to_string().contains("a.jsonl:5: expected JSON"), "{}", errors[0]);
    assert!(errors[1].to_string().contains("a.jsonl:7: image: expected"), "{}", errors[1]);
}

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
fn keys_may_be_those_of_the_originals_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("part-00000");
    fs::write(folder.path().join("x.png"), IMAGE).unwrap();
    fs::write(&path, json!({"file": "x.png", "text": "one", "caption": ["two"]}).to_string()).unwrap();
    assert!(visit(&open(&path).unwrap()).0.is_empty());
    let keys = |is_image_rpath| RecordKeys {
        image_key: Some("file".to_owned()),
        caption_key: Some("text".to_owned()),
        is_image_rpath,
    };
    for is_image_rpath in [Some(true), None] {
        let source = SourceConfig { keys: keys(is_image_rpath), ..SourceConfig::files([path.to_str().unwrap()]) };
        let (records, errors) = visit(&open_with(source, &DatasetConfig::default()).unwrap());
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(records[0].captions, ["one"]);
        assert_eq!(records[0].image, ImageSource::Path(folder.path().join("x.png")));
    }
    let source = SourceConfig { keys: keys(Some(false)), ..SourceConfig::files([path.to_str().unwrap()]) };
    let (_, errors) = visit(&open_with(source, &DatasetConfig::default()).unwrap());
    assert!(errors[0].to_string().contains("file: expected base64"), "{}", errors[0]);
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
fn compressed_shards_are_read_whatever_their_name() {
    let text = lines(0..300);
    let archive = tar(&[("0.jpg", IMAGE), ("0.txt", b"text 0")]);
    let joined = [gzip(lines(0..100).as_bytes()), gzip(lines(100..300).as_bytes())].concat();
    // A frame that holds no data goes between.
    let skippable =
        [&zstd(lines(0..100).as_bytes())[..], b"\x52\x2a\x4d\x18\x03\0\0\0abc", &zstd(lines(100..300).as_bytes())]
            .concat();
    for (name, content, count) in [
        ("a.jsonl.gz", gzip(text.as_bytes()), 300),
        ("part-1", gzip(text.as_bytes()), 300),
        ("part-2", joined, 300),
        ("a.jsonl.zst", zstd(text.as_bytes()), 300),
        ("part-3", skippable, 300),
        ("a.tar.gz", gzip(&archive), 1),
        ("b", zstd(&archive), 1),
        ("c", archive, 1),
        ("d", img2dataset(0..300, 70), 300),
        ("e.parquet.gz", gzip(&img2dataset(0..300, 70)), 300),
        ("empty.jsonl", Vec::new(), 0),
        ("empty.tar", Vec::new(), 0),
        ("empty.jsonl.gz", gzip(b""), 0),
        ("empty.jsonl.zst", zstd(b""), 0),
    ] {
        let (records, errors) = read(name, &content);
        assert_eq!(numbers(&records), (0..count).collect::<Vec<_>>(), "{name}");
        assert!(errors.is_empty(), "{name}: {errors:?}");
    }
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
fn archives_are_grouped_by_key() {
    let long = format!("{}/{}", "folder".repeat(20), "name".repeat(30));
    let (image, text) = (format!("{long}.jpg"), format!("{long}.txt"));
    let object = br#"{"caption": "text 2", "url": "http://x", "status": "success", "sha256": null, "elems":
        [{"bb": [1, 2, 3, 4], "caption": "a part"}], "questions": [["what?", "this"]]}"#;
    let archive = tar(&[
        ("README", b"no record"),
        ("a/0.0.jpg", IMAGE),
        ("a/0.cls", b"3"),
        ("a/0.caption", b"text 0\n"),
        ("a/1.PNG", IMAGE),
        ("a/1.text", b"text 1"),
        ("b.c/1.jpeg", IMAGE),
        ("b.c/1.json", object),
        (&image, IMAGE),
        (&text, b"text 3"),
        ("same.jpg", IMAGE),
        ("same.txt", b"text 4"),
        ("same.jpg", IMAGE),
        ("same.txt", b"text 5"),
        ("no-text.jpg", IMAGE),
        ("no-image.txt", b"text 9"),
        ("bad.jpg", IMAGE),
        ("bad.json", b"{"),
        ("list.webp", IMAGE),
        ("list.json", b"[]"),
        ("../../etc/x.gif", IMAGE),
        ("../../etc/x.json", br#"{"caption": ["text 6", "more"]}"#),
        ("/abs.jpg", IMAGE),
        ("/abs.txt", b"text 7"),
    ]);
    let (records, errors) = read("a.tar", &archive);
    // `0.0.jpg` is of key 0 with the extension `0.jpg`, which is that of no image.
    assert_eq!(numbers(&records), [1, 2, 3, 4, 5, 6, 7]);
    let keys: Vec<Place> = records.iter().map(|record| record.origin.place.clone()).collect();
    let key = |key: &str| Place::Key(key.into());
    let expected = ["a/1", "b.c/1", &long, "same", "same", "../../etc/x", "/abs"].map(key);
    assert_eq!(keys, expected);
    assert_eq!(records[1].elems[0].bbox, [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(records[1].questions, [("what?".to_owned(), "this".to_owned())]);
    assert_eq!(records[0].image, ImageSource::Bytes(IMAGE.into()));
    let places: Vec<Place> = errors.iter().map(place).collect();
    assert_eq!(places, ["a/0", "no-text", "no-image", "bad", "list"].map(key), "{errors:?}");
    assert!(errors[1].to_string().contains("a.tar[no-text]: expected a caption"), "{}", errors[1]);
    assert!(errors[2].to_string().contains("expected an image"), "{}", errors[2]);
}

#[test]
fn pax_headers_tell_names_and_sizes() {
    let mut archive = tar::Builder::new(Vec::new());
    let name = format!("{}.jpg", "ä".repeat(90));
    for (name, content) in [(name.clone(), IMAGE), (name.replace("jpg", "txt"), &b"text 0"[..])] {
        let size = content.len().to_string();
        archive.append_pax_extensions([("path", name.as_bytes()), ("size", size.as_bytes())]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_path("other").unwrap();
        // The size is to be taken from the extension.
        header.set_size(0);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(content);
        bytes.resize(1024, 0);
        std::io::Write::write_all(archive.get_mut(), &bytes).unwrap();
    }
    let (records, errors) = read("a.tar", &archive.into_inner().unwrap());
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(numbers(&records), [0]);
    assert_eq!(records[0].origin.place, Place::Key("ä".repeat(90).into()));
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
fn tables_of_img2dataset_and_the_hub_are_read() {
    let schema = "message table {
        optional binary url (UTF8); optional binary caption (UTF8); optional binary status (UTF8);
        optional binary jpg; optional binary elems (UTF8); }";
    let some = |text: &'static str| Some(text.as_bytes());
    let columns = [
        vec![some("u"); 6],
        vec![some("text 0"), some("text 1"), some("text 2"), None, some("text 4"), some("text 5")],
        vec![some("success"), some("failed_to_download"), some("success"), some("success"), None, some("success")],
        vec![Some(IMAGE), None, None, Some(IMAGE), Some(IMAGE), Some(IMAGE)],
        vec![some(r#"[{"bb": [0, 0, 2, 2], "caption": "part"}]"#), None, None, None, None, some("[")],
    ];
    for compression in
        [parquet::basic::Compression::UNCOMPRESSED, parquet::basic::Compression::GZIP(Default::default())]
    {
        let (records, errors) = read("a.parquet", &parquet(schema, &columns, 4, compression));
        assert_eq!(numbers(&records), [0, 4]);
        assert_eq!(records[0].elems[0].texts, ["part"]);
        assert_eq!(records[1].origin.place, Place::Row(4));
        assert!(records[1].origin.to_string().ends_with("a.parquet row 4"), "{}", records[1].origin);
        assert_eq!(errors.iter().map(place).collect::<Vec<_>>(), [Place::Row(2), Place::Row(3), Place::Row(5)]);
        assert!(errors[2].to_string().contains("elems: expected JSON"), "{}", errors[2]);
    }

    let schema = "message table {
        optional group image { optional binary bytes; optional binary path (UTF8); }
        optional binary text (UTF8); }";
    let folder = tempfile::tempdir().unwrap();
    let table = folder.path().join("t.parquet");
    // Of a group in an optional group, a value has level 2.
    write_nested(&table, schema);
    let (records, errors) = visit(&open(&table).unwrap());
    assert_eq!(numbers(&records), [0, 1], "{errors:?}");
    assert_eq!(records[0].image, ImageSource::Bytes(IMAGE.into()));
    assert_eq!(records[1].image, ImageSource::Path(folder.path().join("x.jpg")));
    assert_eq!(errors.iter().map(place).collect::<Vec<_>>(), [Place::Row(2)]);
    assert!(errors[0].to_string().contains("expected a path inside"), "{}", errors[0]);

    let (_, errors) = read(
        "a.parquet",
        &parquet("message t { optional binary x; }", &[vec![None]], 1, parquet::basic::Compression::SNAPPY),
    );
    assert!(errors[0].to_string().contains("a column of images"), "{}", errors[0]);
}

fn write_nested(path: &Path, schema: &str) {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let columns: [(&[&[u8]], &[i16]); 3] = [
        (&[IMAGE], &[2, 1, 1]),
        (&[b"a.jpg", b"x.jpg", b"../x.jpg"], &[2, 2, 2]),
        (&[b"text 0", b"text 1", b"text 2"], &[1, 1, 1]),
    ];
    for (values, levels) in columns {
        let values: Vec<ByteArray> = values.iter().map(|value| ByteArray::from(value.to_vec())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, Some(levels), None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn an_index_file_is_used_if_it_fits() {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in [
        ("a.jsonl", format!("\n{}\nx\n{}", line(0), line(1)).into_bytes()),
        (
            "a.tar",
            tar(&[("0.jpg", IMAGE), ("0.txt", b"text 0"), ("x.txt", b"x"), ("1.jpg", IMAGE), ("1.txt", b"text 1")]),
        ),
        ("a.jsonl.gz", gzip(format!("{}\nx\n{}", line(0), line(1)).as_bytes())),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, &content).unwrap();
        assert!(Index::read(&path).is_none());
        let index = index_shard(&path, &RecordKeys::default(), &ShardLimits::default()).unwrap();
        index.write(&path).unwrap();
        let read = Index::read(&path).unwrap();
        assert_eq!((read.len(), read.count(Need::Captions), read.count(Need::Elems)), (2, 2, 0), "{name}");
        assert_eq!(read.broken().reasons(), index.broken().reasons(), "{name}");
        assert_eq!(read.broken().total(), 1, "{name}");
        assert_eq!(read.broken().examples()[0].to_string(), index.broken().examples()[0].to_string(), "{name}");

        // A data set that has the index knows the count of a compressed shard without opening it.
        let dataset = open(&path).unwrap();
        assert_eq!((dataset.count(Need::Captions), dataset.broken().total()), (Some(2), 1), "{name}");
        let order = Order::new(Arc::new(dataset), Need::Captions, 1).unwrap();
        let drawn = [order.record(0).unwrap(), order.record(1).unwrap()];
        let mut expected = visit(&open(&path).unwrap()).0;
        expected.sort_by_key(|record| record.origin != drawn[0].origin);
        assert_eq!(drawn, expected[..], "{name}");

        // A byte that is wrong anywhere makes it none.
        let idx = Index::path_of(&path);
        let good = fs::read(&idx).unwrap();
        for byte in 0..good.len() {
            let mut bad = good.clone();
            bad[byte] ^= 1;
            fs::write(&idx, &bad).unwrap();
            assert!(Index::read(&path).is_none(), "{name}: byte {byte}");
        }
        for end in 0..good.len() {
            fs::write(&idx, &good[..end]).unwrap();
            assert!(Index::read(&path).is_none(), "{name}: cut at {end}");
        }
        assert_eq!(visit(&open(&path).unwrap()).1.len(), 1, "{name}");
        // So does another shard of the same length.
        fs::write(&idx, &good).unwrap();
        let mut other = content.clone();
        *other.last_mut().unwrap() ^= 1;
        fs::write(&path, &other).unwrap();
        assert!(Index::read(&path).is_none(), "{name}");
        let mut longer = content;
        longer.push(b'\n');
        fs::write(&path, &longer).unwrap();
        assert!(Index::read(&path).is_none(), "{name}");
        assert_eq!(visit(&open(&path).unwrap()).0.len(), 2, "{name}");
        fs::remove_file(&path).unwrap();
        fs::remove_file(&idx).unwrap();
    }
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    proptest::collection::vec("[a-zA-Z\\\\\"äß\u{1F600}\n]{1,12}".prop_filter("words", |t| !t.trim().is_empty()), 0..3)
}

prop_compose! {
    fn records()(
        image in proptest::option::of(proptest::collection::vec(any::<u8>(), 1..300)),
        captions in texts(),
        elems in proptest::collection::vec(
            (proptest::array::uniform2(-1e5f32..1e5), proptest::array::uniform2(1e-3f32..1e5), texts(), texts(), texts()), 0..3),
        questions in proptest::collection::vec(("[a-z ]{1,9}x", "[a-z]{1,9}"), 0..3),
    ) -> Record {
        let elems = elems.into_iter().map(|([x, y], [w, h], mut texts, attributes, labels)| {
            texts.push("last".to_owned());
            Element { bbox: [x, y, w, h], texts, attributes, labels }
        });
        let mut record = Record {
            image: image.map_or_else(|| ImageSource::Path("/data/images/a b.jpg".into()), |bytes| ImageSource::Bytes(bytes.into())),
            captions,
            elems: elems.collect(),
            questions,
            origin: Origin { file: Path::new("").into(), place: Place::Whole },
        };
        if record.captions.is_empty() && record.elems.is_empty() && record.questions.is_empty() {
            record.captions.push("a text".to_owned());
        }
        record
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn records_that_are_written_read_the_same(records in proptest::collection::vec(records(), 1..6)) {
        let folder = tempfile::tempdir().unwrap();
        for (name, form) in [("a.jsonl", Form::Lines), ("a.tar", Form::Tar)] {
            let path = folder.path().join(name);
            let mut writer = ShardWriter::create(&path, form).unwrap();
            for record in &records {
                writer.write(record).unwrap();
            }
            prop_assert!(!path.exists());
            writer.finish().unwrap();
            prop_assert!(Index::read(&path).is_some());
            let source = SourceConfig { image_root: Some("/".into()), ..SourceConfig::files([path.to_str().unwrap()]) };
            let (read, errors) = visit(&open_with(source, &DatasetConfig::default()).unwrap());
            prop_assert!(errors.is_empty(), "{:?}", errors);
            let read: Vec<Record> =
                read.iter().map(|record| Record { origin: records[0].origin.clone(), ..Record::clone(record) }).collect();
            prop_assert_eq!(&read, &records);
            // What the index file says is what is found without it.
            let found = index_shard(&path, &RecordKeys::default(), &ShardLimits::default()).unwrap();
            let written = Index::read(&path).unwrap();
            prop_assert_eq!(Need::ALL.map(|need| found.count(need)), Need::ALL.map(|need| written.count(need)));
            let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            prop_assert!(left.iter().all(|name| name.to_str().unwrap().starts_with("a.")), "{:?}", left);
        }
    }
}

#[test]
fn images_below_the_shard_are_written_relative_to_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("images")).unwrap();
    fs::write(folder.path().join("in.jsonl"), "{\"image_rpath\": \"images/x.jpg\", \"caption\": \"a\"}").unwrap();
    let records = read_jsonl(folder.path().join("in.jsonl")).unwrap();
    let path = folder.path().join("out.jsonl");
    let mut writer = ShardWriter::create(&path, Form::Lines).unwrap();
    writer.write(&records[0]).unwrap();
    writer.finish().unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "{\"caption\":[\"a\"],\"image_rpath\":\"images/x.jpg\"}\n");
    let unfinished = ShardWriter::create(&folder.path().join("no.jsonl"), Form::Lines).unwrap();
    drop(unfinished);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
}

#[test]
fn entries_name_files_folders_and_patterns() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir(root.join("sub")).unwrap();
    for name in [
        "b.jsonl",
        "a.jsonl",
        "_SUCCESS",
        ".hidden",
        "a.jsonl.idx",
        "00.tar",
        "00.parquet",
        "00_stats.json",
        "01.parquet",
        "sub/c.jsonl",
        "odd{1,2}.jsonl",
    ] {
        fs::write(root.join(name), "").unwrap();
    }
    let names = |entry: &str| -> Vec<PathBuf> {
        let shards = expand(root.join(entry).to_str().unwrap(), &StorageOptions::default()).unwrap();
        shards.iter().map(|shard| shard.as_file().unwrap().strip_prefix(root).unwrap().to_owned()).collect()
    };
    let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
    assert_eq!(names(""), paths(&["00.tar", "01.parquet", "a.jsonl", "b.jsonl", "odd{1,2}.jsonl"]));
    assert_eq!(names("?.json*"), paths(&["a.jsonl", "b.jsonl"]));
    assert_eq!(names("**/[c].jsonl"), paths(&["sub/c.jsonl"]));
    assert_eq!(names("{b,a}.jsonl"), paths(&["b.jsonl", "a.jsonl"]));
    assert_eq!(names("{08..10}.tar"), paths(&["08.tar", "09.tar", "10.tar"]));
    assert_eq!(names("odd{1,2}.jsonl"), paths(&["odd{1,2}.jsonl"]));
    assert_eq!(names("missing.jsonl"), paths(&["missing.jsonl"]));
    for entry in ["*.nothing", "[.jsonl"] {
        let error = expand(root.join(entry).to_str().unwrap(), &StorageOptions::default()).unwrap_err();
        assert!(error.to_string().contains("expected"), "{error}");
    }
    assert!(matches!(Location::parse("s3://bucket/key"), Location::Url(_)));
    assert!(matches!(Location::parse("file:///tmp/x"), Location::File(_)));
}

#[test]
fn sources_are_read_from_configurations() {
    let text = r#"["a.jsonl", {"files": "b/*.tar", "weight": 2, "image_root": "/"}, {"files": ["c", "d"], "image_key": "img"}]"#;
    let sources: Vec<SourceConfig> = serde_json::from_str(text).unwrap();
    assert_eq!(sources[0], SourceConfig::files(["a.jsonl"]));
    assert_eq!((sources[1].weight, sources[1].image_root.as_deref()), (Some(2.0), Some(Path::new("/"))));
    assert_eq!(sources[2].keys.image_key.as_deref(), Some("img"));
    let again: Vec<SourceConfig> = serde_json::from_value(serde_json::to_value(&sources).unwrap()).unwrap();
    assert_eq!(again, sources);
    assert_eq!(serde_json::to_value(&sources[0]).unwrap(), json!("a.jsonl"));
    let error = serde_json::from_str::<SourceConfig>(r#"{"files": "a", "wieght": 1}"#).unwrap_err();
    assert!(error.to_string().contains("wieght"), "{error}");
    let open = |sources: &[SourceConfig]| {
        xvlm_data::Dataset::open(sources, &DatasetConfig::default(), &StorageOptions::default())
    };
    for wrong in
        [r#"[]"#, r#"[{"files": []}]"#, r#"["a", {"files": "b", "weight": 1}]"#, r#"[{"files": "b", "weight": -1}]"#]
    {
        let sources: Vec<SourceConfig> = serde_json::from_str(wrong).unwrap();
        assert!(matches!(open(&sources), Err(DataError::Config { .. })), "{wrong}");
    }
}

#[test]
fn a_shard_that_cannot_be_read_costs_its_records_only() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for shard in 0..3 {
        fs::write(root.join(format!("{shard}.jsonl")), lines(10 * shard..10 * shard + 10)).unwrap();
    }
    // Named but not there: among others it is broken, alone it is a mistake.
    let dataset = open(&root.join("{0..3}.jsonl")).unwrap();
    assert_eq!((dataset.shards(), dataset.found()), (4, 31));
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
        let error = open(Path::new("/dev/null")).unwrap_err();
        assert!(error.to_string().contains("expected a file"), "{error}");
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
