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
        let out = root().join(&self.out);
        let world = out.join("world");
        if !world.exists() {
            xvlm(&["synth", "--out", text(&world)?, "--scenes", &self.scenes.to_string(), "--seed", SEED])?;
        }
        let records = format!("train_file=[{}]", text(&world.join("pretrain.jsonl"))?);
        let (align, run) = (out.join("align"), out.join("run"));
        let start = format!("init_from={}", text(&align.join("model"))?);
        stage(&["--preset", "scenes-align", "--set", &records], &align)?;
        stage(&["--preset", "scenes", "--set", &records, "--set", &start], &run)?;

        let installed = root().join("crates/xvlm/model");
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs::copy(run.join("model").join(file), installed.join(file))?;
        }
        // Built anew, with the new model in it.
        for (scenes, report, scores) in [("100", "demo", "scores.json"), ("500", "demo-500", "scores-500.json")] {
            let report = out.join(report);
            xvlm(&["demo", "--scenes", scenes, "--out", text(&report)?])?;
            fs::copy(report.join("scores.json"), installed.join(scores))?;
        }
        println!("the built-in model is now that of {}", run.join("model").display());
        Ok(())
    }
}

/// Pre-trains, or goes on with it, unless it is done.
fn stage(arguments: &[&str], out: &Path) -> Done {
    if out.join("model").exists() {
        return Ok(());
    }
    let mut command = vec!["pretrain", "--out", text(out)?];
    if out.exists() {
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
