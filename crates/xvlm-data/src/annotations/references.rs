//! Reference captions of images, as the official evaluation of captions reads them.

use std::collections::BTreeMap;
use std::path::Path;

use super::json_items::{JsonItems, parse_item};
use crate::error::{DataError, Place};
use crate::json::Context;

/// Reads the reference captions of images by their identifiers: `{"annotations": [{image_id, caption}]}`, as COCO's
/// `captions_*.json` and X-VLM's `coco_karpathy_*_gt.json` (`val_gt_file`, `test_gt_file`) have them. What else the file has, the
/// images themselves among it, is not looked at.
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field; also when there is no
/// annotation.
pub fn read_references(path: impl AsRef<Path>) -> Result<BTreeMap<String, Vec<String>>, DataError> {
    let path = path.as_ref();
    let mut references: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut items = JsonItems::open(path, &["annotations"])?;
    while let Some(item) = items.next()? {
        let place = Place::Item(item.number);
        let value = parse_item(path, &place, item.bytes)?;
        let object = Context { path, place }.object(&value, "annotation")?;
        references.entry(object.id("image_id")?).or_default().push(object.text("caption")?);
    }
    if references.is_empty() {
        let context = Context { path, place: Place::Whole };
        return Err(context.error("annotations", "a list of captions", "nothing"));
    }
    Ok(references)
}
