//! `xvlm eval vqa`.

use clap::Args;
use xvlm::metrics::vqa::ExactScores;
use xvlm::tasks::finetune::FinetuneKind;
use xvlm::tasks::vqa;

use super::{Common, DataArgs, Source, count, percent};
use crate::output::{CliError, Rows};

/// Questions answered in the words of the file, in percent
#[derive(Args)]
pub(crate) struct Vqa {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    common: Common,
}

impl Vqa {
    pub(super) fn run(self) -> Result<(), CliError> {
        let Source::Folder(folder) = self.data.open(FinetuneKind::Vqa)? else {
            return Err(CliError::Option {
                option: "--config",
                expected: "--data",
                found: "a configuration".to_owned(),
            });
        };
        let name = self.data.name();
        let done =
            self.common.evaluate("questions", &name, |model, sweep| vqa::evaluate(model, folder, sweep.counter))?;
        match done {
            Some(done) => self.common.print("vqa", &name, done.scores, &[], question_rows),
            None => Ok(()),
        }
    }
}

pub(crate) fn question_rows(scores: &ExactScores) -> Rows {
    let mut rows = vec![percent("answers right", scores.right)];
    rows.extend(scores.kinds.iter().map(|(kind, scores)| percent(kind, scores.right)));
    rows.push(count("questions", scores.count));
    rows
}
