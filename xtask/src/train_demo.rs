//! `cargo xtask train-demo`: where the built-in model comes from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use clap::Args;
use xvlm::Bundled;
use xvlm::weights::{ModelFolder, StoredType};

use crate::{Done, cargo, root};

/// Train the models that are built in, score them on held-out scenes, and put them in their places
///
/// Runs `xvlm synth`, `xvlm pretrain` with both stages' presets, `xvlm finetune` and `xvlm demo`. Run it again to go on after an
/// interruption.
#[derive(Args)]
pub(crate) struct TrainDemo {
    /// Folder for the scenes, the run and the reports
    #[arg(long, value_name = "DIR", default_value = "target/train-demo")]
    out: PathBuf,
    /// Number of scenes to train on
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    scenes: u32,
    /// Keep the pre-trained model that is there, and train only what is fine-tuned from it
    #[arg(long)]
    tasks: bool,
}

/// A model that is fine-tuned from the built-in one.
struct TaskModel {
    /// Its folder, beside that one.
    folder: &'static str,
    task: &'static str,
    preset: &'static str,
    /// What it is trained on, of the built-in world.
    annotations: &'static str,
    /// The configuration's fields for the folder of that.
    roots: &'static [&'static str],
}

const TASKS: [TaskModel; 2] = [
    TaskModel {
        folder: "questions",
        task: "vqa",
        preset: "scenes-vqa",
        annotations: "vqa.json",
        roots: &["vqa_root", "vg_root"],
    },
    TaskModel {
        folder: "statements",
        task: "nlvr",
        preset: "scenes-nlvr2",
        annotations: "nlvr.json",
        roots: &["image_root"],
    },
];

/// The seed of the training scenes: the one that `xvlm demo` refuses.
const SEED: &str = "1";

impl TrainDemo {
    pub(crate) fn run(self) -> Done {
        let out = root().join(&self.out);
        let world = out.join("world");
        if !world.exists() {
            xvlm(&["synth", "--out", text(&world)?, "--scenes", &self.scenes.to_string(), "--seed", SEED])?;
        }
        let installed = root().join("crates/xvlm/model");
        if !self.tasks {
            let records = format!("train_file=[{}]", text(&world.join("pretrain.jsonl"))?);
            let (align, run) = (out.join("align"), out.join("run"));
            let start = format!("init_from={}", text(&align.join("model"))?);
            stage(&["pretrain", "--preset", "scenes-align", "--set", &records], &align)?;
            stage(&["pretrain", "--preset", "scenes", "--set", &records, "--set", &start], &run)?;
            for file in ["config.json", "model.safetensors", "tokenizer.json"] {
                fs::copy(run.join("model").join(file), installed.join(file))?;
            }
        }
        for TaskModel { folder, task, preset, annotations, roots } in TASKS {
            let mut set = vec![
                format!("init_from={}", text(&installed)?),
                format!("task.train_file=[{}]", text(&world.join(annotations))?),
            ];
            for root in roots {
                set.push(format!("task.{root}={}", text(&world)?));
            }
            let set = set.iter().flat_map(|value| ["--set", value]);
            let run = out.join(folder);
            stage(&["finetune", task, "--preset", preset].into_iter().chain(set).collect::<Vec<_>>(), &run)?;
            install(&run.join("model"), &installed, folder)?;
        }

        // Built anew, with the new model in it.
        for (scenes, report, scores) in [("100", "demo", "scores.json"), ("500", "demo-500", "scores-500.json")] {
            let report = out.join(report);
            xvlm(&["demo", "--scenes", scenes, "--out", text(&report)?])?;
            fs::copy(report.join("scores.json"), installed.join(scores))?;
        }
        println!("the built-in models are now those of {}", out.display());
        Ok(())
    }
}

/// Trains, or goes on with it, unless it is done.
fn stage(arguments: &[&str], out: &Path) -> Done {
    if out.join("model").exists() {
        return Ok(());
    }
    let mut command = arguments.to_vec();
    command.extend(["--out", text(out)?]);
    if out.exists() {
        command.push("--resume");
    }
    xvlm(&command)
}

/// Puts a fine-tuned model in its place, without the tensors that are those of the pre-trained one.
fn install(model: &Path, installed: &Path, folder: &str) -> Done {
    let (own, base) = (ModelFolder::open(model)?, ModelFolder::open(installed)?.tensors()?);
    let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let mut kept = BTreeMap::new();
    for (name, tensor) in &own.tensors()? {
        let base = base.get(name).filter(|base| name.starts_with(Bundled::SHARED) && base.dims() == tensor.dims());
        let is_shared = match base {
            Some(base) => numbers(base)? == numbers(tensor)?,
            None => false,
        };
        if !is_shared {
            kept.insert(name.clone(), tensor.clone());
        }
    }
    Ok(ModelFolder::write(&installed.join(folder), &own.config, &kept, &own.tokenizer, StoredType::F16)?)
}

fn text(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("{}: expected a path in UTF-8", path.display()))
}

fn xvlm(arguments: &[&str]) -> Done {
    cargo(["run", "--release", "-p", "xvlm-cli", "--"].iter().chain(arguments))
}
