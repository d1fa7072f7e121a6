//! In which order records are taken, and which of them are broken.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::DataError;
use crate::records::{Origin, Record};

/// A record that was left out, and why.
#[derive(Debug, Clone)]
pub struct BrokenRecord {
    /// File and line.
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

/// A generator of its own for each thing that is random.
pub(crate) fn generator(seed: u64, stream: u64, batch: u64, attempt: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, number) in key.chunks_exact_mut(8).zip([seed, stream, batch, attempt]) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// An endless order of records: all of them, shuffled, again and again.
#[derive(Debug)]
pub(crate) struct Shuffled {
    seed: u64,
    pub(crate) stream: u64,
    /// The records that take part.
    indices: Vec<u32>,
    /// The orders of recent epochs: batches reach over the end, and workers are not in step.
    recent: Mutex<VecDeque<(u64, Arc<[u32]>)>>,
}

impl Shuffled {
    pub(crate) fn new(seed: u64, stream: u64, records: &[Record], takes_part: impl Fn(&Record) -> bool) -> Self {
        let records = (0u32..).zip(records);
        let indices = records.filter(|(_, record)| takes_part(record)).map(|(i, _)| i).collect();
        Self { seed, stream, indices, recent: Mutex::default() }
    }

    /// How many records take part.
    pub(crate) fn len(&self) -> usize {
        self.indices.len()
    }

    /// The record at a position of the endless order.
    pub(crate) fn record(&self, position: u64) -> Result<usize, DataError> {
        let count = self.indices.len() as u64;
        if count == 0 {
            let expected = ["at least one with a caption", "at least one with elems"];
            return Err(DataError::Config {
                field: "records",
                expected: expected[usize::from(self.stream != 0)].to_owned(),
                found: "none".to_owned(),
            });
        }
        let order = self.order(position / count);
        Ok(order[(position % count) as usize] as usize)
    }

    fn order(&self, epoch: u64) -> Arc<[u32]> {
        const KEPT: usize = 2;
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = recent.iter().find(|(kept, _)| *kept == epoch) {
            return Arc::clone(order);
        }
        let mut order = self.indices.clone();
        // Attempts are counted from 1, so 0 is free for this.
        order.shuffle(&mut generator(self.seed, self.stream, epoch, 0));
        let order: Arc<[u32]> = order.into();
        recent.truncate(KEPT - 1);
        recent.push_front((epoch, Arc::clone(&order)));
        order
    }
}

/// What is known of broken records.
#[derive(Debug, Default)]
pub(crate) struct Broken {
    pub(crate) records: BTreeMap<usize, BrokenRecord>,
    /// Records taken.
    pub(crate) seen: u64,
    /// Broken ones among them.
    pub(crate) met: u64,
}

impl Broken {
    pub(crate) fn note(
        &mut self,
        index: usize,
        record: &Record,
        error: DataError,
        limit: f64,
        hopeless: bool,
    ) -> Result<(), DataError> {
        /// Fewer records say little about the share.
        const ENOUGH: u64 = 20;
        self.seen += 1;
        self.met += 1;
        self.records
            .entry(index)
            .or_insert_with(|| BrokenRecord { origin: record.origin.clone(), error: Arc::new(error) });
        let too_many = self.seen >= ENOUGH && self.met as f64 > limit * self.seen as f64;
        if !too_many && !hopeless {
            return Ok(());
        }
        Err(DataError::too_many_broken(self.met, self.seen, limit, self.records.values()))
    }
}
