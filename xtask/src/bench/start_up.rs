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
    /// The same as `work` with 32 phrases about the picture.
    pub(crate) many_phrases: Timing,
}

pub(crate) fn measure(rounds: usize) -> Outcome<StartUp> {
    // In the profile that this program was built in.
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    cargo(["build", "--quiet", "--profile", profile, "-p", "xvlm-cli"])?;
    let folder = folder()?;
    let program = std::env::current_exe()?.with_file_name("xvlm").with_extension(std::env::consts::EXE_EXTENSION);
    let picture = root().join("benches/photo.jpg");
    let predictor = Predictor::from_folder(&folder, &Device::Cpu)?;
    let ground = |phrases: &[&str]| -> Outcome<f64> {
        let start = Instant::now();
        predictor.open(&picture)?.ground(phrases)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let many = many_phrases();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    ask(&program, &folder, &picture)?;
    // The open model has its layers laid out for good, as is done when they are used for the third time.
    for _ in 0..2 {
        ground(&[PHRASE])?;
        ground(&many)?;
    }
    let (mut process, mut work, mut many_phrases) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        process.push(ask(&program, &folder, &picture)?);
        work.push(ground(&[PHRASE])?);
        many_phrases.push(ground(&many)?);
    }
    let (process, work, many_phrases) = (Timing::of(process), Timing::of(work), Timing::of(many_phrases));
    let ratio = process.median / work.median;
    Ok(StartUp { process, work, ratio, many_phrases })
}

/// 32 phrases, each as long as [`PHRASE`].
fn many_phrases() -> Vec<String> {
    let colours = ["red", "green", "blue", "yellow", "orange", "purple", "black", "white"];
    let shapes = ["circle", "square", "triangle", "star"];
    let phrase = |(colour, shape): (&str, &str)| PHRASE.replacen("red circle", &format!("{colour} {shape}"), 1);
    colours.into_iter().flat_map(|colour| shapes.map(|shape| phrase((colour, shape)))).collect()
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
    let config = ModelConfig::of(XvlmConfig::base(RESOLUTION));
    let tokenizer = tokenizer(config.model.text_config.vocab_size)?;
    let holds = |file: &str, content: &[u8]| std::fs::read(folder.join(file)).is_ok_and(|found| found == content);
    if holds("config.json", config.to_json()?.as_bytes()) && holds("tokenizer.json", &tokenizer.to_bytes()) {
        return Ok(folder);
    }
    let blueprint = Blueprint::of(|vb| Xvlm::new(&config.model, vb))?;
    let drawn = blueprint.shapes().into_keys().filter_map(|name| Some((name.clone(), blueprint.draw(&name, 0)?)));
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent)?;
    }
    Model::write(&folder, &config, drawn, &tokenizer, StoredType::F32)?;
    Ok(folder)
}

/// A tokenizer of so many words as BERT's has: those of the phrases, and others that occur nowhere.
fn tokenizer(words: usize) -> Outcome<TextTokenizer> {
    let mut vocabulary = scenes::vocabulary();
    let missing = words.saturating_sub(TextTokenizer::from_vocabulary(&vocabulary)?.vocab_size());
    vocabulary.extend((0..missing).map(|number| format!("word{number}")));
    Ok(TextTokenizer::from_vocabulary(&vocabulary)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokenizer_is_as_large_as_the_model_says() {
        let words = XvlmConfig::base(RESOLUTION).text_config.vocab_size;
        assert_eq!(tokenizer(words).unwrap().vocab_size(), words);
    }

    #[test]
    fn phrases_are_different_and_equally_long() {
        let tokenizer = tokenizer(30_522).unwrap();
        let length = |text: &str| tokenizer.token_ids(text).len();
        let mut phrases = many_phrases();
        assert!(phrases.iter().all(|phrase| length(phrase) == length(PHRASE)));
        phrases.sort();
        phrases.dedup();
        assert_eq!(phrases.len(), 32);
    }
}
