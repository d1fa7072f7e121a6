//! `shards.json`: what a folder of shards was made from and how, which shards are finished, and what was left out. While a
//! conversion is at work, the shards that it finishes are lines of a journal beside it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::write::write_file;
use crate::annotations::Report;
use crate::error::{DataError, Place};
use crate::json::{Context, io_error};

/// Name of the file in the folder of shards.
pub const MANIFEST: &str = "shards.json";
/// Name of the journal: a [`Shard`] a line.
pub(super) const JOURNAL: &str = ".shards.jsonl";
/// Changes when shards of the same settings would come out otherwise.
const VERSION: u32 = 2;

/// A file that shards are made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// Its path as given.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// When it was changed last, in nanoseconds since 1970; 0 where the file system does not tell.
    pub modified: u64,
}

/// A finished shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Its number.
    pub number: usize,
    /// Its file in the folder; `None` if none of its records could be used.
    pub file: Option<String>,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its records.
    pub records: u64,
    /// Its captions of whole images.
    pub captions: u64,
    /// Its elements.
    pub elems: u64,
    /// Its questions.
    pub questions: u64,
    /// What was left out while writing it.
    pub skipped: Report,
}

/// What a conversion does, and how far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Of this form.
    version: u32,
    /// The data set's name.
    pub source: String,
    /// All settings that the shards depend on.
    pub settings: Value,
    /// The files that they are made from.
    pub inputs: Vec<Input>,
    /// What was read from the annotations, once that is known: the number of images, and a hash of what is told of each.
    pub read: Option<(u64, u64)>,
    /// Whether all shards are finished.
    pub complete: bool,
    /// The number of shards, once that is known.
    pub total: Option<usize>,
    /// The finished shards, by number.
    pub shards: Vec<Shard>,
    /// What was left out while reading the annotations.
    pub skipped: Report,
}

impl Manifest {
    /// Of a conversion that begins.
    pub(super) fn new(source: &str, settings: Value, files: &[PathBuf]) -> Result<Self, DataError> {
        let input = |path: &PathBuf| {
            let metadata = std::fs::metadata(path).map_err(|source| io_error(path, source))?;
            let modified = metadata.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
            let modified = modified.and_then(|time| u64::try_from(time.as_nanos()).ok()).unwrap_or_default();
            // A folder changes with what is beside its annotations.
            let modified = if metadata.is_dir() { 0 } else { modified };
            let bytes = if metadata.is_dir() { 0 } else { metadata.len() };
            Ok(Input { path: path.clone(), bytes, modified })
        };
        Ok(Self {
            version: VERSION,
            source: source.to_owned(),
            settings,
            inputs: files.iter().map(input).collect::<Result<_, DataError>>()?,
            read: None,
            complete: false,
            total: None,
            shards: Vec::new(),
            skipped: Report::default(),
        })
    }

    /// Whether shards made with this and with `other` would be the same.
    pub(super) fn same_work(&self, other: &Self) -> Result<(), (&'static str, String)> {
        let differs = |field, mine: String, theirs: String| if mine == theirs { Ok(()) } else { Err((field, theirs)) };
        differs("version", self.version.to_string(), other.version.to_string())?;
        differs("source", self.source.clone(), other.source.clone())?;
        differs("settings", self.settings.to_string(), other.settings.to_string())?;
        differs("inputs", format!("{:?}", self.inputs), format!("{:?}", other.inputs))
    }

    /// Reads the manifest of a folder, and the journal of a conversion that is not finished; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`], [`DataError::Json`] if it is not of this form.
    pub fn read(folder: &Path) -> Result<Option<Self>, DataError> {
        let path = folder.join(MANIFEST);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io_error(&path, source)),
        };
        let mut manifest: Self = serde_json::from_slice(&bytes).map_err(|source| DataError::Json {
            path: path.clone(),
            place: Place::Whole,
            source,
        })?;
        if manifest.version > VERSION {
            let context = Context { path: &path, place: Place::Whole };
            return Err(context.error("version", format!("at most {VERSION}"), manifest.version.to_string()));
        }
        if !manifest.complete {
            manifest.add_journal(folder)?;
        }
        Ok(Some(manifest))
    }

    /// Adds the shards of the journal, if there is one. A line that a crash has cut is none.
    fn add_journal(&mut self, folder: &Path) -> Result<(), DataError> {
        let path = folder.join(JOURNAL);
        let journal = match std::fs::read(&path) {
            Ok(journal) => journal,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(io_error(&path, source)),
        };
        let noted = journal.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice::<Shard>(line).ok());
        let mut shards: BTreeMap<usize, Shard> = self.shards.drain(..).map(|shard| (shard.number, shard)).collect();
        shards.extend(noted.map(|shard| (shard.number, shard)));
        self.shards.extend(shards.into_values());
        Ok(())
    }

    pub(super) fn write(&self, folder: &Path) -> Result<(), DataError> {
        let path = folder.join(MANIFEST);
        let json = serde_json::to_vec_pretty(self).map_err(|error| io_error(&path, error.into()))?;
        write_file(&path, &json)
    }

    /// Records of all finished shards.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.shards.iter().map(|shard| shard.records).sum()
    }

    /// What was left out in all, reading and writing.
    #[must_use]
    pub fn left_out(&self) -> Report {
        let mut all = self.skipped.clone();
        self.shards.iter().for_each(|shard| all.merge(&shard.skipped));
        all
    }
}

/// The journal while it is written.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// An empty one, in place of the last.
    pub(super) fn create(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(JOURNAL);
        let file = File::create(&path).map_err(|source| io_error(&path, source))?;
        Ok(Self { path, file })
    }

    /// Notes a shard that is finished; then the disk has the note.
    pub(super) fn add(&mut self, shard: &Shard) -> Result<(), DataError> {
        let write = |file: &mut File| {
            let mut line = serde_json::to_vec(shard)?;
            line.push(b'\n');
            file.write_all(&line)?;
            file.sync_data()
        };
        write(&mut self.file).map_err(|source| io_error(&self.path, source))
    }
}
