//! `xvlm fill`: blanks, filled in and graded.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use serde::{Deserialize, Serialize};
use serde_json::json;
use xvlm::tasks::fill::{self, ACCEPT, Graded, LONGER};
use xvlm::tasks::sweep::LeftOut;
use xvlm::{Bundled, Completing, Completion, Exercise, Grade};

use crate::look::{Look, Question, any, percent};
use crate::output::{self, CliError, Rows, table};
use crate::share;
use crate::sweep::{self, Swept};

/// Fill in the blanks of a phrase about a picture, or grade what somebody else filled in
///
/// A blank is written ___ (two underscores or more) or [MASK]; a phrase may have several. Prints the likeliest completions
/// with their probabilities. With --answer, one for each blank, prints how likely each answer is, its place among all
/// completions, whether it is accepted, and what is likelier. With --file, grades a whole file of exercises.
#[derive(Args)]
#[command(mut_group("Which", |group| group.required(false)))]
#[command(group = ArgGroup::new("what").required(true).args(["files", "folder", "list", "file"]))]
#[command(mut_arg("max_bad_fraction", |arg| {
    arg.help("Share of broken pictures or exercises that may be left out; they are counted and named [default: 0, with --file 1]")
}))]
pub(crate) struct Fill {
    #[command(flatten)]
    look: Look,
    /// Phrase with blanks, such as "a ___ circle"; repeatable
    #[arg(long = "text", value_name = "TEXT", required_unless_present = "file")]
    texts: Vec<String>,
    /// What was filled in, one for each blank of the one --text
    #[arg(long = "answer", value_name = "TEXT", conflicts_with = "file")]
    answers: Vec<String>,
    /// Exercises to grade: JSON lines {"id", "image", "text", "answer"}, or a .csv file with these columns; several answers
    /// are a list, or in a table separated by |
    #[arg(long, value_name = "FILE", requires = "out", conflicts_with = "texts")]
    file: Option<PathBuf>,
    /// What paths of images in --file are relative to [default: the folder of the file]
    #[arg(long, value_name = "DIR", requires = "file")]
    image_root: Option<PathBuf>,
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
}

#[derive(Serialize, Deserialize)]
struct Filled {
    text: String,
    #[serde(flatten)]
    found: Found,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Found {
    Completions { completions: Vec<Completion> },
    Grade(Grade),
}

/// How a file of exercises was graded.
#[derive(Serialize)]
struct Report<'a> {
    result_file: Option<PathBuf>,
    exercises: usize,
    accepted: usize,
    left_out: &'a [LeftOut],
}

impl Fill {
    pub(crate) fn run(self) -> Result<(), CliError> {
        if let Some(file) = &self.file {
            return self.grade_file(file);
        }
        if !self.answers.is_empty() && self.texts.len() != 1 {
            let found = format!("{} of them", self.texts.len());
            return Err(CliError::Option { option: "--text", expected: "one, since there is --answer", found });
        }
        let images = self.look.images()?;
        let (texts, search) = (self.texts.iter().map(String::as_str).collect::<Vec<_>>(), self.search());
        let exercise = Exercise { text: self.texts.concat(), answers: self.answers.clone() };
        let found = self.look.ask(Bundled::General, &images, |asking| {
            let predictor = asking.predictor;
            let options = json!({ "texts": texts, "answers": self.answers, "search": search, "accept": self.accept });
            let question = Question { name: "completions", options: sweep::options(&options)? };
            asking.of_each(question, any, |_, pictures| {
                let views = predictor.look_at(&pictures)?;
                let found: Vec<Vec<Found>> = if self.answers.is_empty() {
                    let completions = |completions| Found::Completions { completions };
                    let of = |found: Vec<_>| found.into_iter().map(completions).collect();
                    views.fill(&texts, search)?.into_iter().map(of).collect()
                } else {
                    let grades = views.grade(&exercise, search, self.accept)?;
                    grades.into_iter().map(|grade| vec![Found::Grade(grade)]).collect()
                };
                let named = |(text, found): (&&str, Found)| Filled { text: (*text).to_owned(), found };
                Ok(found.into_iter().map(|found| texts.iter().zip(found).map(named).collect()).collect())
            })
        })?;
        self.look.tell(found, |_, Filled { text, found }| {
            let rows = match found {
                Found::Completions { completions } => completed(completions),
                Found::Grade(grade) => graded(grade),
            };
            [vec![(text.clone(), None)], rows].concat()
        })
    }

    fn search(&self) -> Completing {
        let words = usize::from(self.words);
        let pieces = self.pieces.map_or(words + 2, usize::from);
        Completing { top: self.top.into(), words, pieces, longer: self.longer, ..Completing::default() }
    }

    fn grade_file(&self, file: &Path) -> Result<(), CliError> {
        let exercises = fill::read_exercises(file, self.image_root.as_deref())?;
        let swept = Swept {
            units: "exercises",
            model: &self.look.model,
            built_in: Bundled::General,
            from: Some(("file", file.display().to_string())),
            max_bad_fraction: self.look.max_bad_fraction.unwrap_or(1.0),
            is_one: false,
        };
        let done = self.look.sweep.run(swept, |predictor, sweep| {
            Ok(fill::grade_all(predictor.model(), exercises, self.search(), self.accept, sweep)?)
        })?;
        let Some((grades, left_out)) = done else { return Ok(()) };
        for LeftOut { item, problem } in left_out.iter().take(8) {
            output::say(&format!("left out: exercise {}: {problem}", item + 1));
        }
        let result_file = self.look.sweep.write_json("grades.json", &grades)?;
        let accepted = grades.iter().filter(|graded: &&Graded| graded.grade.accepted).count();
        let report = Report { result_file, exercises: grades.len(), accepted, left_out: &left_out };
        output::print(self.look.json, &report, |report| {
            let mut rows = vec![
                ("graded".to_owned(), Some(report.exercises.to_string())),
                ("accepted".to_owned(), Some(report.accepted.to_string())),
                ("left out".to_owned(), Some(report.left_out.len().to_string())),
            ];
            rows.extend(report.result_file.iter().map(|file| (format!("result file: {}", file.display()), None)));
            table(&rows)
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
