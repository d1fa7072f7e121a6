//! Statements of a data set, judged and scored.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::{Value, json};
use xvlm_data::annotations::{Loaded, NlvrItem, Reading};
use xvlm_data::{DataError, Picture, pre_caption};
use xvlm_metrics::nlvr::NlvrScores;

use super::judge;
use crate::error::TaskError;
use crate::finetune::NlvrTask;
use crate::grouped::Grouped;
use crate::model::Model;
use crate::sweep::{LeftOut, Sweep, Work};

/// How statements of a data set are judged.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Statements at a time.
    pub batch: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { batch: crate::BATCH }
    }
}

/// How likely each statement of a data set is to be true, and the scores.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The statements that were judged.
    pub items: Vec<NlvrItem>,
    /// The probability that each is true; above one half counts as true.
    pub answers: Vec<f32>,
    /// How right this is.
    pub scores: NlvrScores,
    /// The statements that could not be judged.
    pub left_out: Vec<LeftOut>,
}

/// Reads the test files of a configuration.
///
/// # Errors
/// As [`Reading::nlvr`]; with `strict`, the first broken item is one.
pub fn test_items(task: &NlvrTask, strict: bool) -> Result<Loaded<NlvrItem>, DataError> {
    Reading { images: Some(task.image_root.clone()), strict, ..Reading::default() }.nlvr(&task.test_file)
}

/// Judges statements. Those about the same pair are judged together, and each image of a batch is encoded once.
///
/// # Errors
/// If there are no statements, the model is made for another task, or as [`Sweep::run`].
pub fn evaluate(
    model: &Model,
    items: Vec<NlvrItem>,
    options: &Options,
    sweep: &mut Sweep,
) -> Result<Evaluation, TaskError> {
    if items.is_empty() {
        return Err(TaskError::Empty { what: "statements".to_owned() });
    }
    let grouped = Grouped::by(&items, |item| item.images.clone());
    let work = Work { name: "nlvr", options: Value::Null, batch: options.batch };
    let name = |item: &NlvrItem| json!([item.images, item.sentence]).to_string();
    let answers = sweep.run(&work, &grouped.apply(&items), name, |items| judge_items(model, items))?;
    let (items, answers, left_out) = grouped.undo(answers).split(items);
    let scores = score(&items, &answers);
    Ok(Evaluation { items, answers, scores, left_out })
}

/// Opens each image of some statements, encodes it once, and judges those statements of which both images can be opened and the
/// sentence has a word.
fn judge_items(model: &Model, items: &[&NlvrItem]) -> Result<Vec<Result<f32, DataError>>, TaskError> {
    let mut files: Vec<&Path> = items.iter().flat_map(|item| item.images.iter().map(AsRef::as_ref)).collect();
    files.sort_unstable();
    files.dedup();
    let opened: Vec<Result<Picture, DataError>> = files.par_iter().map(|file| Picture::open(file)).collect();
    let (mut pictures, mut rows, mut broken) = (Vec::new(), HashMap::new(), HashMap::new());
    for (file, opened) in files.iter().zip(opened) {
        match opened {
            Ok(picture) => {
                rows.insert(*file, pictures.len() as u32);
                pictures.push(picture);
            }
            Err(error) => {
                broken.insert(*file, Arc::new(error));
            }
        }
    }
    let mut statements = Vec::new();
    let checked: Vec<Result<(), DataError>> = items
        .iter()
        .map(|item| {
            let [left, right] = &item.images;
            for image in [left, right] {
                if let Some(error) = broken.get(image.as_path()) {
                    return Err(DataError::Unopened(Arc::clone(error)));
                }
            }
            pre_caption(&item.sentence, usize::MAX)?;
            statements.push(([rows[left.as_path()], rows[right.as_path()]], item.sentence.as_str()));
            Ok(())
        })
        .collect();
    let judged = match statements.is_empty() {
        true => Vec::new(),
        false => judge(model, &model.encode(&pictures)?, &statements)?,
    };
    let mut judged = judged.into_iter();
    Ok(checked.into_iter().filter_map(|checked| checked.map(|()| judged.next()).transpose()).collect())
}

/// Scores of judgements; two statements that say one sentence have one [`sentence_key`].
fn score(items: &[NlvrItem], probabilities: &[f32]) -> NlvrScores {
    let mut sentences: HashMap<String, usize> = HashMap::new();
    let numbered = items.iter().enumerate().map(|(number, item)| {
        let next = sentences.len();
        let sentence = *sentences.entry(sentence_key(item)).or_insert(next);
        // An identifier as NLVR2 has them: the third part is the pair's, the others are the sentence's.
        format!("list-0-{number}-{sentence}")
    });
    let numbered: Vec<String> = numbered.collect();
    let right = items.iter().zip(probabilities).map(|(item, &probability)| is_true(probability) == item.label);
    NlvrScores::new(numbered.iter().map(String::as_str).zip(right))
}

fn is_true(probability: f32) -> bool {
    probability > 0.5
}

/// What the statements share that say one sentence of several pairs. Of an identifier as NLVR2 has them, `dev-850-2-1`, all but the
/// third part, which is the number of the pair (as in the official evaluation). Of a list without identifiers, the sentence, and
/// the set of images that the name of an image file tells, `dev-850-2-img0.png`.
fn sentence_key(item: &NlvrItem) -> String {
    let parts: Vec<&str> = item.id.split('-').collect();
    if let [split, set, _, sentence] = parts.as_slice() {
        return json!([split, set, sentence]).to_string();
    }
    let stem = item.images[0].file_stem().unwrap_or_default().to_string_lossy();
    match stem.split('-').collect::<Vec<_>>().as_slice() {
        [split, set, _, image] if image.starts_with("img") => json!([split, set, item.sentence]).to_string(),
        _ => json!([item.sentence]).to_string(),
    }
}

/// Writes judgements as the official evaluation of NLVR2 reads them: `IDENTIFIER,True` or `IDENTIFIER,False`, one a line.
///
/// # Errors
/// If `out` cannot be written.
pub fn write_results(evaluation: &Evaluation, out: &mut dyn Write) -> std::io::Result<()> {
    for (item, &probability) in evaluation.items.iter().zip(&evaluation.answers) {
        writeln!(out, "{},{}", item.id, if is_true(probability) { "True" } else { "False" })?;
    }
    Ok(())
}
