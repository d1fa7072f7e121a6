//! `xvlm eval retrieval`.

use clap::Args;
use xvlm::metrics::retrieval::RetrievalScores;
use xvlm::tasks::finetune::FinetuneKind;
use xvlm::tasks::retrieval;

use super::{Common, DataArgs, Source, percent};
use crate::output::{CliError, Rows};

/// Texts found by their picture and pictures found by their text: recall at 1, 5 and 10 in percent
#[derive(Args)]
pub(crate) struct Retrieval {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    common: Common,
    /// How many of the nearest by embedding are ranked again by matching, both ways
    #[arg(long, value_name = "K", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    k_test: u32,
}

impl Retrieval {
    pub(super) fn run(self) -> Result<(), CliError> {
        let Source::Folder(folder) = self.data.open(FinetuneKind::Retrieval)? else {
            return Err(CliError::Option {
                option: "--config",
                expected: "--data",
                found: "a configuration".to_owned(),
            });
        };
        let name = self.data.name();
        let done = self.common.evaluate("pairs", &name, |model, sweep| {
            retrieval::evaluate(model, folder, self.k_test as usize, sweep.counter)
        })?;
        match done {
            Some(done) => self.common.print("retrieval", &name, done.scores, &[], retrieval_rows),
            None => Ok(()),
        }
    }
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
