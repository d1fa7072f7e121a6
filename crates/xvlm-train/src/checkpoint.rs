//! What a checkpoint holds, written and read.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{DType, Device, Tensor, Var};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::optimizer::{Optimizer, Slot};
use crate::run::sync_folder;

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGES: &str = "ema.safetensors";
const STATE: &str = "state.json";

/// What the optimizer's file calls what it knows of a parameter.
fn optimizer_names(slot: &Slot) -> [String; 3] {
    ["first_moment", "second_moment", "steps"].map(|what| format!("{what}.{}", slot.name))
}

/// Where a run stood.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// Iterations done.
    pub(crate) iteration: u64,
    /// Optimizer steps done: an iteration may have several.
    pub(crate) optimizer_steps: u64,
    /// Time trained.
    pub(crate) elapsed_seconds: f64,
    /// What losses are multiplied by, and for how many steps it has been that.
    pub(crate) loss_scale: (f64, u64),
    /// The [`TrainConfig`], as it was written; with the seed, which together with the iteration is all there is to the
    /// state of random generators.
    pub(crate) config: Value,
}

impl State {
    pub(crate) fn elapsed(&self) -> Duration {
        Duration::try_from_secs_f64(self.elapsed_seconds).unwrap_or_default()
    }
}

/// Writes the files of a checkpoint to an empty folder, and returns when the disk has them.
pub(crate) fn write(
    folder: &Path,
    iteration: u64,
    elapsed: Duration,
    config: &TrainConfig,
    optimizer: &Optimizer,
) -> io::Result<()> {
    let wide =
        |(name, weights): (&str, &Var)| Ok((name.to_owned(), weights.as_detached_tensor().to_dtype(DType::F32)?));
    let weights = optimizer.weights().into_iter().map(wide).collect::<candle_core::Result<Vec<_>>>();
    let weights = weights.map_err(io::Error::other)?;
    write_tensors(&folder.join(WEIGHTS), weights.iter().map(|(name, weights)| (name.clone(), weights)).collect())?;

    let averages = optimizer.slots.iter().filter_map(|slot| Some((slot.name.to_owned(), slot.average.as_deref()?)));
    let averages: Vec<_> = averages.collect();
    if !averages.is_empty() {
        write_tensors(&folder.join(AVERAGES), averages)?;
    }

    let steps = optimizer.slots.iter().map(|slot| Tensor::new(slot.steps as i64, &Device::Cpu));
    let steps = steps.collect::<candle_core::Result<Vec<_>>>().map_err(io::Error::other)?;
    let known = optimizer.slots.iter().zip(&steps).flat_map(|(slot, steps)| {
        let tensors = [slot.first_moment.as_tensor(), slot.second_moment.as_tensor(), steps];
        optimizer_names(slot).into_iter().zip(tensors)
    });
    write_tensors(&folder.join(OPTIMIZER), known.collect())?;

    let (optimizer_steps, elapsed_seconds) = (optimizer.steps, elapsed.as_secs_f64());
    let loss_scale = (optimizer.loss_scale.factor, optimizer.loss_scale.finite_steps);
    let state = State { iteration, optimizer_steps, elapsed_seconds, loss_scale, config: written(config)? };
    let mut file = File::create(folder.join(STATE))?;
    file.write_all(&serde_json::to_vec_pretty(&state)?)?;
    file.sync_all()?;
    sync_folder(folder)
}

fn write_tensors(path: &Path, tensors: Vec<(String, &Tensor)>) -> io::Result<()> {
    // Readers of the original ecosystem refuse a file that does not say which framework's layout it has.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(io::Error::other)?;
    OpenOptions::new().write(true).open(path)?.sync_all()
}

/// A configuration as it reads after it was written: 0.1 as an f32 is not what its digits are as an f64.
fn written(config: &TrainConfig) -> serde_json::Result<Value> {
    serde_json::from_slice(&serde_json::to_vec(config)?)
}

/// A checkpoint whose files are whole.
pub(crate) struct Checkpoint {
    pub(crate) state: State,
    folder: PathBuf,
    weights: Vec<u8>,
    optimizer: Vec<u8>,
    /// If there are any.
    averages: Option<Vec<u8>>,
}

impl Checkpoint {
    /// Reads the checkpoint of an iteration.
    ///
    /// # Errors
    /// [`TrainError::Damaged`] if a file is missing or not whole.
    pub(crate) fn open(folder: &Path, iteration: u64) -> Result<Self, TrainError> {
        let damaged = |name, expected, found| TrainError::Damaged { path: folder.join(name), expected, found };
        let read = |name| match fs::read(folder.join(name)) {
            Ok(bytes) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged(name, "a file", "none".into())),
            Err(error) => Err(TrainError::io(&folder.join(name))(error)),
        };
        let state = match serde_json::from_slice::<State>(&read(STATE)?) {
            Ok(state) if state.iteration == iteration => state,
            Ok(state) => {
                return Err(damaged(STATE, "the folder's iteration", format!("iteration {}", state.iteration)));
            }
            Err(error) => return Err(damaged(STATE, "the state of a run", error.to_string())),
        };
        let whole = |name| {
            let bytes = read(name)?;
            match SafeTensors::deserialize(&bytes) {
                Ok(_) => Ok(bytes),
                Err(error) => Err(damaged(name, "safetensors", format!("{} bytes with {error}", bytes.len()))),
            }
        };
        let (weights, optimizer) = (whole(WEIGHTS)?, whole(OPTIMIZER)?);
        let averages = folder.join(AVERAGES).exists().then(|| whole(AVERAGES)).transpose()?;
        Ok(Self { state, folder: folder.to_path_buf(), weights, optimizer, averages })
    }

    /// Checks that what follows from the iterations so far is still configured as it was. What only says how long to go
    /// on, or what to write when, may change: it takes effect from here on.
    ///
    /// # Errors
    /// [`TrainError::Changed`] about the first value that is not the same.
    pub(crate) fn check(&self, config: &TrainConfig) -> Result<(), TrainError> {
        let path = self.folder.join(STATE);
        let now = written(config).map_err(|error| TrainError::io(&path)(error.into()))?;
        for field in ["optimizer", "schedule", "clip", "accumulate", "precision", "ema_decay", "seed"] {
            if let Some((field, expected, found)) = difference(field, &self.state.config[field], &now[field]) {
                return Err(TrainError::Changed { path, field, expected, found });
            }
        }
        Ok(())
    }

    /// Brings parameters and optimizer to the checkpoint's state.
    ///
    /// # Errors
    /// [`TrainError::Mismatch`] if it is of another model.
    pub(crate) fn restore(&self, optimizer: &mut Optimizer) -> Result<(), TrainError> {
        let all = optimizer.weights();
        let weights = Tensors::new(self.folder.join(WEIGHTS), &self.weights, all.len())?;
        for (name, variable) in all {
            weights.restore(name, variable)?;
        }
        let averages = self.averages.as_ref();
        let averages =
            averages.map(|bytes| Tensors::new(self.folder.join(AVERAGES), bytes, optimizer.slots.len())).transpose()?;
        let known = Tensors::new(self.folder.join(OPTIMIZER), &self.optimizer, 3 * optimizer.slots.len())?;
        for slot in &mut optimizer.slots {
            let [first, second, steps] = optimizer_names(slot);
            known.restore(&first, &slot.first_moment)?;
            known.restore(&second, &slot.second_moment)?;
            let value = known.get(&steps, DType::I64, &[], &Device::Cpu)?;
            slot.steps = value.to_scalar::<i64>().map_err(TrainError::tensor(&steps))? as u64;
            slot.narrow().map_err(TrainError::tensor(slot.name))?;
            if let (Some(file), Some(average)) = (&averages, &slot.average) {
                file.restore(slot.name, average)?;
            }
        }
        (optimizer.loss_scale.factor, optimizer.loss_scale.finite_steps) = self.state.loss_scale;
        optimizer.steps = self.state.optimizer_steps;
        Ok(())
    }
}

/// A file of tensors, of which each is expected.
struct Tensors<'a> {
    path: PathBuf,
    tensors: SafeTensors<'a>,
}

impl<'a> Tensors<'a> {
    fn new(path: PathBuf, bytes: &'a [u8], expected: usize) -> Result<Self, TrainError> {
        match SafeTensors::deserialize(bytes) {
            Ok(tensors) if tensors.len() > expected => Err(TrainError::Mismatch {
                path,
                tensor: "(all)".into(),
                expected: format!("{expected} tensors"),
                found: tensors.len().to_string(),
            }),
            Ok(tensors) => Ok(Self { path, tensors }),
            Err(error) => Err(TrainError::Damaged { path, expected: "safetensors", found: error.to_string() }),
        }
    }

    fn restore(&self, name: &str, variable: &Var) -> Result<(), TrainError> {
        let value = self.get(name, DType::F32, variable.dims(), variable.device())?;
        let narrow = value.to_dtype(variable.dtype()).and_then(|value| variable.set(&value));
        narrow.map_err(TrainError::tensor(name))
    }

    fn get(&self, name: &str, dtype: DType, shape: &[usize], device: &Device) -> Result<Tensor, TrainError> {
        let stored = if dtype == DType::F32 { Dtype::F32 } else { Dtype::I64 };
        let found = match self.tensors.tensor(name) {
            Ok(view) if view.dtype() == stored && view.shape() == shape => {
                return Tensor::from_raw_buffer(view.data(), dtype, shape, device).map_err(TrainError::tensor(name));
            }
            Ok(view) => format!("{} {:?}", view.dtype(), view.shape()),
            Err(_) => "none".into(),
        };
        let (path, tensor) = (self.path.clone(), name.to_owned());
        Err(TrainError::Mismatch { path, tensor, expected: format!("{stored} {shape:?}"), found })
    }
}

/// The first value in which two configurations differ: its place (which begins with `place`), and both.
pub fn difference(place: &str, before: &Value, now: &Value) -> Option<(String, String, String)> {
    match (before, now) {
        (Value::Object(before), Value::Object(fields)) => fields.iter().find_map(|(name, now)| {
            difference(&format!("{place}.{name}"), before.get(name).unwrap_or(&Value::Null), now)
        }),
        _ => (before != now).then(|| (place.to_owned(), before.to_string(), now.to_string())),
    }
}
