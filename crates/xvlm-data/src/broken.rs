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
        let (origin, error) = (self.origin.to_string(), self.error.to_string());
        if error.contains(&origin) { f.write_str(&error) } else { write!(f, "{origin}: {error}") }
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

/// What is known of broken records among those that were drawn.
#[derive(Debug, Default)]
pub(crate) struct Broken {
    pub(crate) tally: Tally,
    /// Records taken.
    pub(crate) seen: u64,
}

impl Broken {
    pub(crate) fn note(
        &mut self,
        origin: Option<&Origin>,
        error: DataError,
        limit: f64,
        hopeless: bool,
    ) -> Result<(), DataError> {
        /// Fewer records say little about the share.
        const ENOUGH: u64 = 20;
        self.seen += 1;
        self.tally.add(1, error, origin);
        let met = self.tally.total();
        let too_many = self.seen >= ENOUGH && met as f64 > limit * self.seen as f64;
        if !too_many && !hopeless {
            return Ok(());
        }
        Err(DataError::too_many_broken(met, self.seen, limit, self.tally.examples()))
    }
}
