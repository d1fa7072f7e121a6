//! Sentences about two images: accuracy and consistency.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use xvlm::data::Place;
use xvlm::metrics::nlvr::{BiasScores, NlvrScores, balanced, sentence};

use super::read::{self, Item, Once};
use super::{Common, count, percent};
use crate::output::{CliError, Rows};

/// Sentences about two images: accuracy and consistency, over all, balanced and unbalanced
///
/// References are NLVR2's files (an object a line) or a list of X-VLM's form; results are lines `identifier,prediction`, the
/// prediction being true or false. Of references without identifiers, an item's number, from 0, is its identifier.
#[derive(Args)]
pub(super) struct Nlvr {
    /// Labelled examples
    #[arg(long, value_name = "FILE")]
    refs: PathBuf,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Scores {
    #[serde(flatten)]
    all: NlvrScores,
    #[serde(flatten)]
    bias: BiasScores,
}

struct Example {
    id: String,
    images: [String; 2],
    words: String,
    label: bool,
}

impl Example {
    /// What the examples of one sentence share, if it is known.
    fn told(&self) -> Option<[&str; 3]> {
        sentence(&self.id, Path::new(&self.images[0]), &self.words)
    }
}

impl Nlvr {
    pub(super) fn run(self) -> Result<(), CliError> {
        let examples = read_examples(&self.refs)?;
        let predictions = read_predictions(&self.common.hyps)?;
        let asked = examples.iter().map(|example| example.id.as_str());
        let given = predictions.iter().map(|(id, _)| id.as_str());
        let coverage = self.common.pairing("examples", "identifier").compare(asked, given)?;

        let predictions: HashMap<&str, bool> = predictions.iter().map(|(id, label)| (id.as_str(), *label)).collect();
        // Of all examples, whether predicted or not.
        let balance = balanced(&examples.iter().map(|example| (&example.images, example.label)).collect::<Vec<_>>());
        let judged = examples.iter().zip(balance).filter_map(|(example, balance)| {
            let right = *predictions.get(example.id.as_str())? == example.label;
            Some((example, right, balance))
        });
        let judged: Vec<(&Example, bool, Option<bool>)> = judged.collect();
        let of_sentences: Vec<_> =
            judged.iter().map(|&(example, right, balance)| (example.told(), right, balance)).collect();
        let scores = Scores {
            all: NlvrScores::new(of_sentences.iter().map(|&(sentence, right, _)| (sentence, right))),
            bias: BiasScores::new(&of_sentences),
        };
        let each =
            || judged.iter().map(|(example, right, _)| json!({"identifier": example.id, "right": right})).collect();
        self.common.print("nlvr", std::slice::from_ref(&self.refs), scores, coverage, each, rows)
    }
}

fn read_examples(path: &Path) -> Result<Vec<Example>, CliError> {
    let text = read::text(path)?;
    let mut examples = Vec::new();
    let mut once = Once::default();
    let mut add = |place: Place, value: &Value| {
        let item = Item::new(path, place.clone(), value)?;
        let example = read_example(&item, examples.len())?;
        once.add(path, place, "identifier", &example.id)?;
        examples.push(example);
        Ok::<_, CliError>(())
    };
    if text.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(&text).map_err(|source| read::json(path, Place::Whole, source))?;
        list.iter().enumerate().try_for_each(|(number, value)| add(Place::Item(number), value))?;
    } else {
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let place = Place::Line(number + 1);
            let value = serde_json::from_str(line).map_err(|source| read::json(path, place.clone(), source))?;
            add(place, &value)?;
        }
    }
    if examples.is_empty() {
        return Err(read::wrong(path, Place::Whole, "file", "at least one example", "none"));
    }
    Ok(examples)
}

fn read_example(item: &Item<'_>, number: usize) -> Result<Example, CliError> {
    let id = if item.get("identifier").is_some() { item.id("identifier")? } else { number.to_string() };
    let label = match item.get("label") {
        Some(Value::Bool(label)) => Some(*label),
        Some(Value::String(text)) => truth(text),
        _ => None,
    };
    let label = label.ok_or_else(|| item.wrong("label", "true or false"))?;
    let images = match item.get("images") {
        Some(_) => {
            let files: Option<Vec<String>> =
                item.list("images")?.iter().map(|file| file.as_str().map(str::to_owned)).collect();
            files.and_then(|files| files.try_into().ok()).ok_or_else(|| item.wrong("images", "two files"))?
        }
        None => [item.text_or_empty("left_url")?.to_owned(), item.text_or_empty("right_url")?.to_owned()],
    };
    // Without addresses no pair of images is known to be another.
    let images = if images.iter().all(String::is_empty) { [id.clone(), String::new()] } else { images };
    let words = item.text_or_empty("sentence")?.to_owned();
    Ok(Example { id, images, words, label })
}

fn truth(text: &str) -> Option<bool> {
    if text.eq_ignore_ascii_case("true") {
        Some(true)
    } else if text.eq_ignore_ascii_case("false") {
        Some(false)
    } else {
        None
    }
}

fn read_predictions(path: &Path) -> Result<Vec<(String, bool)>, CliError> {
    let text = read::text(path)?;
    let mut once = Once::default();
    let mut predictions = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = Place::Line(number + 1);
        let pair = line.split_once(',').map(|(id, prediction)| (id.trim(), truth(prediction.trim())));
        let Some((id, Some(prediction))) = pair else {
            let expected = "identifier,true or identifier,false";
            return Err(read::wrong(path, place, "line", expected, read::kind(&line.into())));
        };
        once.add(path, place, "identifier", id)?;
        predictions.push((id.to_owned(), prediction));
    }
    if predictions.is_empty() {
        return Err(read::wrong(path, Place::Whole, "file", "at least one line identifier,prediction", "none"));
    }
    Ok(predictions)
}

fn rows(scores: &Scores) -> Rows {
    let mut rows = Rows::new();
    let Scores { all, bias: BiasScores { balanced, unbalanced } } = scores;
    for (name, scores) in [("", all), ("balanced: ", balanced), ("unbalanced: ", unbalanced)] {
        if scores.count > 0 {
            rows.push(percent(format!("{name}accuracy"), scores.accuracy));
            rows.extend(scores.consistency.map(|consistency| percent(format!("{name}consistency"), consistency)));
            rows.push(count(format!("{name}examples"), scores.count));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_are_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.csv");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_predictions(&path).map_err(|error| error.to_string())
        };
        let found = read("dev-1-0-0,True\n\ndev-1-1-0, false\r\n");
        assert_eq!(found, Ok(vec![("dev-1-0-0".to_owned(), true), ("dev-1-1-0".to_owned(), false)]));
        let refused = |text: &str, expected: &str| {
            let found = read(text).unwrap_err();
            assert!(found.contains(expected), "{found}");
        };
        refused("", "expected at least one line identifier,prediction, found none");
        refused("a,true\nb,maybe", "p.csv:2: line: expected identifier,true or identifier,false, found \"b,maybe\"");
        refused("a,true\nb", "p.csv:2: line:");
        refused("a,true\na,true", "p.csv:2: identifier: expected an identifier of its own, found a, which:1 has");
    }
}
