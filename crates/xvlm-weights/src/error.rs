//! What can go wrong with weights, each variant naming the file, what was expected and what was found.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use candle_core::Tensor;

/// A tensor's name and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedShape {
    /// The name.
    pub name: String,
    /// The shape.
    pub shape: Vec<usize>,
}

impl fmt::Display for NamedShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.name, self.shape)
    }
}

impl From<(&String, &Tensor)> for NamedShape {
    fn from((name, tensor): (&String, &Tensor)) -> Self {
        Self { name: name.clone(), shape: tensor.dims().to_vec() }
    }
}

/// A tensor of another shape than its parameter.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Reshaped {
    /// The name of both.
    pub name: String,
    /// The parameter's shape.
    pub expected: Vec<usize>,
    /// The tensor's shape.
    pub found: Vec<usize>,
}

impl fmt::Display for Reshaped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected shape {:?}, found {:?}", self.name, self.expected, self.found)
    }
}

/// The errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A model folder lacks one of its files.
    #[error("{}: expected a file, found none", path.display())]
    MissingFile {
        /// The file that is not there.
        path: PathBuf,
    },
    /// A folder to be replaced by a model holds something else.
    #[error("{}: expected nothing, an empty folder or a model to replace, found {found}", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What is in the way.
        found: String,
    },
    /// A configuration is no JSON object.
    #[error("{file}: expected a JSON object, found {found}")]
    Config {
        /// The file.
        file: String,
        /// What the parser said, or the kind of value.
        found: String,
    },
    /// A file is no safetensors file: truncated, or damaged.
    #[error("{file}: expected safetensors, found {len} bytes with {found}")]
    Corrupt {
        /// The file.
        file: String,
        /// Its length in bytes.
        len: usize,
        /// What is wrong with them.
        found: String,
    },
    /// A file of weights was written to while its tensors were being read.
    #[error("{file}: expected a file that stays as it is while it is read, found that it was written to meanwhile")]
    Changed {
        /// The file.
        file: String,
    },
    /// A tensor is stored as numbers of a type that cannot be a weight.
    #[error("{file}: tensor {tensor}: expected dtype {expected}, found {found}")]
    Dtype {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The dtypes that can be read.
        expected: &'static str,
        /// Its dtype.
        found: String,
    },
    /// A file is none of the kinds of checkpoints that can be read.
    #[error(
        "{file}: expected a PyTorch zip, a legacy PyTorch pickle, safetensors or an index of shards, found {found}"
    )]
    UnknownKind {
        /// The file.
        file: String,
        /// What it begins with.
        found: String,
    },
    /// Part of a checkpoint is damaged, or is not what its kind promises.
    #[error("{file}: {part}: expected {expected}, found {found}")]
    Malformed {
        /// The file.
        file: String,
        /// The entry, the tensor, or what else it is a part of.
        part: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A weight is infinite, or no number at all.
    #[error("{file}: tensor {tensor}: expected finite numbers, found one that is not, number {at}")]
    NotFinite {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its place among the tensor's numbers, from 0.
        at: usize,
    },
    /// A checkpoint does not list the tensor that was asked for.
    #[error("{file}: tensor {tensor}: expected one of the tensors of the file, found none of this name")]
    NoSuchTensor {
        /// The file.
        file: String,
        /// The name asked for.
        tensor: String,
    },
    /// The numbers of a tensor could not be read from a checkpoint, or are damaged.
    #[error("{file}: tensor {tensor}: {source}")]
    Unreadable {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What the operating system said, or what was expected and what was found.
        source: io::Error,
    },
    /// Parameters for which there is no tensor.
    #[error("{file}: expected tensors {}, found none of these names", list(tensors))]
    Missing {
        /// Where the tensors come from.
        file: String,
        /// The parameters.
        tensors: Vec<NamedShape>,
    },
    /// Tensors for which there is no parameter.
    #[error("{file}: expected no other tensors than the model's parameters, found {}", list(tensors))]
    Unexpected {
        /// Where the tensors come from.
        file: String,
        /// The tensors.
        tensors: Vec<NamedShape>,
    },
    /// Tensors of other shapes than their parameters.
    #[error("{file}: {}", list(tensors))]
    Shape {
        /// Where the tensors come from.
        file: String,
        /// The tensors.
        tensors: Vec<Reshaped>,
    },
    /// Several of the above at once.
    #[error("{}", lines(.0))]
    Several(Vec<WeightsError>),
    /// A tensor operation failed: a device that does not answer, or no memory.
    #[error("{file}: tensor {tensor}: {source}")]
    Tensor {
        /// Where the tensor comes from or goes.
        file: String,
        /// The tensor.
        tensor: String,
        /// What the tensor library said.
        source: Box<candle_core::Error>,
    },
}

impl WeightsError {
    /// For `map_err`: names the file of an input or output error. An error of this crate that came through a writer
    /// stays what it was.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| source.downcast().unwrap_or_else(|source| Self::Io { path: path.to_path_buf(), source })
    }

    pub(crate) fn tensor(file: &str, tensor: &str, source: candle_core::Error) -> Self {
        Self::Tensor { file: file.into(), tensor: tensor.into(), source: Box::new(source) }
    }
}

fn join(items: &[impl fmt::Display], separator: &str) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}

fn list(items: &[impl fmt::Display]) -> String {
    join(items, ", ")
}

fn lines(errors: &[WeightsError]) -> String {
    join(errors, "\n")
}
