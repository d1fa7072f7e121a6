//! Pictures described, each once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};
use xvlm_data::{DecodeOptions, Encoded, Picture};

use super::source::Source;
use super::{Choice, Document, Edited, Phrasing};
use crate::Written;

/// Pictures that are described at a time: they are in memory with all their pixels.
const BATCH: usize = 8;

/// Images of documents that are described before the documents they are in are told of: what an interruption costs at most. More
/// than [`BATCH`], as some are known already and some are no pictures.
const PORTION: usize = 4 * BATCH;

/// What describes pictures: one text for each.
pub type Describe<'a, E> = &'a mut dyn FnMut(&[Picture]) -> Result<Vec<Written>, E>;

/// A description.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Described {
    /// As it is to be read.
    pub text: String,
    /// How sure the model is of it, 0 to 1: the exponential of [`Written::score`], which is something like the mean probability
    /// of its words.
    pub confidence: f32,
}

/// What became of a picture.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// It has a description.
    Described(Described),
    /// The model is less sure of its description than was asked for; it is not written.
    Unsure(Described),
    /// The model wrote no word.
    Wordless,
    /// It is on another machine, and is not looked at.
    Remote,
    /// It is a drawing that is not made of pixels (SVG), which the model does not see.
    Unsupported {
        /// What it is.
        problem: String,
    },
    /// There is no picture where one should be.
    Broken {
        /// What was expected and found.
        problem: String,
    },
    /// It has a description already, which is written in a way that is not understood here.
    Unplaced,
}

impl Outcome {
    /// The description that is written.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Described(described) => Some(&described.text),
            _ => None,
        }
    }
}

/// What a picture is known by.
type Key = [u8; 32];

/// Has pictures described, and remembers what was said.
pub struct Describer {
    phrasing: Phrasing,
    min_confidence: f32,
    known: HashMap<Key, Outcome>,
}

impl Describer {
    /// One that knows no picture yet. Descriptions of which the model is less sure than `min_confidence` (0 to 1) are
    /// [`Outcome::Unsure`].
    pub fn new(phrasing: Phrasing, min_confidence: f32) -> Self {
        Self { phrasing, min_confidence, known: HashMap::new() }
    }

    /// How many different pictures were described so far.
    pub fn pictures(&self) -> usize {
        self.known.len()
    }

    /// Describes the pictures of files.
    ///
    /// # Errors
    /// What `describe` says. A file that is no picture has its outcome.
    pub fn describe_files<E>(
        &mut self,
        files: &[PathBuf],
        describe: Describe<E>,
        counter: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Outcome>, E> {
        let sources: Vec<Source> = files.iter().map(|file| Source::File(file.clone())).collect();
        let (outcomes, ended) = self.describe(&sources, describe, counter);
        ended.map(|()| outcomes.into_iter().map(|outcome| outcome.unwrap_or(Outcome::Wordless)).collect())
    }

    /// Describes pictures, equal ones once: the outcomes that are known at the end, or by the time `describe` failed.
    fn describe<E>(
        &mut self,
        sources: &[Source],
        describe: Describe<E>,
        counter: &mut dyn FnMut(usize, usize),
    ) -> (Vec<Option<Outcome>>, Result<(), E>) {
        let mut read: HashMap<&Source, Result<Key, Outcome>> = HashMap::new();
        let ended = self.read_and_ask(sources, &mut read, describe, counter);
        let outcome = |source: &Source| match read.get(source)? {
            Ok(key) => self.known.get(key).cloned(),
            Err(outcome) => Some(outcome.clone()),
        };
        (sources.iter().map(outcome).collect(), ended)
    }

    /// Reads sources, each once, and asks about the pictures that are not known.
    fn read_and_ask<'s, E>(
        &mut self,
        sources: &'s [Source],
        read: &mut HashMap<&'s Source, Result<Key, Outcome>>,
        describe: Describe<E>,
        counter: &mut dyn FnMut(usize, usize),
    ) -> Result<(), E> {
        let mut waiting: Vec<(Key, Picture)> = Vec::new();
        for (done, source) in sources.iter().enumerate() {
            if !read.contains_key(source) {
                let opened = open(source, |key| self.known.contains_key(key) || waiting.iter().any(|(k, _)| k == key));
                let key = opened.map(|(key, picture)| {
                    waiting.extend(picture.map(|picture| (key, picture)));
                    key
                });
                read.insert(source, key);
            }
            if waiting.len() == BATCH {
                self.ask(&mut waiting, describe)?;
            }
            counter(done + 1, sources.len());
        }
        self.ask(&mut waiting, describe)
    }

    fn ask<E>(&mut self, waiting: &mut Vec<(Key, Picture)>, describe: Describe<E>) -> Result<(), E> {
        if waiting.is_empty() {
            return Ok(());
        }
        let (keys, pictures): (Vec<Key>, Vec<Picture>) = waiting.drain(..).unzip();
        for (key, written) in keys.into_iter().zip(describe(&pictures)?) {
            let outcome = self.outcome(&written);
            self.known.insert(key, outcome);
        }
        Ok(())
    }

    fn outcome(&self, written: &Written) -> Outcome {
        if !written.text.chars().any(char::is_alphanumeric) {
            return Outcome::Wordless;
        }
        let described = Described { text: self.phrasing.apply(&written.text), confidence: written.score.exp() };
        match described.confidence >= self.min_confidence {
            true => Outcome::Described(described),
            false => Outcome::Unsure(described),
        }
    }
}

/// Reads a picture; its pixels only if it is not known.
fn open(source: &Source, is_known: impl Fn(&Key) -> bool) -> Result<(Key, Option<Picture>), Outcome> {
    let broken = |problem: String| Outcome::Broken { problem };
    let (name, bytes) = match source {
        Source::File(path) => {
            let name = path.display().to_string();
            let bytes = std::fs::read(path).map_err(|error| broken(format!("{name}: {error}")))?;
            (name, bytes)
        }
        Source::Inline(bytes) => (format!("picture of {} bytes in the document", bytes.len()), bytes.clone()),
        Source::Remote => return Err(Outcome::Remote),
        Source::Nowhere(problem) => return Err(broken(problem.clone())),
    };
    if is_svg(&bytes) {
        return Err(Outcome::Unsupported { problem: format!("{name}: expected pixels, found SVG") });
    }
    let key: Key = Sha256::digest(&bytes).into();
    if is_known(&key) {
        return Ok((key, None));
    }
    let picture = Encoded::new(bytes, &name, DecodeOptions::upright()).and_then(|encoded| encoded.decode());
    Ok((key, Some(picture.map_err(|error| broken(error.to_string()))?)))
}

fn is_svg(bytes: &[u8]) -> bool {
    const LOOKED_AT: usize = 1024;
    let head = bytes.strip_prefix(&[0xef, 0xbb, 0xbf]).unwrap_or(bytes).trim_ascii_start();
    let head = &head[..head.len().min(LOOKED_AT)];
    head.starts_with(b"<") && head.windows(4).any(|part| part.eq_ignore_ascii_case(b"<svg"))
}

/// Whether a file is a picture that can be described, by its name.
pub fn is_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    ["jpg", "jpeg", "png", "webp", "gif"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// An image of a document that was to be described.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The line it begins in, from 1.
    pub line: usize,
    /// Its address as the document has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// A document and where it stands.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    /// Its file, to whose folder addresses are relative.
    pub path: &'a Path,
    /// The document.
    pub document: &'a Document,
    /// The folder that addresses with a `/` in front begin in.
    pub root: Option<&'a Path>,
}

/// Takes what became of a document: its number, its content with the descriptions so far, and whether these are all.
pub type Filed<'a, E> = &'a mut dyn FnMut(usize, &Edited, bool) -> Result<(), E>;

/// Describes the images of documents that are chosen, and writes the descriptions into them. `file` is told of a document whenever
/// there are descriptions of some more of its images, and once of each document that has no such images; what it has kept need
/// not be described again, whatever happens. Where `describe` fails, `file` is told of what was described until then.
///
/// # Errors
/// What `describe` and `file` say. What is wrong with a picture is in the reports.
pub fn fill_in<E>(
    pages: &[Page],
    choice: Choice,
    describer: &mut Describer,
    describe: Describe<E>,
    file: Filed<E>,
    counter: &mut dyn FnMut(usize, usize),
) -> Result<Vec<(Vec<Report>, Edited)>, E> {
    // Of each document the reports, by the numbers of their images, and what stands in it by now.
    let mut filled: Vec<(Vec<(usize, Report)>, Edited)> = Vec::with_capacity(pages.len());
    let report = |page: &Page, number: usize, outcome: Outcome| {
        let image = &page.document.images()[number];
        (number, Report { line: image.line, source: image.source.clone(), outcome })
    };
    // The images that are described, by the numbers of their documents and their own, and where their pictures are.
    let (mut places, mut sources) = (Vec::new(), Vec::new());
    for (number, page) in pages.iter().enumerate() {
        let Page { path, document, root } = *page;
        let (placed, unplaced): (Vec<usize>, Vec<usize>) =
            document.chosen(choice).into_iter().partition(|&image| document.has_place(image));
        sources.extend(document.sources(&placed, path.parent().unwrap_or(Path::new("")), root));
        places.extend(placed.iter().map(|&image| (number, image)));
        let unplaced = unplaced.into_iter().map(|image| report(page, image, Outcome::Unplaced)).collect();
        filled.push((unplaced, document.with(&[])));
        if placed.is_empty() {
            file(number, &filled[number].1, true)?;
        }
    }
    let mut descriptions: Vec<Vec<(usize, String)>> = vec![Vec::new(); pages.len()];
    let mut done = 0;
    for portion in sources.chunks(PORTION) {
        let mut count = |at: usize, _: usize| counter(done + at, sources.len());
        let (outcomes, ended) = describer.describe(portion, describe, &mut count);
        let described: Vec<_> = places[done..done + portion.len()].iter().zip(outcomes).collect();
        done += portion.len();
        for of_one in described.chunk_by(|(a, _), (b, _)| a.0 == b.0) {
            let number = of_one[0].0.0;
            let mut told = 0;
            for ((_, image), outcome) in of_one {
                // What `describe` has said nothing about has no description; after an error, it is not known yet.
                let outcome = match (outcome, &ended) {
                    (Some(outcome), _) => outcome.clone(),
                    (None, Ok(())) => Outcome::Wordless,
                    (None, Err(_)) => continue,
                };
                descriptions[number].extend(outcome.text().map(|text| (*image, text.to_owned())));
                filled[number].0.push(report(&pages[number], *image, outcome));
                told += 1;
            }
            if told > 0 {
                let edited = pages[number].document.with(&descriptions[number]);
                let is_last = places.get(done).is_none_or(|next| next.0 != number);
                file(number, &edited, is_last && told == of_one.len())?;
                filled[number].1 = edited;
            }
        }
        ended?;
    }
    let in_order = |(mut reports, edited): (Vec<(usize, Report)>, Edited)| {
        reports.sort_by_key(|(image, _)| *image);
        (reports.into_iter().map(|(_, report)| report).collect(), edited)
    };
    Ok(filled.into_iter().map(in_order).collect())
}
