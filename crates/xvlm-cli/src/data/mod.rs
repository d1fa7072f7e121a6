//! `xvlm data`: what is done to data sets before training.

mod check;
mod convert;
mod index;
pub(crate) mod inspect;
mod vocab;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use xvlm::data::{Dataset, DatasetConfig, RecordKeys, SourceConfig, StorageOptions};

use crate::output::{self, CliError};

/// Prepare data sets, and look at them
#[derive(Args)]
pub(crate) struct Data {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Check(check::Check),
    Convert(Box<convert::Convert>),
    Index(index::Index),
    Inspect(inspect::Inspect),
    Vocab(vocab::Vocab),
}

impl Data {
    pub(crate) fn run(self) -> Result<(), CliError> {
        match self.command {
            Command::Check(command) => command.run(),
            Command::Convert(command) => command.run(),
            Command::Index(command) => command.run(),
            Command::Inspect(command) => command.run(),
            Command::Vocab(command) => command.run(),
        }
    }
}

/// Shards.
#[derive(Args)]
struct Shards {
    /// Shards: files (.jsonl, .tar, .parquet, each also .gz or .zst), folders of them, patterns (*, {000..127}), URLs
    #[arg(required = true, value_name = "SHARDS")]
    shards: Vec<String>,
    /// What paths of images are relative to, and must not leave [default: the folder of the shard]
    #[arg(long, value_name = "DIR")]
    image_root: Option<PathBuf>,
    /// Key of a record's image [default: image_rpath, binary or image]
    #[arg(long, value_name = "KEY")]
    image_key: Option<String>,
    /// Key of a record's captions [default: caption]
    #[arg(long, value_name = "KEY")]
    caption_key: Option<String>,
}

impl Shards {
    fn open(self) -> Result<Dataset, CliError> {
        let keys = RecordKeys { image_key: self.image_key, caption_key: self.caption_key, is_image_rpath: None };
        let source = SourceConfig { image_root: self.image_root, keys, ..SourceConfig::files(self.shards) };
        Ok(Dataset::open(&[source], &DatasetConfig::default(), &StorageOptions::default())?)
    }
}

/// Numbers by name, for a table.
fn counts<'a>(counts: impl IntoIterator<Item = (&'a str, u64)>) -> output::Rows {
    counts.into_iter().map(|(name, count)| (name.to_owned(), Some(count.to_string()))).collect()
}
