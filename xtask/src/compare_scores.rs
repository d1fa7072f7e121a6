//! `cargo xtask compare-scores`: is the model as good as it was?

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use crate::Done;

/// Compare the scores of `xvlm demo` with those that are committed
///
/// Every number of the committed file must be in the other one. Counts and seeds must be equal; a score may differ by the
/// tolerance or by two items of its `count`, whichever is more: sums in another order, on another processor, may turn a
/// close decision round.
#[derive(Args)]
pub(crate) struct CompareScores {
    /// The committed scores.json
    expected: PathBuf,
    /// The scores.json to check
    found: PathBuf,
    /// Largest difference that passes, in the unit of the scores: percent
    #[arg(long, value_name = "POINTS", default_value_t = 1.0)]
    tolerance: f64,
}

impl CompareScores {
    pub(crate) fn run(self) -> Done {
        let (expected, found) = (document(&self.expected)?, document(&self.found)?);
        let mut comparison = Comparison { tolerance: self.tolerance, compared: 0, off: Vec::new() };
        comparison.compare("", &expected, &found, self.tolerance);
        if comparison.compared == 0 {
            return Err(format!("{}: expected scores, found no number", self.expected.display()).into());
        }
        if comparison.off.is_empty() {
            println!("{} numbers are those of {}", comparison.compared, self.expected.display());
            return Ok(());
        }
        Err(format!("{}: scores differ:\n  {}", self.found.display(), comparison.off.join("\n  ")).into())
    }
}

fn document(path: &Path) -> Result<Value, Box<dyn std::error::Error>> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = fs::read_to_string(path).map_err(|error| named(&error))?;
    Ok(serde_json::from_str(&text).map_err(|error| named(&error))?)
}

/// Numbers that must be equal, and those that are fractions instead of percent.
const EXACT: [&str; 4] = ["count", "scenes", "unseen_scenes", "seed"];
const FRACTIONS: [&str; 2] = ["bleu4", "rouge_l"];

struct Comparison {
    tolerance: f64,
    compared: usize,
    off: Vec<String>,
}

impl Comparison {
    /// Compares all numbers below `place`, which may differ by `allowed`.
    fn compare(&mut self, place: &str, expected: &Value, found: &Value, allowed: f64) {
        match expected {
            Value::Object(fields) => {
                let items = fields.get("count").and_then(Value::as_f64);
                let allowed = items.map_or(self.tolerance, |items| self.tolerance.max(2.0 * 100.0 / items));
                for (name, value) in fields {
                    let allowed = match name.as_str() {
                        name if EXACT.contains(&name) => 0.0,
                        name if FRACTIONS.contains(&name) => allowed / 100.0,
                        _ => allowed,
                    };
                    let place = if place.is_empty() { name.clone() } else { format!("{place}.{name}") };
                    self.compare(&place, value, &found[name.as_str()], allowed);
                }
            }
            Value::Number(_) => {
                self.compared += 1;
                let numbers = expected.as_f64().zip(found.as_f64());
                if !numbers.is_some_and(|(expected, found)| (expected - found).abs() <= allowed) {
                    self.off.push(format!("{place}: expected {expected} within {allowed:.2}, found {found}"));
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn off(found: &Value) -> Vec<String> {
        let expected =
            json!({ "model": "a", "scenes": 9, "fill": { "top1": 80.0, "count": 50, "bleu4": 0.5 }, "r1": 70.0 });
        let mut comparison = Comparison { tolerance: 1.0, compared: 0, off: Vec::new() };
        comparison.compare("", &expected, found, 1.0);
        assert_eq!(comparison.compared, 5);
        comparison.off
    }

    #[test]
    fn every_number_counts() {
        let close = json!({ "scenes": 9, "fill": { "top1": 84.0, "count": 50, "bleu4": 0.53 }, "r1": 71.0 });
        assert!(off(&close).is_empty(), "two of fifty items may be decided otherwise");
        let far = json!({ "scenes": 8, "fill": { "top1": 84.5, "count": 51, "bleu4": 0.6 } });
        let places: Vec<String> = off(&far).iter().map(|line| line.split(':').next().unwrap().to_owned()).collect();
        assert_eq!(places, ["fill.bleu4", "fill.count", "fill.top1", "r1", "scenes"]);
    }
}
