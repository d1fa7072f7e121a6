//! What a run leaves on the disk.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::Progress;
use crate::best::Best;
use crate::checkpoint::{self, Checkpoint, Standing};
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::metrics::{self, MetricsRow};
use crate::optimizer::Optimizer;

/// Beginnings of the names of files and folders that are being written and removed: leftovers, if nobody is at it.
const WRITING: &str = ".writing-";
const REMOVING: &str = ".removing-";
const BEST: &str = "best.json";

/// The folder of a run.
///
/// ```text
/// metrics.jsonl                 a row a report
/// tensorboard/                  the same in event files, one each time training starts or goes on
/// checkpoints/0001000/          after 1000 iterations
///     weights.safetensors       the parameters
///     optimizer.safetensors     first_moment.NAME, second_moment.NAME, steps.NAME of each parameter
///     ema.safetensors           their means over past steps, where these are kept
///     state.json                iteration, elapsed time, configuration (with the seed), and what the loop knows
///     SHA256SUMS                digests of the others, for `sha256sum -c`
/// checkpoints/best.json         which is the best
/// lock                          held by the process that trains
/// ```
///
/// A checkpoint is written aside, flushed to the disk and renamed: it is there wholly or not at all.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// The folder at `path`, which is made if it is not there.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be made.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, TrainError> {
        let run = Self { path: path.into() };
        let checkpoints = run.checkpoints_path();
        if !checkpoints.exists() {
            fs::create_dir_all(&checkpoints).map_err(TrainError::io(&checkpoints))?;
            let above = run.path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
            for folder in [&run.path, above] {
                sync_folder(folder).map_err(TrainError::io(folder))?;
            }
        }
        Ok(run)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its `metrics.jsonl`, for [`read_metrics`](crate::read_metrics).
    pub fn metrics_path(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// Where its [`EventFile`](crate::EventFile)s are: the folder to give TensorBoard.
    pub fn tensorboard_path(&self) -> PathBuf {
        self.path.join("tensorboard")
    }

    fn checkpoints_path(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Its checkpoints with their iterations, oldest first. One that the disk has damaged is among them.
    ///
    /// # Errors
    /// [`TrainError::Io`] if the folder cannot be read.
    pub fn checkpoints(&self) -> Result<Vec<(u64, PathBuf)>, TrainError> {
        let number = |(name, path): (String, PathBuf)| {
            let digits = name.len() >= 7 && name.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| name.parse().ok().map(|iteration| (iteration, path)))?
        };
        let mut found: Vec<_> = entries(&self.checkpoints_path())?.into_iter().filter_map(number).collect();
        found.sort();
        Ok(found)
    }

    /// The best checkpoint so far, if one was made that could be compared; see [`TrainConfig::keep_best`].
    ///
    /// # Errors
    /// [`TrainError::Io`] if `best.json` cannot be read, [`TrainError::Damaged`] if it does not tell.
    pub fn best(&self) -> Result<Option<(Best, PathBuf)>, TrainError> {
        let path = self.checkpoints_path().join(BEST);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(TrainError::io(&path)(error)),
        };
        let best: Best = serde_json::from_slice(&text).map_err(|error| TrainError::Damaged {
            path,
            expected: "iteration and score of a checkpoint".to_owned(),
            found: error.to_string(),
        })?;
        let checkpoint = self.checkpoint(best.iteration);
        Ok(checkpoint.exists().then_some((best, checkpoint)))
    }

    /// The weights of a checkpoint, after it was seen to be whole: what a finished model would have, `f32` on the host.
    ///
    /// # Errors
    /// [`TrainError::Damaged`] if it is not whole, or [`TrainError::Io`] if it cannot be read.
    pub fn weights(&self, iteration: u64) -> Result<Vec<(String, Tensor)>, TrainError> {
        Checkpoint::open(&self.checkpoint(iteration), iteration)?.finished_weights()
    }

    /// Where the checkpoint of an iteration is.
    pub(crate) fn checkpoint(&self, iteration: u64) -> PathBuf {
        self.checkpoints_path().join(format!("{iteration:07}"))
    }

    /// Keeps other processes from training in the folder until it is dropped, or this process is no more.
    ///
    /// # Errors
    /// [`TrainError::Locked`] if another has it. Where the file system has no locks, nothing is kept from anyone.
    pub(crate) fn lock(&self) -> Result<File, TrainError> {
        let path = self.path.join("lock");
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(TrainError::io(&path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(TrainError::Locked { path }),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
        }
    }

    /// The newest checkpoint that is whole. Those that are not are told.
    ///
    /// # Errors
    /// [`TrainError::Damaged`] if there are checkpoints, but none is.
    pub(crate) fn latest(&self, progress: &mut dyn Progress) -> Result<Option<Checkpoint>, TrainError> {
        let mut newest = None;
        for (iteration, path) in self.checkpoints()?.into_iter().rev() {
            match Checkpoint::open(&path, iteration) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error @ TrainError::Damaged { .. }) => {
                    progress.warning(&format!("{error}; this checkpoint is not used"));
                    newest = newest.or(Some(error));
                }
                Err(error) => return Err(error),
            }
        }
        newest.map_or(Ok(None), Err)
    }

    /// Makes the folder what it was after `iteration`: drops later rows of metrics, later checkpoints (which are damaged,
    /// or this would not be the latest), and what was being written. Returns the last row left.
    pub(crate) fn rewind(&self, iteration: u64) -> Result<Option<MetricsRow>, TrainError> {
        for (name, path) in entries(&self.checkpoints_path())? {
            if name.starts_with(WRITING) || name.starts_with(REMOVING) {
                let remove = if path.is_dir() { fs::remove_dir_all } else { fs::remove_file };
                remove(&path).map_err(TrainError::io(&path))?;
            }
        }
        for (_, path) in self.checkpoints()?.into_iter().filter(|(number, _)| *number > iteration) {
            remove(&path)?;
        }
        let path = self.metrics_path();
        let (mut last, mut end) = (None, 0);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(TrainError::io(&path)(error)),
        };
        for row in metrics::parse(&path, &text) {
            let (row, row_end) = row?;
            if row.iteration > iteration {
                break;
            }
            (last, end) = (Some(row), row_end);
        }
        let truncate = || OpenOptions::new().write(true).open(&path)?.set_len(end as u64);
        truncate().map_err(TrainError::io(&path))?;
        Ok(last)
    }

    /// Adds a row of metrics: wholly, or not at all.
    pub(crate) fn append(&self, row: &MetricsRow) -> Result<(), TrainError> {
        let path = self.metrics_path();
        let append = || {
            let mut line = serde_json::to_vec(row)?;
            line.push(b'\n');
            let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
            let end = file.metadata()?.len();
            let written = file.write_all(&line).and_then(|()| file.sync_data());
            if written.is_err() {
                // What is left of a line is taken back at the latest when the run is resumed.
                let _ = file.set_len(end);
            } else if end == 0 {
                sync_folder(&self.path)?;
            }
            written
        };
        append().map_err(TrainError::io(&path))
    }

    /// Writes a checkpoint and which is the best, then removes all but the newest `config.keep_checkpoints` and the best.
    pub(crate) fn save(
        &self,
        standing: &Standing,
        config: &TrainConfig,
        optimizer: &Optimizer,
    ) -> Result<(), TrainError> {
        let parent = self.checkpoints_path();
        let path = self.checkpoint(standing.iteration);
        let mut builder = tempfile::Builder::new();
        builder.prefix(WRITING);
        // As an ordinary new folder, which the umask restricts; temporary ones are private otherwise.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        // On an error, what was written goes.
        let aside = builder.tempdir_in(&parent).map_err(TrainError::io(&path))?;
        checkpoint::write(aside.path(), &path, standing, config, optimizer)?;
        let rename = || {
            fs::rename(aside.path(), &path)?;
            sync_folder(&parent)
        };
        rename().map_err(TrainError::io(&path))?;
        let best = standing.judge.best.as_ref().filter(|_| config.keep_best);
        self.write_best(best)?;
        let checkpoints = self.checkpoints()?;
        let surplus = checkpoints.len().saturating_sub(config.keep_checkpoints);
        let is_best = |iteration| best.is_some_and(|best| best.iteration == iteration);
        checkpoints[..surplus]
            .iter()
            .filter(|(iteration, _)| !is_best(*iteration))
            .try_for_each(|(_, path)| remove(path))
    }

    /// Writes which checkpoint is the best.
    pub(crate) fn write_best(&self, best: Option<&Best>) -> Result<(), TrainError> {
        let (parent, path) = (self.checkpoints_path(), self.checkpoints_path().join(BEST));
        let write = || {
            let Some(best) = best else {
                return if path.exists() { fs::remove_file(&path) } else { Ok(()) };
            };
            let mut builder = tempfile::Builder::new();
            builder.prefix(WRITING);
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
            let mut aside = builder.tempfile_in(&parent)?;
            aside.write_all(&serde_json::to_vec_pretty(best)?)?;
            aside.as_file().sync_all()?;
            aside.persist(&path)?;
            sync_folder(&parent)
        };
        write().map_err(TrainError::io(&path))
    }
}

/// Removes a checkpoint; one that is half removed does not have its name any more.
fn remove(checkpoint: &Path) -> Result<(), TrainError> {
    let name = checkpoint.file_name().unwrap_or_default().to_string_lossy();
    let aside = checkpoint.with_file_name(format!("{REMOVING}{name}"));
    let remove = || {
        fs::rename(checkpoint, &aside)?;
        fs::remove_dir_all(&aside)
    };
    remove().map_err(TrainError::io(checkpoint))
}

/// Names and paths of what is in a folder.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, TrainError> {
    let read = || {
        let named = |entry: fs::DirEntry| (entry.file_name().to_string_lossy().into_owned(), entry.path());
        fs::read_dir(folder)?.map(|entry| entry.map(named)).collect::<io::Result<_>>()
    };
    read().map_err(TrainError::io(folder))
}

/// Makes renames in a folder last; only Unix has a way to ask for it.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn row() -> MetricsRow {
        let losses = BTreeMap::from([("itc".to_owned(), 1.5)]);
        MetricsRow {
            iteration: 1,
            losses,
            score: None,
            lr: 0.1,
            grad_norm: 2.0,
            loss_scale: None,
            images_per_second: 3.0,
            elapsed_seconds: 4.0,
            peak_memory_mib: None,
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_row_that_finds_no_room_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::new(dir.path()).unwrap();
        std::os::unix::fs::symlink("/dev/full", run.metrics_path()).unwrap();
        let error = run.append(&row()).unwrap_err().to_string();
        assert!(
            error.contains("metrics.jsonl: ") && error.ends_with("once there is room, the run can be resumed"),
            "{error}"
        );
    }

    #[test]
    fn the_best_may_be_gone() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::new(dir.path()).unwrap();
        assert_eq!(run.best().unwrap(), None);
        let best = Best { iteration: 5, score: 0.5, by: crate::Criterion::Score, losses: 2 };
        run.write_best(Some(&best)).unwrap();
        assert_eq!(run.best().unwrap(), None);
        fs::create_dir(run.checkpoint(5)).unwrap();
        assert_eq!(run.best().unwrap(), Some((best, run.checkpoint(5))));
        run.write_best(None).unwrap();
        assert_eq!(run.best().unwrap(), None);
        fs::write(dir.path().join("checkpoints/best.json"), "{}").unwrap();
        let error = run.best().unwrap_err().to_string();
        assert!(error.contains("best.json: expected iteration and score of a checkpoint"), "{error}");
    }
}
