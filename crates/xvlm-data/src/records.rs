//! Pre-training records: one JSON object a line.
//!
//! | key | holds |
//! |---|---|
//! | `image` | base64 of an image file, or the path of one, relative to the JSON-lines file's folder |
//! | `binary` | base64 of an image file |
//! | `image_rpath` | path of an image file, relative to the JSON-lines file's folder |
//! | `caption` | a string or a list of strings that tell the whole image |
//! | `elems` | a list of `{bb: [x, y, w, h], caption: string or list, attributes: string or list, label: string or list}` |
//! | `questions` | a list of `{question, answer}` or of `[question, answer]` |

use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use serde_json::Value;

use crate::error::{DataError, Place, excerpt};
use crate::json::{Context, Object, folder, io_error};

/// Where an image's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A file.
    Path(PathBuf),
    /// The content of an image file (decoded from base64, still compressed).
    Bytes(Arc<[u8]>),
}

/// The line a record was read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<Path>,
    /// The line, counted from 1.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
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

/// Reads every record of a JSON-lines file; empty lines are skipped.
///
/// # Errors
///
/// The first line that is no valid record, as [`DataError::Json`] or [`DataError::Field`] naming
/// file, line, field, what was expected and what was found; [`DataError::Io`].
pub fn read_jsonl(path: impl AsRef<Path>) -> Result<Vec<Record>, DataError> {
    let mut records = Vec::new();
    for_each_line(path.as_ref(), |result| {
        records.push(result?);
        Ok(())
    })?;
    Ok(records)
}

/// Like [`read_jsonl`], but leaves out broken lines and returns their errors beside the records.
///
/// # Errors
///
/// [`DataError::Io`] when the file itself cannot be read.
pub fn read_jsonl_lenient(path: impl AsRef<Path>) -> Result<(Vec<Record>, Vec<DataError>), DataError> {
    let (mut records, mut broken) = (Vec::new(), Vec::new());
    for_each_line(path.as_ref(), |result| {
        match result {
            Ok(record) => records.push(record),
            Err(error) => broken.push(error),
        }
        Ok(())
    })?;
    Ok((records, broken))
}

fn for_each_line(
    path: &Path,
    mut each: impl FnMut(Result<Record, DataError>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let file = std::fs::File::open(path).map_err(|source| io_error(path, source))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let name: Arc<Path> = Arc::from(path);
    let folder = folder(path);
    let (mut bytes, mut line) = (Vec::new(), 0);
    loop {
        bytes.clear();
        let read = reader.read_until(b'\n', &mut bytes);
        if read.map_err(|source| io_error(path, source))? == 0 {
            return Ok(());
        }
        line += 1;
        if !bytes.trim_ascii().is_empty() {
            each(parse_line(&bytes, &name, line, &folder))?;
        }
    }
}

fn parse_line(bytes: &[u8], path: &Arc<Path>, line: usize, folder: &Path) -> Result<Record, DataError> {
    let place = Place::Line(line);
    let value: Value =
        serde_json::from_slice(bytes).map_err(|source| DataError::Json { path: path.to_path_buf(), place, source })?;
    let context = Context { path, place };
    let object = context.object(&value, "record")?;
    let elems = object.list("elems")?.iter().enumerate();
    let record = Record {
        image: image(&object, folder)?,
        captions: object.texts("caption")?,
        elems: elems.map(|(i, value)| element(context, value, &format!("elems[{i}]"))).collect::<Result<_, _>>()?,
        questions: questions(&object)?,
        origin: Origin { file: Arc::clone(path), line },
    };
    if record.captions.is_empty() && record.elems.is_empty() && record.questions.is_empty() {
        return Err(object.missing("caption", "a caption, elems or questions"));
    }
    Ok(record)
}

fn element<'a>(context: Context<'a>, value: &'a Value, name: &str) -> Result<Element, DataError> {
    let object = context.object(value, name)?;
    let texts = object.texts("caption")?;
    if texts.is_empty() {
        return Err(object.missing("caption", "a string or a list of strings"));
    }
    let (attributes, labels) = (object.texts("attributes")?, object.texts("label")?);
    Ok(Element { bbox: object.bbox("bb")?, texts, attributes, labels })
}

fn questions(object: &Object<'_>) -> Result<Vec<(String, String)>, DataError> {
    const EXPECTED: &str = "{question, answer} or [question, answer]";
    let mut pairs = Vec::new();
    for (i, value) in object.list("questions")?.iter().enumerate() {
        let name = format!("questions[{i}]");
        if let Value::Array(items) = value {
            match items.as_slice() {
                [Value::String(question), Value::String(answer)]
                    if !question.trim().is_empty() && !answer.trim().is_empty() =>
                {
                    pairs.push((question.clone(), answer.clone()));
                }
                _ => return Err(object.wrong(&name, EXPECTED, value)),
            }
        } else {
            let item = object.context.object(value, &name)?;
            let question = item.text("question")?;
            let answers = item.texts("answer")?;
            if answers.is_empty() {
                return Err(item.missing("answer", "a string or a list of strings"));
            }
            pairs.extend(answers.into_iter().map(|answer| (question.clone(), answer)));
        }
    }
    Ok(pairs)
}

fn image(object: &Object<'_>, folder: &Path) -> Result<ImageSource, DataError> {
    /// Longer than any path: no need to ask the file system whether base64 of an image is a file.
    const LONGEST_PATH: usize = 4096;
    if object.get("image_rpath").is_some() {
        return Ok(ImageSource::Path(folder.join(object.text("image_rpath")?)));
    }
    if object.get("binary").is_some() {
        return base64(object, "binary", &object.text("binary")?, "base64 of an image file");
    }
    const EXPECTED: &str = "base64 of an image file, or the path of one relative to the record's file";
    if object.get("image").is_none() {
        return Err(object.missing("image", EXPECTED));
    }
    let text = object.text("image")?;
    if text.len() < LONGEST_PATH {
        let path = folder.join(&text);
        if path.is_file() {
            return Ok(ImageSource::Path(path));
        }
    }
    base64(object, "image", &text, EXPECTED)
}

fn base64(object: &Object<'_>, field: &str, text: &str, expected: &str) -> Result<ImageSource, DataError> {
    let data = match text.strip_prefix("data:") {
        Some(rest) => rest.split_once(',').map_or(rest, |(_, data)| data),
        None => text,
    };
    match base64::engine::general_purpose::STANDARD.decode(data.trim()) {
        Ok(bytes) => Ok(ImageSource::Bytes(bytes.into())),
        Err(error) => Err(object.context.error(object.name(field), expected, format!("{:?}: {error}", excerpt(text)))),
    }
}
