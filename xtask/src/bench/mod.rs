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

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::{ArgGroup, Args};
use xvlm::Precision;

use crate::{Done, cargo, cargo_program, root};
use sides::Peer;
use xvlm_benches::cases::Case;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Measure how fast it is
///
/// Without options, runs the criterion measurements of benches/ (kernels, encoders, losses, data, tasks, training steps).
/// With --peers, does the same work in turn with PyTorch, torch.compile and ONNX Runtime, and writes a table; the first run
/// downloads them (some GB), which stay in the folder of --peers-dir.
#[derive(Args)]
#[command(group(ArgGroup::new("mode").args(["peers", "alone", "profile", "cost"]).multiple(true)))]
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
    #[arg(long, conflicts_with = "filter")]
    cost: bool,
    /// With --peers: only these of them
    #[arg(long, value_enum, value_name = "MODE", requires = "peers")]
    only: Vec<Peer>,
    /// With --profile: what our side computes in
    #[arg(long, value_name = "f32|bf16|int8", default_value_t = Precision::F32, requires = "profile")]
    precision: Precision,
    /// Folder for the peers' Python environment
    #[arg(long, value_name = "DIR", default_value = "target/peers", requires = "peers")]
    peers_dir: PathBuf,
    /// Rounds of each case; of those that take long fewer, but three at least
    #[arg(long, value_name = "N", default_value_t = 7, requires = "mode")]
    rounds: usize,
    /// Three rounds of each case
    #[arg(long, requires = "mode", conflicts_with = "rounds")]
    quick: bool,
    /// Folder for tables (Markdown, JSON) and the drawing
    #[arg(long, value_name = "DIR", default_value = "target/bench", requires = "mode")]
    out: PathBuf,
    /// Print the result as JSON instead of Markdown
    #[arg(long, requires = "mode")]
    json: bool,
    /// Passed on to criterion
    #[arg(last = true, conflicts_with_all = ["peers", "alone", "profile", "cost"])]
    criterion: Vec<String>,
    /// Answer questions about our side, one a line
    #[arg(long, hide = true, value_name = "PRECISION")]
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
            return by_criterion(self.filter.as_deref(), &self.criterion);
        }
        let cases = Case::chosen(self.filter.as_deref())?;
        let mut told = serde_json::Map::new();
        if is_table {
            let keep = |so_far: &compare::Comparison| self.keep("bench", &report::markdown(so_far)?, so_far);
            let comparison = compare::run(&self, &cases, keep)?;
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
        if self.quick { 3 } else { self.rounds }
    }

    /// Writes a result into the folder, in the place of the one before.
    fn keep(&self, name: &str, markdown: &str, result: &impl serde::Serialize) -> Done {
        write(&self.out, &format!("{name}.md"), markdown)?;
        write(&self.out, &format!("{name}.json"), &serde_json::to_string_pretty(result)?)
    }

    /// Writes a result into the folder, and prints it unless it is to be part of one JSON document.
    fn tell(&self, name: &str, markdown: &str, result: &impl serde::Serialize) -> Outcome<serde_json::Value> {
        self.keep(name, markdown, result)?;
        if !self.json {
            println!("{markdown}");
        }
        Ok(serde_json::to_value(result)?)
    }
}

fn write(folder: &Path, name: &str, text: &str) -> Done {
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(xvlm::weights::write_file_atomically(&folder.join(name), |out| out.write_all(text.as_bytes()))?)
}

/// Runs the measurements of criterion, or those whose names contain `filter`: that there are none is an error, which criterion
/// does not say.
fn by_criterion(filter: Option<&str>, arguments: &[String]) -> Done {
    const BENCHES: [&str; 4] = ["bench", "-p", "xvlm-benches", "--"];
    let Some(filter) = filter else {
        return cargo(BENCHES.into_iter().chain(arguments.iter().map(String::as_str)));
    };
    let mut command = Command::new(cargo_program());
    command.current_dir(root()).args(BENCHES).arg(filter).args(arguments);
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut is_told = false;
    for line in child.stdout.take().into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
        let line = line?;
        is_told |= line.contains(filter);
        println!("{line}");
    }
    match child.wait()? {
        status if !status.success() => Err(format!("{command:?}: {status}").into()),
        _ if !is_told => {
            Err(format!("expected part of a measurement's name, found {filter} (all: cargo xtask bench -- --list)")
                .into())
        }
        _ => Ok(()),
    }
}

/// The folder that this program was built in.
fn target() -> Outcome<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program.ancestors().nth(2);
    Ok(folder.ok_or_else(|| format!("{}: expected it in a folder of cargo's", program.display()))?.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::Cli;

    #[test]
    fn options_that_would_do_nothing_are_refused() {
        let is_taken = |arguments: &str| {
            Cli::try_parse_from(["xtask", "bench"].into_iter().chain(arguments.split_whitespace())).is_ok()
        };
        for alone in
            ["--json", "--rounds 3", "--quick", "--out x", "--peers-dir x", "--only onnx-f32", "--precision bf16"]
        {
            assert!(!is_taken(alone), "{alone}");
        }
        assert!(
            !is_taken("--cost text") && !is_taken("--cost --peers-dir x") && !is_taken("--alone --quick --rounds 5")
        );
        assert!(is_taken("text --peers --quick --json --out x --peers-dir y --only onnx-f32"));
        assert!(is_taken("--alone --rounds 5") && is_taken("--profile --precision int8") && is_taken("--cost --json"));
        assert!(is_taken("norm -- --quick") && is_taken(""));
    }
}
