//! Questions: consensus with people's answers.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use xvlm::data::Place;
use xvlm::metrics::vqa::{VqaScores, consensus, consensus_as_original};

use super::read::{self, Item, Once};
use super::{Common, count, metrics, percent};
use crate::output::{CliError, Rows};

/// How many answers a question of the official data has.
const OFFICIAL: usize = 10;

/// Questions: the accuracy of the official VQA evaluation, over all and by type of answer and question
///
/// References are VQA's annotations (v2_mscoco_*_annotations.json) or a list of X-VLM's form; results are [{question_id,
/// answer}].
#[derive(Args)]
pub(super) struct Vqa {
    /// Annotations; repeatable
    #[arg(long, value_name = "FILE", required = true)]
    refs: Vec<PathBuf>,
    #[command(flatten)]
    common: Common,
    /// Questions (v2_OpenEnded_mscoco_*_questions.json), each of which must be annotated
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    /// Normalise answers as the evaluation in X-VLM's repository does
    #[arg(long)]
    as_original: bool,
}

#[derive(Serialize)]
struct Scores {
    #[serde(flatten)]
    scores: VqaScores,
    as_original: bool,
    /// Questions with other than ten answers.
    other_than_ten_answers: usize,
}

struct Question {
    id: String,
    answers: Vec<String>,
    answer_type: String,
    question_type: String,
}

impl Vqa {
    pub(super) fn run(self) -> Result<(), CliError> {
        let mut questions = Vec::new();
        let mut once = Once::default();
        for path in &self.refs {
            read_questions(path, &mut once, &mut questions)?;
        }
        if let Some(path) = &self.questions {
            check_questions(path, &questions)?;
        }
        let hyps = &self.common.hyps;
        let list: Value = read::document(hyps)?;
        let results = read::results(hyps, &list, "question_id")?;
        let mut answers = HashMap::new();
        for (id, item) in &results {
            answers.insert(id.as_str(), item.text("answer")?);
        }
        let asked = questions.iter().map(|question| question.id.as_str());
        let given = results.iter().map(|(id, _)| id.as_str());
        let coverage = self.common.pairing("questions", "question_id").compare(asked, given)?;
        questions.retain(|question| answers.contains_key(question.id.as_str()));

        let measure = if self.as_original { consensus_as_original } else { consensus };
        let score = |question: &Question| measure(answers[question.id.as_str()], &question.answers);
        let each: Vec<f64> = questions.iter().map(score).collect::<Result<_, _>>().map_err(metrics)?;
        let typed = questions.iter().zip(&each);
        let typed =
            typed.map(|(question, &score)| (question.answer_type.as_str(), question.question_type.as_str(), score));
        let scores = Scores {
            scores: VqaScores::new(typed),
            as_original: self.as_original,
            other_than_ten_answers: questions.iter().filter(|question| question.answers.len() != OFFICIAL).count(),
        };
        let listed = || {
            let entry =
                |(question, score): (&Question, &f64)| json!({"question_id": question.id, "accuracy": 100.0 * score});
            questions.iter().zip(&each).map(entry).collect()
        };
        self.common.print("vqa", &self.refs, scores, coverage, listed, rows)
    }
}

fn read_questions(path: &Path, once: &mut Once, into: &mut Vec<Question>) -> Result<(), CliError> {
    let document: Value = read::document(path)?;
    let annotations = document.get("annotations");
    if annotations.is_none() && document.is_object() {
        return Err(read::wrong(path, Place::Whole, "annotations", "a list of annotations", "nothing"));
    }
    let list = annotations.unwrap_or(&document);
    for (number, item) in read::items(path, "annotations", list)?.into_iter().enumerate() {
        let id = item.id("question_id")?;
        once.add(path, Place::Item(number), "question_id", &id)?;
        let (answers, answer_type) = match annotations {
            Some(_) => {
                let answer = |value| Ok(Item::new(path, Place::Item(number), value)?.text("answer")?.to_owned());
                let answers: Result<_, CliError> = item.list("answers")?.iter().map(answer).collect();
                (answers?, item.text_or_empty("answer_type")?)
            }
            None => (texts(&item, "answer")?, item.text_or_empty("kind")?),
        };
        let (answer_type, question_type) = (answer_type.to_owned(), item.text_or_empty("question_type")?.to_owned());
        into.push(Question { id, answers, answer_type, question_type });
    }
    Ok(())
}

/// A string, or a list of at least one.
fn texts(item: &Item<'_>, field: &str) -> Result<Vec<String>, CliError> {
    let wrong = || item.wrong(field, "a string or a list of at least one");
    match item.get(field) {
        Some(Value::String(answer)) => Ok(vec![answer.clone()]),
        Some(Value::Array(list)) if !list.is_empty() => {
            list.iter().map(|answer| answer.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
        }
        _ => Err(wrong()),
    }
}

/// Whether the questions asked are those annotated.
fn check_questions(path: &Path, annotated: &[Question]) -> Result<(), CliError> {
    let document: Value = read::document(path)?;
    let list = document.get("questions").unwrap_or(&Value::Null);
    let asked = read::results(path, list, "question_id")?;
    let annotated: HashSet<&str> = annotated.iter().map(|question| question.id.as_str()).collect();
    let without: Vec<&str> = asked.iter().map(|(id, _)| id.as_str()).filter(|id| !annotated.contains(id)).collect();
    if !without.is_empty() {
        let found = format!("none of {} of them ({})", without.len(), super::names(&without));
        return Err(read::wrong(path, Place::Whole, "question_id", "an annotation of each question", found));
    }
    let asked: HashSet<&str> = asked.iter().map(|(id, _)| id.as_str()).collect();
    let other: Vec<&str> = annotated.iter().copied().filter(|id| !asked.contains(id)).collect();
    if other.is_empty() {
        return Ok(());
    }
    let found = format!("{} of others", other.len());
    Err(read::wrong(path, Place::Whole, "question_id", "annotations of these questions only", found))
}

fn rows(scores: &Scores) -> Rows {
    let Scores { scores, other_than_ten_answers, .. } = scores;
    let mut rows = vec![percent("accuracy", scores.accuracy), count("questions", scores.count)];
    for (heading, types) in
        [("by type of answer", &scores.answer_types), ("by type of question", &scores.question_types)]
    {
        if !types.is_empty() {
            rows.push((heading.to_owned(), None));
            rows.extend(types.iter().map(|(name, scores)| percent(name, scores.accuracy)));
        }
    }
    if *other_than_ten_answers > 0 {
        rows.push(count("questions with other than ten answers", *other_than_ten_answers));
    }
    rows
}
