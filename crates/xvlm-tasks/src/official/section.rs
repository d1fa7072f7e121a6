//! Named values of a file of the original, each asked for as what it should be.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::read;
use crate::error::ConfigProblem;
use crate::yaml::suggestion;

/// Named values of a file, or of a part of one.
pub(super) struct Section {
    values: Map<String, Value>,
    pub(super) file: PathBuf,
    /// What goes before a name in messages.
    prefix: String,
}

impl Section {
    pub(super) fn new(value: &Value, file: &Path) -> Result<Self, ConfigProblem> {
        let section = Self { values: Map::new(), file: file.to_owned(), prefix: String::new() };
        match value {
            Value::Object(values) => Ok(Self { values: values.clone(), ..section }),
            other => Err(section.problem("", "a mapping of names to values", &other.to_string())),
        }
    }

    pub(super) fn problem(&self, field: &str, expected: &str, found: &str) -> ConfigProblem {
        let message = format!("{}{field}: expected {expected}, found {found}", self.prefix);
        ConfigProblem { file: self.file.display().to_string(), message }
    }

    pub(super) fn has(&self, field: &str) -> bool {
        self.values.contains_key(field)
    }

    /// A value as `read` understands it.
    pub(super) fn get<T>(
        &self,
        field: &str,
        default: Option<T>,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, ConfigProblem> {
        match (self.values.get(field), default) {
            (Some(value), _) => read(value).ok_or_else(|| self.problem(field, expected, &value.to_string())),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.problem(field, expected, "nothing")),
        }
    }

    pub(super) fn size(&self, field: &str) -> Result<usize, ConfigProblem> {
        self.get(field, None, "a whole number", size)
    }

    pub(super) fn size_or(&self, field: &str, default: usize) -> Result<usize, ConfigProblem> {
        self.get(field, Some(default), "a whole number", size)
    }

    pub(super) fn sizes(&self, field: &str) -> Result<Vec<usize>, ConfigProblem> {
        self.get(field, None, "a list of whole numbers", |value| value.as_array()?.iter().map(size).collect())
    }

    pub(super) fn number(&self, field: &str) -> Result<f64, ConfigProblem> {
        self.get(field, None, "a number", number)
    }

    pub(super) fn number_or(&self, field: &str, default: f64) -> Result<f64, ConfigProblem> {
        self.get(field, Some(default), "a number", number)
    }

    pub(super) fn flag_or(&self, field: &str, default: bool) -> Result<bool, ConfigProblem> {
        self.get(field, Some(default), "true or false", Value::as_bool)
    }

    pub(super) fn text_or(&self, field: &str, default: &str) -> Result<String, ConfigProblem> {
        self.get(field, Some(default.to_owned()), "a text", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn texts(&self, field: &str) -> Result<Vec<String>, ConfigProblem> {
        self.get(field, Some(Vec::new()), "a list of texts", |value| {
            value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
        })
    }

    /// One file, or a list of them.
    pub(super) fn files(&self, field: &str) -> Result<Vec<PathBuf>, ConfigProblem> {
        self.get(field, Some(Vec::new()), "a file or a list of files", |value| match value {
            Value::String(file) => Some(vec![PathBuf::from(file)]),
            list => list.as_array()?.iter().map(|file| file.as_str().map(PathBuf::from)).collect(),
        })
    }

    /// A file or folder, if it is named.
    pub(super) fn path(&self, field: &str) -> Result<Option<PathBuf>, ConfigProblem> {
        self.get(field, Some(None), "a path", |value| value.as_str().map(|path| Some(PathBuf::from(path))))
    }

    /// A file or folder.
    pub(super) fn needed_path(&self, field: &str) -> Result<PathBuf, ConfigProblem> {
        self.path(field)?.ok_or_else(|| self.problem(field, "a path", "nothing"))
    }

    /// Checks a size that the file says a second time.
    pub(super) fn expect(&self, field: &str, expected: usize) -> Result<(), ConfigProblem> {
        match self.size_or(field, expected)? {
            found if found == expected => Ok(()),
            found => Err(self.problem(field, &expected.to_string(), &found.to_string())),
        }
    }

    /// Refuses what the file switches on.
    pub(super) fn expect_off(&self, field: &str) -> Result<(), ConfigProblem> {
        match self.flag_or(field, false)? {
            false => Ok(()),
            true => Err(self.problem(field, "false", "true")),
        }
    }

    /// Checks a word that only one is understood of.
    pub(super) fn expect_text(&self, field: &str, expected: &str) -> Result<(), ConfigProblem> {
        match self.text_or(field, expected)? {
            found if found == expected => Ok(()),
            found => Err(self.problem(field, expected, &found)),
        }
    }

    pub(super) fn refuse_unknown(&self, known: &[&str]) -> Result<(), ConfigProblem> {
        match self.values.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(unknown) => {
                let nearest = suggestion(unknown, known.iter().copied());
                let message = format!("{}{unknown}: unknown field `{unknown}`{nearest}", self.prefix);
                Err(ConfigProblem { file: self.file.display().to_string(), message })
            }
        }
    }

    /// A part of the file; empty if it is not there.
    pub(super) fn section(&self, field: &str) -> Result<Self, ConfigProblem> {
        let values = self.get(field, Some(Map::new()), "a mapping", |value| value.as_object().cloned())?;
        Ok(Self { values, file: self.file.clone(), prefix: format!("{}{field}.", self.prefix) })
    }

    /// A part of the file, or a file of its own that is named there.
    pub(super) fn file(&self, field: &str) -> Result<Self, ConfigProblem> {
        let name = match self.values.get(field) {
            Some(Value::String(name)) => name,
            Some(Value::Object(_)) => return self.section(field),
            Some(other) => return Err(self.problem(field, "a file or a mapping", &other.to_string())),
            None => return Err(self.problem(field, "a file or a mapping", "nothing")),
        };
        let above = self.file.ancestors().skip(1).map(|folder| folder.join(name));
        let tried: Vec<PathBuf> = [PathBuf::from(name)].into_iter().chain(above).collect();
        match tried.iter().find(|path| path.is_file()) {
            Some(path) => Self::new(&read(path)?, path),
            None => {
                Err(self.problem(field, "a file that is there", &format!("{name}, neither here nor above the file")))
            }
        }
    }
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok())
}

/// A number; YAML 1.1 reads `1e-4`, which has no point, as a text.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}
