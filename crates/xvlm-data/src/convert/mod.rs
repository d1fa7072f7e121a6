//! Pre-training shards made of published data sets.
//!
//! The annotations are read first, an image a line, into a file beside the shards; shuffled, that says which image goes into
//! which shard. Then each shard is written on its own, by several workers: its images are looked at, made smaller if that is
//! asked for, and put into it. A conversion that was interrupted goes on where it was: finished shards are kept, and since
//! the same settings give the same shards, the rest fits to them.
//!
//! Memory: 12 bytes an image of the data set (and what the reader of the data set holds), and one image a worker.

mod manifest;
mod picture;
mod spool;
mod write;

use std::collections::HashSet;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use self::manifest::{Input, MANIFEST, Manifest, Shard};
use self::manifest::{JOURNAL, Journal};
use self::spool::{Planned, Spool, SpoolWriter};
use self::write::{Output, UNFINISHED};
use crate::annotations::source::clip;
use crate::annotations::{Reason, Records, Report};
use crate::error::DataError;
use crate::json::io_error;
use crate::records::{ImageSource, Record};
use crate::shards;

/// What a shard is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// JSON lines with the paths of the images: absolute ones, which are read with `image_root: /`, but for images that lie in
    /// the folder of the shards.
    JsonPaths,
    /// JSON lines with the images in base64.
    #[default]
    JsonImages,
    /// A tar archive in the order of WebDataset: an image, then its JSON, under one name.
    Tar,
}

impl Form {
    fn of_shard(self) -> shards::Form {
        match self {
            Self::JsonPaths | Self::JsonImages => shards::Form::Lines,
            Self::Tar => shards::Form::Tar,
        }
    }
}

/// How a shard is compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Not at all: records can be read at any place.
    #[default]
    None,
    /// With gzip.
    Gzip,
    /// With zstd.
    Zstd,
}

/// How shards are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertOptions {
    /// The folder to write; it must not exist, be empty, or hold an unfinished conversion of the same settings.
    pub out: PathBuf,
    /// What a shard is.
    pub form: Form,
    /// How it is compressed.
    pub compression: Compression,
    /// Images of a shard; fewer where some of them cannot be used.
    pub records_per_shard: usize,
    /// Mixes the images over all shards, by this seed; otherwise they stay in the order of their files.
    pub shuffle: Option<u64>,
    /// Makes images smaller of which a side is longer than this, in pixels. Not for [`Form::JsonPaths`].
    pub max_side: Option<u32>,
    /// Quality, 1 to 100, of the JPEGs that smaller images are written as.
    pub quality: u8,
    /// Shards written at a time.
    pub workers: usize,
}

impl ConvertOptions {
    /// 1000 images a shard, embedded in JSON lines, in the order of the files.
    #[must_use]
    pub fn new(out: impl Into<PathBuf>) -> Self {
        Self {
            out: out.into(),
            form: Form::default(),
            compression: Compression::default(),
            records_per_shard: 1000,
            shuffle: None,
            max_side: None,
            quality: 90,
            workers: 1,
        }
    }

    fn check(&self) -> Result<(), DataError> {
        let wrong = |field, expected: &str, found: String| {
            Err(DataError::Config { field, expected: expected.to_owned(), found })
        };
        if self.records_per_shard == 0 {
            return wrong("records_per_shard", "at least 1", "0".to_owned());
        }
        if self.workers == 0 {
            return wrong("workers", "at least 1", "0".to_owned());
        }
        if !(1..=100).contains(&self.quality) {
            return wrong("quality", "1 to 100", self.quality.to_string());
        }
        match self.max_side {
            Some(0) => wrong("max_side", "at least 1 pixel", "0".to_owned()),
            Some(side) if self.form == Form::JsonPaths => {
                wrong("max_side", "images inside the shards, not paths of their files", side.to_string())
            }
            _ => Ok(()),
        }
    }

    fn extension(&self) -> &'static str {
        match (self.form, self.compression) {
            (Form::Tar, Compression::None) => "tar",
            (Form::Tar, Compression::Gzip) => "tar.gz",
            (Form::Tar, Compression::Zstd) => "tar.zst",
            (_, Compression::None) => "jsonl",
            (_, Compression::Gzip) => "jsonl.gz",
            (_, Compression::Zstd) => "jsonl.zst",
        }
    }
}

/// What is converted.
#[derive(Debug, Clone)]
pub struct Job {
    /// The data set's name: shards are called after it. Letters, digits, `-` and `_`.
    pub name: String,
    /// Files that the shards depend on.
    pub inputs: Vec<PathBuf>,
    /// Settings of the data set's reader that the shards depend on.
    pub settings: Value,
}

/// Is told how far a conversion is.
pub trait ConvertProgress {
    /// So many images were found in the annotations, of about `of` if that is known.
    fn reading(&mut self, images: u64, of: Option<u64>) {
        let _ = (images, of);
    }

    /// So many of the images are in finished shards.
    fn writing(&mut self, images: u64, of: u64) {
        let _ = (images, of);
    }

    /// Asked between images and shards: whether to stop; what is finished is kept for the next time.
    fn stop(&mut self) -> bool {
        false
    }
}

/// Tells nobody.
impl ConvertProgress for () {}

const SPOOL: &str = ".annotations.jsonl";
const LOCK: &str = ".lock";

/// Writes shards of what `open` yields, and returns what is in them.
///
/// # Errors
///
/// [`DataError::Config`] if an option makes no sense, or the folder holds something else; [`DataError::Io`]; whatever `open`
/// and the stream fail with; [`DataError::Stopped`] if asked to stop; [`DataError::NothingLeft`] if not a single image can be
/// used. Single images that cannot be used are counted in the manifest.
pub fn convert(
    job: &Job,
    open: impl FnOnce() -> Result<Records, DataError>,
    options: &ConvertOptions,
    progress: &mut dyn ConvertProgress,
) -> Result<Manifest, DataError> {
    options.check()?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if job.name.is_empty() || !job.name.bytes().all(plain) {
        let expected = "letters, digits, - and _".to_owned();
        return Err(DataError::Config { field: "name", expected, found: format!("{:?}", job.name) });
    }
    let settings = json!({
        "reader": job.settings,
        "form": options.form,
        "compression": options.compression,
        "records_per_shard": options.records_per_shard,
        "shuffle": options.shuffle,
        "max_side": options.max_side,
        "quality": options.max_side.map(|_| options.quality),
    });
    let manifest = Manifest::new(&job.name, settings, &job.inputs)?;
    let (_lock, mut manifest) = claim(&options.out, manifest)?;
    if manifest.complete {
        return Ok(manifest);
    }

    let (spool, skipped) = read(open()?, options, progress)?;
    let total = spool.len().div_ceil(options.records_per_shard);
    manifest.shards.retain(|shard| shard.number < total && is_there(&options.out, shard));
    let read = (spool.len() as u64, spool.digest());
    if let Some(before) = manifest.read.filter(|&before| before != read && !manifest.shards.is_empty()) {
        let expected = format!("{}: annotations that tell what they told before", options.out.display());
        let found = match (before.0, read.0) {
            (before, now) if before == now => format!("{now} images of which something else is told"),
            (before, now) => format!("{now} images instead of {before}"),
        };
        return Err(DataError::Config { field: "out", expected, found });
    }
    (manifest.read, manifest.total, manifest.skipped) = (Some(read), Some(total), skipped);
    manifest.write(&options.out)?;

    let finished = std::mem::take(&mut manifest.shards);
    let journal = Journal::create(&options.out)?;
    let work = Work {
        job,
        options,
        spool: &spool,
        finished: Mutex::new(Finished { shards: finished, journal }),
        failed: AtomicBool::new(false),
    };
    work.run(total, progress)?;
    let Finished { shards, journal } = work.finished.into_inner().unwrap_or_else(PoisonError::into_inner);
    drop(journal);
    manifest.shards = shards;
    manifest.shards.sort_by_key(|shard| shard.number);
    if manifest.records() == 0 {
        let reasons = manifest.left_out().to_string();
        // Nothing to keep: the next try looks at the images again.
        manifest.shards.clear();
        manifest.write(&options.out)?;
        remove(&options.out, &[JOURNAL, SPOOL, LOCK])?;
        return Err(DataError::NothingLeft { name: job.name.clone(), reasons });
    }
    manifest.complete = true;
    manifest.write(&options.out)?;
    remove(&options.out, &[JOURNAL, SPOOL, LOCK])?;
    Ok(manifest)
}

/// Removes files that may be there.
fn remove(folder: &Path, names: &[&str]) -> Result<(), DataError> {
    names.iter().try_for_each(|name| {
        let path = folder.join(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != ErrorKind::NotFound => Err(io_error(&path, source)),
            _ => Ok(()),
        }
    })
}

/// Makes the folder this conversion's own: nobody else's, and with shards of the same settings only.
fn claim(out: &Path, wanted: Manifest) -> Result<(File, Manifest), DataError> {
    let refuse = |expected: &str, found: String| {
        Err(DataError::Config { field: "out", expected: format!("{}: {expected}", out.display()), found })
    };
    std::fs::create_dir_all(out).map_err(|source| io_error(out, source))?;
    let known = Manifest::read(out)?;
    let entries = std::fs::read_dir(out).map_err(|source| io_error(out, source))?;
    let mut unfinished = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| io_error(out, source))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if UNFINISHED.iter().any(|start| name.starts_with(start)) {
            unfinished.push(entry.path());
        } else if known.is_none() && name != SPOOL && name != LOCK {
            return refuse(
                "a folder that is empty or holds an unfinished conversion",
                format!("{name} without {MANIFEST}"),
            );
        }
    }
    let path = out.join(LOCK);
    let lock = File::create(&path).map_err(|source| io_error(&path, source))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            return refuse("no other conversion at work", "one that holds its lock".to_owned());
        }
        Err(std::fs::TryLockError::Error(source)) => return Err(io_error(&path, source)),
    }
    // Another conversion may have been at work until it let go of the lock.
    let manifest = match Manifest::read(out)? {
        None => {
            wanted.write(out)?;
            wanted
        }
        Some(mut known) => {
            if let Err((field, found)) = wanted.same_work(&known) {
                drop(lock);
                if known.complete {
                    let _ = std::fs::remove_file(&path);
                }
                return refuse(&format!("shards of the same {field}"), found);
            }
            // Of what somebody has taken away since, it goes on.
            known.complete &= known.shards.iter().all(|shard| is_there(out, shard));
            if known.complete {
                remove(out, &[JOURNAL, SPOOL, LOCK])?;
            }
            known
        }
    };
    for path in unfinished {
        std::fs::remove_file(&path).map_err(|source| io_error(&path, source))?;
    }
    Ok((lock, manifest))
}

fn is_there(out: &Path, shard: &Shard) -> bool {
    let Some(file) = &shard.file else { return true };
    std::fs::metadata(out.join(file)).is_ok_and(|metadata| metadata.is_file() && metadata.len() == shard.bytes)
}

/// Reads the annotations into the spool.
fn read(
    mut records: Records,
    options: &ConvertOptions,
    progress: &mut dyn ConvertProgress,
) -> Result<(Spool, Report), DataError> {
    const SOME: usize = 1 << 10;
    let mut spool = SpoolWriter::new(&options.out.join(SPOOL))?;
    let of = records.images();
    for annotated in records.by_ref() {
        spool.add(annotated?)?;
        if spool.len() % SOME == 0 {
            progress.reading(spool.len() as u64, of);
            if progress.stop() {
                return Err(DataError::Stopped);
            }
        }
    }
    progress.reading(spool.len() as u64, of);
    Ok((spool.finish(options.shuffle)?, records.report().clone()))
}

/// What the workers share.
struct Work<'a> {
    job: &'a Job,
    options: &'a ConvertOptions,
    spool: &'a Spool,
    finished: Mutex<Finished>,
    failed: AtomicBool,
}

/// The shards that are finished, in the order in which they were.
struct Finished {
    shards: Vec<Shard>,
    journal: Journal,
}

impl Work<'_> {
    fn run(&self, total: usize, progress: &mut dyn ConvertProgress) -> Result<(), DataError> {
        let finished: HashSet<usize> = self.locked().shards.iter().map(|shard| shard.number).collect();
        let todo: Vec<usize> = (0..total).filter(|number| !finished.contains(number)).collect();
        let images = |number: usize| self.spool.of_shard(number, self.options.records_per_shard).len() as u64;
        let (mut done, of) = (finished.into_iter().map(images).sum(), self.spool.len() as u64);
        progress.writing(done, of);
        let next = AtomicUsize::new(0);
        let (tell, told) = mpsc::channel();
        let mut outcome = Ok(());
        std::thread::scope(|scope| {
            for _ in 0..self.options.workers.min(todo.len()) {
                let (tell, next, todo) = (tell.clone(), &next, &todo);
                scope.spawn(move || {
                    while let Some(&number) = todo.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let shard = self.shard(number);
                        let stop = shard.is_err();
                        if stop {
                            self.failed.store(true, Ordering::Relaxed);
                        }
                        if tell.send(shard.map(|()| number)).is_err() || stop {
                            return;
                        }
                    }
                });
            }
            drop(tell);
            for shard in told {
                match shard {
                    Ok(number) => {
                        done += images(number);
                        progress.writing(done, of);
                        if progress.stop() {
                            self.failed.store(true, Ordering::Relaxed);
                            outcome = std::mem::replace(&mut outcome, Ok(())).and(Err(DataError::Stopped));
                        }
                    }
                    // The workers that stop because of the first failure are no news.
                    Err(DataError::Stopped) if outcome.is_err() => {}
                    Err(error) if matches!(outcome, Ok(()) | Err(DataError::Stopped)) => outcome = Err(error),
                    Err(_) => {}
                }
            }
        });
        outcome
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Finished> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a shard, and notes that it is finished.
    fn shard(&self, number: usize) -> Result<(), DataError> {
        let ConvertOptions { out, form, compression, records_per_shard, .. } = self.options;
        let name = format!("{}-{number:05}.{}", self.job.name, self.options.extension());
        let mut shard = Shard {
            number,
            file: None,
            bytes: 0,
            records: 0,
            captions: 0,
            elems: 0,
            questions: 0,
            skipped: Report::default(),
        };
        let mut output = Output::new(out, &name, *form, *compression)?;
        let mut file = self.spool.open()?;
        for &place in self.spool.of_shard(number, *records_per_shard) {
            if self.failed.load(Ordering::Relaxed) {
                return Err(DataError::Stopped);
            }
            let Some(record) = self.record(self.spool.read(&mut file, place)?, &mut shard.skipped)? else { continue };
            shard.records += 1;
            shard.captions += record.captions.len() as u64;
            shard.elems += record.elems.len() as u64;
            shard.questions += record.questions.len() as u64;
            output.add(&record)?;
        }
        if shard.records > 0 {
            shard.bytes = output.finish()?;
            shard.file = Some(name);
        }
        let mut finished = self.locked();
        finished.journal.add(&shard)?;
        finished.shards.push(shard);
        Ok(())
    }

    /// An image as it goes into a shard; `None`, and counted, if it cannot be used.
    fn record(&self, image: Planned, skipped: &mut Report) -> Result<Option<Record>, DataError> {
        let ConvertOptions { form, max_side, quality, .. } = self.options;
        let Planned { size: annotated, fractions, mut record } = image;
        let ImageSource::Path(path) = &record.image else { return Ok(Some(record)) };
        let path = std::path::absolute(path).map_err(|source| io_error(path, source))?;
        let origin = record.origin.clone();
        let name = || format!("{origin}: {}", path.display());
        let looked = match form {
            Form::JsonPaths if path.to_str().is_none() => {
                Err((Reason::UnreadableImage, "a path that is no UTF-8".to_owned()))
            }
            Form::JsonPaths => picture::file_size(&path).map(|size| (size, size, ImageSource::Path(path.clone()))),
            Form::JsonImages | Form::Tar => picture::read(&path, *max_side, *quality)
                .map(|file| (file.size, file.new_size, ImageSource::Bytes(file.bytes.into()))),
        };
        let (size, new_size, source) = match looked {
            Ok(looked) => looked,
            Err((reason, found)) => {
                skipped.skip(reason, || format!("{}: {found}", name()));
                return Ok(None);
            }
        };
        let other = annotated.filter(|&annotated| annotated != size && !record.elems.is_empty());
        if let Some((width, height)) = other {
            let found = || format!("{}: expected {width}x{height}, found {}x{}", name(), size.0, size.1);
            skipped.skip(Reason::OtherSize, found);
            return Ok(None);
        }
        record.image = source;
        record.elems.retain_mut(|element| {
            let scaled = scale(element.bbox, if fractions { (1, 1) } else { size }, new_size);
            let clipped = clip(scaled, new_size.0, new_size.1);
            match clipped {
                Some(clipped) => element.bbox = clipped,
                None => skipped.skip(Reason::DegenerateBox, || {
                    format!(
                        "{origin}: box {:?}, of {}x{} pixels made {}x{}",
                        element.bbox, size.0, size.1, new_size.0, new_size.1
                    )
                }),
            }
            clipped.is_some()
        });
        if record.captions.is_empty() && record.elems.is_empty() && record.questions.is_empty() {
            skipped.skip(Reason::NoText, name);
            return Ok(None);
        }
        Ok(Some(record))
    }
}

/// A box of an image of size `from` in that image made `to`.
fn scale([x, y, w, h]: [f32; 4], from: (u32, u32), to: (u32, u32)) -> [f32; 4] {
    let along = |number: f32, from: u32, to: u32| (f64::from(number) * f64::from(to) / f64::from(from)) as f32;
    let ((fw, fh), (tw, th)) = (from, to);
    [along(x, fw, tw), along(y, fh, th), along(w, fw, tw), along(h, fh, th)]
}
