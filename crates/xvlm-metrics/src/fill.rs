//! Filling the blank of a phrase: how often an accepted word is proposed first, or among the first five.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::percent;

/// Scores over all phrases and by kind of blank; all 0 if there are no phrases.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FillScores {
    /// Phrases whose first word is accepted, in percent.
    pub top1: f64,
    /// Phrases with an accepted word among the first five, in percent.
    pub top5: f64,
    /// Number of phrases.
    pub count: usize,
    /// The same for each kind of blank (colour, shape, …).
    pub kinds: BTreeMap<String, KindScores>,
}

/// Scores of the phrases of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct KindScores {
    /// Phrases whose first word is accepted, in percent.
    pub top1: f64,
    /// Phrases with an accepted word among the first five, in percent.
    pub top5: f64,
    /// Number of phrases.
    pub count: usize,
}

impl FillScores {
    /// Scores from, for each phrase, its kind and the rank of the first accepted word: 0 is the best, `None` if no
    /// accepted word was proposed.
    pub fn new<K: Into<String>>(ranks: impl IntoIterator<Item = (K, Option<usize>)>) -> Self {
        let mut by_kind: BTreeMap<String, Vec<Option<usize>>> = BTreeMap::new();
        for (kind, rank) in ranks {
            by_kind.entry(kind.into()).or_default().push(rank);
        }
        let all = score(by_kind.values().flatten().copied());
        let kinds = by_kind.into_iter().map(|(kind, ranks)| (kind, score(ranks.into_iter()))).collect();
        Self { top1: all.top1, top5: all.top5, count: all.count, kinds }
    }
}

fn score(ranks: impl Iterator<Item = Option<usize>>) -> KindScores {
    let (mut first, mut five, mut count) = (0, 0, 0);
    for rank in ranks {
        count += 1;
        first += usize::from(rank.is_some_and(|rank| rank < 1));
        five += usize::from(rank.is_some_and(|rank| rank < 5));
    }
    KindScores { top1: percent(first, count), top5: percent(five, count), count }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_all() {
        let ranks = [("color", Some(0)), ("shape", Some(4)), ("color", Some(5)), ("color", None), ("shape", Some(0))];
        let scores = FillScores::new(ranks);
        assert_eq!((scores.top1, scores.top5, scores.count), (40.0, 60.0, 5));
        assert_eq!(scores.kinds.keys().collect::<Vec<_>>(), ["color", "shape"]);
        assert_eq!(scores.kinds["color"], KindScores { top1: 100.0 / 3.0, top5: 100.0 / 3.0, count: 3 });
        assert_eq!(scores.kinds["shape"], KindScores { top1: 50.0, top5: 100.0, count: 2 });
    }

    #[test]
    fn nothing_scores_nothing() {
        assert_eq!(FillScores::new(Vec::<(String, Option<usize>)>::new()), FillScores::default());
    }
}
