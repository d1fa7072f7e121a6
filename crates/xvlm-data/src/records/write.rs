//! From a record to a JSON object, which reads back as the same record.

use std::path::Path;

use base64::Engine;
use serde_json::{Map, Number, Value, json};

use super::{Element, ImageSource, Record};
use crate::error::DataError;

impl Record {
    /// The record as the JSON object of a line: an image in memory as base64 under `binary`, that of a file as its path
    /// under `image_rpath`, relative to `root` if the file lies below it.
    ///
    /// # Errors
    ///
    /// [`DataError::Field`] when the path is not UTF-8.
    pub fn to_json(&self, root: &Path) -> Result<Value, DataError> {
        let mut object = self.texts_to_json();
        match &self.image {
            ImageSource::Bytes(bytes) => {
                object.insert("binary".into(), base64::engine::general_purpose::STANDARD.encode(bytes).into());
            }
            ImageSource::Path(path) => {
                object.insert("image_rpath".into(), self.path_to_json(path, root)?);
            }
        }
        Ok(Value::Object(object))
    }

    pub(crate) fn path_to_json(&self, path: &Path, root: &Path) -> Result<Value, DataError> {
        // What is relative to no root would be all of the path.
        let below = path.strip_prefix(root).ok().filter(|_| !root.as_os_str().is_empty() && root != Path::new("/"));
        let text = below.unwrap_or(path).to_str().ok_or_else(|| DataError::Field {
            path: self.origin.file.as_ref().into(),
            place: self.origin.place.clone(),
            field: "image_rpath".to_owned(),
            expected: "a path of UTF-8".to_owned(),
            found: path.display().to_string(),
        })?;
        Ok(text.into())
    }

    /// What the object has beside the image.
    pub(crate) fn texts_to_json(&self) -> Map<String, Value> {
        let mut object = Map::new();
        if !self.captions.is_empty() {
            object.insert("caption".into(), json!(self.captions));
        }
        if !self.elems.is_empty() {
            object.insert("elems".into(), self.elems.iter().map(element).collect());
        }
        if !self.questions.is_empty() {
            object.insert("questions".into(), json!(self.questions));
        }
        object
    }
}

fn element(elem: &Element) -> Value {
    let mut object = Map::new();
    object.insert("bb".into(), elem.bbox.iter().map(|&number| decimal(number)).collect());
    for (key, texts) in [("caption", &elem.texts), ("attributes", &elem.attributes), ("label", &elem.labels)] {
        if !texts.is_empty() {
            object.insert(key.into(), json!(texts));
        }
    }
    Value::Object(object)
}

/// The shortest decimal that reads back as the number: 0.1, where its value as f64 is 0.10000000149011612.
fn decimal(number: f32) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e9 {
        return (number as i64).into();
    }
    let short = number.to_string().parse::<f64>().ok().filter(|&short| short as f32 == number);
    Number::from_f64(short.unwrap_or(f64::from(number))).map_or(Value::Null, Value::Number)
}
