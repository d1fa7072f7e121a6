//! `cargo xtask train-demo`: where the built-in model comes from.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::{Done, cargo, root};

/// Train the model that is built in, score it on held-out scenes, and put it in its place
///
/// Runs `xvlm synth`, `xvlm pretrain --preset scenes` and `xvlm demo`. Run it again to go on after an interruption.
#[derive(Args)]
pub(crate) struct TrainDemo {
    /// Folder for the scenes, the run and the reports
    #[arg(long, value_name = "DIR", default_value = "target/train-demo")]
    out: PathBuf,
    /// Number of scenes to train on
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    scenes: u32,
    /// Replace one value of the preset, such as train.iterations=100; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// The seed of the training scenes: the one that `xvlm demo` refuses.
const SEED: &str = "1";

impl TrainDemo {
    pub(crate) fn run(self) -> Done {
        let (world, run) = (self.out.join("world"), self.out.join("run"));
        if !world.exists() {
            xvlm(&["synth", "--out", text(&world)?, "--scenes", &self.scenes.to_string(), "--seed", SEED])?;
        }
        let records = format!("train_file=[{}]", text(&world.join("pretrain.jsonl"))?);
        let mut pretrain = vec!["pretrain", "--preset", "scenes", "--out", text(&run)?, "--set", &records];
        pretrain.extend(self.set.iter().flat_map(|set| ["--set", set]));
        if run.exists() {
            pretrain.push("--resume");
        }
        xvlm(&pretrain)?;

        let (model, installed) = (run.join("model"), root().join("crates/xvlm/model"));
        for (scenes, report) in [("100", "demo"), ("500", "demo-500")] {
            xvlm(&["demo", "--model", text(&model)?, "--scenes", scenes, "--out", text(&self.out.join(report))?])?;
        }
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs::copy(root().join(model.join(file)), installed.join(file))?;
        }
        for (report, scores) in [("demo", "scores.json"), ("demo-500", "scores-500.json")] {
            fs::copy(root().join(self.out.join(report)).join("scores.json"), installed.join(scores))?;
        }
        println!("the built-in model is now that of {}", model.display());
        Ok(())
    }
}

fn text(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("{}: expected a path in UTF-8", path.display()))
}

fn xvlm(arguments: &[&str]) -> Done {
    cargo(["run", "--release", "-p", "xvlm-cli", "--"].iter().chain(arguments))
}
