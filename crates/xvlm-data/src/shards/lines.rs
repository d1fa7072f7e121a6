//! JSON-lines shards: finding the lines that are records without building their values.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::index::{Index, Need};
use super::{Form, Found};
use crate::error::{DataError, Place};
use crate::json::io_error;
use crate::records::{Reading, Record, RecordKeys, parse_line};
use crate::storage::FileReader;

/// Finds the records of a JSON-lines file of `length` bytes. What is no record is told to `found`.
pub(super) fn scan(
    file: &File,
    length: u64,
    name: &Arc<Path>,
    reading: &Reading,
    longest: u32,
    found: &mut Found<'_>,
) -> Result<Index, DataError> {
    let io = |source: io::Error| io_error(name, source);
    let mut index = Index::new(Form::Lines);
    let mut reader = BufReader::with_capacity(1 << 18, FileReader::new(file, length));
    let (mut bytes, mut offset, mut line) = (Vec::new(), 0, 0usize);
    while offset < length {
        line += 1;
        bytes.clear();
        let most = u64::from(longest) + 1;
        let mut read = (&mut reader).take(most).read_until(b'\n', &mut bytes).map_err(io)? as u64;
        if read == 0 {
            break;
        }
        let too_long = read == most && bytes.last() != Some(&b'\n');
        if too_long {
            read += reader.skip_until(b'\n').map_err(io)? as u64;
            index.skip_line();
            found(&mut index, too_long_line(name, line, longest, read));
        } else if bytes.trim_ascii().is_empty() {
            index.skip_line();
        } else {
            match flags(&bytes, &reading.keys) {
                Some(flags) => {
                    if !index.push(offset, read as u32, flags) {
                        let place = Place::Line(line);
                        let expected = format!("at most {} records", u32::MAX);
                        return Err(DataError::Shard {
                            path: name.to_path_buf(),
                            place,
                            expected,
                            found: "more".into(),
                        });
                    }
                }
                None => match parse_line(&bytes, name, line, reading) {
                    Ok(record) => {
                        index.push(offset, read as u32, flags_of(&record));
                    }
                    Err(error) => {
                        index.skip_line();
                        found(&mut index, error);
                    }
                },
            }
        }
        offset += read;
    }
    Ok(index.finish(length))
}

fn too_long_line(name: &Arc<Path>, line: usize, longest: u32, length: u64) -> DataError {
    DataError::Shard {
        path: name.to_path_buf(),
        place: Place::Line(line),
        expected: format!("a record of at most {longest} bytes"),
        found: format!("{length}"),
    }
}

/// What a record has.
pub(crate) fn flags_of(record: &Record) -> u8 {
    let has = [!record.captions.is_empty(), !record.elems.is_empty(), !record.questions.is_empty()];
    Need::ALL.iter().zip(has).map(|(need, has)| if has { need.flag() } else { 0 }).sum()
}

/// What the record of a line has, as far as its outermost keys tell; `None` if that makes no record.
fn flags(bytes: &[u8], keys: &RecordKeys) -> Option<u8> {
    outline(bytes, keys).filter(|&(image, flags)| image && flags != 0).map(|(_, flags)| flags)
}

/// Whether an object has an image, and what else it has; `None` if it is no JSON object.
pub(super) fn outline(bytes: &[u8], keys: &RecordKeys) -> Option<(bool, u8)> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let outlined = Outline { keys }.deserialize(&mut deserializer).ok()?;
    deserializer.end().ok()?;
    Some((outlined.image, outlined.flags))
}

struct Outline<'a> {
    keys: &'a RecordKeys,
}

#[derive(Default)]
struct Outlined {
    image: bool,
    flags: u8,
}

impl<'de> DeserializeSeed<'de> for Outline<'_> {
    type Value = Outlined;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Outlined, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Outline<'_> {
    type Value = Outlined;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Outlined, A::Error> {
        let mut outlined = Outlined::default();
        while let Some(Key(key)) = map.next_key()? {
            let key = key.as_ref();
            let need = match key {
                "elems" => Some(Need::Elems),
                "questions" => Some(Need::Questions),
                key if key == self.keys.caption() => Some(Need::Captions),
                _ => None,
            };
            match need {
                Some(need) => {
                    // Of a key that is there twice, the last counts, as for a parser.
                    outlined.flags &= !need.flag();
                    outlined.flags |= if map.next_value::<Something>()?.0 { need.flag() } else { 0 };
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                    outlined.image |= self.keys.is_image(key);
                }
            }
        }
        Ok(outlined)
    }
}

struct Key<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl<'de> Visitor<'de> for Name {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Name)
    }
}

/// Whether a value is more than nothing: a string with something in it, or a list with an item.
struct Something(bool);

impl<'de> Deserialize<'de> for Something {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Look;
        impl<'de> Visitor<'de> for Look {
            type Value = bool;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list")
            }

            fn visit_str<E>(self, text: &str) -> Result<bool, E> {
                Ok(!text.trim().is_empty())
            }

            fn visit_unit<E>(self) -> Result<bool, E> {
                Ok(false)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<bool, A::Error> {
                let mut any = false;
                while items.next_element::<IgnoredAny>()?.is_some() {
                    any = true;
                }
                Ok(any)
            }
        }
        deserializer.deserialize_any(Look).map(Something)
    }
}
