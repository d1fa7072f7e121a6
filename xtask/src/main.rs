//! Chores of development: `cargo xtask COMMAND`.

mod bench;
mod compare_scores;
mod convert_weights;
mod gpu_check;
mod kernels_check;
mod tidy;
mod train_demo;
mod verify;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

type Done = Result<(), Box<dyn Error>>;

/// Chores of development.
#[derive(Parser)]
#[command(name = "xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    Bench(Box<bench::Bench>),
    BenchData(bench::data::BenchData),
    BenchTrain(bench::train::BenchTrain),
    CompareScores(compare_scores::CompareScores),
    ConvertWeights(Box<convert_weights::ConvertWeights>),
    GpuCheck(gpu_check::GpuCheck),
    KernelsCheck(kernels_check::KernelsCheck),
    TrainDemo(train_demo::TrainDemo),
    /// Check what the compiler does not: the direction of dependencies, and that files stay short
    Tidy,
    Verify(verify::Verify),
}

/// The root of the workspace.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The cargo that runs this.
fn cargo_program() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Runs a command of cargo in the workspace.
fn cargo<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Done {
    let mut command = Command::new(cargo_program());
    command.current_dir(root()).args(arguments);
    match command.status()? {
        status if status.success() => Ok(()),
        status => Err(format!("{command:?}: {status}").into()),
    }
}

/// Runs a chore as the programs that it measures run their work.
fn measured(work: impl FnOnce() -> Done + Send) -> Done {
    xvlm::kernels::process::run(|| work().map_err(|error| error.to_string())).map_err(Into::into)
}

fn main() -> ExitCode {
    let done = match Cli::parse().chore {
        Chore::Bench(chore) => measured(|| chore.run()),
        Chore::BenchData(chore) => measured(|| chore.run()),
        Chore::BenchTrain(chore) => measured(|| chore.run()),
        Chore::CompareScores(chore) => chore.run(),
        Chore::ConvertWeights(chore) => chore.run(),
        Chore::GpuCheck(chore) => chore.run(),
        Chore::KernelsCheck(chore) => chore.run(),
        Chore::TrainDemo(chore) => chore.run(),
        Chore::Tidy => tidy::run(),
        Chore::Verify(chore) => chore.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
