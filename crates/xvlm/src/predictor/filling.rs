//! Blanks: filled in, and graded.

use xvlm_tasks::fill::{self, Completing, Completion, Exercise, Grade};

use super::View;
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
        Ok(fill::fill(self.model, &self.image, &self.about(&[phrase]), search)?.remove(0))
    }

    /// Grades the answers to an exercise about the picture; see [`fill::grade`] for what `accept` is, and
    /// [`fill::ACCEPT`] for a value of it.
    ///
    /// # Errors
    /// If there are not as many answers as blanks, an answer has no words, or as [`Self::fill`].
    pub fn grade(&self, exercise: &Exercise, search: Completing, accept: f32) -> Result<Grade, Error> {
        Ok(fill::grade(self.model, &self.image, &[(0, exercise)], search, accept)?.remove(0))
    }
}
