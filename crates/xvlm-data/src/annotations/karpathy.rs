//! Karpathy's splits of COCO, Flickr30k and Flickr8k: `dataset_coco.json`, `dataset_flickr30k.json`.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::json_items::{JsonItems, parse_item};
use super::report::{Reason, Report};
use super::source::{Raw, Reader, Records, origin, skip_item};
use crate::error::{DataError, Place};
use crate::json::{Context, Object};

/// A `dataset_*.json` of Karpathy's, as captions for pre-training.
#[derive(Debug, Clone)]
pub struct Karpathy {
    /// The file.
    pub file: PathBuf,
    /// The folder that the file's paths are relative to: COCO's with `train2014` and `val2014`, or Flickr30k's images.
    pub images: PathBuf,
    /// The splits to read, such as `train` and `restval`; all if empty.
    pub splits: Vec<String>,
}

struct KarpathyReader {
    file: Arc<Path>,
    items: JsonItems<BufReader<File>>,
    images: PathBuf,
    splits: Vec<String>,
}

impl Karpathy {
    /// Opens the file; images are read as they are asked for.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`].
    pub fn open(&self) -> Result<Records, DataError> {
        let items = JsonItems::open(&self.file, &["images"])?;
        let (images, splits) = (self.images.clone(), self.splits.clone());
        Ok(Records::new(KarpathyReader { file: Arc::from(self.file.as_path()), items, images, splits }))
    }
}

fn file_field(object: &Object<'_>) -> &'static str {
    if object.get("filename").is_some() { "filename" } else { "file_name" }
}

/// Names of an item of Karpathy's: its identifier, and what it is elsewhere.
pub(super) fn names(object: &Object<'_>) -> Result<(String, Vec<String>), DataError> {
    let file = object.text(file_field(object))?;
    if object.get("cocoid").is_some() {
        let id = object.id("cocoid")?;
        return Ok((id.clone(), vec![format!("coco:{id}"), file]));
    }
    let id = ["imgid", "id"].into_iter().find(|name| object.get(name).is_some()).unwrap_or("imgid");
    Ok((object.id(id)?, vec![flickr_alias(&file).unwrap_or(file)]))
}

/// The photograph of a file that is named after one on Flickr, as Flickr30k's are.
pub(super) fn flickr_alias(file: &str) -> Option<String> {
    let stem = file.rsplit('/').next()?.rsplit_once('.')?.0;
    (!stem.is_empty() && stem.bytes().all(|byte| byte.is_ascii_digit())).then(|| format!("flickr:{stem}"))
}

/// The raw sentences of an item.
pub(super) fn sentences(object: &Object<'_>) -> Result<Vec<String>, DataError> {
    let member = |(i, value)| {
        let name = object.name(&format!("sentences[{i}]"));
        object.context.object(value, &name)?.text("raw")
    };
    object.list("sentences")?.iter().enumerate().map(member).collect()
}

impl KarpathyReader {
    fn raw(&self, object: &Object<'_>, number: usize) -> Result<Raw, DataError> {
        let (id, aliases) = names(object)?;
        let folder = match object.get("filepath") {
            Some(_) => object.context.folder("filepath", &self.images, &object.text("filepath")?)?,
            None => self.images.clone(),
        };
        let image = object.file(file_field(object), &folder)?;
        Ok(Raw {
            id,
            aliases,
            image,
            size: None,
            fractions: false,
            captions: sentences(object)?,
            elems: Vec::new(),
            questions: Vec::new(),
            origin: origin(&self.file, Place::Item(number)),
        })
    }
}

impl Reader for KarpathyReader {
    fn next(&mut self, report: &mut Report) -> Result<Option<Raw>, DataError> {
        loop {
            let file = Arc::clone(&self.file);
            let Some(item) = self.items.next()? else { return Ok(None) };
            let (place, number) = (Place::Item(item.number), item.number);
            let value = parse_item(&file, &place, item.bytes);
            let parsed = value.as_ref().ok().map(|value| {
                let object = Context { path: &file, place: place.clone() }.object(value, "record")?;
                let split = object.get("split").and_then(serde_json::Value::as_str);
                if !self.splits.is_empty()
                    && split.is_none_or(|split| !self.splits.iter().any(|wanted| wanted == split))
                {
                    return Ok(None);
                }
                self.raw(&object, number).map(Some)
            });
            match parsed {
                Some(Ok(Some(raw))) => return Ok(Some(raw)),
                Some(Ok(None)) => report.skip(Reason::OtherSplit, || format!("{}{place}", file.display())),
                Some(Err(error)) => skip_item(error, report)?,
                None => {
                    if let Err(error) = value {
                        skip_item(error, report)?;
                    }
                }
            }
        }
    }

    fn images(&self) -> Option<u64> {
        None
    }
}
