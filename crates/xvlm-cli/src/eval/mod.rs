//! `xvlm eval`: scores on a folder of annotated pictures.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use xvlm::metrics::boxes::BoxScores;
use xvlm::metrics::fill::FillScores;
use xvlm::metrics::retrieval::RetrievalScores;
use xvlm::metrics::vqa::ExactScores;
use xvlm::tasks::captioning::CaptionScores;
use xvlm::tasks::{captioning, fill, grounding, retrieval, vqa};

use crate::ModelArgs;
use crate::output::{self, CliError, Rows, table};
use crate::progress::Stage;

/// Score a model on a folder that `xvlm synth` wrote, or on one's own data in the same formats (captions are checked
/// against scenes, so they are for the former only)
#[derive(Args)]
pub(crate) struct Eval {
    /// What to score
    #[arg(value_enum)]
    task: Task,
    #[command(flatten)]
    model: ModelArgs,
    /// Folder with the annotations: grounding.json, retrieval.json, fill.json, vqa.json, or captions.json
    /// with scenes.json
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Retrieval: how many of the nearest by embedding are ranked again by matching, both ways
    #[arg(long, value_name = "K", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    k_test: u32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Task {
    /// Boxes of phrases: those with an IoU of at least 0.5 with the truth, and the mean IoU (both in percent)
    Grounding,
    /// Texts found by their picture and pictures found by their text: recall at 1, 5 and 10 in percent
    Retrieval,
    /// Words for blanks: the right one first, or among the first five, in percent
    Fill,
    /// Questions answered in the words of the file, in percent
    Vqa,
    /// Captions checked against the scene: right objects, colours and relation, in percent
    Caption,
}

#[derive(Serialize)]
struct Report<'a, T> {
    task: Task,
    model: String,
    data: &'a Path,
    #[serde(flatten)]
    scores: T,
}

impl Eval {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let predictor = self.model.open()?;
        let (model, data) = (predictor.model(), self.data.as_path());
        match self.task {
            Task::Grounding => {
                let done = Stage::run("phrases", |at| grounding::evaluate(model, data, at))?;
                self.print(done.scores, grounding_rows)
            }
            Task::Retrieval => {
                let k_test = self.k_test as usize;
                let done = Stage::run("pairs", |at| retrieval::evaluate(model, data, k_test, at))?;
                self.print(done.scores, retrieval_rows)
            }
            Task::Fill => {
                let done = Stage::run("blanks", |at| fill::evaluate(model, data, at))?;
                self.print(done.scores, fill_rows)
            }
            Task::Vqa => {
                let done = Stage::run("questions", |at| vqa::evaluate(model, data, at))?;
                self.print(done.scores, question_rows)
            }
            Task::Caption => {
                let done = Stage::run("captions", |at| captioning::evaluate(model, data, model.config().search, at))?;
                self.print(done.scores, caption_rows)
            }
        }
    }

    fn print<T: Serialize>(&self, scores: T, rows: impl Fn(&T) -> Rows) -> Result<(), CliError> {
        let report = Report { task: self.task, model: self.model.name(), data: &self.data, scores };
        output::print(self.json, &report, |report| table(&rows(&report.scores)))
    }
}

/// A row of a score in percent.
fn percent(name: impl Into<String>, score: f64) -> (String, Option<String>) {
    (name.into(), Some(format!("{score:.1} %")))
}

fn count(name: &str, count: usize) -> (String, Option<String>) {
    (name.to_owned(), Some(count.to_string()))
}

pub(crate) fn grounding_rows(scores: &BoxScores) -> Rows {
    vec![
        percent("boxes with IoU ≥ 0.5", scores.accuracy),
        percent("mean IoU", scores.mean_iou),
        count("phrases", scores.count),
    ]
}

pub(crate) fn retrieval_rows(scores: &RetrievalScores) -> Rows {
    vec![
        percent("text of a picture, R@1", scores.text_r1),
        percent("text of a picture, R@5", scores.text_r5),
        percent("text of a picture, R@10", scores.text_r10),
        percent("picture of a text, R@1", scores.image_r1),
        percent("picture of a text, R@5", scores.image_r5),
        percent("picture of a text, R@10", scores.image_r10),
    ]
}

pub(crate) fn fill_rows(scores: &FillScores) -> Rows {
    let mut rows = vec![percent("right word first", scores.top1), percent("among the first five", scores.top5)];
    rows.extend(scores.kinds.iter().map(|(kind, scores)| percent(format!("{kind} first"), scores.top1)));
    rows.push(count("blanks", scores.count));
    rows
}

pub(crate) fn question_rows(scores: &ExactScores) -> Rows {
    let mut rows = vec![percent("answers right", scores.right)];
    rows.extend(scores.kinds.iter().map(|(kind, scores)| percent(kind, scores.right)));
    rows.push(count("questions", scores.count));
    rows
}

pub(crate) fn caption_rows(scores: &CaptionScores) -> Rows {
    vec![
        percent("objects, colours and relation right", scores.right),
        percent("objects right", scores.objects),
        percent("colours right", scores.colours),
        percent("relation right", scores.relation),
        percent("all right, with sizes and textures", scores.all),
        count("captions", scores.count),
    ]
}
