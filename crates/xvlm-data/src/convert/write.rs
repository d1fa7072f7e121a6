//! Writing shards: aside, onto the disk, then renamed.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use super::{Compression, Form};
use crate::error::DataError;
use crate::json::io_error;
use crate::records::Record;
use crate::shards::{Index, ShardWriter};
use crate::storage::atomic;

/// How names of unfinished files begin: those of [`atomic`], and shards that are to be compressed.
pub(super) const UNFINISHED: [&str; 2] = [".writing-", PLAIN];
const PLAIN: &str = ".plain-";

/// A shard that is being written, beside where it will be.
pub(super) struct Output {
    path: PathBuf,
    /// Of a compressed shard, the shard as it is before.
    plain: Option<PathBuf>,
    writer: ShardWriter,
    compression: Compression,
}

impl Output {
    pub(super) fn new(folder: &Path, name: &str, form: Form, compression: Compression) -> Result<Self, DataError> {
        let path = folder.join(name);
        let plain = (compression != Compression::None).then(|| folder.join(format!("{PLAIN}{name}")));
        let writer = ShardWriter::create(plain.as_ref().unwrap_or(&path), form.of_shard())?;
        Ok(Self { path, plain, writer, compression })
    }

    pub(super) fn add(&mut self, record: &Record) -> Result<(), DataError> {
        self.writer.write(record)
    }

    /// Puts the shard where it belongs, and returns its length. One that is not compressed gets an index file beside it.
    pub(super) fn finish(self) -> Result<u64, DataError> {
        let io = |source| io_error(&self.path, source);
        self.writer.finish()?;
        if let Some(plain) = &self.plain {
            let packed = atomic::beside(&self.path).map_err(io)?;
            let from = File::open(plain).map_err(|source| io_error(plain, source))?;
            compress(from, packed.as_file(), self.compression).map_err(io)?;
            atomic::keep(packed, &self.path).map_err(io)?;
            for path in [plain.clone(), Index::path_of(plain)] {
                std::fs::remove_file(&path).map_err(|source| io_error(&path, source))?;
            }
        }
        Ok(std::fs::metadata(&self.path).map_err(io)?.len())
    }
}

fn compress(mut from: File, to: &File, compression: Compression) -> io::Result<()> {
    let mut to = BufWriter::with_capacity(1 << 20, to);
    match compression {
        Compression::None => io::copy(&mut from, &mut to).map(|_| ())?,
        Compression::Gzip => {
            // The header's time is left 0: the same input gives the same bytes.
            let mut gzip = flate2::write::GzEncoder::new(&mut to, flate2::Compression::default());
            io::copy(&mut from, &mut gzip)?;
            gzip.finish()?;
        }
        Compression::Zstd => {
            let (mut from, mut to) = (Remember::new(from), Remember::new(&mut to));
            ruzstd::encoding::compress(&mut from, &mut to, ruzstd::encoding::CompressionLevel::Fastest);
            from.outcome()?;
            to.outcome()?;
        }
    }
    to.flush()
}

/// Keeps the first error for later: the Zstandard encoder panics when its input or output fails.
struct Remember<T> {
    inner: T,
    error: Option<io::Error>,
}

impl<T> Remember<T> {
    fn new(inner: T) -> Self {
        Self { inner, error: None }
    }

    fn outcome(self) -> io::Result<()> {
        self.error.map_or(Ok(()), Err)
    }
}

impl<T: Read> Read for Remember<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.inner.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.error.get_or_insert(error);
                    return Ok(0);
                }
                read => return read,
            }
        }
    }
}

impl<T: Write> Write for Remember<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.error.is_none() {
            self.error = self.inner.write_all(bytes).err();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a file wholly, or not at all.
pub(super) fn write_file(path: &Path, content: &[u8]) -> Result<(), DataError> {
    let write = || {
        let mut file = atomic::beside(path)?;
        file.write_all(content)?;
        atomic::keep(file, path)
    };
    write().map_err(|source| io_error(path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes some bytes, then fails as a full disk does.
    struct Full(usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            if taken == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(taken) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_is_an_error_of_the_encoder() {
        let bytes: Vec<u8> = (0..100_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let mut out = Remember::new(Full(1000));
        ruzstd::encoding::compress(bytes.as_slice(), &mut out, ruzstd::encoding::CompressionLevel::Fastest);
        assert_eq!(out.outcome().unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
