//! Filling in the blanks of phrases about a picture, with the masked-language head, and grading what somebody else filled in.
//!
//! A blank takes one or several words, each of one or several word pieces. The probability of a completion is that of its
//! number of pieces, times that of each piece given the picture, the rest of the phrase and the pieces before it, those after
//! it still masked: for each choice of lengths the probabilities of all sequences of pieces sum to 1, and so do, with the
//! weights of [`Completing::longer`], those of all completions. This is what makes completions of different lengths
//! comparable, which the usual pseudo-likelihood, in which each piece sees all others, does not: it flatters words of
//! many pieces (Kauf and Ivanova, ACL 2023, arXiv 2305.10588).

mod completing;
mod grading;
mod phrase;

use std::path::Path;

use serde::{Deserialize, Serialize};
use xvlm_data::annotations::{FillItem, read_fill};
use xvlm_metrics::fill::FillScores;

pub use self::grading::{Exercise, Grade, Graded, Proposal, grade};
use self::completing::{Filler, Open};
use self::phrase::Phrase;
use crate::error::TaskError;
use crate::model::{ImageTokens, Model};
use crate::{Counter, Item, ask_all, some};

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
    /// How much less likely each piece beyond the first makes a completion, before the model is asked: 0 to 1.
    pub longer: f32,
}

impl Default for Completing {
    fn default() -> Self {
        Self { top: 5, words: 1, pieces: 3, beams: 8, longer: LONGER }
    }
}

/// [`Completing::longer`] unless the caller says otherwise.
const LONGER: f32 = 0.5;

impl Completing {
    /// One word of the vocabulary for each blank.
    pub fn single() -> Self {
        Self { pieces: 1, ..Self::default() }
    }
}

/// Words for the blanks of a phrase.
#[derive(Clone, Debug, PartialEq, Serialize)]
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
/// If a phrase has no blank or its blanks are too far apart, or the model is made for another task.
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
    /// The items.
    pub items: Vec<FillItem>,
    /// The likeliest completions of each.
    pub completions: Vec<Vec<Completion>>,
    /// How often an accepted word came first, and among the first five.
    pub scores: FillScores,
}

impl Item for FillItem {
    fn image(&self) -> &Path {
        &self.image
    }

    fn text(&self) -> &str {
        &self.text
    }
}

/// Evaluates on `fill.json` of a folder.
///
/// # Errors
/// If the file or an image cannot be read.
pub fn evaluate(model: &Model, data: &Path, counter: Counter) -> Result<Evaluation, TaskError> {
    let items = some(read_fill(data.join("fill.json"))?, data, "fill.json")?;
    let search = Completing::default();
    let ask = |images: &ImageTokens, phrases: &[(u32, &str)]| fill(model, images, phrases, search);
    let completions = ask_all(model, &items, |_, _| Ok(()), ask, counter)?;
    let ranks = items.iter().zip(&completions).map(|(item, completions): (_, &Vec<Completion>)| {
        let accepted = |c: &Completion| item.answers.iter().any(|answer| answer.eq_ignore_ascii_case(&c.words[0]));
        (item.kind.as_str(), completions.iter().position(accepted))
    });
    Ok(Evaluation { scores: FillScores::new(ranks), items, completions })
}
