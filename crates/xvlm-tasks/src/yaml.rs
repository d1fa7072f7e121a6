//! Configurations as YAML: errors name the field and the nearest known key, and single values can be replaced.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserializer, Serialize};
use serde_norway::{Error, Value};

use crate::error::ConfigProblem;
use crate::official;

/// A configuration that is read from YAML.
pub(crate) trait Configuration: DeserializeOwned {
    /// Checks that every value is in its range; says which is not, by its full name.
    fn check_values(&self) -> Result<(), String>;
}

/// Reads YAML; `overrides` are of the form `a.b=value`, the value again YAML.
///
/// # Errors
/// If it is no YAML, a key is unknown (the message has the nearest known one), or a value has the wrong type or is out of its
/// range.
pub(crate) fn read<T: Configuration>(file: &str, text: &str, overrides: &[String]) -> Result<T, ConfigProblem> {
    let problem = |message: String| ConfigProblem { file: file.to_owned(), message };
    // Straight from the text: only then do errors name line and column.
    let plain = || deserialized::<T, _>(serde_norway::Deserializer::from_str(text)).map_err(problem);
    if overrides.is_empty() {
        let config = plain()?;
        config.check_values().map_err(problem)?;
        return Ok(config);
    }
    let mut value: Value = serde_norway::from_str(text).map_err(|error| problem(error.to_string()))?;
    for assignment in overrides {
        set(&mut value, assignment)
            .map_err(|message| ConfigProblem { file: format!("--set {assignment}"), message })?;
    }
    let replaced = |message| ConfigProblem { file: format!("{file} with --set"), message };
    // What is wrong without the replacements too is wrong in the file.
    let config: T = deserialized(value).map_err(|message| plain().err().unwrap_or_else(|| replaced(message)))?;
    config.check_values().map_err(replaced)?;
    Ok(config)
}

/// A configuration file with single values replaced: one of this form, or one of the original, which `official` puts into this
/// form.
///
/// # Errors
/// As [`read`] and `official`, or if the file cannot be read.
pub(crate) fn open<T: Configuration + Serialize>(
    path: &Path,
    overrides: &[String],
    official: impl FnOnce(&serde_json::Value) -> Result<T, ConfigProblem>,
) -> Result<T, ConfigProblem> {
    let file = path.display().to_string();
    let problem = |message: String| ConfigProblem { file: file.clone(), message };
    let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
    let value = serde_norway::from_str::<serde_json::Value>(&text).ok().filter(official::is_official);
    let Some(value) = value else { return read(&file, &text, overrides) };
    let text = serde_norway::to_string(&official(&value)?);
    read(&file, &text.map_err(|error| problem(error.to_string()))?, overrides)
}

/// Replaces one value: `a.b=value`.
fn set(root: &mut Value, assignment: &str) -> Result<(), String> {
    let (path, value) = assignment.split_once('=').ok_or("expected the form key.key=value")?;
    let value: Value = serde_norway::from_str(value).map_err(|error| error.to_string())?;
    let mut slot = root;
    for key in path.split('.') {
        if slot.is_null() {
            *slot = Value::Mapping(Default::default());
        }
        let Value::Mapping(mapping) = slot else {
            return Err(format!("{key}: expected a section before it, found a value"));
        };
        slot = mapping.entry(Value::from(key)).or_insert(Value::Null);
    }
    *slot = value;
    Ok(())
}

/// Reads a section that has been taken out of a configuration; errors name the field, with the section's name before it.
pub(crate) fn section<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| match (error.path().to_string(), error.inner()) {
        (field, inner) if field == "." => format!("{name}: {inner}"),
        (field, inner) => format!("{name}.{field}: {inner}"),
    })
}

/// Reads a configuration; errors name the field, and the nearest known key.
fn deserialized<'de, T: DeserializeOwned, D: Deserializer<'de, Error = Error>>(from: D) -> Result<T, String> {
    serde_path_to_error::deserialize(from).map_err(|error| {
        let (field, message) = (error.path().to_string(), with_suggestion(&error.inner().to_string()));
        // Errors of YAML itself have no field, and those of serde_norway may begin with it.
        match field == "." || message.starts_with(&field) {
            true => message,
            false => format!("{field}: {message}"),
        }
    })
}

/// Adds the nearest known key to serde's "unknown field `x`, expected one of `a`, `b`".
fn with_suggestion(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    match quoted.next() {
        Some(unknown) if message.contains("unknown field") => format!("{message}{}", suggestion(unknown, quoted)),
        _ => message.to_owned(),
    }
}

/// The known name that is nearest to an unknown one, as the end of a message.
pub(crate) fn suggestion<'a>(unknown: &str, known: impl Iterator<Item = &'a str>) -> String {
    let nearest = known.max_by(|a, b| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b)));
    nearest.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default()
}
