//! The state dict in a pickle.

use std::collections::{BTreeMap, HashMap};

use super::numbers::numbers;
use super::pickle::{Pickle, StorageId, Value};
use super::storage::{Layout, Storage};
use super::{Contents, Part, TensorInfo};
use crate::error::WeightsError;

/// Where training programs put the state dict when they save more than it, the most specific first.
const WRAPPERS: [&str; 4] = ["model", "state_dict", "model_state_dict", "module"];

/// How many keys a message lists.
const MOST_KEYS: usize = 20;

/// The tensors of the state dict in a pickle; `place` finds the bytes of a storage.
///
/// # Errors
/// If there is no state dict, a name comes twice, a tensor's view is none of its storage, or `place` fails.
pub(super) fn contents(
    part: &Part,
    pickle: &Pickle,
    file_len: u64,
    mut place: impl FnMut(&str, StorageId) -> Result<Storage, WeightsError>,
) -> Result<Contents, WeightsError> {
    let mut contents = Contents::default();
    let mut places: HashMap<&str, usize> = HashMap::new();
    for (key, value) in find(part, pickle)? {
        let Some(name) = pickle.text(*key) else { continue };
        let Value::Tensor(index) = *value else {
            contents.left_out.insert(name.to_owned());
            continue;
        };
        let (view, tensor) = (pickle.view(index), part.tensor(name));
        let id = pickle.storages[view.storage];
        let storage = match places.get(pickle.key(id)) {
            Some(index) => *index,
            None => {
                contents.storages.push(place(name, id)?);
                places.insert(pickle.key(id), contents.storages.len() - 1);
                contents.storages.len() - 1
            }
        };
        let bytes = contents.storages[storage].len;
        if let Some(expected) = storage_bytes(pickle, id).filter(|expected| *expected != Some(bytes)) {
            let expected =
                expected.map_or("a length that is a number".into(), |len| format!("a storage of {len} bytes"));
            return Err(tensor.malformed(expected, format!("{bytes} bytes in storage {}", pickle.key(id))));
        }
        let layout = pickle.layout(view).and_then(|(offset, shape, strides)| Layout::new(offset, shape, strides));
        let layout = layout.ok_or_else(|| {
            tensor.malformed("an offset, a shape, and a stride for each dimension", "something else, or none so large")
        })?;
        let type_name = pickle.dtype(view);
        if let Some(size) = numbers(&type_name).size {
            check_view(&tensor, &layout, size, bytes, file_len)?;
        }
        let info = TensorInfo { type_name, layout, storage };
        if contents.tensors.insert(name.to_owned(), info).is_some() {
            return Err(tensor.malformed("each name once", "it twice"));
        }
    }
    Ok(contents)
}

/// Bytes of a storage: outside none if its type is not known, inside none if there are too many.
pub(super) fn storage_bytes(pickle: &Pickle, id: StorageId) -> Option<Option<u64>> {
    numbers(&pickle.class(id)).size.map(|size| (id.len as u64).checked_mul(size as u64))
}

fn check_view(tensor: &Part, layout: &Layout, size: usize, bytes: u64, file_len: u64) -> Result<(), WeightsError> {
    let room = bytes / size as u64;
    if layout.reach() as u64 > room {
        let expected = format!("a view of the {room} numbers of its storage");
        return Err(tensor.malformed(expected, format!("one that reaches number {}", layout.reach())));
    }
    // A view may name the same numbers many times: a few bytes could claim all memory.
    let most = bytes.max(file_len);
    if (layout.count() as u64).checked_mul(size as u64).is_none_or(|len| len > most) {
        let expected = format!("a tensor of at most {most} bytes, as many as there are");
        return Err(tensor.malformed(expected, format!("shape {:?}", layout.shape())));
    }
    Ok(())
}

/// The entries of the state dict: of the first of the usual wrappers that has tensors, or of the object itself.
fn find<'a>(part: &Part, pickle: &'a Pickle) -> Result<&'a [(Value, Value)], WeightsError> {
    let is_tensor = |(key, value): &(Value, Value)| pickle.text(*key).is_some() && matches!(value, Value::Tensor(_));
    let wrapped = WRAPPERS.iter().filter_map(|wrapper| pickle.dict(pickle.get(pickle.root, wrapper)?));
    let mut candidates = wrapped.chain(pickle.dict(pickle.root));
    candidates.find(|entries| entries.iter().any(is_tensor)).ok_or_else(|| {
        let expected = format!("a dict of tensors, or one under {}", WRAPPERS.join(", "));
        part.malformed(expected, found(pickle))
    })
}

/// What there is in place of a state dict.
fn found(pickle: &Pickle) -> String {
    let Some(entries) = pickle.dict(pickle.root) else { return pickle.describe(pickle.root) };
    let keys: BTreeMap<&str, Value> =
        entries.iter().filter_map(|(key, value)| Some((pickle.text(*key)?, *value))).collect();
    let list: Vec<String> =
        keys.iter().take(MOST_KEYS).map(|(key, value)| format!("{key} ({})", pickle.describe(*value))).collect();
    match keys.len() {
        0 => "a dict without names".into(),
        len if len > MOST_KEYS => format!("a dict with {} and {} other keys", list.join(", "), len - MOST_KEYS),
        _ => format!("a dict with {}", list.join(", ")),
    }
}
