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
        self.describe(&sources, describe, counter)
    }

    /// Describes pictures, equal ones once.
    pub(super) fn describe<E>(
        &mut self,
        sources: &[Source],
        describe: Describe<E>,
        counter: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Outcome>, E> {
        let mut read: HashMap<&Source, Result<Key, Outcome>> = HashMap::new();
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
        self.ask(&mut waiting, describe)?;
        let outcome = |source: &Source| match &read[source] {
            Ok(key) => self.known.get(key).cloned().unwrap_or(Outcome::Wordless),
            Err(outcome) => outcome.clone(),
        };
        Ok(sources.iter().map(outcome).collect())
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

/// Describes the images of documents that are chosen, and writes the descriptions into them.
///
/// # Errors
/// What `describe` says. What is wrong with a picture is in the reports.
pub fn fill_in<E>(
    pages: &[Page],
    choice: Choice,
    describer: &mut Describer,
    describe: Describe<E>,
    counter: &mut dyn FnMut(usize, usize),
) -> Result<Vec<(Vec<Report>, Edited)>, E> {
    let chosen: Vec<Vec<usize>> = pages.iter().map(|page| page.document.chosen(choice)).collect();
    let mut sources = Vec::new();
    for (Page { path, document, root }, chosen) in pages.iter().zip(&chosen) {
        let placed: Vec<usize> = chosen.iter().copied().filter(|&image| document.has_place(image)).collect();
        sources.extend(document.sources(&placed, path.parent().unwrap_or(Path::new("")), *root));
    }
    let mut outcomes = describer.describe(&sources, describe, counter)?.into_iter();
    let filled = pages.iter().zip(&chosen).map(|(page, chosen)| {
        let mut descriptions = Vec::new();
        let reports = chosen.iter().map(|&number| {
            let image = &page.document.images()[number];
            let outcome = match page.document.has_place(number) {
                true => outcomes.next().unwrap_or(Outcome::Wordless),
                false => Outcome::Unplaced,
            };
            descriptions.extend(outcome.text().map(|text| (number, text.to_owned())));
            Report { line: image.line, source: image.source.clone(), outcome }
        });
        let reports: Vec<Report> = reports.collect();
        (reports, page.document.with(&descriptions))
    });
    Ok(filled.collect())
}
