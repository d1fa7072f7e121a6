//! `cargo xtask compare-scores`: is the model as good as it was?

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use crate::Done;

/// Compare the scores of `xvlm demo` with those that are committed
///
/// Every number of the committed file must be in the other one, and differ by no more than the tolerance: sums in
/// another order, on another processor, may turn a close decision round.
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
        let (expected, found) = (numbers_of(&self.expected)?, numbers_of(&self.found)?);
        let off = differences(&expected, &found, self.tolerance);
        if expected.is_empty() {
            return Err(format!("{}: expected scores, found no number", self.expected.display()).into());
        }
        if off.is_empty() {
            println!("{} scores are within {} of the committed ones", expected.len(), self.tolerance);
            return Ok(());
        }
        Err(format!("{}: scores differ:\n  {}", self.found.display(), off.join("\n  ")).into())
    }
}

type Numbers = BTreeMap<String, f64>;

fn numbers_of(path: &Path) -> Result<Numbers, Box<dyn std::error::Error>> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = fs::read_to_string(path).map_err(|error| named(&error))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| named(&error))?;
    let mut numbers = Numbers::new();
    collect(&value, String::new(), &mut numbers);
    Ok(numbers)
}

/// All numbers of a document, by their place in it.
fn collect(value: &Value, place: String, numbers: &mut Numbers) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| {
            let place = if place.is_empty() { name.clone() } else { format!("{place}.{name}") };
            collect(value, place, numbers);
        }),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, value)| collect(value, format!("{place}[{i}]"), numbers));
        }
        _ => numbers.extend(value.as_f64().map(|number| (place, number))),
    }
}

fn differences(expected: &Numbers, found: &Numbers, tolerance: f64) -> Vec<String> {
    let difference = |(place, expected): (&String, &f64)| match found.get(place) {
        Some(found) if (found - expected).abs() <= tolerance => None,
        Some(found) => Some(format!("{place}: expected {expected:.3}, found {found:.3}")),
        None => Some(format!("{place}: expected {expected:.3}, found none")),
    };
    expected.iter().filter_map(difference).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_number_counts() {
        let numbers = |value: Value| {
            let mut numbers = Numbers::new();
            collect(&value, String::new(), &mut numbers);
            numbers
        };
        let expected = numbers(json!({ "model": "a", "fill": { "top1": 80.0, "kinds": [1, 2.5] }, "scenes": 100 }));
        assert_eq!(expected.keys().collect::<Vec<_>>(), ["fill.kinds[0]", "fill.kinds[1]", "fill.top1", "scenes"]);
        assert!(differences(&expected, &expected, 0.0).is_empty());
        let found = numbers(json!({ "fill": { "top1": 81.5, "kinds": [1] }, "scenes": 100.5 }));
        let off = differences(&expected, &found, 1.0);
        assert_eq!(off, ["fill.kinds[1]: expected 2.500, found none", "fill.top1: expected 80.000, found 81.500"]);
    }
}
