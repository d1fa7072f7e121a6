//! `xvlm eval captioning`.

use clap::Args;
use xvlm::tasks::captioning::{self, CaptionScores};
use xvlm::tasks::finetune::FinetuneKind;

use super::{Common, DataArgs, Source, count, percent};
use crate::output::{CliError, Rows};

/// Captions checked against the scene: right objects, colours and relation, in percent
#[derive(Args)]
pub(crate) struct Captioning {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    common: Common,
}

impl Captioning {
    pub(super) fn run(self) -> Result<(), CliError> {
        let Source::Folder(folder) = self.data.open(FinetuneKind::Captioning)? else {
            return Err(CliError::Option {
                option: "--config",
                expected: "--data",
                found: "a configuration".to_owned(),
            });
        };
        let name = self.data.name();
        let done = self.common.evaluate("captions", &name, |model, sweep| {
            captioning::evaluate(model, folder, model.config().search, sweep.counter)
        })?;
        match done {
            Some(done) => self.common.print("captioning", &name, done.scores, &[], caption_rows),
            None => Ok(()),
        }
    }
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
