//! The header of a safetensors file.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::numbers::numbers;
use super::storage::{Layout, Storage};
use super::{Contents, Part, TensorInfo};
use crate::error::WeightsError;

/// The format's own limit.
const LONGEST_HEADER: u64 = 100_000_000;
/// The one entry of a header that is no tensor.
const METADATA: &str = "__metadata__";

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

pub(super) fn open(path: &Arc<Path>, len: u64) -> Result<Contents, WeightsError> {
    let part = Part::new(path, "header");
    let mut file = File::open(path).map_err(WeightsError::io(path))?;
    let mut header_len = [0; 8];
    file.read_exact(&mut header_len).map_err(WeightsError::io(path))?;
    let header_len = u64::from_le_bytes(header_len);
    let most = LONGEST_HEADER.min(len.saturating_sub(8));
    if header_len > most {
        return Err(part.malformed(format!("at most {most} bytes"), format!("{header_len}")));
    }
    let mut header = Vec::new();
    file.take(header_len).read_to_end(&mut header).map_err(WeightsError::io(path))?;
    let entries: Unique<Value> =
        serde_json::from_slice(&header).map_err(|error| part.malformed("names and tensors", error.to_string()))?;

    let data = 8 + header_len;
    let mut contents = Contents::default();
    let mut ranges = Vec::new();
    for (name, entry) in entries.0.into_iter().filter(|(name, _)| name != METADATA) {
        let tensor = part.tensor(&name);
        let entry: Entry = serde_json::from_value(entry)
            .map_err(|error| tensor.malformed("dtype, shape and data_offsets", error.to_string()))?;
        let (start, end) = entry.data_offsets;
        if start > end || end > len - data {
            let expected = format!("data_offsets within the {} bytes of data", len - data);
            return Err(tensor.malformed(expected, format!("{start} to {end}")));
        }
        let layout = Layout::contiguous(entry.shape)
            .ok_or_else(|| tensor.malformed("a shape", "one of more numbers than can be counted"))?;
        if let Some(size) = numbers(&entry.dtype).size {
            let bytes = (layout.count() as u64).checked_mul(size as u64);
            if bytes != Some(end - start) {
                let expected = format!("the bytes of shape {:?} of {}", layout.shape(), entry.dtype);
                return Err(tensor.malformed(expected, format!("{}", end - start)));
            }
        }
        ranges.push((start, end));
        contents.storages.push(Storage::plain(path, data + start, end - start));
        let storage = contents.storages.len() - 1;
        contents.tensors.insert(name, TensorInfo { type_name: entry.dtype, layout, storage });
    }
    // The format allows neither holes nor overlaps: that the last byte is there says that all are.
    ranges.sort_unstable();
    let end = ranges.iter().try_fold(0, |end, range| (range.0 == end).then_some(range.1));
    if end != Some(len - data) {
        let expected = format!("tensors that cover the {} bytes of data without hole or overlap", len - data);
        return Err(part.malformed(expected, end.map_or("others".into(), |end| format!("{end} bytes of tensors"))));
    }
    if contents.tensors.is_empty() {
        return Err(part.malformed("tensors", "none"));
    }
    Ok(contents)
}

/// A JSON object in which no name comes twice.
pub(super) struct Unique<T>(pub(super) BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Unique<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, T>()? {
                    if entries.contains_key(&name) {
                        return Err(A::Error::custom(format!("the name {name} twice")));
                    }
                    entries.insert(name, value);
                }
                Ok(Unique(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}
