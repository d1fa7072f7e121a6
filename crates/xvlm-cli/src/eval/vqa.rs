//! `xvlm eval vqa`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use xvlm::Bundled;
use xvlm::data::annotations::Reading;
use xvlm::metrics::vqa::ExactScores;
use xvlm::tasks::finetune::{FinetuneKind, FinetuneTask};
use xvlm::tasks::sweep::LeftOut;
use xvlm::tasks::vqa::{self, AnswerList, Answering, Options, Ranking, Scores};

use super::reading::Aside;
use super::{Common, DataArgs, Source, count, percent};
use crate::output::{self, CliError, Rows};

/// Questions: agreement with ten people's answers, or answers in the words of the file, in percent
///
/// With --config or --preset, the configuration's list of answers is ranked; with --data, answers are written freely unless
/// --answers is given. With --out, answers are also written in the form of the evaluation server of VQA (vqa.json); that is
/// all there is for questions without answers.
#[derive(Args)]
pub(crate) struct Vqa {
    #[command(flatten)]
    data: DataArgs,
    /// Answers to rank: a JSON list, or an answer a line
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// Write answers freely, whatever the configuration says
    #[arg(long, conflicts_with_all = ["answers", "k_test", "as_original"])]
    open: bool,
    /// How many answers, those whose first token is likeliest, are ranked by the whole [default: the configuration's, or 128]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    k_test: Option<u32>,
    /// Multiply the probability of an answer's first token in twice, as the original does
    #[arg(long)]
    as_original: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    scores: Scores,
    /// Entries of the list of answers that cannot be ranked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    answers_left_out: Vec<LeftOut>,
    #[serde(flatten)]
    aside: Aside,
}

impl Vqa {
    pub(super) fn run(self) -> Result<(), CliError> {
        let source = self.data.open(FinetuneKind::Vqa)?;
        let (task, files) = match &source {
            Source::Config(config) => match &config.task {
                FinetuneTask::Vqa(task) => (Some(task), task.test_file.clone()),
                other => return Err(self.data.other_task(other)),
            },
            Source::Folder(folder) => (None, vec![folder.join("vqa.json")]),
        };
        let loaded = self.common.read(&files, |strict| match task {
            Some(task) => vqa::test_items(task, strict),
            None => Reading { strict, ..Reading::default() }.vqa(&files),
        })?;
        let (items, skipped) = (loaded.items, loaded.report);
        if self.common.sweep.out.is_none() && !items.is_empty() && items.iter().all(|item| item.answers.is_empty()) {
            let expected = "a folder for the result file, as the questions have no answers to score against";
            return Err(CliError::Option { option: "--out", expected, found: "none".to_owned() });
        }
        let list = self.answers.as_ref().or(task.map(|task| &task.answer_list)).filter(|_| !self.open);
        let k = self.k_test.map(|k| k as usize).or(task.map(|task| task.k_test));
        let ranking = Ranking { k: k.unwrap_or(Ranking::default().k), as_original: self.as_original };
        if list.is_none() && (self.k_test.is_some() || self.as_original) {
            let expected = "a list of answers to rank, as --k-test and --as-original are about ranking";
            return Err(CliError::Option { option: "--answers", expected, found: "none".to_owned() });
        }

        let name = self.data.name();
        let done = self.common.evaluate_or(Bundled::Questions, "questions", &name, |model, sweep| {
            let mut options = Options::default();
            if let Some(path) = list {
                options.answering = Answering::Ranked(AnswerList::open(model, path)?, ranking);
            }
            if let Some(task) = task {
                options.batch = task.batch_size_test;
            }
            let answers_left_out = match &options.answering {
                Answering::Ranked(list, _) => list.left_out().to_vec(),
                Answering::Open(_) => Vec::new(),
            };
            Ok((vqa::evaluate(model, items, &options, sweep)?, answers_left_out))
        })?;
        let Some((done, answers_left_out)) = done else { return Ok(()) };
        for LeftOut { item, problem } in answers_left_out.iter().take(8) {
            output::say(&format!("left out: entry {item} of the list of answers: {problem}"));
        }
        let mut no_number = None;
        let result_file = self.common.sweep.write("vqa.json", |out| {
            no_number = vqa::write_results(&done, out)?;
            Ok(())
        })?;
        if let Some(id) = no_number {
            output::say(&format!("result file: the evaluation server takes numbers as question_id only, found {id:?}"));
        }
        let report = Report { scores: done.scores, answers_left_out, aside: Aside { result_file, skipped } };
        self.common.print("vqa", &name, report, &done.left_out, report_rows)
    }
}

fn report_rows(report: &Report) -> Rows {
    let mut rows = Rows::new();
    if let Some(scores) = &report.scores.consensus {
        rows.push(percent("agreement with people (VQA accuracy)", scores.accuracy));
        let types = scores.answer_types.iter().chain(&scores.question_types);
        rows.extend(types.map(|(name, scores)| percent(name, scores.accuracy)));
        rows.push(count("questions with ten answers", scores.count));
    }
    rows.extend(report.scores.exact.iter().flat_map(question_rows));
    if !report.scores.without_answers.is_empty() {
        rows.push(count("questions without answers, not scored", report.scores.without_answers.len()));
    }
    if !report.answers_left_out.is_empty() {
        rows.push(count("entries of the list of answers left out", report.answers_left_out.len()));
    }
    rows.extend(report.aside.rows());
    rows
}

pub(crate) fn question_rows(scores: &ExactScores) -> Rows {
    let mut rows = vec![percent("answers right", scores.right)];
    let named = scores.kinds.iter().filter(|(kind, _)| !kind.is_empty());
    rows.extend(named.map(|(kind, scores)| percent(kind, scores.right)));
    rows.push(count("questions", scores.count));
    rows
}
