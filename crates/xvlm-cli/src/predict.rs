//! `xvlm caption`, `answer`, `match`, `fill`: questions about pictures.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use xvlm::{Completion, Picture, Search, View};

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
    pub(crate) image: PathBuf,
    width: u32,
    height: u32,
    pub(crate) results: Vec<T>,
    #[serde(skip)]
    pub(crate) picture: Picture,
}

impl Look {
    /// Encodes each picture once, and asks.
    pub(crate) fn ask<T>(&self, ask: impl Fn(&View) -> Result<Vec<T>, xvlm::Error>) -> Result<Vec<About<T>>, CliError> {
        let predictor = self.model.open()?;
        let about = |image: &PathBuf| {
            let picture = Picture::open_upright(image)?;
            let results = ask(&predictor.look(&picture)?)?;
            Ok(About { image: image.clone(), width: picture.width(), height: picture.height(), results, picture })
        };
        self.images.iter().map(about).collect()
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

/// Describe a picture
#[derive(Args)]
pub(crate) struct Caption {
    #[command(flatten)]
    look: Look,
    /// Texts followed at a time; 1 is greedy. By default what the model's configuration says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    beams: Option<u8>,
}

impl Caption {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let found = self.look.ask(|view| {
            Ok(vec![match self.beams {
                Some(beams) => view.caption_with(Search { beams: beams.into(), ..view.search() })?,
                None => view.caption()?,
            }])
        })?;
        output::print(self.look.json, &found, |found| {
            let line = |about: &About<xvlm::Written>| {
                let texts: String = about.results.iter().map(|written| format!("{}\n", written.text)).collect();
                if found.len() > 1 { format!("{}: {texts}", about.image.display()) } else { texts }
            };
            found.iter().map(line).collect()
        })
    }
}

/// Answer questions about a picture
#[derive(Args)]
pub(crate) struct Answer {
    #[command(flatten)]
    look: Look,
    /// Question, such as "how many circles are there?"; repeatable
    #[arg(long = "text", value_name = "TEXT", required = true)]
    texts: Vec<String>,
}

impl Answer {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let texts = worded(&self.texts)?;
        let found = self.look.ask(|view| view.answer(&texts))?;
        self.look.print(&found, |_, found| vec![(found.question.clone(), Some(found.answer.clone()))])
    }
}

/// Say how well texts tell a picture
///
/// Prints, for each text, the probability that it belongs to the picture, and the cosine (-1 to 1) of their embeddings,
/// which is what a search over many pictures compares first.
#[derive(Args)]
pub(crate) struct Match {
    #[command(flatten)]
    look: Look,
    /// Text, such as "a red circle above a blue star"; repeatable
    #[arg(long = "text", value_name = "TEXT", required = true)]
    texts: Vec<String>,
}

impl Match {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let texts = worded(&self.texts)?;
        let found = self.look.ask(|view| view.matches(&texts))?;
        self.look.print(&found, |_, found| {
            let scores = format!("{:>7}  cosine {:6.3}", percent(found.probability), found.similarity);
            vec![(found.text.clone(), Some(scores))]
        })
    }
}

/// Fill in the blank of a phrase about a picture
#[derive(Args)]
pub(crate) struct Fill {
    #[command(flatten)]
    look: Look,
    /// Phrase with one blank, written ___ or [MASK], such as "a ___ circle"; repeatable
    #[arg(long = "text", value_name = "TEXT", required = true)]
    texts: Vec<String>,
    /// Number of words to propose for each blank
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
}

#[derive(Serialize)]
struct Filled {
    text: String,
    words: Vec<Completion>,
}

impl Fill {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let top = self.top.into();
        let found = self.look.ask(|view| {
            let filled = |text: &String| Ok(Filled { text: text.clone(), words: view.fill(text, top)? });
            self.texts.iter().map(filled).collect()
        })?;
        self.look.print(&found, |_, found| {
            let words = found.words.iter().map(|c| (c.word.clone(), Some(percent(c.probability))));
            std::iter::once((found.text.clone(), None)).chain(words).collect()
        })
    }
}
