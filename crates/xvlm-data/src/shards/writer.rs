//! Writing shards.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::index::Index;
use super::{Form, lines};
use crate::error::DataError;
use crate::json::{folder, io_error};
use crate::records::{ImageSource, Record};
use crate::storage::atomic;

/// Writes records into a shard and its index file. The two appear when it is finished; dropped before, nothing is left.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    out: RecordWriter<BufWriter<NamedTempFile>>,
}

impl ShardWriter {
    /// A shard at `path`. Images that are files below `path`'s folder are written as relative paths, others as whole ones.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`].
    pub fn create(path: &Path, form: Form) -> Result<Self, DataError> {
        let io = |source| io_error(path, source);
        let absolute = std::path::absolute(path).map_err(io)?;
        let file = BufWriter::with_capacity(1 << 18, atomic::beside(path).map_err(io)?);
        Ok(Self { path: path.to_owned(), out: RecordWriter::new(file, form, folder(&absolute)) })
    }

    /// Appends a record. In an archive its key is its number.
    ///
    /// # Errors
    ///
    /// [`DataError::Field`] about a record that cannot be written; [`DataError::Io`].
    pub fn write(&mut self, record: &Record) -> Result<(), DataError> {
        let key = format!("{:09}", self.out.index.len());
        self.out.write(&key, record).map_err(|error| error.at(&self.path))
    }

    /// Records written so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.out.index.len()
    }

    /// Whether no record was written so far.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes written so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.out.offset
    }

    /// Gives the shard its name and writes its index beside it.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`].
    pub fn finish(self) -> Result<Index, DataError> {
        let io = |source| io_error(&self.path, source);
        let (out, index) = self.out.finish().map_err(io)?;
        let file = out.into_inner().map_err(|error| io(error.into_error()))?;
        atomic::keep(file, &self.path).map_err(io)?;
        index.write(&self.path)?;
        Ok(index)
    }
}

/// What writing a record leads to.
pub(super) enum WriteError {
    Io(io::Error),
    Record(Box<DataError>),
}

impl WriteError {
    pub(super) fn at(self, path: &Path) -> DataError {
        match self {
            Self::Io(source) => io_error(path, source),
            Self::Record(error) => *error,
        }
    }
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<DataError> for WriteError {
    fn from(error: DataError) -> Self {
        Self::Record(Box::new(error))
    }
}

/// Writes records anywhere, and notes where they are.
#[derive(Debug)]
pub(super) struct RecordWriter<W> {
    out: W,
    form: Form,
    /// Paths below it are written relative to it.
    root: PathBuf,
    pub(super) offset: u64,
    pub(super) index: Index,
}

impl<W: Write> RecordWriter<W> {
    pub(super) fn new(out: W, form: Form, root: PathBuf) -> Self {
        Self { out, form, root, offset: 0, index: Index::new(form) }
    }

    pub(super) fn write(&mut self, key: &str, record: &Record) -> Result<(), WriteError> {
        let start = self.offset;
        match self.form {
            Form::Lines => {
                let mut line = serde_json::to_vec(&record.to_json(&self.root)?).map_err(io::Error::from)?;
                line.push(b'\n');
                self.out.write_all(&line)?;
                self.offset += line.len() as u64;
            }
            Form::Tar => {
                let mut object = record.texts_to_json();
                match &record.image {
                    ImageSource::Bytes(bytes) => self.member(&format!("{key}.{}", extension(bytes)), bytes)?,
                    ImageSource::Path(path) => {
                        object.insert("image_rpath".into(), record.path_to_json(path, &self.root)?);
                    }
                }
                let object = serde_json::to_vec(&object).map_err(io::Error::from)?;
                self.member(&format!("{key}.json"), &object)?;
            }
        }
        let length = u32::try_from(self.offset - start);
        let fits = length.is_ok_and(|length| self.index.push(start, length, lines::flags_of(record)));
        if fits { Ok(()) } else { Err(io::Error::other("a shard has at most 2^32 records of 2^32 bytes each").into()) }
    }

    fn member(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_path(name)?;
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        let padding = content.len().next_multiple_of(512) - content.len();
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(content)?;
        self.out.write_all(&[0; 512][..padding])?;
        self.offset += (512 + content.len() + padding) as u64;
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<(W, Index)> {
        if self.form == Form::Tar {
            self.out.write_all(&[0; 1024])?;
            self.offset += 1024;
        }
        self.out.flush()?;
        Ok((self.out, self.index.finish(self.offset)))
    }
}

/// What the name of an image file ends with.
fn extension(image: &[u8]) -> &'static str {
    match image {
        [0x89, b'P', b'N', b'G', ..] => "png",
        [b'G', b'I', b'F', ..] => "gif",
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "webp",
        _ => "jpg",
    }
}
