//! Checkpoints of PyTorch before 1.6: four pickles (a magic number, a version, the system, the object), a list of the
//! keys of the storages, and the storages in this order, each after its length (`_legacy_save` in
//! `torch/serialization.py`).

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use super::opcodes::{LONG1, STOP};
use super::pickle::{Pickle, Value, size};
use super::state::storage_bytes;
use super::storage::Storage;
use super::{Contents, Part, state};
use crate::error::WeightsError;

/// How the pickle of the magic number, 0x1950a86a20f9469cfc6c, ends.
const MAGIC: [u8; 13] = [LONG1, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, STOP];
const VERSION: usize = 1001;

/// Opens a file that begins with a pickle, with the bytes `head`.
pub(super) fn open(path: &Arc<Path>, head: &[u8], len: u64) -> Result<Contents, WeightsError> {
    let Some(at) = head.windows(MAGIC.len()).position(|window| window == MAGIC) else {
        let part = Part::new(path, "magic number");
        return Err(part.malformed("0x1950a86a20f9469cfc6c of PyTorch", format!("{head:02x?}")));
    };
    let file = File::open(path).map_err(WeightsError::io(path))?;
    let mut stream = Stream { path, position: (at + MAGIC.len()) as u64, file: BufReader::new(file) };
    stream.seek()?;

    let (part, version) = stream.pickle("protocol version")?;
    if size(version.root) != Some(VERSION) {
        let found = size(version.root).map_or_else(|| version.describe(version.root), |found| found.to_string());
        return Err(part.malformed(VERSION.to_string(), found));
    }
    let (part, system) = stream.pickle("system information")?;
    if !matches!(system.get(system.root, "little_endian"), Some(Value::Bool(true))) {
        return Err(part.malformed("little_endian to be true", "another order of bytes, or none"));
    }
    let (part, object) = stream.pickle("pickle")?;
    let storages = stream.storages(&object, len)?;
    state::contents(&part, &object, len, |tensor, id| {
        let key = object.key(id);
        storages.get(key).cloned().ok_or_else(|| {
            part.tensor(tensor).malformed(format!("storage {key}"), format!("{} others", storages.len()))
        })
    })
}

struct Stream<'a> {
    path: &'a Arc<Path>,
    position: u64,
    file: BufReader<File>,
}

impl<'a> Stream<'a> {
    fn seek(&mut self) -> Result<(), WeightsError> {
        self.file.seek(SeekFrom::Start(self.position)).map_err(WeightsError::io(self.path))?;
        Ok(())
    }

    /// The next pickle, and what errors call it.
    fn pickle(&mut self, name: &str) -> Result<(Part<'a>, Pickle), WeightsError> {
        let part = Part::new(self.path, format!("{name} from byte {} on", self.position));
        let pickle = Pickle::read(&mut self.file, &part)?;
        self.position += pickle.len;
        Ok((part, pickle))
    }

    /// Where the numbers of each storage are.
    fn storages(&mut self, object: &Pickle, len: u64) -> Result<HashMap<String, Storage>, WeightsError> {
        let (part, keys) = self.pickle("keys of the storages")?;
        let list = keys.list(keys.root).ok_or_else(|| part.malformed("a list", keys.describe(keys.root)))?;
        let ids: HashMap<&str, _> = object.storages.iter().map(|id| (object.key(*id), *id)).collect();
        let mut storages = HashMap::new();
        for key in list {
            let key = keys.text(*key).ok_or_else(|| part.malformed("texts", keys.describe(*key)))?;
            let part = Part::new(self.path, format!("storage {key}"));
            let id = ids.get(key).ok_or_else(|| part.malformed("a tensor that looks at it", "none in the pickle"))?;
            let bytes = storage_bytes(object, *id)
                .ok_or_else(|| part.malformed("a type whose size is known", object.class(*id)))?;
            let count = self.count(&part)?;
            if count != id.len as u64 {
                return Err(part.malformed(format!("{} numbers", id.len), format!("{count}")));
            }
            let end = bytes.and_then(|bytes| self.position.checked_add(bytes)).filter(|end| *end <= len);
            let Some(end) = end else {
                let room = len.saturating_sub(self.position);
                return Err(
                    part.malformed(format!("{count} numbers of {}", object.class(*id)), format!("{room} bytes"))
                );
            };
            let storage = Storage::plain(self.path, self.position, end - self.position);
            if storages.insert(key.to_owned(), storage).is_some() {
                return Err(part.malformed("each storage once", "it twice"));
            }
            self.position = end;
        }
        Ok(storages)
    }

    /// The length that stands before a storage.
    fn count(&mut self, part: &Part) -> Result<u64, WeightsError> {
        self.seek()?;
        let mut bytes = [0; 8];
        let read = self.file.read_exact(&mut bytes);
        read.map_err(|error| part.malformed(format!("its length at byte {}", self.position), error.to_string()))?;
        self.position += 8;
        Ok(u64::from_le_bytes(bytes))
    }
}
