//! `xvlm judge`: statements about two pictures.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use xvlm::{Bundled, Judgement, Picture};

use crate::ModelArgs;
use crate::look::{percent, worded};
use crate::output::{self, CliError, table};

/// Say how likely statements are to be true of two pictures
///
/// A model given with --model must be one for statements about two pictures: fine-tuned with `xvlm finetune nlvr`, or converted
/// from X-VLM's checkpoint for NLVR2.
#[derive(Args)]
pub(crate) struct Judge {
    #[command(flatten)]
    model: ModelArgs,
    /// The left and the right picture (JPEG, PNG, WebP or GIF)
    #[arg(long, value_names = ["LEFT", "RIGHT"], required = true, num_args = 2)]
    images: Vec<PathBuf>,
    /// Statement, such as "the left image has more circles than the right image"; repeatable
    #[arg(long = "text", value_name = "TEXT", required = true)]
    texts: Vec<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Judged<'a> {
    images: &'a [PathBuf],
    results: Vec<Judgement>,
}

impl Judge {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let texts = worded(&self.texts)?;
        let pictures = self.images.iter().map(|path| Picture::open_upright(path)).collect::<Result<Vec<_>, _>>()?;
        let [left, right] = pictures.as_slice() else {
            let found = pictures.len().to_string();
            return Err(CliError::Option { option: "--images", expected: "two pictures", found });
        };
        let results = self.model.open_or(Bundled::Statements)?.judge(left, right, &texts)?;
        output::print(self.json, &Judged { images: &self.images, results }, |judged| {
            let row = |judged: &Judgement| (judged.statement.clone(), Some(percent(judged.probability)));
            table(&judged.results.iter().map(row).collect::<Vec<_>>())
        })
    }
}
