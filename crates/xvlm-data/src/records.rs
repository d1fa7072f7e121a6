//! Records: an image with its texts, read from a line of JSON, a group of tar members or a row of a table.
//!
//! | key | holds |
//! |---|---|
//! | `image` | base64 of an image file, or the path of one |
//! | `binary` | base64 of an image file |
//! | `image_rpath` | path of an image file |
//! | `caption` | a string or a list of strings that tell the whole image |
//! | `elems` | a list of `{bb: [x, y, w, h], caption: string or list, attributes: string or list, label: string or list}` |
//! | `questions` | a list of `{question, answer}` or of `[question, answer]` |
//!
//! Paths are relative to a root, by default the folder of the record's file, and must not leave it.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{DataError, Place};
use crate::json::{folder, io_error};
use crate::transform::clip_box;

pub(crate) mod paths;
mod read;
mod write;

pub use read::RecordKeys;
pub(crate) use read::{Reading, parse_line, parse_object};

/// Where an image's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A file.
    Path(PathBuf),
    /// The content of an image file (decoded from base64, still compressed).
    Bytes(Arc<[u8]>),
}

/// Where a record was read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file, or the URL.
    pub file: Arc<Path>,
    /// Where in it.
    pub place: Place,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.file.display(), self.place)
    }
}

/// A visual concept inside an image: a box and what it is called.
#[derive(Debug, Clone, PartialEq)]
pub struct Element {
    /// `(x, y, w, h)` in pixels of the image as stored.
    pub bbox: [f32; 4],
    /// What the box shows; one of them is drawn for a batch.
    pub texts: Vec<String>,
    /// Words that may go before the text, such as colours.
    pub attributes: Vec<String>,
    /// Its class, where the file tells it; one for each way of classing, such as by shape and by texture.
    pub labels: Vec<String>,
}

/// An image with its texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The image.
    pub image: ImageSource,
    /// Texts that tell the whole image.
    pub captions: Vec<String>,
    /// Texts that tell parts of it.
    pub elems: Vec<Element>,
    /// Questions about the image with their answers.
    pub questions: Vec<(String, String)>,
    /// Where the record comes from, for messages.
    pub origin: Origin,
}

impl Record {
    /// Every text: captions, what elements are called, their attributes and labels, questions and their answers.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let of_elems = self.elems.iter().flat_map(|elem| elem.texts.iter().chain(&elem.attributes).chain(&elem.labels));
        let of_questions = self.questions.iter().flat_map(|(question, answer)| [question, answer]);
        self.captions.iter().chain(of_elems).chain(of_questions).map(String::as_str)
    }

    /// The box of each element, as far as it is inside an image of these sizes ([`clip_box`]).
    ///
    /// # Errors
    ///
    /// [`DataError::BoxOutside`] about the first that is not.
    pub fn boxes_inside(&self, width: u32, height: u32) -> Result<Vec<[f32; 4]>, DataError> {
        let inside = |(i, elem): (usize, &Element)| {
            clip_box(elem.bbox, width, height).ok_or_else(|| DataError::BoxOutside {
                origin: self.origin.to_string(),
                field: format!("elems[{i}].bb"),
                bbox: elem.bbox,
                width,
                height,
            })
        };
        self.elems.iter().enumerate().map(inside).collect()
    }
}

/// Reads every record of a JSON-lines file; empty lines are skipped.
///
/// # Errors
///
/// The first line that is no valid record, as [`DataError::Json`] or [`DataError::Field`] naming
/// file, line, field, what was expected and what was found; [`DataError::Io`].
pub fn read_jsonl(path: impl AsRef<Path>) -> Result<Vec<Record>, DataError> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|source| io_error(path, source))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let name: Arc<Path> = Arc::from(path);
    let reading = Reading { root: Some(folder(path)), ..Reading::default() };
    let (mut records, mut bytes, mut line) = (Vec::new(), Vec::new(), 0);
    loop {
        bytes.clear();
        let read = reader.read_until(b'\n', &mut bytes);
        if read.map_err(|source| io_error(path, source))? == 0 {
            return Ok(records);
        }
        line += 1;
        if !bytes.trim_ascii().is_empty() {
            records.push(parse_line(&bytes, &name, line, &reading)?);
        }
    }
}
