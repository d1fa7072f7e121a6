//! Items of JSON documents that do not fit in memory.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::stream::open_plain;
use crate::error::{DataError, Place};
use crate::json::{Context, io_error};

/// Where the next item of a JSON document starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Start,
    /// Inside the top-level array, or an array that is a section of the top-level object.
    Array {
        of_object: bool,
        first: bool,
    },
    Object {
        first: bool,
    },
    End,
}

/// One item of an array.
#[derive(Debug)]
pub(crate) struct Item<'a> {
    /// Which of the sections it is in; 0 in a top-level array.
    pub(crate) section: usize,
    /// Its number in the array, from 0.
    pub(crate) number: usize,
    /// Its first byte in the file.
    pub(crate) offset: u64,
    /// Its JSON.
    pub(crate) bytes: &'a [u8],
}

/// The items of a JSON array, or of those arrays of a JSON object that are named, one at a time; a named field that is no
/// array is an item itself. What is not asked for is
/// skipped without being built.
pub(crate) struct JsonItems<R> {
    reader: R,
    path: PathBuf,
    sections: &'static [&'static str],
    section: usize,
    number: usize,
    offset: u64,
    at: At,
    bytes: Vec<u8>,
}

impl JsonItems<BufReader<File>> {
    /// # Errors
    /// [`DataError::Io`].
    pub(crate) fn open(path: &Path, sections: &'static [&'static str]) -> Result<Self, DataError> {
        Ok(Self::new(BufReader::with_capacity(1 << 18, open_plain(path)?), path, sections))
    }
}

impl<R: BufRead> JsonItems<R> {
    /// More than any item of any published file; a file that is damaged does not fill the memory.
    const LONGEST: usize = 1 << 28;

    pub(crate) fn new(reader: R, path: &Path, sections: &'static [&'static str]) -> Self {
        let (path, bytes) = (path.to_owned(), Vec::new());
        Self { reader, path, sections, section: 0, number: 0, offset: 0, at: At::Start, bytes }
    }

    fn broken(&self, expected: &str, found: impl Into<String>) -> DataError {
        let context = Context { path: &self.path, place: Place::Whole };
        context.error(format!("byte {}", self.offset), format!("JSON with {expected}"), found)
    }

    /// The next byte that is no white space, not consumed.
    fn peek(&mut self) -> Result<Option<u8>, DataError> {
        loop {
            let chunk = self.reader.fill_buf().map_err(|source| io_error(&self.path, source))?;
            if chunk.is_empty() {
                return Ok(None);
            }
            let blank = chunk.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let next = chunk.get(blank).copied();
            self.reader.consume(blank);
            self.offset += blank as u64;
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    fn skip_byte(&mut self) {
        self.reader.consume(1);
        self.offset += 1;
    }

    fn expect(&mut self, byte: u8) -> Result<(), DataError> {
        match self.peek()? {
            Some(found) if found == byte => {
                self.skip_byte();
                Ok(())
            }
            found => Err(self.broken(&format!("'{}'", char::from(byte)), show(found))),
        }
    }

    /// Consumes a value, into `bytes` if `keep`.
    fn value(&mut self, keep: bool) -> Result<(), DataError> {
        self.bytes.clear();
        let Some(first) = self.peek()? else { return Err(self.broken("a value", "the end of the file")) };
        if matches!(first, b',' | b':' | b']' | b'}') {
            return Err(self.broken("a value", show(Some(first))));
        }
        let nested = matches!(first, b'{' | b'[' | b'"');
        let (mut depth, mut text, mut escaped) = (0u64, false, false);
        loop {
            let chunk = self.reader.fill_buf().map_err(|source| io_error(&self.path, source))?;
            if chunk.is_empty() {
                return if nested { Err(self.broken("a whole value", "the end of the file")) } else { Ok(()) };
            }
            let mut end = None;
            for (i, &byte) in chunk.iter().enumerate() {
                if text {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => {
                            text = false;
                            if depth == 0 {
                                end = Some(i + 1);
                                break;
                            }
                        }
                        _ => {}
                    }
                    continue;
                }
                match byte {
                    b'"' => text = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' if depth > 0 => {
                        depth -= 1;
                        if depth == 0 {
                            end = Some(i + 1);
                            break;
                        }
                    }
                    b',' | b']' | b'}' if depth == 0 => {
                        end = Some(i);
                        break;
                    }
                    _ if depth == 0 && byte.is_ascii_whitespace() => {
                        end = Some(i);
                        break;
                    }
                    _ => {}
                }
            }
            let used = end.unwrap_or(chunk.len());
            if keep {
                self.bytes.extend_from_slice(&chunk[..used]);
            }
            self.reader.consume(used);
            self.offset += used as u64;
            if self.bytes.len() > Self::LONGEST {
                return Err(self.broken("items of at most 256 MiB", "a longer one"));
            }
            if end.is_some() {
                return Ok(());
            }
        }
    }

    /// The next item; `None` at the document's end.
    pub(crate) fn next(&mut self) -> Result<Option<Item<'_>>, DataError> {
        loop {
            match self.at {
                At::End => return Ok(None),
                At::Start => {
                    const BOM: [u8; 3] = [0xef, 0xbb, 0xbf];
                    if self.reader.fill_buf().is_ok_and(|chunk| chunk.starts_with(&BOM)) {
                        self.reader.consume(BOM.len());
                        self.offset += BOM.len() as u64;
                    }
                    self.at = match self.peek()? {
                        Some(b'[') => At::Array { of_object: false, first: true },
                        Some(b'{') => At::Object { first: true },
                        found => return Err(self.broken("a list or an object", show(found))),
                    };
                    self.skip_byte();
                }
                At::Object { first } => match self.peek()? {
                    Some(b'}') => {
                        self.skip_byte();
                        return self.finish();
                    }
                    found => {
                        if !first {
                            self.expect(b',')?;
                        } else if found != Some(b'"') {
                            return Err(self.broken("a field's name", show(found)));
                        }
                        if self.field()? {
                            let offset = self.offset - self.bytes.len() as u64;
                            return Ok(Some(Item { section: self.section, number: 0, offset, bytes: &self.bytes }));
                        }
                    }
                },
                At::Array { of_object, first } => {
                    if self.peek()? == Some(b']') {
                        self.skip_byte();
                        if !of_object {
                            return self.finish();
                        }
                        self.at = At::Object { first: false };
                        continue;
                    }
                    if !first {
                        self.expect(b',')?;
                    }
                    self.peek()?;
                    self.at = At::Array { of_object, first: false };
                    let (section, number, offset) = (self.section, self.number, self.offset);
                    self.value(true)?;
                    self.number += 1;
                    return Ok(Some(Item { section, number, offset, bytes: &self.bytes }));
                }
            }
        }
    }

    /// A field of the top-level object: entered if it is a section that was asked for, an
    /// item (`true`, now in `bytes`) if it is one that is no list, skipped otherwise.
    fn field(&mut self) -> Result<bool, DataError> {
        if self.peek()? != Some(b'"') {
            let found = self.peek()?;
            return Err(self.broken("a field's name", show(found)));
        }
        self.value(true)?;
        let name: String =
            serde_json::from_slice(&self.bytes).map_err(|error| self.broken("a field's name", error.to_string()))?;
        self.expect(b':')?;
        match self.sections.iter().position(|section| *section == name) {
            Some(section) if self.peek()? == Some(b'[') => {
                self.skip_byte();
                (self.section, self.number) = (section, 0);
                self.at = At::Array { of_object: true, first: true };
            }
            found => {
                self.value(found.is_some())?;
                self.at = At::Object { first: false };
                if let Some(section) = found {
                    (self.section, self.number) = (section, 0);
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn finish(&mut self) -> Result<Option<Item<'_>>, DataError> {
        self.at = At::End;
        match self.peek()? {
            None => Ok(None),
            found => Err(self.broken("nothing after its end", show(found))),
        }
    }
}

fn show(byte: Option<u8>) -> String {
    match byte {
        None => "the end of the file".to_owned(),
        Some(byte) if byte.is_ascii_graphic() => format!("'{}'", char::from(byte)),
        Some(byte) => format!("byte {byte}"),
    }
}

/// An object without the fields that are large and that nothing here needs.
struct Slim(Map<String, Value>);

impl<'de> Deserialize<'de> for Slim {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Slim;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Slim, A::Error> {
                let mut map = Map::new();
                while let Some(name) = access.next_key::<String>()? {
                    match name.as_str() {
                        // Polygons of COCO; the mouse and the clock of Localized Narratives.
                        "segmentation" | "traces" | "timed_caption" => {
                            access.next_value::<IgnoredAny>()?;
                        }
                        _ => {
                            let value = access.next_value()?;
                            map.insert(name, value);
                        }
                    }
                }
                Ok(Slim(map))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Parses an item.
pub(crate) fn parse_item(path: &Path, place: &Place, bytes: &[u8]) -> Result<Value, DataError> {
    let parsed = match bytes.first() {
        Some(b'{') => serde_json::from_slice::<Slim>(bytes).map(|slim| Value::Object(slim.0)),
        _ => serde_json::from_slice(bytes),
    };
    parsed.map_err(|source| DataError::Json { path: path.to_owned(), place: place.clone(), source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn items(
        json: &str,
        sections: &'static [&'static str],
        buffer: usize,
    ) -> Result<Vec<(usize, usize, String)>, String> {
        let reader = BufReader::with_capacity(buffer, json.as_bytes());
        let mut items = JsonItems::new(reader, Path::new("x.json"), sections);
        let mut all = Vec::new();
        while let Some(item) = items.next().map_err(|error| error.to_string())? {
            assert_eq!(&json.as_bytes()[item.offset as usize..][..item.bytes.len()], item.bytes);
            all.push((item.section, item.number, String::from_utf8(item.bytes.to_vec()).unwrap()));
        }
        Ok(all)
    }

    #[test]
    fn items_are_those_of_a_json_parser() {
        let json = r#" {"info": {"a": [1, "]}\"", {}]}, "images": [ {"id":1, "s":"a\\\"]"} ,[2,[3]],4 , "x", null],
            "n": -1.5e3, "annotations":[true], "empty":[], "images2": [7]} "#;
        let value: Value = serde_json::from_str(json).unwrap();
        for buffer in [1, 2, 3, 7, 64, 4096] {
            let found = items(json, &["annotations", "images"], buffer).unwrap();
            for (section, name, count) in [(0, "annotations", 1), (1, "images", 5)] {
                let mine: Vec<Value> = found
                    .iter()
                    .filter(|item| item.0 == section)
                    .map(|item| serde_json::from_str(&item.2).unwrap())
                    .collect();
                assert_eq!(mine.len(), count);
                assert_eq!(&mine, value[name].as_array().unwrap());
            }
        }
        assert_eq!(items("[]", &[], 8).unwrap().len(), 0);
        assert_eq!(items("\u{feff}[1,2 ]\n", &[], 8).unwrap().len(), 2);
    }

    #[test]
    fn damaged_documents_are_errors() {
        for json in [
            "",
            "[",
            "[1",
            "[1,",
            "[1 2]",
            "{\"images\": [1}",
            "{\"a\" 1}",
            "{,}",
            "[,]",
            "[\"a]",
            "[1]x",
            "7",
            "{1:2}",
        ] {
            for buffer in [1, 64] {
                let result = items(json, &["images"], buffer);
                // A stray bracket inside a scalar is found when the item is parsed.
                let parses = |all: Vec<(usize, usize, String)>| {
                    all.iter().all(|item| serde_json::from_str::<Value>(&item.2).is_ok())
                };
                assert!(!result.is_ok_and(parses), "{json}");
            }
        }
    }

    /// Any JSON, some levels deep, with strings that look like its syntax.
    fn json() -> impl Strategy<Value = Value> {
        let text = "[\\[\\]{}\",:\\\\a-c\u{e9} ]{0,8}";
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            text.prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(text, inner, 0..5).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_document_comes_apart_as_a_parser_has_it(
            list in prop::collection::vec(json(), 0..6),
            other in json(),
            pretty in any::<bool>(),
            buffer in 1usize..40,
        ) {
            let document = serde_json::json!({ "before": other, "images": list, "zzz": other });
            let write = if pretty { serde_json::to_string_pretty } else { serde_json::to_string };
            let alone = write(&Value::from(list.clone())).unwrap();
            let images: &[&str] = &["images"];
            for (text, sections) in [(write(&document).unwrap(), images), (alone, &[])] {
                let found = items(&text, sections, buffer).unwrap();
                let found: Vec<Value> = found.iter().map(|item| serde_json::from_str(&item.2).unwrap()).collect();
                prop_assert_eq!(&found, &list);
            }
        }

        #[test]
        fn damage_ends_in_an_error_or_in_items(
            list in prop::collection::vec(json(), 0..6),
            place in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<bool>(),
        ) {
            let mut bytes = serde_json::to_vec(&serde_json::json!({ "images": list })).unwrap();
            let place = place.index(bytes.len());
            bytes[place] = byte;
            bytes.truncate(if cut { place } else { bytes.len() });
            let mut items = JsonItems::new(BufReader::with_capacity(7, bytes.as_slice()), Path::new("x"), &["images"]);
            let mut count = 0;
            while let Ok(Some(item)) = items.next() {
                prop_assert!(item.offset as usize + item.bytes.len() <= bytes.len());
                count += 1;
                prop_assert!(count <= bytes.len());
            }
        }
    }
}
