//! Where the records of a shard are: 13 bytes a record, in memory and in the `.idx` file beside a shard.
//!
//! The file: `XVLMIDX1`, the length of a JSON header as `u32`, the header, then for all records their offsets as `u64`,
//! their lengths as `u32` and their flags as a byte each, and the CRC-32 of all before it. Numbers are little-endian.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Form;
use crate::broken::Tally;
use crate::error::{DataError, Place};
use crate::json::io_error;
use crate::records::RecordKeys;
use crate::storage::{atomic, read_at};

const MAGIC: &[u8; 8] = b"XVLMIDX1";
/// Bytes of one record.
const RECORD: u64 = 8 + 4 + 1;
/// Longest header; it has a few reasons and examples of broken records, and the lines that are no records.
const LONGEST_HEADER: u64 = 1 << 26;
/// How much of a shard's start and end its fingerprint is of.
const ENDS: u64 = 4096;

/// What a batch needs of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Need {
    /// A text of the whole image.
    Captions,
    /// Boxes with texts.
    Elems,
    /// Questions with answers.
    Questions,
}

impl Need {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Captions, Self::Elems, Self::Questions];

    pub(crate) fn flag(self) -> u8 {
        1 << self as u8
    }

    /// What tells apart what is drawn for it; 2 is that of the ways of classing in [`crate::batch`].
    pub(crate) fn stream(self) -> u64 {
        match self {
            Self::Captions => 0,
            Self::Elems => 1,
            Self::Questions => 3,
        }
    }
}

/// Where the records of a shard are and what they have.
#[derive(Debug, Clone)]
pub struct Index {
    pub(crate) form: Form,
    /// What the keys hash to under which its records were looked for.
    keys: u64,
    /// Bytes of the content the offsets are of.
    length: u64,
    offsets: Vec<u64>,
    lengths: Vec<u32>,
    flags: Vec<u8>,
    counts: [u32; 3],
    /// `(n, m)`: before record `n` there are `m` lines that are no records; sorted.
    skipped: Vec<(u32, u64)>,
    pub(crate) broken: Tally,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    form: Form,
    /// What the keys hash to under which records were looked for: under others they have other things.
    keys: u64,
    /// Bytes of the shard as it lies, and what its ends hash to.
    stored: u64,
    ends: u32,
    /// Bytes of the content the offsets are of: more than `stored` if the shard is compressed.
    length: u64,
    records: u64,
    skipped: Vec<(u32, u64)>,
    reasons: BTreeMap<String, u64>,
    examples: Vec<(Place, String)>,
}

impl Index {
    pub(crate) fn new(form: Form) -> Self {
        Self {
            form,
            keys: hash(&RecordKeys::default()),
            length: 0,
            offsets: Vec::new(),
            lengths: Vec::new(),
            flags: Vec::new(),
            counts: [0; 3],
            skipped: Vec::new(),
            broken: Tally::default(),
        }
    }

    /// Notes under which keys its records were looked for.
    pub(super) fn set_keys(&mut self, keys: &RecordKeys) {
        self.keys = hash(keys);
    }

    /// Whether it was made with these keys.
    pub(crate) fn is_of(&self, keys: &RecordKeys) -> bool {
        self.keys == hash(keys)
    }

    /// Number of records.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    /// Whether there is no record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// How many records have what is needed.
    #[must_use]
    pub fn count(&self, need: Need) -> u32 {
        self.counts[need as usize]
    }

    /// Records that are not in the index because they are broken.
    #[must_use]
    pub fn broken(&self) -> &Tally {
        &self.broken
    }

    pub(crate) fn has(&self, record: usize, need: Need) -> bool {
        self.flags[record] & need.flag() != 0
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    pub(crate) fn span(&self, record: usize) -> Option<(u64, u32)> {
        Some((*self.offsets.get(record)?, *self.lengths.get(record)?))
    }

    /// The line a record is on, counted from 1.
    pub(crate) fn line(&self, record: usize) -> usize {
        let before = self.skipped.partition_point(|&(at, _)| at as usize <= record);
        let skipped = before.checked_sub(1).map_or(0, |i| self.skipped[i].1);
        usize::try_from(skipped).unwrap_or(usize::MAX).saturating_add(record + 1)
    }

    /// Appends a record; false if there are already as many as 32 bits can count.
    pub(crate) fn push(&mut self, offset: u64, length: u32, flags: u8) -> bool {
        if self.offsets.len() >= u32::MAX as usize {
            return false;
        }
        self.offsets.push(offset);
        self.lengths.push(length);
        self.flags.push(flags);
        for need in Need::ALL {
            self.counts[need as usize] += u32::from(flags & need.flag() != 0);
        }
        true
    }

    /// Counts a line that is no record.
    pub(crate) fn skip_line(&mut self) {
        let at = self.offsets.len() as u32;
        match self.skipped.last_mut() {
            Some((last, skipped)) if *last == at => *skipped += 1,
            last => {
                let skipped = last.map_or(0, |(_, skipped)| *skipped);
                self.skipped.push((at, skipped + 1));
            }
        }
    }

    pub(crate) fn finish(mut self, length: u64) -> Self {
        self.length = length;
        self.offsets.shrink_to_fit();
        self.lengths.shrink_to_fit();
        self.flags.shrink_to_fit();
        self
    }

    /// The index file of a shard.
    #[must_use]
    pub fn path_of(shard: &Path) -> PathBuf {
        let mut name = shard.as_os_str().to_owned();
        name.push(".idx");
        PathBuf::from(name)
    }

    /// Writes the index file of a shard, at once or not at all.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`].
    pub fn write(&self, shard: &Path) -> Result<(), DataError> {
        let stored = File::open(shard).and_then(|file| Ok((file.metadata()?.len(), fingerprint(&file)?)));
        let stored = stored.map_err(|source| io_error(shard, source))?;
        self.write_to(&Self::path_of(shard), stored)
    }

    /// Writes an index file; `stored` are the bytes of the shard as it lies and what its ends hash to.
    pub(crate) fn write_to(&self, path: &Path, (stored, ends): (u64, u32)) -> Result<(), DataError> {
        let (reasons, examples) = self.broken.parts();
        let header = Header {
            form: self.form,
            keys: self.keys,
            stored,
            ends,
            length: self.length,
            records: self.offsets.len() as u64,
            skipped: self.skipped.clone(),
            reasons,
            examples,
        };
        let write = || {
            let header = serde_json::to_vec(&header)?;
            let file = atomic::beside(path)?;
            let mut out = Checked { out: std::io::BufWriter::new(file.as_file()), crc: flate2::Crc::new() };
            out.write_all(MAGIC)?;
            out.write_all(&(header.len() as u32).to_le_bytes())?;
            out.write_all(&header)?;
            self.offsets.iter().try_for_each(|offset| out.write_all(&offset.to_le_bytes()))?;
            self.lengths.iter().try_for_each(|length| out.write_all(&length.to_le_bytes()))?;
            out.write_all(&self.flags)?;
            let sum = out.crc.sum();
            out.out.write_all(&sum.to_le_bytes())?;
            out.out.flush()?;
            drop(out);
            atomic::keep(file, path)
        };
        write().map_err(|source| io_error(path, source))
    }

    /// The index file of a shard whose records have these keys, if there is one that fits; what does not is as none.
    #[must_use]
    pub fn read(shard: &Path, keys: &RecordKeys) -> Option<Self> {
        let stored = std::fs::metadata(shard).ok()?.len();
        // A record has some bytes in its shard, but not more than it says there are.
        let longest = LONGEST_HEADER + stored.saturating_mul(1 << 10);
        let ((stored, ends), index) = Self::read_from(&Self::path_of(shard), shard, longest)?;
        let file = File::open(shard).ok()?;
        let fits = file.metadata().ok()?.len() == stored && fingerprint(&file).ok()? == ends;
        (fits && index.is_of(keys)).then_some(index)
    }

    /// Reads an index file of at most so many bytes: what [`Self::write_to`] was given of the shard, and the index.
    pub(crate) fn read_from(path: &Path, shard: &Path, longest: u64) -> Option<((u64, u32), Self)> {
        let mut file = File::open(path).ok()?;
        let length = file.metadata().ok().filter(std::fs::Metadata::is_file)?.len();
        if length > longest {
            return None;
        }
        let mut bytes = Vec::with_capacity(usize::try_from(length).ok()?);
        file.read_to_end(&mut bytes).ok()?;
        let (header, index) = Self::parse(&bytes, &shard.into())?;
        Some(((header.stored, header.ends), index))
    }

    fn parse(bytes: &[u8], name: &Arc<Path>) -> Option<(Header, Self)> {
        let (content, sum) = bytes.split_last_chunk::<4>()?;
        let mut crc = flate2::Crc::new();
        crc.update(content);
        if crc.sum() != u32::from_le_bytes(*sum) {
            return None;
        }
        let (length, rest) = content.strip_prefix(MAGIC)?.split_first_chunk::<4>()?;
        let (header, arrays) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        let header: Header = serde_json::from_slice(header).ok()?;
        if header.records.checked_mul(RECORD)? != arrays.len() as u64 {
            return None;
        }
        let count = usize::try_from(header.records).ok()?;
        let (offsets, rest) = arrays.split_at(8 * count);
        let (lengths, flags) = rest.split_at(4 * count);
        let (offsets, _) = offsets.as_chunks::<8>();
        let (lengths, _) = lengths.as_chunks::<4>();
        let mut index = Self { keys: header.keys, ..Self::new(header.form) };
        let mut end = 0;
        for ((offset, length), &flags) in offsets.iter().zip(lengths).zip(flags) {
            let (offset, length) = (u64::from_le_bytes(*offset), u32::from_le_bytes(*length));
            if offset < end {
                return None;
            }
            end = offset.checked_add(u64::from(length)).filter(|&end| end <= header.length)?;
            if !index.push(offset, length, flags) {
                return None;
            }
        }
        if !header.skipped.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1) {
            return None;
        }
        index.skipped.clone_from(&header.skipped);
        index.broken = Tally::from_parts(name, header.reasons.clone(), header.examples.clone());
        let length = header.length;
        Some((header, index.finish(length)))
    }
}

/// What keys hash to.
pub(crate) fn hash(keys: &RecordKeys) -> u64 {
    let RecordKeys { image_key, is_image_rpath, .. } = keys;
    crate::tokens::hash_bytes(format!("{image_key:?} {is_image_rpath:?} {:?}", keys.caption()).as_bytes())
}

/// What the first and last bytes of a file hash to.
pub(super) fn fingerprint(file: &File) -> std::io::Result<u32> {
    let length = file.metadata()?.len();
    let mut crc = flate2::Crc::new();
    for start in [0, length.saturating_sub(ENDS)] {
        let mut part = vec![0; ENDS.min(length) as usize];
        read_at(file, &mut part, start)?;
        crc.update(&part);
    }
    Ok(crc.sum())
}

struct Checked<W> {
    out: W,
    crc: flate2::Crc,
}

impl<W: Write> Write for Checked<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.crc.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
