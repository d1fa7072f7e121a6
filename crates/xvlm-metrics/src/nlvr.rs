//! NLVR2: is the statement true of the two images? (The scripts of lil-lab/nlvr, `nlvr2/eval`.)

use std::collections::HashMap;
use std::hash::Hash;
use std::path::Path;

use serde::Serialize;

use crate::percent;

/// Scores of statements about pairs of images; all 0 if there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct NlvrScores {
    /// Pairs judged rightly, in percent.
    pub accuracy: f64,
    /// Number of pairs.
    pub count: usize,
    /// Sentences judged rightly with each of their pairs, in percent; `None` unless it is known of all pairs which sentence
    /// they are of.
    pub consistency: Option<f64>,
    /// Number of sentences; 0 unless they are known.
    pub sentences: usize,
}

impl NlvrScores {
    /// Scores from the sentence that each pair is of ([`sentence`]), and whether it was judged rightly.
    pub fn new<K: Hash + Eq>(judged: impl IntoIterator<Item = (Option<K>, bool)>) -> Self {
        let (mut right, mut count) = (0, 0);
        let mut consistent: Option<HashMap<K, bool>> = Some(HashMap::new());
        for (sentence, is_right) in judged {
            count += 1;
            right += usize::from(is_right);
            match (sentence, &mut consistent) {
                (Some(sentence), Some(sentences)) => *sentences.entry(sentence).or_insert(true) &= is_right,
                _ => consistent = None,
            }
        }
        let sentences = consistent.as_ref().map_or(0, HashMap::len);
        let all_right =
            |sentences: HashMap<K, bool>| percent(sentences.values().filter(|&&all| all).count(), sentences.len());
        Self {
            accuracy: percent(right, count),
            count,
            consistency: consistent.filter(|_| count > 0).map(all_right),
            sentences,
        }
    }
}

/// What the pairs of one sentence share. Identifiers read `split-set-pair-sentence`, as `dev-850-2-0`: all but the pair. Without
/// one, where the name of the left image's file reads `split-set-pair-img0`: split and set, and the words. `None` where neither
/// tells the set: the same words may be said of other images, and are then another sentence.
pub fn sentence<'a>(identifier: &'a str, left: &'a Path, words: &'a str) -> Option<[&'a str; 3]> {
    let four = |name: &'a str| <[&str; 4]>::try_from(name.split('-').collect::<Vec<_>>()).ok();
    if let Some([split, set, _, sentence]) = four(identifier) {
        return Some([split, set, sentence]);
    }
    match four(left.file_stem()?.to_str()?)? {
        [split, set, _, image] if image.starts_with("img") => Some([split, set, words]),
        _ => None,
    }
}

/// Scores of the statements that test for bias: of pairs of images that occur more than once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct BiasScores {
    /// Of pairs with both labels: what the images alone suggest does not help.
    pub balanced: NlvrScores,
    /// Of pairs with one label.
    pub unbalanced: NlvrScores,
}

impl BiasScores {
    /// Scores from the sentence of each pair, whether it was judged rightly, and whether it is balanced ([`balanced`]).
    pub fn new<K: Hash + Eq + Clone>(judged: &[(Option<K>, bool, Option<bool>)]) -> Self {
        let of = |wanted: bool| {
            let wanted = judged.iter().filter(move |(.., balance)| *balance == Some(wanted));
            NlvrScores::new(wanted.map(|(sentence, right, _)| (sentence.clone(), *right)))
        };
        Self { balanced: of(true), unbalanced: of(false) }
    }
}

/// Which statements test for bias: of pairs of images that occur more than once, those with both labels (balanced: what
/// the images alone suggest does not help) and those with one (unbalanced).
///
/// `pairs` has the images and the label of each statement. The result is, for each, whether it is balanced; `None` if its
/// pair of images occurs once.
pub fn balanced<K: Hash + Eq>(pairs: &[(K, bool)]) -> Vec<Option<bool>> {
    let mut labels: HashMap<&K, [usize; 2]> = HashMap::new();
    for (images, label) in pairs {
        labels.entry(images).or_default()[usize::from(*label)] += 1;
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

    fn scores(judged: &[(&str, bool)]) -> NlvrScores {
        NlvrScores::new(judged.iter().map(|&(identifier, right)| (sentence(identifier, Path::new(""), ""), right)))
    }

    #[test]
    fn a_sentence_is_consistent_if_all_its_pairs_are_right() {
        let judged =
            [("dev-1-0-0", true), ("dev-1-1-0", true), ("dev-1-0-1", true), ("dev-1-2-1", false), ("dev-2-0-0", false)];
        let expected = NlvrScores { accuracy: 60.0, count: 5, consistency: Some(100.0 / 3.0), sentences: 3 };
        assert_eq!(scores(&judged), expected);
        let unknown = scores(&[("dev-1-0-0", true), ("17", true)]);
        assert_eq!((unknown.accuracy, unknown.consistency, unknown.sentences), (100.0, None, 0));
        assert_eq!(scores(&[]), NlvrScores::default());
    }

    #[test]
    fn a_sentence_is_known_by_its_identifier_or_by_the_set_of_its_images() {
        let of = |identifier, left| sentence(identifier, Path::new(left), "it is red");
        assert_eq!(of("dev-1-0-2", "dev/dev-7-0-img0.png"), Some(["dev", "1", "2"]));
        assert_eq!(of("17", "dev/dev-7-0-img0.png"), Some(["dev", "7", "it is red"]));
        assert_eq!(of("17", "dev/dev-7-0-0.png"), None);
        assert_eq!(of("17", "000017.png"), None);
    }

    #[test]
    fn balance_is_of_pairs_of_images() {
        let pairs =
            [(("a", "b"), true), (("b", "a"), false), (("a", "b"), false), (("c", "c"), true), (("c", "c"), true)];
        let balance = balanced(&pairs);
        assert_eq!(balance, [Some(true), None, Some(true), Some(false), Some(false)]);
        let right = [true, true, false, true, true];
        let judged: Vec<_> = balance.into_iter().zip(right).map(|(balance, right)| (Some(0), right, balance)).collect();
        let scores = BiasScores::new(&judged);
        assert_eq!((scores.balanced.accuracy, scores.balanced.count), (50.0, 2));
        assert_eq!((scores.unbalanced.accuracy, scores.unbalanced.count), (100.0, 2));
    }
}
