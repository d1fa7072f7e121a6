//! `xvlm pretrain`, `xvlm finetune` and `xvlm plot`.

use std::fs;

use serde_json::Value;
use xvlm::Picture;

use super::{json, names, refused, sizes, stderr, text, xvlm};

#[test]
fn pretrain_leaves_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 8 --seed 5");
    let config = json!({
        "train_file": ["data/pretrain.jsonl"],
        "model": sizes(0),
        "data": { "batch_size": 4, "max_images": 2, "max_regions": 8, "regions_per_image": 3, "max_tokens": 40 },
        "train": { "iterations": 3, "log_every": 1 },
    });
    // JSON is YAML.
    fs::write(dir.join("tiny.yaml"), config.to_string()).unwrap();
    let report = json(dir, "pretrain --config tiny.yaml --out run --set train.iterations=2");
    assert_eq!((&report["iterations"], &report["model"]), (&json!(2), &json!("run/model")));
    assert!(report["losses"]["itc"].is_number(), "{report}");
    assert_eq!(fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap().lines().count(), 2);
    json(dir, "ground --model run/model --image data/images/000000.png --text a~star");
    let figure = Picture::open(&dir.join("run/losses.png")).unwrap();
    assert!(figure.width() > 600 && fs::read_to_string(dir.join("run/losses.svg")).unwrap().contains(">itc</text>"));
    assert_eq!(names(&dir.join("run/tensorboard")).len(), 1);
    if cfg!(target_os = "linux") {
        assert!(report["peak_memory_mib"].as_u64().unwrap() > 1, "{report}");
        assert!(fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap().contains("peak_memory_mib"));
    }

    refused(dir, "pretrain --config tiny.yaml --out run --set train.iterations=2", &["run", "resume"]);
    let report = json(dir, "pretrain --config tiny.yaml --out run --resume --set train.iterations=2");
    assert_eq!(report["iterations"], 2);
    let preset = text(dir, "pretrain --preset scenes --print-config");
    assert!(preset.contains("train_file: []") && preset.contains("# "), "{preset}");
    // What came of a file and of what was replaced in it is printed whole, and can be given back.
    let whole = text(dir, "pretrain --config tiny.yaml --set train.seed=7 --print-config");
    assert!(whole.contains("seed: 7") && whole.contains("max_bad_fraction: "), "{whole}");
    fs::write(dir.join("whole.yaml"), &whole).unwrap();
    assert_eq!(text(dir, "pretrain --config whole.yaml --print-config"), whole);
    assert!(text(dir, "pretrain --preset scenes --set train.seed=7 --print-config").contains("seed: 7"));
}

#[test]
fn a_dry_run_tells_what_a_run_will_be() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 8 --seed 5");
    let config = json!({
        "train_file": ["data/pretrain.jsonl"],
        "model": sizes(0),
        "regions": { "iter_perc": 0.5 },
        "data": {
            "batch_size": 4, "max_images": 2, "max_regions": 8, "regions_per_image": 3, "max_tokens": 40,
            "generation": { "questions_per_image": 1 },
        },
        "train": { "iterations": 10, "accumulate": 2, "schedule": { "warmup": 0.3 }, "ema_decay": 0.9 },
    });
    fs::write(dir.join("tiny.yaml"), config.to_string()).unwrap();
    let before = names(dir);
    let told = text(dir, "pretrain --config tiny.yaml --dry-run");
    for part in ["Parameters", "Memory of a process, estimated", "epochs", "[MASK]", "data/pretrain.jsonl:"] {
        assert!(told.contains(part), "{part} in {told}");
    }
    assert_eq!(names(dir), before, "nothing is left behind");

    let plan = json(dir, "pretrain --config tiny.yaml --dry-run --processes 3 --out plan");
    assert_eq!(names(&dir.join("plan")), ["first-batch.png"]);
    // Four pictures with captions, two with regions: a sheet of three by two.
    let sheet = Picture::open(&dir.join("plan/first-batch.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (3 * 36 + 4, 2 * 36 + 4));
    let parameters = &plan["parameters"];
    let number = |value: &Value| value.as_u64().unwrap();
    let sum = |values: &Value, of: fn(&Value) -> &Value| -> u64 {
        values.as_array().unwrap().iter().map(|value| of(value).as_u64().unwrap()).sum()
    };
    assert_eq!(sum(&parameters["parts"], |part| &part[1]), number(&parameters["total"]));
    assert_eq!(sum(&parameters["groups"], |group| &group["parameters"]), number(&parameters["trainable"]));
    let memory = &plan["memory"];
    assert_eq!(number(&memory["moments"]), 8 * number(&parameters["trainable"]));
    assert_eq!(number(&memory["ema"]), 4 * number(&parameters["trainable"]));
    assert!(number(&memory["activations_recomputed"]) < number(&memory["activations_kept"]));
    let streams = &plan["streams"];
    assert_eq!((&streams[0]["records"], &streams[0]["images_per_step"]), (&json!(8), &json!(4 * 2 * 3)));
    assert_eq!(streams[0]["epochs"], json!(10.0 * 24.0 / 8.0));
    assert_eq!(streams[1]["epochs"], json!(10.0 * 0.5 * 12.0 / 8.0));
    for stream in streams.as_array().unwrap() {
        let [largest, first] = ["flops_per_step", "flops_of_first_batch"].map(|key| stream[key].as_f64().unwrap());
        assert!(0.0 < first && first <= largest, "{stream}");
    }
    assert_eq!((&plan["schedule"]["warmup"], &plan["schedule"]["ranks"]), (&json!(3), &json!(3)));
    let first = &plan["first_batches"];
    assert_eq!((&first[0]["pictures"], &first[1]["texts"]), (&json!(4), &json!(8)));
    assert!(first[1]["samples"][0]["texts"][0]["masked"].as_str().unwrap().starts_with("[CLS]"), "{first}");
    // The run may then begin there.
    json(dir, "pretrain --config tiny.yaml --out plan --set train.iterations=1");
    let refuse = |set: &str, expected: &[&str]| {
        refused(dir, &format!("pretrain --config tiny.yaml --dry-run --set {set}"), expected);
    };
    refuse("train_file=[none.jsonl]", &["none.jsonl"]);
    refuse("init_from=none", &["none"]);
    refuse("init_from=plan/model --set model.embed_dim=8", &["plan/model", "text_proj.weight"]);
    refuse("train.optimizer.frozen_names=[visoin]", &["optimizer.frozen_names", "visoin"]);
    refuse("train.optimizer.frozen_names=[e,o,temp]", &["optimizer.frozen_names", "none to train"]);
    json(dir, "pretrain --config tiny.yaml --dry-run --set init_from=plan/model");
    let masters = |device: &str| {
        let half = "--set train.precision=bf16";
        let plan = json(dir, &format!("pretrain --config tiny.yaml --dry-run {half} --device {device}"));
        number(&plan["memory"]["masters"]) / number(&plan["parameters"]["trainable"])
    };
    // A GPU need not be there.
    assert_eq!(["cpu", "cuda", "cuda:3"].map(masters), [2, 4, 4]);
    let unknown = "pretrain --config tiny.yaml --dry-run --device cuda3";
    refused(dir, unknown, &["expected cpu, cuda or cuda:N, found cuda3"]);
    let limited = text(dir, "pretrain --config tiny.yaml --dry-run --set train.time_limit_minutes=3");
    assert!(limited.contains("time limit, minutes") && limited.contains("on the host"), "{limited}");
}

#[test]
fn a_dry_run_tells_what_fine_tuning_will_be() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 4 --seed 5");
    let before = names(dir);
    let plan = "finetune nlvr --preset scenes-nlvr2 --built-in --set task.train_file=[data/nlvr.json] \
                --set task.image_root=data --set data.batch_size=3 --set train.iterations=8 --dry-run";
    let told = text(dir, plan);
    for part in ["Parameters", "beside activations", "Data of nlvr", "First batch: 6 pictures", "left, ", "[CLS]"] {
        assert!(told.contains(part), "{part} in {told}");
    }
    assert_eq!(names(dir), before, "nothing is left behind");
    let told = json(dir, &format!("{plan} --processes 2 --out plan"));
    assert_eq!(names(&dir.join("plan")), ["first-batch.png"]);
    assert_eq!(
        (&told["task"], &told["schedule"]["ranks"], &told["data"]["items_per_step"]),
        (&json!("nlvr"), &json!(2), &json!(6))
    );
    assert_eq!(told["first_batch"].as_array().unwrap().len(), 6);
    assert!(
        told["fresh"].as_array().unwrap().iter().any(|name| name.as_str().unwrap().contains("cls_head")),
        "{}",
        told["fresh"]
    );
    refused(dir, &plan.replace("data/nlvr.json", "none.json"), &["none.json"]);
    refused(dir, &plan.replace("--built-in", ""), &["init_from: expected the folder of a model to start from"]);
    fs::write(dir.join("data/nlvr.json"), "[]").unwrap();
    refused(dir, plan, &["data/nlvr.json: task.train_file: expected at least one item, found none"]);
    fs::write(dir.join("data/nlvr.json"), "[{").unwrap();
    refused(dir, plan, &["data/nlvr.json: byte 2: expected JSON"]);
}

#[test]
fn losses_can_be_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let row = |iteration: u64, losses: Value| {
        json!({
            "iteration": iteration, "losses": losses, "lr": 0.1, "grad_norm": 1.0, "images_per_second": 2.0,
            "elapsed_seconds": 3.0,
        })
        .to_string()
    };
    let write = |run: &str, rows: &[String]| {
        fs::create_dir(dir.join(run)).unwrap();
        fs::write(dir.join(run).join("metrics.jsonl"), rows.join("\n") + "\n").unwrap();
    };
    write("one", &[row(50, json!({ "itc": 3.0, "mlm": 9.0 })), row(100, json!({ "itc": 1.0, "mlm": 5.0 }))]);
    write("two", &[row(50, json!({ "itc": 4.0 }))]);
    fs::create_dir(dir.join("empty")).unwrap();

    let drawn = json(dir, "plot one two/metrics.jsonl --out losses.svg");
    let svg = fs::read_to_string(dir.join("losses.svg")).unwrap();
    for part in [">itc<", ">mlm<", ">one<", ">two<", ">iterations<"] {
        assert!(svg.contains(part), "{part} in {svg}");
    }
    let itc = json!({ "first": 3.0, "last": 1.0, "lowest": 1.0, "lowest_at": 100 });
    assert_eq!((&drawn["runs"][0]["losses"]["itc"], &drawn["runs"][1]["name"]), (&itc, &json!("two")));
    let one = |arguments: &str| {
        text(dir, &format!("plot one --out losses.png {arguments}"));
        Picture::open(&dir.join("losses.png")).unwrap()
    };
    let (both, alone) = (one(""), one("--loss mlm --log --smooth 0"));
    assert!(both.width() > 3 * alone.width() / 2 && both.height() == alone.height());

    refused(dir, "plot empty", &["empty: expected a folder of a run, with metrics.jsonl"]);
    refused(dir, "plot none", &["none"]);
    refused(dir, "plot one one/metrics.jsonl", &["RUN: expected each run once, found one/metrics.jsonl twice"]);
    refused(dir, "plot one --loss itm", &["--loss: expected one of itc, mlm, found itm"]);
    refused(dir, "plot one --out losses.gif", &["--out", ".png or .svg"]);
    refused(dir, "plot one --out none/losses.png", &["none"]);
    refused(dir, "plot one --smooth 2", &["--smooth", "found 2"]);
    fs::write(dir.join("empty/metrics.jsonl"), "").unwrap();
    refused(dir, "plot empty", &["expected a row of metrics"]);
    assert!(!dir.join("losses.gif").exists());
}

#[test]
fn a_run_goes_on_as_it_began() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 30 --seed 5");
    // One line is broken, and one picture.
    let records = fs::read_to_string(dir.join("data/pretrain.jsonl")).unwrap();
    fs::write(dir.join("data/pretrain.jsonl"), records + "{ no json\n").unwrap();
    fs::write(dir.join("data/images/000004.png"), "no picture").unwrap();
    let config = json!({
        "train_file": ["data/pretrain.jsonl"],
        "model": sizes(0),
        "data": { "batch_size": 30, "max_images": 4, "max_regions": 8, "max_bad_fraction": 0.2 },
        "train": { "iterations": 1 },
    });
    fs::write(dir.join("tiny.yaml"), config.to_string()).unwrap();
    let output = xvlm(dir, "pretrain --config tiny.yaml --out run");
    let told = stderr(&output);
    assert!(output.status.success() && told.contains("data/pretrain.jsonl:31"), "{told}");
    assert!(told.contains("records that were drawn are broken") && told.contains("000004.png"), "{told}");
    assert!(fs::read_to_string(dir.join("run/config.yaml")).unwrap().contains("batch_size: 30"));

    let resume = "pretrain --config tiny.yaml --out run --resume";
    refused(dir, &format!("{resume} --set data.batch_size=29"), &["run/config.yaml", "data.batch_size", "30", "29"]);
    assert_eq!(json(dir, &format!("{resume} --set train.iterations=2"))["iterations"], 2);
    refused(
        dir,
        "pretrain --config tiny.yaml --out other --set data.max_bad_fraction=0.001",
        &["data/pretrain.jsonl:31", "1 of 31"],
    );
    // Captions alone are enough, if no regions are asked for.
    fs::write(dir.join("data/captions.jsonl"), "{\"image\": \"images/000000.png\", \"caption\": \"a star\"}\n")
        .unwrap();
    let captions = "pretrain --config tiny.yaml --out other --set train_file=[data/captions.jsonl]";
    refused(dir, captions, &["data/captions.jsonl", "elems", "regions.iter_perc"]);
    assert!(!dir.join("other").exists());
    text(dir, &format!("{captions} --set regions.iter_perc=0"));
}
