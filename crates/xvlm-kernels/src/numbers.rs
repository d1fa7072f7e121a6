//! Numbers as files have them.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::KernelError;
use crate::host::written;
use crate::mapped::MappedFile;
use crate::real::Real;
use crate::simd::vectorized;

/// Numbers that a thread converts at a time.
const CHUNK: usize = 1 << 16;

/// Bytes that stay where they are until numbers are made of them.
pub enum StoredBytes {
    /// In a file, which must not be written to: see [`MappedFile`].
    File(MappedFile),
    /// In the program, or in its memory.
    Memory(Cow<'static, [u8]>),
}

impl Deref for StoredBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::File(file) => file,
            Self::Memory(bytes) => bytes,
        }
    }
}

impl fmt::Debug for StoredBytes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::File(file) => file.fmt(f),
            Self::Memory(bytes) => write!(f, "Memory({} bytes)", bytes.len()),
        }
    }
}

impl StoredBytes {
    /// Whether they take no memory that is free once they are not needed any more: those of a mapped file, and of the program.
    pub fn stays_put(&self) -> bool {
        match self {
            Self::File(file) => file.is_mapped(),
            Self::Memory(bytes) => matches!(bytes, Cow::Borrowed(_)),
        }
    }

    /// As [`MappedFile::is_unchanged`]; memory does not change.
    ///
    /// # Errors
    /// As there.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        match self {
            Self::File(file) => file.is_unchanged(),
            Self::Memory(_) => Ok(true),
        }
    }
}

/// A tensor as it lies in a file, in little-endian order. Its bytes are read when numbers are needed; whoever holds it
/// keeps the file open.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    bytes: Arc<StoredBytes>,
    range: Range<usize>,
    dtype: DType,
    shape: Vec<usize>,
}

impl StoredTensor {
    /// Numbers of type `dtype`, at a `range` of bytes.
    ///
    /// # Errors
    /// If there are no such bytes, or not as many as `shape` has numbers.
    pub fn new(bytes: Arc<StoredBytes>, range: Range<usize>, dtype: DType, shape: &[usize]) -> Result<Self> {
        let Some(found) = bytes.get(range.clone()) else {
            bail!("bytes: expected a range of {}, found {range:?}", bytes.len());
        };
        check_len(found, dtype, shape)?;
        Ok(Self { bytes, range, dtype, shape: shape.to_vec() })
    }

    /// Its shape.
    pub fn dims(&self) -> &[usize] {
        &self.shape
    }

    /// What it is stored in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether its numbers can stay where they are, and be read as `dtype` when they are needed: what they lie in takes no memory
    /// ([`StoredBytes::stays_put`]), and they are `f32`, `bf16` or `f16`, to be read as one of the first two.
    pub fn can_stay(&self, dtype: DType) -> bool {
        let is_read = match dtype {
            DType::F32 => f32::reader(self.dtype).is_some(),
            DType::BF16 => bf16::reader(self.dtype).is_some(),
            _ => false,
        };
        is_read && self.bytes.stays_put()
    }

    /// Whether another is of the same file or memory.
    pub fn is_beside(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.bytes, &other.bytes)
    }

    /// All numbers, as [`tensor_of_bytes`] converts them, on a device.
    ///
    /// # Errors
    /// As there, and if the device fails.
    pub fn read(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        tensor_of_bytes(self.bytes(), self.dtype, dtype, self.shape.as_slice())?.to_device(device)
    }

    /// The first numbers, at most as many as said, in `f32`.
    ///
    /// # Errors
    /// As [`tensor_of_bytes`].
    pub fn first(&self, most: usize) -> Result<Vec<f32>> {
        let size = self.dtype.size_in_bytes();
        let count = most.min(self.bytes().len() / size);
        tensor_of_bytes(&self.bytes()[..count * size], self.dtype, DType::F32, count)?.to_vec1()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }

    /// As [`StoredBytes::is_unchanged`].
    ///
    /// # Errors
    /// As there.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        self.bytes.is_unchanged()
    }

    /// Checks that what was read is what the file held when it was opened, as far as [`MappedFile::is_unchanged`] tells.
    ///
    /// # Errors
    /// [`KernelError::Changed`] if it is not, and if the system does not tell.
    pub fn check_unchanged(&self) -> Result<()> {
        match &*self.bytes {
            StoredBytes::File(file) if !file.is_unchanged()? => {
                Err(KernelError::Changed { file: file.path().display().to_string() }.into())
            }
            _ => Ok(()),
        }
    }
}

/// Makes numbers of bytes, number by number.
pub(crate) type Reader<T> = fn(&[u8], &mut [T]);

/// A type that numbers in files are converted to on their way.
pub(crate) trait Readable: Real {
    /// What reads numbers of a type; nothing for types that candle converts.
    fn reader(stored: DType) -> Option<Reader<Self>>;
}

impl Readable for f32 {
    fn reader(stored: DType) -> Option<Reader<Self>> {
        Some(match stored {
            DType::F32 => |bytes, out| numbers(bytes, out, f32::from_le_bytes),
            DType::BF16 => |bytes, out| numbers(bytes, out, |x| bf16::from_le_bytes(x).widen()),
            DType::F16 => from_f16,
            _ => return None,
        })
    }
}

impl Readable for bf16 {
    fn reader(stored: DType) -> Option<Reader<Self>> {
        Some(match stored {
            DType::BF16 => |bytes, out| numbers(bytes, out, bf16::from_le_bytes),
            DType::F32 => |bytes, out| numbers(bytes, out, |x| Real::narrow(f32::from_le_bytes(x))),
            DType::F16 => |bytes, out| {
                let mut wide = vec![0.0; out.len()];
                from_f16(bytes, &mut wide);
                out.iter_mut().zip(wide).for_each(|(out, x)| *out = Real::narrow(x));
            },
            _ => return None,
        })
    }
}

/// A tensor on the CPU of numbers as they lie in a file: `bytes` of type `stored` in little-endian order, to be of type
/// `dtype`. Each number is converted once, from its bytes to its place; where a CPU computes with `f32` or `bf16`, numbers of two
/// and four bytes are rounded once, to the nearest.
///
/// # Errors
/// If `bytes` are not as many as `shape` has numbers of the type, or candle does not convert one type into the other.
pub fn tensor_of_bytes(bytes: &[u8], stored: DType, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    check_len(bytes, stored, shape.dims())?;
    let size = stored.size_in_bytes();
    Ok(match (dtype, f32::reader(stored), bf16::reader(stored)) {
        (DType::F32, Some(read), _) => converted(bytes, size, &shape, read),
        (DType::BF16, _, Some(read)) => converted(bytes, size, &shape, read),
        _ => Tensor::from_raw_buffer(bytes, stored, shape.dims(), &Device::Cpu)?.to_dtype(dtype)?,
    })
}

fn check_len(bytes: &[u8], stored: DType, shape: &[usize]) -> Result<()> {
    let count = shape.iter().try_fold(stored.size_in_bytes(), |count, len| count.checked_mul(*len));
    if count != Some(bytes.len()) {
        bail!("bytes: expected those of shape {shape:?} of {stored:?}, found {}", bytes.len());
    }
    Ok(())
}

fn converted<T: Real>(bytes: &[u8], size: usize, shape: &Shape, read: Reader<T>) -> Tensor {
    written(shape, |out: &mut [T]| {
        out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * size)).for_each(|(out, bytes)| read(bytes, out));
    })
    .detached()
}

/// Number by number.
fn numbers<const N: usize, T>(bytes: &[u8], out: &mut [T], number: impl Fn([u8; N]) -> T) {
    let (bytes, _) = bytes.as_chunks::<N>();
    vectorized(
        #[inline(always)]
        || out.iter_mut().zip(bytes).for_each(|(out, bytes)| *out = number(*bytes)),
    );
}

/// The lines of a matrix from several places, those of one after those of another.
pub(crate) struct Lines<'a, T> {
    parts: Vec<Part<'a, T>>,
    lines: usize,
    k: usize,
}

struct Part<'a, T> {
    /// Lines before it.
    before: usize,
    numbers: Numbers<'a, T>,
}

enum Numbers<'a, T> {
    /// As they are computed with.
    Plain(&'a [T]),
    /// As they lie in a file, with the bytes of a number.
    Stored(&'a [u8], usize, Reader<T>),
}

impl<'a, T: Copy> Lines<'a, T> {
    /// Of numbers in memory, `k` a line.
    pub(crate) fn of_numbers(values: &'a [T], k: usize) -> Self {
        Self { parts: vec![Part { before: 0, numbers: Numbers::Plain(values) }], lines: values.len() / k, k }
    }

    /// Of matrices of as many columns each; none if the numbers of one are converted by candle alone.
    pub(crate) fn of_stored(tensors: &'a [StoredTensor]) -> Option<Self>
    where
        T: Readable,
    {
        let (mut parts, mut lines, mut k) = (Vec::new(), 0, 0);
        for tensor in tensors {
            let (bytes, size) = (tensor.bytes(), tensor.dtype.size_in_bytes());
            // SAFETY: `T` is `f32` or `bf16`, of which every pattern of bits is a number.
            let aligned = unsafe { bytes.align_to::<T>() };
            let numbers = match aligned {
                ([], plain, []) if tensor.dtype == T::DTYPE && cfg!(target_endian = "little") => Numbers::Plain(plain),
                _ => Numbers::Stored(bytes, size, T::reader(tensor.dtype)?),
            };
            parts.push(Part { before: lines, numbers });
            lines += tensor.shape[0];
            k = tensor.shape[1];
        }
        Some(Self { parts, lines, k })
    }

    /// How many lines of how many numbers.
    pub(crate) fn size(&self) -> (usize, usize) {
        (self.lines, self.k)
    }

    /// The part of a line, and the line's number in it.
    fn part(&self, line: usize) -> (&Part<'a, T>, usize) {
        let i = self.parts.partition_point(|part| part.before <= line) - 1;
        (&self.parts[i], line - self.parts[i].before)
    }

    /// Some lines, if they lie in memory one after the other.
    pub(crate) fn plain(&self, lines: Range<usize>) -> Option<&'a [T]> {
        let (part, first) = self.part(lines.start);
        match part.numbers {
            Numbers::Plain(values) => values.get(first * self.k..(first + lines.len()) * self.k),
            Numbers::Stored(..) => None,
        }
    }

    /// Some numbers of a line, from the one `at` on.
    pub(crate) fn read(&self, line: usize, at: usize, out: &mut [T]) {
        let (part, line) = self.part(line);
        let range = line * self.k + at..line * self.k + at + out.len();
        match part.numbers {
            Numbers::Plain(values) => out.copy_from_slice(&values[range]),
            Numbers::Stored(bytes, size, read) => read(&bytes[range.start * size..range.end * size], out),
        }
    }
}

fn from_f16(bytes: &[u8], out: &mut [f32]) {
    /// Numbers that fit the innermost cache beside what they become.
    const PART: usize = 1024;
    let mut part = [f16::ZERO; PART];
    for (out, bytes) in out.chunks_mut(PART).zip(bytes.chunks(2 * PART)) {
        let part = &mut part[..out.len()];
        numbers(bytes, part, f16::from_le_bytes);
        part.convert_to_f32_slice(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_stored_table_are_those_of_the_table() {
        let table = Tensor::randn(0f32, 1.0, (7, 5), &Device::Cpu).unwrap();
        let ids = Tensor::new(&[[6u32, 0], [3, 3]], &Device::Cpu).unwrap();
        for stored in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let table = table.to_dtype(stored).unwrap();
            let mut bytes = vec![0];
            table.write_bytes(&mut bytes).unwrap();
            let range = 1..bytes.len();
            let bytes = Arc::new(StoredBytes::Memory(bytes.into()));
            let held = StoredTensor::new(bytes, range, stored, &[7, 5]).unwrap();
            assert!(format!("{held:?}").contains("Memory(") && !format!("{held:?}").contains("[0, "), "{held:?}");
            for dtype in [DType::F32, DType::BF16] {
                let found = crate::stored_embedding(&held, dtype, &ids).unwrap();
                let wanted = crate::embedding(&table.to_dtype(dtype).unwrap(), &ids, None).unwrap();
                assert_eq!((found.dims(), found.dtype()), (&[2, 2, 5][..], dtype));
                let numbers =
                    |x: Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(numbers(found), numbers(wanted), "{stored:?} {dtype:?}");
            }
            let beyond = Tensor::new(&[7u32], &Device::Cpu).unwrap();
            let error = crate::stored_embedding(&held, DType::F32, &beyond).unwrap_err().to_string();
            assert!(error.contains("below 7") && error.contains("found 7"), "{error}");
        }
    }

    /// What would be in memory twice, or is converted as a whole, can not.
    #[test]
    fn some_numbers_can_stay_where_they_are() {
        let tensor = |bytes: Cow<'static, [u8]>, stored: DType| {
            let (bytes, count) = (Arc::new(StoredBytes::Memory(bytes)), 8 / stored.size_in_bytes());
            StoredTensor::new(bytes, 0..8, stored, &[count]).unwrap()
        };
        let of_program: Cow<'static, [u8]> = Cow::Borrowed(b"8 bytes.");
        let own: Cow<'static, [u8]> = Cow::Owned(of_program.to_vec());
        for stored in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let can = stored != DType::F64 && dtype != DType::F16;
                assert_eq!(tensor(of_program.clone(), stored).can_stay(dtype), can, "{stored:?} as {dtype:?}");
                assert!(!tensor(own.clone(), stored).can_stay(dtype));
            }
        }
        let one = tensor(own.clone(), DType::F32);
        assert!(one.is_beside(&one.clone()) && !one.is_beside(&tensor(own, DType::F32)));
    }

    /// Numbers of every type, at an odd address, as candle converts them.
    #[test]
    fn numbers_are_those_of_candle() {
        let device = Device::Cpu;
        let len = CHUNK + 1029;
        let values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin() * 1.5f32.powi(i as i32 % 23 - 11)).collect();
        let values = Tensor::from_vec(values, len, &device).unwrap();
        for stored in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let tensor = values.to_dtype(stored).unwrap();
            let mut bytes = vec![0];
            tensor.write_bytes(&mut bytes).unwrap();
            for dtype in [DType::F32, DType::BF16] {
                let read = tensor_of_bytes(&bytes[1..], stored, dtype, len).unwrap();
                assert_eq!(read.dtype(), dtype);
                let numbers = |x: Tensor| x.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(numbers(read), numbers(tensor.to_dtype(dtype).unwrap()), "{stored:?} {dtype:?}");
            }
            assert!(tensor_of_bytes(&bytes, stored, DType::F32, len).is_err());
        }
        let none = tensor_of_bytes(&[], DType::F32, DType::F32, (0, 3)).unwrap();
        assert_eq!(none.dims(), [0, 3]);
        let scalar = tensor_of_bytes(&1.5f32.to_le_bytes(), DType::F32, DType::F32, ()).unwrap();
        assert_eq!(scalar.to_scalar::<f32>().unwrap(), 1.5);
    }
}
