//! `xvlm answer`: questions about pictures.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use xvlm::{AnswerList, Bundled, Ranking};

use crate::look::{Look, Question, any, percent, worded};
use crate::output::{self, CliError};
use crate::sweep;

/// Answer questions about pictures
///
/// In words of the model's own; or, with --answers, by the likeliest of a list, with their probabilities among those of the list
/// that were ranked.
#[derive(Args)]
pub(crate) struct Answer {
    #[command(flatten)]
    look: Look,
    /// Question, such as "how many circles are there?"; repeatable
    #[arg(long = "text", value_name = "TEXT", required = true)]
    texts: Vec<String>,
    /// Answers to choose from: a JSON list, or an answer a line
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// Number of answers of the list to print
    #[arg(long, value_name = "N", default_value_t = 5, requires = "answers", value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
}

impl Answer {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let (texts, images) = (worded(&self.texts)?, self.look.images()?);
        let Some(path) = &self.answers else {
            let found = self.look.ask(Bundled::Questions, &images, |asking| {
                let predictor = asking.predictor;
                let question = Question { name: "answers", options: json!({ "texts": texts }) };
                asking.of_each(question, any, |_, pictures| predictor.look_at(&pictures)?.answer(&texts))
            })?;
            return self.look.tell(found, |_, found| vec![(found.question.clone(), Some(found.answer.clone()))]);
        };
        let found = self.look.ask(Bundled::Questions, &images, |asking| {
            let predictor = asking.predictor;
            let list = AnswerList::open(predictor.model(), path)?;
            for left_out in list.left_out() {
                output::say(&format!("left out: {}: entry {}: {}", path.display(), left_out.item, left_out.problem));
            }
            let (top, ranking) = (usize::from(self.top), Ranking::default());
            let answers = sweep::digest(&list.texts())?;
            let options = json!({ "texts": texts, "answers": answers, "top": top, "ranking": ranking });
            let question = Question { name: "answers", options };
            asking.of_each(question, any, |_, pictures| {
                predictor.look_at(&pictures)?.rank_answers(&texts, &list, ranking, top)
            })
        })?;
        self.look.tell(found, |_, found| {
            let answers = found.answers.iter().map(|likely| (likely.answer.clone(), Some(percent(likely.probability))));
            std::iter::once((found.question.clone(), None)).chain(answers).collect()
        })
    }
}
