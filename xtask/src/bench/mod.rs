//! `cargo xtask bench`: how fast it is, alone and beside what else one could run.

mod chart;
mod compare;
mod cost;
pub(crate) mod data;
mod peak;
mod profile;
mod report;
mod serve;
mod served;
mod sides;
mod start_up;
pub(crate) mod train;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::{Done, cargo};
use sides::{Peer, Precision};
use xvlm_benches::cases::Case;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Measure how fast it is
///
/// Without options, runs the criterion measurements of benches/ (kernels, encoders, losses, data, tasks, training steps).
/// With --peers, does the same work in turn with PyTorch, torch.compile and ONNX Runtime, and writes a table; the first run
/// downloads them (some GB), which stay in the folder of --peers-dir.
#[derive(Args)]
pub(crate) struct Bench {
    /// Part of the name of what is measured
    filter: Option<String>,
    /// Compare the base model with PyTorch, torch.compile and ONNX Runtime
    #[arg(long)]
    peers: bool,
    /// The table of --peers with our side alone
    #[arg(long, conflicts_with = "peers")]
    alone: bool,
    /// Show the time of each operation in the cases of the table (needs Linux's `perf`)
    #[arg(long)]
    profile: bool,
    /// Measure the vision encoder over sizes of images and batches, and draw the cost beside that of the arithmetic
    #[arg(long)]
    cost: bool,
    /// With --peers: only these of them
    #[arg(long, value_enum, value_name = "MODE", requires = "peers")]
    only: Vec<Peer>,
    /// With --profile: what our side computes in
    #[arg(long, value_enum, value_name = "PRECISION", default_value = "f32", requires = "profile")]
    precision: Precision,
    /// Folder for the peers' Python environment
    #[arg(long, value_name = "DIR", default_value = "target/peers")]
    peers_dir: PathBuf,
    /// Rounds of each case; of those that take long fewer, but three at least
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: usize,
    /// Three rounds of each case
    #[arg(long)]
    quick: bool,
    /// Folder for tables (Markdown, JSON) and the drawing
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Print the result as JSON instead of Markdown
    #[arg(long)]
    json: bool,
    /// Passed on to criterion
    #[arg(last = true, conflicts_with_all = ["peers", "alone", "profile", "cost"])]
    criterion: Vec<String>,
    /// Answer questions about our side, one a line
    #[arg(long, hide = true, value_enum, value_name = "PRECISION")]
    serve: Option<Precision>,
}

impl Bench {
    pub(crate) fn run(self) -> Done {
        if let Some(precision) = self.serve {
            return serve::run(precision);
        }
        if self.rounds == 0 {
            return Err("--rounds: expected at least 1, found 0".into());
        }
        let is_table = self.peers || self.alone;
        if !is_table && !self.profile && !self.cost {
            let command = ["bench", "-p", "xvlm-benches", "--"].map(str::to_owned);
            return cargo(command.into_iter().chain(self.filter).chain(self.criterion));
        }
        let cases = Case::chosen(self.filter.as_deref())?;
        let mut told = serde_json::Map::new();
        if is_table {
            let comparison = compare::run(&self, &cases)?;
            told.insert("bench".to_owned(), self.tell("bench", &report::markdown(&comparison)?, &comparison)?);
        }
        if self.profile {
            let profiles = profile::run(&self, &cases)?;
            told.insert("profile".to_owned(), self.tell("profile", &profile::markdown(&profiles)?, &profiles)?);
        }
        if self.cost {
            let cost = cost::run(self.rounds())?;
            write(&self.out, "cost.svg", &cost::drawing(&cost))?;
            told.insert("cost".to_owned(), self.tell("cost", &cost::markdown(&cost)?, &cost)?);
        }
        if self.json {
            println!("{}", serde_json::to_string_pretty(&told)?);
        }
        Ok(())
    }

    fn rounds(&self) -> usize {
        if self.quick { self.rounds.min(3) } else { self.rounds }
    }

    /// How long a case may take before no further round of it begins.
    fn budget(&self) -> Duration {
        Duration::from_secs(20)
    }

    /// Writes a result into the folder, and prints it unless it is to be part of one JSON document.
    fn tell(&self, name: &str, markdown: &str, result: &impl serde::Serialize) -> Outcome<serde_json::Value> {
        write(&self.out, &format!("{name}.md"), markdown)?;
        write(&self.out, &format!("{name}.json"), &serde_json::to_string_pretty(result)?)?;
        if !self.json {
            println!("{markdown}");
        }
        Ok(serde_json::to_value(result)?)
    }
}

fn write(folder: &Path, name: &str, text: &str) -> Done {
    let path = folder.join(name);
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, text));
    written.map_err(|error| format!("{}: {error}", path.display()).into())
}

/// The folder that this program was built in.
fn target() -> Outcome<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program.ancestors().nth(2);
    Ok(folder.ok_or_else(|| format!("{}: expected it in a folder of cargo's", program.display()))?.to_owned())
}
