//! `xvlm answer`, and what questions about pictures have in common.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use xvlm::{AnswerList, Bundled, Picture, PixelBox, Predictor, Ranking, View};

use crate::ModelArgs;
use crate::output::{self, CliError, Rows, table};

/// The pictures, and who looks at them.
#[derive(Args)]
pub(crate) struct Look {
    #[command(flatten)]
    model: ModelArgs,
    /// Picture (JPEG, PNG, WebP or GIF); several may be given
    #[arg(long = "image", value_name = "FILE", required = true, num_args = 1..)]
    pub(crate) images: Vec<PathBuf>,
    /// Print the result as JSON: a list with an object for each picture
    #[arg(long)]
    json: bool,
}

/// What a command found out about one picture.
#[derive(Serialize)]
pub(crate) struct About<T> {
    image: PathBuf,
    width: u32,
    height: u32,
    results: Vec<T>,
}

impl Look {
    /// Encodes each picture once, and asks, with its number and the picture itself. One picture is in memory at a time.
    pub(crate) fn ask<T>(
        &self,
        ask: impl Fn(usize, Picture, &View) -> Result<Vec<T>, CliError>,
    ) -> Result<Vec<About<T>>, CliError> {
        self.ask_of(&self.model.open()?, ask)
    }

    /// The same of a model that is open.
    fn ask_of<T>(
        &self,
        predictor: &Predictor,
        ask: impl Fn(usize, Picture, &View) -> Result<Vec<T>, CliError>,
    ) -> Result<Vec<About<T>>, CliError> {
        let about = |(i, image): (usize, &PathBuf)| {
            let picture = Picture::open_upright(image)?;
            let (width, height) = (picture.width(), picture.height());
            let view = predictor.look(&picture)?;
            Ok(About { image: image.clone(), width, height, results: ask(i, picture, &view)? })
        };
        self.images.iter().enumerate().map(about).collect()
    }

    /// Prints what was found: a table, with a heading for each picture if there are several.
    pub(crate) fn print<T: Serialize>(
        &self,
        found: &[About<T>],
        rows: impl Fn(usize, &T) -> Rows,
    ) -> Result<(), CliError> {
        output::print(self.json, &found, |found| {
            let mut all = Rows::new();
            for about in found.iter() {
                if found.len() > 1 {
                    all.push((about.image.display().to_string(), None));
                }
                all.extend(about.results.iter().enumerate().flat_map(|(i, result)| rows(i, result)));
            }
            table(&all)
        })
    }
}

/// A box in pixels, as results for people have it and `--box` takes it.
pub(crate) fn edges(bounds: &PixelBox) -> String {
    [bounds.xmin, bounds.ymin, bounds.xmax, bounds.ymax].map(|edge| format!("{edge:.1}")).join(",")
}

pub(crate) fn percent(probability: f32) -> String {
    format!("{:.1} %", 100.0 * probability)
}

/// The texts of `--text`, each with at least one word.
pub(crate) fn worded(texts: &[String]) -> Result<Vec<&str>, CliError> {
    let word = |text: &String| text.chars().any(char::is_alphanumeric);
    match texts.iter().find(|text| !word(text)) {
        Some(text) => {
            let found = format!("{text:?}");
            Err(CliError::Option { option: "--text", expected: "at least one word", found })
        }
        None => Ok(texts.iter().map(String::as_str).collect()),
    }
}

/// Answer questions about a picture
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
        let texts = worded(&self.texts)?;
        let Some(path) = &self.answers else {
            let predictor = self.look.model.open_or(Bundled::Questions)?;
            let found = self.look.ask_of(&predictor, |_, _, view| Ok(view.answer(&texts)?))?;
            return self.look.print(&found, |_, found| vec![(found.question.clone(), Some(found.answer.clone()))]);
        };
        let predictor = self.look.model.open_or(Bundled::Questions)?;
        let list = AnswerList::open(predictor.model(), path)?;
        for left_out in list.left_out() {
            output::say(&format!("left out: {}: entry {}: {}", path.display(), left_out.item, left_out.problem));
        }
        let ask = |_, _, view: &View| Ok(view.rank_answers(&texts, &list, Ranking::default(), self.top.into())?);
        let found = self.look.ask_of(&predictor, ask)?;
        self.look.print(&found, |_, found| {
            let answers = found.answers.iter().map(|likely| (likely.answer.clone(), Some(percent(likely.probability))));
            std::iter::once((found.question.clone(), None)).chain(answers).collect()
        })
    }
}
