//! Data sets: the shards of one or several sources, from which records are read by their place.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use rayon::prelude::*;

use crate::broken::{Tally, too_many};
use crate::error::DataError;
use crate::records::{Reading, Record};
use crate::shards::{self, Form, Index, Need, OpenShard, Shard};
use crate::storage::{Location, StorageOptions, expand};

mod config;
mod pool;

pub use config::{DatasetConfig, SourceConfig};
use pool::Pool;

/// Shards of which a window is made, where not all can be sought in as they lie.
const WINDOW: usize = 4;

/// A set of records that need not fit into memory.
#[derive(Debug)]
pub struct Dataset {
    parts: Vec<Part>,
    pub(crate) sources: Vec<Source>,
    config: DatasetConfig,
    storage: StorageOptions,
    pool: Mutex<Pool>,
    broken: Mutex<Learnt>,
    /// How often something was learnt of a shard, or that it cannot be opened.
    changes: AtomicU64,
}

/// What the indices of shards say is broken.
#[derive(Debug, Default)]
struct Learnt {
    /// When the data set was opened.
    at_first: Tally,
    /// Since then.
    later: Tally,
    is_open: bool,
}

/// Shards that are one stream of records.
#[derive(Debug)]
pub(crate) struct Source {
    /// Its share among the sources; 1 if there is only one.
    pub(crate) weight: f64,
    /// Its parts.
    pub(crate) parts: Range<usize>,
}

/// A shard, or records in memory.
#[derive(Debug)]
struct Part {
    content: Content,
    /// Whether it can be sought in as it lies.
    seekable: bool,
    /// Learnt when it is opened first, and kept.
    index: OnceLock<Arc<Index>>,
    /// Held while it is opened.
    opening: Mutex<()>,
    /// When it could not be opened last, and why; nothing once it could be again.
    failure: Mutex<Option<Failure>>,
}

#[derive(Debug, Clone)]
struct Failure {
    when: Instant,
    error: Arc<DataError>,
    /// Whether it failed when the data set was opened.
    at_first: bool,
}

#[derive(Debug)]
enum Content {
    Memory(Vec<Arc<Record>>),
    Stored(Shard),
}

impl Part {
    fn new(content: Content, seekable: bool) -> Self {
        Self { content, seekable, index: OnceLock::new(), opening: Mutex::default(), failure: Mutex::default() }
    }

    fn failure(&self) -> MutexGuard<'_, Option<Failure>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dataset {
    /// The records of all sources. Shards that can be sought in as they lie are looked through now, unless an index file
    /// lies beside them; others when they are needed. A shard that cannot be read counts as broken records, unless none
    /// can be.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] about a source that makes no sense, [`DataError::Io`] or [`DataError::Shard`] when files are
    /// not there or no shard can be read.
    pub fn open(sources: &[SourceConfig], config: &DatasetConfig, storage: &StorageOptions) -> Result<Self, DataError> {
        config::check(sources, config)?;
        let (mut streams, mut shards) = (Vec::<Source>::new(), Vec::new());
        for source in sources {
            let start = shards.len();
            for entry in &source.files {
                for location in expand(entry, storage)? {
                    let root = match (&source.image_root, location.as_file()) {
                        (Some(root), _) => Some(absolute(root)?),
                        (None, Some(path)) => Some(absolute(&crate::json::folder(path))?),
                        (None, None) => None,
                    };
                    let reading = Reading { keys: source.keys.clone(), root };
                    shards.push((location, reading));
                }
            }
            match (source.weight, streams.last_mut()) {
                // Sources without weights are one.
                (None, Some(only)) => only.parts.end = shards.len(),
                (weight, _) => streams.push(Source { weight: weight.unwrap_or(1.0), parts: start..shards.len() }),
            }
        }
        let shard = |(location, reading): (Location, Reading)| {
            if let Some(path) = location.as_file()
                && !path.try_exists().unwrap_or(true)
                && shards_named(sources, path)
            {
                let source = std::io::Error::from(std::io::ErrorKind::NotFound);
                return Err(DataError::Io { path: path.to_owned(), source });
            }
            let shard = Shard::new(location, Arc::new(reading));
            let seekable = shard.is_seekable();
            Ok(Part::new(Content::Stored(shard), seekable))
        };
        let parts = shards.into_iter().map(shard).collect::<Result<Vec<_>, _>>()?;
        // A window whose shards are opened to learn how many records they have is the next to be drawn from.
        let spools = config.window.unwrap_or(WINDOW).max(1);
        let dataset = Self {
            parts,
            sources: streams,
            config: config.clone(),
            storage: storage.clone(),
            pool: Mutex::new(Pool::new(spools)),
            broken: Mutex::default(),
            changes: AtomicU64::new(0),
        };
        dataset.look_through()?;
        dataset.lock_broken().is_open = true;
        Ok(dataset)
    }

    /// The records given.
    #[must_use]
    pub fn from_records(records: Vec<Record>) -> Self {
        let mut index = Index::new(Form::Lines);
        for (i, record) in records.iter().enumerate() {
            index.push(i as u64, 0, shards::flags_of(record));
        }
        let part = Part::new(Content::Memory(records.into_iter().map(Arc::new).collect()), true);
        let part = Part { index: OnceLock::from(Arc::new(index)), ..part };
        Self {
            parts: vec![part],
            sources: vec![Source { weight: 1.0, parts: 0..1 }],
            config: DatasetConfig::default(),
            storage: StorageOptions::default(),
            pool: Mutex::new(Pool::new(0)),
            broken: Mutex::default(),
            changes: AtomicU64::new(0),
        }
    }

    /// Learns the indices of what can be sought in, and of what has an index file.
    fn look_through(&self) -> Result<(), DataError> {
        let failures: Vec<_> = (0..self.parts.len())
            .into_par_iter()
            .filter_map(|part| {
                if self.parts[part].seekable {
                    self.index(part).err()
                } else {
                    if let Content::Stored(shard) = &self.parts[part].content
                        && let Some(index) = shard.indexed().or_else(|| self.kept_index(shard))
                    {
                        self.learn(part, Arc::new(index));
                    }
                    None
                }
            })
            .collect();
        let all_failed = failures.len() == self.parts.len();
        let no_room = |error: &DataError| matches!(error, DataError::Spool { .. });
        let fatal = failures.into_iter().find(|error| all_failed || no_room(error));
        if fatal.is_some() {
            // Nothing comes of the data set: the error is the caller's alone.
            self.parts.iter().for_each(|part| *part.failure() = None);
        }
        match fatal {
            Some(DataError::Unopened(error)) => Err(Arc::try_unwrap(error).unwrap_or_else(DataError::Unopened)),
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Number of shards.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.parts.len()
    }

    /// Records that have what is needed; `None` as long as a shard was not opened and has no index file.
    #[must_use]
    pub fn count(&self, need: Need) -> Option<u64> {
        (0..self.parts.len()).map(|part| self.known_count(part, need)).sum()
    }

    /// Records found so far, whatever they have, but for broken ones, and for those of shards that cannot be opened.
    #[must_use]
    pub fn found(&self) -> u64 {
        let open = self.parts.iter().filter(|part| part.failure().is_none());
        open.filter_map(|part| part.index.get()).map(|index| index.len() as u64).sum()
    }

    /// What was found to be broken when shards were looked through, and those that cannot be opened; of one that never
    /// could be, as many records are missing as the others have on average. Records of which only a part is wrong, such as
    /// a box or the image, are found to be broken when they are read.
    #[must_use]
    pub fn broken(&self) -> Tally {
        self.tally(|_| true)
    }

    /// The same without what was already known when the data set was opened.
    pub(crate) fn broken_later(&self) -> Tally {
        self.tally(|at_first| !at_first)
    }

    fn tally(&self, wanted: impl Fn(bool) -> bool) -> Tally {
        let mut tally = Tally::default();
        {
            let learnt = self.lock_broken();
            let both = [(true, &learnt.at_first), (false, &learnt.later)];
            both.into_iter().filter(|(at_first, _)| wanted(*at_first)).for_each(|(_, of)| tally.merge(of));
        }
        let mut average = None;
        for part in &self.parts {
            let Some(failure) = part.failure().clone().filter(|failure| wanted(failure.at_first)) else { continue };
            let missing = match part.index.get() {
                Some(index) => index.len() as u64,
                None => *average.get_or_insert_with(|| self.average()),
            };
            tally.add(missing.max(1), DataError::Unopened(failure.error), None);
        }
        tally
    }

    /// Records of a shard, of those that were opened.
    fn average(&self) -> u64 {
        let known: Vec<u64> =
            self.parts.iter().filter_map(|part| part.index.get()).map(|index| index.len() as u64).collect();
        known.iter().sum::<u64>() / (known.len() as u64).max(1)
    }

    /// Refuses a data set of which too much was found to be broken so far. As long as not all shards were looked through,
    /// those that were are a sample, of which a little more may be broken.
    ///
    /// # Errors
    ///
    /// [`DataError::TooManyBroken`].
    pub fn check_broken(&self, limit: f64) -> Result<(), DataError> {
        let broken = self.broken();
        let failed = self.parts.iter().filter(|part| part.failure().is_some()).count() as u64;
        let known = self.parts.iter().filter(|part| part.index.get().is_some() || part.failure().is_some()).count();
        let all = self.found().saturating_add(broken.total());
        if known == self.parts.len() {
            return broken.check(all, limit);
        }
        // Whether shards can be opened is a sample of shards, however many records each of them has.
        let (indexed, shards) = (self.tally_of_indices(), known as u64);
        if too_many(indexed, self.found().saturating_add(indexed), limit) || too_many(failed, shards, limit) {
            return Err(DataError::too_many_broken(broken.total(), all, limit, broken.examples()));
        }
        Ok(())
    }

    /// Records that the indices say are broken.
    fn tally_of_indices(&self) -> u64 {
        let learnt = self.lock_broken();
        learnt.at_first.total().saturating_add(learnt.later.total())
    }

    /// Grows whenever [`Self::broken`] may have changed.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(SeqCst)
    }

    /// Reads all records once, shard after shard, and tells the broken ones too.
    ///
    /// # Errors
    ///
    /// What `each` returns, which ends it.
    pub fn visit<E>(&self, mut each: impl FnMut(Result<Arc<Record>, DataError>) -> Result<(), E>) -> Result<(), E> {
        for part in &self.parts {
            match &part.content {
                Content::Memory(records) => records.iter().try_for_each(|record| each(Ok(Arc::clone(record))))?,
                Content::Stored(shard) => {
                    shards::visit(shard, &self.storage, &self.config.limits, |record| each(record.map(Arc::new)))?;
                }
            }
        }
        Ok(())
    }

    /// Writes an index file beside every shard that is a file and not a table; others are left as they are.
    ///
    /// # Errors
    ///
    /// If a shard cannot be read or an index not be written: the first such error, after all others were written.
    pub fn write_indices(&self) -> Result<Vec<PathBuf>, DataError> {
        let (mut written, mut failed) = (Vec::new(), None);
        for (i, part) in self.parts.iter().enumerate() {
            let Content::Stored(shard) = &part.content else { continue };
            let Some(path) = shard.location.as_file() else { continue };
            let write = || {
                let open = self.opened(i, shard)?;
                if open.is_table() {
                    return Ok(None);
                }
                open.index.write(path)?;
                Ok(Some(Index::path_of(path)))
            };
            match write() {
                Ok(path) => written.extend(path),
                // No other shard could be unpacked either.
                Err(error @ DataError::Spool { .. }) => return Err(error),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(written), Err)
    }

    pub(crate) fn is_seekable(&self, part: usize) -> bool {
        self.parts[part].seekable
    }

    /// Shards of which a window of these is made.
    pub(crate) fn window(&self, parts: &[usize]) -> usize {
        let all = parts.iter().all(|&part| self.is_seekable(part));
        self.config.window.unwrap_or(if all { parts.len() } else { WINDOW }).max(1)
    }

    /// Records of a part that have what is needed, if that is known. One that cannot be opened counts as one record, which
    /// is broken.
    pub(crate) fn known_count(&self, part: usize, need: Need) -> Option<u64> {
        let part = &self.parts[part];
        match part.index.get() {
            Some(index) => Some(u64::from(index.count(need))),
            None => part.failure().as_ref().map(|_| 1),
        }
    }

    /// Whether the index of a part is known: it will not change any more.
    pub(crate) fn is_known(&self, part: usize) -> bool {
        self.parts[part].index.get().is_some()
    }

    /// The index of a part, and the open shard if it lies in a temporary file: it does as long as somebody has it. For a
    /// part that cannot be opened stands an index of one record that has everything: drawing it tells the reason.
    ///
    /// # Errors
    ///
    /// [`DataError::Spool`].
    pub(crate) fn hold(&self, part: usize) -> Result<(Arc<Index>, Option<Arc<OpenShard>>), DataError> {
        let held = match &self.parts[part].content {
            Content::Stored(shard) if !self.parts[part].seekable => {
                self.opened(part, shard).map(|open| (Arc::clone(&open.index), Some(open)))
            }
            _ => self.index(part).map(|index| (index, None)),
        };
        match held {
            // Known from when it could be opened, or from an index file.
            Err(DataError::Unopened(_)) => {
                Ok((self.parts[part].index.get().map_or_else(|| Arc::new(failed()), Arc::clone), None))
            }
            held => held,
        }
    }

    /// The index of a part, for which it is opened if need be.
    pub(crate) fn index(&self, part: usize) -> Result<Arc<Index>, DataError> {
        if let Some(index) = self.parts[part].index.get() {
            return Ok(Arc::clone(index));
        }
        let Content::Stored(shard) = &self.parts[part].content else {
            return Ok(self.learn(part, Arc::new(Index::new(Form::Lines))));
        };
        Ok(Arc::clone(&self.opened(part, shard)?.index))
    }

    fn learn(&self, part: usize, index: Arc<Index>) -> Arc<Index> {
        let mut first = false;
        let kept = self.parts[part].index.get_or_init(|| {
            first = true;
            index
        });
        if first {
            {
                let mut learnt = self.lock_broken();
                let tally = if learnt.is_open { &mut learnt.later } else { &mut learnt.at_first };
                tally.merge(kept.broken());
            }
            self.changes.fetch_add(1, SeqCst);
        }
        Arc::clone(kept)
    }

    /// Reads a record by its number in the index of a part.
    pub(crate) fn read(&self, part: usize, record: usize) -> Result<Arc<Record>, DataError> {
        match &self.parts[part].content {
            Content::Memory(records) => Ok(Arc::clone(&records[record])),
            Content::Stored(shard) => {
                let open = self.opened(part, shard)?;
                shard.read(&open, record).map(Arc::new)
            }
        }
    }

    /// The open shard. What could not be opened is [`DataError::Unopened`], and left alone for a while.
    fn opened(&self, part: usize, shard: &Shard) -> Result<Arc<OpenShard>, DataError> {
        if let Some(open) = self.lock_pool().get(part) {
            return Ok(open);
        }
        let _opening = self.parts[part].opening.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have been at it.
        if let Some(open) = self.lock_pool().get(part) {
            return Ok(open);
        }
        let known = self.parts[part].index.get();
        let again = self.storage.timeout.saturating_mul(2);
        let last = self.parts[part].failure().clone();
        if let Some(last) = last.as_ref().filter(|last| last.when.elapsed() < again) {
            return Err(DataError::Unopened(Arc::clone(&last.error)));
        }
        match shard.open(known, &self.storage, &self.config.limits) {
            Ok(open) => {
                let open = Arc::new(open);
                if known.is_none() && open.is_spooled {
                    self.keep_index(shard, &open.index);
                }
                self.learn(part, Arc::clone(&open.index));
                if self.parts[part].failure().take().is_some() {
                    self.changes.fetch_add(1, SeqCst);
                }
                self.lock_pool().put(part, Arc::clone(&open));
                Ok(open)
            }
            // Nothing is wrong with the shard.
            Err(error @ DataError::Spool { .. }) => Err(error),
            Err(error) => {
                let error = Arc::new(error);
                let at_first = last.map_or_else(|| !self.lock_broken().is_open, |last| last.at_first);
                let failure = Failure { when: Instant::now(), error: Arc::clone(&error), at_first };
                *self.parts[part].failure() = Some(failure);
                self.changes.fetch_add(1, SeqCst);
                Err(DataError::Unopened(error))
            }
        }
    }

    /// The file in which the index of a shard is kept that has none beside it.
    fn index_file(&self, shard: &Shard) -> Option<PathBuf> {
        let name = match &shard.location {
            Location::File(path) => path.as_os_str().as_encoded_bytes(),
            Location::Url(url) => url.as_bytes(),
        };
        // A shard may be in two sources whose records have different keys.
        let (name, keys) = (crate::tokens::hash_bytes(name), shards::index::hash(&shard.reading.keys));
        Some(self.config.index_dir.as_ref()?.join(format!("{:016x}.idx", name ^ keys.rotate_left(1))))
    }

    fn kept_index(&self, shard: &Shard) -> Option<Index> {
        /// As large as the index of a hundred million records.
        const LONGEST: u64 = 1 << 31;
        let (stored, index) = Index::read_from(&self.index_file(shard)?, &shard.name, LONGEST)?;
        (stored == shard.state() && index.is_of(&shard.reading.keys)).then_some(index)
    }

    fn keep_index(&self, shard: &Shard, index: &Index) {
        if let (Some(path), Some(folder)) = (self.index_file(shard), &self.config.index_dir) {
            // It only saves time: a run does not fail because there is no room for it.
            let _ = std::fs::create_dir_all(folder).map(|()| index.write_to(&path, shard.state()));
        }
    }

    fn lock_pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_broken(&self) -> MutexGuard<'_, Learnt> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stands for a shard of which nothing is known: one record that has everything, so that drawing it tells the reason.
fn failed() -> Index {
    let mut index = Index::new(Form::Lines);
    index.push(u64::MAX, 0, Need::ALL.iter().map(|need| need.flag()).sum());
    index
}

pub(crate) fn is_failed(index: &Index) -> bool {
    index.span(0).is_some_and(|(offset, _)| offset == u64::MAX)
}

fn absolute(path: &Path) -> Result<PathBuf, DataError> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    std::path::absolute(path).map_err(|source| DataError::Io { path: path.to_owned(), source })
}

/// Whether an entry names just this file: that it is not there is a mistake in the list, not one in the data.
fn shards_named(sources: &[SourceConfig], path: &Path) -> bool {
    sources.iter().flat_map(|source| &source.files).any(|file| Location::parse(file).as_file() == Some(path))
}
