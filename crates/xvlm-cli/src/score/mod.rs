//! `xvlm score`: what files of results are worth, by the official measures. No model takes part. One module a task.

mod captions;
mod grounding;
mod meteor;
mod nlvr;
mod read;
mod retrieval;
mod vqa;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;
use xvlm::data::annotations::{Reason, Report};
use xvlm::data::{DataError, Place};
use xvlm::metrics::MetricsError;

use crate::output::{self, CliError, Rows, table};

/// Score a file of results by the official measures of a benchmark
///
/// Reads results and references in their published forms. Results that are missing, or of something else, are an error that
/// counts and names them, unless --partial is given.
#[derive(Args)]
pub(crate) struct Score {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Captions(captions::Captions),
    Vqa(vqa::Vqa),
    Retrieval(retrieval::Retrieval),
    Nlvr(nlvr::Nlvr),
    Grounding(grounding::Grounding),
}

impl Score {
    pub(crate) fn run(self) -> Result<(), CliError> {
        match self.task {
            Task::Captions(task) => task.run(),
            Task::Vqa(task) => task.run(),
            Task::Retrieval(task) => task.run(),
            Task::Nlvr(task) => task.run(),
            Task::Grounding(task) => task.run(),
        }
    }
}

/// What all scorers have in common.
#[derive(Args)]
struct Common {
    /// Results
    #[arg(long, value_name = "FILE")]
    hyps: PathBuf,
    /// Score what both files have, and tell how much is missing or of something else
    #[arg(long)]
    partial: bool,
    /// Write the score of each item there, as JSON
    #[arg(long, value_name = "FILE")]
    each: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Names that stand for many.
const SHOWN: usize = 10;

/// Which results lack, and which are of nothing that is asked for.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Coverage {
    missing: usize,
    /// The first of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing_ids: Vec<String>,
    unknown: usize,
    /// The first of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unknown_ids: Vec<String>,
}

/// Items of one kind by their identifiers: how references and results go together.
struct Pairing<'a> {
    /// What the items are, such as "images".
    items: &'static str,
    /// The field of the results that names them.
    field: &'static str,
    hyps: &'a Path,
    partial: bool,
}

impl Pairing<'_> {
    /// Compares identifiers: those asked for, and those with a result.
    fn compare<'b>(
        &self,
        asked: impl Iterator<Item = &'b str> + Clone,
        given: impl Iterator<Item = &'b str> + Clone,
    ) -> Result<Coverage, CliError> {
        let (with_result, wanted): (HashSet<_>, HashSet<_>) = (given.clone().collect(), asked.clone().collect());
        let missing: Vec<&str> = asked.filter(|id| !with_result.contains(id)).collect();
        let unknown: Vec<&str> = given.filter(|id| !wanted.contains(id)).collect();
        self.cover(wanted.len(), &missing, &unknown)
    }

    /// What is missing and unknown: an error, unless parts may be scored.
    fn cover(&self, asked: usize, missing: &[&str], unknown: &[&str]) -> Result<Coverage, CliError> {
        let items = self.items;
        if !self.partial && !missing.is_empty() {
            let found = format!("none of {} of them ({}); --partial scores the others", missing.len(), names(missing));
            return Err(self.error(format!("a result of each of {asked} {items}"), found));
        }
        if !self.partial && !unknown.is_empty() {
            let found = format!("{} of others ({}); --partial leaves them out", unknown.len(), names(unknown));
            return Err(self.error(format!("results of {items} of the references only"), found));
        }
        if missing.len() == asked {
            return Err(self.error(format!("a result of any of {asked} {items}"), "none".to_owned()));
        }
        let first = |ids: &[&str]| ids.iter().take(SHOWN).map(|&id| id.to_owned()).collect();
        let (missing_ids, unknown_ids) = (first(missing), first(unknown));
        Ok(Coverage { missing: missing.len(), missing_ids, unknown: unknown.len(), unknown_ids })
    }

    fn error(&self, expected: String, found: String) -> CliError {
        let (path, place) = (self.hyps.into(), Place::Whole);
        DataError::Field { path, place, field: self.field.to_owned(), expected, found }.into()
    }
}

/// The first of many names.
fn names(ids: &[&str]) -> String {
    let mut names = ids.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    if ids.len() > SHOWN {
        names.push_str(", …");
    }
    names
}

#[derive(Serialize)]
struct Told<'a, T> {
    task: &'static str,
    refs: &'a [PathBuf],
    hyps: &'a Path,
    #[serde(flatten)]
    scores: T,
    #[serde(flatten)]
    coverage: Coverage,
}

impl Common {
    fn pairing(&self, items: &'static str, field: &'static str) -> Pairing<'_> {
        Pairing { items, field, hyps: &self.hyps, partial: self.partial }
    }

    /// Prints scores, and writes those of each item where asked to.
    fn print<T: Serialize>(
        &self,
        task: &'static str,
        refs: &[PathBuf],
        scores: T,
        coverage: Coverage,
        each: impl FnOnce() -> Vec<Value>,
        rows: impl FnOnce(&T) -> Rows,
    ) -> Result<(), CliError> {
        if let Some(path) = &self.each {
            output::write(path, &serde_json::to_vec(&each())?)?;
        }
        let report = Told { task, refs, hyps: &self.hyps, scores, coverage };
        output::print(self.json, &report, |report| {
            let mut rows = rows(&report.scores);
            for (name, number) in [("missing", report.coverage.missing), ("of others", report.coverage.unknown)] {
                if number > 0 {
                    rows.push(count(name, number));
                }
            }
            table(&rows)
        })
    }
}

/// Refuses splits that are asked for where no item says which split it is of; `told` has what items that were read say.
pub(crate) fn check_splits<'a>(
    splits: &[String],
    mut told: impl Iterator<Item = &'a str>,
    report: &Report,
) -> Result<(), CliError> {
    match splits.is_empty() || told.next().is_some() || report.count(Reason::OtherSplit) > 0 {
        true => Ok(()),
        false => {
            let (expected, found) = ("items that say which split they are of", "none that does".to_owned());
            Err(CliError::Option { option: "--split", expected, found })
        }
    }
}

fn percent(name: impl Into<String>, score: f64) -> (String, Option<String>) {
    (name.into(), Some(format!("{score:.2} %")))
}

fn count(name: impl Into<String>, count: usize) -> (String, Option<String>) {
    (name.into(), Some(count.to_string()))
}

fn metrics(error: MetricsError) -> CliError {
    CliError::Library(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(partial: bool, asked: &[&str], given: &[&str]) -> Result<Coverage, String> {
        let pairing = Pairing { items: "images", field: "image_id", hyps: Path::new("hyps.json"), partial };
        let compared = pairing.compare(asked.iter().copied(), given.iter().copied());
        compared.map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_missing_or_of_others_is_counted_and_named() {
        assert_eq!(compare(false, &["1", "2"], &["2", "1"]), Ok(Coverage::default()));
        assert_eq!(
            compare(false, &["1", "2", "3"], &["2"]),
            Err("hyps.json: image_id: expected a result of each of 3 images, found none of 2 of them (1, 3); --partial \
                 scores the others"
                .to_owned())
        );
        assert_eq!(
            compare(false, &["1"], &["1", "7"]),
            Err("hyps.json: image_id: expected results of images of the references only, found 1 of others (7); \
                 --partial leaves them out"
                .to_owned())
        );
        let expected =
            Coverage { missing: 1, missing_ids: vec!["1".into()], unknown: 1, unknown_ids: vec!["7".into()] };
        assert_eq!(compare(true, &["1", "2"], &["2", "7"]), Ok(expected));
        assert_eq!(
            compare(true, &["1"], &["7"]),
            Err("hyps.json: image_id: expected a result of any of 1 images, found none".to_owned())
        );
    }
}
