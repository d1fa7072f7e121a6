//! Numbers in files, and views of them.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use flate2::Crc;
use flate2::read::DeflateDecoder;

/// Deflate makes at most this many bytes of one.
pub(super) const MOST_INFLATION: u64 = 1032;

/// Bytes in a file.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    /// The file.
    pub(super) path: Arc<Path>,
    /// Where in the file it begins.
    pub(super) start: u64,
    /// Bytes, after inflating.
    pub(super) len: u64,
    /// Bytes in the file, if they are deflated.
    pub(super) deflated: Option<u64>,
    /// The checksum, if it is known.
    pub(super) crc: Option<u32>,
}

/// A tensor's place in its storage, counted in numbers.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    offset: usize,
    shape: Vec<usize>,
    /// 0 where the dimension is 1: it does not matter, and cannot overflow.
    strides: Vec<usize>,
    /// How many numbers.
    count: usize,
    /// From the first number to behind the last.
    extent: usize,
}

impl Storage {
    /// Bytes of a file as they are.
    pub(super) fn plain(path: &Arc<Path>, start: u64, len: u64) -> Self {
        Self { path: Arc::clone(path), start, len, deflated: None, crc: None }
    }

    /// Its bytes, from the first on.
    pub(super) fn open(&self) -> io::Result<Box<dyn Read>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.start))?;
        Ok(match self.deflated {
            None => Box::new(BufReader::new(file).take(self.len)),
            Some(len) => Box::new(BufReader::new(DeflateDecoder::new(file.take(len))).take(self.len)),
        })
    }

    /// Some of its bytes. If they are all of them, they are held against the checksum.
    pub(super) fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if self.deflated.is_some() {
            let mut all = self.open()?;
            io::copy(&mut all.by_ref().take(from), &mut io::sink())?;
            // Memory grows with what is there, not with what is claimed.
            all.take(len as u64).read_to_end(&mut bytes)?;
        } else {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.start + from))?;
            bytes.reserve_exact(len);
            file.take(len as u64).read_to_end(&mut bytes)?;
        }
        if bytes.len() < len {
            let found = format!("expected {len} bytes of numbers, found the end after {}", bytes.len());
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, found));
        }
        if let Some(expected) = self.crc.filter(|_| len as u64 == self.len) {
            let mut crc = Crc::new();
            crc.update(&bytes);
            if crc.sum() != expected {
                let found = format!("expected numbers of checksum {expected:08x}, found {:08x}", crc.sum());
                return Err(io::Error::new(io::ErrorKind::InvalidData, found));
            }
        }
        Ok(bytes)
    }
}

impl Layout {
    /// None if it is so large that its size is no number, or has not one stride a dimension.
    pub(super) fn new(offset: usize, shape: Vec<usize>, mut strides: Vec<usize>) -> Option<Self> {
        if shape.len() != strides.len() {
            return None;
        }
        let count = shape.iter().try_fold(1usize, |count, len| count.checked_mul(*len))?;
        let mut extent = usize::from(count > 0);
        for (len, stride) in shape.iter().zip(&mut strides) {
            if count == 0 || *len == 1 {
                *stride = 0;
            }
            extent = len.saturating_sub(1).checked_mul(*stride).and_then(|reach| extent.checked_add(reach))?;
        }
        offset.checked_add(extent)?;
        Some(Self { offset, shape, strides, count, extent })
    }

    /// All numbers of a storage, in their order.
    pub(super) fn contiguous(shape: Vec<usize>) -> Option<Self> {
        let mut strides = vec![1usize; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis].checked_mul(shape[axis].max(1))?;
        }
        Self::new(0, shape, strides)
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// How many numbers a storage must have.
    pub(super) fn reach(&self) -> usize {
        self.offset + self.extent
    }

    /// The bytes of the numbers in their order, each of `size` bytes.
    ///
    /// What lies between the first and the last number is read as a whole; if they do not lie in their order, they are
    /// put in order in a copy.
    pub(super) fn read(&self, storage: &Storage, size: usize) -> io::Result<Vec<u8>> {
        if self.count == 0 {
            return Ok(Vec::new());
        }
        let bytes = storage.read((self.offset * size) as u64, self.extent * size)?;
        Ok(if self.is_contiguous() { bytes } else { self.gather(&bytes, size) })
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(len, stride)| {
            let fits = *len == 1 || *stride == expected;
            expected *= len;
            fits
        })
    }

    fn gather(&self, bytes: &[u8], size: usize) -> Vec<u8> {
        let mut gathered = Vec::with_capacity(self.count * size);
        let mut index = vec![0; self.shape.len()];
        let mut at = 0;
        for _ in 0..self.count {
            gathered.extend_from_slice(&bytes[at * size..][..size]);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                at += self.strides[axis];
                if index[axis] < self.shape[axis] {
                    break;
                }
                at -= index[axis] * self.strides[axis];
                index[axis] = 0;
            }
        }
        gathered
    }
}
