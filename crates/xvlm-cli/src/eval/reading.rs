//! Annotations of evaluations, and what is left out of them.

use std::path::PathBuf;

use serde::Serialize;
use xvlm::data::DataError;
use xvlm::data::annotations::{Loaded, Reason, Report};
use xvlm::tasks::{SweepProblem, TaskError};

use super::{Common, count};
use crate::output::{self, CliError, Rows};

/// What a report says beside scores.
#[derive(Serialize)]
pub(super) struct Aside {
    /// The file for an evaluation server or tool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) result_file: Option<PathBuf>,
    /// Broken annotations.
    #[serde(skip_serializing_if = "Report::is_empty")]
    pub(super) skipped: Report,
}

impl Aside {
    pub(super) fn rows(&self) -> Rows {
        let skipped = self.skipped.iter().map(|(reason, skipped)| {
            count(&format!("skipped: {reason}"), usize::try_from(skipped.count).unwrap_or(usize::MAX))
        });
        let file = self.result_file.iter().map(|path| (format!("result file: {}", path.display()), None));
        skipped.chain(file).collect()
    }
}

/// Names what was left out of annotations because it is broken.
pub(super) fn name_left_out(report: &Report) {
    let broken = report.iter().filter(|(reason, _)| *reason != Reason::OtherSplit);
    for example in broken.flat_map(|(_, skipped)| &skipped.examples) {
        output::say(&format!("left out: {example}"));
    }
}

impl Common {
    /// Reads annotations of files with `read`, which is told whether the first broken one is an error: it is, unless some may be left
    /// out. Files without any are refused, unless they have some of other splits.
    pub(super) fn read<T>(
        &self,
        files: &[PathBuf],
        read: impl FnOnce(bool) -> Result<Loaded<T>, DataError>,
    ) -> Result<Loaded<T>, CliError> {
        let loaded = read(self.max_bad_fraction <= 0.0)?;
        let broken = || loaded.report.iter().filter(|(reason, _)| *reason != Reason::OtherSplit);
        let left_out: u64 = broken().map(|(_, skipped)| skipped.count).sum();
        let left_out = usize::try_from(left_out).unwrap_or(usize::MAX);
        let units = loaded.items.len().saturating_add(left_out);
        if left_out as f64 > self.max_bad_fraction * units as f64 {
            let first = broken().flat_map(|(_, skipped)| &skipped.examples).next().cloned().unwrap_or_default();
            let problem = SweepProblem::TooManyBroken { left_out, units, limit: self.max_bad_fraction, first };
            return Err(CliError::from(TaskError::from(problem)));
        }
        name_left_out(&loaded.report);
        let has_others = loaded.report.iter().any(|(reason, _)| reason == Reason::OtherSplit);
        if loaded.items.is_empty() && !has_others {
            let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
            return Err(TaskError::Empty { what: names.join(", ") }.into());
        }
        Ok(loaded)
    }
}
