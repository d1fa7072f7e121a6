//! Statements of a data set, judged and scored.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::{Value, json};
use xvlm_data::annotations::{Loaded, NlvrItem, Reading};
use xvlm_data::{DataError, Picture, pre_caption};
use xvlm_metrics::nlvr::{BiasScores, NlvrScores, balanced, sentence};

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
    /// The same of statements about pairs that others are about, too.
    pub bias: BiasScores,
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
    let answers = grouped.undo(answers);
    // Of all statements, whether they could be judged or not.
    let balance = balanced(&items.iter().map(|item| (&item.images, item.label)).collect::<Vec<_>>());
    let balance =
        balance.into_iter().zip(&answers.given).filter(|(_, given)| given.is_some()).map(|(balance, _)| balance);
    let balance: Vec<Option<bool>> = balance.collect();
    let (items, answers, left_out) = answers.split(items);
    let judged = items.iter().zip(&answers).zip(balance).map(|((item, &probability), balance)| {
        (sentence(&item.id, &item.images[0], &item.sentence), is_true(probability) == item.label, balance)
    });
    let judged: Vec<_> = judged.collect();
    let scores = NlvrScores::new(judged.iter().map(|&(sentence, right, _)| (sentence, right)));
    let bias = BiasScores::new(&judged);
    Ok(Evaluation { items, answers, scores, bias, left_out })
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

fn is_true(probability: f32) -> bool {
    probability > 0.5
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
