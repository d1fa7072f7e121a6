//! Shards of published data sets: what comes out, whole and after interruptions.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::Folder;
use serde_json::{Value, json};
use xvlm_data::annotations::{Coco, Conceptual, OpenImages, Reason, Records};
use xvlm_data::convert::{Compression, ConvertOptions, ConvertProgress, Form, Job, MANIFEST, Manifest, convert};
use xvlm_data::{
    DataError, Dataset, DatasetConfig, DecodeOptions, Encoded, ImageSource, Index, Picture, Record, RecordKeys,
    SourceConfig, StorageOptions, read_jsonl,
};

/// A set of `count` images with a caption and two boxes each; images whose number divides by 10 are missing.
fn set(folder: &Folder, count: u32) -> (Job, Coco) {
    let size = |i: u32| (40 + i % 5, 30 + i % 3);
    let images: Vec<Value> = (0..count)
        .map(|i| {
            let (width, height) = size(i);
            let name = format!("{i:012}.png");
            if i % 10 != 9 {
                folder.image(&format!("images/{name}"), width, height);
            }
            json!({"id": i, "file_name": name, "width": width, "height": height})
        })
        .collect();
    let captions: Vec<Value> =
        (0..count).map(|i| json!({"id": i, "image_id": i, "caption": format!("caption {i}")})).collect();
    let boxes: Vec<Value> = (0..count)
        .flat_map(|i| {
            let whole =
                json!({"id": 2 * i, "image_id": i, "category_id": 1, "bbox": [0.5, 1.25, 20, 10], "iscrowd": 0});
            let corner =
                json!({"id": 2 * i + 1, "image_id": i, "category_id": 2, "bbox": [35, 25, 100, 100], "iscrowd": 0});
            [whole, corner]
        })
        .collect();
    let categories = json!([{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}]);
    let captions = folder.json("captions.json", &json!({"images": images, "annotations": captions}));
    let instances = json!({"images": images, "annotations": boxes, "categories": categories});
    let annotations = vec![captions, folder.json("instances.json", &instances)];
    let job = Job { name: "coco".to_owned(), inputs: annotations.clone(), settings: json!({"crowds": false}) };
    (job, Coco { annotations, images: folder.path("images"), crowds: false })
}

fn run(job: &Job, set: &Coco, options: &ConvertOptions) -> Result<Manifest, DataError> {
    convert(job, || set.open(), options, &mut ())
}

/// The files of a folder and what they hold.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    std::fs::read_dir(folder).unwrap().map(read).collect()
}

fn shards(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    files(folder).into_iter().filter(|(name, _)| name != MANIFEST).collect()
}

/// What a record tells, however its image is stored.
type Told = (Vec<String>, Vec<([f32; 4], Vec<String>, Vec<String>)>, (u32, u32));

fn told(record: &Record) -> Told {
    let elems = record.elems.iter().map(|element| (element.bbox, element.texts.clone(), element.labels.clone()));
    let picture = decoded(record);
    (record.captions.clone(), elems.collect(), (picture.width(), picture.height()))
}

/// Reads a folder of shards of any form back, as training does.
fn read_back(folder: &Path) -> Vec<Told> {
    let source = SourceConfig { image_root: Some("/".into()), ..SourceConfig::files([folder.to_str().unwrap()]) };
    let set = Dataset::open(&[source], &DatasetConfig::default(), &StorageOptions::default()).unwrap();
    let mut all = Vec::new();
    set.visit(|record| {
        let record = record?;
        all.push(told(&record));
        Ok::<(), DataError>(())
    })
    .unwrap();
    all
}

fn expected(records: Records) -> Vec<Told> {
    let there = |record: &Record| matches!(&record.image, ImageSource::Path(path) if path.is_file());
    records.map(|image| image.unwrap().record).filter(there).map(|record| told(&record)).collect()
}

fn decoded(record: &Record) -> Picture {
    Encoded::of(&record.image, &record.origin, DecodeOptions::default()).unwrap().decode().unwrap()
}

#[test]
fn every_form_reads_back_as_it_was() {
    let folder = Folder::new();
    let (job, set) = set(&folder, 23);
    let expected = expected(set.open().unwrap());
    assert_eq!(expected.len(), 21);
    assert_eq!(expected[0].1[1].0, [35.0, 25.0, 5.0, 5.0]);
    for form in [Form::JsonPaths, Form::JsonImages, Form::Tar] {
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let out = folder.path(&format!("{form:?}{compression:?}"));
            let options =
                ConvertOptions { form, compression, records_per_shard: 5, workers: 2, ..ConvertOptions::new(&out) };
            let manifest = run(&job, &set, &options).unwrap();
            assert!(manifest.complete);
            assert_eq!((manifest.records(), manifest.total), (21, Some(5)));
            assert_eq!(manifest.left_out().count(Reason::MissingImage), 2);
            assert_eq!(manifest.shards.iter().map(|shard| shard.elems).sum::<u64>(), 42);
            assert_eq!(Manifest::read(&out).unwrap().unwrap(), manifest);
            let names: Vec<String> = files(&out).into_keys().collect();
            let end = match (form, compression) {
                (Form::Tar, Compression::None) => "tar",
                (Form::Tar, Compression::Gzip) => "tar.gz",
                (Form::Tar, Compression::Zstd) => "tar.zst",
                (_, Compression::None) => "jsonl",
                (_, Compression::Gzip) => "jsonl.gz",
                (_, Compression::Zstd) => "jsonl.zst",
            };
            let mut wanted: Vec<String> = (0..5).map(|i| format!("coco-{i:05}.{end}")).collect();
            if compression == Compression::None {
                let index = Index::read(&out.join(&wanted[4]), &RecordKeys::default()).unwrap();
                assert_eq!(index.len() as u64, manifest.shards[4].records);
                wanted = wanted.into_iter().flat_map(|name| [name.clone(), format!("{name}.idx")]).collect();
            }
            wanted.push(MANIFEST.to_owned());
            assert_eq!(names, wanted);
            assert_eq!(read_back(&out), expected, "{form:?} {compression:?}");
        }
    }
}

#[test]
fn shuffling_mixes_all_shards_by_the_seed() {
    let folder = Folder::new();
    let (job, set) = set(&folder, 40);
    let with = |name: &str, shuffle, workers| {
        let options =
            ConvertOptions { records_per_shard: 10, shuffle, workers, ..ConvertOptions::new(folder.path(name)) };
        run(&job, &set, &options).unwrap();
        folder.path(name)
    };
    let (one, same, other) = (with("a", Some(1), 1), with("b", Some(1), 3), with("c", Some(2), 1));
    assert_eq!(shards(&one), shards(&same));
    assert_ne!(shards(&one), shards(&other));
    let captions = |out: &Path| read_back(out).into_iter().map(|told| told.0[0].clone()).collect::<Vec<_>>();
    let plain = captions(&with("d", None, 2));
    assert_eq!(plain[..3], ["caption 0", "caption 1", "caption 2"]);
    let mut mixed = captions(&one);
    // Images of the first shard as it would be come from all shards.
    let early = |caption: &String| caption[8..].parse::<u32>().unwrap() < 10;
    assert!((1..9).contains(&mixed[..9].iter().filter(|caption| early(caption)).count()));
    mixed.sort();
    let mut sorted = plain;
    sorted.sort();
    assert_eq!(mixed, sorted);
}

#[test]
fn images_are_made_smaller_with_their_boxes() {
    let folder = Folder::new();
    folder.image("images/000000000001.png", 400, 200);
    folder.image("images/000000000002.png", 50, 100);
    let path = folder.json(
        "instances.json",
        &json!({
        "images": [{"id": 1, "file_name": "000000000001.png", "width": 400, "height": 200},
                   {"id": 2, "file_name": "000000000002.png", "width": 50, "height": 100}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [40, 20, 200, 100]},
                        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [10, 20, 3, 100]},
                        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [10.5, 20, 3, 70]}],
        "categories": [{"id": 1, "name": "cup"}]}),
    );
    let job = Job { name: "small".to_owned(), inputs: vec![path.clone()], settings: Value::Null };
    let set = Coco { annotations: vec![path], images: folder.path("images"), crowds: false };
    let options = ConvertOptions { max_side: Some(100), quality: 80, ..ConvertOptions::new(folder.path("out")) };
    let manifest = run(&job, &set, &options).unwrap();
    let records = read_back(&folder.path("out"));
    assert_eq!((records[0].2, records[1].2), ((100, 50), (50, 100)));
    assert_eq!(records[0].1.iter().map(|element| element.0).collect::<Vec<_>>(), [[10.0, 5.0, 50.0, 25.0]]);
    assert_eq!(records[1].1[0].0, [10.5, 20.0, 3.0, 70.0]);
    // A box of three pixels is less than one when the image is a fourth.
    assert_eq!(manifest.left_out().count(Reason::DegenerateBox), 1);
    let record = &read_jsonl(folder.path("out/small-00000.jsonl")).unwrap()[0];
    let ImageSource::Bytes(bytes) = &record.image else { panic!("{record:?}") };
    assert_eq!(image::guess_format(bytes).unwrap(), image::ImageFormat::Jpeg);
    let picture = decoded(record);
    let middle = &picture.rgb()[(25 * 100 + 50) * 3..][..3];
    for (found, drawn) in middle.iter().zip([144u8, 200, 90]) {
        assert!(found.abs_diff(drawn) < 6, "{middle:?}");
    }
}

#[test]
fn broken_images_are_named_and_the_others_kept() {
    let folder = Folder::new();
    let (job, set) = set(&folder, 9);
    folder.write("images/000000000001.png", "no image at all");
    folder.write("images/000000000002.png", "");
    folder.image("images/000000000003.png", 7, 7);
    std::fs::remove_file(folder.path("images/000000000004.png")).unwrap();
    std::fs::create_dir(folder.path("images/000000000004.png")).unwrap();
    for form in [Form::JsonPaths, Form::Tar] {
        let options = ConvertOptions { form, ..ConvertOptions::new(folder.path(&format!("{form:?}"))) };
        let manifest = run(&job, &set, &options).unwrap();
        assert_eq!(manifest.records(), 5);
        let skipped = manifest.left_out();
        assert_eq!((skipped.count(Reason::UnreadableImage), skipped.count(Reason::OtherSize)), (3, 1));
        let text = skipped.to_string();
        assert!(text.contains("captions.json item 3") && text.contains("expected 43x30, found 7x7"), "{text}");
        assert!(text.contains("000000000001.png"), "{text}");
    }
}

#[test]
fn nothing_left_is_an_error() {
    let folder = Folder::new();
    let rows = folder.write("rows.tsv", "a bus\thttp://h/a\na car\thttp://h/b\n");
    let set = Conceptual { rows: rows.clone(), images: folder.path("nowhere"), names: "{row}.jpg".parse().unwrap() };
    let job = Job { name: "cc3m".to_owned(), inputs: vec![rows], settings: Value::Null };
    let out = folder.path("out");
    let error = convert(&job, || set.open(), &ConvertOptions::new(&out), &mut ()).unwrap_err();
    assert!(matches!(error, DataError::NothingLeft { .. }));
    assert!(error.to_string().contains("2: missing images"), "{error}");
    // With the images there, it goes on.
    folder.image("nowhere/0.jpg", 5, 5);
    assert_eq!(convert(&job, || set.open(), &ConvertOptions::new(&out), &mut ()).unwrap().records(), 1);
}

/// Stops when so many images are finished.
struct StopAt(u64, u64);

impl ConvertProgress for StopAt {
    fn writing(&mut self, images: u64, _: u64) {
        self.1 = images;
    }

    fn stop(&mut self) -> bool {
        self.1 >= self.0
    }
}

#[test]
fn an_interrupted_conversion_goes_on() {
    let folder = Folder::new();
    let (job, set) = set(&folder, 60);
    let options = |name: &str| ConvertOptions {
        records_per_shard: 5,
        shuffle: Some(7),
        workers: 2,
        ..ConvertOptions::new(folder.path(name))
    };
    run(&job, &set, &options("whole")).unwrap();
    let out = folder.path("parts");
    let stopped = convert(&job, || set.open(), &options("parts"), &mut StopAt(15, 0)).unwrap_err();
    assert!(matches!(stopped, DataError::Stopped));
    let manifest = Manifest::read(&out).unwrap().unwrap();
    assert!(
        !manifest.complete && manifest.shards.len() >= 3 && manifest.shards.len() < 12,
        "{}",
        manifest.shards.len()
    );

    // What a crash leaves: half of a file aside, a shard that is not noted, a noted one that is cut.
    folder.write("parts/.writing-abc", "half");
    folder.write("parts/.plain-coco-00003.jsonl", "half");
    let cut = out.join(manifest.shards[0].file.as_ref().unwrap());
    std::fs::write(&cut, "cut").unwrap();
    let kept = out.join(manifest.shards[1].file.as_ref().unwrap());
    let noted: Vec<usize> = manifest.shards.iter().map(|shard| shard.number).collect();
    let new = (0..12).find(|number| !noted.contains(number)).unwrap();
    folder.write(&format!("parts/coco-{new:05}.jsonl"), "not noted");
    let before = std::fs::metadata(&kept).unwrap().modified().unwrap();

    let manifest = run(&job, &set, &options("parts")).unwrap();
    assert!(manifest.complete);
    assert_eq!(std::fs::metadata(&kept).unwrap().modified().unwrap(), before);
    assert_eq!(shards(&out), shards(&folder.path("whole")));
    // Done is done: nothing is read again.
    let again = convert(&job, || panic!("opened"), &options("parts"), &mut ()).unwrap();
    assert_eq!(again, manifest);
}

#[test]
fn shards_that_are_gone_are_made_again() {
    let folder = Folder::new();
    let (job, set) = set(&folder, 20);
    let options = ConvertOptions { records_per_shard: 5, ..ConvertOptions::new(folder.path("out")) };
    let manifest = run(&job, &set, &options).unwrap();
    let whole = files(&options.out);
    let kept = std::fs::metadata(folder.path("out/coco-00000.jsonl")).unwrap().modified().unwrap();
    std::fs::remove_file(folder.path("out/coco-00001.jsonl")).unwrap();
    folder.write("out/coco-00002.jsonl", "cut");
    assert_eq!(run(&job, &set, &options).unwrap(), manifest);
    assert_eq!(files(&options.out), whole);
    assert_eq!(std::fs::metadata(folder.path("out/coco-00000.jsonl")).unwrap().modified().unwrap(), kept);
}

#[test]
fn a_note_that_a_crash_has_cut_is_none() {
    let folder = Folder::new();
    let (job, set) = set(&folder, 60);
    let options = ConvertOptions { records_per_shard: 5, ..ConvertOptions::new(folder.path("out")) };
    convert(&job, || set.open(), &options, &mut StopAt(20, 0)).unwrap_err();
    let journal = folder.path("out/.shards.jsonl");
    let notes = std::fs::read(&journal).unwrap();
    let noted = Manifest::read(&options.out).unwrap().unwrap().shards.len();
    assert_eq!((noted >= 4, notes.iter().filter(|&&byte| byte == b'\n').count()), (true, noted));
    std::fs::write(&journal, &notes[..notes.len() - 9]).unwrap();
    assert_eq!(Manifest::read(&options.out).unwrap().unwrap().shards.len(), noted - 1);
    let manifest = run(&job, &set, &options).unwrap();
    assert_eq!((manifest.records(), manifest.shards.len()), (54, 12));
    assert!(manifest.shards.is_sorted_by_key(|shard| shard.number) && !journal.exists());
}

/// Captions and boxes of Open Images about 30 images, of which every other is there.
fn open_images(folder: &Folder) -> (Job, OpenImages) {
    let header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax";
    let rows: String =
        (0..30).map(|i| format!("id{i},x,/m/1,1,0.25,0.75,0.5,1\nid{i},x,/m/1,1,0,0.01,0,1\n")).collect();
    let boxes = folder.write("boxes.csv", format!("{header}\n{rows}"));
    let classes = folder.write("classes.csv", "/m/1,Cup\n");
    (0..30).step_by(2).for_each(|i| _ = folder.image(&format!("oi/id{i}.jpg"), 40, 20));
    let (inputs, settings) = (vec![boxes.clone(), classes.clone()], Value::Null);
    let job = Job { name: "open-images".to_owned(), inputs, settings };
    let images = folder.path("oi");
    (job, OpenImages { classes: vec![classes], boxes: Some(boxes), images, ..OpenImages::default() })
}

#[test]
fn images_that_arrive_in_between_lose_no_others() {
    let folder = Folder::new();
    let (job, set) = open_images(&folder);
    let options = ConvertOptions { records_per_shard: 5, shuffle: Some(3), ..ConvertOptions::new(folder.path("out")) };
    convert(&job, || set.open(), &options, &mut StopAt(10, 0)).unwrap_err();
    (1..30).step_by(2).for_each(|i| _ = folder.image(&format!("oi/id{i}.jpg"), 80, 20));
    let done = Manifest::read(&options.out).unwrap().unwrap().left_out().count(Reason::MissingImage);
    let manifest = convert(&job, || set.open(), &options, &mut ()).unwrap();
    // Those that were missing when their shard was written, and no others.
    assert_eq!((manifest.left_out().count(Reason::MissingImage), manifest.records()), (done, 30 - done));
    // Half the width and the lower half; boxes of less than a pixel are none.
    let mut sizes = std::collections::BTreeSet::new();
    for (_, elems, (width, height)) in read_back(&options.out) {
        assert_eq!(elems.len(), 1);
        let [w, h] = [width, height].map(|side| side as f32);
        assert_eq!(elems[0].0, [w / 4.0, h / 2.0, w / 2.0, h / 2.0]);
        sizes.insert((width, height));
    }
    assert_eq!(sizes.len(), 2);
}

#[test]
fn annotations_that_tell_something_else_are_refused() {
    let folder = Folder::new();
    let (job, set) = set(&folder, 60);
    let options = ConvertOptions { records_per_shard: 5, ..ConvertOptions::new(folder.path("out")) };
    convert(&job, || set.open(), &options, &mut StopAt(15, 0)).unwrap_err();
    // Changed behind the back of the files' lengths and times.
    let other = |annotations: Vec<PathBuf>| Coco { annotations, ..set.clone() };
    let fewer = folder.json(
        "fewer.json",
        &json!({"images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "caption": "cup"}]}),
    );
    for (set, message) in [
        (other(vec![fewer]), "1 images instead of 60"),
        (other(vec![set.annotations[0].clone()]), "60 images of which something else is told"),
    ] {
        let error = run(&job, &set, &options).unwrap_err().to_string();
        assert!(
            error.contains("out: annotations that tell what they told before") && error.contains(message),
            "{error}"
        );
    }
    assert_eq!(run(&job, &set, &options).unwrap().records(), 54);
}

#[test]
fn other_settings_and_other_folders_are_refused() {
    let folder = Folder::new();
    let (job, set) = set(&folder, 12);
    let options = ConvertOptions { records_per_shard: 5, ..ConvertOptions::new(folder.path("out")) };
    run(&job, &set, &options).unwrap();
    let before = files(&folder.path("out"));
    let refused = |job: &Job, options: &ConvertOptions, field: &str| {
        let error = run(job, &set, options).unwrap_err();
        assert!(matches!(error, DataError::Config { field: "out", .. }), "{error}");
        assert!(error.to_string().contains(field), "{error}");
        assert_eq!(files(&folder.path("out")), before);
    };
    refused(&job, &ConvertOptions { shuffle: Some(1), ..options.clone() }, "the same settings");
    refused(&job, &ConvertOptions { records_per_shard: 6, ..options.clone() }, "the same settings");
    refused(&Job { name: "other".to_owned(), ..job.clone() }, &options, "the same source");
    folder.write("captions.json", "{}");
    refused(&job, &options, "the same inputs");

    folder.write("mine/thesis.txt", "years of work");
    let error = run(&job, &set, &ConvertOptions::new(folder.path("mine"))).unwrap_err().to_string();
    assert!(error.contains("thesis.txt without shards.json"), "{error}");
    assert_eq!(files(&folder.path("mine")).len(), 1);
    folder.write("broken/shards.json", "{}");
    assert!(matches!(run(&job, &set, &ConvertOptions::new(folder.path("broken"))), Err(DataError::Json { .. })));

    let fresh = |name: &str| ConvertOptions::new(folder.path(name));
    for wrong in [
        ConvertOptions { records_per_shard: 0, ..fresh("x") },
        ConvertOptions { workers: 0, ..fresh("x") },
        ConvertOptions { quality: 0, ..fresh("x") },
        ConvertOptions { max_side: Some(0), ..fresh("x") },
        ConvertOptions { max_side: Some(100), form: Form::JsonPaths, ..fresh("x") },
    ] {
        assert!(matches!(run(&job, &set, &wrong), Err(DataError::Config { .. })), "{wrong:?}");
    }
    let named = Job { name: "../x".to_owned(), ..job };
    assert!(matches!(run(&named, &set, &fresh("x")), Err(DataError::Config { field: "name", .. })));
    assert!(!folder.path("x").exists());
}

#[test]
fn two_conversions_do_not_share_a_folder() {
    let folder = Folder::new();
    let (job, set) = set(&folder, 12);
    let options = ConvertOptions { records_per_shard: 5, ..ConvertOptions::new(folder.path("out")) };
    let manifest = convert(
        &job,
        || {
            let second = run(&job, &set, &options).unwrap_err().to_string();
            assert!(second.contains("no other conversion at work"), "{second}");
            set.open()
        },
        &options,
        &mut (),
    );
    assert!(manifest.unwrap().complete);
}

#[test]
fn a_stream_that_fails_ends_the_conversion() {
    let folder = Folder::new();
    let (mut job, set) = set(&folder, 12);
    let cut = std::fs::read(&set.annotations[1]).unwrap();
    let cut = folder.write("cut.json", &cut[..cut.len() / 2]);
    job.inputs = vec![cut.clone()];
    let set = Coco { annotations: vec![cut], ..set };
    let error = run(&job, &set, &ConvertOptions::new(folder.path("out"))).unwrap_err().to_string();
    assert!(error.contains("cut.json: byte") && error.contains("the end of the file"), "{error}");
    let missing = Job { inputs: vec![PathBuf::from("/nowhere/x.json")], ..job };
    assert!(matches!(run(&missing, &set, &ConvertOptions::new(folder.path("y"))), Err(DataError::Io { .. })));
}
