//! Working through a large data set: in batches, in several processes, with answers that outlast an interruption.
//!
//! With a folder, answers are written to `NAME.jsonl` (in several processes `NAME.1.jsonl`, …) as they come: a line that says
//! what is asked of what, then a line a unit of work. A sweep that is resumed reads them, whatever the number of processes was,
//! and asks for the rest. A line that was cut short, wherever in it, counts as not written, and is taken away. While a process
//! writes, no other can have its file.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use xvlm_data::{DataError, Picture};
use xvlm_train::TrainError;
use xvlm_train::ranks::{self, Alone, Communicator, Gather};

use crate::Counter;
use crate::error::{SweepProblem, TaskError};
use crate::model::{ImageTokens, Model};

/// Bytes of answers that processes send each other at a time, of all of them together: well below the 2³¹ that MPI can count.
const AT_ONCE: usize = 1 << 28;

/// How a data set is worked through.
pub struct Sweep<'a> {
    /// Where answers are kept as they come; in memory alone if there is no folder.
    pub folder: Option<PathBuf>,
    /// Go on from the answers in the folder. Otherwise there must be none.
    pub resume: bool,
    /// What the answers depend on beside the items and the task's own options, such as the model: a sweep is resumed only if
    /// all of it is the same.
    pub about: Value,
    /// Becomes true when the sweep should stop after the batch it is at.
    pub stop: Arc<AtomicBool>,
    /// The processes that share the work. All of them get all answers.
    pub ranks: Arc<dyn Communicator>,
    /// Share of units that may be left out because of broken data.
    pub max_bad_fraction: f64,
    /// Told how many units of this process are done, of how many.
    pub counter: Counter<'a>,
}

/// One piece of work.
pub struct Work {
    /// Names the file of answers.
    pub name: &'static str,
    /// What the answers depend on: the task's options.
    pub options: Value,
    /// Units at a time.
    pub batch: usize,
}

/// Something that is left out, and so not scored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Its place in the list, from 0.
    pub item: usize,
    /// What is wrong with it.
    pub problem: String,
}

/// The answers to a list of items.
#[derive(Clone, Debug)]
pub struct Answers<A> {
    /// An answer for each item, but for those that are left out.
    pub given: Vec<Option<A>>,
    /// What is left out, in the order of the list.
    pub left_out: Vec<LeftOut>,
}

impl<A> Answers<A> {
    /// The items that have answers, with them.
    pub fn split<T>(self, items: Vec<T>) -> (Vec<T>, Vec<A>, Vec<LeftOut>) {
        let answered = items.into_iter().zip(self.given).filter_map(|(item, answer)| Some((item, answer?)));
        let (items, answers) = answered.unzip();
        (items, answers, self.left_out)
    }
}

/// What asks something about an image.
pub(crate) trait Item {
    /// The image's file.
    fn image(&self) -> &Path;
    /// What is asked.
    fn text(&self) -> &str;
}

/// What a file of answers begins with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Heading {
    work: String,
    about: Value,
    options: Value,
    units: usize,
    /// SHA-256 of the units' names.
    digest: String,
}

/// What is there of an interrupted sweep.
#[derive(Default)]
struct Kept {
    /// The answers, by unit.
    lines: BTreeMap<usize, Line>,
    /// Bytes of this process's file that are whole lines.
    whole: u64,
    /// Bytes of it after these, of a line that was cut short.
    cut: u64,
}

/// What became of a unit.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Line {
    unit: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    answer: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl<'a> Sweep<'a> {
    /// In this process and in memory; nothing may be broken.
    pub fn new(counter: Counter<'a>) -> Self {
        let (folder, resume, about, stop) = (None, false, Value::Null, Arc::default());
        Self { folder, resume, about, stop, ranks: Arc::new(Alone), max_bad_fraction: 0.0, counter }
    }

    /// Asks `ask` about batches of units, each known by its name, and puts the answers together. An answer may be a problem with
    /// the unit's data: the unit is then left out, and asked for again when the sweep is resumed.
    ///
    /// # Errors
    /// What `ask` says; [`TaskError::Sweep`] if the folder has answers to something else, another sweep writes there (as far as
    /// the file system has locks), more than [`Self::max_bad_fraction`] of the units are left out, or the sweep was asked to
    /// stop; [`TrainError::Unlike`] if the processes do not ask the same. Where one process has an error of its own, the others
    /// wait for it, until it calls [`Communicator::abort`].
    pub fn run<U, A: Serialize + DeserializeOwned>(
        &mut self,
        work: &Work,
        units: &[U],
        name: impl Fn(&U) -> String,
        mut ask: impl FnMut(&[&U]) -> Result<Vec<Result<A, DataError>>, TaskError>,
    ) -> Result<Answers<A>, TaskError> {
        let mut digest = Sha256::new();
        units.iter().for_each(|unit| digest.update(format!("{}\n", name(unit))));
        let heading = Heading {
            work: work.name.to_owned(),
            about: self.about.clone(),
            options: work.options.clone(),
            units: units.len(),
            digest: hex(&digest.finalize()),
        };
        ranks::compare(&*self.ranks, [("work", json!(heading).to_string())])?;
        let mut file = self.claim(&heading)?;
        let Kept { mut lines, whole, cut } = self.read(&heading, file.as_ref())?;
        // What one process has read, all know; and no process reads answers after another has begun to write.
        share(&self.ranks, &mut lines, AT_ONCE)?;
        if let Some((path, file)) = &mut file {
            begin(file, &heading, whole, cut).map_err(|source| io(path, source))?;
        }
        let pending: Vec<usize> = (0..units.len()).filter(|unit| !lines.contains_key(unit)).collect();
        let (rank, ranks) = (self.ranks.rank(), self.ranks.size());
        let own: Vec<&[usize]> = pending.chunks(work.batch.max(1)).skip(rank).step_by(ranks).collect();
        let (of, mut done) = (own.iter().map(|batch| batch.len()).sum(), 0);
        let (mut answered, mut stopped) = (BTreeMap::new(), false);
        for batch in own {
            stopped = self.stop.load(Ordering::Relaxed);
            if stopped {
                break;
            }
            let asked: Vec<&U> = batch.iter().map(|&unit| &units[unit]).collect();
            let answers = ask(&asked)?;
            let mut text = String::new();
            for (&unit, answer) in batch.iter().zip(answers) {
                let line = match answer {
                    Ok(answer) => {
                        let answer = serde_json::to_value(answer).map_err(|error| self.problem(error.to_string()))?;
                        Line { unit, answer: Some(answer), problem: None }
                    }
                    Err(error) => Line { unit, answer: None, problem: Some(error.to_string()) },
                };
                text += &format!("{}\n", json!(line));
                answered.insert(unit, line);
            }
            if let Some((path, file)) = &mut file {
                file.write_all(text.as_bytes()).map_err(|source| io(path, source))?;
            }
            done += batch.len();
            (self.counter)(done, of);
        }
        if let Some((path, file)) = &file {
            file.sync_all().map_err(|source| io(path, source))?;
        }
        share(&self.ranks, &mut answered, AT_ONCE)?;
        lines.append(&mut answered);
        if stopped || lines.len() < units.len() {
            return Err(SweepProblem::Stopped { done: lines.len(), of: units.len() }.into());
        }
        self.gather(lines.into_values())
    }

    /// Asks everything that `items` ask: of those that stand together and are about one image, the image is opened, given to
    /// `check` with each of them, and encoded once. `ask` gets the images of a batch, and what is asked about which. An item
    /// that `check` refuses is left out alone; where the image cannot be opened all of its items are.
    ///
    /// # Errors
    /// As [`Self::run`]; the share that may be left out is one of the items.
    pub(crate) fn by_image<T: Item + Sync, A: Serialize + DeserializeOwned>(
        &mut self,
        work: &Work,
        model: &Model,
        items: &[T],
        check: impl Fn(&T, &Picture) -> Result<(), DataError> + Sync,
        ask: impl Fn(&ImageTokens, &[(u32, &str)]) -> Result<Vec<A>, TaskError>,
    ) -> Result<Answers<A>, TaskError> {
        let groups: Vec<&[T]> = items.chunk_by(|a, b| a.image() == b.image()).collect();
        let name = |group: &&[T]| name_of(group);
        let answers = self.run(work, &groups, name, |groups| {
            // The picture, if anything can be asked about it; and what is wrong with each item.
            let open = |group: &&&[T]| match Picture::open(group[0].image()) {
                Ok(picture) => {
                    let problem = |item| check(item, &picture).err().map(|error| error.to_string());
                    let problems: Vec<Option<String>> = group.iter().map(problem).collect();
                    (problems.iter().any(Option::is_none).then_some(picture), problems)
                }
                Err(error) => (None, vec![Some(error.to_string()); group.len()]),
            };
            let opened: Vec<(Option<Picture>, Vec<Option<String>>)> = groups.par_iter().map(open).collect();
            let (mut pictures, mut texts, mut problems) = (Vec::new(), Vec::new(), Vec::new());
            for ((picture, of_items), group) in opened.into_iter().zip(groups) {
                if let Some(picture) = picture {
                    let sound = group.iter().zip(&of_items).filter(|(_, problem)| problem.is_none());
                    texts.extend(sound.map(|(item, _)| (pictures.len() as u32, item.text())));
                    pictures.push(picture);
                }
                problems.push(of_items);
            }
            let mut answers = match pictures.is_empty() {
                true => Vec::new(),
                false => ask(&model.encode(&pictures)?, &texts)?,
            }
            .into_iter();
            let mut answer =
                |problem: Option<String>| problem.map_or_else(|| answers.next().map(Ok), |it| Some(Err(it)));
            let mut each = |of_items: Vec<_>| of_items.into_iter().filter_map(&mut answer).collect();
            Ok(problems.into_iter().map(|of_items| Ok::<Vec<Result<A, String>>, _>(each(of_items))).collect())
        })?;
        let (mut given, mut left_out) = (Vec::with_capacity(items.len()), Vec::new());
        for (item, answer) in answers.given.into_iter().flatten().flatten().enumerate() {
            given.push(answer.map_err(|problem| left_out.push(LeftOut { item, problem })).ok());
        }
        let (broken, units, limit) = (left_out.len(), items.len(), self.max_bad_fraction);
        match left_out.first() {
            Some(first) if broken as f64 > limit * units as f64 => {
                let first = first.problem.clone();
                Err(SweepProblem::TooManyBroken { left_out: broken, units, limit, first }.into())
            }
            _ => Ok(Answers { given, left_out }),
        }
    }

    fn problem(&self, message: String) -> TaskError {
        SweepProblem::Answers { path: self.folder.clone().unwrap_or_default(), message }.into()
    }

    /// Puts the lines of all units together.
    fn gather<A: DeserializeOwned>(&self, lines: impl ExactSizeIterator<Item = Line>) -> Result<Answers<A>, TaskError> {
        let units = lines.len();
        let mut answers = Answers { given: Vec::with_capacity(units), left_out: Vec::new() };
        for (item, line) in lines.enumerate() {
            if let Some(problem) = line.problem {
                answers.left_out.push(LeftOut { item, problem });
                answers.given.push(None);
                continue;
            }
            let answer = serde_json::from_value(line.answer.unwrap_or_default());
            answers.given.push(Some(answer.map_err(|error| self.problem(format!("unit {item}: {error}")))?));
        }
        let (left_out, limit) = (answers.left_out.len(), self.max_bad_fraction);
        match answers.left_out.first() {
            Some(first) if left_out as f64 > limit * units as f64 => {
                Err(SweepProblem::TooManyBroken { left_out, units, limit, first: first.problem.clone() }.into())
            }
            _ => Ok(answers),
        }
    }

    /// The files of answers that the folder has for a piece of work.
    fn files(&self, work: &str) -> Result<Vec<PathBuf>, TaskError> {
        let Some(folder) = self.folder.as_ref().filter(|folder| folder.exists()) else { return Ok(Vec::new()) };
        let is_own = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let middle = name.strip_prefix(work).and_then(|rest| rest.strip_suffix(".jsonl"));
            let is_number = |rank: &str| !rank.is_empty() && rank.bytes().all(|byte| byte.is_ascii_digit());
            middle.is_some_and(|middle| middle.is_empty() || middle.strip_prefix('.').is_some_and(is_number))
        };
        let entries = std::fs::read_dir(folder).map_err(|source| io(folder, source))?;
        let paths = entries.map(|entry| Ok(entry.map_err(|source| io(folder, source))?.path()));
        let mut files = paths.collect::<Result<Vec<_>, TaskError>>()?;
        files.retain(is_own);
        files.sort();
        Ok(files)
    }

    /// The file that this process writes its answers to.
    fn own_file(&self, work: &str) -> Option<PathBuf> {
        let name = match self.ranks.rank() {
            0 => format!("{work}.jsonl"),
            rank => format!("{work}.{rank}.jsonl"),
        };
        Some(self.folder.as_ref()?.join(name))
    }

    /// The answers that are there; `own` is this process's file.
    fn read(&self, heading: &Heading, own: Option<&(PathBuf, File)>) -> Result<Kept, TaskError> {
        let expected = json!(heading).to_string();
        let mut kept = Kept::default();
        // Where nothing is resumed, there are none.
        let files = if self.resume { self.files(&heading.work)? } else { Vec::new() };
        for path in files {
            let own = own.filter(|(own, _)| *own == path).map(|(_, file)| file);
            let other;
            let file = match own {
                Some(file) => file,
                None => {
                    other = File::open(&path).map_err(|source| io(&path, source))?;
                    &other
                }
            };
            let mut file = BufReader::new(file);
            let (mut line, mut whole, mut cut) = (Vec::new(), 0, 0);
            while file.read_until(b'\n', &mut line).map_err(|source| io(&path, source))? > 0 {
                let is_whole = line.ends_with(b"\n");
                if whole == 0 {
                    // Of what asks the same, the beginning may be all that was written.
                    if is_whole || !expected.as_bytes().starts_with(&line) {
                        check_heading(&path, heading, &line)?;
                    }
                } else if is_whole
                    && let Ok(line) = serde_json::from_slice::<Line>(&line)
                    && line.unit < heading.units
                    && line.answer.is_some()
                {
                    // What was broken is asked for again: it may be mended by now.
                    kept.lines.insert(line.unit, line);
                }
                match is_whole {
                    true => whole += line.len() as u64,
                    false => cut = line.len() as u64,
                }
                line.clear();
            }
            if own.is_some() {
                (kept.whole, kept.cut) = (whole, cut);
            }
        }
        Ok(kept)
    }

    /// The file that this process writes its answers to, which no other process can have until it is closed. Where the file
    /// system has no locks, nothing is kept from anyone.
    fn claim(&self, heading: &Heading) -> Result<Option<(PathBuf, File)>, TaskError> {
        let (Some(folder), Some(path)) = (&self.folder, self.own_file(&heading.work)) else { return Ok(None) };
        let refuse = |path: PathBuf| {
            let message = "expected no answers, found some: resume the work, or choose another folder".to_owned();
            Err(SweepProblem::Answers { path, message }.into())
        };
        if !self.resume
            && let Some(path) = self.files(&heading.work)?.into_iter().next()
        {
            return refuse(path);
        }
        std::fs::create_dir_all(folder).map_err(|source| io(folder, source))?;
        // No process looks for files of answers after another has made its own.
        self.ranks.barrier()?;
        let file = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let file = file.map_err(|source| io(&path, source))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(SweepProblem::Locked { path }.into());
        }
        // Another process may have written until it let go of the lock.
        match file.metadata().map_err(|source| io(&path, source))?.len() {
            1.. if !self.resume => refuse(path),
            _ => Ok(Some((path, file))),
        }
    }
}

/// Makes a file ready for answers after `whole` bytes that are lines, and `cut` bytes of a line that was cut short.
fn begin(file: &mut File, heading: &Heading, whole: u64, cut: u64) -> std::io::Result<()> {
    if cut > 0 {
        file.set_len(whole)?;
    }
    if whole == 0 {
        writeln!(file, "{}", json!(heading))?;
    }
    Ok(())
}

/// Makes the lines of each process known to all, about `at_once` bytes at a time. Returns when every process has called it.
fn share(ranks: &Arc<dyn Communicator>, lines: &mut BTreeMap<usize, Line>, at_once: usize) -> Result<(), TaskError> {
    if ranks.size() == 1 {
        return Ok(());
    }
    let text = |line: &Line| format!("{}\n", json!(line));
    let mut digest = Sha256::new();
    lines.values().for_each(|line| digest.update(text(line)));
    // In a folder that all have, all have read the same.
    match ranks::compare(&**ranks, [("answers", hex(&digest.finalize()))]) {
        Ok(()) => return Ok(()),
        Err(TrainError::Unlike { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let own = std::mem::take(lines);
    let mut own = own.values().map(text);
    loop {
        let mut piece = String::new();
        while ranks.size() * piece.len() < at_once
            && let Some(line) = own.next()
        {
            piece += &line;
        }
        let all = Gather::new(ranks, piece.len())?.join_numbers(piece.as_bytes())?;
        if all.is_empty() {
            return Ok(());
        }
        for line in all.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            let problem = |error: serde_json::Error| SweepProblem::Answers {
                path: PathBuf::new(),
                message: format!("expected an answer of a process, found {error}"),
            };
            let line: Line = serde_json::from_slice(line).map_err(problem)?;
            lines.insert(line.unit, line);
        }
    }
}

/// What is asked about an image, for the digest.
fn name_of<T: Item>(group: &[T]) -> String {
    let texts: Vec<&str> = group.iter().map(Item::text).collect();
    json!([group[0].image().to_string_lossy(), texts]).to_string()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Two values that differ, each cut to what fits a message: the beginning, or what is around the place where they part.
fn cut_to_fit(values: [&str; 2]) -> [String; 2] {
    const LONGEST: usize = 200;
    let alike = values[0].chars().zip(values[1].chars()).take_while(|(a, b)| a == b).count();
    let skipped = if alike < LONGEST / 2 { 0 } else { alike - LONGEST / 4 };
    values.map(|value| {
        if value.chars().nth(LONGEST).is_none() {
            return value.to_owned();
        }
        let start = if skipped > 0 { "…" } else { "" };
        let mut rest = value.chars().skip(skipped);
        let shown: String = rest.by_ref().take(LONGEST).collect();
        let end = if rest.next().is_some() { "…" } else { "" };
        format!("{start}{shown}{end}")
    })
}

fn io(path: &Path, source: std::io::Error) -> TaskError {
    SweepProblem::Io { path: path.to_owned(), source }.into()
}

/// Refuses answers to something else.
fn check_heading(path: &Path, expected: &Heading, line: &[u8]) -> Result<(), TaskError> {
    let problem = |message: String| Err(SweepProblem::Answers { path: path.to_owned(), message }.into());
    let found: Heading = match serde_json::from_slice(line) {
        Ok(found) => found,
        Err(error) => return problem(format!("line 1: expected what was asked, found {error}")),
    };
    let (now, before) = (json!(expected), json!(found));
    let difference = now.as_object().into_iter().flatten();
    let difference = difference.filter_map(|(field, now)| xvlm_train::difference(field, &before[field.as_str()], now));
    match difference.into_iter().next() {
        Some((field, ..)) if field == "digest" => {
            let (now, before) = (expected.units, found.units);
            problem(format!(
                "items: expected answers about the {now} that are asked about now, found some about {before} others"
            ))
        }
        Some((field, before, now)) => {
            let [now, before] = cut_to_fit([&now, &before]);
            problem(format!("{field}: expected {now}, as asked now, found {before}"))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
