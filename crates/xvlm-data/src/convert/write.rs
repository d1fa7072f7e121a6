//! Writing shards: aside, onto the disk, then renamed.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use base64::Engine;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::{Compression, Form};
use crate::error::DataError;
use crate::json::io_error;
use crate::records::Element;

/// The fields of a record in a shard, in the order they are written.
#[derive(Debug, Default, Serialize)]
pub(super) struct Fields<'a> {
    pub(super) id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) image_rpath: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) binary: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) caption: Vec<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) elems: Vec<ElementFields>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) questions: Vec<QuestionFields>,
}

/// A box with its texts, as a record of a shard has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ElementFields {
    pub(super) bb: [f32; 4],
    pub(super) caption: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) attributes: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) label: Vec<String>,
}

/// A question with its answer, as a record of a shard has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct QuestionFields {
    pub(super) question: String,
    pub(super) answer: String,
}

impl From<Element> for ElementFields {
    fn from(element: Element) -> Self {
        let Element { bbox, texts, attributes, labels } = element;
        Self { bb: bbox, caption: texts, attributes, label: labels }
    }
}

/// A shard that is being written, beside where it will be.
pub(super) struct ShardWriter {
    out: Out,
    records: u64,
}

enum Out {
    Jsonl(BufWriter<NamedTempFile>),
    Tar(tar::Builder<BufWriter<NamedTempFile>>),
}

impl ShardWriter {
    pub(super) fn new(folder: &Path, form: Form) -> Result<Self, DataError> {
        let file = aside(folder)?;
        let file = BufWriter::with_capacity(1 << 20, file);
        let out = match form {
            Form::JsonPaths | Form::JsonImages => Out::Jsonl(file),
            Form::Tar => Out::Tar(tar::Builder::new(file)),
        };
        Ok(Self { out, records: 0 })
    }

    /// Adds a record; `image` is the content of its file and what that file's name ends in.
    pub(super) fn add(&mut self, key: &str, fields: &Fields<'_>, image: Option<(&[u8], &str)>) -> io::Result<()> {
        self.records += 1;
        match &mut self.out {
            Out::Jsonl(out) => {
                serde_json::to_writer(&mut *out, fields)?;
                out.write_all(b"\n")
            }
            Out::Tar(out) => {
                if let Some((bytes, extension)) = image {
                    entry(out, &format!("{key}.{extension}"), bytes)?;
                }
                entry(out, &format!("{key}.json"), &serde_json::to_vec(fields)?)
            }
        }
    }

    /// Puts the shard where it belongs, and returns its length.
    pub(super) fn finish(self, path: &Path, compression: Compression) -> Result<u64, DataError> {
        let io = |source| io_error(path, source);
        let buffered = match self.out {
            Out::Jsonl(out) => out,
            Out::Tar(out) => out.into_inner().map_err(io)?,
        };
        let mut plain = buffered.into_inner().map_err(|error| io(error.into_error()))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let done = match compression {
            Compression::None => plain,
            _ => {
                plain.seek(SeekFrom::Start(0)).map_err(io)?;
                let mut packed = aside(folder)?;
                compress(plain.as_file_mut(), packed.as_file_mut(), compression).map_err(io)?;
                packed
            }
        };
        let bytes = done.as_file().metadata().map_err(io)?.len();
        place(done, path)?;
        Ok(bytes)
    }
}

fn entry(out: &mut tar::Builder<BufWriter<NamedTempFile>>, name: &str, bytes: &[u8]) -> io::Result<()> {
    // Nothing of the moment or the machine: the same input gives the same bytes.
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    out.append_data(&mut header, name, bytes)
}

fn compress(from: &mut File, to: &mut File, compression: Compression) -> io::Result<()> {
    let mut to = BufWriter::with_capacity(1 << 20, to);
    match compression {
        Compression::None => io::copy(from, &mut to).map(|_| ())?,
        Compression::Gzip => {
            // The header's time is left 0.
            let mut gzip = flate2::write::GzEncoder::new(&mut to, flate2::Compression::default());
            io::copy(from, &mut gzip)?;
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

/// How names of unfinished files begin.
pub(super) const ASIDE: &str = ".unfinished-";

fn aside(folder: &Path) -> Result<NamedTempFile, DataError> {
    tempfile::Builder::new().prefix(ASIDE).tempfile_in(folder).map_err(|source| io_error(folder, source))
}

/// Onto the disk, then to its place.
fn place(file: NamedTempFile, path: &Path) -> Result<(), DataError> {
    let io = |source| io_error(path, source);
    file.as_file().sync_all().map_err(io)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are for their owner only; shards are files like any other.
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(io)?;
    }
    file.persist(path).map_err(|error| io(error.error))?;
    #[cfg(unix)]
    if let Some(folder) = path.parent() {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;
    }
    Ok(())
}

/// Writes a file wholly, or not at all.
pub(super) fn write_file(path: &Path, content: &[u8]) -> Result<(), DataError> {
    let mut file = aside(path.parent().unwrap_or(Path::new(".")))?;
    file.write_all(content).map_err(|source| io_error(path, source))?;
    place(file, path)
}

/// Standard base64.
pub(super) fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
