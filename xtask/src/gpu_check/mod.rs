//! `cargo xtask gpu-check`: tests and measurements in a build for GPUs.

mod pack;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::Args;
use serde_json::Value;

use crate::{Done, cargo_program, root};

/// Build all tests and measurements for GPUs, and run them on the first one
///
/// Without a GPU this builds and links everything, says that nothing was run, and fails. Building needs nvcc, which
/// `scripts/cuda-toolchain.sh` fetches; no GPU.
#[derive(Args)]
pub(crate) struct GpuCheck {
    /// Run nothing here: put the programs and a script that runs them into this folder, for a machine that has a GPU but
    /// no Rust, and compress it to FOLDER.tar.xz
    #[arg(long, value_name = "FOLDER")]
    pack: Option<PathBuf>,
    /// Run the tests only
    #[arg(long)]
    no_bench: bool,
}

impl GpuCheck {
    pub(crate) fn run(self) -> Done {
        let programs = build()?;
        if let Some(folder) = &self.pack {
            return pack::pack(&programs, folder);
        }
        if !has_gpu() {
            println!(
                "\n*** NO GPU: {} programs were built and linked, and NONE WAS RUN. `--pack FOLDER` takes them to a machine \
                 that has one. ***\n",
                programs.len()
            );
            return Err("expected an NVIDIA GPU, found none".into());
        }
        let mut report = Vec::new();
        for program in programs.iter().filter(|program| !(self.no_bench && program.is_bench)) {
            report.push((program, run_program(program)?));
        }
        println!("\nprogram                                  seconds");
        for (program, (passed, seconds)) in &report {
            println!("{:<40} {seconds:>7.1}  {}", program.name, if *passed { "passed" } else { "FAILED" });
        }
        let failed = report.iter().filter(|(_, (passed, _))| !passed).count();
        if failed == 0 { Ok(()) } else { Err(format!("{failed} of {} programs failed", report.len()).into()) }
    }
}

/// An executable of tests or measurements.
struct Program {
    /// Of the package and of the target: `xvlm-kernels.truth`.
    name: String,
    executable: PathBuf,
    /// Of its package, which its tests run in.
    folder: PathBuf,
    is_bench: bool,
}

/// Builds tests and measurements of the whole workspace: the same build as `cargo test`, so that candle's kernels, which
/// take minutes, are compiled once.
fn build() -> Result<Vec<Program>, Box<dyn std::error::Error>> {
    let mut command = Command::new(cargo_program());
    command.current_dir(root()).args(["test", "--no-run", "--locked", "--workspace", "--all-targets"]);
    command.args(["--features", "cuda", "--message-format", "json-render-diagnostics"]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", output.status).into());
    }
    let messages = String::from_utf8(output.stdout)?;
    let mut programs = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        programs.extend(program(&serde_json::from_str(line)?));
    }
    if programs.is_empty() {
        return Err("expected cargo to name the tests that it built, found none".into());
    }
    // Tests first: measurements of what is wrong are worth nothing.
    programs.sort_by(|a, b| (a.is_bench, &a.name).cmp(&(b.is_bench, &b.name)));
    Ok(programs)
}

/// The tests or measurements that a message of cargo is about.
fn program(message: &Value) -> Option<Program> {
    let (target, executable) = (&message["target"], message["executable"].as_str()?);
    let is = |kind: &str| target["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|one| one == kind));
    if message["profile"]["test"] != true && !is("bench") {
        return None;
    }
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    let package = folder.file_name()?.to_str()?;
    let target = target["name"].as_str()?;
    // The tests inside a library or program have its name.
    let name = if is("test") || is("bench") { format!("{package}.{target}") } else { package.to_owned() };
    Some(Program { name, executable: executable.into(), folder, is_bench: is("bench") })
}

/// Whether there is a GPU, as its driver has it.
fn has_gpu() -> bool {
    let devices = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let is_gpu = |name: &str| name.strip_prefix("nvidia").is_some_and(|n| n.parse::<u32>().is_ok());
    devices.into_iter().any(|entry| entry.file_name().to_str().is_some_and(is_gpu))
}

/// Runs a program to its end: whether it passed, and the seconds it took.
fn run_program(program: &Program) -> Result<(bool, f64), Box<dyn std::error::Error>> {
    println!("\n== {}", program.name);
    let start = Instant::now();
    let mut command = Command::new(&program.executable);
    if program.is_bench {
        command.arg("--bench");
    }
    // Tests that find no GPU must not pass by leaving everything out.
    let status = command.current_dir(&program.folder).env("XVLM_REQUIRE_GPU", "1").status()?;
    Ok((status.success(), start.elapsed().as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn artifact(kind: &str, name: &str, test: bool, executable: Option<&str>) -> Value {
        json!({
            "reason": "compiler-artifact", "manifest_path": "/w/crates/xvlm-kernels/Cargo.toml",
            "target": { "kind": [kind], "name": name }, "profile": { "test": test }, "executable": executable,
        })
    }

    #[test]
    fn tests_and_measurements_are_found() {
        let named = |message: &Value| program(message).map(|found| (found.name, found.is_bench));
        let found = named(&artifact("test", "truth", true, Some("/t/truth-1")));
        assert_eq!(found, Some(("xvlm-kernels.truth".to_owned(), false)));
        assert_eq!(
            named(&artifact("lib", "xvlm_kernels", true, Some("/t/a"))),
            Some(("xvlm-kernels".to_owned(), false))
        );
        let bench = named(&artifact("bench", "kernels", true, Some("/t/kernels-1")));
        assert_eq!(bench, Some(("xvlm-kernels.kernels".to_owned(), true)));
        assert_eq!(named(&artifact("lib", "xvlm_kernels", false, None)), None);
        assert_eq!(named(&artifact("bin", "xvlm", false, Some("/t/xvlm"))), None, "a program of its own");
        assert_eq!(named(&json!({ "reason": "build-finished", "success": true })), None);
    }
}
