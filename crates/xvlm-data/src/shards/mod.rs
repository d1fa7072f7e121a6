//! Shards: files of many records, of which any is read by its place.
//!
//! A shard that can be sought in is a file of JSON lines or a WebDataset tar archive. What is compressed, a Parquet table
//! or elsewhere than on this machine becomes one of the two in a temporary file. Its [`Index`] says where the records are.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Place};
use crate::json::io_error;
use crate::records::{Reading, Record, parse_line};
use crate::storage::codec::{decoder, is_compressed};
use crate::storage::spool::{self, Copied, copy, temporary};
use crate::storage::{self, FileReader, Location, StorageOptions, failure, read_at};

mod archive;
pub(crate) mod index;
mod lines;
mod pages;
mod table;
mod writer;

pub use index::{Index, Need};
pub(crate) use lines::flags_of;
pub use writer::ShardWriter;

/// How the records of a shard are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A JSON object a line.
    Lines,
    /// WebDataset: an image and a caption or a JSON object for each key.
    Tar,
}

/// Is told what is no record.
pub(crate) type Found<'a> = dyn FnMut(&mut Index, DataError) + 'a;

/// Bounds on what files may make a reader do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShardLimits {
    /// Most bytes of a record; a longer one is broken. Default 128 MiB.
    pub max_record_bytes: u32,
    /// Most bytes of a shard that is fetched or unpacked; a larger one cannot be read. Default 64 GiB.
    pub max_spool_bytes: u64,
    /// Where shards are fetched and unpacked to. Default: the system's folder for temporary files.
    pub spool_dir: Option<PathBuf>,
}

impl Default for ShardLimits {
    fn default() -> Self {
        Self { max_record_bytes: 128 << 20, max_spool_bytes: 64 << 30, spool_dir: None }
    }
}

/// A shard of a source.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) location: Location,
    pub(crate) name: Arc<Path>,
    pub(crate) reading: Arc<Reading>,
}

/// A shard that can be read from.
#[derive(Debug)]
pub(crate) struct OpenShard {
    file: File,
    pub(crate) index: Arc<Index>,
    reading: Arc<Reading>,
    /// Whether the keys of the archive are rows of a table.
    rows: bool,
    /// Whether it lies in a temporary file.
    pub(crate) is_spooled: bool,
}

impl OpenShard {
    pub(crate) fn is_table(&self) -> bool {
        self.rows
    }
}

/// What a shard's first bytes and its name say it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Compressed,
    Table,
    Form(Form),
}

/// Bytes of a file's start that tell what it is: a tar header.
const START: usize = 512;

impl Kind {
    fn of(start: &[u8], name: &Path) -> Self {
        // Where the first header of an archive is damaged, its name still tells.
        let named = |end: &str| {
            let name = name.to_string_lossy().to_ascii_lowercase();
            name.ends_with(end) || [".gz", ".zst"].iter().any(|packed| name.ends_with(&format!("{end}{packed}")))
        };
        if is_compressed(start) {
            Self::Compressed
        } else if start.starts_with(b"PAR1") || named(".parquet") {
            Self::Table
        } else if start.get(257..262) == Some(b"ustar") || named(".tar") {
            Self::Form(Form::Tar)
        } else {
            Self::Form(Form::Lines)
        }
    }
}

/// Opens a file. A pipe would have to be waited for and has no end, and a folder has no content.
fn open_file(path: &Path) -> Result<File, DataError> {
    let io = |source| io_error(path, source);
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(failure(path, "a file", "something else".to_owned()));
    }
    File::open(path).map_err(io)
}

/// The first bytes of a file and its length.
fn start_of(file: &File) -> std::io::Result<(Vec<u8>, u64)> {
    let length = file.metadata()?.len();
    let mut start = vec![0; START.min(usize::try_from(length).unwrap_or(START))];
    read_at(file, &mut start, 0)?;
    Ok((start, length))
}

impl Shard {
    pub(crate) fn new(location: Location, reading: Arc<Reading>) -> Self {
        Self { name: location.name(), location, reading }
    }

    /// Whether it can be sought in as it lies.
    pub(crate) fn is_seekable(&self) -> bool {
        let Some(path) = self.location.as_file() else { return false };
        let start = open_file(path).ok().and_then(|file| start_of(&file).ok());
        // What cannot be opened costs nothing to open.
        start.is_none_or(|(start, _)| matches!(Kind::of(&start, path), Kind::Form(_)))
    }

    /// What an index file beside the shard says.
    pub(crate) fn indexed(&self) -> Option<Index> {
        self.location.as_file().and_then(|path| Index::read(path, &self.reading.keys))
    }

    /// The length of a file and what its ends hash to; of an object that would have to be asked for.
    pub(crate) fn state(&self) -> (u64, u32) {
        let state = |path| {
            let file = open_file(path).ok()?;
            Some((file.metadata().ok()?.len(), index::fingerprint(&file).ok()?))
        };
        self.location.as_file().and_then(state).unwrap_or_default()
    }

    /// Makes the shard readable. `known` is its index, if it was open before.
    ///
    /// # Errors
    ///
    /// If it cannot be read, is damaged as a whole, or is not what it was before.
    pub(crate) fn open(
        &self,
        known: Option<&Arc<Index>>,
        storage: &StorageOptions,
        limits: &ShardLimits,
    ) -> Result<OpenShard, DataError> {
        let (must_fit, known) = match known {
            Some(known) => (true, Some(Arc::clone(known))),
            None => (false, self.indexed().map(Arc::new)),
        };
        let found = &mut |index: &mut Index, error| index.broken.add(1, error, None);
        self.open_with(known, must_fit, storage, limits, found)
    }

    /// [`Self::open`] that looks at every record again and tells each that is broken.
    pub(crate) fn open_telling(
        &self,
        storage: &StorageOptions,
        limits: &ShardLimits,
        found: &mut Found<'_>,
    ) -> Result<OpenShard, DataError> {
        self.open_with(None, false, storage, limits, found)
    }

    fn open_with(
        &self,
        known: Option<Arc<Index>>,
        must_fit: bool,
        storage: &StorageOptions,
        limits: &ShardLimits,
        found: &mut Found<'_>,
    ) -> Result<OpenShard, DataError> {
        let io = |source| io_error(&self.name, source);
        let no_room = |source| spool::failed(limits.spool_dir.as_deref(), source);
        let spool = || temporary(limits.spool_dir.as_deref()).map_err(no_room);
        let (mut file, mut is_spooled) = match &self.location {
            Location::File(path) => (open_file(path)?, false),
            Location::Url(url) => {
                let file = spool()?;
                storage::fetch(url, storage, &file, limits)?;
                (file, true)
            }
        };
        let (mut start, mut length) = start_of(&file).map_err(io)?;
        let mut cut = None;
        if Kind::of(&start, &self.name) == Kind::Compressed {
            let unpacked = spool()?;
            let reader = BufReader::with_capacity(1 << 16, FileReader::new(&file, length));
            match copy(&mut decoder(&start, reader), &unpacked, limits.max_spool_bytes).map_err(no_room)? {
                Copied::Whole => {}
                Copied::Cut(error) => cut = Some(failure(&self.name, "a whole compressed file", error.to_string())),
                Copied::TooMuch => return Err(self.too_large(limits)),
            }
            (file, is_spooled) = (unpacked, true);
            (start, length) = start_of(&file).map_err(io)?;
        }
        let kind = match Kind::of(&start, &self.name) {
            Kind::Compressed => {
                return Err(failure(&self.name, "a file that is compressed once", "one compressed again".to_owned()));
            }
            kind => kind,
        };
        let (form, rows) = match kind {
            Kind::Form(form) => (form, false),
            _ => (Form::Tar, true),
        };
        let mut index = None;
        if rows {
            let archive = spool()?;
            let mut made = table::to_archive(file, &archive, self, limits, found)?;
            made.set_keys(&self.reading.keys);
            (file, is_spooled, length) = (archive, true, made.length());
            index = Some(Arc::new(made));
        }
        if let Some(known) = known {
            if known.form == form && known.length() == length {
                index = Some(known);
            } else if must_fit {
                let expected = format!("{} bytes, as when it was indexed", known.length());
                return Err(failure(&self.name, &expected, length.to_string()));
            }
        }
        let index = match index {
            Some(index) => index,
            None => {
                let scan = if form == Form::Tar { archive::scan } else { lines::scan };
                let mut index = scan(&file, length, &self.name, &self.reading, limits.max_record_bytes, found)?;
                if let Some(cut) = cut {
                    found(&mut index, cut);
                }
                index.set_keys(&self.reading.keys);
                Arc::new(index)
            }
        };
        let reading = if rows {
            // The archive has the standard keys, whatever the table has.
            Arc::new(Reading { root: self.reading.root.clone(), ..Reading::default() })
        } else {
            Arc::clone(&self.reading)
        };
        Ok(OpenShard { file, index, reading, rows, is_spooled })
    }

    fn too_large(&self, limits: &ShardLimits) -> DataError {
        failure(&self.name, &format!("at most {} bytes when unpacked", limits.max_spool_bytes), "more".to_owned())
    }

    /// Reads a record by its number in the index.
    pub(crate) fn read(&self, open: &OpenShard, record: usize) -> Result<Record, DataError> {
        let Some((offset, length)) = open.index.span(record) else {
            return Err(failure(&self.name, &format!("{} records", open.index.len()), format!("record {record}")));
        };
        let mut bytes = vec![0; length as usize];
        read_at(&open.file, &mut bytes, offset).map_err(|source| io_error(&self.name, source))?;
        match open.index.form {
            Form::Lines => parse_line(&bytes, &self.name, open.index.line(record), &open.reading),
            Form::Tar => archive::read(&bytes, &self.name, &open.reading, open.rows),
        }
    }
}

/// Reads a shard's records one after the other: all of it once, in its order. Broken ones are told too.
///
/// # Errors
///
/// What `each` returns; errors of the shard as a whole are told as those of a record.
pub(crate) fn visit<E>(
    shard: &Shard,
    storage: &StorageOptions,
    limits: &ShardLimits,
    mut each: impl FnMut(Result<Record, DataError>) -> Result<(), E>,
) -> Result<(), E> {
    let mut stopped = None;
    let open = shard.open_telling(storage, limits, &mut |_, error| {
        if stopped.is_none() {
            stopped = each(Err(error)).err();
        }
    });
    if let Some(stopped) = stopped {
        return Err(stopped);
    }
    match open {
        Ok(open) => (0..open.index.len()).try_for_each(|record| each(shard.read(&open, record))),
        Err(error) => each(Err(error)),
    }
}

/// Makes the index of a shard, which [`Index::write`] puts beside it.
///
/// # Errors
///
/// If the shard cannot be read, or is a table or elsewhere: those have no place that an index could tell.
pub fn index_shard(path: &Path, keys: &crate::records::RecordKeys, limits: &ShardLimits) -> Result<Index, DataError> {
    let reading = Reading { keys: keys.clone(), root: Some(crate::json::folder(path)) };
    let shard = Shard::new(Location::File(path.to_owned()), Arc::new(reading));
    let mut broken = |index: &mut Index, error| index.broken.add(1, error, None);
    let open = shard.open_telling(&StorageOptions::default(), limits, &mut broken)?;
    if open.rows {
        let (place, expected) = (Place::Whole, "JSON lines or a tar archive".to_owned());
        return Err(DataError::Shard { path: path.to_owned(), place, expected, found: "a table".to_owned() });
    }
    Ok(Arc::unwrap_or_clone(open.index))
}
