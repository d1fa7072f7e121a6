//! `xvlm eval nlvr`.

use clap::Args;
use serde::Serialize;
use xvlm::Bundled;
use xvlm::data::annotations::Reading;
use xvlm::metrics::nlvr::{BiasScores, NlvrScores};
use xvlm::tasks::finetune::{FinetuneKind, FinetuneTask};
use xvlm::tasks::nlvr::{self, Options};

use super::reading::Aside;
use super::{Common, DataArgs, Source, count, percent};
use crate::output::{CliError, Rows};

/// Statements about two pictures judged rightly, and sentences judged rightly of all their pairs, in percent
///
/// With --out, judgements are also written as the official evaluation of NLVR2 reads them (nlvr.csv).
#[derive(Args)]
pub(crate) struct Nlvr {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    scores: NlvrScores,
    #[serde(flatten)]
    bias: BiasScores,
    #[serde(flatten)]
    aside: Aside,
}

impl Nlvr {
    pub(super) fn run(self) -> Result<(), CliError> {
        let source = self.data.open(FinetuneKind::Nlvr)?;
        let (task, files) = match &source {
            Source::Config(config) => match &config.task {
                FinetuneTask::Nlvr(task) => (Some(task), task.test_file.clone()),
                other => return Err(self.data.other_task(other)),
            },
            Source::Folder(folder) => (None, vec![folder.join("nlvr.json")]),
        };
        let loaded = self.common.read(&files, |strict| match task {
            Some(task) => nlvr::test_items(task, strict),
            None => Reading { strict, ..Reading::default() }.nlvr(&files),
        })?;
        let options = task.map_or_else(Options::default, |task| Options { batch: task.batch_size_test });
        let (items, skipped) = (loaded.items, loaded.report);
        let name = self.data.name();
        let done = self.common.evaluate_or(Bundled::Statements, "statements", &name, |model, sweep| {
            nlvr::evaluate(model, items, &options, sweep)
        })?;
        let Some(done) = done else { return Ok(()) };
        let result_file = self.common.sweep.write("nlvr.csv", |out| nlvr::write_results(&done, out))?;
        let report = Report { scores: done.scores, bias: done.bias, aside: Aside { result_file, skipped } };
        self.common.print("nlvr", &name, report, &done.left_out, report_rows)
    }
}

fn report_rows(report: &Report) -> Rows {
    let mut rows = statement_rows(&report.scores);
    let BiasScores { balanced, unbalanced } = &report.bias;
    for (name, scores) in [("balanced", balanced), ("unbalanced", unbalanced)] {
        if scores.count > 0 {
            rows.push((name.to_owned(), None));
            rows.extend(statement_rows(scores));
        }
    }
    rows.extend(report.aside.rows());
    rows
}

pub(crate) fn statement_rows(scores: &NlvrScores) -> Rows {
    let mut rows = vec![percent("statements judged rightly", scores.accuracy), count("statements", scores.count)];
    if let Some(consistency) = scores.consistency {
        rows.push(percent("sentences right of all their pairs", consistency));
        rows.push(count("sentences", scores.sentences));
    }
    rows
}
