//! Files as streams: lines, and where the items of an image lie.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{DataError, Place, excerpt};
use crate::json::{Context, io_error};
use crate::storage::{codec, spool};
use crate::tokens::hash_bytes;

/// Opens a file; one that gzip or zstd has compressed is unpacked into a temporary file, so that it can be read at any place.
pub(crate) fn open_plain(path: &Path) -> Result<File, DataError> {
    let io = |source| io_error(path, source);
    let mut file = File::open(path).map_err(io)?;
    let mut magic = Vec::new();
    (&mut file).take(4).read_to_end(&mut magic).map_err(io)?;
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    if !codec::is_compressed(&magic) {
        return Ok(file);
    }
    let mut plain = spool::temporary(None).map_err(io)?;
    std::io::copy(&mut codec::decoder(&magic, BufReader::new(file)), &mut plain).map_err(io)?;
    plain.seek(SeekFrom::Start(0)).map_err(io)?;
    Ok(plain)
}

/// How what a file holds begins: its first bytes (some 60) from the first that is no white space.
pub(crate) fn head(path: &Path) -> Result<Vec<u8>, DataError> {
    const ENOUGH: u64 = 60;
    let read = || {
        let mut file = BufReader::new(File::open(path)?);
        let magic = file.fill_buf()?.iter().take(4).copied().collect::<Vec<_>>();
        if codec::is_compressed(&magic) { begin(BufReader::new(codec::decoder(&magic, file))) } else { begin(file) }
    };
    fn begin(mut reader: impl BufRead) -> io::Result<Vec<u8>> {
        const BOM: [u8; 3] = [0xef, 0xbb, 0xbf];
        let mut start = Vec::new();
        (&mut reader).take(BOM.len() as u64).read_to_end(&mut start)?;
        start = start.strip_prefix(&BOM).unwrap_or(&start).trim_ascii_start().to_vec();
        while start.is_empty() {
            let chunk = reader.fill_buf()?;
            if chunk.is_empty() {
                return Ok(start);
            }
            let blank = chunk.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let done = blank < chunk.len();
            reader.consume(blank);
            if done {
                break;
            }
        }
        reader.take(ENOUGH).read_to_end(&mut start)?;
        Ok(start)
    }
    read().map_err(|source| io_error(path, source))
}

/// Lines of a file, one at a time, without their ends.
pub(crate) struct Lines<R> {
    reader: R,
    path: PathBuf,
    bytes: Vec<u8>,
    number: usize,
    next: u64,
}

/// One line.
pub(crate) struct Line<'a> {
    /// Its number, from 1.
    pub(crate) number: usize,
    /// Its first byte in the file.
    pub(crate) offset: u64,
    /// Its length with its end.
    pub(crate) length: u64,
    /// What it holds, without its end.
    pub(crate) bytes: &'a [u8],
}

impl Line<'_> {
    /// The line as text.
    pub(crate) fn text(&self, path: &Path) -> Result<&str, DataError> {
        std::str::from_utf8(self.bytes).map_err(|_| {
            let context = Context { path, place: Place::Line(self.number) };
            context.error("line", "UTF-8", excerpt(&String::from_utf8_lossy(self.bytes)))
        })
    }
}

impl Lines<BufReader<File>> {
    /// # Errors
    /// [`DataError::Io`].
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        let reader = BufReader::with_capacity(1 << 18, open_plain(path)?);
        Ok(Self { reader, path: path.to_owned(), bytes: Vec::new(), number: 0, next: 0 })
    }
}

impl<R: BufRead> Lines<R> {
    /// Longer than any line of a published file.
    const LONGEST: u64 = 1 << 24;

    /// The next line; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Line<'_>>, DataError> {
        self.bytes.clear();
        let mut limited = (&mut self.reader).take(Self::LONGEST);
        let read = limited.read_until(b'\n', &mut self.bytes).map_err(|source| io_error(&self.path, source))?;
        if read == 0 {
            return Ok(None);
        }
        let (offset, length) = (self.next, read as u64);
        self.next += length;
        self.number += 1;
        if length == Self::LONGEST {
            let context = Context { path: &self.path, place: Place::Line(self.number) };
            return Err(context.error("line", "at most 16 MiB", "a longer one"));
        }
        while matches!(self.bytes.last(), Some(b'\n' | b'\r')) {
            self.bytes.pop();
        }
        Ok(Some(Line { number: self.number, offset, length, bytes: &self.bytes }))
    }
}

/// What [`Extents`] knows an image by.
pub(crate) fn image_key(id: &str) -> u64 {
    hash_bytes(id.as_bytes())
}

/// A run of bytes that tells about one image.
#[derive(Debug, Clone, Copy)]
struct Extent {
    /// Hash of the image's identifier.
    key: u64,
    offset: u64,
    length: u32,
    /// Number of the item, or of its first line.
    number: u32,
}

/// Where in a file the items of each image lie: some bytes an image in memory, the rest is read when it is wanted.
pub(crate) struct Extents {
    pub(crate) path: PathBuf,
    file: File,
    extents: Vec<Extent>,
}

/// A run of bytes read back.
pub(crate) struct Chunk {
    /// Number of the item, or of its first line.
    pub(crate) number: usize,
    /// The bytes.
    pub(crate) bytes: Vec<u8>,
}

impl Extents {
    pub(crate) fn new(path: &Path, file: File) -> Self {
        Self { path: path.to_owned(), file, extents: Vec::new() }
    }

    /// Notes where a line about an image lies; the line after one about the same image makes that run longer.
    pub(crate) fn add_line(&mut self, id: &str, line: &Line<'_>) -> Result<(), DataError> {
        let key = image_key(id);
        if let Some(last) = self.extents.last_mut().filter(|last| last.key == key) {
            let end = last.offset + u64::from(last.length);
            let longer = u32::try_from(line.offset + line.length - last.offset);
            if let (true, Ok(longer)) = (end == line.offset, longer) {
                last.length = longer;
                return Ok(());
            }
        }
        self.add(id, line.offset, line.length, line.number)
    }

    /// Notes where an item about an image lies.
    pub(crate) fn add(&mut self, id: &str, offset: u64, length: u64, number: usize) -> Result<(), DataError> {
        let key = image_key(id);
        let fits = (u32::try_from(length), u32::try_from(number));
        let (Ok(length), Ok(number)) = fits else {
            let context = Context { path: &self.path, place: Place::Whole };
            return Err(context.error(format!("item {number}"), "at most 4 GiB and 4 billion items", "more"));
        };
        self.extents.push(Extent { key, offset, length, number });
        Ok(())
    }

    /// Done with adding: returns the hashes of the images in their order in the file, each once.
    pub(crate) fn order(&mut self) -> Vec<u64> {
        let mut seen = std::collections::HashSet::new();
        let order = self.extents.iter().map(|extent| extent.key).filter(|&key| seen.insert(key)).collect();
        self.extents.sort_by_key(|extent| (extent.key, extent.offset));
        order
    }

    /// What the file has about an image, in the file's order.
    pub(crate) fn read(&mut self, key: u64) -> Result<Vec<Chunk>, DataError> {
        let start = self.extents.partition_point(|extent| extent.key < key);
        let mut chunks = Vec::new();
        for extent in self.extents[start..].iter().take_while(|extent| extent.key == key) {
            let mut bytes = vec![0; extent.length as usize];
            self.file
                .seek(SeekFrom::Start(extent.offset))
                .and_then(|_| self.file.read_exact(&mut bytes))
                .map_err(|source| io_error(&self.path, source))?;
            chunks.push(Chunk { number: extent.number as usize, bytes });
        }
        Ok(chunks)
    }
}
