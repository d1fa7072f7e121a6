//! Reference captions of images, as the official evaluation of captions reads them.

use std::collections::BTreeMap;
use std::path::Path;

use super::json_items::{JsonItems, parse_item};
use super::karpathy::sentences;
use crate::error::{DataError, Place};
use crate::json::Context;

/// Reads the reference captions of images by their identifiers: `{"annotations": [{image_id, caption}]}`, as COCO's
/// `captions_*.json` and X-VLM's `coco_karpathy_*_gt.json` (`val_gt_file`, `test_gt_file`) have them, or `{"images": [{id,
/// sentences: [{raw}]}]}`, as `xvlm synth` writes them and Karpathy's files have them. The images themselves are not looked at.
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field; also when there is no
/// caption.
pub fn read_references(path: impl AsRef<Path>) -> Result<BTreeMap<String, Vec<String>>, DataError> {
    const SECTIONS: &[&str] = &["annotations", "images"];
    let path = path.as_ref();
    let mut references: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut items = JsonItems::open(path, SECTIONS)?;
    while let Some(item) = items.next()? {
        let (is_image, place) = (item.section == 1, Place::Item(item.number));
        let value = parse_item(path, &place, item.bytes)?;
        let context = Context { path, place };
        if is_image {
            let object = context.object(&value, "record")?;
            if object.get("sentences").is_some() {
                let id = ["cocoid", "imgid"]
                    .into_iter()
                    .find(|name| object.get("id").is_none() && object.get(name).is_some());
                let id = object.id(id.unwrap_or("id"))?;
                references.entry(id).or_default().extend(sentences(&object)?);
            }
        } else {
            let object = context.object(&value, "annotation")?;
            references.entry(object.id("image_id")?).or_default().push(object.text("caption")?);
        }
    }
    if references.values().all(Vec::is_empty) {
        let context = Context { path, place: Place::Whole };
        return Err(context.error("annotations", "a list of captions", "nothing"));
    }
    Ok(references)
}
