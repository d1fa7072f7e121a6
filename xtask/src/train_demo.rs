//! `cargo xtask train-demo`: where the built-in model comes from.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::{Done, cargo, root};

/// Train the model that is built in, score it on held-out scenes, and put it in its place
///
/// Runs `xvlm synth`, `xvlm pretrain` with both stages' presets and `xvlm demo`. Run it again to go on after an
/// interruption.
#[derive(Args)]
pub(crate) struct TrainDemo {
    /// Folder for the scenes, the run and the reports
    #[arg(long, value_name = "DIR", default_value = "target/train-demo")]
    out: PathBuf,
    /// Number of scenes to train on
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    scenes: u32,
}

/// The seed of the training scenes: the one that `xvlm demo` refuses.
const SEED: &str = "1";

impl TrainDemo {
    pub(crate) fn run(self) -> Done {
        let world = self.out.join("world");
        if !world.exists() {
            xvlm(&["synth", "--out", text(&world)?, "--scenes", &self.scenes.to_string(), "--seed", SEED])?;
        }
        let records = format!("train_file=[{}]", text(&world.join("pretrain.jsonl"))?);
        let (align, run) = (self.out.join("align"), self.out.join("run"));
        let start = format!("init_from={}", text(&align.join("model"))?);
        stage(&["--preset", "scenes-align", "--set", &records], &align)?;
        stage(&["--preset", "scenes", "--set", &records, "--set", &start], &run)?;

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

/// Pre-trains, or goes on with it, unless it is done.
fn stage(arguments: &[&str], out: &Path) -> Done {
    if root().join(out).join("model").exists() {
        return Ok(());
    }
    let mut command = vec!["pretrain", "--out", text(out)?];
    if root().join(out).exists() {
        command.push("--resume");
    }
    xvlm(&[&command, arguments].concat())
}

fn text(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("{}: expected a path in UTF-8", path.display()))
}

fn xvlm(arguments: &[&str]) -> Done {
    cargo(["run", "--release", "-p", "xvlm-cli", "--"].iter().chain(arguments))
}
