//! `xvlm fill`: blanks, filled in and graded.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde::Serialize;
use serde_json::json;
use xvlm::tasks::Sweep;
use xvlm::tasks::fill::{self, ACCEPT, Graded, LONGER};
use xvlm::tasks::sweep::LeftOut;
use xvlm::{Completing, Completion, Exercise, Grade, Picture, View};

use crate::output::{self, CliError, Rows, table};
use crate::predict::percent;
use crate::progress::Stage;
use crate::ranks::{self, RanksArgs};
use crate::signals;
use crate::{ModelArgs, share, weights};

/// Fill in the blanks of a phrase about a picture, or grade what somebody else filled in
///
/// A blank is written ___ (two underscores or more) or [MASK]; a phrase may have several. Prints the likeliest completions
/// with their probabilities. With --answer, one for each blank, prints how likely each answer is, its place among all
/// completions, whether it is accepted, and what is likelier. With --file, grades a whole file of exercises.
#[derive(Args)]
pub(crate) struct Fill {
    #[command(flatten)]
    model: ModelArgs,
    /// Picture (JPEG, PNG, WebP or GIF); several may be given
    #[arg(long = "image", value_name = "FILE", num_args = 1.., required_unless_present = "file")]
    images: Vec<PathBuf>,
    /// Phrase with blanks, such as "a ___ circle"; repeatable
    #[arg(long = "text", value_name = "TEXT", required_unless_present = "file")]
    texts: Vec<String>,
    /// What was filled in, one for each blank of the one --text
    #[arg(long = "answer", value_name = "TEXT", conflicts_with = "file")]
    answers: Vec<String>,
    /// Exercises to grade: JSON lines {"id", "image", "text", "answer"}, or a .csv file with these columns; several answers
    /// are a list, or in a table separated by |
    #[arg(long, value_name = "FILE", requires = "out", conflicts_with_all = ["images", "texts"])]
    file: Option<PathBuf>,
    /// What paths of images in --file are relative to [default: the folder of the file]
    #[arg(long, value_name = "DIR", requires = "file")]
    image_root: Option<PathBuf>,
    /// Folder for the grades of --file, which are written as they come; graded.jsonl has them all
    #[arg(long, value_name = "DIR", requires = "file")]
    out: Option<PathBuf>,
    /// Go on from the grades in --out
    #[arg(long, requires = "file")]
    resume: bool,
    /// Share of exercises of --file that may be left out because they are broken; they are counted and named
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, requires = "file", value_parser = share::<f64>)]
    max_bad_fraction: f64,
    /// Number of completions to propose
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
    /// Most words in a blank
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    words: u8,
    /// Most word pieces in a blank [default: 3, or 2 more than the words]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pieces: Option<u8>,
    /// How much less likely, before the picture is asked, each word piece beyond one for every word makes a completion (0 to 1)
    #[arg(long, value_name = "FACTOR", default_value_t = LONGER, value_parser = share::<f32>)]
    longer: f32,
    /// An answer is accepted if it is at least this share as likely as the likeliest completion (0 to 1)
    #[arg(long, value_name = "SHARE", default_value_t = ACCEPT, value_parser = share::<f32>)]
    accept: f32,
    #[command(flatten)]
    ranks: RanksArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What was found out about one picture.
#[derive(Serialize)]
struct About {
    image: PathBuf,
    width: u32,
    height: u32,
    results: Vec<Filled>,
}

#[derive(Serialize)]
struct Filled {
    text: String,
    #[serde(flatten)]
    found: Found,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Found {
    Completions { completions: Vec<Completion> },
    Grade(Grade),
}

/// How a file of exercises was graded.
#[derive(Serialize)]
struct Report<'a> {
    graded: PathBuf,
    exercises: usize,
    accepted: usize,
    left_out: &'a [LeftOut],
}

impl Fill {
    pub(crate) fn run(self) -> Result<(), CliError> {
        if let (Some(file), Some(out)) = (&self.file, &self.out) {
            return self.grade_file(file, out);
        }
        if !self.answers.is_empty() && self.texts.len() != 1 {
            let found = format!("{} of them", self.texts.len());
            return Err(CliError::Option { option: "--text", expected: "one, since there is --answer", found });
        }
        let predictor = self.model.open()?;
        let about = |image: &PathBuf| {
            let picture = Picture::open_upright(image)?;
            let view = predictor.look(&picture)?;
            let results = self.texts.iter().map(|text| self.ask(&view, text)).collect::<Result<_, xvlm::Error>>()?;
            Ok(About { image: image.clone(), width: picture.width(), height: picture.height(), results })
        };
        let found = self.images.iter().map(about).collect::<Result<Vec<_>, CliError>>()?;
        output::print(self.json, &found, |found| {
            let mut rows = Rows::new();
            for about in found {
                if found.len() > 1 {
                    rows.push((about.image.display().to_string(), None));
                }
                for Filled { text, found } in &about.results {
                    rows.push((text.clone(), None));
                    rows.extend(match found {
                        Found::Completions { completions } => completed(completions),
                        Found::Grade(grade) => graded(grade),
                    });
                }
            }
            table(&rows)
        })
    }

    fn search(&self) -> Completing {
        let words = usize::from(self.words);
        let pieces = self.pieces.map_or(words + 2, usize::from);
        Completing { top: self.top.into(), words, pieces, longer: self.longer, ..Completing::default() }
    }

    fn ask(&self, view: &View, text: &str) -> Result<Filled, xvlm::Error> {
        let found = if self.answers.is_empty() {
            Found::Completions { completions: view.fill_with(text, self.search())? }
        } else {
            let exercise = Exercise { text: text.to_owned(), answers: self.answers.clone() };
            Found::Grade(view.grade(&exercise, self.search(), self.accept)?)
        };
        Ok(Filled { text: text.to_owned(), found })
    }

    fn grade_file(&self, file: &Path, out: &Path) -> Result<(), CliError> {
        let ranks = self.ranks.connect(&self.model.device)?;
        let grade = || {
            let exercises = fill::read_exercises(file, self.image_root.as_deref())?;
            let predictor = self.model.open()?;
            let stop = signals::asked_to_stop()?;
            Stage::run("exercises", |counter| {
                let (folder, resume, max_bad_fraction) = (Some(out.to_owned()), self.resume, self.max_bad_fraction);
                let about = json!({"weights": weights(predictor.model()), "file": file});
                let ranks = Arc::clone(&ranks);
                let mut sweep = Sweep { folder, resume, about, stop, ranks, max_bad_fraction, counter };
                let done = fill::grade_all(predictor.model(), exercises, self.search(), self.accept, &mut sweep);
                done.map_err(CliError::from)
            })
        };
        let (grades, left_out) = ranks::or_abort(&*ranks, grade())?;
        if ranks.rank() > 0 {
            return Ok(());
        }
        for LeftOut { item, problem } in left_out.iter().take(8) {
            output::say(&format!("left out: exercise {}: {problem}", item + 1));
        }
        let path = out.join("graded.jsonl");
        let lines = grades.iter().map(|graded| Ok(serde_json::to_string(graded)? + "\n"));
        output::write(&path, lines.collect::<Result<String, serde_json::Error>>()?.as_bytes())?;
        let accepted = grades.iter().filter(|graded: &&Graded| graded.grade.accepted).count();
        let report = Report { graded: path, exercises: grades.len(), accepted, left_out: &left_out };
        output::print(self.json, &report, |report| {
            table(&[
                ("graded".to_owned(), Some(report.exercises.to_string())),
                ("accepted".to_owned(), Some(report.accepted.to_string())),
                ("left out".to_owned(), Some(report.left_out.len().to_string())),
                ("grades".to_owned(), Some(report.graded.display().to_string())),
            ])
        })?;
        match grades.is_empty() {
            true => Err(CliError::Broken { what: "exercises", count: left_out.len() }),
            false => Ok(()),
        }
    }
}

fn completed(completions: &[Completion]) -> Rows {
    completions.iter().map(|completion| (completion.text(), Some(percent(completion.probability)))).collect()
}

fn graded(grade: &Grade) -> Rows {
    let mut rows = Rows::new();
    for blank in &grade.blanks {
        let verdict = if blank.accepted { "accepted" } else { "not accepted" };
        let about = format!("{}  place {}  {verdict}", percent(blank.probability), blank.rank);
        rows.push((format!("answer: {}", blank.answer), Some(about)));
        let others = blank.proposals.iter().filter(|proposal| proposal.probability > blank.probability);
        rows.extend(
            others.map(|likelier| (format!("  likelier: {}", likelier.text), Some(percent(likelier.probability)))),
        );
    }
    if grade.blanks.len() > 1 {
        rows.push(("all answers together".to_owned(), Some(percent(grade.probability))));
        let likelier = |completion: &Completion| {
            (format!("  likelier: {}", completion.text()), Some(percent(completion.probability)))
        };
        rows.extend(grade.better.iter().map(likelier));
    }
    rows
}
