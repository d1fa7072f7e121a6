//! Data sets: the shards of one or several sources, from which records are read by their place.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::broken::Tally;
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
    broken: Mutex<Tally>,
}

/// Shards that are one stream of records.
#[derive(Debug)]
pub(crate) struct Source {
    /// Its share among the sources; 1 if there is only one.
    pub(crate) weight: f64,
    /// The parts of each entry of its list of files.
    pub(crate) entries: Vec<std::ops::Range<usize>>,
}

impl Source {
    pub(crate) fn parts(&self) -> impl Iterator<Item = usize> + '_ {
        self.entries.iter().flat_map(Clone::clone)
    }
}

/// A shard, or records in memory.
#[derive(Debug)]
struct Part {
    content: Content,
    /// Whether it can be sought in as it lies.
    seekable: bool,
    /// Learnt when it is opened first, and kept.
    index: OnceLock<Arc<Index>>,
    /// Held while it is opened; when it could not be last, and why.
    opening: Mutex<Option<(Instant, String)>>,
}

#[derive(Debug)]
enum Content {
    Memory(Vec<Arc<Record>>),
    Stored(Shard),
}

impl Part {
    fn new(content: Content, seekable: bool) -> Self {
        Self { content, seekable, index: OnceLock::new(), opening: Mutex::default() }
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
            let mut entries = Vec::new();
            for entry in &source.files {
                let start = shards.len();
                for location in expand(entry, storage)? {
                    let root = match (&source.image_root, location.as_file()) {
                        (Some(root), _) => Some(absolute(root)?),
                        (None, Some(path)) => Some(absolute(&crate::json::folder(path))?),
                        (None, None) => None,
                    };
                    let reading = Reading { keys: source.keys.clone(), root };
                    shards.push((location, reading));
                }
                entries.push(start..shards.len());
            }
            match (source.weight, streams.last_mut()) {
                // Sources without weights are one.
                (None, Some(only)) => only.entries.extend(entries),
                (weight, _) => streams.push(Source { weight: weight.unwrap_or(1.0), entries }),
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
        };
        dataset.look_through()?;
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
            sources: vec![Source { weight: 1.0, entries: std::iter::once(0..1).collect() }],
            config: DatasetConfig::default(),
            storage: StorageOptions::default(),
            pool: Mutex::new(Pool::new(0)),
            broken: Mutex::default(),
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
        let readable = self.parts.iter().filter_map(|part| part.index.get()).map(|index| index.len() as u64);
        // As many records as a shard has that could be read are missing with one that could not.
        let others = (self.parts.len() - failures.len()).max(1) as u64;
        let missing = (readable.sum::<u64>().saturating_sub(failures.len() as u64) / others).max(1);
        let mut failures = failures.into_iter();
        if all_failed && let Some(first) = failures.next() {
            return Err(first);
        }
        for error in failures {
            self.lock_broken().add(missing, error, None);
        }
        Ok(())
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

    /// Records found so far, whatever they have, but for broken ones.
    #[must_use]
    pub fn found(&self) -> u64 {
        self.parts.iter().filter_map(|part| part.index.get()).map(|index| index.len() as u64).sum()
    }

    /// What was found to be broken when shards were looked through. Records of which only a part is wrong, such as a box
    /// or the image, are found to be broken when they are read.
    #[must_use]
    pub fn broken(&self) -> Tally {
        self.lock_broken().clone()
    }

    /// Refuses a data set of which too much was found to be broken so far.
    ///
    /// # Errors
    ///
    /// [`DataError::TooManyBroken`].
    pub fn check_broken(&self, limit: f64) -> Result<(), DataError> {
        let broken = self.lock_broken();
        let all = self.found().saturating_add(broken.total());
        if broken.total() as f64 > limit * all as f64 {
            return Err(DataError::too_many_broken(broken.total(), all, limit, broken.examples()));
        }
        Ok(())
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
    /// If a shard cannot be read or an index not be written.
    pub fn write_indices(&self) -> Result<Vec<PathBuf>, DataError> {
        let mut written = Vec::new();
        for (i, part) in self.parts.iter().enumerate() {
            let Content::Stored(shard) = &part.content else { continue };
            let Some(path) = shard.location.as_file() else { continue };
            let open = self.opened(i, shard)?;
            if !open.is_table() {
                open.index.write(path)?;
                written.push(Index::path_of(path));
            }
        }
        Ok(written)
    }

    pub(crate) fn is_seekable(&self, part: usize) -> bool {
        self.parts[part].seekable
    }

    /// Shards of which a window of these is made.
    pub(crate) fn window(&self, parts: &[usize]) -> usize {
        let all = parts.iter().all(|&part| self.is_seekable(part));
        self.config.window.unwrap_or(if all { parts.len() } else { WINDOW }).max(1)
    }

    pub(crate) fn known_count(&self, part: usize, need: Need) -> Option<u64> {
        self.parts[part].index.get().map(|index| u64::from(index.count(need)))
    }

    /// The index of a part, for which it is opened if need be. One that cannot be opened counts as one record, which is
    /// broken.
    pub(crate) fn index_or_failed(&self, part: usize) -> Arc<Index> {
        self.index(part).unwrap_or_else(|error| self.index_of_failed(part, error))
    }

    fn index_of_failed(&self, part: usize, error: DataError) -> Arc<Index> {
        let known = self.parts[part].index.get().map(Arc::clone);
        known.unwrap_or_else(|| {
            self.lock_broken().add(1, error, None);
            self.learn(part, Arc::new(failed()))
        })
    }

    /// The index of a part, and the open shard if it lies in a temporary file: it does as long as somebody has it.
    pub(crate) fn hold(&self, part: usize) -> (Arc<Index>, Option<Arc<OpenShard>>) {
        match &self.parts[part].content {
            Content::Stored(shard) if !self.parts[part].seekable => match self.opened(part, shard) {
                Ok(open) => (self.learn(part, Arc::clone(&open.index)), Some(open)),
                Err(error) => (self.index_of_failed(part, error), None),
            },
            _ => (self.index_or_failed(part), None),
        }
    }

    fn index(&self, part: usize) -> Result<Arc<Index>, DataError> {
        if let Some(index) = self.parts[part].index.get() {
            return Ok(Arc::clone(index));
        }
        let Content::Stored(shard) = &self.parts[part].content else {
            return Ok(self.learn(part, Arc::new(Index::new(Form::Lines))));
        };
        match self.opened(part, shard) {
            Ok(open) => Ok(Arc::clone(&open.index)),
            Err(error) if self.parts[part].seekable => {
                // Looked at once, at the start.
                self.learn(part, Arc::new(failed()));
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    fn learn(&self, part: usize, index: Arc<Index>) -> Arc<Index> {
        let mut first = false;
        let kept = self.parts[part].index.get_or_init(|| {
            first = true;
            index
        });
        if first {
            self.lock_broken().merge(kept.broken());
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

    fn opened(&self, part: usize, shard: &Shard) -> Result<Arc<OpenShard>, DataError> {
        /// How long a shard that could not be opened is left alone.
        const AGAIN: Duration = Duration::from_secs(60);
        if let Some(open) = self.lock_pool().get(part) {
            return Ok(open);
        }
        let mut failure = self.parts[part].opening.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have been at it.
        if let Some(open) = self.lock_pool().get(part) {
            return Ok(open);
        }
        let place = crate::error::Place::Whole;
        if let Some((_, reason)) = failure.as_ref().filter(|(when, _)| when.elapsed() < AGAIN) {
            return Err(DataError::Indexed { path: shard.name.to_path_buf(), place, reason: reason.clone() });
        }
        let known = self.parts[part].index.get().filter(|index| !is_failed(index));
        match shard.open(known, &self.storage, &self.config.limits) {
            Ok(open) => {
                let open = Arc::new(open);
                *failure = None;
                if known.is_none() && open.is_spooled {
                    self.keep_index(shard, &open.index);
                }
                self.learn(part, Arc::clone(&open.index));
                self.lock_pool().put(part, Arc::clone(&open));
                Ok(open)
            }
            Err(error) => {
                let (text, name) = (error.to_string(), shard.name.display().to_string());
                let reason = text.strip_prefix(&name).map_or(text.as_str(), |rest| rest.trim_start_matches([':', ' ']));
                *failure = Some((Instant::now(), reason.to_owned()));
                Err(error)
            }
        }
    }

    /// The file in which the index of a shard is kept that has none beside it.
    fn index_file(&self, shard: &Shard) -> Option<PathBuf> {
        let name = match &shard.location {
            Location::File(path) => path.as_os_str().as_encoded_bytes(),
            Location::Url(url) => url.as_bytes(),
        };
        Some(self.config.index_dir.as_ref()?.join(format!("{:016x}.idx", crate::tokens::hash_bytes(name))))
    }

    fn kept_index(&self, shard: &Shard) -> Option<Index> {
        /// As large as the index of a hundred million records.
        const LONGEST: u64 = 1 << 31;
        let (stored, index) = Index::read_from(&self.index_file(shard)?, &shard.name, LONGEST)?;
        (stored == shard.state()).then_some(index)
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

    fn lock_broken(&self) -> MutexGuard<'_, Tally> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stands for a shard of which nothing is known: one record that has everything, so that drawing it tells the reason.
fn failed() -> Index {
    let mut index = Index::new(Form::Lines);
    index.push(u64::MAX, 0, Need::ALL.iter().map(|need| need.flag()).sum());
    index
}

fn is_failed(index: &Index) -> bool {
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
