//! What a checkpoint holds, written and read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::best::Judge;
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::files::{Digest, Numbers, TensorFile, write_file, write_tensors};
use crate::optimizer::{Optimizer, Slot};
use crate::run::sync_folder;
use crate::train::Tally;

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGES: &str = "ema.safetensors";
const STATE: &str = "state.json";
/// Digests of all other files, in the form of `sha256sum`.
const SUMS: &str = "SHA256SUMS";

/// What the optimizer's file calls what it knows of a parameter.
fn optimizer_names(slot: &Slot) -> [String; 3] {
    ["first_moment", "second_moment", "steps"].map(|what| format!("{what}.{}", slot.name))
}

/// Where the loop stands.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Standing {
    /// Iterations done. With the seed and the rank, all there is to the state of random generators and data.
    pub(crate) iteration: u64,
    /// Time trained.
    pub(crate) elapsed: Duration,
    /// What happened since the last row of metrics.
    pub(crate) tally: Tally,
    /// The best checkpoint so far, this one among them.
    pub(crate) judge: Judge,
}

/// The state of a run, but for tensors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    standing: Standing,
    /// Optimizer steps done: an iteration may have several.
    optimizer_steps: u64,
    /// What losses are multiplied by, and for how many steps it has been that.
    loss_scale: (f64, u64),
    /// Lengths of the files of tensors.
    lengths: BTreeMap<String, u64>,
    /// The [`TrainConfig`], as it was written.
    config: Value,
}

/// Writes the files of a checkpoint to an empty folder, and returns when the disk has them. Errors name the file of the
/// folder that it is going to be.
pub(crate) fn write(
    aside: &Path,
    folder: &Path,
    standing: &Standing,
    config: &TrainConfig,
    optimizer: &Optimizer,
) -> Result<(), TrainError> {
    let failed = |name: &str| TrainError::io(&folder.join(name));
    let weights = optimizer.weights().into_iter().map(|(name, weights)| (name.to_owned(), Numbers::Weights(weights)));
    let steps = optimizer.slots.iter().map(|slot| Tensor::new(slot.steps as i64, &Device::Cpu));
    let steps = steps.collect::<candle_core::Result<Vec<_>>>().map_err(TrainError::tensor("steps"))?;
    let known = optimizer.slots.iter().zip(&steps).flat_map(|(slot, steps)| {
        let tensors = [slot.first_moment.as_tensor(), slot.second_moment.as_tensor(), steps];
        optimizer_names(slot).into_iter().zip(tensors.map(Numbers::Tensor))
    });
    let averages = optimizer.slots.iter().filter_map(|slot| {
        let average = slot.average.as_deref()?;
        Some((slot.name.to_owned(), Numbers::Tensor(average)))
    });
    let mut files = vec![(OPTIMIZER, known.collect::<Vec<_>>()), (WEIGHTS, weights.collect())];
    files.extend(Some((AVERAGES, averages.collect::<Vec<_>>())).filter(|(_, averages)| !averages.is_empty()));

    // Side by side: digests take about as long as the disk does.
    let written = thread::scope(|scope| {
        let writers = files
            .into_iter()
            .map(|(name, tensors)| (name, scope.spawn(move || write_tensors(&aside.join(name), tensors))));
        let writers = writers.collect::<Vec<_>>();
        let digest = |(name, writer): (&'static str, thread::ScopedJoinHandle<io::Result<Digest>>)| {
            let written = writer.join().unwrap_or_else(|_| Err(io::Error::other("the thread that wrote it panicked")));
            Ok((name, written.map_err(failed(name))?))
        };
        writers.into_iter().map(digest).collect::<Result<Vec<_>, TrainError>>()
    });
    let mut digests = written?;

    let state = State {
        standing: standing.clone(),
        optimizer_steps: optimizer.steps,
        loss_scale: (optimizer.loss_scale.factor, optimizer.loss_scale.finite_steps),
        lengths: digests.iter().map(|(name, digest)| ((*name).to_owned(), digest.bytes)).collect(),
        config: to_value(config),
    };
    let write_state = || {
        let text = serde_json::to_vec_pretty(&state)?;
        write_file(&aside.join(STATE), |out| out.write_all(&text))
    };
    digests.push((STATE, write_state().map_err(failed(STATE))?));
    let sums = write_file(&aside.join(SUMS), |out| out.write_all(sums(&digests).as_bytes()));
    sums.map_err(failed(SUMS))?;
    sync_folder(aside).map_err(TrainError::io(folder))
}

/// The text of [`SUMS`].
fn sums<N: AsRef<str>>(digests: &[(N, Digest)]) -> String {
    digests.iter().map(|(name, digest)| format!("{}  {}\n", digest.sha256, name.as_ref())).collect()
}

/// A configuration as it reads after it was written: 0.1 as an f32 is not what its digits are as an f64.
fn to_value(config: &TrainConfig) -> Value {
    let text = serde_json::to_vec(config).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// A checkpoint whose files are whole.
pub(crate) struct Checkpoint {
    folder: PathBuf,
    state: State,
}

impl Checkpoint {
    /// The checkpoint of an iteration, after every byte of it was read and compared with its digest.
    ///
    /// # Errors
    /// [`TrainError::Damaged`] if a file is missing or not what was written, [`TrainError::Io`] if one cannot be read.
    pub(crate) fn open(folder: &Path, iteration: u64) -> Result<Self, TrainError> {
        let damaged = |name: &str, expected: &str, found: String| TrainError::Damaged {
            path: folder.join(name),
            expected: expected.to_owned(),
            found,
        };
        let failed = |name: &str, error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => damaged(name, "a file", "none".into()),
            _ => TrainError::io(&folder.join(name))(error),
        };
        let read = |name: &str| fs::read(folder.join(name)).map_err(|error| failed(name, error));
        let sums = read_sums(&read(SUMS)?)
            .map_err(|found| damaged(SUMS, "a line of SHA-256 and name for each file of a checkpoint", found))?;
        let compare = |name: &str, expected: &str, found: &Digest| match sums.get(name) {
            Some(sha256) if *sha256 == found.sha256 => Ok(()),
            Some(sha256) => Err(damaged(name, &format!("{expected}SHA-256 {sha256}"), found.to_string())),
            None => Err(damaged(SUMS, &format!("a line for {name}"), "none".into())),
        };
        let text = read(STATE)?;
        compare(STATE, "", &Digest::of(&*text).map_err(|error| failed(STATE, error))?)?;
        let state: State =
            serde_json::from_slice(&text).map_err(|error| damaged(STATE, "the state of a run", error.to_string()))?;
        if state.standing.iteration != iteration {
            let found = format!("iteration {}", state.standing.iteration);
            return Err(damaged(STATE, &format!("iteration {iteration}, as the folder is called"), found));
        }
        thread::scope(|scope| {
            let read = |(name, length): (&'_ String, &u64)| {
                let path = folder.join(name);
                (name.clone(), *length, scope.spawn(move || Digest::of(File::open(path)?)))
            };
            state.lengths.iter().map(read).collect::<Vec<_>>().into_iter().try_for_each(|(name, length, reader)| {
                let found = reader.join().unwrap_or_else(|_| Err(io::Error::other("the thread that read it panicked")));
                compare(&name, &format!("{length} bytes with "), &found.map_err(|error| failed(&name, error))?)
            })
        })?;
        Ok(Self { folder: folder.to_path_buf(), state })
    }

    /// Where the loop stood.
    pub(crate) fn standing(&self) -> &Standing {
        &self.state.standing
    }

    /// Checks that what follows from the iterations so far is still configured as it was. What only says how long to go
    /// on, or what to write when, may change: it takes effect from here on. A value that did not exist when the checkpoint
    /// was written was its default.
    ///
    /// # Errors
    /// [`TrainError::Changed`] about the first value that is not the same.
    pub(crate) fn check(&self, config: &TrainConfig) -> Result<(), TrainError> {
        let before = TrainConfig::deserialize(&self.state.config);
        let before = before.map_or_else(|_| self.state.config.clone(), |before| to_value(&before));
        let now = to_value(config);
        for field in ["optimizer", "schedule", "clip", "accumulate", "precision", "ema_decay", "seed"] {
            if let Some((field, expected, found)) = difference(field, &before[field], &now[field]) {
                return Err(TrainError::Changed { path: self.folder.join(STATE), field, expected, found });
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
        let mut weights = self.tensors(WEIGHTS, all.len())?;
        for (name, variable) in all {
            let like = variable.like();
            let value = weights.get(name, DType::F32, like.dims(), like.device())?;
            variable.set(&value).map_err(TrainError::tensor(name))?;
        }
        let mut known = self.tensors(OPTIMIZER, 3 * optimizer.slots.len())?;
        let mut averages = self.averages()?;
        for slot in &mut optimizer.slots {
            let [first, second, steps] = optimizer_names(slot);
            known.restore(&first, &slot.first_moment)?;
            known.restore(&second, &slot.second_moment)?;
            let value = known.get(&steps, DType::I64, &[], &Device::Cpu)?;
            slot.steps = value.to_scalar::<i64>().map_err(TrainError::tensor(&steps))? as u64;
            slot.narrow().map_err(TrainError::tensor(slot.name))?;
            if let (Some(averages), Some(average)) = (&mut averages, &slot.average) {
                averages.restore(slot.name, average)?;
            }
        }
        (optimizer.loss_scale.factor, optimizer.loss_scale.finite_steps) = self.state.loss_scale;
        optimizer.steps = self.state.optimizer_steps;
        Ok(())
    }

    /// The weights of the model as it would be finished here: means over past steps, where they are kept.
    pub(crate) fn finished_weights(&self) -> Result<Vec<(String, Tensor)>, TrainError> {
        let mut weights = TensorFile::open(self.folder.join(WEIGHTS))?;
        let (names, mut averages) = (weights.names(), self.averages()?);
        let finished = |name: String| {
            let file = averages.as_mut().filter(|averages| averages.has(&name)).unwrap_or(&mut weights);
            let tensor = file.tensor(&name)?;
            Ok((name, tensor))
        };
        names.into_iter().map(finished).collect()
    }

    fn averages(&self) -> Result<Option<TensorFile>, TrainError> {
        let is_there = self.state.lengths.contains_key(AVERAGES);
        is_there.then(|| TensorFile::open(self.folder.join(AVERAGES))).transpose()
    }

    /// A file that is expected to have this many tensors, each of which will be asked for.
    fn tensors(&self, name: &str, expected: usize) -> Result<TensorFile, TrainError> {
        let path = self.folder.join(name);
        let file = TensorFile::open(path.clone())?;
        if file.len() > expected {
            let (expected, found) = (format!("{expected} tensors"), file.len().to_string());
            return Err(TrainError::Mismatch { path, tensor: "(all)".into(), expected, found });
        }
        Ok(file)
    }
}

/// The digests by the names of their files; or what is wrong with them.
fn read_sums(text: &[u8]) -> Result<BTreeMap<String, String>, String> {
    let text = str::from_utf8(text).map_err(|error| error.to_string())?;
    let mut sums = BTreeMap::new();
    for line in text.split_inclusive('\n') {
        let parts = line.strip_suffix('\n').and_then(|line| line.split_once("  "));
        let is_sum = |sum: &str| sum.len() == 64 && sum.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        let known = |found: &str| [OPTIMIZER, WEIGHTS, AVERAGES, STATE].into_iter().find(|name| *name == found);
        match parts.and_then(|(sum, name)| Some((known(name)?, sum))) {
            Some((name, sum)) if is_sum(sum) && sums.insert(name.to_owned(), sum.to_owned()).is_none() => {}
            _ => return Err(format!("{line:?}")),
        }
    }
    Ok(sums)
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    fn optimizer(parameters: &[(String, Var)]) -> Optimizer<'_> {
        Optimizer::new(parameters, &config()).unwrap()
    }

    fn config() -> TrainConfig {
        TrainConfig { ema_decay: Some(0.5), ..TrainConfig::default() }
    }

    /// A checkpoint of one parameter.
    fn checkpoint() -> (tempfile::TempDir, [(String, Var); 1]) {
        let dir = tempfile::tempdir().unwrap();
        let parameters = [("a".to_owned(), Var::new(&[1f32, 2.0], &Device::Cpu).unwrap())];
        let standing = Standing { iteration: 3, ..Standing::default() };
        write(dir.path(), dir.path(), &standing, &config(), &optimizer(&parameters)).unwrap();
        (dir, parameters)
    }

    #[test]
    fn any_flipped_bit_is_found() {
        let (dir, _) = checkpoint();
        Checkpoint::open(dir.path(), 3).unwrap();
        let mut flipped = 0;
        for file in [WEIGHTS, OPTIMIZER, AVERAGES, STATE, SUMS] {
            let path = dir.path().join(file);
            let whole = fs::read(&path).unwrap();
            for place in 0..whole.len() {
                let mut bytes = whole.clone();
                bytes[place] ^= 1 << (place % 8);
                fs::write(&path, &bytes).unwrap();
                let error = Checkpoint::open(dir.path(), 3).err().unwrap_or_else(|| panic!("{file}: byte {place}"));
                assert!(matches!(error, TrainError::Damaged { .. }), "{file}: byte {place}: {error}");
                flipped += 1;
            }
            fs::write(&path, whole).unwrap();
        }
        assert!(flipped > 2000);
        Checkpoint::open(dir.path(), 3).unwrap();
    }

    #[test]
    fn what_is_restored_is_what_was_written() {
        let (dir, [(_, a)]) = checkpoint();
        a.set(&a.as_detached_tensor().zeros_like().unwrap()).unwrap();
        let parameters = [("a".to_owned(), a)];
        let checkpoint = Checkpoint::open(dir.path(), 3).unwrap();
        checkpoint.restore(&mut optimizer(&parameters)).unwrap();
        assert_eq!(parameters[0].1.to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        let error = Checkpoint::open(dir.path(), 4).err().unwrap().to_string();
        assert!(
            error.ends_with("state.json: expected iteration 4, as the folder is called, found iteration 3"),
            "{error}"
        );
    }

    #[test]
    fn other_readers_understand_the_files() {
        let (dir, _) = checkpoint();
        let bytes = fs::read(dir.path().join(OPTIMIZER)).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("steps.a").unwrap().shape(), [0usize; 0]);
        let weights = candle_core::safetensors::load(dir.path().join(WEIGHTS), &Device::Cpu).unwrap();
        assert_eq!(weights["a"].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
    }

    #[test]
    fn a_value_that_did_not_exist_was_its_default() {
        let (dir, _) = checkpoint();
        let mut checkpoint = Checkpoint::open(dir.path(), 3).unwrap();
        checkpoint.state.config.as_object_mut().unwrap().remove("accumulate");
        checkpoint.check(&config()).unwrap();
        let error = checkpoint.check(&TrainConfig { accumulate: 2, ..config() }).unwrap_err().to_string();
        assert!(error.ends_with("the run began with accumulate = 1, found 2 now"), "{error}");
    }
}
