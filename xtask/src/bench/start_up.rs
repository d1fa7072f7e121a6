//! What a program's start costs: `xvlm ground` on a folder of the base model, beside the same work in a process that has the
//! model open.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde::Serialize;
use xvlm::data::{TextTokenizer, scenes};
use xvlm::encoders::{Blueprint, Xvlm, XvlmConfig};
use xvlm::tasks::ModelConfig;
use xvlm::weights::StoredType;
use xvlm::{Device, Model, Predictor};

use super::compare::Timing;
use super::{Outcome, served, target};
use crate::{cargo, root};

const RESOLUTION: usize = 384;
const PHRASE: &str = "the large red circle left of the green square";

/// Both in turn.
#[derive(Debug, Serialize)]
pub(crate) struct StartUp {
    /// From the start of the process to its end.
    pub(crate) process: Timing,
    /// Reading and encoding the picture, encoding the phrase, fusing, the box, the matching.
    pub(crate) work: Timing,
    /// Of the medians.
    pub(crate) ratio: f64,
}

pub(crate) fn measure(rounds: usize) -> Outcome<StartUp> {
    // In the profile that this program was built in.
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    cargo(["build", "--quiet", "--profile", profile, "-p", "xvlm-cli"])?;
    let folder = folder()?;
    let program = std::env::current_exe()?.with_file_name("xvlm").with_extension(std::env::consts::EXE_EXTENSION);
    let picture = root().join("benches/photo.jpg");
    let predictor = Predictor::from_folder(&folder, &Device::Cpu)?;
    let ground = || -> Outcome<f64> {
        let start = Instant::now();
        predictor.open(&picture)?.ground(&[PHRASE])?;
        Ok(start.elapsed().as_secs_f64())
    };
    ask(&program, &folder, &picture)?;
    ground()?;
    let (mut process, mut work) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        process.push(ask(&program, &folder, &picture)?);
        work.push(ground()?);
    }
    let (process, work) = (Timing::of(process), Timing::of(work));
    let ratio = process.median / work.median;
    Ok(StartUp { process, work, ratio })
}

/// Seconds of a process that answers.
fn ask(program: &Path, folder: &Path, picture: &Path) -> Outcome<f64> {
    let start = Instant::now();
    let mut command = Command::new(program);
    command.args(["ground", "--json", "--text", PHRASE, "--model"]).arg(folder).arg("--image").arg(picture);
    served::succeed(&mut command)?;
    Ok(start.elapsed().as_secs_f64())
}

/// A folder of the base model with random weights; it stays for the next time.
fn folder() -> Outcome<PathBuf> {
    let folder = target()?.join("bench").join(format!("base-{RESOLUTION}"));
    if folder.join("config.json").is_file() {
        return Ok(folder);
    }
    let config = ModelConfig::of(XvlmConfig::base(RESOLUTION));
    let blueprint = Blueprint::of(|vb| Xvlm::new(&config.model, vb))?;
    let drawn = blueprint.shapes().into_keys().filter_map(|name| Some((name.clone(), blueprint.draw(&name, 0)?)));
    let tokenizer = TextTokenizer::from_vocabulary(&scenes::vocabulary())?;
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent)?;
    }
    Model::write(&folder, &config, drawn, &tokenizer, StoredType::F32)?;
    Ok(folder)
}
