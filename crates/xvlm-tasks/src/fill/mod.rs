//! Filling in the blanks of phrases about a picture, with the masked-language head, and grading what somebody else filled in.
//!
//! A blank takes one or several words, each of one or several word pieces. The probability of a completion is that of its
//! number of pieces, times that of each piece given the picture, the rest of the phrase and the pieces before it, those after
//! it still masked: for each choice of lengths the probabilities of all sequences of pieces sum to 1, and so do, with the
//! weights of [`Completing::longer`], those of all completions. This is what makes completions of different lengths
//! comparable, which the usual pseudo-likelihood, in which each piece sees all others, does not: it flatters words of
//! many pieces (Kauf and Ivanova, ACL 2023, arXiv 2305.10588).

mod completing;
mod exercises;
mod grading;
mod phrase;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;
use xvlm_data::annotations::FillItem;
use xvlm_data::text_key;
use xvlm_metrics::fill::FillScores;

use self::completing::{Filler, Open, check_choices, longest};
pub use self::exercises::{ExerciseItem, Graded, grade_all, read_exercises};
pub use self::grading::{Exercise, Grade, GradedBlank, Proposal, grade};
use self::phrase::Phrase;
use crate::error::{SweepProblem, TaskError};
use crate::model::{ImageTokens, Model};
use crate::sweep::{Answers, LeftOut, Sweep, Work};
use crate::{BATCH, Item};

/// How completions are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Completing {
    /// How many completions are wanted.
    pub top: usize,
    /// At most so many words in a blank.
    pub words: usize,
    /// At most so many word pieces in a blank; those of several blanks share what is beyond one for each.
    pub pieces: usize,
    /// How many beginnings of a completion are followed, if that is more than `top`.
    pub beams: usize,
    /// How much less likely, before the model is asked, each piece makes a completion that goes beyond one for every word a
    /// blank may have: 0 to 1.
    pub longer: f32,
}

impl Default for Completing {
    fn default() -> Self {
        Self { top: 5, words: 1, pieces: 3, beams: 8, longer: LONGER }
    }
}

/// [`Completing::longer`] unless the caller says otherwise: most words that people say are one piece.
pub const LONGER: f32 = 0.1;

/// The share of the likeliest completion's probability at which an answer is accepted, unless the caller says otherwise; measured
/// on the built-in world (docs/tasks/fill.md).
pub const ACCEPT: f32 = 0.03;

/// Words for the blanks of a phrase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// What goes into each blank, in the order of the phrase.
    pub words: Vec<String>,
    /// The probability of all of them together.
    pub probability: f32,
}

impl Completion {
    /// The words as one text.
    pub fn text(&self) -> String {
        self.words.join(" … ")
    }
}

/// Ranks completions of each phrase, given with the row of `images` it is about; the likeliest first. A blank is written `___`
/// (two underscores or more) or `[MASK]`.
///
/// # Errors
/// If a phrase has no blank, its blanks are too far apart or too many for so many pieces, or the model is made for another task.
pub fn fill(
    model: &Model,
    images: &ImageTokens,
    phrases: &[(u32, &str)],
    search: Completing,
) -> Result<Vec<Vec<Completion>>, TaskError> {
    let filler = Filler::new(model, images, search)?;
    let open = |&(image, text): &(u32, &str)| {
        let (text, phrase) = (text.to_owned(), Phrase::read(model, text)?);
        Ok::<_, TaskError>(Open { image, text, phrase, against: None })
    };
    let open = phrases.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    Ok(filler.complete(&open)?.into_iter().map(|found| found.completions).collect())
}

/// What the model proposed for each item of a data set, and the scores.
pub struct Evaluation {
    /// The items that were asked.
    pub items: Vec<FillItem>,
    /// The likeliest completions of each.
    pub answers: Vec<Vec<Completion>>,
    /// How often an accepted completion came first, and among the first five.
    pub scores: FillScores,
    /// What was not asked, and why.
    pub left_out: Vec<LeftOut>,
}

impl Item for FillItem {
    fn image(&self) -> &Path {
        &self.image
    }

    fn text(&self) -> &str {
        &self.text
    }
}

/// Evaluates on phrases with accepted answers. Of a phrase with several blanks, an accepted answer has the words of all of them,
/// separated by `|`. Left out, and so not scored: items whose image cannot be read, phrases without a blank, and those with an
/// answer for another number of blanks.
///
/// # Errors
/// If more than [`Sweep::max_bad_fraction`] of the items are left out, there are none, or the model is made for another task.
pub fn evaluate(
    model: &Model,
    items: Vec<FillItem>,
    search: Completing,
    sweep: &mut Sweep,
) -> Result<Evaluation, TaskError> {
    if items.is_empty() {
        return Err(TaskError::Empty { what: "phrases with blanks".to_owned() });
    }
    // Five are scored.
    let search = Completing { top: search.top.max(5), ..search };
    let problem = |item: &FillItem| {
        let fits = |phrase: &Phrase| {
            phrase.check_fit(model, &item.text, longest(phrase, search))?;
            check_choices(&item.text, phrase, search)
        };
        let read = Phrase::read(model, &item.text).and_then(|phrase| fits(&phrase).map(|()| phrase.blanks()));
        let blanks = match read {
            Ok(blanks) => blanks,
            Err(error) => return Some(error.to_string()),
        };
        let other = item.answers.iter().map(|answer| answer.split('|').count()).find(|&found| found != blanks)?;
        Some(TaskError::Answers { text: item.text.clone(), expected: blanks, found: other }.to_string())
    };
    let checked = Checked::new(items, sweep.max_bad_fraction, problem)?;
    let work = Work { name: "fill", options: json!(search), batch: BATCH };
    let ask = |images: &ImageTokens, phrases: &[(u32, &str)]| fill(model, images, phrases, search);
    let answers = sweep.by_image(&work, model, &checked.items, |_, _| Ok(()), ask)?;
    let (items, answers, left_out) = checked.split(answers);
    let ranks = items.iter().zip(&answers).map(|(item, completions): (_, &Vec<Completion>)| {
        let accepted = |completion: &Completion| {
            item.answers.iter().any(|answer| {
                let mut words = answer.split('|').zip(&completion.words);
                words.all(|(answer, word)| same(answer, word))
            })
        };
        (item.kind.as_str(), completions.iter().position(accepted))
    });
    Ok(Evaluation { scores: FillScores::new(ranks), items, answers, left_out })
}

/// Whether an answer has the words of a completion, however it writes them.
fn same(answer: &str, word: &str) -> bool {
    text_key(answer) == text_key(word)
}

/// Items that can be asked about.
struct Checked<T> {
    items: Vec<T>,
    /// The place of each among all.
    places: Vec<usize>,
    left_out: Vec<LeftOut>,
}

impl<T> Checked<T> {
    fn new(items: Vec<T>, limit: f64, problem: impl Fn(&T) -> Option<String>) -> Result<Self, TaskError> {
        let units = items.len();
        let mut checked = Self { items: Vec::with_capacity(units), places: Vec::new(), left_out: Vec::new() };
        for (place, item) in items.into_iter().enumerate() {
            match problem(&item) {
                Some(problem) => checked.left_out.push(LeftOut { item: place, problem }),
                None => {
                    checked.items.push(item);
                    checked.places.push(place);
                }
            }
        }
        let left_out = checked.left_out.len();
        match checked.left_out.first() {
            Some(first) if left_out as f64 > limit * units as f64 => {
                let first = first.problem.clone();
                Err(SweepProblem::TooManyBroken { left_out, units, limit, first }.into())
            }
            _ => Ok(checked),
        }
    }

    /// The items that have answers, with them; and what was left out by its place among all.
    fn split<A>(self, answers: Answers<A>) -> (Vec<T>, Vec<A>, Vec<LeftOut>) {
        let (items, answers, later) = answers.split(self.items);
        let mut left_out = self.left_out;
        left_out.extend(later.into_iter().map(|out| LeftOut { item: self.places[out.item], ..out }));
        left_out.sort_by_key(|out| out.item);
        (items, answers, left_out)
    }
}
