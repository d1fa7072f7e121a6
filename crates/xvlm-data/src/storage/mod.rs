//! Where shards lie: files, and objects in S3, Google Cloud Storage, Azure or on a web server (feature `remote`).

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{DataError, Place};
use crate::shards::ShardLimits;

pub(crate) mod atomic;
pub(crate) mod codec;
mod list;
#[cfg(feature = "remote")]
mod remote;
pub(crate) mod spool;

pub use list::expand;
pub(crate) use list::shown;

/// How storage is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageOptions {
    /// Settings of object stores by their names in `object_store`, such as `aws_endpoint` or `google_service_account`;
    /// they go before those of the environment (`AWS_ENDPOINT`, …).
    pub settings: Vec<(String, String)>,
    /// How often a request that fails, or a transfer that breaks off, is taken up again; one of which nothing comes for
    /// `timeout` times two more than this is given up anyway. Default 5.
    pub retries: u32,
    /// How long a server may be silent, and half of how long a shard that could not be opened is left alone. Default 30
    /// seconds.
    pub timeout: Duration,
}

impl Default for StorageOptions {
    fn default() -> Self {
        Self { settings: Vec::new(), retries: 5, timeout: Duration::from_secs(30) }
    }
}

/// A shard's place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Location {
    /// A file.
    File(PathBuf),
    /// An object: `s3://bucket/key`, `gs://`, `az://` or `http(s)://`.
    Url(String),
}

impl Location {
    /// A URL of a known scheme, or else a file.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        const SCHEMES: [&str; 11] = ["s3", "s3a", "gs", "az", "abfs", "abfss", "azure", "adl", "http", "https", "hdfs"];
        match text.split_once("://") {
            Some((scheme, _)) if SCHEMES.contains(&scheme) => Self::Url(text.to_owned()),
            Some(("file", path)) => Self::File(PathBuf::from(path)),
            _ => Self::File(PathBuf::from(text)),
        }
    }

    /// The file or the URL, for messages; without what may be a signature after `?`.
    #[must_use]
    pub fn name(&self) -> Arc<Path> {
        match self {
            Self::File(path) => path.as_path().into(),
            Self::Url(url) => Path::new(shown(url)).into(),
        }
    }

    /// The file, if it is one.
    #[must_use]
    pub fn as_file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Url(_) => None,
        }
    }
}

/// Fetches an object into `file`, up to `limits.max_spool_bytes`.
#[cfg(feature = "remote")]
pub(crate) fn fetch(url: &str, options: &StorageOptions, file: &File, limits: &ShardLimits) -> Result<(), DataError> {
    remote::fetch(url, options, file, limits)
}

/// What feature `remote` would do.
#[cfg(not(feature = "remote"))]
pub(crate) fn fetch(url: &str, _: &StorageOptions, _: &File, _: &ShardLimits) -> Result<(), DataError> {
    Err(needs_feature(url))
}

#[cfg(not(feature = "remote"))]
fn needs_feature(url: &str) -> DataError {
    let expected = "a program built with object storage (cargo build --features remote)";
    failure(Path::new(shown(url)), expected, "one without".to_owned())
}

pub(crate) fn failure(path: &Path, expected: &str, found: String) -> DataError {
    DataError::Shard { path: path.to_owned(), place: Place::Whole, expected: expected.to_owned(), found }
}

/// Fills `buffer` from a place in the file, whichever thread reads it elsewhere at the same time.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset);
    #[cfg(windows)]
    {
        let (mut buffer, mut offset) = (buffer, offset);
        while !buffer.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => {
                    buffer = &mut buffer[read..];
                    offset += read as u64;
                }
            }
        }
        Ok(())
    }
}

/// A reader of a file from its start that leaves alone where others read it.
pub(crate) struct FileReader<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
}

impl<'a> FileReader<'a> {
    pub(crate) fn new(file: &'a File, end: u64) -> Self {
        Self { file, offset: 0, end }
    }

    pub(crate) fn file(&self) -> &'a File {
        self.file
    }

    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    pub(crate) fn seek(&mut self, offset: u64) {
        self.offset = offset;
    }
}

impl io::Read for FileReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_sub(self.offset);
        let count = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        read_at(self.file, &mut buffer[..count], self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}
