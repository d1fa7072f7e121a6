//! Training in processes that `mpirun` starts.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;
use xvlm::train::{MetricsRow, read_metrics};

use super::{sizes, stderr, text};

/// `xvlm` on two ranks.
fn on_two(dir: &Path, arguments: &str) -> Output {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]);
    command.arg(env!("CARGO_BIN_EXE_xvlm")).args(arguments.split_whitespace());
    command.current_dir(dir).output().expect("mpirun is installed")
}

fn pretrain(dir: &Path, arguments: &str) -> Output {
    on_two(dir, &format!("pretrain --config tiny.yaml {arguments}"))
}

/// What rank 0 prints. The other prints nothing: this would be no document otherwise.
fn told(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn trained(dir: &Path, arguments: &str) -> serde_json::Value {
    told(&pretrain(dir, &format!("{arguments} --json")))
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

/// What of metrics does not depend on the time.
fn lasting(run: &Path) -> Vec<MetricsRow> {
    let timeless = |row| MetricsRow { images_per_second: 0.0, elapsed_seconds: 0.0, peak_memory_mib: None, ..row };
    read_metrics(&run.join("metrics.jsonl")).unwrap().into_iter().map(timeless).collect()
}

#[test]
fn two_ranks_train_save_and_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 24 --seed 5");
    let config = json!({
        "train_file": ["data/pretrain.jsonl"],
        "model": sizes(0),
        "data": { "batch_size": 4, "max_images": 2, "max_regions": 8, "regions_per_image": 3, "max_tokens": 40, "padding": "none" },
        "train": { "iterations": 6, "log_every": 2, "checkpoint_every": 3, "keep_checkpoints": 9, "seed": 3 },
    });
    fs::write(dir.join("tiny.yaml"), config.to_string()).unwrap();
    let report = trained(dir, "--out run");
    assert_eq!((&report["iterations"], &report["model"]), (&json!(6), &json!("run/model")));

    // As if it had been killed after the checkpoint in the middle.
    let (run, cut) = (dir.join("run"), dir.join("cut"));
    copy(&run, &cut);
    fs::remove_dir_all(cut.join("checkpoints/0000006")).unwrap();
    fs::remove_dir_all(cut.join("model")).unwrap();
    assert_eq!(trained(dir, "--out cut --resume")["iterations"], 6);
    for file in ["model/model.safetensors", "checkpoints/0000006/optimizer.safetensors"] {
        assert!(fs::read(run.join(file)).unwrap() == fs::read(cut.join(file)).unwrap(), "{file}");
    }
    assert_eq!(lasting(&run), lasting(&cut));

    // Only rank 0 looks whether there is a run already; rank 1 waits for it, and is ended.
    let output = pretrain(dir, "--out run");
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("error on rank 0 of 2: ") && stderr(&output).contains("resume it"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn two_ranks_ask_about_pictures() {
    let dir = super::folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 40 --seed 5");
    for (name, command) in [
        ("captions", "caption --max-tokens 4 --sample --seed 3"),
        ("grounding", "ground --text a~star"),
        ("answers", "answer --text which~colour"),
        ("matches", "match --text a~star"),
        ("completions", "fill --text a~___~star"),
    ] {
        let command = format!("{command} --model model --images data/images --json --out").replace('~', "-");
        text(dir, &format!("{command} alone-{name}"));
        let shared = told(&on_two(dir, &format!("{command} shared-{name}")));
        assert_eq!((&shared["pictures"], &shared["left_out"]), (&json!(40), &json!([])));
        let [alone, mut together] =
            ["alone", "shared"].map(|folder| fs::read(dir.join(format!("{folder}-{name}/{name}.json"))).unwrap());
        assert!(alone == together, "{name}");
        // One process goes on where two were ended.
        let second = dir.join(format!("shared-{name}/{name}.1.jsonl"));
        let lines = fs::read(&second).unwrap();
        fs::write(&second, &lines[..lines.len() - 20]).unwrap();
        text(dir, &format!("{command} shared-{name} --resume"));
        together = fs::read(dir.join(format!("shared-{name}/{name}.json"))).unwrap();
        assert!(alone == together, "{name}");
    }
}

#[test]
fn two_ranks_evaluate_and_fine_tune() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 40 --seed 5");
    // More than a batch, so that each rank has something to do.
    let eval = "eval nlvr --data data --json --out";
    let alone: serde_json::Value = serde_json::from_str(&text(dir, &format!("{eval} alone"))).unwrap();
    let shared = told(&on_two(dir, &format!("{eval} shared")));
    assert_eq!((&shared["accuracy"], &shared["count"]), (&alone["accuracy"], &alone["count"]));
    let lines = |file: &str| fs::read_to_string(dir.join(file)).unwrap().lines().count();
    assert!(lines("shared/nlvr.jsonl") > 2 && lines("shared/nlvr.1.jsonl") > 2);
    let tuned = "finetune nlvr --preset scenes-nlvr2 --built-in --set task.train_file=[data/nlvr.json] \
                 --set task.image_root=data --set train.iterations=2 --set data.batch_size=4 --out run --json";
    assert_eq!(told(&on_two(dir, tuned))["model"], "run/model");
}
