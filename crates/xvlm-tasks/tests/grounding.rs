//! Evaluation of grounding on files in their published forms, with a tiny untrained model.

use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm_data::annotations::Reason;
use xvlm_data::{Picture, TextTokenizer, scenes};
use xvlm_encoders::XvlmConfig;
use xvlm_tasks::finetune::{BboxTask, FinetuneTask, WeakGroundingTask};
use xvlm_tasks::grounding::{
    BoxOptions, Evaluation, Layers, TestSet, WeakEvaluation, WeakOptions, evaluate, evaluate_weakly, ground, heat,
    heat_maps, write_results,
};
use xvlm_tasks::pretrain::Pretraining;
use xvlm_tasks::{Compute, FinetuneConfig, ImageTokens, Model, ModelConfig, Precision, Sweep, TaskError, Texts};
use xvlm_train::Trainable;
use xvlm_weights::StoredType;

const CPU: candle_core::Device = candle_core::Device::Cpu;

/// An untrained model for pre-training, which has every head; its layers 1 and 2 have cross attention.
fn model() -> Model {
    model_in(Precision::F32)
}

fn model_in(precision: Precision) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = TextTokenizer::from_vocabulary(&scenes::vocabulary()).unwrap();
    let sizes: XvlmConfig = serde_json::from_value(json!({
        "vision_config": {
            "kind": "swin",
            "image_res": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
        },
        "text_config": {
            "vocab_size": tokenizer.vocab_size(), "hidden_size": 16, "num_hidden_layers": 3, "fusion_layer": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 48,
        },
        "embed_dim": 16,
    }))
    .unwrap();
    let pretraining = Pretraining::new(&sizes, 7, &CPU).unwrap();
    let weights = pretraining.parameters().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
    Model::write(dir.path(), &ModelConfig::of(sizes), weights, &tokenizer, StoredType::F32).unwrap();
    Model::open(dir.path(), Compute::on(&CPU).with(precision)).unwrap()
}

fn picture(width: u32, height: u32, seed: u32) -> Picture {
    let bytes = (0..width * height * 3).map(|i| ((i * 37 + seed * 101) % 251) as u8);
    Picture::from_rgb(width, height, bytes.collect()).unwrap()
}

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, content).unwrap();
    path
}

/// RefCOCO+ in the folders of the original: three phrases of two references (`refs(unc).p` is that of the reader's tests), of
/// which the first is of the training split.
fn refcoco() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../xvlm-data/tests/golden/refs_python2_2.p");
    write(dir.path(), "data/refcoco+/refs(unc).p", std::fs::read(golden).unwrap());
    let image =
        |id: u32| json!({"id": id, "file_name": format!("COCO_train2014_{id:012}.jpg"), "height": 80, "width": 100});
    let instances = json!({
        "images": [image(42), image(43)],
        "annotations": [
            {"id": 7, "image_id": 42, "bbox": [10.5, 20, 30, 40]},
            {"id": 8, "image_id": 43, "bbox": [0, 0, 100, 80]},
        ],
    });
    write(dir.path(), "data/refcoco+/instances.json", instances.to_string());
    for id in [42, 43] {
        let png = picture(100, 80, id).to_png().unwrap();
        write(dir.path(), &format!("images/train2014/COCO_train2014_{id:012}.jpg"), png);
    }
    let item = |ref_id: u32, image: u32, text: &str| json!({"image": format!("train2014/COCO_train2014_{image:012}.jpg"), "text": text, "ref_id": ref_id});
    let list = json!([item(12, 43, "the man"), item(11, 42, "the red cup"), item(12, 43, "man on the left")]);
    write(dir.path(), "data/refcoco+_test.json", list.to_string());
    write(dir.path(), "data/refcoco+/dets.json", json!({"43": [[0, 0, 50, 50], [1, 1, 99, 79, 0.5]]}).to_string());
    dir
}

fn overrides(values: &[(&str, String)]) -> Vec<String> {
    values.iter().map(|(key, value)| format!("task.{key}={value}")).collect()
}

fn bbox(values: &[(&str, String)]) -> BboxTask {
    match FinetuneConfig::preset("refcoco-bbox", &overrides(values)).unwrap().task {
        FinetuneTask::Bbox(task) => task,
        other => panic!("{other:?}"),
    }
}

fn weak(preset: &str, values: &[(&str, String)]) -> WeakGroundingTask {
    match FinetuneConfig::preset(preset, &overrides(values)).unwrap().task {
        FinetuneTask::WeakGrounding(task) => task,
        other => panic!("{other:?}"),
    }
}

fn paths(dir: &Path) -> Vec<(&'static str, String)> {
    let path = |name: &str| dir.join(name).display().to_string();
    vec![("test_file", path("data/refcoco+_test.json")), ("refcoco_data", path("data")), ("image_root", path("images"))]
}

fn boxes(model: &Model, set: TestSet, options: &BoxOptions) -> Result<Evaluation, TaskError> {
    evaluate(model, set.items, options, &mut Sweep::new(&mut |_, _| {}))
}

fn weakly(model: &Model, set: TestSet, max_bad_fraction: f64) -> Result<WeakEvaluation, TaskError> {
    let options = WeakOptions { layers: Layers::One(2), ..WeakOptions::default() };
    let mut counter = |_, _| {};
    let mut sweep = Sweep { max_bad_fraction, ..Sweep::new(&mut counter) };
    evaluate_weakly(model, set.items, &options, &mut sweep)
}

#[test]
fn what_leaves_a_bf16_model_is_f32() {
    let model = model_in(Precision::Bf16);
    let images = model.encode(&[picture(40, 30, 1)]).unwrap();
    assert_eq!(images.tensor().dtype(), DType::BF16);
    let texts = Texts {
        ids: Tensor::new(&[[2u32, 5, 6]], &CPU).unwrap(),
        mask: Tensor::ones((1, 3), DType::F32, &CPU).unwrap(),
    };
    let heat = heat(model.xvlm(), &images, &texts, &[0], 2).unwrap();
    for tensor in [&heat.attention, &heat.gradient, &heat.match_logits, &heat.map] {
        assert_eq!(tensor.dtype(), DType::F32);
    }
    assert_eq!(heat.attention.dims(), heat.gradient.dims());
}

#[test]
fn refcoco_is_scored_by_split() {
    let (model, dir) = (model(), refcoco());
    let set = TestSet::of_boxes(&bbox(&paths(dir.path())), 0.0).unwrap();
    assert_eq!(set.report.count(Reason::OtherSplit), 1);
    let done = boxes(&model, set.clone(), &BoxOptions::default()).unwrap();
    // The split of reference 12 in the published file.
    assert_eq!(done.scores.splits.keys().collect::<Vec<_>>(), ["testA"]);
    assert_eq!((done.scores.all.count, done.scores.splits["testA"]), (2, done.scores.all));
    assert_eq!(done.items.iter().map(|item| item.text.as_str()).collect::<Vec<_>>(), ["the man", "man on the left"]);

    let mut written = Vec::new();
    let options = BoxOptions::default();
    write_results(&done.items, done.boxes(&options).map(|bbox| (bbox, None)), &mut written).unwrap();
    let written: Value = serde_json::from_slice(&written).unwrap();
    assert_eq!((written.as_array().unwrap().len(), &written[1]["ref_id"]), (2, &json!(12)));
    let written: [f32; 4] = serde_json::from_value(written[1]["bbox"].clone()).unwrap();
    assert_eq!(written, done.answers[1].pixels(100, 80));

    // The published file itself, or its folder, tells the same.
    for data in ["data/refcoco+", "data/refcoco+/refs(unc).p"] {
        let mut values = paths(dir.path());
        values[1].1 = dir.path().join(data).display().to_string();
        assert_eq!(TestSet::of_boxes(&bbox(&values), 0.0).unwrap().items, set.items);
    }
    let mut values = paths(dir.path());
    values[0].1 = dir.path().join("data/refcoco+/refs(unc).p").display().to_string();
    let published = TestSet::of_boxes(&bbox(&values), 0.0).unwrap();
    assert_eq!((published.items.len(), published.items[0].ref_id.as_str()), (1, "12"));
    values[0].1 = paths(dir.path()).remove(0).1;
    values[1].1 = dir.path().join("images").display().to_string();
    let error = TestSet::of_boxes(&bbox(&values), 0.0).unwrap_err().to_string();
    assert!(
        error.contains(
            "images: task.refcoco_data: expected one of refs(unc).p, refs(umd).p, refs(google).p, here or in"
        ),
        "{error}"
    );
}

#[test]
fn a_box_may_be_scored_beyond_the_border_as_the_original_does() {
    let found = xvlm_tasks::grounding::Found { bounds: [0.9, 0.5, 0.4, 0.5], probability: None };
    for (pixels, expected) in
        [(found.pixels(100, 80), [70.0, 20.0, 30.0, 40.0]), (found.pixels_uncut(100, 80), [70.0, 20.0, 40.0, 40.0])]
    {
        assert!(pixels.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{pixels:?} {expected:?}");
    }
}

#[test]
fn proposals_come_from_the_detector_by_image() {
    let (model, dir) = (model(), refcoco());
    let mut values = paths(dir.path());
    let file = |name: &str| ("det_file", dir.path().join(name).display().to_string());
    values.push(file("data/refcoco+/dets.json"));
    let done = weakly(&model, TestSet::of_weak(&weak("grounding-weak", &values), 0.0).unwrap(), 0.0).unwrap();
    assert!(done.scores.proposals);
    assert_eq!((done.scores.all().count, done.scores.boxes.splits["testA"].count), (2, 2));
    for answer in &done.answers {
        let bbox = answer.bbox.unwrap();
        assert!(bbox == [0.0, 0.0, 50.0, 50.0] || bbox == [1.0, 1.0, 99.0, 79.0], "{bbox:?}");
    }
    write(dir.path(), "other.json", json!({"42": [[0, 0, 50, 50]]}).to_string());
    values.pop();
    values.push(file("other.json"));
    let error = TestSet::of_weak(&weak("grounding-weak", &values), 0.0).unwrap_err().to_string();
    assert!(
        error.contains("other.json: image_id: expected boxes for the images that are asked about, found none"),
        "{error}"
    );
}

/// VLUE's form, where the file has it all.
fn vlue(dir: &Path, items: Value) -> WeakGroundingTask {
    let list = write(dir, "refcoco+_bbox100_vlue_test.json", items.to_string());
    let values = [("test_file", list.display().to_string()), ("image_root", dir.join("marvl").display().to_string())];
    weak("vlue-grounding-weak", &values)
}

#[test]
fn what_is_broken_is_left_out_and_named() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    for (name, width) in [("id/1.png", 60), ("sw/1.png", 60), ("zh/1.png", 61)] {
        write(dir.path(), &format!("marvl/{name}"), picture(width, 40, width).to_png().unwrap());
    }
    let item = |ref_id: u32, image: &str, bbox: Value, dets: Value| {
        json!({"ref_id": ref_id, "image": image, "text": "the red circle", "bbox": bbox, "height": 40, "width": 60,
               "dets": dets})
    };
    let (bbox, dets) = (json!([1, 2, 30, 20]), json!([[1, 2, 30, 20], [20, 20, 20, 20]]));
    let good = item(0, "id/1.png", bbox.clone(), dets.clone());
    let task = vlue(
        dir.path(),
        json!([
            item(1, "zh/1.png", bbox.clone(), dets.clone()),
            good,
            item(2, "gone.png", bbox.clone(), dets.clone()),
            item(3, "sw/1.png", bbox.clone(), json!([[1, 2, 0, 5]])),
            item(4, "id/1.png", json!([50, 2, 30, 20]), dets.clone()),
            item(0, "sw/1.png", bbox.clone(), dets.clone()),
        ]),
    );
    let error = TestSet::of_weak(&task, 0.0).unwrap_err().to_string();
    assert!(error.contains("item 4: bbox: expected a box [x, y, w, h] inside the 60x40 image"), "{error}");
    let error = TestSet::of_weak(&task, 0.3).unwrap_err().to_string();
    assert!(error.contains("2 of 6 are broken, more than 30.0 %"), "{error}");
    let set = TestSet::of_weak(&task, 0.5).unwrap();
    assert_eq!((set.report.count(Reason::Malformed), set.report.count(Reason::DuplicateId)), (1, 1));
    assert!(weakly(&model, set.clone(), 0.0).is_err());
    let done = weakly(&model, set, 0.9).unwrap();
    assert_eq!((done.items.len(), done.scores.all().count), (1, 1));
    let told: Vec<_> = done.left_out.iter().map(|out| (out.item, out.problem.as_str())).collect();
    assert_eq!(told.iter().map(|(item, _)| *item).collect::<Vec<_>>(), [0, 2, 3]);
    for ((_, problem), expected) in told.iter().zip([
        "zh/1.png: size: expected 60 x 40 pixels, as annotated for reference 1, found 61 x 40",
        "gone.png",
        "sw/1.png, reference 3: expected boxes of a detector to choose from, found none",
    ]) {
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn a_heat_map_does_not_depend_on_what_else_is_asked() {
    let model = model();
    let images = model.encode(&[picture(60, 40, 1), picture(30, 40, 2)]).unwrap();
    let texts = [(1, "the red circle"), (0, "a star"), (1, "the large shape left of the small blue star")];
    let maps = heat_maps(&model, &images, &texts, Layers::All).unwrap();
    let layers = [1, 2].map(|layer| heat_maps(&model, &images, &texts, Layers::One(layer)).unwrap());
    for (row, &(image, text)) in texts.iter().enumerate() {
        let one = ImageTokens::new(images.tensor().narrow(0, image as usize, 1).unwrap());
        let alone = heat_maps(&model, &one, &[(0, text)], Layers::All).unwrap().remove(0);
        let largest = alone.values.iter().copied().fold(0.0, f32::max);
        assert!(largest > 0.0 && alone.values.iter().all(|&value| value >= 0.0), "{alone:?}");
        for (place, &value) in maps[row].values.iter().enumerate() {
            assert!((value - alone.values[place]).abs() < 1e-4 * largest, "{text}: {value} {}", alone.values[place]);
            let sum = layers[0][row].values[place] + layers[1][row].values[place];
            assert!((value - sum).abs() < 1e-5 * largest, "{text}: {value} {sum}");
        }
        let matched = model.match_pairs(&images, &[(image, text)]).unwrap()[0];
        assert!((maps[row].probability - matched).abs() < 1e-5, "{text}");
    }
    assert!(heat_maps(&model, &images, &[], Layers::All).unwrap().is_empty());
    let error = heat_maps(&model, &images, &texts, Layers::One(0)).unwrap_err().to_string();
    assert_eq!(error, "layer: expected a layer with cross attention, 1 to 2, found 0");
    assert!(ground(&model, &images, &texts).unwrap().iter().all(|found| found.probability.is_some()));
}
