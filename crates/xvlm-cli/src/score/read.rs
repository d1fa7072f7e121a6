//! Reading results and references, with errors that name file, item and field.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};
use xvlm::data::{DataError, Place};

use crate::output::CliError;

/// An object and where it stands.
pub(super) struct Item<'a> {
    path: &'a Path,
    place: Place,
    map: &'a Map<String, Value>,
}

pub(super) fn text(path: &Path) -> Result<String, CliError> {
    fs::read_to_string(path).map_err(CliError::io(path))
}

/// A file that is one JSON document.
pub(super) fn document<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, CliError> {
    serde_json::from_str(&text(path)?).map_err(|source| json(path, Place::Whole, source))
}

pub(super) fn json(path: &Path, place: Place, source: serde_json::Error) -> CliError {
    DataError::Json { path: path.to_owned(), place, source }.into()
}

pub(super) fn wrong(
    path: &Path,
    place: Place,
    field: impl Into<String>,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> CliError {
    DataError::Field { path: path.into(), place, field: field.into(), expected: expected.into(), found: found.into() }
        .into()
}

/// The objects of a list, which must have one.
pub(super) fn items<'a>(path: &'a Path, field: &str, list: &'a Value) -> Result<Vec<Item<'a>>, CliError> {
    let Some(list) = list.as_array() else {
        return Err(wrong(path, Place::Whole, field, "a list of objects", kind(list)));
    };
    if list.is_empty() {
        return Err(wrong(path, Place::Whole, field, "at least one object", "none"));
    }
    list.iter().enumerate().map(|(number, value)| Item::new(path, Place::Item(number), value)).collect()
}

/// What a value is, for messages.
pub(super) fn kind(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(map) => format!("an object of {} fields", map.len()),
        Value::String(text) if text.chars().count() > 60 => {
            format!("{:?}…", text.chars().take(60).collect::<String>())
        }
        plain => plain.to_string(),
    }
}

/// A number or a string, as a string.
pub(super) fn id(value: &Value) -> Option<String> {
    match value {
        Value::String(id) if !id.is_empty() => Some(id.clone()),
        Value::Number(id) if id.is_i64() || id.is_u64() => Some(id.to_string()),
        _ => None,
    }
}

impl<'a> Item<'a> {
    pub(super) fn new(path: &'a Path, place: Place, value: &'a Value) -> Result<Self, CliError> {
        match value.as_object() {
            Some(map) => Ok(Self { path, place, map }),
            None => Err(wrong(path, place, "item", "an object", kind(value))),
        }
    }

    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field)
    }

    /// Says that a field should be something else.
    pub(super) fn wrong(&self, field: &str, expected: impl Into<String>) -> CliError {
        let found = self.get(field).map_or_else(|| "nothing".to_owned(), kind);
        wrong(self.path, self.place.clone(), field, expected, found)
    }

    pub(super) fn text(&self, field: &str) -> Result<&'a str, CliError> {
        self.get(field).and_then(Value::as_str).ok_or_else(|| self.wrong(field, "a string"))
    }

    /// An optional string; empty if it is not there.
    pub(super) fn text_or_empty(&self, field: &str) -> Result<&'a str, CliError> {
        if self.get(field).is_some_and(|value| !value.is_null()) { self.text(field) } else { Ok("") }
    }

    pub(super) fn id(&self, field: &str) -> Result<String, CliError> {
        self.get(field).and_then(id).ok_or_else(|| self.wrong(field, "a whole number or a string"))
    }

    pub(super) fn list(&self, field: &str) -> Result<&'a [Value], CliError> {
        match self.get(field).and_then(Value::as_array) {
            Some(list) if !list.is_empty() => Ok(list),
            _ => Err(self.wrong(field, "a list of at least one")),
        }
    }

    /// So many numbers.
    pub(super) fn numbers<const N: usize>(&self, field: &str) -> Result<[f32; N], CliError> {
        let list = self.get(field).and_then(Value::as_array);
        let numbers = list.and_then(|list| list.iter().map(number).collect::<Option<Vec<_>>>());
        let numbers = numbers.and_then(|numbers| numbers.try_into().ok());
        numbers.ok_or_else(|| self.wrong(field, format!("{N} numbers")))
    }
}

fn number(value: &Value) -> Option<f32> {
    value.as_f64().map(|number| number as f32).filter(|number| number.is_finite())
}

/// Refuses an identifier that has come before.
#[derive(Default)]
pub(super) struct Once {
    places: HashMap<String, Place>,
}

impl Once {
    pub(super) fn add(&mut self, path: &Path, place: Place, field: &str, id: &str) -> Result<(), CliError> {
        match self.places.get(id) {
            None => {
                self.places.insert(id.to_owned(), place);
                Ok(())
            }
            Some(first) => {
                Err(wrong(path, place, field, "an identifier of its own", format!("{id}, which{first} has")))
            }
        }
    }
}

/// A list of results, `[{field: identifier, …}]`, each of another item; with their identifiers.
pub(super) fn results<'a>(path: &'a Path, list: &'a Value, field: &str) -> Result<Vec<(String, Item<'a>)>, CliError> {
    let mut once = Once::default();
    let named = |item: Item<'a>| {
        let id = item.id(field)?;
        once.add(path, item.place.clone(), field, &id)?;
        Ok((id, item))
    };
    items(path, "results", list)?.into_iter().map(named).collect()
}

/// The fields of an object in their order, those of the same name among them, of which other maps keep the last only.
pub(super) struct Fields<T>(pub(super) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Fields<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for All<T> {
            type Value = Fields<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<T>, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(All(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn wrong_results_are_named() {
        let path = Path::new("r.json");
        let refused = |list: Value| results(path, &list, "image_id").map(|_| ()).unwrap_err().to_string();
        for (list, expected) in [
            (json!({}), "r.json: results: expected a list of objects, found an object of 0 fields"),
            (json!([]), "r.json: results: expected at least one object, found none"),
            (json!([1]), "r.json item 0: item: expected an object, found 1"),
            (json!([{"image": 1}]), "r.json item 0: image_id: expected a whole number or a string, found nothing"),
            (json!([{"image_id": 1.5}]), "r.json item 0: image_id: expected a whole number or a string, found 1.5"),
            (
                json!([{"image_id": 7}, {"image_id": 8}, {"image_id": "7"}]),
                "r.json item 2: image_id: expected an identifier of its own, found 7, which item 0 has",
            ),
        ] {
            assert_eq!(refused(list), expected);
        }
        let list = json!([{"image_id": 7, "caption": 5, "box": [1, 2, "3"]}]);
        let found = results(path, &list, "image_id").unwrap();
        let item = &found[0].1;
        assert_eq!(item.text("caption").unwrap_err().to_string(), "r.json item 0: caption: expected a string, found 5");
        let refused = item.numbers::<3>("box").unwrap_err().to_string();
        assert_eq!(refused, "r.json item 0: box: expected 3 numbers, found a list of 3");
    }

    #[test]
    fn fields_of_the_same_name_are_kept() {
        let Fields(fields) = serde_json::from_str::<Fields<i64>>(r#"{"b": 1, "a": 2, "b": 3}"#).unwrap();
        assert_eq!(fields, [("b".to_owned(), 1), ("a".to_owned(), 2), ("b".to_owned(), 3)]);
    }
}
