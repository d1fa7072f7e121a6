//! Which records are broken: counted by reason, with examples.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::error::{DataError, Place};
use crate::records::Origin;

/// Most reasons that are told apart, and most examples kept: data of any size take bounded memory.
const MOST_REASONS: usize = 64;
const MOST_EXAMPLES: usize = 64;
/// Most examples of one reason.
const EXAMPLES_OF_ONE: u64 = 8;

/// A record that was left out, and why.
#[derive(Debug, Clone)]
pub struct BrokenRecord {
    /// File and line, or where else it is.
    pub origin: Origin,
    /// What is wrong with it.
    pub error: Arc<DataError>,
}

impl fmt::Display for BrokenRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&told(Some(&self.origin), &self.error))
    }
}

/// What is wrong, and where it is.
pub(crate) fn told(origin: Option<&Origin>, error: &DataError) -> String {
    let message = error.to_string();
    match origin.map(Origin::to_string).filter(|origin| !message.contains(origin)) {
        Some(origin) => format!("{origin}: {message}"),
        None => message,
    }
}

/// How many records are broken, by reason, with examples.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    total: u64,
    reasons: BTreeMap<String, u64>,
    examples: Vec<BrokenRecord>,
}

impl Tally {
    /// How many.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many of each reason ([`DataError::reason`]).
    #[must_use]
    pub fn reasons(&self) -> &BTreeMap<String, u64> {
        &self.reasons
    }

    /// The first few of each reason.
    #[must_use]
    pub fn examples(&self) -> &[BrokenRecord] {
        &self.examples
    }

    /// Refuses data of which more than a share of `all` is broken.
    pub(crate) fn check(&self, all: u64, limit: f64) -> Result<(), DataError> {
        match self.total as f64 > limit * all as f64 {
            true => Err(DataError::too_many_broken(self.total, all, limit, &self.examples)),
            false => Ok(()),
        }
    }

    /// Counts `count` records that are broken for one reason; `origin` is told where the error tells none.
    pub(crate) fn add(&mut self, count: u64, error: DataError, origin: Option<&Origin>) {
        if count == 0 {
            return;
        }
        let of_reason = self.count(error.reason(), count);
        let few = of_reason <= EXAMPLES_OF_ONE || of_reason == count;
        let origin = origin.cloned().or_else(|| error.origin());
        if let Some(origin) = origin.filter(|_| few && self.examples.len() < MOST_EXAMPLES)
            && !self.examples.iter().any(|example| example.origin == origin)
        {
            self.examples.push(BrokenRecord { origin, error: Arc::new(error) });
        }
    }

    /// Takes over what another has counted.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (reason, count) in &other.reasons {
            self.count(reason.clone(), *count);
        }
        let room = MOST_EXAMPLES.saturating_sub(self.examples.len());
        self.examples.extend(other.examples.iter().take(room).cloned());
    }

    fn count(&mut self, reason: String, count: u64) -> u64 {
        self.total = self.total.saturating_add(count);
        let full = self.reasons.len() >= MOST_REASONS && !self.reasons.contains_key(&reason);
        let of_reason = self.reasons.entry(if full { "other reasons".to_owned() } else { reason }).or_default();
        *of_reason = of_reason.saturating_add(count);
        *of_reason
    }

    /// For an index file: counts by reason, and place and text of each example.
    pub(crate) fn parts(&self) -> (BTreeMap<String, u64>, Vec<(Place, String)>) {
        let text = |example: &BrokenRecord| {
            let (origin, error) = (example.origin.to_string(), example.error.to_string());
            error.strip_prefix(&origin).map_or(error.clone(), |rest| rest.trim_start_matches(": ").to_owned())
        };
        let examples = self.examples.iter().map(|example| (example.origin.place.clone(), text(example)));
        (self.reasons.clone(), examples.collect())
    }

    /// From an index file.
    pub(crate) fn from_parts(
        file: &Arc<std::path::Path>,
        reasons: BTreeMap<String, u64>,
        examples: Vec<(Place, String)>,
    ) -> Self {
        let example = |(place, reason): (Place, String)| BrokenRecord {
            origin: Origin { file: Arc::clone(file), place: place.clone() },
            error: Arc::new(DataError::Indexed { path: file.to_path_buf(), place, reason }),
        };
        let mut tally = Self::default();
        for (reason, count) in reasons {
            tally.count(reason, count);
        }
        tally.examples = examples.into_iter().take(MOST_EXAMPLES).map(example).collect();
        tally
    }
}

/// Whether so many broken ones of those seen so far say that the share of all is above `limit`. What is seen is a sample, so
/// it takes more than the share: three standard deviations of how many there are among as many from data at the limit, and
/// a few more, because those are a poor bound where hardly any are expected. Of data that must have none, one is too many.
pub(crate) fn too_many(met: u64, seen: u64, limit: f64) -> bool {
    const DEVIATIONS: f64 = 3.0;
    const FEW: f64 = 3.0;
    let expected = limit * seen as f64;
    met > 0 && (limit <= 0.0 || met as f64 > expected + DEVIATIONS * expected.sqrt() + FEW)
}

/// What is known of broken ones among those that were taken.
#[derive(Debug, Default)]
pub(crate) struct Broken {
    pub(crate) tally: Tally,
    /// How many were taken.
    pub(crate) seen: u64,
}

impl Broken {
    /// Counts one that is broken, and refuses more if there are too many, or if it is `hopeless`.
    pub(crate) fn note(
        &mut self,
        origin: Option<&Origin>,
        error: DataError,
        limit: f64,
        hopeless: bool,
    ) -> Result<(), DataError> {
        self.seen += 1;
        self.tally.add(1, error, origin);
        let met = self.tally.total();
        match hopeless || too_many(met, self.seen, limit) {
            true => Err(DataError::too_many_broken(met, self.seen, limit, self.tally.examples())),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    /// After how many draws data with this share of broken records are refused, if before `most`.
    fn refused(share: f64, limit: f64, most: u64, seed: u64) -> Option<u64> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut met = 0;
        (1..=most).find(|&seen| {
            met += u64::from(rng.random_bool(share));
            too_many(met, seen, limit)
        })
    }

    #[test]
    fn data_below_the_limit_are_not_refused_by_chance() {
        for (share, limit) in [(0.005, 0.01), (0.001, 0.01), (0.02, 0.05), (0.4, 0.5)] {
            let stopped = (0..300).filter(|&seed| refused(share, limit, 20_000, seed).is_some()).count();
            assert!(stopped <= 1, "{share} of {limit}: {stopped} of 300");
        }
        for at in 1..100 {
            assert!(!too_many(1, at, 0.01), "one broken record at {at}");
        }
    }

    #[test]
    fn data_above_the_limit_are_refused_soon() {
        for seed in 0..100 {
            assert!(refused(1.0, 0.01, 10, seed).is_some() && refused(1.0, 0.5, 50, seed).is_some());
            assert!(refused(0.1, 0.01, 500, seed).is_some() && refused(0.02, 0.01, 10_000, seed).is_some());
        }
        assert!(too_many(1, 1, 0.0) && too_many(1, 1_000_000, 0.0) && !too_many(0, 10, 0.0));
    }
}
