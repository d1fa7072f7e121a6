//! Grading the words that somebody filled in.

use serde::{Deserialize, Serialize};

use super::completing::{Filler, Open, Proposals, check_choices, longest};
use super::phrase::{self, Phrase};
use super::{Completing, Completion};
use crate::error::TaskError;
use crate::model::{ImageTokens, Model};

/// A phrase with blanks, and what somebody filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exercise {
    /// The phrase, its blanks written `___` or `[MASK]`.
    pub text: String,
    /// An answer for each blank.
    pub answers: Vec<String>,
}

/// How good the answers to an exercise are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Grade {
    /// Whether each answer is accepted.
    pub accepted: bool,
    /// The probability of all answers together, on the scale of [`Completion::probability`].
    pub probability: f32,
    /// Each answer, given the others.
    pub blanks: Vec<GradedBlank>,
    /// Completions of the whole phrase that are likelier than the answers, the likeliest first.
    pub better: Vec<Completion>,
}

/// How good the answer in one blank is, the other blanks filled as answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GradedBlank {
    /// The answer.
    pub answer: String,
    /// Its probability.
    pub probability: f32,
    /// Its place among all completions of the blank, from 1: behind all words of one piece that are likelier, and those of
    /// several that were found to be.
    pub rank: usize,
    /// Its probability in proportion to that of the likeliest completion, at most 1: what decides whether it is accepted.
    pub share: f32,
    /// Whether the share is large enough.
    pub accepted: bool,
    /// The likeliest completions.
    pub proposals: Vec<Proposal>,
}

/// A completion of one blank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// What goes into the blank.
    pub text: String,
    /// Its probability.
    pub probability: f32,
}

/// An exercise as the model reads it.
struct Read<'a> {
    image: u32,
    exercise: &'a Exercise,
    phrase: Phrase,
    answers: Vec<Vec<u32>>,
}

impl<'a> Read<'a> {
    fn new(model: &Model, image: u32, exercise: &'a Exercise) -> Result<Self, TaskError> {
        let Exercise { text, answers } = exercise;
        let phrase = Phrase::read(model, text)?;
        let (expected, found) = (phrase.blanks(), answers.len());
        if expected != found {
            return Err(TaskError::Answers { text: text.clone(), expected, found });
        }
        let answers = answers.iter().map(|answer| phrase::answer(model, text, answer)).collect::<Result<_, _>>()?;
        Ok(Self { image, exercise, phrase, answers })
    }

    /// The phrase with all blanks but one filled as answered.
    fn with_one_blank(&self, blank: usize) -> Phrase {
        self.phrase.with_one_blank(blank, &self.answers)
    }
}

/// A phrase that is asked about: that of an exercise, or the same with all blanks but one filled as answered.
struct Asked<'a> {
    read: &'a Read<'a>,
    phrase: Phrase,
    blank: Option<usize>,
}

/// Refuses an exercise that cannot be graded.
pub(super) fn check(model: &Model, exercise: &Exercise, search: Completing) -> Result<(), TaskError> {
    let Read { phrase, answers, .. } = Read::new(model, 0, exercise)?;
    let answered: usize = answers.iter().map(Vec::len).sum();
    // The other blanks are filled as answered while one is looked at.
    let looked_at = answered + longest(&phrase, search);
    phrase.check_fit(model, &exercise.text, looked_at)?;
    check_choices(&exercise.text, &phrase, search)
}

/// Grades exercises, each given with the row of `images` it is about. An answer is accepted if its probability, the other
/// blanks filled as answered, is at least `accept` of that of the likeliest completion (0 to 1).
///
/// # Errors
/// If a phrase has no blank, its blanks are too far apart, there are not as many answers as blanks, an answer has no words,
/// or the model is made for another task.
pub fn grade(
    model: &Model,
    images: &ImageTokens,
    exercises: &[(u32, &Exercise)],
    search: Completing,
    accept: f32,
) -> Result<Vec<Grade>, TaskError> {
    let filler = Filler::new(model, images, search)?;
    let read =
        exercises.iter().map(|&(image, exercise)| Read::new(model, image, exercise)).collect::<Result<Vec<_>, _>>()?;

    // Whole phrases of the exercises that have several blanks, then of all exercises a phrase for each blank.
    let several = |read: &&Read| read.answers.len() > 1;
    let whole = read.iter().filter(several).map(|read| Asked { read, phrase: read.phrase.clone(), blank: None });
    let of_blanks = read.iter().flat_map(|read| {
        (0..read.answers.len()).map(|blank| Asked { read, phrase: read.with_one_blank(blank), blank: Some(blank) })
    });
    let asked: Vec<Asked> = whole.chain(of_blanks).collect();
    let given: Vec<(u32, &str, &Phrase, &[Vec<u32>])> = asked
        .iter()
        .map(|Asked { read, phrase, blank }| {
            let answers = blank.map_or(read.answers.as_slice(), |blank| std::slice::from_ref(&read.answers[blank]));
            (read.image, read.exercise.text.as_str(), phrase, answers)
        })
        .collect();
    let scores = filler.score(&given)?;
    let open: Vec<Open> = given
        .iter()
        .zip(&scores)
        .map(|(&(image, text, phrase, answers), &score)| Open {
            image,
            text: text.to_owned(),
            phrase: phrase.clone(),
            against: Some((score, answers.concat())),
        })
        .collect();
    let found = filler.complete(&open)?;

    let mut scored = scores.into_iter().zip(found);
    let whole: Vec<_> = scored.by_ref().take(read.iter().filter(several).count()).collect();
    let mut whole = whole.into_iter();
    let mut grades = Vec::with_capacity(read.len());
    for read in &read {
        let of_blanks: Vec<_> = scored.by_ref().take(read.answers.len()).collect();
        let (score, proposals) = match read.answers.len() {
            1 => of_blanks[0].clone(),
            _ => whole.next().unwrap_or_default(),
        };
        let probability = score.exp() as f32;
        let graded = |(answer, (score, found)): (&String, (f64, Proposals))| {
            let probability = score.exp() as f32;
            let likeliest = found.completions.first().map_or(probability, |first| first.probability);
            let share = if found.above > 0 && likeliest > probability { probability / likeliest } else { 1.0 };
            let proposals = found
                .completions
                .into_iter()
                .map(|completion| Proposal { text: completion.text(), probability: completion.probability });
            GradedBlank {
                answer: answer.clone(),
                probability,
                rank: 1 + found.above,
                share,
                accepted: share >= accept,
                proposals: proposals.collect(),
            }
        };
        let blanks: Vec<GradedBlank> = read.exercise.answers.iter().zip(of_blanks).map(graded).collect();
        grades.push(Grade {
            accepted: blanks.iter().all(|blank| blank.accepted),
            probability,
            blanks,
            better: proposals.completions.into_iter().take(proposals.above).collect(),
        });
    }
    Ok(grades)
}
