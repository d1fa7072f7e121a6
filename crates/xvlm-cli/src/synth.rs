//! `xvlm synth`: files of the built-in world.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use xvlm::data::scenes::{self, Split, SynthOptions};

use crate::output::{self, CliError};
use crate::progress::Stage;

/// Write synthetic scenes with exact ground truth for every task
///
/// The folder holds the pictures and their annotations in the formats that `pretrain` and `eval` read. The same seed
/// gives the same bytes.
#[derive(Args)]
pub(crate) struct Synth {
    /// Folder to write; it must not exist yet, or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of scenes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    scenes: u32,
    /// Where everything random comes from. The built-in model was trained on seed 1
    #[arg(long, value_name = "S")]
    seed: u64,
    /// Scenes with pairs of colour and shape that never occur otherwise
    #[arg(long)]
    unseen: bool,
    /// Put the pictures into pretrain.jsonl too, as base64, instead of the paths of their files
    #[arg(long)]
    embed_images: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Written<'a> {
    out: &'a Path,
    scenes: u32,
    seed: u64,
    unseen: bool,
}

impl Synth {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let Self { out, scenes, seed, unseen, embed_images, json } = self;
        let split = if unseen { Split::Unseen } else { Split::Seen };
        write("scenes", &out, SynthOptions { scenes: scenes as usize, seed, split, embed_images })?;
        let written = Written { out: &out, scenes, seed, unseen };
        output::print(json, &written, |_| format!("{scenes} scenes in {}", out.display()))
    }
}

/// Writes scenes, and says how far it is.
pub(crate) fn write(name: &'static str, out: &Path, options: SynthOptions) -> Result<(), CliError> {
    if let Some(parent) = out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(CliError::io(parent))?;
    }
    Ok(Stage::run(name, |at| scenes::write(out, &options, &mut |done| at(done, options.scenes)))?)
}
