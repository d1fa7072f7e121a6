//! RefCOCO, RefCOCO+ and RefCOCOg as published: `refs(unc).p`, `refs(umd).p` or `refs(google).p` with `instances.json`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::coco::numbers;
use super::json_items::{JsonItems, parse_item};
use super::pickle;
use super::report::{Reason, Report};
use super::source::{coco_subset, skip_item};
use crate::error::{DataError, Place};
use crate::json::{Context, Object, io_error};

/// One object that people referred to, as in `refs(*).p`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reference {
    /// Of the item in the file.
    pub(crate) number: usize,
    pub(crate) ref_id: String,
    pub(crate) ann_id: String,
    pub(crate) image_id: String,
    pub(crate) split: String,
    /// What they said.
    pub(crate) sentences: Vec<String>,
}

/// An image of `instances.json`.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    /// `train2014/COCO_train2014_….jpg` in the folder of images.
    pub(crate) file: PathBuf,
    pub(crate) width: u32,
    pub(crate) height: u32,
}

/// `instances.json`: the boxes by the annotation's identifier, and the images.
#[derive(Debug, Default)]
pub(crate) struct Instances {
    pub(crate) boxes: HashMap<String, (String, [f32; 4])>,
    pub(crate) images: HashMap<String, Image>,
}

/// Reads `refs(*).p`.
///
/// # Errors
/// [`DataError::Io`], [`DataError::Field`] naming the item and field.
pub(crate) fn read_references(path: &Path) -> Result<Vec<Reference>, DataError> {
    let (references, report) = read_references_lenient(path)?;
    match report.iter().find_map(|(_, skipped)| skipped.examples.first()) {
        Some(example) => {
            let context = Context { path, place: Place::Whole };
            Err(context.error("file", "whole references", example))
        }
        None => Ok(references),
    }
}

/// Like [`read_references`], but counts broken items.
pub(crate) fn read_references_lenient(path: &Path) -> Result<(Vec<Reference>, Report), DataError> {
    let whole = Context { path, place: Place::Whole };
    let bytes = std::fs::read(path).map_err(|source| io_error(path, source))?;
    let items =
        pickle::read_list(&bytes).map_err(|found| whole.error("file", "a pickled list of references", found))?;
    let (mut references, mut report) = (Vec::with_capacity(items.len()), Report::default());
    for (i, item) in items.iter().enumerate() {
        let context = Context { path, place: Place::Item(i) };
        match context.object(item, "record").and_then(|object| reference(&object, i)) {
            Ok(reference) => references.push(reference),
            Err(error) => skip_item(error, &mut report)?,
        }
    }
    Ok((references, report))
}

fn reference(object: &Object<'_>, number: usize) -> Result<Reference, DataError> {
    let sentence = |(i, value)| {
        let name = object.name(&format!("sentences[{i}]"));
        let sentence = object.context.object(value, &name)?;
        // `sent` is `raw` in lower case without punctuation.
        sentence.text(if sentence.get("sent").is_some() { "sent" } else { "raw" })
    };
    Ok(Reference {
        number,
        ref_id: object.id("ref_id")?,
        ann_id: object.id("ann_id")?,
        image_id: object.id("image_id")?,
        split: object.text("split")?,
        sentences: object.list("sentences")?.iter().enumerate().map(sentence).collect::<Result<_, _>>()?,
    })
}

/// Reads `instances.json`; `root` is the folder of the images.
pub(crate) fn read_instances(path: &Path, root: &Path, report: &mut Report) -> Result<Instances, DataError> {
    let mut instances = Instances::default();
    let mut items = JsonItems::open(path, &["images", "annotations"])?;
    while let Some(item) = items.next()? {
        let place = Place::Item(item.number);
        let parsed = parse_item(path, &place, item.bytes).and_then(|value| {
            let object = Context { path, place: place.clone() }.object(&value, "record")?;
            let id = object.id("id")?;
            if item.section == 1 {
                let boxed = (object.id("image_id")?, numbers(&object, "bbox")?);
                return Ok(instances.boxes.insert(id, boxed).is_some());
            }
            let name = object.text("file_name")?;
            let file = match coco_subset(&name) {
                "" => object.file("file_name", root)?,
                subset => object.context.file("file_name", root, &format!("{subset}/{name}"))?,
            };
            let image = Image { file, width: object.pixels("width")?, height: object.pixels("height")? };
            Ok(instances.images.insert(id, image).is_some())
        });
        match parsed {
            Ok(false) => {}
            Ok(true) => report.skip(Reason::DuplicateId, || format!("{}{place}", path.display())),
            Err(error) => skip_item(error, report)?,
        }
    }
    Ok(instances)
}
