//! Checkpoints of other programs: listed without reading a number, and read one tensor at a time.

mod archive;
mod index;
mod legacy;
mod numbers;
mod opcodes;
mod pickle;
mod pytorch;
mod safetensors;
mod state;
mod storage;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::error::WeightsError;
pub(crate) use numbers::READABLE;
use numbers::{numbers, type_name};
pub use pytorch::write_pytorch;
use storage::{Layout, Storage};

/// What all names share that `DistributedDataParallel` has saved.
const PARALLEL: &str = "module.";

/// What a checkpoint is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointKind {
    /// What `torch.save` writes since PyTorch 1.6.
    PytorchZip,
    /// What `torch.save` wrote before.
    PytorchLegacy,
    /// One safetensors file.
    Safetensors,
    /// An index of several files of the above kinds, as the Hugging Face hub has them.
    ShardIndex,
    /// No file: tensors that are in memory already.
    Memory,
}

impl Display for CheckpointKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PytorchZip => "PyTorch zip",
            Self::PytorchLegacy => "legacy PyTorch pickle",
            Self::Safetensors => "safetensors",
            Self::ShardIndex => "index of shards",
            Self::Memory => "tensors in memory",
        })
    }
}

/// A tensor of a checkpoint, as it is listed.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    type_name: String,
    layout: Layout,
    /// Index of its storage.
    storage: usize,
}

impl TensorInfo {
    /// The shape.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The dtype in which it is read; none if no tensor can have its type. Booleans are read as `U8`.
    pub fn dtype(&self) -> Option<DType> {
        numbers(&self.type_name).dtype
    }

    /// What the file calls the type of its numbers: `torch.FloatStorage`, `torch.float32`, `F32`.
    pub fn type_name(&self) -> &str {
        &self.type_name
    }
}

/// A checkpoint that training programs have written: PyTorch's, or safetensors.
///
/// Opening it reads what says where the tensors are; [`Checkpoint::read`] reads the bytes of one of them. A pickle is
/// never executed: what it says beyond tensors and dictionaries is passed over.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    name: String,
    kind: CheckpointKind,
    contents: Contents,
    /// Tensors that are in memory, where there is no file.
    held: BTreeMap<String, Tensor>,
}

/// What a file lists.
#[derive(Clone, Debug, Default)]
struct Contents {
    storages: Vec<Storage>,
    tensors: BTreeMap<String, TensorInfo>,
    left_out: BTreeSet<String>,
}

impl Checkpoint {
    /// Opens a checkpoint, whose content, not its name, says what it is.
    ///
    /// The state dict is the first of the top-level keys `model`, `state_dict`, `model_state_dict` and `module` that
    /// holds tensors, or the top-level object itself; everything beside it (optimizer, configuration, epoch) is passed
    /// over. A prefix `module.` that all names share is dropped.
    ///
    /// # Errors
    /// [`WeightsError::UnknownKind`] if it is nothing that can be read, [`WeightsError::Malformed`] if it is damaged,
    /// holds no tensors, is big-endian, or claims what the file does not have, and [`WeightsError::Io`].
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let (kind, mut contents) = match open_file(path)? {
            Some(opened) => opened,
            None => (CheckpointKind::ShardIndex, index::open(path)?),
        };
        let parallel =
            contents.tensors.keys().all(|name| name.strip_prefix(PARALLEL).is_some_and(|rest| !rest.is_empty()));
        if parallel {
            contents.tensors = contents.tensors.into_iter().map(|(name, info)| (strip(name), info)).collect();
            contents.left_out = contents.left_out.into_iter().map(strip).collect();
        }
        Ok(Self { name: path.display().to_string(), kind, contents, held: BTreeMap::new() })
    }

    /// Tensors that are in memory already, as if a file held them; errors call it `name`. The numbers are not copied.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] if there are none.
    pub fn of_tensors(name: &str, tensors: BTreeMap<String, Tensor>) -> Result<Self, WeightsError> {
        let part = Part::new(Path::new(name), "model");
        if tensors.is_empty() {
            return Err(part.malformed("tensors", "none"));
        }
        let mut contents = Contents::default();
        let shared: Arc<Path> = Path::new(name).into();
        for (name, tensor) in &tensors {
            let size = (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
            let layout = Layout::contiguous(tensor.dims().to_vec());
            let layout = layout.ok_or_else(|| part.tensor(name).malformed("a shape", "one that is too large"))?;
            let info = TensorInfo { type_name: type_name(tensor.dtype()), layout, storage: contents.storages.len() };
            contents.storages.push(Storage::plain(&shared, 0, size));
            contents.tensors.insert(name.clone(), info);
        }
        Ok(Self { name: name.to_owned(), kind: CheckpointKind::Memory, contents, held: tensors })
    }

    /// Its path, or the name it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is stored as.
    pub fn kind(&self) -> CheckpointKind {
        self.kind
    }

    /// Its tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.contents.tensors
    }

    /// The names of what the state dict holds besides tensors.
    pub fn left_out(&self) -> &BTreeSet<String> {
        &self.contents.left_out
    }

    /// Bytes of the numbers behind all tensors; those that several tensors share count once.
    pub fn tensor_bytes(&self) -> u64 {
        self.contents.storages.iter().map(|storage| storage.len).sum()
    }

    /// Reads one tensor: contiguous, in its own dtype, on the CPU. Memory holds its bytes twice for a moment, and, if
    /// it is a view that is not contiguous, those of the storage between its first and its last number.
    ///
    /// # Errors
    /// [`WeightsError::NoSuchTensor`], [`WeightsError::Dtype`] if no tensor can have its type, and
    /// [`WeightsError::Unreadable`] if its numbers cannot be read or do not match their checksum.
    pub fn read(&self, name: &str) -> Result<Tensor, WeightsError> {
        let (file, tensor) = (|| self.name.clone(), || name.to_owned());
        let info = self.contents.tensors.get(name);
        let info = info.ok_or_else(|| WeightsError::NoSuchTensor { file: file(), tensor: tensor() })?;
        if let Some(held) = self.held.get(name) {
            let read = held.to_device(&Device::Cpu).and_then(|held| held.contiguous());
            return read.map_err(|source| WeightsError::tensor(&self.name, name, source));
        }
        let numbers = numbers(&info.type_name);
        let (Some(size), Some(dtype)) = (numbers.size, numbers.dtype) else {
            let (expected, found) = (READABLE, info.type_name.clone());
            return Err(WeightsError::Dtype { file: file(), tensor: tensor(), expected, found });
        };
        let storage = &self.contents.storages[info.storage];
        let bytes = info.layout.read(storage, size).map_err(|source| WeightsError::Unreadable {
            file: storage.path.display().to_string(),
            tensor: tensor(),
            source,
        })?;
        Tensor::from_raw_buffer(&bytes, dtype, info.shape(), &Device::Cpu)
            .map_err(|source| WeightsError::tensor(&self.name, name, source))
    }
}

/// Where the first number of a tensor that is infinite or no number is, in the order of its numbers; none if all are
/// finite, as integers are.
///
/// # Errors
/// If a tensor operation fails.
pub fn first_non_finite(tensor: &Tensor) -> candle_core::Result<Option<usize>> {
    /// Numbers that are converted at once.
    const CHUNK: usize = 1 << 16;
    if !tensor.dtype().is_float() {
        return Ok(None);
    }
    let flat = tensor.flatten_all()?;
    for start in (0..flat.elem_count()).step_by(CHUNK) {
        let chunk = flat.narrow(0, start, CHUNK.min(flat.elem_count() - start))?;
        let numbers = chunk.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        if let Some(at) = numbers.iter().position(|number| !number.is_finite()) {
            return Ok(Some(start + at));
        }
    }
    Ok(None)
}

/// Opens one file that holds tensors; none if it is an index of several.
fn open_file(path: &Path) -> Result<Option<(CheckpointKind, Contents)>, WeightsError> {
    let shared: Arc<Path> = path.into();
    let mut head = Vec::new();
    let mut file = File::open(path).map_err(WeightsError::io(path))?;
    file.by_ref().take(32).read_to_end(&mut head).map_err(WeightsError::io(path))?;
    let len = file.metadata().map_err(WeightsError::io(path))?.len();
    Ok(Some(match &head[..] {
        [b'P', b'K', 3 | 5, 4 | 6, ..] => (CheckpointKind::PytorchZip, archive::open(&shared, len)?),
        [0x80, 2..=5, ..] => (CheckpointKind::PytorchLegacy, legacy::open(&shared, &head, len)?),
        // The length of a header, which is far below 2^48, and its first byte.
        [_, _, _, _, _, _, 0, 0, b'{', ..] => (CheckpointKind::Safetensors, safetensors::open(&shared, len)?),
        [b'{', ..] => return Ok(None),
        _ => {
            let found = match head.len() {
                0 => "an empty file".into(),
                _ => format!("bytes that begin with {:02x?}", &head[..head.len().min(8)]),
            };
            return Err(WeightsError::UnknownKind { file: path.display().to_string(), found });
        }
    }))
}

fn strip(name: String) -> String {
    name.strip_prefix(PARALLEL).map(str::to_owned).unwrap_or(name)
}

/// What errors call a part of a file.
struct Part<'a> {
    path: &'a Path,
    name: String,
}

impl<'a> Part<'a> {
    fn new(path: &'a Path, name: impl Into<String>) -> Self {
        Self { path, name: name.into() }
    }

    /// A tensor of the same file.
    fn tensor(&self, name: &str) -> Self {
        Self::new(self.path, format!("tensor {name}"))
    }

    fn malformed(&self, expected: impl Into<String>, found: impl Into<String>) -> WeightsError {
        let (file, part) = (self.path.display().to_string(), self.name.clone());
        WeightsError::Malformed { file, part, expected: expected.into(), found: found.into() }
    }

    fn malformed_at(&self, position: u64, expected: &str, found: impl Into<String>) -> WeightsError {
        self.malformed(expected, format!("{} at byte {position}", found.into()))
    }

    fn io(&self, source: io::Error) -> WeightsError {
        WeightsError::io(self.path)(source)
    }
}
