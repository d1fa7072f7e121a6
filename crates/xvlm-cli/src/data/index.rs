//! `xvlm data index`: index files beside shards.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::Shards;
use crate::output::{self, CliError};

/// Write an index beside each shard, so that training starts without looking through it
///
/// `data convert` does so itself. An index that no longer fits its shard is not used.
#[derive(Args)]
pub(crate) struct Index {
    #[command(flatten)]
    shards: Shards,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Written {
    indices: Vec<PathBuf>,
    records: u64,
}

impl Index {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let dataset = self.shards.open()?;
        let written = Written { indices: dataset.write_indices()?, records: dataset.found() };
        output::print(self.json, &written, |written| {
            format!("{} records, {} indices", written.records, written.indices.len())
        })
    }
}
