//! Content that cannot be sought in, laid into temporary files that are gone when they are dropped.

use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::Path;

use crate::error::DataError;

/// A nameless temporary file.
pub(crate) fn temporary(folder: Option<&Path>) -> io::Result<File> {
    match folder {
        Some(folder) => tempfile::tempfile_in(folder),
        None => tempfile::tempfile(),
    }
}

/// What became of a temporary file in this folder.
pub(crate) fn failed(folder: Option<&Path>, source: io::Error) -> DataError {
    DataError::Spool { folder: folder.map_or_else(std::env::temp_dir, Path::to_path_buf), source }
}

/// How copying ended.
pub(crate) enum Copied {
    /// All of it.
    Whole,
    /// The content broke off, with what the reader said.
    Cut(io::Error),
    /// There is more than the limit.
    TooMuch,
}

/// Copies up to `limit` bytes. A damaged source leaves what could be read of it.
///
/// # Errors
///
/// What writing led to, such as a full disk.
pub(crate) fn copy(from: &mut dyn Read, to: &File, limit: u64) -> io::Result<Copied> {
    let mut out = BufWriter::with_capacity(1 << 18, to);
    let mut buffer = vec![0; 1 << 16];
    let mut written = 0;
    let end = loop {
        match from.read(&mut buffer) {
            Ok(0) => break Copied::Whole,
            Ok(read) => {
                written += read as u64;
                if written > limit {
                    break Copied::TooMuch;
                }
                out.write_all(&buffer[..read])?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => break Copied::Cut(error),
        }
    };
    out.flush()?;
    Ok(end)
}
