//! Grounding: lists of phrases with their boxes, and RefCOCO as published.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{GroundingItem, Run, optional_text, trailing_number};
use crate::annotations::coco::numbers;
use crate::annotations::refer::{Image, Instances, Reference, read_instances, read_references_lenient};
use crate::annotations::report::{Reason, Report};
use crate::error::{DataError, Place, excerpt};
use crate::json::{Context, Object, folder, read_value};
use crate::transform::clip_box;

/// RefCOCO's published files.
#[derive(Default)]
pub(super) struct Refer {
    references: Vec<(Reference, usize, PathBuf)>,
    by_id: HashMap<String, usize>,
    instances: Vec<Instances>,
}

impl Refer {
    pub(super) fn read(&mut self, run: &mut Run<'_>, path: &Path) -> Result<(), DataError> {
        let (references, report) = read_references_lenient(path)?;
        let instances = folder(path).join("instances.json");
        let mut of_instances = Report::default();
        self.instances.push(read_instances(&instances, &run.root(path), &mut of_instances)?);
        for (reason, skipped) in report.iter().chain(of_instances.iter()) {
            let found = skipped.examples.first().cloned().unwrap_or_default();
            if run.reading.strict {
                return Err(Context { path, place: Place::Whole }.error("file", format!("no {reason}"), found));
            }
        }
        run.report.merge(&report);
        run.report.merge(&of_instances);
        let file = self.instances.len() - 1;
        for reference in references {
            if self.by_id.contains_key(&reference.ref_id) {
                let context = Context { path, place: Place::Item(reference.number) };
                let found = format!("{:?} again", reference.ref_id);
                run.refuse(Reason::DuplicateId, context.error("ref_id", "an identifier of its own", found))?;
                continue;
            }
            self.by_id.insert(reference.ref_id.clone(), self.references.len());
            self.references.push((reference, file, path.to_owned()));
        }
        Ok(())
    }

    /// The box and the image of a reference.
    fn look_up(&self, place: usize) -> Result<([f32; 4], &Image), DataError> {
        let (reference, file, path) = &self.references[place];
        let context = Context { path, place: Place::Item(reference.number) };
        let instances = &self.instances[*file];
        let Some((image_id, bbox)) = instances.boxes.get(&reference.ann_id) else {
            return Err(context.error("ann_id", "an annotation of instances.json", format!("{:?}", reference.ann_id)));
        };
        if *image_id != reference.image_id {
            let expected = format!("image {image_id}, as annotation {}", reference.ann_id);
            return Err(context.error("image_id", expected, format!("image {}", reference.image_id)));
        }
        let image = instances.images.get(image_id);
        let image = image.ok_or_else(|| context.error("image_id", "an image of instances.json", image_id))?;
        Ok((*bbox, image))
    }

    pub(super) fn items(&self, run: &mut Run<'_>) -> Result<Vec<GroundingItem>, DataError> {
        let mut found = Vec::new();
        for (place, (reference, _, path)) in self.references.iter().enumerate() {
            let context = Context { path, place: Place::Item(reference.number) };
            let Reference { ref_id, image_id, split, sentences, .. } = reference;
            if run.other_split(Some(split), || format!("{}: reference {ref_id}", path.display())) {
                continue;
            }
            let (bbox, image) = match self
                .look_up(place)
                .and_then(|(bbox, image)| Ok((whole(&context, bbox, image.width, image.height)?, image)))
            {
                Ok(looked_up) => looked_up,
                Err(error) => {
                    run.refuse(Reason::Malformed, error)?;
                    continue;
                }
            };
            let file = &image.file;
            for text in sentences {
                if run.accept(&context, None, &[file])? {
                    found.push(GroundingItem {
                        ref_id: ref_id.clone(),
                        image: file.clone(),
                        image_id: image_id.clone(),
                        image_index: run.number(image_id),
                        text: text.clone(),
                        bbox,
                        height: image.height,
                        width: image.width,
                        split: Some(split.clone()),
                        proposals: Vec::new(),
                    });
                }
            }
        }
        Ok(found)
    }
}

/// The box, if it is inside its image up to a pixel.
fn whole(context: &Context<'_>, bbox: [f32; 4], width: u32, height: u32) -> Result<[f32; 4], DataError> {
    match clip_box(bbox, width, height) {
        Some(_) => Ok(bbox),
        None => {
            let expected = format!("a box [x, y, w, h] inside the {width}x{height} image");
            Err(context.error("bbox", expected, format!("{bbox:?}")))
        }
    }
}

/// What each reference of lists that bring their own boxes refers to: a file, and a box in it. Phrases of one object share a
/// reference; a reference of two objects could not be scored.
pub(super) type Referents = HashMap<String, (String, [f32; 4])>;

/// An item of a list; `None` if it is left out.
pub(super) fn grounding_item(
    run: &mut Run<'_>,
    object: &Object<'_>,
    path: &Path,
    refer: &Refer,
    referents: &mut Referents,
) -> Result<Option<GroundingItem>, DataError> {
    let ref_id = object.id("ref_id")?;
    let file = object.text("image")?;
    let text = object.text("text")?;
    let known = refer.by_id.get(&ref_id).copied();
    let mut split = optional_text(object, "split")?;
    let (bbox, width, height, image_id) = match known {
        Some(place) if object.get("bbox").is_none() => {
            let (bbox, image) = refer.look_up(place)?;
            let reference = &refer.references[place].0;
            let own = trailing_number(&image.file.to_string_lossy());
            if trailing_number(&file) != own {
                let expected = format!("the image of reference {ref_id}, {}", image.file.display());
                return Err(object.context.error(object.name("image"), expected, file));
            }
            split = split.or_else(|| Some(reference.split.clone()));
            (bbox, image.width, image.height, reference.image_id.clone())
        }
        _ => {
            let image_id = match object.get("image_id") {
                Some(_) => object.id("image_id")?,
                None => file.clone(),
            };
            (object.bbox("bbox")?, object.pixels("width")?, object.pixels("height")?, image_id)
        }
    };
    let bbox = whole(&object.context, bbox, width, height)?;
    let proposal = |(i, value): (usize, &Value)| {
        let name = object.name(&format!("dets[{i}]"));
        let four = value.as_array().filter(|numbers| numbers.len() >= 4).map(|numbers| Value::from(&numbers[..4]));
        let wrapped = serde_json::json!({ "box": four });
        let inner = object.context.object(&wrapped, &name)?;
        numbers(&inner, "box")
    };
    let proposals = object.list("dets")?.iter().enumerate().map(proposal).collect::<Result<_, _>>()?;
    let image = object.file("image", &run.root(path))?;
    let place = object.context.place.clone();
    let known = referents.get(&ref_id).filter(|known| (known.0.as_str(), known.1) != (file.as_str(), bbox));
    if let Some((image, known)) = known {
        let expected = format!("one object, as before: {known:?} of {image}");
        let found = format!("{ref_id:?} again, of {bbox:?} of {file}");
        run.refuse(Reason::DuplicateId, object.context.error(object.name("ref_id"), expected, found))?;
        return Ok(None);
    }
    let skip = run.other_split(split.as_deref(), || format!("{}{place}", path.display()));
    if skip || !run.accept(&object.context, None, &[&image])? {
        return Ok(None);
    }
    referents.insert(ref_id.clone(), (file, bbox));
    let image_index = run.number(&image_id);
    Ok(Some(GroundingItem { ref_id, image, image_id, image_index, text, bbox, height, width, split, proposals }))
}

/// Boxes `(x, y, w, h)` among which to choose, by image: X-VLM's `refcoco+/dets.json`, `{image: [[x, y, w, h, …], …]}`.
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, image and box.
pub fn read_proposals(path: impl AsRef<Path>) -> Result<HashMap<String, Vec<[f32; 4]>>, DataError> {
    let path = path.as_ref();
    let value = read_value(path)?;
    let context = Context { path, place: Place::Whole };
    let Some(images) = value.as_object() else {
        return Err(context.error("file", "an object with a list of boxes for each image", "something else"));
    };
    let mut found = HashMap::with_capacity(images.len());
    for (image, boxes) in images {
        let wrong =
            |found: &Value| context.error(image, "a list of boxes [x, y, w, h, …]", excerpt(&found.to_string()));
        let mut list = Vec::new();
        for value in boxes.as_array().ok_or_else(|| wrong(boxes))? {
            let numbers = value.as_array().filter(|numbers| numbers.len() >= 4).ok_or_else(|| wrong(value))?;
            let mut bbox = [0f32; 4];
            for (slot, number) in bbox.iter_mut().zip(numbers) {
                *slot = number.as_f64().ok_or_else(|| wrong(value))? as f32;
            }
            list.push(bbox);
        }
        found.insert(image.clone(), list);
    }
    Ok(found)
}
