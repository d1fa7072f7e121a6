//! Visual question answering: the answer is what continues the question.

use std::path::Path;

use xvlm_data::annotations::{VqaItem, read_vqa};
use xvlm_data::{Picture, pre_question};
use xvlm_metrics::vqa::ExactScores;

use crate::error::TaskError;
use crate::generate::{Search, Written, write};
use crate::model::{ImageTokens, Model};
use crate::{BATCH, Counter};

/// Answers questions, each given with the row of `images` it is about.
///
/// # Errors
/// If a question is empty.
pub fn answer(
    model: &Model,
    images: &ImageTokens,
    questions: &[(u32, &str)],
    search: Search,
) -> Result<Vec<Written>, TaskError> {
    let config = model.config();
    let start = |&(image, question): &(u32, &str)| -> Result<(u32, Vec<u32>), TaskError> {
        let cleaned = pre_question(question, config.max_words);
        Ok((image, model.tokenizer().encode(&cleaned, config.max_tokens, false)?))
    };
    let rows = questions.iter().map(start).collect::<Result<Vec<_>, _>>()?;
    write(model, images, &rows, search)
}

/// What the model answered to each question of a data set, and the scores.
pub struct Evaluation {
    /// The questions.
    pub items: Vec<VqaItem>,
    /// What was answered to each.
    pub answers: Vec<Written>,
    /// How often that is one of the answers in the file.
    pub scores: ExactScores,
}

/// Evaluates on `vqa.json` of a folder.
///
/// # Errors
/// If the file or an image cannot be read.
pub fn evaluate(model: &Model, data: &Path, counter: Counter) -> Result<Evaluation, TaskError> {
    let items = read_vqa(data.join("vqa.json"))?;
    if items.is_empty() {
        return Err(TaskError::Empty { what: data.join("vqa.json").display().to_string() });
    }
    let mut answers = Vec::with_capacity(items.len());
    let by_image: Vec<&[VqaItem]> = items.chunk_by(|a, b| a.image == b.image).collect();
    for group in by_image.chunks(BATCH) {
        let pictures = group.iter().map(|items| Picture::open(&items[0].image)).collect::<Result<Vec<_>, _>>()?;
        let images = model.encode(&pictures)?;
        let questions: Vec<(u32, &str)> = group
            .iter()
            .enumerate()
            .flat_map(|(row, items)| items.iter().map(move |item| (row as u32, item.question.as_str())))
            .collect();
        answers.extend(answer(model, &images, &questions, Search::answers())?);
        counter(answers.len(), items.len());
    }
    let right =
        items.iter().zip(&answers).map(|(item, given)| (item.kind.as_str(), item.answers.contains(&given.text)));
    Ok(Evaluation { scores: ExactScores::new(right), items, answers })
}
