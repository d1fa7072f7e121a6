//! Files of tensors and their digests, written and read a tensor at a time: no file is held in memory as a whole.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var, WithDType};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest as _, Sha256};

use crate::error::TrainError;
use crate::optimizer::Weights;

/// What is written at once.
const CHUNK: usize = 1 << 20;

/// What is read at once where only the digest is wanted.
const READ: usize = 1 << 16;

/// Longest header that is read, as in the safetensors library.
const MAX_HEADER: u64 = 100_000_000;

/// What tells a file from one that was damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Digest {
    /// Length.
    pub(crate) bytes: u64,
    /// 64 lower-case digits.
    pub(crate) sha256: String,
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes with SHA-256 {}", self.bytes, self.sha256)
    }
}

impl Digest {
    /// Of all there is to read.
    pub(crate) fn of(mut from: impl Read) -> io::Result<Self> {
        let (mut digested, mut chunk) = (Digested::new(io::sink()), vec![0; READ]);
        loop {
            match from.read(&mut chunk)? {
                0 => return Ok(digested.digest()),
                read => digested.write_all(&chunk[..read])?,
            }
        }
    }
}

/// Passes on what is written, and digests it.
struct Digested<W> {
    inner: W,
    bytes: u64,
    hash: Sha256,
}

impl<W> Digested<W> {
    fn new(inner: W) -> Self {
        Self { inner, bytes: 0, hash: Sha256::new() }
    }

    fn digest(self) -> Digest {
        let sha256 = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Digest { bytes: self.bytes, sha256 }
    }
}

impl<W: Write> Write for Digested<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a new file, and returns when the disk has it.
pub(crate) fn write_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<Digest> {
    let mut out = BufWriter::with_capacity(CHUNK, Digested::new(File::create(path)?));
    write(&mut out)?;
    let digested = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    digested.inner.sync_all()?;
    Ok(digested.digest())
}

/// What is written under a name.
pub(crate) enum Numbers<'a> {
    Tensor(&'a Tensor),
    Weights(Weights<'a>),
}

impl Numbers<'_> {
    /// A tensor of the same shape, of `i64` where the numbers are, and of floats where they are.
    fn like(&self) -> &Tensor {
        match self {
            Self::Tensor(tensor) => tensor,
            Self::Weights(weights) => weights.like(),
        }
    }
}

/// Writes a new safetensors file: integers as `i64`, all else as `f32`.
pub(crate) fn write_tensors(path: &Path, mut tensors: Vec<(String, Numbers)>) -> io::Result<Digest> {
    // The order of the safetensors library: wide types first, so that all are aligned.
    let is_float = |numbers: &Numbers| numbers.like().dtype() != DType::I64;
    tensors.sort_by(|(left_name, left), (right_name, right)| {
        is_float(left).cmp(&is_float(right)).then_with(|| left_name.cmp(right_name))
    });
    let mut end = 0;
    let infos = tensors.iter().map(|(name, tensor)| {
        let (start, dtype) = (end, if is_float(tensor) { Dtype::F32 } else { Dtype::I64 });
        let like = tensor.like();
        end += like.elem_count() * dtype.bitsize() / 8;
        (name.clone(), TensorInfo { dtype, shape: like.dims().to_vec(), data_offsets: (start, end) })
    });
    let infos = infos.collect();
    // Readers of the original ecosystem refuse a file that does not say which framework's layout it has.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut header = serde_json::to_vec(&Metadata::new(Some(format), infos).map_err(io::Error::other)?)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    write_file(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        tensors.iter().try_for_each(|(_, tensor)| match is_float(tensor) {
            true => write_numbers(tensor, DType::F32, f32::to_le_bytes, out),
            false => write_numbers(tensor, DType::I64, i64::to_le_bytes, out),
        })
    })
}

fn write_numbers<T: WithDType, const N: usize>(
    numbers: &Numbers,
    dtype: DType,
    to_bytes: impl Fn(T) -> [u8; N],
    out: &mut dyn Write,
) -> io::Result<()> {
    let tensor = match numbers {
        Numbers::Tensor(tensor) => Ok((*tensor).clone()),
        Numbers::Weights(weights) => weights.tensor(),
    };
    let numbers = tensor.and_then(|tensor| tensor.to_dtype(dtype)?.flatten_all()?.to_vec1::<T>());
    let mut bytes = Vec::with_capacity(CHUNK);
    for numbers in numbers.map_err(io::Error::other)?.chunks(CHUNK / N) {
        bytes.clear();
        numbers.iter().for_each(|&number| bytes.extend_from_slice(&to_bytes(number)));
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// A safetensors file that is known to be whole.
pub(crate) struct TensorFile {
    path: PathBuf,
    file: File,
    /// Where the data begin.
    data: u64,
    metadata: Metadata,
}

impl TensorFile {
    /// Reads its header.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be read, [`TrainError::Damaged`] if it is no safetensors file.
    pub(crate) fn open(path: PathBuf) -> Result<Self, TrainError> {
        let damaged = |found: String| {
            let (path, expected) = (path.clone(), "safetensors".to_owned());
            TrainError::Damaged { path, expected, found }
        };
        let read = || {
            let (mut file, mut length) = (File::open(&path)?, [0; 8]);
            file.read_exact(&mut length)?;
            let mut header = Vec::new();
            let length = u64::from_le_bytes(length).min(MAX_HEADER);
            (&mut file).take(length).read_to_end(&mut header)?;
            Ok((file, 8 + length, header))
        };
        let (file, data, header) = read().map_err(TrainError::io(&path))?;
        let metadata = serde_json::from_slice(&header).map_err(|error| damaged(error.to_string()))?;
        Ok(Self { path, file, data, metadata })
    }

    /// Number of tensors.
    pub(crate) fn len(&self) -> usize {
        self.metadata.tensors().len()
    }

    /// Whether it has a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// Names of the tensors in the order of the file.
    pub(crate) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// An `f32` tensor of any shape on the host.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) fn tensor(&mut self, name: &str) -> Result<Tensor, TrainError> {
        let shape = self.metadata.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        self.get(name, DType::F32, &shape, &Device::Cpu)
    }

    /// A tensor that must be of this type and shape.
    ///
    /// # Errors
    /// [`TrainError::Mismatch`] if it is not, or not there.
    pub(crate) fn get(
        &mut self,
        name: &str,
        dtype: DType,
        shape: &[usize],
        device: &Device,
    ) -> Result<Tensor, TrainError> {
        let stored = if dtype == DType::I64 { Dtype::I64 } else { Dtype::F32 };
        let (start, end) = match self.metadata.info(name) {
            Some(info) if info.dtype == stored && info.shape == shape => info.data_offsets,
            other => {
                let found = other.map_or_else(|| "none".into(), |info| format!("{} {:?}", info.dtype, info.shape));
                return Err(self.mismatch(name, format!("{stored} {shape:?}"), found));
            }
        };
        let mut bytes = vec![0; end - start];
        self.file.seek(SeekFrom::Start(self.data + start as u64)).map_err(TrainError::io(&self.path))?;
        self.file.read_exact(&mut bytes).map_err(TrainError::io(&self.path))?;
        Tensor::from_raw_buffer(&bytes, dtype, shape, device).map_err(TrainError::tensor(name))
    }

    /// Gives a variable its value.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) fn restore(&mut self, name: &str, variable: &Var) -> Result<(), TrainError> {
        let value = self.get(name, DType::F32, variable.dims(), variable.device())?;
        let narrow = value.to_dtype(variable.dtype()).and_then(|value| variable.set(&value));
        narrow.map_err(TrainError::tensor(name))
    }

    fn mismatch(&self, tensor: &str, expected: String, found: String) -> TrainError {
        TrainError::Mismatch { path: self.path.clone(), tensor: tensor.to_owned(), expected, found }
    }
}
