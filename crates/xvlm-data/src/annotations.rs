//! Annotation files of the evaluation sets: what each task asks and what the answers are.
//!
//! Image paths in them are relative to the folder of the annotation file. Identifiers are strings
//! here, whether the file holds numbers or strings.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{DataError, Place};
use crate::json::{Context, Object, folder, read_value};

/// A phrase and the box it refers to.
#[derive(Debug, Clone, PartialEq)]
pub struct GroundingItem {
    /// The phrase's identifier.
    pub ref_id: String,
    /// The image file.
    pub image: PathBuf,
    /// The image's identifier.
    pub image_id: String,
    /// The phrase.
    pub text: String,
    /// `(x, y, w, h)` in pixels.
    pub bbox: [f32; 4],
    /// The image's height in pixels.
    pub height: u32,
    /// The image's width in pixels.
    pub width: u32,
}

/// An image and the captions that should find it.
#[derive(Debug, Clone, PartialEq)]
pub struct RetrievalItem {
    /// The image file.
    pub image: PathBuf,
    /// The image's identifier.
    pub image_id: String,
    /// Its captions, at least one.
    pub captions: Vec<String>,
}

/// A text with blanks about an image, and what fits.
#[derive(Debug, Clone, PartialEq)]
pub struct FillItem {
    /// The image file.
    pub image: PathBuf,
    /// The text, with its blanks as written.
    pub text: String,
    /// The answers that count as right, at least one.
    pub answers: Vec<String>,
    /// What is asked for (such as `colour`), to break scores down by.
    pub kind: String,
}

/// A question about an image.
#[derive(Debug, Clone, PartialEq)]
pub struct VqaItem {
    /// The question's identifier.
    pub question_id: String,
    /// The image file.
    pub image: PathBuf,
    /// The question.
    pub question: String,
    /// The answers people gave; empty where the file has none (test sets).
    pub answers: Vec<String>,
    /// What is asked for (such as `count`), to break scores down by.
    pub kind: String,
}

/// An image and reference captions.
#[derive(Debug, Clone, PartialEq)]
pub struct CaptionItem {
    /// The image's identifier.
    pub id: String,
    /// The image file.
    pub image: PathBuf,
    /// The split (`train`, `val`, `test`, …), where the file tells it.
    pub split: Option<String>,
    /// Reference captions; empty where the file has none.
    pub captions: Vec<String>,
}

/// Reads `[{ref_id, image, image_id, text, bbox, height, width}]`.
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field;
/// also when the box reaches outside the image by more than a pixel.
pub fn read_grounding(path: impl AsRef<Path>) -> Result<Vec<GroundingItem>, DataError> {
    read_items(path.as_ref(), |object, folder| {
        let item = GroundingItem {
            ref_id: object.id("ref_id")?,
            image: folder.join(object.text("image")?),
            image_id: object.id("image_id")?,
            text: object.text("text")?,
            bbox: object.bbox("bbox")?,
            height: object.pixels("height")?,
            width: object.pixels("width")?,
        };
        if crate::transform::clip_box(item.bbox, item.width, item.height).is_none() {
            return Err(object.context.error(
                "bbox",
                format!("a box [x, y, w, h] inside the {}x{} image", item.width, item.height),
                format!("{:?}", item.bbox),
            ));
        }
        Ok(item)
    })
}

/// Reads `[{image, image_id, caption: string | list}]`.
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field.
pub fn read_retrieval(path: impl AsRef<Path>) -> Result<Vec<RetrievalItem>, DataError> {
    read_items(path.as_ref(), |object, folder| {
        Ok(RetrievalItem {
            image: folder.join(object.text("image")?),
            image_id: object.id("image_id")?,
            captions: some_texts(object, "caption")?,
        })
    })
}

/// Reads `[{image, text, answers: string | list, kind}]`; a missing `kind` is empty.
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field.
pub fn read_fill(path: impl AsRef<Path>) -> Result<Vec<FillItem>, DataError> {
    read_items(path.as_ref(), |object, folder| {
        Ok(FillItem {
            image: folder.join(object.text("image")?),
            text: object.text("text")?,
            answers: some_texts(object, "answers")?,
            kind: optional_text(object, "kind")?.unwrap_or_default(),
        })
    })
}

/// Reads `[{question_id, image, question, answer: string | list, kind}]`; `answer` may be absent, and a missing `kind`
/// is empty.
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field.
pub fn read_vqa(path: impl AsRef<Path>) -> Result<Vec<VqaItem>, DataError> {
    read_items(path.as_ref(), |object, folder| {
        Ok(VqaItem {
            question_id: object.id("question_id")?,
            image: folder.join(object.text("image")?),
            question: object.text("question")?,
            answers: object.texts("answer")?,
            kind: optional_text(object, "kind")?.unwrap_or_default(),
        })
    })
}

/// Reads a COCO/Karpathy file: `{"images": [{"id", "file_name", "sentences": [{"raw"}]}]}`.
///
/// Karpathy's own spellings are understood too: `cocoid` or `imgid` for `id`, `filename` for
/// `file_name`, and `filepath`, the folder that the file name is in.
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field.
pub fn read_captions(path: impl AsRef<Path>) -> Result<Vec<CaptionItem>, DataError> {
    let path = path.as_ref();
    let value = read_value(path)?;
    let whole = Context { path, place: Place::Whole };
    let root = whole.object(&value, "record")?;
    if root.get("images").is_none() {
        return Err(root.missing("images", "a list of images"));
    }
    items(path, root.list("images")?, "images[]", |object, base: &Path| {
        let id = ["id", "cocoid", "imgid"].into_iter().find(|name| object.get(name).is_some());
        let file = ["file_name", "filename"].into_iter().find(|name| object.get(name).is_some());
        let sub = optional_text(object, "filepath")?.unwrap_or_default();
        let mut captions = Vec::new();
        for (i, sentence) in object.list("sentences")?.iter().enumerate() {
            let name = object.name(&format!("sentences[{i}]"));
            captions.push(object.context.object(sentence, &name)?.text("raw")?);
        }
        Ok(CaptionItem {
            id: object.id(id.unwrap_or("id"))?,
            image: base.join(sub).join(object.text(file.unwrap_or("file_name"))?),
            split: optional_text(object, "split")?,
            captions,
        })
    })
}

fn read_items<T>(path: &Path, parse: impl Fn(&Object<'_>, &Path) -> Result<T, DataError>) -> Result<Vec<T>, DataError> {
    let value = read_value(path)?;
    let Some(values) = value.as_array() else {
        let whole = Context { path, place: Place::Whole };
        return Err(whole.error("file", "a list of objects", "something else"));
    };
    items(path, values, "record", parse)
}

fn items<T>(
    path: &Path,
    values: &[Value],
    name: &str,
    parse: impl Fn(&Object<'_>, &Path) -> Result<T, DataError>,
) -> Result<Vec<T>, DataError> {
    let folder = folder(path);
    let parse_one = |(i, value)| {
        let place = Place::Item(i);
        let object = Context { path, place }.object(value, name)?;
        parse(&object, &folder)
    };
    values.iter().enumerate().map(parse_one).collect()
}

fn some_texts(object: &Object<'_>, field: &str) -> Result<Vec<String>, DataError> {
    let texts = object.texts(field)?;
    if texts.is_empty() {
        return Err(object.missing(field, "a string or a list of strings"));
    }
    Ok(texts)
}

fn optional_text(object: &Object<'_>, field: &str) -> Result<Option<String>, DataError> {
    match object.get(field) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(value) => Err(object.wrong(field, "a string", value)),
    }
}
