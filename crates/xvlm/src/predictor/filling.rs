//! Blanks: filled in, and graded.

use xvlm_tasks::fill::{self, Completing, Completion, Exercise, Grade};

use super::{View, Views};
use crate::Error;

impl View<'_> {
    /// Ranks completions of a phrase with one blank (`___` or `[MASK]`) or several: a word for each; the `top` likeliest.
    ///
    /// # Errors
    /// If the phrase has no blank, or its blanks are further apart than the model's longest text.
    pub fn fill(&self, phrase: &str, top: usize) -> Result<Vec<Completion>, Error> {
        self.fill_with(phrase, Completing { top, ..Completing::default() })
    }

    /// The same, looked for as given: several words in a blank, among others.
    ///
    /// # Errors
    /// As [`Self::fill`].
    pub fn fill_with(&self, phrase: &str, search: Completing) -> Result<Vec<Completion>, Error> {
        Ok(self.0.fill(&[phrase], search)?.remove(0).remove(0))
    }

    /// Grades the answers to an exercise about the picture; see [`fill::grade`] for what `accept` is, and
    /// [`fill::ACCEPT`] for a value of it.
    ///
    /// # Errors
    /// If there are not as many answers as blanks, an answer has no words, or as [`Self::fill`].
    pub fn grade(&self, exercise: &Exercise, search: Completing, accept: f32) -> Result<Grade, Error> {
        Ok(self.0.grade(exercise, search, accept)?.remove(0))
    }
}

impl Views<'_> {
    /// Ranks completions of each phrase for each picture, looked for as given.
    ///
    /// # Errors
    /// As [`View::fill`].
    pub fn fill(&self, phrases: &[&str], search: Completing) -> Result<Vec<Vec<Vec<Completion>>>, Error> {
        let found = fill::fill(self.model, &self.images, &self.about(phrases), search)?;
        self.by_picture(phrases, found, |_, _, completions| Ok(completions))
    }

    /// Grades the answers to one exercise, about each picture.
    ///
    /// # Errors
    /// As [`View::grade`].
    pub fn grade(&self, exercise: &Exercise, search: Completing, accept: f32) -> Result<Vec<Grade>, Error> {
        let about: Vec<(u32, &Exercise)> = (0..self.sizes.len() as u32).map(|image| (image, exercise)).collect();
        fill::grade(self.model, &self.images, &about, search, accept)
    }
}
