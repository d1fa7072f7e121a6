//! How training went: a row of JSON a report.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// A row of `metrics.jsonl`: what a [`StepReport`](crate::StepReport) said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricsRow {
    /// Iterations done.
    pub iteration: u64,
    /// Mean of each loss since the row before.
    pub losses: BTreeMap<String, f64>,
    /// The score of the model after the last iteration ([`Trainable::score`](crate::Trainable::score)), where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Learning rate of the last iteration.
    pub lr: f64,
    /// Mean norm of the gradient since the row before, before clipping. Steps that were left out, as their gradient was not
    /// finite, do not count.
    pub grad_norm: f64,
    /// What losses are multiplied by for their gradients, in a run of precision f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Samples per second since the row before.
    pub images_per_second: f64,
    /// Time trained since the run began.
    pub elapsed_seconds: f64,
    /// The most memory that the process had at once so far, in MiB; none where the system does not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory_mib: Option<u64>,
}

/// The most memory that this process had at once so far, in MiB: the high-water mark of its resident set. None where the
/// system has no `/proc/self/status`. Memory of a GPU is not counted.
pub fn peak_memory_mib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<u64>().ok())?;
    Some(kibibytes / 1024)
}

/// One loss over a run.
#[derive(Clone, Debug, PartialEq)]
pub struct LossCurve {
    /// The loss.
    pub name: String,
    /// Iteration and value, in order.
    pub points: Vec<(u64, f64)>,
}

/// Reads a `metrics.jsonl`. A last line that is not finished is left out: a run may be writing it, or was killed at it.
///
/// # Errors
/// [`TrainError::Io`] if it cannot be read, [`TrainError::Metrics`] if a finished line is no row.
pub fn read_metrics(path: &Path) -> Result<Vec<MetricsRow>, TrainError> {
    let text = fs::read(path).map_err(TrainError::io(path))?;
    parse(path, &text).map(|row| row.map(|(row, _)| row)).collect()
}

/// The curve of each loss, by name.
pub fn loss_curves(rows: &[MetricsRow]) -> Vec<LossCurve> {
    let mut curves = BTreeMap::<_, Vec<_>>::new();
    for row in rows {
        for (name, &value) in &row.losses {
            curves.entry(name).or_default().push((row.iteration, value));
        }
    }
    curves.into_iter().map(|(name, points)| LossCurve { name: name.clone(), points }).collect()
}

/// The rows of a file, each with the offset at which it ends.
pub(crate) fn parse<'a>(
    path: &'a Path,
    text: &'a [u8],
) -> impl Iterator<Item = Result<(MetricsRow, usize), TrainError>> + 'a {
    let mut end = 0;
    let lines = text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    lines.enumerate().map(move |(i, line)| {
        end += line.len();
        match serde_json::from_slice(line) {
            Ok(row) => Ok((row, end)),
            Err(error) => Err(TrainError::Metrics { path: path.to_path_buf(), line: i + 1, found: error.to_string() }),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_that_was_given_back_counts() {
        let before = peak_memory_mib().unwrap();
        // Touched, so that it is really there.
        let block = vec![1u8; (64 + before as usize) << 20];
        assert!(block.iter().step_by(4096).all(|&byte| byte == 1));
        drop(block);
        assert!(peak_memory_mib().unwrap() >= before + 64);
    }

    #[test]
    fn rows_without_memory_are_read() {
        let text =
            r#"{"iteration":1,"losses":{},"lr":0.1,"grad_norm":1.0,"images_per_second":2.0,"elapsed_seconds":3.0}"#;
        let row: MetricsRow = serde_json::from_str(text).unwrap();
        assert_eq!(row.peak_memory_mib, None);
        assert_eq!(serde_json::to_string(&row).unwrap(), text);
    }
}
