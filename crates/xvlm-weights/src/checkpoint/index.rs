//! An index of shards: `model.safetensors.index.json` and the like.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use super::safetensors::Unique;
use super::{Contents, Part, TensorInfo, open_file};
use crate::error::WeightsError;

/// Far more than the index of any model takes.
const LONGEST: u64 = 64 << 20;

#[derive(Deserialize)]
struct Index {
    /// The file of each tensor.
    weight_map: Unique<String>,
}

/// Opens the files that an index names, which lie beside it, with all their tensors.
pub(super) fn open(path: &Path) -> Result<Contents, WeightsError> {
    let part = Part::new(path, "weight_map");
    let mut text = Vec::new();
    let file = File::open(path).map_err(WeightsError::io(path))?;
    file.take(LONGEST).read_to_end(&mut text).map_err(WeightsError::io(path))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|error| part.malformed("an object of file names by tensor", error.to_string()))?;

    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in &index.weight_map.0 {
        shards.entry(file).or_default().push(tensor);
    }
    let mut contents = Contents::default();
    for (file, names) in shards {
        if !is_file_name(file) {
            return Err(part.malformed("names of files in the same folder", format!("{file:?}")));
        }
        let shard = path.with_file_name(file);
        let whole = Part::new(&shard, "shard");
        let (_, found) = open_file(&shard)?.ok_or_else(|| whole.malformed("tensors", "another index"))?;
        if let Some(missing) = names.into_iter().find(|name| !found.tensors.contains_key(*name)) {
            return Err(whole.tensor(missing).malformed("it where the index says", "no tensor of this name"));
        }
        let first = contents.storages.len();
        for (name, info) in found.tensors {
            let info = TensorInfo { storage: first + info.storage, ..info };
            if contents.tensors.contains_key(&name) {
                return Err(whole.tensor(&name).malformed("it in one shard", "it in another one, too"));
            }
            contents.tensors.insert(name, info);
        }
        contents.storages.extend(found.storages);
        contents.left_out.extend(found.left_out);
    }
    if contents.tensors.is_empty() { Err(part.malformed("tensors", "none")) } else { Ok(contents) }
}

/// Whether a name is that of a file in the same folder, on any system.
fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}
