//! From a JSON object to a record.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::paths::inside;
use super::{Element, ImageSource, Origin, Record};
use crate::error::{DataError, Place, excerpt};
use crate::json::{Context, Object};

/// Under which keys a record has its image and its captions, as the original's configuration tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecordKeys {
    /// The image. Default: the first of `image_rpath`, `binary` and `image` that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_key: Option<String>,
    /// Whether `image_key` holds a path, not base64. Default: a path if there is such a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_image_rpath: Option<bool>,
    /// The captions. Default `caption`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_key: Option<String>,
}

impl RecordKeys {
    pub(crate) fn caption(&self) -> &str {
        self.caption_key.as_deref().unwrap_or("caption")
    }

    /// Whether a record that has this key has an image.
    pub(crate) fn is_image(&self, key: &str) -> bool {
        match &self.image_key {
            Some(image) => key == image,
            None => matches!(key, "image_rpath" | "binary" | "image"),
        }
    }
}

/// How records of a source are read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reading {
    pub(crate) keys: RecordKeys,
    /// What paths are relative to, and must not leave; a shard on the web has none of its own.
    pub(crate) root: Option<PathBuf>,
}

pub(crate) fn parse_line(bytes: &[u8], path: &Arc<Path>, line: usize, reading: &Reading) -> Result<Record, DataError> {
    let place = Place::Line(line);
    let value: Value = serde_json::from_slice(bytes).map_err(|source| DataError::Json {
        path: path.to_path_buf(),
        place: place.clone(),
        source,
    })?;
    parse_object(&value, path, place, reading, None, None)
}

/// The record that `value` tells; an image and a caption that stand beside it go before its own.
pub(crate) fn parse_object(
    value: &Value,
    path: &Arc<Path>,
    place: Place,
    reading: &Reading,
    beside: Option<ImageSource>,
    caption: Option<String>,
) -> Result<Record, DataError> {
    let context = Context { path, place };
    let object = context.object(value, "record")?;
    let mut captions = object.texts(reading.keys.caption())?;
    if let Some(caption) = caption.filter(|caption| !captions.contains(caption)) {
        captions.insert(0, caption);
    }
    let elems = object.list("elems")?.iter().enumerate();
    let elems = elems.map(|(i, value)| element(&context, value, &format!("elems[{i}]"))).collect::<Result<_, _>>()?;
    let image = match beside {
        Some(image) => image,
        None => image(&object, reading)?,
    };
    let origin = Origin { file: Arc::clone(path), place: context.place.clone() };
    let record = Record { image, captions, elems, questions: questions(&object)?, origin };
    if record.captions.is_empty() && record.elems.is_empty() && record.questions.is_empty() {
        return Err(object.missing(reading.keys.caption(), "a caption, elems or questions"));
    }
    Ok(record)
}

fn element<'a>(context: &Context<'a>, value: &'a Value, name: &str) -> Result<Element, DataError> {
    let object = context.object(value, name)?;
    let texts = object.texts("caption")?;
    if texts.is_empty() {
        return Err(object.missing("caption", "a string or a list of strings"));
    }
    let (attributes, labels) = (object.texts("attributes")?, object.texts("label")?);
    let bbox @ [x, y, w, h] = object.bbox("bb")?;
    if !(x + w).is_finite() || !(y + h).is_finite() {
        let found = format!("{bbox:?}");
        return Err(context.error(object.name("bb"), "a box that ends at a finite number", found));
    }
    Ok(Element { bbox, texts, attributes, labels })
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

fn image(object: &Object<'_>, reading: &Reading) -> Result<ImageSource, DataError> {
    /// Longer than any path: no need to ask the file system whether base64 of an image is a file.
    const LONGEST_PATH: usize = 4096;
    const BASE64: &str = "base64 of an image file";
    const EITHER: &str = "base64 of an image file, or the path of one relative to the record's file";
    let (key, is_path) = match &reading.keys.image_key {
        Some(key) => (key.as_str(), reading.keys.is_image_rpath),
        None if object.get("image_rpath").is_some() => ("image_rpath", Some(true)),
        None if object.get("binary").is_some() => ("binary", Some(false)),
        None => ("image", None),
    };
    if object.get(key).is_none() {
        return Err(object.missing(key, EITHER));
    }
    let text = object.text(key)?;
    match is_path {
        Some(true) => Ok(ImageSource::Path(resolve(object, key, &text, reading)?)),
        Some(false) => base64(object, key, &text, BASE64),
        None => {
            let file = reading.root.as_ref().filter(|_| text.len() < LONGEST_PATH).map(|root| root.join(&text));
            if file.is_some_and(|file| file.is_file()) {
                return Ok(ImageSource::Path(resolve(object, key, &text, reading)?));
            }
            base64(object, key, &text, EITHER)
        }
    }
}

fn resolve(object: &Object<'_>, key: &str, text: &str, reading: &Reading) -> Result<PathBuf, DataError> {
    let wrong = |expected: String| object.context.error(object.name(key), expected, excerpt(text));
    let Some(root) = &reading.root else {
        return Err(wrong("an image in the record, or image_root, since the record's file is in no folder".to_owned()));
    };
    inside(root, text).ok_or_else(|| wrong(format!("a path inside {} (image_root: / permits any)", root.display())))
}

fn base64(object: &Object<'_>, field: &str, text: &str, expected: &str) -> Result<ImageSource, DataError> {
    let data = match text.strip_prefix("data:") {
        Some(rest) => rest.split_once(',').map_or(rest, |(_, data)| data),
        None => text,
    };
    let decode = |data: &str| base64::engine::general_purpose::STANDARD.decode(data);
    // Some encoders break lines.
    let decoded = decode(data.trim()).or_else(|error| match data.trim().contains(|c: char| c.is_ascii_whitespace()) {
        true => decode(&data.split_ascii_whitespace().collect::<String>()),
        false => Err(error),
    });
    match decoded {
        Ok(bytes) => Ok(ImageSource::Bytes(bytes.into())),
        Err(error) => Err(object.context.error(object.name(field), expected, format!("{:?}: {error}", excerpt(text)))),
    }
}
