//! Which checkpoint is the best.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::ranks::{Communicator, merge};

/// How good a checkpoint is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Its iteration.
    pub iteration: u64,
    /// Higher is better.
    pub score: f64,
    /// What the score is.
    pub by: Criterion,
    /// How many losses, or observations, were taken since the checkpoint before.
    pub losses: usize,
}

/// What tells which checkpoint is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Criterion {
    /// [`Trainable::score`](crate::Trainable::score).
    Score,
    /// What [`Trainable::judged_by`](crate::Trainable::judged_by) names, the mean since the checkpoint before.
    Observation,
    /// Minus the sum of the losses, each the mean over its batches since the checkpoint before.
    Losses,
}

/// Compares checkpoints. It is kept in each, so that a resumed run finds the same one best as an uninterrupted one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Judge {
    /// Sum and number of values of each loss, or of an observation in their place, since the last checkpoint that was compared.
    since: BTreeMap<String, (f64, u64)>,
    /// The best so far.
    pub(crate) best: Option<Best>,
}

impl Judge {
    /// Adds the losses of a batch, or an observation in their place.
    pub(crate) fn add(&mut self, values: &[(&str, f64)]) {
        for &(name, value) in values {
            let (sum, count) = self.since.entry(name.to_owned()).or_default();
            (*sum, *count) = (*sum + value, *count + 1);
        }
    }

    /// Makes the sums those of all ranks.
    pub(crate) fn merge(&mut self, ranks: &Arc<dyn Communicator>) -> Result<(), TrainError> {
        let own = std::mem::take(&mut self.since).into_iter().map(|(name, (sum, count))| (name, sum, count));
        let all = merge(ranks, own.collect())?;
        self.since = all.into_iter().map(|(name, sum, count)| (name, (sum, count))).collect();
        Ok(())
    }

    /// Compares the checkpoint of an iteration with the best so far, by its score; without one, by what was added since the
    /// last, `otherwise` the losses or an observation. The next is judged by what follows. What has no score is not better
    /// than what has one.
    pub(crate) fn compare(&mut self, iteration: u64, score: Option<f64>, otherwise: Criterion) {
        let since = std::mem::take(&mut self.since);
        let sum: f64 = since.values().map(|(sum, count)| sum / *count as f64).sum();
        let of_batches = if otherwise == Criterion::Losses { -sum } else { sum };
        let by = if score.is_some() { Criterion::Score } else { otherwise };
        let new = Best { iteration, score: score.unwrap_or(of_batches), by, losses: since.len() };
        let is_better = self.best.as_ref().is_none_or(|best| match (best.by == by, by) {
            // Fewer losses have a lower sum: a stretch in which one never came says nothing about the others.
            (true, Criterion::Losses) => (new.losses, new.score) > (best.losses, best.score),
            (true, _) => new.score > best.score,
            (false, _) => best.by != Criterion::Score,
        });
        if is_better && new.score.is_finite() && (score.is_some() || new.losses > 0) {
            self.best = Some(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_has_the_highest_score() {
        let mut judge = Judge::default();
        let mut best = |iteration, losses: &[(&str, f64)], score| {
            judge.add(losses);
            judge.compare(iteration, score, Criterion::Losses);
            judge.best.clone().map(|best| (best.iteration, best.score))
        };
        assert_eq!(best(1, &[], None), None);
        assert_eq!(best(2, &[("a", 4.0), ("a", 2.0)], None), Some((2, -3.0)));
        assert_eq!(best(3, &[("a", 3.5)], None), Some((2, -3.0)));
        // A sum of two losses is not compared with one, from either side.
        assert_eq!(best(4, &[("a", 3.0), ("b", 5.0)], None), Some((4, -8.0)));
        assert_eq!(best(5, &[("a", 1.0)], None), Some((4, -8.0)));
        assert_eq!(best(6, &[("a", 3.0), ("b", 4.0), ("b", 5.0)], None), Some((6, -7.5)));
        // The first of equals.
        assert_eq!(best(7, &[("a", 3.0), ("b", 4.5)], None), Some((6, -7.5)));
        assert_eq!(best(8, &[("a", 9.0)], Some(0.1)), Some((8, 0.1)));
        assert_eq!(best(9, &[("a", 0.0)], Some(f64::NAN)), Some((8, 0.1)));
        assert_eq!(best(10, &[], Some(0.2)), Some((10, 0.2)));
        // Losses say nothing about a score.
        assert_eq!(best(11, &[("a", -9.0), ("b", 0.0)], None), Some((10, 0.2)));
    }

    #[test]
    fn the_best_has_the_highest_observation() {
        let mut judge = Judge::default();
        let mut best = |iteration, rewards: &[f64]| {
            rewards.iter().for_each(|&reward| judge.add(&[("reward", reward)]));
            judge.compare(iteration, None, Criterion::Observation);
            judge.best.clone().map(|best| (best.iteration, best.score, best.by))
        };
        assert_eq!(best(1, &[1.0, 2.0]), Some((1, 1.5, Criterion::Observation)));
        assert_eq!(best(2, &[1.0]), Some((1, 1.5, Criterion::Observation)));
        assert_eq!(best(3, &[4.0, 0.0, 2.0]), Some((3, 2.0, Criterion::Observation)));
    }
}
