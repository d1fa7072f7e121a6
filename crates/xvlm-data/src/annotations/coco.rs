//! COCO (`captions_*.json`, `instances_*.json`) and what is published in its form, such as Objects365.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::json_items::{JsonItems, parse_item};
use super::report::{Reason, Report};
use super::source::{
    Folders, Raw, Reader, Records, coco_id, coco_subset, coco_url_subset, image_file, origin, skip_item,
};
use crate::error::{DataError, Place};
use crate::json::{Context, Object};
use crate::records::Element;

/// Annotation files in COCO's form, merged by image.
///
/// Captions become the image's captions; an object's category becomes its text and its label. Boxes of crowds (`iscrowd`) are
/// left out unless `crowds`.
#[derive(Debug, Clone, Default)]
pub struct Coco {
    /// Files of captions, of instances, or of both.
    pub annotations: Vec<PathBuf>,
    /// The folder of the images: itself, or with a folder for each subset (`train2014/`).
    pub images: PathBuf,
    /// Keep boxes around crowds.
    pub crowds: bool,
}

/// An image as listed; without a file, only an annotation has told of it.
struct Listed {
    id: Box<str>,
    /// Number in the files, and in `folders`.
    file: Option<(u16, u32, Box<str>)>,
    size: Option<(u32, u32)>,
    number: u32,
    coco: bool,
}

struct Boxed {
    image: u32,
    category: u32,
    bbox: [f32; 4],
}

#[derive(Default)]
struct Loaded {
    files: Vec<Arc<Path>>,
    folders: Vec<PathBuf>,
    images: Vec<Listed>,
    /// Places of the images in their order.
    order: Vec<u32>,
    ids: HashMap<Box<str>, u32>,
    names: Vec<String>,
    captions: Vec<(u32, Box<str>)>,
    boxes: Vec<Boxed>,
}

impl Coco {
    /// Reads the annotations: they are held in memory in compact form (a box takes 24 bytes).
    ///
    /// # Errors
    ///
    /// [`DataError::Io`], and [`DataError::Field`] if a file is no JSON document of this form or has no images. Single items
    /// that are broken are counted in the report.
    pub fn open(&self) -> Result<Records, DataError> {
        let (mut loaded, mut report) = (Loaded::default(), Report::default());
        let mut folders = Folders::default();
        for path in &self.annotations {
            self.load(path, &mut loaded, &mut folders, &mut report)?;
        }
        loaded.captions.sort_by_key(|caption| caption.0);
        loaded.boxes.sort_by_key(|boxed| boxed.image);
        let reader = CocoReader { loaded, next: 0 };
        Ok(Records::new(reader).with_report(report))
    }

    fn load(
        &self,
        path: &Path,
        loaded: &mut Loaded,
        folders: &mut Folders,
        report: &mut Report,
    ) -> Result<(), DataError> {
        let file = loaded.files.len() as u16;
        loaded.files.push(Arc::from(path));
        let (first_box, first_caption, first_image) = (loaded.boxes.len(), loaded.captions.len(), loaded.order.len());
        let mut categories: HashMap<u32, u32> = HashMap::new();
        let mut items = JsonItems::open(path, &["images", "annotations", "categories"])?;
        while let Some(item) = items.next()? {
            let place = Place::Item(item.number);
            let parsed = parse_item(path, &place, item.bytes).and_then(|value| {
                let object = Context { path, place: place.clone() }.object(&value, "record")?;
                match item.section {
                    0 => self.image(&object, file, item.number as u32, loaded, folders, report),
                    1 => self.annotation(&object, loaded, report),
                    _ => {
                        let id = category_id(&object, "id")?;
                        loaded.names.push(object.text("name")?);
                        categories.insert(id, loaded.names.len() as u32 - 1);
                        Ok(())
                    }
                }
            });
            if let Err(error) = parsed {
                skip_item(error, report)?;
            }
        }
        let now = (loaded.boxes.len(), loaded.captions.len(), loaded.order.len());
        if now == (first_box, first_caption, first_image) {
            let context = Context { path, place: Place::Whole };
            return Err(context.error("file", "COCO's form: lists `images` and `annotations`", "neither"));
        }
        // Categories may stand after the boxes that refer to them.
        let mut kept = loaded.boxes.split_off(first_box);
        kept.retain_mut(|boxed| match categories.get(&boxed.category) {
            Some(&name) => {
                boxed.category = name;
                true
            }
            None => {
                let image = &loaded.images[boxed.image as usize].id;
                report.skip(Reason::UnknownCategory, || {
                    format!("{}: image {image}: category {}", path.display(), boxed.category)
                });
                false
            }
        });
        loaded.boxes.append(&mut kept);
        let (images, files) = (&loaded.images, &loaded.files);
        let known = |image: u32| images[image as usize].file.is_some();
        let mut strange = |image: u32| {
            let id = &images[image as usize].id;
            report.skip(Reason::UnknownImage, || format!("{}: image {id}", files[usize::from(file)].display()));
        };
        loaded.boxes.retain(|boxed| known(boxed.image) || (strange(boxed.image), false).1);
        loaded.captions.retain(|caption| known(caption.0) || (strange(caption.0), false).1);
        Ok(())
    }

    fn image(
        &self,
        object: &Object<'_>,
        file: u16,
        number: u32,
        loaded: &mut Loaded,
        folders: &mut Folders,
        report: &mut Report,
    ) -> Result<(), DataError> {
        let id = object.id("id")?;
        let name = object.text("file_name")?;
        if let Err(found) = image_file(&self.images, &name) {
            return Err(object.context.error("file_name", "a path inside the folder of images", found));
        }
        let size = match (object.get("width"), object.get("height")) {
            (None, None) => None,
            _ => Some((object.pixels("width")?, object.pixels("height")?)),
        };
        let at = loaded.intern(id);
        let listed = &mut loaded.images[at as usize];
        if let Some((earlier, ..)) = listed.file {
            if earlier == file {
                report.skip(Reason::DuplicateId, || {
                    format!("{} item {number}: image {}", object.context.path.display(), listed.id)
                });
            }
            return Ok(());
        }
        let (parent, base) = name.rsplit_once('/').unwrap_or(("", &name));
        let url = coco_url_subset(object);
        let subset = Some(coco_subset(base)).filter(|subset| !subset.is_empty()).or(url).unwrap_or_default();
        let patch = parent.rsplit('/').next().unwrap_or_default();
        let names: &[&str] = if parent.is_empty() { &[subset, ""] } else { &[parent, patch, ""] };
        let folder = folders.pick(&self.images, names);
        let place = match loaded.folders.iter().rposition(|known| *known == folder) {
            Some(place) => place,
            None => {
                loaded.folders.push(folder);
                loaded.folders.len() - 1
            }
        };
        let coco = url.is_some() || coco_id(&name).is_some();
        let listed = &mut loaded.images[at as usize];
        *listed = Listed { id: listed.id.clone(), file: Some((file, place as u32, base.into())), size, number, coco };
        loaded.order.push(at);
        Ok(())
    }

    fn annotation(&self, object: &Object<'_>, loaded: &mut Loaded, report: &mut Report) -> Result<(), DataError> {
        let id = object.id("image_id")?;
        if object.get("caption").is_some() {
            // An empty caption is counted with its image.
            let caption = match object.get("caption") {
                Some(Value::String(text)) => text.as_str().into(),
                _ => object.text("caption")?.into(),
            };
            let image = loaded.intern(id);
            loaded.captions.push((image, caption));
            return Ok(());
        }
        if !self.crowds && object.get("iscrowd").and_then(Value::as_f64).is_some_and(|crowd| crowd != 0.0) {
            let context = &object.context;
            report.skip(Reason::Crowd, || format!("{}{}: image {id}", context.path.display(), context.place));
            return Ok(());
        }
        let category = category_id(object, "category_id")?;
        let bbox = numbers(object, "bbox")?;
        let image = loaded.intern(id);
        loaded.boxes.push(Boxed { image, category, bbox });
        Ok(())
    }
}

/// Four numbers, whatever box they make.
pub(super) fn numbers(object: &Object<'_>, field: &str) -> Result<[f32; 4], DataError> {
    const EXPECTED: &str = "a box [x, y, w, h] of four numbers in pixels";
    let value = object.get(field).ok_or_else(|| object.missing(field, EXPECTED))?;
    let list = value.as_array().filter(|list| list.len() == 4);
    let numbers = list.and_then(|list| {
        let mut numbers = [0f32; 4];
        for (slot, number) in numbers.iter_mut().zip(list) {
            *slot = number.as_f64()? as f32;
        }
        Some(numbers)
    });
    numbers.ok_or_else(|| object.wrong(field, EXPECTED, value))
}

fn category_id(object: &Object<'_>, field: &str) -> Result<u32, DataError> {
    const EXPECTED: &str = "the number of a category";
    let value = object.get(field).ok_or_else(|| object.missing(field, EXPECTED))?;
    value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| object.wrong(field, EXPECTED, value))
}

impl Loaded {
    fn intern(&mut self, id: String) -> u32 {
        if let Some(&known) = self.ids.get(id.as_str()) {
            return known;
        }
        let (id, place) = (id.into_boxed_str(), self.images.len() as u32);
        self.images.push(Listed { id: id.clone(), file: None, size: None, number: 0, coco: false });
        self.ids.insert(id, place);
        place
    }
}

struct CocoReader {
    loaded: Loaded,
    next: usize,
}

impl Reader for CocoReader {
    fn next(&mut self, _: &mut Report) -> Result<Option<Raw>, DataError> {
        let Loaded { files, folders, images, order, names, captions, boxes, .. } = &self.loaded;
        let Some(&place) = order.get(self.next) else { return Ok(None) };
        self.next += 1;
        let Listed { id, file: Some((file, folder, base)), size, number, coco } = &images[place as usize] else {
            return Ok(None);
        };
        let captions = of_image(captions, place, |caption| caption.0).iter().map(|caption| caption.1.to_string());
        let elems = of_image(boxes, place, |boxed| boxed.image).iter().map(|boxed| {
            let name = names[boxed.category as usize].clone();
            Element { bbox: boxed.bbox, texts: vec![name.clone()], attributes: Vec::new(), labels: vec![name] }
        });
        Ok(Some(Raw {
            id: id.to_string(),
            aliases: if *coco { vec![format!("coco:{id}")] } else { Vec::new() },
            image: folders[*folder as usize].join(base.as_ref()),
            size: *size,
            fractions: false,
            captions: captions.collect(),
            elems: elems.collect(),
            questions: Vec::new(),
            origin: origin(&files[usize::from(*file)], Place::Item(*number as usize)),
        }))
    }

    fn images(&self) -> Option<u64> {
        Some(self.loaded.order.len() as u64)
    }
}

/// What belongs to an image in a list that is sorted by image.
fn of_image<T>(all: &[T], image: u32, key: impl Fn(&T) -> u32) -> &[T] {
    let start = all.partition_point(|one| key(one) < image);
    let end = start + all[start..].partition_point(|one| key(one) <= image);
    &all[start..end]
}
