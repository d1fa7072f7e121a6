//! Questions of a data set, answered and scored.

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;
use xvlm_data::annotations::{Loaded, Reading, VqaItem};
use xvlm_data::{DataError, Picture, pre_caption};
use xvlm_metrics::vqa::{ExactScores, VqaScores, consensus};

use super::{AnswerList, Ranking, answer, rank_answers};
use crate::error::TaskError;
use crate::finetune::VqaTask;
use crate::grouped::Grouped;
use crate::json_id;
use crate::model::{ImageTokens, Model};
use crate::search::Search;
use crate::sweep::{Item, LeftOut, Sweep, Work};

/// How questions are answered.
#[derive(Clone, Debug)]
pub enum Answering {
    /// In words of the model's own.
    Open(Search),
    /// By an answer of a list.
    Ranked(AnswerList, Ranking),
}

/// How questions of a data set are answered.
#[derive(Clone, Debug)]
pub struct Options {
    /// From what.
    pub answering: Answering,
    /// Images at a time.
    pub batch: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { answering: Answering::Open(Search::answers()), batch: crate::BATCH }
    }
}

/// The answer to a question of a data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Given {
    /// The answer.
    pub text: String,
    /// Ranked: its probability among the answers that were ranked by the whole. Open: see [`crate::Sequence::score`].
    pub score: f32,
}

/// What the model answered to each question of a data set, and the scores.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The questions that were answered.
    pub items: Vec<VqaItem>,
    /// What was answered to each.
    pub answers: Vec<Given>,
    /// How right the answers are.
    pub scores: Scores,
    /// The questions that could not be asked.
    pub left_out: Vec<LeftOut>,
}

/// How right answers are, as far as the data set has answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Scores {
    /// Agreement with ten people: the official accuracy of VQA v2. Of the questions that have at least as many answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consensus: Option<VqaScores>,
    /// How often the answer is one in the file, but for punctuation and capitals. Of the questions that have fewer answers.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub exact: Option<ExactScores>,
    /// The questions without answers, by identifier: they are answered, but not scored.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub without_answers: Vec<String>,
}

impl Item for VqaItem {
    fn image(&self) -> &Path {
        &self.image
    }

    fn text(&self) -> &str {
        &self.question
    }
}

/// Reads the test files of a configuration.
///
/// # Errors
/// As [`Reading::vqa`]; with `strict`, the first broken item is one.
pub fn test_items(task: &VqaTask, strict: bool) -> Result<Loaded<VqaItem>, DataError> {
    let (images, vg_images) = (Some(task.vqa_root.clone()), Some(task.vg_root.clone()));
    Reading { images, vg_images, strict, ..Reading::default() }.vqa(&task.test_file)
}

/// Answers questions, whether the data set has answers or not, and scores those to which it has. Each image is encoded once for
/// all questions about it. Left out are questions whose image cannot be opened, and those without a word.
///
/// # Errors
/// If there are no questions, the model is made for another task, or as [`Sweep::run`].
pub fn evaluate(
    model: &Model,
    items: Vec<VqaItem>,
    options: &Options,
    sweep: &mut Sweep,
) -> Result<Evaluation, TaskError> {
    if items.is_empty() {
        return Err(TaskError::Empty { what: "questions".to_owned() });
    }
    let work = Work {
        name: "vqa",
        options: match &options.answering {
            Answering::Open(search) => json!({ "search": search }),
            Answering::Ranked(list, ranking) => json!({ "ranking": ranking, "answers": list.texts() }),
        },
        batch: options.batch,
    };
    let grouped = Grouped::by(&items, |item| item.image.clone());
    let ask = |images: &ImageTokens, questions: &[(u32, &str)]| given(model, images, questions, &options.answering);
    let check = |item: &VqaItem, _: &Picture| pre_caption(&item.question, usize::MAX).map(drop);
    let answers = sweep.by_image(&work, model, &grouped.apply(&items), check, ask)?;
    let (items, answers, left_out) = grouped.undo(answers).split(items);
    Ok(Evaluation { scores: Scores::new(&items, &answers)?, items, answers, left_out })
}

/// Answers questions from a list or freely.
fn given(
    model: &Model,
    images: &ImageTokens,
    questions: &[(u32, &str)],
    answering: &Answering,
) -> Result<Vec<Given>, TaskError> {
    Ok(match answering {
        Answering::Open(search) => {
            let written = answer(model, images, questions, *search)?.into_iter();
            written.map(|written| Given { text: written.text, score: written.score }).collect()
        }
        Answering::Ranked(list, ranking) => {
            let ranked = rank_answers(model, images, questions, list, *ranking)?.into_iter();
            let best = ranked.filter_map(|ranked| ranked.first().copied());
            best.map(|best| Given { text: list.texts()[best.answer as usize].clone(), score: best.probability })
                .collect()
        }
    })
}

/// How many people answer each question of VQA v2.
const PEOPLE: usize = 10;

impl Scores {
    fn new(items: &[VqaItem], answers: &[Given]) -> Result<Self, TaskError> {
        // The model learnt to write cleaned texts; one that cleaning leaves nothing of cannot be right.
        let clean = |text: &str| pre_caption(text, usize::MAX).ok();
        let (mut agreed, mut exact, mut without_answers) = (Vec::new(), Vec::new(), Vec::new());
        for (item, given) in items.iter().zip(answers) {
            match item.answers.len() {
                0 => without_answers.push(item.question_id.clone()),
                PEOPLE.. => {
                    let (kind, question_type) = (item.kind.as_str(), item.question_type.as_str());
                    agreed.push((kind, question_type, consensus(&given.text, &item.answers)?));
                }
                _ => {
                    let given = clean(&given.text);
                    let is_right = given.is_some() && item.answers.iter().any(|answer| clean(answer) == given);
                    exact.push((item.kind.as_str(), is_right));
                }
            }
        }
        Ok(Self {
            consensus: (!agreed.is_empty()).then(|| VqaScores::new(agreed)),
            exact: (!exact.is_empty()).then(|| ExactScores::new(exact)),
            without_answers,
        })
    }
}

/// Writes answers as the evaluation server of VQA takes them: `[{"question_id": 1, "answer": "yes"}]`. Identifiers that are no
/// numbers are written as they are; the first of them is returned, since the server takes numbers only.
///
/// # Errors
/// If two questions have one identifier, or `out` cannot be written.
pub fn write_results(evaluation: &Evaluation, out: &mut dyn Write) -> std::io::Result<Option<String>> {
    let mut known = HashSet::new();
    let (mut first, mut results) = (None, Vec::with_capacity(evaluation.items.len()));
    for (item, given) in evaluation.items.iter().zip(&evaluation.answers) {
        let id = &item.question_id;
        if !known.insert(id) {
            let found = format!("question_id: expected one of its own, found {id:?} again");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, found));
        }
        let number = json_id(id);
        if !number.is_number() {
            first.get_or_insert_with(|| id.clone());
        }
        results.push(json!({ "question_id": number, "answer": given.text }));
    }
    serde_json::to_writer(&mut *out, &results)?;
    writeln!(out)?;
    Ok(first)
}
