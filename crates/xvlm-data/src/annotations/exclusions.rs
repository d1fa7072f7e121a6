//! Files that list images to leave out.

use std::path::Path;

use serde_json::Value;

use super::json_items::{JsonItems, parse_item};
use super::karpathy;
use super::refer;
use super::source::coco_id;
use super::stream::{Lines, head};
use crate::error::{DataError, Place};
use crate::json::Context;

/// Hands the names of a file's images to `add`; see [`super::Exclusions::read`].
pub(super) fn read(path: &Path, add: &mut dyn FnMut(String)) -> Result<(), DataError> {
    if path.extension().is_some_and(|extension| extension == "p" || extension == "pkl") {
        for reference in refer::read_references(path)? {
            if held_out(&reference.split) {
                add(format!("coco:{}", reference.image_id));
            }
        }
        return Ok(());
    }
    // A document may be a single line, of any length.
    if matches!(head(path)?.first(), Some(b'[' | b'{')) {
        return items(path, add);
    }
    let mut lines = Lines::open(path)?;
    while let Some(line) = lines.next()? {
        let text = line.text(path)?.trim_start_matches('\u{feff}');
        let name = text.split('#').next().unwrap_or_default().trim();
        if !name.is_empty() {
            add(name.to_owned());
        }
    }
    Ok(())
}

fn held_out(split: &str) -> bool {
    split.starts_with("val") || split.starts_with("test")
}

fn items(path: &Path, add: &mut dyn FnMut(String)) -> Result<(), DataError> {
    let mut items = JsonItems::open(path, &["images"])?;
    while let Some(item) = items.next()? {
        let place = Place::Item(item.number);
        let value = parse_item(path, &place, item.bytes)?;
        let object = Context { path, place: place.clone() }.object(&value, "record")?;
        if object.get("split").and_then(Value::as_str).is_some_and(|split| !held_out(split)) {
            continue;
        }
        if object.get("sentences").is_some() || object.get("sentids").is_some() {
            let (_, aliases) = karpathy::names(&object)?;
            aliases.into_iter().for_each(&mut *add);
            continue;
        }
        let field = ["image", "file_name"].into_iter().find(|field| object.get(field).is_some()).unwrap_or("image");
        let file = object.text(field)?;
        // The number of a photograph on Flickr may be that of another image in another set.
        let name = match (coco_id(&file), karpathy::flickr_alias(&file)) {
            (Some(id), _) => format!("coco:{id}"),
            (None, Some(photograph)) if file.contains("flickr") => photograph,
            _ => file.rsplit('/').next().unwrap_or_default().to_owned(),
        };
        add(name);
    }
    Ok(())
}
