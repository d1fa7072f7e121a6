//! NLVR2: is the statement true of the two images? (The scripts of lil-lab/nlvr, `nlvr2/eval`.)

use std::collections::HashMap;

use serde::Serialize;

use crate::error::{MetricsError, same_length, some};
use crate::percent;

/// Statements judged rightly, in percent.
///
/// # Errors
/// If there are none, or more or fewer predictions than labels.
pub fn accuracy(predictions: &[bool], labels: &[bool]) -> Result<f64, MetricsError> {
    const WHAT: &str = "NLVR2 predictions";
    some(WHAT, predictions.len())?;
    same_length(WHAT, labels.len(), predictions.len())?;
    let right = predictions.iter().zip(labels).filter(|(prediction, label)| prediction == label).count();
    Ok(percent(right, predictions.len()))
}

/// Scores of statements about pairs of images; all 0 if there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct NlvrScores {
    /// Pairs judged rightly, in percent.
    pub accuracy: f64,
    /// Number of pairs.
    pub count: usize,
    /// Sentences judged rightly with each of their pairs, in percent; `None` unless all identifiers tell sentences apart.
    pub consistency: Option<f64>,
    /// Number of sentences; 0 unless all identifiers tell them apart.
    pub sentences: usize,
}

impl NlvrScores {
    /// Scores from the identifier of each pair and sentence, and whether it was judged rightly.
    pub fn new<'a>(judged: impl IntoIterator<Item = (&'a str, bool)>) -> Self {
        let (mut right, mut count) = (0, 0);
        let mut consistent: Option<HashMap<_, bool>> = Some(HashMap::new());
        for (identifier, is_right) in judged {
            count += 1;
            right += usize::from(is_right);
            match (sentence(identifier), &mut consistent) {
                (Some(sentence), Some(sentences)) => *sentences.entry(sentence).or_insert(true) &= is_right,
                _ => consistent = None,
            }
        }
        let sentences = consistent.as_ref().map_or(0, HashMap::len);
        let all_right =
            |sentences: HashMap<_, bool>| percent(sentences.values().filter(|&&all| all).count(), sentences.len());
        Self {
            accuracy: percent(right, count),
            count,
            consistency: consistent.filter(|_| count > 0).map(all_right),
            sentences,
        }
    }
}

/// What the identifiers of a sentence's pairs share. They read `split-set-pair-sentence`, as `dev-850-2-0`: all but the pair.
fn sentence(identifier: &str) -> Option<(&str, &str, &str)> {
    let mut parts = identifier.split('-');
    match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(split), Some(set), Some(_), Some(sentence), None) => Some((split, set, sentence)),
        _ => None,
    }
}

/// Which statements test for bias: of pairs of images that occur more than once, those with both labels (balanced: what
/// the images alone suggest does not help) and those with one (unbalanced).
///
/// `pairs` has the images and the label of each statement. The result is, for each, whether it is balanced; `None` if its
/// pair of images occurs once.
pub fn balanced<'a>(pairs: &[((&'a str, &'a str), bool)]) -> Vec<Option<bool>> {
    let mut labels: HashMap<(&str, &str), [usize; 2]> = HashMap::new();
    for &(images, label) in pairs {
        labels.entry(images).or_default()[usize::from(label)] += 1;
    }
    pairs
        .iter()
        .map(|(images, _)| {
            let [wrong, right] = labels[images];
            (wrong + right > 1).then_some(wrong > 0 && right > 0)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_consistent_if_all_its_pairs_are_right() {
        let scores = NlvrScores::new([
            ("dev-1-0-0", true),
            ("dev-1-1-0", true),
            ("dev-1-0-1", true),
            ("dev-1-2-1", false),
            ("dev-2-0-0", false),
        ]);
        let expected = NlvrScores { accuracy: 60.0, count: 5, consistency: Some(100.0 / 3.0), sentences: 3 };
        assert_eq!(scores, expected);
        let scores = NlvrScores::new([("dev-1-0-0", true), ("17", true)]);
        assert_eq!((scores.accuracy, scores.consistency, scores.sentences), (100.0, None, 0));
        assert_eq!(NlvrScores::new([]), NlvrScores::default());
    }

    #[test]
    fn balance_is_of_pairs_of_images() {
        let pairs =
            [(("a", "b"), true), (("b", "a"), false), (("a", "b"), false), (("c", "c"), true), (("c", "c"), true)];
        assert_eq!(balanced(&pairs), [Some(true), None, Some(true), Some(false), Some(false)]);
    }

    #[test]
    fn three_of_four() -> Result<(), MetricsError> {
        assert_eq!(accuracy(&[true, false, true, true], &[true, false, false, true])?, 75.0);
        Ok(())
    }

    #[test]
    fn nothing_and_unequal_lengths_are_refused() {
        let refused = accuracy(&[], &[]).unwrap_err().to_string();
        assert_eq!(refused, "NLVR2 predictions: expected at least one, found none");
        let refused = accuracy(&[true], &[true, false]).unwrap_err().to_string();
        assert_eq!(refused, "NLVR2 predictions: expected 2 entries, found 1");
    }
}
