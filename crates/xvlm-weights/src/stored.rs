//! Tensors in safetensors files, read when they are asked for.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use xvlm_kernels::{self as kernels, MappedFile, StoredBytes, StoredTensor};

use crate::error::WeightsError;
use crate::tensors::{StoredType, write_safetensors};

/// The dtypes that can be read.
const READABLE: &str = "F32, F16, BF16, F64 or I64";

/// The tensors of a safetensors file, of which names, types and shapes are known. The numbers stay where they are, in a file that
/// is mapped into memory or in the program itself, until [`Self::read`] makes a tensor of them.
///
/// While this lives, the file must be replaced, as all writers of this crate do it, and not written to: see [`MappedFile`].
#[derive(Clone, Debug)]
pub struct StoredTensors {
    name: String,
    tensors: BTreeMap<String, StoredTensor>,
}

impl StoredTensors {
    /// Maps a safetensors file.
    ///
    /// # Errors
    /// [`WeightsError::Io`] if it cannot be read, and as [`Self::from_bytes`].
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let file = MappedFile::open(path).map_err(WeightsError::io(path))?;
        Self::list(&path.display().to_string(), StoredBytes::File(file))
    }

    /// The content of a safetensors file; `name` is what errors call it.
    ///
    /// # Errors
    /// [`WeightsError::Corrupt`] if the bytes are no safetensors, [`WeightsError::Dtype`] if a tensor's type is none that
    /// a weight may have.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self, WeightsError> {
        Self::list(name, StoredBytes::Memory(bytes.into()))
    }

    /// Tensors that are in memory already, as a file of f32 would hold them; errors call it `name`. The numbers are copied.
    ///
    /// # Errors
    /// If a name is reserved, or a tensor cannot be brought to the CPU.
    pub fn of_tensors(name: &str, tensors: &BTreeMap<String, Tensor>) -> Result<Self, WeightsError> {
        let mut bytes = Vec::new();
        write_safetensors(&mut bytes, tensors, StoredType::F32).map_err(WeightsError::io(Path::new(name)))?;
        Self::from_bytes(name, bytes)
    }

    fn list(name: &str, source: StoredBytes) -> Result<Self, WeightsError> {
        let source = Arc::new(source);
        let stored = |(tensor, dtype, shape, range): Listed| {
            let stored = StoredTensor::new(Arc::clone(&source), range, dtype, &shape);
            let stored = stored.map_err(|error| WeightsError::tensor(name, &tensor, error))?;
            Ok((tensor, stored))
        };
        let tensors = list(name, &source)?.into_iter().map(stored).collect::<Result<_, WeightsError>>()?;
        Ok(Self { name: name.to_owned(), tensors })
    }

    /// What errors call it: the path of its file, or the name given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Shapes by name.
    pub fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.dims())).collect()
    }

    /// Takes over those tensors of another file that `chosen` says and that are missing here.
    pub fn complete_with(&mut self, other: &Self, chosen: impl Fn(&str) -> bool) {
        for (name, tensor) in other.tensors.iter().filter(|(name, _)| chosen(name)) {
            self.tensors.entry(name.clone()).or_insert_with(|| tensor.clone());
        }
    }

    /// One tensor, in a type and on a device. On the CPU each number is converted once, from the bytes of the file to its place.
    ///
    /// # Errors
    /// [`WeightsError::NoSuchTensor`], and if the device fails or has no memory.
    pub fn read(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor, WeightsError> {
        let read = self.get(name)?.read(dtype, device);
        read.map_err(|source| WeightsError::tensor(&self.name, name, source))
    }

    /// One tensor, of which no number has been read yet. It keeps the file open.
    ///
    /// # Errors
    /// [`WeightsError::NoSuchTensor`].
    pub fn get(&self, name: &str) -> Result<&StoredTensor, WeightsError> {
        let unknown = || WeightsError::NoSuchTensor { file: self.name.clone(), tensor: name.to_owned() };
        self.tensors.get(name).ok_or_else(unknown)
    }

    /// All tensors, in the type that `dtype` names for a shape, by all threads.
    ///
    /// # Errors
    /// [`WeightsError::Changed`] if the file was written to meanwhile, and as [`Self::read`].
    pub fn read_all(
        &self,
        dtype: impl Fn(&[usize]) -> DType + Sync,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor>, WeightsError> {
        let read = |(name, tensor): (&String, &StoredTensor)| {
            Ok((name.clone(), self.read(name, dtype(tensor.dims()), device)?))
        };
        let tensors = self.tensors.par_iter().map(read).collect::<Result<BTreeMap<_, _>, _>>()?;
        self.check_unchanged()?;
        Ok(tensors)
    }

    /// The first numbers of a tensor, at most as many as said.
    ///
    /// # Errors
    /// [`WeightsError::NoSuchTensor`].
    pub fn first_numbers(&self, name: &str, most: usize) -> Result<Vec<f32>, WeightsError> {
        let first = self.get(name)?.first(most);
        first.map_err(|source| WeightsError::tensor(&self.name, name, source))
    }

    /// Checks that no file was written to since it was opened: that what was read is what it held then.
    ///
    /// # Errors
    /// [`WeightsError::Changed`].
    pub fn check_unchanged(&self) -> Result<(), WeightsError> {
        let mut checked: Option<&StoredTensor> = None;
        for tensor in self.tensors.values() {
            if checked.is_some_and(|checked| checked.is_beside(tensor)) {
                continue;
            }
            checked = Some(tensor);
            if !tensor.is_unchanged().map_err(WeightsError::io(Path::new(&self.name)))? {
                return Err(WeightsError::Changed { file: self.name.clone() });
            }
        }
        Ok(())
    }
}

/// Reads the content of a safetensors file into f32 tensors on the CPU; `name` is what errors call the file.
///
/// # Errors
/// As [`StoredTensors::from_bytes`].
pub fn read_safetensors(name: &str, bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, WeightsError> {
    let read = |(tensor, stored, shape, range): Listed| {
        let value = kernels::tensor_of_bytes(&bytes[range], stored, DType::F32, shape);
        Ok((tensor.clone(), value.map_err(|source| WeightsError::tensor(name, &tensor, source))?))
    };
    list(name, bytes)?.into_iter().map(read).collect()
}

/// A tensor's name, type, shape, and where its bytes are.
type Listed = (String, DType, Vec<usize>, Range<usize>);

/// The tensors of a safetensors file.
fn list(name: &str, bytes: &[u8]) -> Result<Vec<Listed>, WeightsError> {
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| {
        unknown_dtype(bytes)
            .map(|(tensor, found)| WeightsError::Dtype { file: name.into(), tensor, expected: READABLE, found })
            .unwrap_or_else(|| WeightsError::Corrupt { file: name.into(), len: bytes.len(), found: error.to_string() })
    })?;
    // After the length of the header, and the header.
    let data = size_of::<u64>() + header;
    let listed = |(tensor, info): (String, &safetensors::tensor::TensorInfo)| {
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => DType::F64,
            // Position indices, which published text encoders carry among their weights.
            Dtype::I64 => DType::I64,
            other => {
                let (file, found) = (name.into(), other.to_string());
                return Err(WeightsError::Dtype { file, tensor, expected: READABLE, found });
            }
        };
        let (start, end) = info.data_offsets;
        Ok((tensor, dtype, info.shape.clone(), data + start..data + end))
    };
    metadata.tensors().into_iter().map(listed).collect()
}

/// The first tensor of a refused header whose dtype is none of the format's: the reader itself would name no tensor.
fn unknown_dtype(bytes: &[u8]) -> Option<(String, String)> {
    let (len, rest) = bytes.split_first_chunk::<8>()?;
    let header = rest.get(..usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).ok()?;
    header.into_iter().filter(|(name, _)| name != "__metadata__").find_map(|(name, entry)| {
        let dtype = entry.get("dtype")?.as_str()?;
        let unknown = serde_json::from_value::<Dtype>(dtype.into()).is_err();
        unknown.then(|| (name, dtype.to_owned()))
    })
}
