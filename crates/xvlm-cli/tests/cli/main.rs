//! The built program, with a tiny untrained model: what it prints and writes, and what it refuses.

mod captions;
mod data;
mod grounding;
#[cfg(unix)]
mod interrupted;
mod precision;
mod questions;
#[cfg(feature = "mpi")]
mod ranks;
mod score;
mod searching;
mod sets;
mod training;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm::data::{TextTokenizer, scenes};
use xvlm::tasks::pretrain::Pretraining;
use xvlm::tasks::{Model, ModelConfig};
use xvlm::train::Trainable;
use xvlm::weights::StoredType;
use xvlm::{Device, Picture};

/// Sizes of the smallest model that makes sense.
fn sizes(vocab_size: usize) -> Value {
    json!({
        "vision_config": {
            "kind": "swin",
            "image_res": 32, "patch_size": 8, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
        },
        "text_config": {
            "vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "fusion_layer": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 48,
        },
        "embed_dim": 16,
    })
}

/// A folder with an untrained model (`model`), and one whose model lacks a tensor (`lacking`).
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = TextTokenizer::from_vocabulary(&scenes::vocabulary()).unwrap();
    let model = serde_json::from_value(sizes(tokenizer.vocab_size())).unwrap();
    let pretraining = Pretraining::new(&model, 7, &Device::Cpu).unwrap();
    let config = ModelConfig { max_words: 40, ..ModelConfig::of(model) };
    let write = |name: &str, without: usize| {
        let parameters = pretraining.parameters().iter().skip(without);
        let weights = parameters.map(|(name, parameter)| (name.clone(), parameter.as_detached_tensor()));
        Model::write(&dir.path().join(name), &config, weights, &tokenizer, StoredType::F32).unwrap();
    };
    write("model", 0);
    write("lacking", 1);
    dir
}

/// Runs `xvlm` in a folder; arguments are separated by spaces, `~` stands for a space in one.
fn xvlm(dir: &Path, arguments: &str) -> Output {
    let arguments = arguments.split_whitespace().map(|argument| argument.replace('~', " "));
    Command::new(env!("CARGO_BIN_EXE_xvlm")).current_dir(dir).args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Runs a command that must succeed; its stdout.
fn text(dir: &Path, arguments: &str) -> String {
    let output = xvlm(dir, arguments);
    assert!(output.status.success(), "{arguments}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that must print one JSON document and nothing else.
fn json(dir: &Path, arguments: &str) -> Value {
    let text = text(dir, &format!("{arguments} --json"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments}: {error}: {text}"))
}

/// Runs a command that must fail: with exit code 1, one message, and nothing on stdout.
fn refused(dir: &Path, arguments: &str, expected: &[&str]) {
    let output = xvlm(dir, arguments);
    let stderr = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{arguments}: {stderr}");
    assert!(output.stdout.is_empty(), "{arguments}: {}", String::from_utf8_lossy(&output.stdout));
    assert!(stderr.contains("error: ") && !stderr.contains("panicked"), "{arguments}: {stderr}");
    for part in expected {
        assert!(stderr.contains(part), "{arguments}: expected {part:?} in {stderr}");
    }
}

fn is_probability(value: &Value) -> bool {
    value.as_f64().is_some_and(|value| (0.0..=1.0).contains(&value))
}

/// Names of what is in a folder.
fn names(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

#[test]
fn synth_writes_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let written = json(dir, "synth --out a/b --scenes 3 --seed 5");
    assert_eq!(written, json!({ "out": "a/b", "scenes": 3, "seed": 5, "unseen": false }));
    assert!(text(dir, "synth --out c --scenes 3 --seed 5").contains("3 scenes in c"));
    for file in ["grounding.json", "pretrain.jsonl", "images/000002.png"] {
        assert_eq!(
            fs::read(dir.join("a/b").join(file)).unwrap(),
            fs::read(dir.join("c").join(file)).unwrap(),
            "{file}"
        );
    }
    text(dir, "synth --out d --scenes 3 --seed 5 --unseen --embed-images");
    assert!(fs::read_to_string(dir.join("d/pretrain.jsonl")).unwrap().contains("\"binary\""));
    assert_ne!(fs::read(dir.join("c/scenes.json")).unwrap(), fs::read(dir.join("d/scenes.json")).unwrap());
    refused(dir, "synth --out c --scenes 3 --seed 5", &["out", "empty", "found c"]);
}

#[test]
fn pictures_can_be_asked_about() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 2 --seed 5");
    let images = "--model model --image data/images/000000.png data/images/000001.png";
    let image = "--model model --image data/images/000000.png";

    let found = json(dir, &format!("ground {image} --text the~red~circle --text a~star --draw drawn.png"));
    assert_eq!((&found[0]["image"], &found[0]["width"]), (&json!("data/images/000000.png"), &json!(192)));
    let results = found[0]["results"].as_array().unwrap();
    assert_eq!((results.len(), &results[1]["text"]), (2, &json!("a star")));
    for result in results {
        let [xmin, ymin, xmax, ymax] =
            ["xmin", "ymin", "xmax", "ymax"].map(|edge| result["box"][edge].as_f64().unwrap());
        assert!(0.0 <= xmin && xmin <= xmax && xmax <= 192.0, "{result}");
        assert!(0.0 <= ymin && ymin <= ymax && ymax <= 192.0, "{result}");
        assert!(is_probability(&result["probability"]), "{result}");
    }
    let [drawn, plain] = ["drawn.png", "data/images/000000.png"].map(|file| Picture::open(&dir.join(file)).unwrap());
    assert_eq!((drawn.width(), drawn.height()), (plain.width(), plain.height()));
    assert_ne!(drawn.rgb(), plain.rgb());
    let table = text(dir, &format!("ground {image} --text a~star"));
    assert!(table.contains("1  a star") && table.contains(" %"), "{table}");

    let captions = json(dir, &format!("caption {images} --beams 2"));
    assert_eq!(captions.as_array().unwrap().len(), 2);
    assert!(captions[1]["results"][0]["text"].is_string());
    assert!(text(dir, &format!("caption {images}")).starts_with("data/images/000000.png: "));

    let answers = json(dir, &format!("answer {image} --text is~there~a~star?"));
    assert_eq!(answers[0]["results"][0]["question"], "is there a star?");
    assert!(answers[0]["results"][0]["answer"].is_string());

    let matches = json(dir, &format!("match {images} --text a~star --text a~ring"));
    assert!(is_probability(&matches[1]["results"][1]["probability"]), "{matches}");
    assert!(matches[0]["results"][0]["similarity"].as_f64().unwrap().abs() <= 1.001);
    assert!(text(dir, &format!("match {images} --text a~star")).contains("cosine"));

    let filled = json(dir, &format!("fill {image} --text a~___~star --text a~[MASK]~ring --top 3"));
    assert_eq!(filled[0]["results"][0]["completions"].as_array().unwrap().len(), 3);
    assert!(is_probability(&filled[0]["results"][1]["completions"][2]["probability"]));
    assert!(text(dir, &format!("fill {image} --text a~___~star")).starts_with("a ___ star\n"));
}

#[test]
fn eval_scores_every_task() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 3 --seed 5");
    for (task, keys) in [
        ("grounding", vec!["accuracy@0.5", "mean_iou"]),
        ("retrieval", vec!["text_r1", "text_r5", "text_r10", "image_r1", "image_r5", "image_r10"]),
        ("fill", vec!["top1"]),
        ("captioning", vec!["right"]),
        ("vqa", vec!["right"]),
    ] {
        let scores = json(dir, &format!("eval {task} --model model --data data"));
        assert_eq!(
            (&scores["task"], &scores["model"], &scores["data"]),
            (&json!(task), &json!("model"), &json!("data"))
        );
        for key in keys {
            let score = scores[key].as_f64();
            assert!(score.is_some_and(|score| (0.0..=100.0).contains(&score)), "{task}: {key}: {scores}");
        }
        assert!(text(dir, &format!("eval {task} --model model --data data")).contains(" %"));
    }
}

#[test]
fn demo_writes_a_page_and_the_scores() {
    let dir = folder();
    let dir = dir.path();
    let scores = json(dir, "demo --model model --scenes 3 --out demo");
    assert_eq!(names(&dir.join("demo")), ["data", "data-unseen", "report.html", "scores.json"]);
    let written = fs::read_to_string(dir.join("demo/scores.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), scores);
    for (task, key) in [
        ("grounding", "accuracy@0.5"),
        ("grounding_unseen", "accuracy@0.5"),
        ("retrieval", "image_r1"),
        ("caption", "right"),
        ("questions", "right"),
        ("fill", "top1"),
    ] {
        assert!(scores[task][key].is_number(), "{task}: {scores}");
    }
    assert_eq!(scores["precision"], "f32");
    let page = fs::read_to_string(dir.join("demo/report.html")).unwrap();
    assert!(page.contains("Model: model, in f32."));
    assert_eq!(page.matches("<article").count(), 3 + 2);
    assert!(!page.contains("NaN") && !page.contains("src=\"http") && !page.contains("href=\"http"));

    // Scenes that are not the demo's are left alone.
    text(dir, "synth --out own/data --scenes 1 --seed 5");
    refused(dir, "demo --model model --scenes 3 --out own", &["own/data", "something else in it"]);
    assert_eq!(names(&dir.join("own")), ["data"]);

    // Once more, in the same place: the same scores.
    assert!(text(dir, "demo --model model --scenes 3 --out demo").contains("Find the box of a phrase"));
    assert_eq!(fs::read_to_string(dir.join("demo/scores.json")).unwrap(), written);
}

#[test]
fn presets_are_listed_and_printed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let list = json(dir, "presets");
    let list = list.as_array().unwrap();
    let entry = list.iter().find(|entry| entry["name"] == "vqa-480").unwrap();
    let expected = json!({
        "name": "vqa-480", "task": "vqa", "image_res": 480, "data": "VQA v2, VG questions", "official": "VQA_480.yaml",
    });
    assert_eq!(*entry, expected);
    let lines = text(dir, "presets");
    assert_eq!(lines.lines().count(), list.len());
    assert!(lines.lines().any(|line| line.split_whitespace().eq(["refcoco-bbox", "bbox", "384", "px", "RefCOCO+"])));

    let yaml = text(dir, "presets refcoco-bbox");
    assert!(yaml.starts_with("# ") && yaml.contains("name: bbox"), "{yaml}");
    assert_eq!(json(dir, "presets refcoco-bbox")["task"]["name"], "bbox");
    assert_eq!(json(dir, "presets base-16m")["train"]["epochs"], 38);
    refused(dir, "presets refcoco-box", &["unknown preset `refcoco-box`", "did you mean `refcoco-bbox`?"]);
    let expected = ["pre-training (scenes-align, ", "refcoco-bbox, which is for fine-tuning (bbox)"];
    refused(dir, "pretrain --preset refcoco-bbox --out run", &expected);
    refused(dir, "pretrain --preset refcoco-bbox --print-config", &expected);
}

#[test]
fn bad_pictures_and_texts_are_refused() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 1 --seed 5");
    fs::write(dir.join("corrupt.png"), &fs::read(dir.join("data/images/000000.png")).unwrap()[..60]).unwrap();
    fs::write(dir.join("text.png"), "no picture").unwrap();
    let before = names(dir);
    let good = "--model model --image data/images/000000.png";

    for (arguments, expected) in [
        ("ground --model model --text a~star --draw out.png --image none.png", "none.png"),
        ("ground --model model --text a~star --draw out.png --image corrupt.png", "corrupt.png"),
        ("caption --model model --image data/images/000000.png text.png", "text.png"),
        ("caption --model model --image data", "data"),
    ] {
        refused(dir, arguments, &[expected]);
    }
    for command in ["ground", "match", "answer"] {
        refused(dir, &format!("{command} {good} --text a~star --text ~"), &["--text", "at least one word", "\" \""]);
    }
    refused(dir, &format!("ground {good} --text a~star --text ... --draw out.png"), &["--text", "..."]);
    refused(dir, &format!("fill {good} --text a~star"), &["a star", "at least one blank", "found none"]);
    refused(dir, &format!("fill {good} --text ___~and~___ --answer red"), &["expected 2 answers", "found 1"]);
    refused(dir, &format!("fill {good} --text a~___ --text the~___ --answer red"), &["--text", "one", "2 of them"]);
    refused(dir, &format!("match {good} --text a~star --box 0,0,500,10"), &["box 0", "192x192", "500"]);
    refused(
        dir,
        &format!("ground {good} text.png --text a~star --draw out.png"),
        &["--draw: expected a folder, unless there is one --image, found out.png"],
    );
    refused(dir, &format!("ground {good} --text a~star --draw none/out.png"), &["none/out.png"]);
    refused(dir, &format!("caption {good} --device gpu"), &["device", "gpu"]);
    assert_eq!(names(dir), before);
}

#[test]
fn bad_models_are_refused() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 1 --seed 5");
    let ask = |model: &str| format!("caption --image data/images/000000.png --model {model}");
    refused(dir, &ask("none"), &["none/config.json"]);
    let (name, _) = {
        let config = serde_json::from_value(sizes(8)).unwrap();
        Pretraining::new(&config, 0, &Device::Cpu).unwrap().parameters()[0].clone()
    };
    refused(dir, &ask("lacking"), &["lacking/model.safetensors", &name]);
    refused(dir, "demo --model lacking --scenes 2 --out demo", &["lacking", &name]);
    assert!(!dir.join("demo").exists());

    let weights = fs::read(dir.join("model/model.safetensors")).unwrap();
    fs::write(dir.join("model/model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    refused(dir, &ask("model"), &["model/model.safetensors"]);
    fs::write(dir.join("model/config.json"), "{}").unwrap();
    fs::write(dir.join("model/model.safetensors"), weights).unwrap();
    refused(dir, &ask("model"), &["model/config.json", "model"]);
}

#[test]
fn bad_data_and_configurations_are_refused() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 2 --seed 5");
    for (task, file) in [
        ("grounding", "grounding.json"),
        ("retrieval", "retrieval.json"),
        ("fill", "fill.json"),
        ("captioning", "captions.json"),
    ] {
        refused(dir, &format!("eval {task} --model model --data none"), &[&format!("none/{file}")]);
    }
    let grounding = fs::read_to_string(dir.join("data/grounding.json")).unwrap();
    let mut items: Value = serde_json::from_str(&grounding).unwrap();
    items[1]["bbox"] = json!([180, 180, 50, 50]);
    fs::write(dir.join("data/grounding.json"), items.to_string()).unwrap();
    refused(
        dir,
        "eval grounding --model model --data data",
        &["data/grounding.json", "bbox", "[180.0, 180.0, 50.0, 50.0]"],
    );
    let mut items: Value = serde_json::from_str(&grounding).unwrap();
    items[0]["width"] = json!(200);
    fs::write(dir.join("data/grounding.json"), items.to_string()).unwrap();
    refused(
        dir,
        "eval grounding --model model --data data",
        &["data/images/000000.png: size: expected 200 x 192 pixels", "found 192 x 192"],
    );
    fs::write(dir.join("data/grounding.json"), &grounding[..grounding.len() / 2]).unwrap();
    refused(dir, "eval grounding --model model --data data", &["data/grounding.json"]);
    fs::remove_file(dir.join("data/images/000001.png")).unwrap();
    refused(dir, "eval fill --model model --data data", &["data/images/000001.png"]);

    for (task, file) in [
        ("grounding", "grounding"),
        ("retrieval", "retrieval"),
        ("fill", "fill"),
        ("captioning", "captions"),
        ("vqa", "vqa"),
        ("nlvr", "nlvr"),
    ] {
        fs::write(dir.join(format!("data/{file}.json")), "[]").unwrap();
        let expected = format!("data/{file}.json: expected at least one item, found none");
        refused(dir, &format!("eval {task} --data data"), &[&expected]);
    }

    fs::write(dir.join("unknown.yaml"), "train_file: []\nmodell: {}\n").unwrap();
    for (arguments, expected) in [
        ("--config none.yaml", vec!["none.yaml"]),
        ("--config unknown.yaml", vec!["unknown.yaml", "modell", "did you mean `model`?"]),
        ("--preset scene", vec!["scene", "did you mean `scenes`?"]),
        ("--preset scenes --set data.batchsize=3", vec!["batchsize", "did you mean `batch_size`?"]),
        ("--preset scenes --set data", vec!["--set data"]),
        ("--preset scenes", vec!["train_file"]),
        ("--preset scenes --set objectives=[box]", vec!["preset scenes", "objectives", "itc", "found [box]"]),
        ("--preset scenes --set data.batch_size=0", vec!["preset scenes", "data.batch_size", "at least 1", "found 0"]),
        ("--preset scenes --set train.optimizer.lr=-1", vec!["preset scenes", "train.optimizer.lr", "found -1"]),
        ("--preset scenes --set model.embed_dim=0", vec!["preset scenes", "model.embed_dim", "found 0"]),
        ("--preset scenes --set data.resolution=64", vec!["resolution"]),
        ("--preset scenes --set train_file=[none.jsonl]", vec!["none.jsonl"]),
    ] {
        refused(dir, &format!("pretrain --out run {arguments}"), &expected);
        assert!(!dir.join("run").exists(), "{arguments}");
    }
    refused(dir, "demo --seed 1 --out demo", &["--seed", "never trained on"]);
    refused(dir, "demo --train --minutes 0 --out demo", &["time_limit_minutes"]);
    assert!(!dir.join("demo").exists());
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        "",
        "grond",
        "ground --text a~star",
        "ground --image a.png",
        "match --image a.png --text a --box 1,2,3",
        "search --index a",
        "fill --file a.jsonl",
        "pretrain --out run",
        "pretrain --out run --config a.yaml --preset scenes",
        "pretrain --out run --preset scenes --print-config",
        "pretrain --preset scenes --dry-run --ranks alone",
        "finetune nlvr --preset scenes-nlvr2 --dry-run --resume",
        "finetune nlvr --preset scenes-nlvr2 --processes 2",
        "eval nlvr",
        "judge --images a.png --text it",
        "synth --out data --scenes 0 --seed 1",
        "demo --minutes 3",
        "demo --train --model model",
    ] {
        assert_eq!(xvlm(dir.path(), arguments).status.code(), Some(2), "{arguments}");
    }
    for command in [
        "demo", "ground", "caption", "alt", "answer", "match", "fill", "judge", "embed", "search", "eval", "score",
        "synth", "pretrain", "finetune",
    ] {
        assert!(text(dir.path(), &format!("{command} --help")).contains("Usage: xvlm"), "{command}");
    }
}
