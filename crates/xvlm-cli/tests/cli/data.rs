//! `xvlm data`: from published annotations to shards, and what can be seen of them.

use std::fs;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;
use xvlm::Picture;
use xvlm::data::{TextTokenizer, read_jsonl};

use super::{json, refused, stderr, text, xvlm};

fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: String| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    let image = |name: &str| {
        let picture = Picture::from_rgb(40, 30, vec![120; 40 * 30 * 3]).unwrap();
        fs::create_dir_all(dir.path().join("images")).unwrap();
        fs::write(dir.path().join("images").join(name), picture.to_png().unwrap()).unwrap();
    };
    let images: Vec<Value> = (0..6)
        .map(|i| {
            let name = format!("{i:012}.png");
            if i != 5 {
                image(&name);
            }
            json!({"id": i, "file_name": name, "width": 40, "height": 30})
        })
        .collect();
    let captions: Vec<Value> = (0..6).map(|i| json!({"image_id": i, "caption": format!("picture {i}")})).collect();
    let boxes: Vec<Value> =
        (0..6).map(|i| json!({"image_id": i, "category_id": 1, "bbox": [1, 2, 30, 100], "iscrowd": i / 4})).collect();
    write("captions.json", json!({"images": images, "annotations": captions}).to_string());
    let categories = json!([{"id": 1, "name": "dog"}]);
    write("instances.json", json!({"images": images, "annotations": boxes, "categories": categories}).to_string());
    write("ids.txt", "0 # the first\n".to_owned());
    write("rows.tsv", "a bus\thttp://a/000000000001.png\na car\thttp://a/gone.png\n".to_owned());
    dir
}

#[test]
fn coco_becomes_shards() {
    let dir = folder();
    let dir = dir.path();
    let arguments = "data convert coco --captions captions.json --instances instances.json --images images --records-per-shard 4 \
                     --exclude ids.txt --out out --workers 1";
    let written = json(dir, arguments);
    assert_eq!((&written["images"], &written["captions"], &written["elements"]), (&json!(4), &json!(4), &json!(3)));
    assert_eq!(written["shards"], json!(1));
    let left_out = &written["left_out"];
    for (reason, count) in [("excluded", 1), ("missing_image", 1), ("crowd", 2)] {
        assert_eq!(left_out[reason]["count"], json!(count), "{left_out}");
    }
    assert!(left_out["missing_image"]["examples"][0].as_str().unwrap().contains("000000000005.png"));
    let records = read_jsonl(dir.join("out/coco-00000.jsonl")).unwrap();
    assert_eq!(records[0].captions, ["picture 1"]);
    assert_eq!(records[0].elems[0].bbox, [1.0, 2.0, 30.0, 28.0]);
    // Once more: nothing is to do, and it says the same.
    assert_eq!(json(dir, arguments), written);
    let text = text(dir, arguments);
    assert!(text.contains("coco in out") && text.contains("missing images"), "{text}");
    refused(dir, &format!("{arguments} --shuffle 1"), &["out: expected out: shards of the same settings"]);
}

#[cfg(target_os = "linux")]
#[test]
fn paths_that_json_cannot_tell_are_refused() {
    use std::os::unix::ffi::OsStrExt;
    let dir = folder();
    let strange = std::ffi::OsStr::from_bytes(b"strange\xff");
    for (option, others) in [
        ("images", ["--captions", "captions.json", "--out", "out"]),
        ("out", ["--captions", "captions.json", "--images", "images"]),
        ("exclude", ["--out", "out", "--images", "images"]),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xvlm"));
        command.current_dir(dir.path()).args(["data", "convert", "coco"]).args(others);
        if option == "exclude" {
            command.args(["--captions", "captions.json"]);
        }
        let output = command.arg(format!("--{option}")).arg(strange).output().unwrap();
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(&format!("{option}: expected a path in UTF-8, found strange")), "{error}");
    }
}

#[test]
fn rows_need_names_of_images() {
    let dir = folder();
    let dir = dir.path();
    let written = json(
        dir,
        "data convert cc3m --annotations rows.tsv --names {name} --images images --out cc --format tar --compress gzip",
    );
    assert_eq!(written["images"], json!(1));
    assert!(dir.join("cc/cc3m-00000.tar.gz").is_file());
    let convert = |set: &str| format!("data convert {set} --annotations rows.tsv --images images --out wrong");
    let wrong = xvlm(dir, &convert("cc3m --names {url}"));
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("{row}, {line}, {name}"), "{}", stderr(&wrong));
    refused(dir, &convert("cc12m --names {md5}.jpg"), &["2: missing images"]);
    for set in ["visual-genome", "sbu", "objects365", "open-images", "flickr30k", "karpathy"] {
        text(dir, &format!("data convert {set} --help"));
    }
}

#[test]
fn a_data_set_can_be_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    text(dir, "synth --out world --scenes 6 --seed 5");
    let shard = "world/pretrain.jsonl";

    let found = json(dir, &format!("data check {shard}"));
    assert_eq!((&found["records"], &found["broken"]), (&json!(6), &json!(0)), "{found}");
    let written = json(dir, &format!("data index {shard}"));
    assert_eq!((&written["records"], &written["indices"][0]), (&json!(6), &json!("world/pretrain.jsonl.idx")));

    let samples = json(dir, &format!("data inspect {shard} --count 5 --out sheet.png"));
    let samples = samples.as_array().unwrap();
    assert_eq!(samples.len(), 5);
    let first = &samples[0]["texts"][1];
    let bounds: Vec<f64> = serde_json::from_value(first["box"].clone()).unwrap();
    assert!(bounds.iter().all(|edge| (-0.01..=224.01).contains(edge)) && bounds[0] < bounds[2], "{first}");
    let sheet = Picture::open(&dir.join("sheet.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (3 * 228 + 4, 2 * 228 + 4));
    let listed = text(dir, &format!("data inspect {shard} --stream captions --count 2 --set data.augment=null"));
    assert!(listed.contains("world/pretrain.jsonl:") && listed.contains("whole: "), "{listed}");

    let learnt = json(dir, &format!("data vocab {shard} --out vocabulary --size 200"));
    let tokenizer = TextTokenizer::from_file(dir.join("vocabulary/tokenizer.json")).unwrap();
    assert_eq!(learnt["pieces"], json!(tokenizer.vocab_size()));
    assert!(tokenizer.token_to_id("red").is_some());
}

#[test]
fn what_is_broken_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    text(dir, "synth --out world --scenes 3 --seed 5");
    let whole = fs::read_to_string(dir.join("world/pretrain.jsonl")).unwrap();
    let first: Value = serde_json::from_str(whole.lines().next().unwrap()).unwrap();
    let with = |key: &str, value: Value| {
        let mut record = first.clone();
        record[key] = value;
        record.to_string()
    };
    let broken = [
        with("image_rpath", json!("../../secret.png")),
        with("caption", json!("?!")),
        with("elems", json!([{ "bb": [100, 0, 300, 5], "caption": "a shape" }])),
        "{".to_owned(),
    ];
    fs::write(dir.join("world/broken.jsonl"), whole + &broken.join("\n")).unwrap();
    let output = xvlm(dir, "data check world/broken.jsonl --json");
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["records"], &report["broken"]), (&json!(3), &json!(4)), "{report}");
    let told = stderr(&output);
    for (line, reason) in [
        (4, "image_rpath"),
        (5, "caption[0]: expected a text with at least one word"),
        (6, "elems[0].bb"),
        (7, "expected JSON"),
    ] {
        let named = |told: &str| told.contains(&format!("broken.jsonl:{line}")) && told.contains(reason);
        assert!(told.lines().any(named), "{line}: {told}");
    }
    assert!(told.contains("error: expected at most 0 of the records to be broken, found 4 of 7"), "{told}");
    let enough = json(dir, "data check world/broken.jsonl --max-bad-fraction 0.6 --no-images");
    assert_eq!(enough["broken"], json!(3), "boxes are not held against the image: {enough}");
    refused(dir, "data check no/such.jsonl", &["no/such.jsonl"]);
    refused(dir, "data inspect world/nlvr.json", &["nlvr.json"]);
}
