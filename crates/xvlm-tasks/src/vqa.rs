//! Visual question answering: the answer is what continues the question.

use std::path::Path;

use xvlm_data::annotations::{VqaItem, read_vqa};
use xvlm_data::{pre_caption, pre_question};
use xvlm_metrics::vqa::ExactScores;

use crate::error::TaskError;
use crate::generate::{Search, Written, write};
use crate::model::{ImageTokens, Model};
use crate::{Counter, Item, ask_all, some};

/// Answers questions, each given with the row of `images` it is about.
///
/// # Errors
/// If a tensor operation fails.
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

impl Item for VqaItem {
    fn image(&self) -> &Path {
        &self.image
    }

    fn text(&self) -> &str {
        &self.question
    }
}

/// Evaluates on `vqa.json` of a folder.
///
/// # Errors
/// If the file or an image cannot be read, or a question has no answer.
pub fn evaluate(model: &Model, data: &Path, counter: Counter) -> Result<Evaluation, TaskError> {
    let items = some(read_vqa(data.join("vqa.json"))?, data, "vqa.json")?;
    if let Some(item) = items.iter().find(|item| item.answers.is_empty()) {
        let what = format!("{}, answers to question {}", data.join("vqa.json").display(), item.question_id);
        return Err(TaskError::Empty { what });
    }
    let ask = |images: &ImageTokens, questions: &[(u32, &str)]| answer(model, images, questions, Search::answers());
    let answers = ask_all(model, &items, |_, _| Ok(()), ask, counter)?;
    // The model learnt to write cleaned texts; one that cleaning leaves nothing of cannot be right.
    let clean = |text: &str| pre_caption(text, usize::MAX).ok();
    let is_right = |item: &VqaItem, given: &Written| {
        let given = clean(&given.text);
        given.is_some() && item.answers.iter().any(|answer| clean(answer) == given)
    };
    let right = items.iter().zip(&answers).map(|(item, given)| (item.kind.as_str(), is_right(item, given)));
    Ok(Evaluation { scores: ExactScores::new(right), items, answers })
}
