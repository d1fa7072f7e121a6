//! A model as a folder.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::atomic::{folder_of, sync_folder, write_through};
use crate::error::{NamedShape, WeightsError};
use crate::stored::StoredTensors;
use crate::tensors::{StoredType, write_safetensors_with};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";

/// Opens and writes model folders: `config.json`, `model.safetensors`, `tokenizer.json`.
#[derive(Clone, Copy, Debug)]
pub struct ModelFolder;

/// The content of a model folder.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    /// What errors call it: the folder, or the name given.
    pub name: String,
    /// The configuration, a JSON object.
    pub config: String,
    /// The tokenizer file, not looked into.
    pub tokenizer: Cow<'static, [u8]>,
    /// The weights, of which no number has been read yet.
    pub weights: StoredTensors,
}

impl ModelFolder {
    /// Reads a model folder, but for the numbers of its weights, whose file is mapped.
    ///
    /// # Errors
    /// If a file is missing or cannot be read, the configuration is no JSON object, or the weights are damaged.
    pub fn open(dir: &Path) -> Result<ModelFiles, WeightsError> {
        let found = |error: WeightsError| match error {
            WeightsError::Io { path, source } if source.kind() == io::ErrorKind::NotFound => {
                WeightsError::MissingFile { path }
            }
            other => other,
        };
        let read = |file: &str| {
            let path = dir.join(file);
            fs::read(&path).map_err(WeightsError::io(&path)).map_err(found)
        };
        let name = dir.display().to_string();
        let config = read(CONFIG)?;
        let weights = StoredTensors::open(&dir.join(WEIGHTS)).map_err(found)?;
        let tokenizer = read(TOKENIZER)?;
        let config = check_config(&format!("{name}/{CONFIG}"), &config)?.to_owned();
        Ok(ModelFiles { name, config, tokenizer: tokenizer.into(), weights })
    }

    /// Writes a model folder as a whole: it is filled aside, flushed to the disk, and renamed to `dir`.
    ///
    /// A model that `dir` already holds is replaced: renamed away first, put back if the new one cannot take its
    /// place, and removed last. If the machine stops between the two renames, the old model is found beside `dir`,
    /// in a folder whose name begins with `.` and the name of `dir`.
    ///
    /// # Errors
    /// [`WeightsError::Occupied`] if `dir` is something other than a model's three files or an empty folder: what
    /// this crate has not written it does not remove. [`WeightsError::Config`] if `config_json` is no JSON object.
    /// [`WeightsError::Io`] if a file operation fails.
    pub fn write(
        dir: &Path,
        config_json: &str,
        tensors: &BTreeMap<String, Tensor>,
        tokenizer_json: &[u8],
        stored: StoredType,
    ) -> Result<(), WeightsError> {
        let entries: Vec<NamedShape> = tensors.iter().map(NamedShape::from).collect();
        Self::write_with(dir, config_json, Some(tokenizer_json), &entries, stored, |name| Ok(tensors[name].clone()))
    }

    /// As [`ModelFolder::write`], with tensors of which only the names and shapes are known yet: `tensor` gives each
    /// when it is its turn, once and in the order of `entries`, so that memory need hold one at a time. A folder without a
    /// tokenizer can be opened when one has been put there.
    ///
    /// # Errors
    /// As [`ModelFolder::write`], and those of `tensor`, as they are.
    pub fn write_with(
        dir: &Path,
        config_json: &str,
        tokenizer_json: Option<&[u8]>,
        entries: &[NamedShape],
        stored: StoredType,
        tensor: impl FnMut(&str) -> Result<Tensor, WeightsError>,
    ) -> Result<(), WeightsError> {
        check_config(&dir.join(CONFIG).display().to_string(), config_json.as_bytes())?;
        let dir = resolve(dir).map_err(WeightsError::io(dir))?;
        let replaces = check_replaceable(&dir)?;
        let parent = folder_of(&dir);
        with_folder(&parent, || {
            let prefix = format!(".{}.", dir.file_name().unwrap_or_default().to_string_lossy());
            let aside =
                tempfile::Builder::new().prefix(&prefix).tempdir_in(&parent).map_err(WeightsError::io(&parent))?;
            let (new, old) = (aside.path().join("new"), aside.path().join("old"));

            fs::create_dir(&new).map_err(WeightsError::io(&new))?;
            write_new(&new.join(CONFIG), |out| out.write_all(config_json.as_bytes()))?;
            write_new(&new.join(WEIGHTS), |out| write_safetensors_with(out, entries, stored, tensor))?;
            if let Some(tokenizer) = tokenizer_json {
                write_new(&new.join(TOKENIZER), |out| out.write_all(tokenizer))?;
            }
            sync_folder(&new).map_err(WeightsError::io(&new))?;

            if replaces {
                fs::rename(&dir, &old).map_err(WeightsError::io(&dir))?;
            }
            if let Err(source) = fs::rename(&new, &dir) {
                if replaces && fs::rename(&old, &dir).is_err() {
                    let _kept = aside.keep();
                }
                return Err(WeightsError::Io { path: dir, source });
            }
            sync_folder(&parent).map_err(WeightsError::io(&parent))
        })
    }
}

/// Works in a folder that is made for it if need be, and then taken away again if the work fails.
fn with_folder(folder: &Path, work: impl FnOnce() -> Result<(), WeightsError>) -> Result<(), WeightsError> {
    let made: Vec<&Path> = folder.ancestors().take_while(|ancestor| !ancestor.exists()).collect();
    let done = fs::create_dir_all(folder).map_err(WeightsError::io(folder)).and_then(|()| work());
    if done.is_err() {
        // The innermost first; one that holds something else by now stays.
        made.into_iter().for_each(|folder| drop(fs::remove_dir(folder)));
    }
    done
}

impl ModelFiles {
    /// A model from the bytes of its three files, for instance compiled into a binary, from where they are not copied; errors
    /// call it `name`.
    ///
    /// # Errors
    /// If the configuration is no JSON object, or the weights are damaged.
    pub fn from_bytes(
        name: &str,
        config: &[u8],
        weights: impl Into<Cow<'static, [u8]>>,
        tokenizer: impl Into<Cow<'static, [u8]>>,
    ) -> Result<Self, WeightsError> {
        let config = check_config(&format!("{name}/{CONFIG}"), config)?.to_owned();
        let weights = StoredTensors::from_bytes(&format!("{name}/{WEIGHTS}"), weights)?;
        Ok(Self { name: name.to_owned(), config, tokenizer: tokenizer.into(), weights })
    }

    /// The tensors by name, f32 on the CPU.
    ///
    /// # Errors
    /// As [`StoredTensors::read_all`].
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>, WeightsError> {
        self.weights.read_all(|_| DType::F32, &Device::Cpu)
    }
}

/// The text of a configuration, which must be a JSON object.
fn check_config<'a>(file: &str, bytes: &'a [u8]) -> Result<&'a str, WeightsError> {
    let refuse = |found: String| WeightsError::Config { file: file.to_owned(), found };
    let text = std::str::from_utf8(bytes).map_err(|error| refuse(error.to_string()))?;
    let value: Value = serde_json::from_str(text).map_err(|error| refuse(error.to_string()))?;
    let kind = match value {
        Value::Object(_) => return Ok(text),
        Value::Array(_) => "an array",
        Value::String(_) => "a string",
        Value::Number(_) => "a number",
        Value::Bool(_) => "a boolean",
        Value::Null => "null",
    };
    Err(refuse(kind.to_owned()))
}

/// The absolute path, with links followed if there is something: what is replaced is the folder, not the link to it.
fn resolve(dir: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(dir),
        other => other,
    }
}

/// Whether there is something that a model may replace; an error if it may not.
fn check_replaceable(dir: &Path) -> Result<bool, WeightsError> {
    let occupied = |found: String| WeightsError::Occupied { path: dir.to_path_buf(), found };
    match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => {
            return Err(WeightsError::Io { path: dir.to_path_buf(), source });
        }
        Ok(there) if !there.is_dir() => return Err(occupied("something that is no folder".into())),
        Ok(_) if dir.parent().is_none() => {
            return Err(occupied("the root of the file system".into()));
        }
        Ok(_) => {}
    }
    let names: Vec<String> = fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect())
        .map_err(WeightsError::io(dir))?;
    let model = [CONFIG, WEIGHTS, TOKENIZER];
    if let Some(other) = names.iter().find(|name| !model.contains(&name.as_str())) {
        return Err(occupied(other.clone()));
    }
    let has = |file: &str| names.iter().any(|name| name == file);
    match names.len() {
        0 | 3 => Ok(true),
        2 if !has(TOKENIZER) => Ok(true),
        _ => Err(occupied(format!("only {}", names.join(", ")))),
    }
}

/// Creates a file and fills it; the disk has it on return.
fn write_new(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), WeightsError> {
    File::create_new(path).and_then(|file| write_through(&file, write)).map_err(WeightsError::io(path))
}
