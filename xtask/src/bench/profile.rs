//! `cargo xtask bench --profile`: where our side's time goes, by operation.
//!
//! Linux's `perf` looks at the process that serves a case some thousand times a second; what it finds there is told by the
//! module of the function, so that nothing has to be built anew, and nothing in the model knows of it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use serde::Serialize;
use xvlm::Precision;

use super::served;
use super::sides::Side;
use super::train::{self, BenchTrain};
use super::{Bench, Outcome};
use xvlm_benches::cases::{Case, Work};

/// Where the time of a case goes.
#[derive(Debug, Serialize)]
pub(crate) struct Profile {
    case: &'static str,
    title: &'static str,
    precision: &'static str,
    /// Of the case, the median.
    seconds: f64,
    /// Shares of the samples by operation, the largest first.
    operations: Vec<(String, f64)>,
}

pub(crate) fn run(bench: &Bench, cases: &[&'static Case]) -> Outcome<Vec<Profile>> {
    // Both captions do the same on our side.
    let is_profiled = |case: &Case| match case.work {
        Work::StartUp | Work::CaptionCached => false,
        Work::Step => bench.precision != Precision::Int8,
        _ => true,
    };
    let cases: Vec<&Case> = cases.iter().copied().filter(|case| is_profiled(case)).collect();
    if cases.is_empty() {
        return Err("--profile: expected a case of inference, or of training in f32 or bf16, found none".into());
    }
    let mut profiles = Vec::new();
    if cases.iter().any(|case| case.is_inference()) {
        let mut side = Side::ours(bench.precision)?;
        side.wait()?;
        for case in cases.iter().filter(|case| case.is_inference()) {
            side.prepare(case)?;
            side.prepared()??;
            let (seconds, operations) = record(side.id(), bench.rounds(), || side.run())?;
            profiles.push(profile(bench, case, seconds, operations));
        }
    }
    for case in cases.iter().filter(|case| case.work == Work::Step) {
        let chore = BenchTrain::for_comparison(bench.peers_dir.clone(), true, 1, case.images, bench.precision);
        let (mut side, _) = chore.start_ours()?;
        let (seconds, operations) = record(side.id(), bench.rounds(), || Ok(train::step(&mut side)?.seconds))?;
        profiles.push(profile(bench, case, seconds, operations));
    }
    Ok(profiles)
}

fn profile(bench: &Bench, case: &Case, seconds: f64, operations: Vec<(String, f64)>) -> Profile {
    let Case { name: case, title, .. } = *case;
    Profile { case, title, precision: bench.precision.name(), seconds, operations }
}

/// Runs something that a process does again and again: its median, and where its time goes.
fn record(process: u32, rounds: usize, mut run: impl FnMut() -> Outcome<f64>) -> Outcome<(f64, Vec<(String, f64)>)> {
    /// Samples a second, of each thread.
    const RATE: &str = "1999";
    let recording = tempfile::NamedTempFile::new()?;
    let mut command = Command::new("perf");
    command.args(["record", "--quiet", "-F", RATE, "-e", "cpu-clock:u", "-p", &process.to_string(), "-o"]);
    // It begins this command when it has begun to record, and ends with it, which is when the input ends.
    command.arg(recording.path()).args(["--", "sh", "-c", "echo; exec cat"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut perf = command.spawn().map_err(|error| format!("perf (of Linux's tools; package linux-perf): {error}"))?;
    let mut output = perf.stdout.take().map(BufReader::new).ok_or("perf: its pipes are closed")?;
    // Nothing is read if perf ends: its status tells.
    let records = output.read_line(&mut String::new())? > 0;
    let seconds = (0..if records { rounds } else { 0 }).map(|_| run()).collect::<Outcome<Vec<_>>>();
    drop(perf.stdin.take());
    succeeded(&command, &perf.wait_with_output()?)?;
    let seconds = seconds?;
    let mut command = Command::new("perf");
    command.args(["report", "--stdio", "--no-children", "-F", "overhead,symbol", "-i"]).arg(recording.path());
    let told = command.output()?;
    succeeded(&command, &told)?;
    let operations = by_operation(&String::from_utf8_lossy(&told.stdout));
    if operations.is_empty() {
        let stderr = String::from_utf8_lossy(&told.stderr);
        return Err(format!("{command:?}: expected samples, found none: {}", stderr.trim()).into());
    }
    Ok((served::median(seconds), operations))
}

/// Refuses a command that failed, with what it complained of.
fn succeeded(command: &Command, output: &Output) -> Outcome<()> {
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}: {}", output.status, stderr.trim()).into())
}

/// Shares of operations, from lines such as `  12.34%  [.] xvlm_kernels::norm::layer_norm`.
fn by_operation(report: &str) -> Vec<(String, f64)> {
    let mut shares = BTreeMap::<String, f64>::new();
    for line in report.lines() {
        let Some((percent, symbol)) = line.trim().split_once('%') else { continue };
        let Ok(percent) = percent.parse::<f64>() else { continue };
        *shares.entry(operation(symbol)).or_default() += percent / 100.0;
    }
    let mut shares: Vec<_> = shares.into_iter().collect();
    shares.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    shares
}

/// What a function belongs to.
fn operation(symbol: &str) -> String {
    /// Parts of names, the most telling first, and how many further parts of the path are told.
    const MODULES: [(&str, usize); 4] =
        [("xvlm_kernels::", 3), ("xvlm_encoders::", 1), ("xvlm_", 1), ("candle_core::", 2)];
    for (module, parts) in MODULES {
        let Some(at) = symbol.find(module) else { continue };
        let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        let path: String = symbol[at..].chars().take_while(|&c| is_part(c)).collect();
        let path: Vec<&str> = path.split("::").take(1 + parts).filter(|part| !part.is_empty()).collect();
        return path.join("::");
    }
    let known = [
        ("gemm", "gemm"),
        ("rayon", "rayon: waiting for work"),
        ("crossbeam", "rayon: waiting for work"),
        ("mem", "memory: copy, fill"),
        ("alloc", "memory: allocate"),
    ];
    let known = known.iter().find(|(part, _)| symbol.contains(part));
    // What is known no better is told as it is.
    let own = || symbol.rsplit("] ").next().unwrap_or(symbol).chars().take(60).collect();
    known.map_or_else(own, |(_, name)| (*name).to_owned())
}

pub(crate) fn markdown(profiles: &[Profile]) -> Result<String, std::fmt::Error> {
    /// Smaller shares are told together.
    const LEAST: f64 = 0.005;
    let mut out = String::new();
    for Profile { title, precision, seconds, operations, .. } in profiles {
        writeln!(out, "{title}, {precision}: {:.1} ms\n\n| operation | ms | share |\n|---|---|---|", 1e3 * seconds)?;
        let mut row = |name: &str, share: f64| {
            writeln!(out, "| {name} | {:.1} | {:.1} % |", 1e3 * seconds * share, 100.0 * share)
        };
        let (told, small): (Vec<_>, Vec<_>) = operations.iter().partition(|(_, share)| *share >= LEAST);
        told.iter().try_for_each(|(name, share)| row(name, *share))?;
        row("all others", small.iter().map(|(_, share)| share).sum())?;
        writeln!(out)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_told_by_their_modules() {
        let report = "# Overhead  Symbol\n    60.00%  [.] <xvlm_kernels::simd::product::Product as pulp::WithSimd>::with_simd\n\
                      \x20   30.00%  [.] xvlm_kernels::norm::host::rows\n    10.00%  [.] xvlm_kernels::norm::host::rows::{{closure}}\n";
        let found = by_operation(report);
        assert_eq!(
            found.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["xvlm_kernels::simd::product::Product", "xvlm_kernels::norm::host::rows",]
        );
        assert!((found[1].1 - 0.4).abs() < 1e-9);
    }
}
