//! Checkpoints of PyTorch since 1.6: a zip archive of a pickle, `NAME/data.pkl`, and its storages, `NAME/data/KEY`.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;
use std::sync::Arc;

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::pickle::Pickle;
use super::storage::{MOST_INFLATION, Storage};
use super::{Contents, Part, state};
use crate::error::WeightsError;

const PICKLE: &str = "/data.pkl";

struct Archive<'a, R> {
    path: &'a Arc<Path>,
    len: u64,
    zip: ZipArchive<R>,
}

pub(super) fn open(path: &Arc<Path>, len: u64) -> Result<Contents, WeightsError> {
    let whole = Part::new(path, "archive");
    let file = File::open(path).map_err(WeightsError::io(path))?;
    let zip = ZipArchive::new(BufReader::new(file)).map_err(|error| refuse(&whole, error))?;
    let mut archive = Archive { path, len, zip };
    let names = archive.names(&whole)?;
    let roots: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix(PICKLE)).collect();
    let &[root] = &roots[..] else {
        let found = format!("{} among {} entries", roots.len(), names.len());
        return Err(whole.malformed("one entry NAME/data.pkl", found));
    };
    archive.check_byte_order(root)?;

    let part = Part::new(path, format!("entry {root}{PICKLE}"));
    let storage = archive.find(&part, &format!("{root}{PICKLE}"))?;
    let pickle = Pickle::read(storage.open().map_err(|error| part.io(error))?, &part)?;
    state::contents(&part, &pickle, len, |tensor, id| {
        archive.find(&part.tensor(tensor), &format!("{root}/data/{}", pickle.key(id)))
    })
}

fn refuse(part: &Part, error: ZipError) -> WeightsError {
    match error {
        ZipError::Io(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => part.io(error),
        other => part.malformed("a whole zip archive", other.to_string()),
    }
}

impl<R: Read + Seek> Archive<'_, R> {
    /// The names of all entries. Nothing is ever extracted, but an archive with a name that would lead out of a folder
    /// is not what PyTorch writes.
    fn names(&self, whole: &Part) -> Result<Vec<String>, WeightsError> {
        if self.zip.has_duplicate_names() {
            return Err(whole.malformed("a name once", "two entries of the same name"));
        }
        let names = self.zip.file_names_raw().map(|raw| match std::str::from_utf8(raw) {
            Ok(name) if is_relative(name) => Ok(name.to_owned()),
            _ => {
                let name = format!("{:?}", String::from_utf8_lossy(raw));
                Err(whole.malformed("entries whose names are relative paths without .. and \\", name))
            }
        });
        names.collect()
    }

    /// Since 2.1 there is an entry that tells; before, only little-endian machines were supported.
    fn check_byte_order(&mut self, root: &str) -> Result<(), WeightsError> {
        let name = format!("{root}/byteorder");
        if self.zip.index_for_name_raw(name.as_bytes()).is_none() {
            return Ok(());
        }
        let part = Part::new(self.path, format!("entry {name}"));
        let mut order = String::new();
        let entry = self.find(&part, &name)?;
        let read = entry.open().and_then(|bytes| bytes.take(16).read_to_string(&mut order));
        read.map_err(|error| part.malformed("little", error.to_string()))?;
        if order.trim() == "little" { Ok(()) } else { Err(part.malformed("little", order)) }
    }

    /// The bytes of an entry, which `part` needs.
    fn find(&mut self, part: &Part, name: &str) -> Result<Storage, WeightsError> {
        let index = self.zip.index_for_name_raw(name.as_bytes());
        let index = index.ok_or_else(|| part.malformed(format!("an entry {name}"), "none of this name"))?;
        let entry = self.zip.by_index_raw(index).map_err(|error| refuse(part, error))?;
        let (start, stored, len) = (entry.data_start().unwrap_or(u64::MAX), entry.compressed_size(), entry.size());
        if entry.encrypted() {
            return Err(part.malformed(format!("entry {name} in clear"), "it encrypted"));
        }
        if start.checked_add(stored).is_none_or(|end| end > self.len) {
            let expected = format!("entry {name} within the {} bytes of the file", self.len);
            return Err(part.malformed(expected, format!("{stored} bytes from byte {start} on")));
        }
        let deflated = match entry.compression() {
            CompressionMethod::STORE => None,
            CompressionMethod::DEFLATE => Some(stored),
            other => return Err(part.malformed(format!("entry {name} stored or deflated"), other.to_string())),
        };
        let possible = deflated.map_or(len == stored, |stored| len / MOST_INFLATION <= stored);
        if !possible {
            let expected = format!("entry {name} of a size that its {stored} bytes can have");
            return Err(part.malformed(expected, format!("{len} bytes")));
        }
        // PyTorch can be told not to compute checksums.
        let crc = Some(entry.crc32()).filter(|crc| *crc != 0);
        Ok(Storage { path: Arc::clone(self.path), start, len, deflated, crc })
    }
}

/// Whether an entry's name is a path that stays where it is unpacked, on any system.
fn is_relative(name: &str) -> bool {
    let drive = name.as_bytes().get(1) == Some(&b':');
    !name.starts_with('/') && !drive && !name.contains(['\\', '\0']) && name.split('/').all(|part| part != "..")
}
