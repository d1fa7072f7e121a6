//! Safetensors, written.

use std::collections::BTreeMap;
use std::io::{self, Write};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use crate::checkpoint::first_non_finite;
use crate::error::{NamedShape, WeightsError};

/// How numbers are stored in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoredType {
    /// 4 bytes, exact.
    #[default]
    F32,
    /// 2 bytes, 11 significant bits, up to 65504.
    F16,
    /// 2 bytes, 8 significant bits, the range of f32.
    Bf16,
}

impl StoredType {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }

    /// Bytes a number.
    pub fn size(self) -> u64 {
        self.dtype().size_in_bytes() as u64
    }

    /// The name in a safetensors header.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }
}

/// Writes tensors as safetensors, one at a time: besides the tensors, memory holds one converted copy of one of them.
///
/// # Errors
/// If writing fails, or a tensor cannot be brought to the CPU.
pub fn write_safetensors(
    out: &mut dyn Write,
    tensors: &BTreeMap<String, Tensor>,
    stored: StoredType,
) -> io::Result<()> {
    let entries: Vec<NamedShape> = tensors.iter().map(NamedShape::from).collect();
    write_safetensors_with(out, &entries, stored, |name| Ok(tensors[name].clone()))
}

/// Writes tensors as safetensors, of which only the names and shapes are known yet: `tensor` gives each when it is its
/// turn, in the order of `entries`, so that memory need hold one at a time.
///
/// # Errors
/// If writing fails, a name is reserved or comes twice, or a tensor has another shape than was said or cannot be
/// brought to the CPU. An error of `tensor` is the source of the error returned; [`write_file_atomically`] and
/// [`ModelFolder`] give it back as it was.
///
/// [`write_file_atomically`]: crate::write_file_atomically
/// [`ModelFolder`]: crate::ModelFolder
pub fn write_safetensors_with(
    out: &mut dyn Write,
    entries: &[NamedShape],
    stored: StoredType,
    mut tensor: impl FnMut(&str) -> Result<Tensor, WeightsError>,
) -> io::Result<()> {
    // Readers of the original ecosystem refuse a file that does not say which framework's layout it has.
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut start = 0u64;
    for entry in entries {
        let NamedShape { name, shape } = entry;
        let end = start.saturating_add(count(entry)?.saturating_mul(stored.size()));
        let entry = json!({"dtype": stored.name(), "shape": shape, "data_offsets": [start, end]});
        if header.insert(name.clone(), entry).is_some() {
            return Err(invalid(format!("tensor {name}: expected each name once and none reserved, found it again")));
        }
        start = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    // The format's readers may map the file: numbers start at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for entry in entries {
        write_numbers(out, entry, &tensor(&entry.name).map_err(io::Error::other)?, stored)?;
    }
    Ok(())
}

/// Writes a tensor's numbers, which must be of the shape that was said, in their order.
pub(crate) fn write_numbers(
    mut out: &mut dyn Write,
    entry: &NamedShape,
    tensor: &Tensor,
    stored: StoredType,
) -> io::Result<()> {
    let name = &entry.name;
    if tensor.dims() != entry.shape {
        return Err(invalid(format!("tensor {name}: expected shape {:?}, found {:?}", entry.shape, tensor.dims())));
    }
    let failed = |error| io::Error::other(format!("tensor {name}: {error}"));
    let host = tensor.detach().to_device(&Device::Cpu).map_err(failed)?;
    let converted = host.to_dtype(stored.dtype()).map_err(failed)?;
    if stored != StoredType::F32 && host.dtype() != stored.dtype() {
        // What has become infinite would be refused by whoever reads it.
        let (before, after) = (first_non_finite(&host).map_err(failed)?, first_non_finite(&converted).map_err(failed)?);
        if let (None, Some(at)) = (before, after) {
            let largest = if stored == StoredType::F16 { "65504" } else { "3.39e38" };
            return Err(invalid(format!(
                "tensor {name}: expected numbers up to {largest} for {}, found a larger one, number {at}",
                stored.name()
            )));
        }
    }
    converted.write_bytes(&mut out).map_err(|error| match error {
        candle_core::Error::Io(error) => error,
        other => failed(other),
    })
}

/// How many numbers a tensor has.
pub(crate) fn count(entry: &NamedShape) -> io::Result<u64> {
    let count = entry.shape.iter().try_fold(1u64, |count, len| count.checked_mul(*len as u64));
    // No more than memory has addresses.
    count.filter(|count| i64::try_from(*count).is_ok()).ok_or_else(|| {
        invalid(format!("tensor {}: expected a shape whose size is a number, found {:?}", entry.name, entry.shape))
    })
}

pub(crate) fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}
