//! In which order records are taken.
//!
//! A record is a function of (data set, what it is needed for, seed, rank, position). The order of an epoch: the shards of
//! a source are shuffled, as many as make a window are taken after one another, and the records of a window are shuffled.
//! Several sources are mixed by their weights in blocks, so that how far each of them is follows from the position alone.
//!
//! Positions are those of one process (rank) of several. If all shards of a source can be sought in as they lie, or it has
//! fewer shards than there are processes, each process takes every `ranks`-th record of a common order; otherwise each has
//! shards of its own, so that it fetches no others. Either way no two processes take the same record of
//! an epoch, whatever the numbers of records, shards and processes.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::dataset::{Dataset, is_failed};
use crate::error::DataError;
use crate::records::Record;
use crate::shards::{Index, Need, OpenShard};

/// A generator of its own for each thing that is random.
pub(crate) fn generator(seed: u64, stream: u64, batch: u64, attempt: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, number) in key.chunks_exact_mut(8).zip([seed, stream, batch, attempt]) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Bits of a stream that tell apart what is drawn for an order, beside the order of records in a window.
const SHARDS: u64 = 1 << 62;
const MIXING: u64 = 1 << 61;
/// Where the number of the source stands in a stream.
const SOURCE: u32 = 32;

/// An endless order of the records that have what is needed: all of them, shuffled, again and again.
#[derive(Debug)]
pub struct Order {
    dataset: Arc<Dataset>,
    need: Need,
    seed: u64,
    rank: u64,
    ranks: u64,
    streams: Vec<Stream>,
    mix: Option<Mix>,
}

impl Order {
    /// The order for one process.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] when there are more sources than can be mixed.
    pub fn new(dataset: Arc<Dataset>, need: Need, seed: u64) -> Result<Self, DataError> {
        let weights: Vec<f64> = dataset.sources.iter().map(|source| source.weight).collect();
        let mix = if weights.len() > 1 { Some(Mix::new(&weights, seed, need.stream())?) } else { None };
        Ok(Self { dataset, need, seed, rank: 0, ranks: 1, streams: Vec::new(), mix }.for_rank(0, 1))
    }

    /// The same for process `rank` of `ranks`.
    #[must_use]
    pub fn for_rank(mut self, rank: usize, ranks: usize) -> Self {
        (self.rank, self.ranks) = (rank as u64, ranks.max(1) as u64);
        let dataset = &self.dataset;
        let stream = |source: &crate::dataset::Source| {
            let seekable = source.parts.clone().all(|part| dataset.is_seekable(part));
            let shared = ranks <= 1 || seekable || source.parts.len() < ranks;
            let (first, step) = if shared { (0, 1) } else { (rank, ranks) };
            let parts: Vec<usize> = source.parts.clone().skip(first).step_by(step).collect();
            let window = dataset.window(&parts);
            Stream { window, parts, shared, total: OnceLock::new(), recent: Mutex::default(), ahead: Arc::default() }
        };
        self.streams = dataset.sources.iter().map(stream).collect();
        self
    }

    pub(crate) fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    /// What the records are needed for.
    #[must_use]
    pub fn need(&self) -> Need {
        self.need
    }

    /// Records that take part, of all processes; `None` as long as a shard was not opened and has no index file.
    #[must_use]
    pub fn len(&self) -> Option<u64> {
        self.dataset.count(self.need)
    }

    /// Whether it is known that no record takes part.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// The record at a position of this process's order.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] when no record has what is needed, and [`DataError::Spool`] when there is no room for a shard;
    /// else the record at this position is broken, or its shard cannot be opened ([`DataError::Unopened`]), which says
    /// nothing of the others.
    pub fn record(&self, position: u64) -> Result<Arc<Record>, DataError> {
        let (source, position) = match &self.mix {
            Some(mix) => mix.source(position),
            None => (0, position),
        };
        let (part, record) = self.find(source, position)?;
        self.dataset.read(part, record)
    }

    /// The shard and number of a record.
    fn find(&self, source: usize, position: u64) -> Result<(usize, usize), DataError> {
        let stream = &self.streams[source];
        let position = if stream.shared { position.wrapping_mul(self.ranks).wrapping_add(self.rank) } else { position };
        // Numbers of records change when a shard can be opened that could not be before; then it is looked for again.
        const AGAIN: usize = 8;
        let mut attempts = 0;
        while attempts < AGAIN {
            let (total, changes) = (self.known_total(stream), self.dataset.changes());
            if let Some(total) = total {
                if total == 0 {
                    return Err(self.nothing());
                }
                let plan = self.plan(source, position / total, Some(total));
                let rest = position % total;
                let starts = plan.starts.as_deref().unwrap_or_default();
                let window = starts.partition_point(|&start| start <= rest).saturating_sub(1);
                let start = starts.get(window).copied().unwrap_or_default();
                if let Some(found) = self.in_window(source, &plan, window, rest - start)? {
                    return Ok(found);
                }
                attempts += 1;
                continue;
            }
            // Of the first epoch, or all shards were opened in it. Those before the position have to be opened.
            let (plan, mut rest) = (self.plan(source, 0, None), position);
            for (number, window) in plan.parts.chunks(stream.window).enumerate() {
                let mut count = 0;
                for &part in window {
                    count += self.count(part)?;
                }
                if rest < count {
                    if let Some(found) = self.in_window(source, &plan, number, rest)? {
                        return Ok(found);
                    }
                    break;
                }
                rest -= count;
            }
            attempts += usize::from(changes == self.dataset.changes());
        }
        Err(self.nothing())
    }

    fn nothing(&self) -> DataError {
        let expected = match self.need {
            Need::Captions => "at least one with a caption",
            Need::Elems => "at least one with elems",
            Need::Questions => "at least one with questions",
        };
        let found = if self.is_empty() || self.ranks == 1 {
            "none".to_owned()
        } else {
            format!("none in the shards of process {} of {}", self.rank, self.ranks)
        };
        DataError::Config { field: "records", expected: expected.to_owned(), found }
    }

    fn known_total(&self, stream: &Stream) -> Option<u64> {
        if let Some(total) = stream.total.get() {
            return Some(*total);
        }
        // Asked first: what is known does not change.
        let all_known = stream.parts.iter().all(|&part| self.dataset.is_known(part));
        let total = stream.parts.iter().map(|&part| self.dataset.known_count(part, self.need)).sum::<Option<u64>>()?;
        Some(if all_known { *stream.total.get_or_init(|| total) } else { total })
    }

    /// Records of a shard, which is opened if need be.
    fn count(&self, part: usize) -> Result<u64, DataError> {
        match self.dataset.known_count(part, self.need) {
            Some(count) => Ok(count),
            None => Ok(u64::from(self.dataset.hold(part)?.0.count(self.need))),
        }
    }

    /// The shards of an epoch in their order. `total` are the records of all, if that is known.
    fn plan(&self, source: usize, epoch: u64, total: Option<u64>) -> Arc<Plan> {
        let stream = &self.streams[source];
        let mut recent = stream.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = recent.plans.iter().find(|plan| plan.epoch == epoch && plan.total == total) {
            return Arc::clone(plan);
        }
        let mut parts = stream.parts.clone();
        // The records of a single window are shuffled as a whole.
        if stream.window < parts.len() {
            let key = self.need.stream() | (source as u64) << SOURCE | SHARDS;
            parts.shuffle(&mut generator(self.seed, key, epoch, 0));
        }
        let starts = total.map(|_| {
            let count = |&part: &usize| self.dataset.known_count(part, self.need).unwrap_or_default();
            let counts = parts.chunks(stream.window).map(|window| window.iter().map(count).sum());
            let starts = counts.scan(0, |start, count: u64| {
                *start += count;
                Some(*start - count)
            });
            starts.collect()
        });
        let plan = Arc::new(Plan { epoch, parts, total, starts });
        recent.plans.retain(|kept| kept.epoch != epoch);
        recent.plans.truncate(Recent::KEPT - 1);
        recent.plans.push_front(Arc::clone(&plan));
        plan
    }

    /// The shard and number of a record; nothing if it is to be looked for again, since more is known of its shard now.
    fn in_window(
        &self,
        source: usize,
        plan: &Plan,
        window: usize,
        at: u64,
    ) -> Result<Option<(usize, usize)>, DataError> {
        let stream = &self.streams[source];
        let Some(parts) = plan.parts.chunks(stream.window).nth(window) else { return Ok(None) };
        let still = |kept: &Arc<Window>| {
            let shards = parts.iter().zip(&kept.shards);
            shards.into_iter().all(|(&part, (index, _))| !is_failed(index) || !self.dataset.is_known(part))
        };
        let shuffled = match stream.kept(plan.epoch, window).filter(still) {
            Some(shuffled) => shuffled,
            None => {
                let shuffled = self.shuffle(stream, source, plan.epoch, window, parts)?;
                self.fetch_ahead(stream, source, plan, window);
                shuffled
            }
        };
        let Some(&number) = shuffled.order.get(at as usize) else { return Ok(None) };
        let mut number = number as usize;
        for (&part, (index, _)) in parts.iter().zip(&shuffled.shards) {
            if number < index.len() {
                if is_failed(index) {
                    // Tried again from time to time.
                    return self.dataset.index(part).map(|_| None);
                }
                return Ok(Some((part, number)));
            }
            number -= index.len();
        }
        Ok(None)
    }

    fn shuffle(
        &self,
        stream: &Stream,
        source: usize,
        epoch: u64,
        window: usize,
        parts: &[usize],
    ) -> Result<Arc<Window>, DataError> {
        // Before the lock: opening takes long, and others may be busy in another window.
        let shards = parts.iter().map(|&part| self.dataset.hold(part)).collect::<Result<Vec<_>, _>>()?;
        let records: usize = shards.iter().map(|(index, _)| index.len()).sum();
        if u32::try_from(records).is_err() {
            let expected = format!("windows of at most {} records", u32::MAX);
            return Err(DataError::Config { field: "window", expected, found: format!("one of {records}") });
        }
        let mut recent = stream.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let same =
            |((one, _), (other, _)): (&Held, &Held)| Arc::ptr_eq(one, other) || is_failed(one) && is_failed(other);
        let kept = recent.window(epoch, window).filter(|kept| kept.shards.iter().zip(&shards).all(same));
        if let Some(kept) = kept {
            return Ok(kept);
        }
        recent.windows.retain(|kept| (kept.epoch, kept.window) != (epoch, window));
        recent.make_room(records);
        let count = shards.iter().map(|(index, _)| index.count(self.need) as usize).sum();
        let mut order = Vec::with_capacity(count);
        let mut first = 0;
        for (index, _) in &shards {
            order.extend((0..index.len()).filter(|&i| index.has(i, self.need)).map(|i| first + i as u32));
            first += index.len() as u32;
        }
        let key = self.need.stream() | (source as u64) << SOURCE;
        // What is drawn for a batch has attempts from 1 on, so 0 and the highest numbers are free.
        let attempt = (window as u64).checked_sub(1).map_or(0, |window| u64::MAX - window);
        order.shuffle(&mut generator(self.seed, key, epoch, attempt));
        let shuffled = Arc::new(Window { epoch, window, shards, order });
        recent.windows.push_front(Arc::clone(&shuffled));
        Ok(shuffled)
    }
}

impl Order {
    /// Opens the shards of the window after this one, if they have to be fetched or unpacked, while it is drawn from.
    fn fetch_ahead(&self, stream: &Stream, source: usize, plan: &Plan, window: usize) {
        if stream.parts.iter().all(|&part| self.dataset.is_seekable(part)) || stream.ahead.busy.swap(true, SeqCst) {
            return;
        }
        let parts = match plan.parts.chunks(stream.window).nth(window + 1) {
            Some(parts) => parts.to_vec(),
            None => self
                .plan(source, plan.epoch + 1, self.known_total(stream))
                .parts
                .iter()
                .copied()
                .take(stream.window)
                .collect(),
        };
        let (dataset, ahead) = (Arc::clone(&self.dataset), Arc::clone(&stream.ahead));
        let fetch = move || {
            let mut held = Vec::with_capacity(parts.len());
            for part in parts {
                if ahead.stopped.load(SeqCst) {
                    return;
                }
                // What cannot be opened is told when it is drawn from.
                held.extend(dataset.hold(part).ok().and_then(|(_, open)| open));
            }
            *ahead.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
            ahead.busy.store(false, SeqCst);
        };
        // Without a thread the window is fetched when it is due.
        if std::thread::Builder::new().name("fetch ahead".to_owned()).spawn(fetch).is_err() {
            stream.ahead.busy.store(false, SeqCst);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.ahead.stopped.store(true, SeqCst);
    }
}

/// What is fetched before it is due.
#[derive(Debug, Default)]
struct Ahead {
    busy: AtomicBool,
    stopped: AtomicBool,
    /// Kept open until the next window is fetched.
    held: Mutex<Vec<Arc<OpenShard>>>,
}

/// The order of one source.
#[derive(Debug)]
struct Stream {
    /// The shards of this process.
    parts: Vec<usize>,
    /// Whether all processes have all shards.
    shared: bool,
    /// Shards of a window.
    window: usize,
    /// Records of an epoch, once they are known.
    total: OnceLock<u64>,
    recent: Mutex<Recent>,
    ahead: Arc<Ahead>,
}

impl Stream {
    fn kept(&self, epoch: u64, window: usize) -> Option<Arc<Window>> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).window(epoch, window)
    }
}

/// What was drawn last: batches reach over the end of a window, and workers are not in step.
#[derive(Debug, Default)]
struct Recent {
    plans: VecDeque<Arc<Plan>>,
    windows: VecDeque<Arc<Window>>,
}

impl Recent {
    const KEPT: usize = 2;
    /// Of windows of a few records, as many more are kept as make this number of records, but no more than so many windows.
    const FEW: usize = 4096;
    const MOST: usize = 16;

    fn window(&self, epoch: u64, window: usize) -> Option<Arc<Window>> {
        self.windows.iter().find(|kept| (kept.epoch, kept.window) == (epoch, window)).map(Arc::clone)
    }

    /// Drops the oldest windows in favour of one of so many records.
    fn make_room(&mut self, mut records: usize) {
        let keep = self.windows.iter().enumerate().take(Self::MOST - 1).take_while(|(i, window)| {
            records += window.order.len();
            i + 1 < Self::KEPT || records <= Self::FEW
        });
        let keep = keep.count();
        self.windows.truncate(keep);
    }
}

/// The shards of an epoch in their order.
#[derive(Debug)]
struct Plan {
    epoch: u64,
    parts: Vec<usize>,
    /// Records of all, if that is known; one for each shard that cannot be opened.
    total: Option<u64>,
    /// How many records come before each window, if all shards' numbers of records are known.
    starts: Option<Vec<u64>>,
}

/// The index of a shard, and the shard if it is kept open.
type Held = (Arc<Index>, Option<Arc<OpenShard>>);

/// Some shards of an epoch after one another.
#[derive(Debug)]
struct Window {
    epoch: u64,
    window: usize,
    /// Those in temporary files are open.
    shards: Vec<Held>,
    /// The records that take part, by their numbers in the window, in their order.
    order: Vec<u32>,
}

/// How several sources are mixed: in a cycle of blocks, each of which has its share of every source in a random order.
#[derive(Debug)]
struct Mix {
    seed: u64,
    stream: u64,
    /// Places of each source in a cycle.
    shares: Vec<u64>,
    /// `[block][source]`: places of the source in the cycle before the block.
    before: Vec<Vec<u64>>,
    /// The blocks drawn last: for each place its source, and how many of that source come before it in the block.
    recent: Mutex<VecDeque<Drawn>>,
}

/// A block with its number: for each place its source, and how many of that source come before it.
type Drawn = (u64, Arc<[(u32, u32)]>);

impl Mix {
    /// Places of a block and of a cycle: shares are kept to one in 65536, and to within a place or two at any time.
    const BLOCK: usize = 256;
    const CYCLE: usize = 1 << 16;

    fn new(weights: &[f64], seed: u64, need: u64) -> Result<Self, DataError> {
        if weights.len() > Self::BLOCK {
            let expected = format!("at most {} sources with weights", Self::BLOCK);
            return Err(DataError::Config { field: "weight", expected, found: weights.len().to_string() });
        }
        // Divided first: a sum of large weights may overflow.
        let largest = weights.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let sum: f64 = weights.iter().map(|weight| weight / largest).sum();
        // Each has a place, and what rounding leaves goes to the largest.
        let free = (Self::CYCLE - weights.len()) as f64;
        let mut shares: Vec<u64> =
            weights.iter().map(|weight| 1 + (weight / largest / sum * free).floor() as u64).collect();
        let left = Self::CYCLE as u64 - shares.iter().sum::<u64>();
        if let Some(most) = shares.iter_mut().max() {
            *most += left;
        }
        // Each place goes to the source that is furthest behind its share.
        let mut counts = vec![0u64; shares.len()];
        let mut before = Vec::with_capacity(Self::CYCLE / Self::BLOCK + 1);
        for place in 0..Self::CYCLE {
            if place % Self::BLOCK == 0 {
                before.push(counts.clone());
            }
            let behind = |s: usize| shares[s] as i64 * (place as i64 + 1) - counts[s] as i64 * Self::CYCLE as i64;
            if let Some(next) = (0..shares.len()).max_by_key(|&s| (behind(s), std::cmp::Reverse(s))) {
                counts[next] += 1;
            }
        }
        before.push(counts);
        Ok(Self { seed, stream: need | MIXING, shares, before, recent: Mutex::default() })
    }

    /// The source that a position is of, and the position in that source.
    fn source(&self, position: u64) -> (usize, u64) {
        let (block, place) = (position / Self::BLOCK as u64, position as usize % Self::BLOCK);
        let blocks = (Self::CYCLE / Self::BLOCK) as u64;
        let (source, before) = self.block(block)[place];
        let source = source as usize;
        let cycles = (block / blocks).wrapping_mul(self.shares[source]);
        let in_cycle = self.before[(block % blocks) as usize][source] + u64::from(before);
        (source, cycles.wrapping_add(in_cycle))
    }

    fn block(&self, block: u64) -> Arc<[(u32, u32)]> {
        /// Workers are in some few blocks at a time.
        const KEPT: usize = 16;
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, places)) = recent.iter().find(|(kept, _)| *kept == block) {
            return Arc::clone(places);
        }
        let row = (block % (self.before.len() as u64 - 1)) as usize;
        let quotas = self.before[row].iter().zip(&self.before[row + 1]).map(|(before, after)| after - before);
        let mut places: Vec<u32> =
            (0u32..).zip(quotas).flat_map(|(source, quota)| std::iter::repeat_n(source, quota as usize)).collect();
        places.shuffle(&mut generator(self.seed, self.stream, block, 0));
        let mut met = vec![0; self.shares.len()];
        let place = |source: u32| {
            let before = met[source as usize];
            met[source as usize] += 1;
            (source, before)
        };
        let places: Arc<[(u32, u32)]> = places.into_iter().map(place).collect();
        recent.truncate(KEPT - 1);
        recent.push_front((block, Arc::clone(&places)));
        places
    }
}
