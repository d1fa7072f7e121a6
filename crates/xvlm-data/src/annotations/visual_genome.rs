//! Visual Genome: `image_data.json`, `region_descriptions.json`, `objects.json`, `attributes.json`, `question_answers.json`,
//! in the versions that were published (1.0, 1.2, 1.4).

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::json_items::{JsonItems, parse_item};
use super::report::{Reason, Report};
use super::source::{Folders, Raw, Reader, Records, image_file, origin, skip_item};
use super::stream::{Extents, image_key, open_plain};
use crate::error::{DataError, Place};
use crate::json::{Context, Object};
use crate::records::Element;

/// Visual Genome's files, merged by image.
///
/// A region becomes an element with its phrase. An object becomes an element with its names, its attributes (which go before
/// the name) and, from its synsets, its label. Questions become questions.
#[derive(Debug, Clone, Default)]
pub struct VisualGenome {
    /// `image_data.json`.
    pub image_data: PathBuf,
    /// The folder of the images: with `VG_100K` and `VG_100K_2`, or with all images in it.
    pub images: PathBuf,
    /// `region_descriptions.json`.
    pub regions: Option<PathBuf>,
    /// `objects.json`.
    pub objects: Option<PathBuf>,
    /// `attributes.json`; it lists the objects too, so that `objects` may be absent.
    pub attributes: Option<PathBuf>,
    /// `question_answers.json`.
    pub questions: Option<PathBuf>,
}

struct Listed {
    id: String,
    image: PathBuf,
    size: (u32, u32),
    coco: Option<u64>,
    flickr: Option<u64>,
    number: usize,
}

/// The identifier of an item of any of the files.
#[derive(Deserialize)]
struct Head {
    id: Option<Value>,
    image_id: Option<Value>,
}

struct VisualGenomeReader {
    file: Arc<Path>,
    images: Vec<Listed>,
    next: usize,
    regions: Option<Extents>,
    objects: Option<Extents>,
    attributes: Option<Extents>,
    questions: Option<Extents>,
}

impl VisualGenome {
    /// Reads `image_data.json`, and where in the other files each image is.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`], and [`DataError::Field`] if a file is no JSON list. Single items that are broken are counted in the
    /// report.
    pub fn open(&self) -> Result<Records, DataError> {
        let mut report = Report::default();
        let (images, known) = self.listed(&mut report)?;
        let mut extents =
            |path: &Option<PathBuf>| path.as_deref().map(|path| index(path, &known, &mut report)).transpose();
        let reader = VisualGenomeReader {
            file: Arc::from(self.image_data.as_path()),
            regions: extents(&self.regions)?,
            objects: extents(&self.objects)?,
            attributes: extents(&self.attributes)?,
            questions: extents(&self.questions)?,
            images,
            next: 0,
        };
        Ok(Records::new(reader).with_report(report))
    }

    fn listed(&self, report: &mut Report) -> Result<(Vec<Listed>, HashSet<u64>), DataError> {
        let path = self.image_data.as_path();
        let (mut images, mut known, mut folders) = (Vec::new(), HashSet::new(), Folders::default());
        let mut items = JsonItems::open(path, &[])?;
        while let Some(item) = items.next()? {
            let place = Place::Item(item.number);
            let parsed = parse_item(path, &place, item.bytes).and_then(|value| {
                let object = Context { path, place: place.clone() }.object(&value, "record")?;
                self.image(&object, item.number, &mut folders)
            });
            match parsed {
                Ok(listed) => {
                    if !known.insert(image_key(&listed.id)) {
                        report.skip(Reason::DuplicateId, || format!("{}{place}: image {}", path.display(), listed.id));
                        continue;
                    }
                    images.push(listed);
                }
                Err(error) => skip_item(error, report)?,
            }
        }
        Ok((images, known))
    }

    fn image(&self, object: &Object<'_>, number: usize, folders: &mut Folders) -> Result<Listed, DataError> {
        let id = either_id(object)?;
        // "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
        let (folder, base) = match object.get("url") {
            Some(Value::String(url)) => {
                let mut parts = url.rsplit('/');
                let base = parts.next().unwrap_or_default().to_owned();
                (parts.next().unwrap_or_default().to_owned(), base)
            }
            _ => (String::new(), format!("{id}.jpg")),
        };
        let folder = folders.pick(&self.images, &[&folder, "VG_100K", "image", "images", ""]);
        let image = image_file(&folder, &base)
            .map_err(|found| object.context.error(object.name("url"), "a URL that ends in a file's name", found))?;
        let number_of = |field: &str| object.get(field).and_then(Value::as_u64);
        Ok(Listed {
            image,
            size: (object.pixels("width")?, object.pixels("height")?),
            coco: number_of("coco_id"),
            flickr: number_of("flickr_id"),
            number,
            id,
        })
    }
}

/// `image_id`, or (in some versions) `id`.
fn either_id(object: &Object<'_>) -> Result<String, DataError> {
    object.id(if object.get("image_id").is_some() || object.get("id").is_none() { "image_id" } else { "id" })
}

/// Where in a file each image is.
fn index(path: &Path, known: &HashSet<u64>, report: &mut Report) -> Result<Extents, DataError> {
    let mut extents = Extents::new(path, open_plain(path)?);
    let mut items = JsonItems::open(path, &[])?;
    while let Some(item) = items.next()? {
        let place = Place::Item(item.number);
        let head: Head = match serde_json::from_slice(item.bytes) {
            Ok(head) => head,
            Err(source) => {
                skip_item(DataError::Json { path: path.to_owned(), place, source }, report)?;
                continue;
            }
        };
        let id = match head.image_id.or(head.id) {
            Some(Value::String(id)) => id,
            Some(Value::Number(id)) => id.to_string(),
            _ => {
                let context = Context { path, place };
                skip_item(context.error("image_id", "the number of an image", "nothing"), report)?;
                continue;
            }
        };
        if !known.contains(&image_key(&id)) {
            report.skip(Reason::UnknownImage, || format!("{}{place}: image {id}", path.display()));
            continue;
        }
        extents.add(&id, item.offset, item.bytes.len() as u64, item.number)?;
    }
    extents.order();
    Ok(extents)
}

/// Reads the list `field` of each item about an image; `each` may refuse one of its members.
fn members(
    extents: Option<&mut Extents>,
    id: &str,
    field: &str,
    report: &mut Report,
    mut each: impl FnMut(&Object<'_>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let Some(extents) = extents else { return Ok(()) };
    for chunk in extents.read(image_key(id))? {
        let (path, place) = (extents.path.as_path(), Place::Item(chunk.number));
        let context = Context { path, place: place.clone() };
        let value = parse_item(path, &place, &chunk.bytes);
        let list = value.as_ref().ok().map(|value| context.object(value, "record").and_then(|item| item.list(field)));
        match list {
            None => {
                if let Err(error) = value {
                    skip_item(error, report)?;
                }
            }
            Some(Err(error)) => skip_item(error, report)?,
            Some(Ok(list)) => {
                for (i, value) in list.iter().enumerate() {
                    let done = context.object(value, &format!("{field}[{i}]")).and_then(|member| each(&member));
                    if let Err(error) = done {
                        skip_item(error, report)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// `(x, y, w, h)`; sizes are called `w`, `h` or `width`, `height`.
fn bbox(object: &Object<'_>) -> Result<[f32; 4], DataError> {
    let number = |names: [&str; 2]| {
        let name = names.into_iter().find(|name| object.get(name).is_some()).unwrap_or(names[0]);
        let value = object.get(name).ok_or_else(|| object.missing(name, "a number of pixels"))?;
        value.as_f64().map(|number| number as f32).ok_or_else(|| object.wrong(name, "a number of pixels", value))
    };
    Ok([number(["x", "x"])?, number(["y", "y"])?, number(["w", "width"])?, number(["h", "height"])?])
}

/// Strings of a list, or one string; members that are no text are left out.
fn words(object: &Object<'_>, fields: [&str; 2]) -> Vec<String> {
    match fields.into_iter().find_map(|field| object.get(field)) {
        Some(Value::String(word)) => vec![word.clone()],
        Some(Value::Array(words)) => words.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

/// What a synset such as `traffic_light.n.01` is called.
fn lemma(synset: &str) -> String {
    synset.split('.').next().unwrap_or_default().replace('_', " ")
}

fn object(object: &Object<'_>) -> Result<Element, DataError> {
    let texts = words(object, ["names", "name"]);
    if texts.is_empty() {
        return Err(object.missing("names", "a string or a list of strings"));
    }
    let mut labels: Vec<String> = words(object, ["synsets", "synset"]).iter().map(|synset| lemma(synset)).collect();
    labels.truncate(1);
    Ok(Element { bbox: bbox(object)?, texts, attributes: words(object, ["attributes", "attribute"]), labels })
}

impl VisualGenomeReader {
    fn elements(&mut self, id: &str, report: &mut Report) -> Result<Vec<Element>, DataError> {
        let mut elems = Vec::new();
        members(self.regions.as_mut(), id, "regions", report, |region| {
            // An empty phrase is counted with its image.
            let phrase = match region.get("phrase") {
                Some(Value::String(phrase)) => phrase.clone(),
                _ => region.text("phrase")?,
            };
            elems.push(Element {
                bbox: bbox(region)?,
                texts: vec![phrase],
                attributes: Vec::new(),
                labels: Vec::new(),
            });
            Ok(())
        })?;
        let Some(objects) = self.objects.as_mut() else {
            members(self.attributes.as_mut(), id, "attributes", report, |member| {
                elems.push(object(member)?);
                Ok(())
            })?;
            return Ok(elems);
        };
        let mut attributes: HashMap<u64, Vec<String>> = HashMap::new();
        members(self.attributes.as_mut(), id, "attributes", report, |member| {
            if let Some(id) = member.get("object_id").and_then(Value::as_u64) {
                attributes.entry(id).or_default().extend(words(member, ["attributes", "attribute"]));
            }
            Ok(())
        })?;
        members(Some(objects), id, "objects", report, |member| {
            let mut element = object(member)?;
            let merged = member.list("merged_object_ids")?.iter().filter_map(Value::as_u64);
            for id in member.get("object_id").and_then(Value::as_u64).into_iter().chain(merged) {
                for word in attributes.get(&id).into_iter().flatten() {
                    if !element.attributes.contains(word) {
                        element.attributes.push(word.clone());
                    }
                }
            }
            elems.push(element);
            Ok(())
        })?;
        Ok(elems)
    }
}

impl Reader for VisualGenomeReader {
    fn next(&mut self, report: &mut Report) -> Result<Option<Raw>, DataError> {
        let Some(listed) = self.images.get(self.next) else { return Ok(None) };
        self.next += 1;
        let Listed { id, image, size, coco, flickr, number } = listed;
        let (id, image, size) = (id.clone(), image.clone(), *size);
        let alias = |name: &str, id: &Option<u64>| id.map(|id| format!("{name}:{id}"));
        let aliases = [alias("coco", coco), alias("flickr", flickr)].into_iter().flatten().collect();
        let origin = origin(&self.file, Place::Item(*number));
        let elems = self.elements(&id, report)?;
        let mut questions = Vec::new();
        members(self.questions.as_mut(), &id, "qas", report, |qa| {
            questions.push((qa.text("question")?, qa.text("answer")?));
            Ok(())
        })?;
        Ok(Some(Raw {
            id,
            aliases,
            image,
            size: Some(size),
            fractions: false,
            captions: Vec::new(),
            elems,
            questions,
            origin,
        }))
    }

    fn images(&self) -> Option<u64> {
        Some(self.images.len() as u64)
    }
}
