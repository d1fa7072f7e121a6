//! Alternative texts: descriptions of pictures for those who do not see them, in pages of HTML and Markdown, or for the pictures
//! of a folder.
//!
//! [`Document`] finds the images of a text that have no description, and where one would stand; it knows no model.
//! [`Describer`] has pictures described, each once, however often it is shown. [`fill_in`] puts both together.
//!
//! A description is inserted; every other byte of a document stays as it is.

mod describe;
mod html;
mod list;
mod markdown;
mod phrase;
mod source;

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use describe::{Describe, Described, Describer, Filed, Outcome, Page, Report, fill_in, is_picture};
pub use list::{Entry, csv_list, markdown_list};

/// How a document is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// HTML: pages and pieces of pages.
    Html,
    /// Markdown: CommonMark with tables and the other extensions that GitHub has.
    Markdown,
}

impl Format {
    /// The format of a file, by its name.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "html" | "htm" | "xhtml" => Some(Self::Html),
            "md" | "markdown" | "mdown" | "mkd" => Some(Self::Markdown),
            _ => None,
        }
    }
}

/// What an image has for a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Alt {
    /// None.
    Missing,
    /// An empty one, which says by the standard that the image is decoration; or it is said to be in other words (`role`,
    /// `aria-hidden`).
    Decorative,
    /// One with words, or another name (`aria-label`).
    Given,
}

/// Which images get a description, beside those that have none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Those that are said to be decoration.
    pub decorative: bool,
    /// Those that have one, which is replaced.
    pub given: bool,
}

/// How a caption is made into a description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phrasing {
    /// Whether it begins with a capital letter and ends with a full stop, where a screen reader pauses.
    pub sentence: bool,
    /// What stands before it.
    pub prefix: String,
    /// What stands after it.
    pub suffix: String,
}

impl Default for Phrasing {
    fn default() -> Self {
        Self { sentence: true, prefix: String::new(), suffix: String::new() }
    }
}

/// A document that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected {expected}, found {found}")]
pub struct DocumentProblem {
    expected: &'static str,
    found: String,
}

/// What is known of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    /// Its address.
    source: Option<String>,
    alt: Alt,
}

/// How a description is written where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    Html,
    HtmlInMarkdown,
    Markdown,
}

/// What a description takes the place of, most often nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    range: Range<usize>,
    writing: Writing,
}

/// What was found, and where it begins.
struct Spotted {
    found: Found,
    start: usize,
    place: Option<Place>,
}

/// An image of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The line of the document it begins in, from 1.
    pub line: usize,
    /// Its address as the document has it.
    pub source: Option<String>,
    /// What it has for a description.
    pub alt: Alt,
    place: Option<Place>,
}

/// A document with its images.
#[derive(Clone, Debug)]
pub struct Document {
    content: Vec<u8>,
    is_utf8: bool,
    base: Option<String>,
    images: Vec<Image>,
}

/// A document into which descriptions were written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edited {
    /// Its content.
    pub content: Vec<u8>,
    /// What stands in it now, in which place, and what stood there before.
    pub changes: Vec<(Range<usize>, Vec<u8>)>,
}

impl Document {
    /// Finds the images of a document.
    ///
    /// What is no image for a reader is none here: comments, scripts and styles, templates, code of HTML (`pre`, `code`) and of
    /// Markdown.
    ///
    /// # Errors
    /// If it is not written in UTF-8. HTML may be in any encoding that has the letters of ASCII as they are.
    pub fn read(format: Format, content: Vec<u8>) -> Result<Self, DocumentProblem> {
        if let Some(found) = [&[0xff, 0xfe][..], &[0xfe, 0xff]].iter().find(|mark| content.starts_with(mark)) {
            return Err(DocumentProblem { expected: "UTF-8", found: format!("the mark of UTF-16, {found:02x?}") });
        }
        let (mut found, base) = match format {
            Format::Html => {
                let mut scanner = html::Scanner::default();
                let images = scanner.scan(&content).into_iter().map(|image| {
                    let place = image.place.map(|range| Place { range, writing: Writing::Html });
                    Spotted { found: image.found, start: image.start, place }
                });
                (images.collect::<Vec<_>>(), scanner.base)
            }
            Format::Markdown => {
                let text = std::str::from_utf8(&content)
                    .map_err(|error| DocumentProblem { expected: "UTF-8", found: error.to_string() })?;
                markdown::scan(text)
            }
        };
        let (mut line, mut at) = (1, 0);
        found.sort_by_key(|image| image.start);
        let numbered = found.into_iter().map(|Spotted { found: Found { source, alt }, start, place }| {
            line += content[at..start].iter().filter(|byte| **byte == b'\n').count();
            at = start;
            Image { line, source, alt, place }
        });
        let images = numbered.collect();
        Ok(Self { is_utf8: says_utf8(&content), content, base, images })
    }

    /// Its images, in its order.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The numbers of the images that get a description.
    pub fn chosen(&self, choice: Choice) -> Vec<usize> {
        let is_chosen = |image: &Image| match image.alt {
            Alt::Missing => true,
            Alt::Decorative => choice.decorative,
            Alt::Given => choice.given,
        };
        (0..self.images.len()).filter(|&number| is_chosen(&self.images[number])).collect()
    }

    /// Whether there is a place for the description of an image: a description that is there already may be written in a way
    /// that is not understood.
    pub fn has_place(&self, image: usize) -> bool {
        self.images.get(image).is_some_and(|image| image.place.is_some())
    }

    /// The document with descriptions of some of its images, by their numbers; of those without a place, nothing is written.
    pub fn with(&self, descriptions: &[(usize, String)]) -> Edited {
        let placed =
            descriptions.iter().filter_map(|(image, text)| Some((self.images.get(*image)?.place.as_ref()?, text)));
        let mut placed: Vec<(&Place, &String)> = placed.collect();
        placed.sort_by_key(|(place, _)| (place.range.start, place.range.end));
        let mut edited = Edited { content: Vec::with_capacity(self.content.len()), changes: Vec::new() };
        let mut done = 0;
        for (place, text) in placed {
            // One that another has overlapped is left alone, as is one of an image that was named twice.
            let Some(between) = self.content.get(done..place.range.start).filter(|_| done <= place.range.start) else {
                continue;
            };
            if !edited.changes.is_empty() && place.range.start == done && place.range.is_empty() {
                continue;
            }
            edited.content.extend_from_slice(between);
            let start = edited.content.len();
            edited.content.extend_from_slice(self.written(place.writing, text).as_bytes());
            edited.changes.push((start..edited.content.len(), self.content[place.range.clone()].to_vec()));
            done = place.range.end;
        }
        edited.content.extend_from_slice(&self.content[done..]);
        edited
    }

    fn written(&self, writing: Writing, text: &str) -> String {
        match writing {
            Writing::Html => format!(" alt=\"{}\"", phrase::html(text, self.is_utf8, &[])),
            // A bar would end a cell of a table, and a backtick may begin code before the tag is seen.
            Writing::HtmlInMarkdown => format!(" alt=\"{}\"", phrase::html(text, true, &['|', '`'])),
            Writing::Markdown => phrase::markdown(text),
        }
    }

    /// Where the pictures of some images are.
    fn sources(&self, images: &[usize], folder: &Path, root: Option<&Path>) -> Vec<source::Source> {
        let of = |image: &usize| match &self.images[*image].source {
            Some(source) => source::resolve(source, self.base.as_deref(), folder, root),
            None => source::Source::Nowhere("expected the address of a picture, found none".to_owned()),
        };
        images.iter().map(of).collect()
    }
}

impl Edited {
    /// The document as it was.
    pub fn undone(&self) -> Vec<u8> {
        let (mut content, mut done) = (Vec::with_capacity(self.content.len()), 0);
        for (range, before) in &self.changes {
            content.extend_from_slice(&self.content[done..range.start]);
            content.extend_from_slice(before);
            done = range.end;
        }
        content.extend_from_slice(&self.content[done..]);
        content
    }
}

/// Whether a document is sure to be in UTF-8: it has characters of it, or says so where a browser looks.
fn says_utf8(content: &[u8]) -> bool {
    const LOOKED_AT: usize = 1024;
    let head = content[..content.len().min(LOOKED_AT)].to_ascii_lowercase();
    let says = head.windows(5).any(|part| part == b"utf-8") || content.starts_with(&[0xef, 0xbb, 0xbf]);
    std::str::from_utf8(content).is_ok() && (says || !content.is_ascii())
}

/// The files of a folder and of the folders in it, by name; what begins with a dot is left alone.
///
/// # Errors
/// If a folder cannot be read: which, and what the system says.
pub fn files_of(folder: &Path) -> Result<Vec<PathBuf>, (PathBuf, std::io::Error)> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let problem = |error| (folder.clone(), error);
        for entry in std::fs::read_dir(&folder).map_err(problem)? {
            let entry = entry.map_err(problem)?;
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            // A link to a folder is not followed: it may lead back.
            match entry.file_type().map_err(problem)?.is_dir() {
                true => folders.push(entry.path()),
                false => files.push(entry.path()),
            }
        }
    }
    files.sort();
    Ok(files)
}
