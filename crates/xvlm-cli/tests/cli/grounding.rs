//! `xvlm ground --heat` and `xvlm eval grounding`, on small files in the forms of the original and of VLUE.

use std::fs;
use std::path::Path;

use serde_json::Value;
use xvlm::Picture;

use super::{folder, is_probability, json, names, refused, text, xvlm};

fn write(dir: &Path, name: &str, content: &Value) {
    fs::write(dir.join(name), content.to_string()).unwrap();
}

#[test]
fn pictures_are_heated() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 2 --seed 5");
    let image = "--model model --image data/images/000000.png";
    let phrases = "--text the~red~circle --text a~star";
    let found = json(dir, &format!("ground {image} {phrases} --heat --grid --draw heat.png"));
    let results = found[0]["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for result in results {
        let rows = result["heat"].as_array().unwrap();
        assert!(rows.len() == 2 && rows.iter().all(|row| row.as_array().unwrap().len() == 2), "{result}");
        assert!(is_probability(&result["probability"]), "{result}");
        let inside = |value: &Value| (0.0..=192.0).contains(&value.as_f64().unwrap());
        assert!(inside(&result["point"][0]) && inside(&result["point"][1]), "{result}");
        assert!(["xmin", "ymin", "xmax", "ymax"].iter().all(|edge| inside(&result["box"][edge])), "{result}");
    }
    // A panel for each phrase, enlarged, with a gap between them.
    let drawn = Picture::open(&dir.join("heat.png")).unwrap();
    assert_eq!((drawn.width(), drawn.height()), (2 * 384 + 8, 384));
    assert!(json(dir, &format!("ground {image} {phrases} --heat"))[0]["results"][0].get("heat").is_none());

    let images = format!("{image} data/images/000001.png");
    text(dir, &format!("ground {images} {image_again} {phrases} --draw drawn", image_again = "data/images/000000.png"));
    assert_eq!(names(&dir.join("drawn")), ["000000-2.png", "000000.png", "000001.png"]);
    text(dir, &format!("ground {images} --text a~star --heat --layer 1 --draw heat"));
    assert_eq!(names(&dir.join("heat")), ["000000.png", "000001.png"]);
    // What a folder has happens to be one picture.
    fs::create_dir(dir.join("one")).unwrap();
    fs::copy(dir.join("data/images/000000.png"), dir.join("one/a.png")).unwrap();
    text(dir, "ground --model model --images one --text a~star --draw of-one");
    assert_eq!(names(&dir.join("of-one")), ["a.png"]);
    refused(dir, "ground --model model --images one --text a~star --draw a.png", &["--draw: expected a folder"]);
    refused(dir, &format!("ground {images} --text a~star --draw heat.png"), &["--draw: expected a folder"]);
    refused(dir, &format!("ground {image} --text a~star --heat --layer 0"), &["layer", "1 to 1, found 0"]);

    write(
        dir,
        "boxes.json",
        &json!({"000000": [[0, 0, 96, 96, 0.9], [1, 1, 0, 9], [96, 96, 96, 96]], "000001.png": []}),
    );
    let found = json(dir, &format!("ground {image} --text a~star --heat --proposals boxes.json"));
    let result = &found[0]["results"][0];
    let ranked = result["proposals"].as_array().unwrap();
    assert_eq!((ranked.len(), &ranked[0]["box"]), (2, &result["box"]));
    assert!(ranked[0]["score"].as_f64() >= ranked[1]["score"].as_f64(), "{result}");
    let arguments = format!("ground {images} --text a~star --heat --proposals boxes.json");
    refused(dir, &arguments, &["boxes.json: expected boxes for each picture, found none for data/images/000001.png"]);
}

#[test]
fn the_built_in_world_is_scored() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 3 --seed 5");
    let boxes = json(dir, "eval grounding --model model --data data --out boxes");
    let weak = json(dir, "eval grounding --model model --data data --weak --out weak");
    assert_eq!((&weak["count"], &weak["proposals"]), (&boxes["count"], &json!(false)));
    assert!(weak["pointing"].is_number() && weak["accuracy@0.5"].is_number(), "{weak}");
    for (folder, result, answers) in [("boxes", "grounding.json", "boxes.jsonl"), ("weak", "heat.json", "heat.jsonl")] {
        let mut expected = [answers, result];
        expected.sort_unstable();
        assert_eq!(names(&dir.join(folder)), expected);
        let results: Vec<Value> = serde_json::from_slice(&fs::read(dir.join(folder).join(result)).unwrap()).unwrap();
        assert_eq!(json!(results.len()), boxes["count"]);
        assert!(results.iter().all(|line| line["ref_id"].is_string() && line["bbox"].as_array().unwrap().len() == 4));
    }
    // What is there already is not asked again, and boxes to choose from need no other heat.
    assert_eq!(json(dir, "eval grounding --model model --data data --weak --out weak --resume"), weak);
    let scene = |boxes: Value| json!({"0": boxes, "1": boxes, "2": boxes});
    write(dir, "dets.json", &scene(json!([[0, 0, 96, 192], [96, 0, 96, 192]])));
    let chosen = json(dir, "eval grounding --model model --data data --weak --layer 1 --proposals dets.json");
    assert_eq!((&chosen["proposals"], &chosen["count"]), (&json!(true), &boxes["count"]));
    write(dir, "dets.json", &json!({"0": [[0, 0, 96, 192]]}));
    let few = "eval grounding --model model --data data --weak --proposals dets.json --max-bad-fraction";
    refused(
        dir,
        &format!("{few} 0.1"),
        &[" are broken, more than 10.0 %", "expected boxes of a detector to choose from"],
    );
    let scored = json(dir, &format!("{few} 0.9"));
    assert_eq!(
        scored["left_out"].as_array().unwrap().len() as u64 + scored["count"].as_u64().unwrap(),
        boxes["count"].as_u64().unwrap()
    );
    refused(dir, "eval grounding --model model --data data --layer 1", &["--layer: expected --weak"]);
}

#[test]
fn vlue_is_scored_by_its_presets() {
    let dir = folder();
    let dir = dir.path();
    fs::create_dir_all(dir.join("marvl/id/images")).unwrap();
    fs::create_dir_all(dir.join("marvl/sw/images")).unwrap();
    let png =
        Picture::from_rgb(60, 40, (0..60 * 40 * 3).map(|i| (i * 7 % 256) as u8).collect()).unwrap().to_png().unwrap();
    for image in ["id/images/5-1.jpg", "sw/images/5-1.jpg"] {
        fs::write(dir.join("marvl").join(image), &png).unwrap();
    }
    let item = |ref_id: u32, image: &str, text: &str| {
        json!({"ref_id": ref_id, "image": image, "text": text, "bbox": [10, 5.5, 30, 20], "height": 40, "width": 60,
               "dets": [[10, 5, 30, 20], [0, 0, 60, 40]]})
    };
    let good = [item(0, "id/images/5-1.jpg", "the red circle"), item(1, "sw/images/5-1.jpg", "a star")];
    write(dir, "test.json", &json!(good));
    let files = "--set task.test_file=test.json --set task.image_root=marvl";
    let boxes = json(dir, &format!("eval grounding --model model --preset vlue-bbox {files} --as-original"));
    assert_eq!((&boxes["count"], &boxes["data"]), (&json!(2), &json!("preset vlue-bbox")));
    let weak = json(dir, &format!("eval grounding --model model --preset vlue-grounding-weak {files} --layer 1"));
    assert_eq!((&weak["count"], &weak["proposals"]), (&json!(2), &json!(true)));
    // The preset's layer is one of the base model.
    let arguments = format!("eval grounding --model model --preset vlue-grounding-weak {files}");
    refused(dir, &arguments, &["layer: expected a layer with cross attention, 1 to 1, found 9"]);

    let mut large = item(2, "sw/images/5-1.jpg", "a star");
    large["width"] = json!(61);
    write(dir, "test.json", &json!([good[0], large]));
    let arguments = format!("eval grounding --model model --preset vlue-bbox {files}");
    refused(
        dir,
        &arguments,
        &["sw/images/5-1.jpg: size: expected 61 x 40 pixels, as annotated for reference 2, found 60 x 40"],
    );
    let output = xvlm(dir, &format!("{arguments} --max-bad-fraction 0.5"));
    assert!(
        output.status.success() && super::stderr(&output).contains("left out: item 1: "),
        "{}",
        super::stderr(&output)
    );
    refused(
        dir,
        "eval grounding --model model --preset vlue-vqa",
        &["--preset: expected a configuration for this task"],
    );
}
