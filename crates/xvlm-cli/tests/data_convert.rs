//! `xvlm data convert`, from published annotations to shards that the library reads.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm::Picture;
use xvlm::data::read_jsonl;

/// Runs `xvlm data convert` in a folder; arguments are separated by spaces.
fn convert(dir: &Path, arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xvlm"));
    command.current_dir(dir).args(["data", "convert"]).args(arguments.split_whitespace()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The report of a conversion that must succeed.
fn report(dir: &Path, arguments: &str) -> Value {
    let output = convert(dir, &format!("{arguments} --json"));
    assert!(output.status.success(), "{arguments}: {}", stderr(&output));
    assert!(stderr(&output).contains("converting: "), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

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
    let arguments = "coco --captions captions.json --instances instances.json --images images --records-per-shard 4 \
                     --exclude ids.txt --out out --workers 1";
    let written = report(dir, arguments);
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
    assert_eq!(report_again(dir, arguments), written);
    let text = convert(dir, arguments);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("coco in out") && text.contains("missing images"), "{text}");
    let other = convert(dir, &format!("{arguments} --shuffle 1"));
    assert!(!other.status.success());
    assert!(stderr(&other).contains("out: expected out: shards of the same settings"), "{}", stderr(&other));
}

fn report_again(dir: &Path, arguments: &str) -> Value {
    let output = convert(dir, &format!("{arguments} --json"));
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn rows_need_names_of_images() {
    let dir = folder();
    let dir = dir.path();
    let written =
        report(dir, "cc3m --annotations rows.tsv --names {name} --images images --out cc --format tar --compress gzip");
    assert_eq!(written["images"], json!(1));
    assert!(dir.join("cc/cc3m-00000.tar.gz").is_file());
    let wrong = convert(dir, "cc3m --annotations rows.tsv --names {url} --images images --out wrong");
    assert!(stderr(&wrong).contains("{row}, {line}, {name}"), "{}", stderr(&wrong));
    let nothing = convert(dir, "cc12m --annotations rows.tsv --names {md5}.jpg --images images --out nothing");
    assert!(!nothing.status.success());
    assert!(stderr(&nothing).contains("2: missing images"), "{}", stderr(&nothing));
    for set in ["visual-genome", "sbu", "objects365", "open-images", "flickr30k", "karpathy"] {
        let help = convert(dir, &format!("{set} --help"));
        assert!(help.status.success(), "{set}: {}", stderr(&help));
    }
}
