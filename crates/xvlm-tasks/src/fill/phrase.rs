//! Phrases with blanks, as token ids.

use xvlm_data::{TextTokenizer, pre_caption};

use crate::error::TaskError;
use crate::model::Model;

/// A phrase cut at its blanks: what stands before, between and after them.
#[derive(Clone, Debug)]
pub(super) struct Phrase {
    sides: Vec<Vec<u32>>,
}

/// The parts of a text around its blanks, each written `[MASK]` or as two or more underscores.
fn cut(text: &str) -> Vec<&str> {
    let (mut sides, mut start, mut at) = (Vec::new(), 0, 0);
    while at < text.len() {
        let rest = &text[at..];
        let underscores = rest.len() - rest.trim_start_matches('_').len();
        let blank = if rest.starts_with("[MASK]") { "[MASK]".len() } else { underscores };
        if blank >= 2 {
            sides.push(&text[start..at]);
            start = at + blank;
            at = start;
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    sides.push(&text[start..]);
    sides
}

/// Token ids of a cleaned text; none if there are no words in it.
fn pieces(tokenizer: &TextTokenizer, text: &str) -> Result<Vec<u32>, TaskError> {
    match pre_caption(text, usize::MAX) {
        Ok(cleaned) => Ok(tokenizer.tokens(&cleaned)?),
        Err(_) => Ok(Vec::new()),
    }
}

impl Phrase {
    /// Reads a phrase.
    pub(super) fn read(model: &Model, text: &str) -> Result<Self, TaskError> {
        let sides = cut(text);
        if sides.len() < 2 {
            return Err(TaskError::Blank { text: text.to_owned() });
        }
        let sides = sides.into_iter().map(|side| pieces(model.tokenizer(), side)).collect::<Result<_, _>>()?;
        Ok(Self { sides })
    }

    /// Number of blanks.
    pub(super) fn blanks(&self) -> usize {
        self.sides.len() - 1
    }

    /// The same phrase with pieces in all blanks but one.
    pub(super) fn with_one_blank(&self, blank: usize, answers: &[Vec<u32>]) -> Self {
        let joined = |sides: &[Vec<u32>], answers: &[Vec<u32>]| {
            let mut whole = sides[0].clone();
            for (answer, side) in answers.iter().zip(&sides[1..]) {
                whole.extend(answer.iter().chain(side));
            }
            whole
        };
        let before = joined(&self.sides[..=blank], &answers[..blank]);
        let after = joined(&self.sides[blank + 1..], &answers[blank + 1..]);
        Self { sides: vec![before, after] }
    }

    /// Cuts what stands before the first and after the last blank to a model's longest text, with `pieces` in all blanks
    /// together: what is next to the blanks stays. False if what is between them is too long already.
    pub(super) fn fit(&mut self, max_tokens: usize, pieces: usize) -> bool {
        let last = self.sides.len() - 1;
        let between: usize = self.sides[1..last].iter().map(Vec::len).sum();
        let Some(room) = max_tokens.checked_sub(1 + between + pieces) else { return false };
        let (before, after) = (self.sides[0].len(), self.sides[last].len());
        let left = before.min(room - after.min(room / 2));
        self.sides[0].drain(..before - left);
        self.sides[last].truncate(room - left);
        true
    }

    /// Refuses a phrase whose blanks are further apart than the longest text of a model, with `pieces` in all of them together.
    pub(super) fn check_fit(&self, model: &Model, text: &str, pieces: usize) -> Result<(), TaskError> {
        let max_tokens = model.config().max_tokens;
        match self.clone().fit(max_tokens, pieces) {
            true => Ok(()),
            false => Err(TaskError::BlanksApart { text: text.to_owned(), max_tokens }),
        }
    }

    /// The phrase as a row of ids, with the pieces given in its blanks; and where the first piece of each blank is.
    pub(super) fn row(&self, cls: u32, mut filled: impl FnMut(usize) -> Vec<u32>) -> (Vec<u32>, Vec<usize>) {
        let (mut ids, mut starts) = (vec![cls], Vec::with_capacity(self.blanks()));
        for (blank, side) in self.sides.iter().enumerate() {
            ids.extend(side);
            if blank < self.blanks() {
                starts.push(ids.len());
                ids.extend(filled(blank));
            }
        }
        (ids, starts)
    }
}

/// The pieces of an answer.
pub(super) fn answer(model: &Model, text: &str, answer: &str) -> Result<Vec<u32>, TaskError> {
    let tokenizer = model.tokenizer();
    let wrong = |expected| TaskError::Answer { text: text.to_owned(), answer: answer.to_owned(), expected };
    let ids = pieces(tokenizer, answer)?;
    if ids.is_empty() {
        return Err(wrong("at least one word"));
    }
    if ids.contains(&tokenizer.unk_id()) {
        return Err(wrong("words that the tokenizer can write"));
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_are_cut_at_their_blanks() {
        assert_eq!(cut("a ___ circle"), ["a ", " circle"]);
        assert_eq!(cut("__ and [MASK][MASK]"), ["", " and ", "", ""]);
        assert_eq!(cut("snake_case"), ["snake_case"]);
        assert_eq!(cut("é ____"), ["é ", ""]);
    }

    #[test]
    fn what_is_next_to_the_blanks_stays() {
        let phrase = |sides: &[&[u32]]| Phrase { sides: sides.iter().map(|side| side.to_vec()).collect() };
        let mut one = phrase(&[&[1, 2, 3, 4, 5, 6], &[7, 8, 9]]);
        assert!(one.fit(6, 1));
        assert_eq!(one.sides, [vec![5, 6], vec![7, 8]]);
        let mut two = phrase(&[&[1, 2, 3], &[4, 5], &[6]]);
        assert!(two.fit(7, 2));
        assert_eq!(two.sides, [vec![3], vec![4, 5], vec![6]]);
        assert!(!phrase(&[&[], &[1, 2, 3, 4], &[]]).fit(6, 2));
        let (ids, starts) = two.row(0, |blank| vec![50 + blank as u32; 1 + blank]);
        assert_eq!((ids, starts), (vec![0, 3, 50, 4, 5, 51, 51, 6], vec![2, 5]));
        assert_eq!(two.with_one_blank(1, &[vec![8, 8], vec![9]]).sides, [vec![3, 8, 8, 4, 5], vec![6]]);
    }
}
