//! Reading JSON values with errors that name file, place, field, what was expected and what was found.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{DataError, Place, excerpt};
use crate::records::paths;

/// Where a value comes from: enough to name it in an error.
#[derive(Clone)]
pub(crate) struct Context<'a> {
    pub(crate) path: &'a Path,
    pub(crate) place: Place,
}

/// One JSON object and where it stands.
pub(crate) struct Object<'a> {
    pub(crate) context: Context<'a>,
    /// Prefix of the names of its fields, such as `elems[2].`.
    prefix: String,
    map: &'a Map<String, Value>,
}

/// What a value is, for messages.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Array(items) if items.len() > 8 => format!("an array of {}", items.len()),
        Value::Object(map) if map.len() > 4 => format!("an object of {} fields", map.len()),
        other => excerpt(&other.to_string()),
    }
}

impl<'a> Context<'a> {
    pub(crate) fn error(
        &self,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> DataError {
        DataError::Field {
            path: self.path.into(),
            place: self.place.clone(),
            field: field.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    pub(crate) fn object(&self, value: &'a Value, name: &str) -> Result<Object<'a>, DataError> {
        let map = value.as_object().ok_or_else(|| self.error(name, "an object", describe(value)))?;
        let prefix = if name == "record" { String::new() } else { format!("{name}.") };
        Ok(Object { context: self.clone(), prefix, map })
    }

    /// The folder that the field `name` names below `root`.
    pub(crate) fn folder(&self, name: &str, root: &Path, text: &str) -> Result<PathBuf, DataError> {
        paths::inside(root, text).ok_or_else(|| self.outside(name, root, text))
    }

    /// The file that the field `name` names below `root`.
    pub(crate) fn file(&self, name: &str, root: &Path, text: &str) -> Result<PathBuf, DataError> {
        paths::file_inside(root, text).ok_or_else(|| self.outside(name, root, text))
    }

    fn outside(&self, name: &str, root: &Path, text: &str) -> DataError {
        let root = if root.as_os_str().is_empty() { Path::new(".") } else { root };
        self.error(name, format!("a path inside {} (a root of / permits any)", root.display()), excerpt(text))
    }

    fn text(&self, value: &Value, name: &str) -> Result<String, DataError> {
        match value.as_str() {
            Some(text) if !text.trim().is_empty() => Ok(text.to_owned()),
            _ => Err(self.error(name, "a non-empty string", describe(value))),
        }
    }
}

impl<'a> Object<'a> {
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// The value of a field; `null` counts as absent.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn missing(&self, field: &str, expected: &str) -> DataError {
        self.context.error(self.name(field), expected, "nothing")
    }

    pub(crate) fn wrong(&self, field: &str, expected: &str, value: &Value) -> DataError {
        self.context.error(self.name(field), expected, describe(value))
    }

    /// A string with something in it.
    pub(crate) fn text(&self, field: &str) -> Result<String, DataError> {
        let value = self.get(field).ok_or_else(|| self.missing(field, "a non-empty string"))?;
        self.context.text(value, &self.name(field))
    }

    /// The file that a string names below `root`.
    pub(crate) fn file(&self, field: &str, root: &Path) -> Result<PathBuf, DataError> {
        self.context.file(&self.name(field), root, &self.text(field)?)
    }

    /// A string or a list of strings, each with something in it; absent is an empty list.
    pub(crate) fn texts(&self, field: &str) -> Result<Vec<String>, DataError> {
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .enumerate()
                .map(|(i, item)| self.context.text(item, &format!("{}[{i}]", self.name(field))))
                .collect(),
            Some(value @ Value::String(_)) => Ok(vec![self.context.text(value, &self.name(field))?]),
            Some(value) => Err(self.wrong(field, "a string or a list of strings", value)),
        }
    }

    /// A list, or nothing.
    pub(crate) fn list(&self, field: &str) -> Result<&'a [Value], DataError> {
        match self.get(field) {
            None => Ok(&[]),
            Some(Value::Array(items)) => Ok(items),
            Some(value) => Err(self.wrong(field, "a list", value)),
        }
    }

    /// A box (x, y, w, h) in pixels with a positive area.
    pub(crate) fn bbox(&self, field: &str) -> Result<[f32; 4], DataError> {
        const EXPECTED: &str = "a box [x, y, w, h] of four numbers in pixels with w > 0 and h > 0";
        let value = self.get(field).ok_or_else(|| self.missing(field, EXPECTED))?;
        let mut bbox = [0f32; 4];
        let numbers = value.as_array().filter(|items| items.len() == 4);
        let numbers = numbers.ok_or_else(|| self.wrong(field, EXPECTED, value))?;
        for (slot, number) in bbox.iter_mut().zip(numbers) {
            *slot = number
                .as_f64()
                .map(|number| number as f32)
                .filter(|number| number.is_finite())
                .ok_or_else(|| self.wrong(field, EXPECTED, value))?;
        }
        if bbox[2] > 0.0 && bbox[3] > 0.0 { Ok(bbox) } else { Err(self.wrong(field, EXPECTED, value)) }
    }

    /// An identifier: a string, or a number as its digits.
    pub(crate) fn id(&self, field: &str) -> Result<String, DataError> {
        match self.get(field) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Number(number)) => Ok(number.to_string()),
            Some(value) => Err(self.wrong(field, "a number or a string", value)),
            None => Err(self.missing(field, "a number or a string")),
        }
    }

    /// A number of pixels.
    pub(crate) fn pixels(&self, field: &str) -> Result<u32, DataError> {
        const EXPECTED: &str = "a positive whole number of pixels";
        let value = self.get(field).ok_or_else(|| self.missing(field, EXPECTED))?;
        value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .filter(|&number| number > 0)
            .ok_or_else(|| self.wrong(field, EXPECTED, value))
    }
}

/// Reads a whole JSON file.
pub(crate) fn read_value(path: &Path) -> Result<Value, DataError> {
    let bytes = std::fs::read(path).map_err(|source| io_error(path, source))?;
    serde_json::from_slice(&bytes).map_err(|source| DataError::Json {
        path: path.to_owned(),
        place: Place::Whole,
        source,
    })
}

/// The folder a file lies in.
pub(crate) fn folder(path: &Path) -> PathBuf {
    path.parent().map(Path::to_owned).unwrap_or_default()
}

pub(crate) fn io_error(path: &Path, source: std::io::Error) -> DataError {
    DataError::Io { path: path.to_owned(), source }
}
