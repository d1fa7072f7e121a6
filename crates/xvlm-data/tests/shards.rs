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
        assert!(Index::read(&path, &RecordKeys::default()).is_none());
        let index = index_shard(&path, &RecordKeys::default(), &ShardLimits::default()).unwrap();
        index.write(&path).unwrap();
        let read = Index::read(&path, &RecordKeys::default()).unwrap();
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
            assert!(Index::read(&path, &RecordKeys::default()).is_none(), "{name}: byte {byte}");
        }
        for end in 0..good.len() {
            fs::write(&idx, &good[..end]).unwrap();
            assert!(Index::read(&path, &RecordKeys::default()).is_none(), "{name}: cut at {end}");
        }
        assert_eq!(visit(&open(&path).unwrap()).1.len(), 1, "{name}");
        // So does another shard of the same length.
        fs::write(&idx, &good).unwrap();
        let mut other = content.clone();
        *other.last_mut().unwrap() ^= 1;
        fs::write(&path, &other).unwrap();
        assert!(Index::read(&path, &RecordKeys::default()).is_none(), "{name}");
        let mut longer = content;
        longer.push(b'\n');
        fs::write(&path, &longer).unwrap();
        assert!(Index::read(&path, &RecordKeys::default()).is_none(), "{name}");
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
            prop_assert!(Index::read(&path, &RecordKeys::default()).is_some());
            let source = SourceConfig { image_root: Some("/".into()), ..SourceConfig::files([path.to_str().unwrap()]) };
            let (read, errors) = visit(&open_with(source, &DatasetConfig::default()).unwrap());
            prop_assert!(errors.is_empty(), "{:?}", errors);
            let read: Vec<Record> =
                read.iter().map(|record| Record { origin: records[0].origin.clone(), ..Record::clone(record) }).collect();
            prop_assert_eq!(&read, &records);
            // What the index file says is what is found without it.
            let found = index_shard(&path, &RecordKeys::default(), &ShardLimits::default()).unwrap();
            let written = Index::read(&path, &RecordKeys::default()).unwrap();
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
fn files_that_others_wrote_are_read() {
    // Python's tarfile, gzip, zstandard and pyarrow; see `golden/shards/make.py`.
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/shards");
    let image = ImageSource::Bytes(b"\xff\xd8\xff\xe0image"[..].into());
    let long = format!("folder/{}name", "very-long-".repeat(20));
    let key = |key: &str| Place::Key(key.into());
    for name in ["gnu.tar", "pax.tar.gz"] {
        let (records, errors) = visit(&open(&golden.join(name)).unwrap());
        assert!(errors.is_empty(), "{name}: {errors:?}");
        assert_eq!(numbers(&records), [0, 1, 2], "{name}");
        let keys: Vec<Place> = records.iter().map(|record| record.origin.place.clone()).collect();
        assert_eq!(keys, ["folder/000000000", &long, "folder/äöü"].map(key), "{name}");
        // The caption of the text and of the JSON is the same.
        assert!(records.iter().all(|record| record.captions.len() == 1 && record.image == image), "{name}");
    }
    let (records, errors) = visit(&open(&golden.join("lines.jsonl.zst")).unwrap());
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(numbers(&records), (0..500).collect::<Vec<_>>());

    let (records, errors) = visit(&open(&golden.join("hub.parquet")).unwrap());
    assert_eq!(records.iter().map(|record| &*record.captions[0]).collect::<Vec<_>>(), ["text 0", "text 1"]);
    assert_eq!(records[0].captions, ["text 0", "more"]);
    assert!(records.iter().all(|record| record.image == image));
    assert_eq!(errors.iter().map(place).collect::<Vec<_>>(), [Place::Row(2)], "no image: {errors:?}");
    let (records, errors) = visit(&open(&golden.join("img2dataset.parquet")).unwrap());
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(numbers(&records), [0, 2, 3]);
    assert_eq!(records[2].origin.place, Place::Row(3));

    let (records, errors) = visit(&open(&golden.join("zstd.parquet")).unwrap());
    if cfg!(feature = "zstd") {
        assert_eq!(numbers(&records), [0, 2, 3], "{errors:?}");
    } else {
        assert!(records.is_empty());
        assert!(errors[0].to_string().contains("--features zstd"), "{errors:?}");
    }
}

#[test]
fn an_index_of_other_keys_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("kept");
    let text =
        "{\"binary\": \"AAAA\", \"caption\": \"a\", \"title\": \"b\"}\n{\"binary\": \"AAAA\", \"title\": \"c\"}\n";
    for (name, content) in [("a.jsonl", text.as_bytes().to_vec()), ("a.jsonl.gz", gzip(text.as_bytes()))] {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        index_shard(&path, &RecordKeys::default(), &ShardLimits::default()).unwrap().write(&path).unwrap();
        let titles = RecordKeys { caption_key: Some("title".to_owned()), ..RecordKeys::default() };
        assert!(Index::read(&path, &titles).is_none());
        // The standard name is no other key.
        let same = RecordKeys { caption_key: Some("caption".to_owned()), ..RecordKeys::default() };
        assert!(Index::read(&path, &same).is_some());
        for (keys, count) in [(RecordKeys::default(), 1), (titles.clone(), 2), (RecordKeys::default(), 1), (titles, 2)]
        {
            let config = DatasetConfig { index_dir: Some(kept.clone()), ..DatasetConfig::default() };
            let source = SourceConfig { keys, ..SourceConfig::files([path.to_str().unwrap()]) };
            let order = Order::new(Arc::new(open_with(source, &config).unwrap()), Need::Captions, 1).unwrap();
            order.record(0).unwrap();
            assert_eq!(order.len(), Some(count), "{name}");
        }
    }
}

#[test]
fn objects_of_a_table_are_json_in_strings() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let schema = "message table { optional binary jpg; optional binary caption (UTF8); optional group elems (LIST) { repeated group list { optional binary element (UTF8); } } }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(fs::File::create(&path).unwrap(), schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    type Column<'a> = (&'a [&'a [u8]], &'a [i16], Option<&'a [i16]>);
    let columns: [Column<'_>; 3] = [
        (&[IMAGE, IMAGE], &[1, 1], None),
        (&[b"text 0", b"text 1"], &[1, 1], None),
        (&[b"box"], &[0, 3], Some(&[0, 0])),
    ];
    for (values, levels, repeated) in columns {
        let values: Vec<ByteArray> = values.iter().map(|value| ByteArray::from(value.to_vec())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, Some(levels), repeated).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    let (records, errors) = visit(&open(&path).unwrap());
    assert_eq!(numbers(&records), [0]);
    assert!(errors.len() == 1 && errors[0].to_string().contains("elems: expected JSON in a string"), "{errors:?}");
}
