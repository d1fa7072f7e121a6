//! What a run leaves on the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::checkpoint::{self, Checkpoint};
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::metrics::{self, MetricsRow};
use crate::optimizer::Optimizer;

/// Beginnings of the names of folders that are being written and removed: leftovers, if nobody is at it.
const WRITING: &str = ".writing-";
const REMOVING: &str = ".removing-";

/// The folder of a run.
///
/// ```text
/// metrics.jsonl                 a row a report
/// tensorboard/                  the same in event files, one each time training starts or goes on
/// checkpoints/0001000/          after 1000 iterations
///     weights.safetensors       the parameters
///     optimizer.safetensors     first_moment.NAME, second_moment.NAME, steps.NAME of each parameter
///     state.json                iteration, elapsed time, configuration (with the seed)
/// ```
///
/// A checkpoint is written aside, flushed to the disk and renamed: it is there wholly or not at all. Only one process may
/// train in a folder at a time.
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
        fs::create_dir_all(&checkpoints).map_err(TrainError::io(&checkpoints))?;
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

    /// The newest checkpoint that is whole.
    ///
    /// # Errors
    /// [`TrainError::Damaged`] if there are checkpoints, but none is.
    pub(crate) fn latest(&self) -> Result<Option<Checkpoint>, TrainError> {
        let mut newest = None;
        for (iteration, path) in self.checkpoints()?.into_iter().rev() {
            match Checkpoint::open(&path, iteration) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error @ TrainError::Damaged { .. }) => newest = newest.or(Some(error)),
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
                fs::remove_dir_all(&path).map_err(TrainError::io(&path))?;
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

    /// Adds a row of metrics.
    pub(crate) fn append(&self, row: &MetricsRow) -> Result<(), TrainError> {
        let path = self.metrics_path();
        let append = || {
            let mut line = serde_json::to_vec(row)?;
            line.push(b'\n');
            let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
            file.write_all(&line)?;
            file.sync_data()
        };
        append().map_err(TrainError::io(&path))
    }

    /// Writes a checkpoint, then removes all but the newest `config.keep_checkpoints`.
    pub(crate) fn save(
        &self,
        iteration: u64,
        elapsed: Duration,
        config: &TrainConfig,
        optimizer: &Optimizer,
    ) -> Result<(), TrainError> {
        let parent = self.checkpoints_path();
        let path = parent.join(format!("{iteration:07}"));
        let write = || {
            let mut builder = tempfile::Builder::new();
            builder.prefix(WRITING);
            // As an ordinary new folder, which the umask restricts; temporary ones are private otherwise.
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
            let aside = builder.tempdir_in(&parent)?;
            checkpoint::write(aside.path(), iteration, elapsed, config, optimizer)?;
            fs::rename(aside.path(), &path)?;
            sync_folder(&parent)
        };
        write().map_err(TrainError::io(&path))?;
        let checkpoints = self.checkpoints()?;
        let surplus = checkpoints.len().saturating_sub(config.keep_checkpoints);
        checkpoints[..surplus].iter().try_for_each(|(_, path)| remove(path))
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
