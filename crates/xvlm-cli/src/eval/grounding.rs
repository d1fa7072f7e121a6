//! `xvlm eval grounding`.

use clap::Args;
use xvlm::metrics::boxes::BoxScores;
use xvlm::tasks::finetune::FinetuneKind;
use xvlm::tasks::grounding;

use super::{Common, DataArgs, Source, count, percent};
use crate::output::{CliError, Rows};

/// Boxes of phrases: those with an IoU of at least 0.5 with the truth, and the mean IoU (both in percent)
#[derive(Args)]
pub(crate) struct Grounding {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    common: Common,
}

impl Grounding {
    pub(super) fn run(self) -> Result<(), CliError> {
        let Source::Folder(folder) = self.data.open(FinetuneKind::Bbox)? else {
            return Err(CliError::Option {
                option: "--config",
                expected: "--data",
                found: "a configuration".to_owned(),
            });
        };
        let name = self.data.name();
        let done =
            self.common.evaluate("phrases", &name, |model, sweep| grounding::evaluate(model, folder, sweep.counter))?;
        match done {
            Some(done) => self.common.print("grounding", &name, done.scores, &[], grounding_rows),
            None => Ok(()),
        }
    }
}

pub(crate) fn grounding_rows(scores: &BoxScores) -> Rows {
    vec![
        percent("boxes with IoU ≥ 0.5", scores.accuracy),
        percent("mean IoU", scores.mean_iou),
        count("phrases", scores.count),
    ]
}
