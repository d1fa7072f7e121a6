//! Reading the files of fine-tuning and evaluation sets, in X-VLM's own form or as published.

mod grounding;
mod vqa;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use self::grounding::read_proposals;
use self::grounding::{Refer, Referents, grounding_item};
use self::vqa::{Published, vqa_item};
use super::items::{CaptionItem, FillItem, GroundingItem, NlvrItem, RetrievalItem, VqaItem, VqaSource};
use super::json_items::{JsonItems, parse_item};
use super::karpathy::sentences;
use super::report::{Reason, Report};
use super::source::{Folders, coco_subset, coco_url_subset};
use super::stream::{Lines, head};
use crate::error::{DataError, Place, excerpt};
use crate::json::{Context, Object, folder};

/// Items, and what was left out.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded<T> {
    /// The items, in the order of the files.
    pub items: Vec<T>,
    /// What was left out, by reason.
    pub report: Report,
}

/// How annotation files of fine-tuning and evaluation sets are read. Each reader takes several files, as the original's
/// configurations list them, and numbers images across them; which form a file has is seen from its content.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// The folder that paths of images are relative to; the folder of each file by default. An item whose path leads out of it
    /// is broken; `/` permits any path.
    pub images: Option<PathBuf>,
    /// The folder of Visual Genome's images, for questions of `"dataset": "vg"`; `images` by default.
    pub vg_images: Option<PathBuf>,
    /// The folder of GQA's images, for questions of `"dataset": "gqa"`; `images` by default.
    pub gqa_images: Option<PathBuf>,
    /// The splits to read, where files tell splits; all if empty.
    pub splits: Vec<String>,
    /// Leave out items of which an image file is missing.
    pub check_images: bool,
    /// The first broken item is an error, instead of being left out and counted.
    pub strict: bool,
}

/// What is being read.
struct Run<'a> {
    reading: &'a Reading,
    report: Report,
    numbers: HashMap<String, u32>,
    ids: HashSet<String>,
}

/// How a document begins.
#[derive(PartialEq, Eq)]
enum Begins {
    List,
    Object,
}

fn begins(path: &Path) -> Result<Begins, DataError> {
    let start = head(path)?;
    match start.first() {
        Some(b'[') => Ok(Begins::List),
        Some(b'{') => Ok(Begins::Object),
        _ => {
            let found = excerpt(&String::from_utf8_lossy(&start));
            Err(Context { path, place: Place::Whole }.error("file", "JSON: a list or an object", format!("{found:?}")))
        }
    }
}

fn optional_text(object: &Object<'_>, field: &str) -> Result<Option<String>, DataError> {
    match object.get(field) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(value) => Err(object.wrong(field, "a string", value)),
    }
}

fn some_texts(object: &Object<'_>, field: &str) -> Result<Vec<String>, DataError> {
    let texts = object.texts(field)?;
    if texts.is_empty() {
        return Err(object.missing(field, "a string or a list of strings"));
    }
    Ok(texts)
}

/// The name of the first of `fields` that is there; the first of all if none is.
fn first_of<'f>(object: &Object<'_>, fields: &[&'f str]) -> &'f str {
    fields.iter().copied().find(|field| object.get(field).is_some()).unwrap_or(fields[0])
}

impl Run<'_> {
    /// Leaves out an item, or ends the reading.
    fn refuse(&mut self, reason: Reason, error: DataError) -> Result<(), DataError> {
        match error {
            DataError::Field { .. } | DataError::Json { .. } if !self.reading.strict => {
                self.report.skip(reason, || error);
                Ok(())
            }
            error => Err(error),
        }
    }

    fn root(&self, file: &Path) -> PathBuf {
        self.reading.images.clone().unwrap_or_else(|| folder(file))
    }

    fn number(&mut self, image: &str) -> u32 {
        let next = self.numbers.len() as u32;
        match self.numbers.get(image) {
            Some(&number) => number,
            None => *self.numbers.entry(image.to_owned()).or_insert(next),
        }
    }

    fn other_split(&mut self, split: Option<&str>, what: impl FnOnce() -> String) -> bool {
        let splits = &self.reading.splits;
        let other = split.is_some_and(|split| !splits.is_empty() && !splits.iter().any(|wanted| wanted == split));
        if other {
            self.report.skip(Reason::OtherSplit, what);
        }
        other
    }

    /// Whether an identifier is an item's own, and its images are there.
    fn accept(&mut self, context: &Context<'_>, id: Option<(&str, &str)>, images: &[&Path]) -> Result<bool, DataError> {
        let known = id.filter(|(_, id)| self.ids.contains(*id));
        if let Some((field, id)) = known {
            let found = format!("{id:?} again");
            self.refuse(Reason::DuplicateId, context.error(field, "an identifier of its own", found))?;
            return Ok(false);
        }
        let missing = images.iter().find(|image| self.reading.check_images && !image.is_file());
        if let Some(missing) = missing {
            let found = format!("{}, which is no file", missing.display());
            self.refuse(Reason::MissingImage, context.error("image", "an image file", found))?;
            return Ok(false);
        }
        if let Some((_, id)) = id {
            self.ids.insert(id.to_owned());
        }
        Ok(true)
    }

    /// Parses each item of a document's sections; a broken one is left out.
    fn each(
        &mut self,
        path: &Path,
        sections: &'static [&'static str],
        mut each: impl FnMut(&mut Self, usize, usize, &Value) -> Result<(), DataError>,
    ) -> Result<usize, DataError> {
        let mut items = JsonItems::open(path, sections)?;
        let mut count = 0;
        while let Some(item) = items.next()? {
            count += 1;
            let (section, number) = (item.section, item.number);
            let parsed = parse_item(path, &Place::Item(number), item.bytes);
            if let Err(error) = parsed.and_then(|value| each(self, section, number, &value)) {
                self.refuse(Reason::Malformed, error)?;
            }
        }
        Ok(count)
    }
}

impl Reading {
    /// The first broken item is an error.
    #[must_use]
    pub fn strict() -> Self {
        Self { strict: true, ..Self::default() }
    }

    fn run<T>(&self, read: impl FnOnce(&mut Run<'_>) -> Result<Vec<T>, DataError>) -> Result<Loaded<T>, DataError> {
        let mut run = Run { reading: self, report: Report::default(), numbers: HashMap::new(), ids: HashSet::new() };
        let items = read(&mut run)?;
        Ok(Loaded { items, report: run.report })
    }

    /// Reads image-text retrieval: `[{image, caption: string | list, image_id}]`, Karpathy's `dataset_*.json`, or COCO's
    /// `captions_*.json`. Lists of phrases (`text` instead of `caption`) are read too: weak grounding trains on them as
    /// retrieval does. Without an `image_id`, an image is known by its path.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`]; [`DataError::Json`] and [`DataError::Field`] naming file, item and field: of a document that is none,
    /// and (if `strict`) of the first broken item.
    pub fn retrieval<P: AsRef<Path>>(&self, files: &[P]) -> Result<Loaded<RetrievalItem>, DataError> {
        self.run(|run| {
            let mut found = Vec::new();
            for path in files {
                let path = path.as_ref();
                if begins(path)? == Begins::Object {
                    for item in run.caption_document(path)? {
                        let CaptionItem { id, image, image_index, split, captions } = item;
                        if captions.is_empty() {
                            let context = Context { path, place: Place::Whole };
                            let error = context.error("captions", "at least one", format!("none of image {id}"));
                            run.refuse(Reason::NoText, error)?;
                            continue;
                        }
                        found.push(RetrievalItem { image, image_id: id, image_index, captions, split });
                    }
                    continue;
                }
                let root = run.root(path);
                run.each(path, &[], |run, _, number, value| {
                    let context = Context { path, place: Place::Item(number) };
                    let object = context.object(value, "record")?;
                    let file = object.text("image")?;
                    let captions = some_texts(&object, first_of(&object, &["caption", "text"]))?;
                    // VLUE has images of one name in several folders.
                    let image_id = match object.get("image_id") {
                        Some(_) => object.id("image_id")?,
                        None => file.clone(),
                    };
                    let (image, split) = (object.file("image", &root)?, optional_text(&object, "split")?);
                    let skip = run.other_split(split.as_deref(), || format!("{}{}", path.display(), context.place));
                    if !skip && run.accept(&context, None, &[&image])? {
                        let image_index = run.number(&image_id);
                        found.push(RetrievalItem { image, image_id, image_index, captions, split });
                    }
                    Ok(())
                })?;
            }
            Ok(found)
        })
    }

    /// Reads captioning: Karpathy's `dataset_*.json` (or `{"images": [{id, file_name, sentences: [{raw}]}]}`), COCO's
    /// `captions_*.json`, or X-VLM's lists `[{image, caption: string | list, image_id}]`, of which the number at the end of a
    /// file's name is the image's identifier if there is no `image_id`.
    ///
    /// # Errors
    ///
    /// As [`Self::retrieval`].
    pub fn captions<P: AsRef<Path>>(&self, files: &[P]) -> Result<Loaded<CaptionItem>, DataError> {
        self.run(|run| {
            let mut found = Vec::new();
            for path in files {
                let path = path.as_ref();
                if begins(path)? == Begins::Object {
                    found.extend(run.caption_document(path)?);
                    continue;
                }
                let root = run.root(path);
                run.each(path, &[], |run, _, number, value| {
                    let context = Context { path, place: Place::Item(number) };
                    let object = context.object(value, "record")?;
                    let file = object.text("image")?;
                    let id = match object.get("image_id") {
                        Some(_) => object.id("image_id")?,
                        None => trailing_number(&file),
                    };
                    let (image, captions) = (object.file("image", &root)?, object.texts("caption")?);
                    if run.accept(&context, None, &[&image])? {
                        let image_index = run.number(&id);
                        found.push(CaptionItem {
                            id,
                            image,
                            image_index,
                            split: optional_text(&object, "split")?,
                            captions,
                        });
                    }
                    Ok(())
                })?;
            }
            Ok(found)
        })
    }

    /// Reads questions: X-VLM's lists `[{question_id, image, question, answer: string | list, dataset, kind}]`, of which
    /// `answer` may be absent, or VQA v2 as published: `v2_OpenEnded_mscoco_*_questions.json` and
    /// `v2_mscoco_*_annotations.json`, in any order (test sets have no annotations); images are then looked for at
    /// `<subset>/COCO_<subset>_<number>.jpg`.
    ///
    /// # Errors
    ///
    /// As [`Self::retrieval`].
    pub fn vqa<P: AsRef<Path>>(&self, files: &[P]) -> Result<Loaded<VqaItem>, DataError> {
        self.run(|run| {
            let (mut found, mut published) = (Vec::new(), Published::default());
            for path in files {
                let path = path.as_ref();
                if begins(path)? == Begins::Object {
                    published.read(run, path)?;
                    continue;
                }
                run.each(path, &[], |run, _, number, value| {
                    let context = Context { path, place: Place::Item(number) };
                    let object = context.object(value, "record")?;
                    let item = vqa_item(run, &object, path, number)?;
                    let id = object.get("question_id").map(|_| ("question_id", item.question_id.as_str()));
                    if run.accept(&context, id, &[&item.image])? {
                        found.push(item);
                    }
                    Ok(())
                })?;
            }
            found.extend(published.items(run)?);
            Ok(found)
        })
    }

    /// Reads sentence pairs: X-VLM's lists `[{images: [left, right], sentence, label}]`, or NLVR2 as published (`train.json`,
    /// `dev.json`, `test1.json`: an object a line), of which the images are looked for where the publisher's archives put
    /// them: `images/train/<directory>/`, `dev/`, `test1/`.
    ///
    /// # Errors
    ///
    /// As [`Self::retrieval`].
    pub fn nlvr<P: AsRef<Path>>(&self, files: &[P]) -> Result<Loaded<NlvrItem>, DataError> {
        self.run(|run| {
            let mut found = Vec::new();
            for path in files {
                let path = path.as_ref();
                let root = run.root(path);
                let mut add = |run: &mut Run<'_>, context: &Context<'_>, value: &Value| {
                    let object = context.object(value, "record")?;
                    let item = nlvr_item(&object, &root, found.len())?;
                    let own = object.get("identifier").map(|_| ("identifier", item.id.as_str()));
                    if run.accept(context, own, &[&item.images[0], &item.images[1]])? {
                        found.push(item);
                    }
                    Ok(())
                };
                if begins(path)? == Begins::List {
                    run.each(path, &[], |run, _, number, value| {
                        add(run, &Context { path, place: Place::Item(number) }, value)
                    })?;
                    continue;
                }
                let mut lines = Lines::open(path)?;
                while let Some(line) = lines.next()? {
                    if line.bytes.trim_ascii().is_empty() {
                        continue;
                    }
                    let place = Place::Line(line.number);
                    let parsed = parse_item(path, &place, line.bytes);
                    if let Err(error) =
                        parsed.and_then(|value| add(run, &Context { path, place: place.clone() }, &value))
                    {
                        run.refuse(Reason::Malformed, error)?;
                    }
                }
            }
            Ok(found)
        })
    }

    /// Reads grounding: lists `[{ref_id, image, image_id, text, bbox, height, width, dets}]`, or RefCOCO, RefCOCO+ and RefCOCOg
    /// as published: `refs(unc).p`, `refs(umd).p` or `refs(google).p` beside its `instances.json`. X-VLM's own lists have no
    /// boxes: given with the published files, they get theirs from there by `ref_id`.
    ///
    /// # Errors
    ///
    /// As [`Self::retrieval`].
    pub fn grounding<P: AsRef<Path>>(&self, files: &[P]) -> Result<Loaded<GroundingItem>, DataError> {
        self.run(|run| {
            let is_pickle = |path: &&Path| path.extension().is_some_and(|extension| extension == "p");
            let paths: Vec<&Path> = files.iter().map(AsRef::as_ref).collect();
            let (pickles, lists): (Vec<&Path>, Vec<&Path>) = paths.into_iter().partition(is_pickle);
            let mut refer = Refer::default();
            for path in &pickles {
                refer.read(run, path)?;
            }
            let (mut found, mut referents) = (Vec::new(), Referents::new());
            for path in &lists {
                run.each(path, &[], |run, _, number, value| {
                    let context = Context { path, place: Place::Item(number) };
                    let object = context.object(value, "record")?;
                    if let Some(item) = grounding_item(run, &object, path, &refer, &mut referents)? {
                        found.push(item);
                    }
                    Ok(())
                })?;
                if begins(path)? != Begins::List {
                    let context = Context { path, place: Place::Whole };
                    return Err(context.error("file", "a list of objects", "an object"));
                }
            }
            if lists.is_empty() {
                found = refer.items(run)?;
            }
            Ok(found)
        })
    }

    /// Reads `[{image, text, answers: string | list, kind}]`; a missing `kind` is empty.
    ///
    /// # Errors
    ///
    /// As [`Self::retrieval`].
    pub fn fill<P: AsRef<Path>>(&self, files: &[P]) -> Result<Loaded<FillItem>, DataError> {
        self.run(|run| {
            let mut found = Vec::new();
            for path in files {
                let path = path.as_ref();
                let root = run.root(path);
                if begins(path)? != Begins::List {
                    let context = Context { path, place: Place::Whole };
                    return Err(context.error("file", "a list of objects", "an object"));
                }
                run.each(path, &[], |run, _, number, value| {
                    let context = Context { path, place: Place::Item(number) };
                    let object = context.object(value, "record")?;
                    let item = FillItem {
                        image: object.file("image", &root)?,
                        text: object.text("text")?,
                        answers: some_texts(&object, "answers")?,
                        kind: optional_text(&object, "kind")?.unwrap_or_default(),
                    };
                    if run.accept(&context, None, &[&item.image])? {
                        found.push(item);
                    }
                    Ok(())
                })?;
            }
            Ok(found)
        })
    }
}

/// The number at the end of a file's name, as in `COCO_val2014_000000000042.jpg`; the name without extension if there is none.
fn trailing_number(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or_default();
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let digits = stem.rsplit('_').next().unwrap_or_default();
    digits.parse::<u64>().map_or_else(|_| stem.to_owned(), |number| number.to_string())
}

impl Run<'_> {
    /// Karpathy's form, or COCO's.
    fn caption_document(&mut self, path: &Path) -> Result<Vec<CaptionItem>, DataError> {
        let root = self.root(path);
        let (mut found, mut places) = (Vec::<CaptionItem>::new(), HashMap::<String, usize>::new());
        let mut captions: Vec<(usize, String, String)> = Vec::new();
        let (mut ids, mut folders) = (HashSet::new(), Folders::default());
        let count = self.each(path, &["images", "annotations"], |run, section, number, value| {
            let context = Context { path, place: Place::Item(number) };
            if section == 1 {
                let object = context.object(value, "annotation")?;
                captions.push((number, object.id("image_id")?, object.text("caption")?));
                return Ok(());
            }
            let object = context.object(value, "record")?;
            let id = object.id(first_of(&object, &["id", "cocoid", "imgid"]))?;
            let field = first_of(&object, &["file_name", "filename"]);
            let file = object.text(field)?;
            let folder = match optional_text(&object, "filepath")? {
                Some(folder) => context.folder("filepath", &root, &folder)?,
                None if file.contains('/') => root.clone(),
                None => {
                    let subset = Some(coco_subset(&file)).filter(|subset| !subset.is_empty());
                    folders.pick(&root, &[subset.or_else(|| coco_url_subset(&object)).unwrap_or_default(), ""])
                }
            };
            let split = optional_text(&object, "split")?;
            if run.other_split(split.as_deref(), || format!("{}{}", path.display(), context.place)) {
                return Ok(());
            }
            if !ids.insert(id.clone()) {
                let error = context.error("id", "an identifier of its own", format!("{id:?} again"));
                return run.refuse(Reason::DuplicateId, error);
            }
            let image = object.file(field, &folder)?;
            let sentences = sentences(&object)?;
            if run.accept(&context, None, &[&image])? {
                places.insert(id.clone(), found.len());
                let image_index = run.number(&id);
                found.push(CaptionItem { id, image, image_index, split, captions: sentences });
            }
            Ok(())
        })?;
        if count == 0 {
            let context = Context { path, place: Place::Whole };
            return Err(context.error("images", "a list of images", "nothing"));
        }
        for (number, image, caption) in captions {
            match places.get(&image) {
                Some(&place) => found[place].captions.push(caption),
                None if ids.contains(&image) => {}
                None => {
                    let context = Context { path, place: Place::Item(number) };
                    let error = context.error("annotation.image_id", "an image of the file", format!("{image:?}"));
                    self.refuse(Reason::UnknownImage, error)?;
                }
            }
        }
        Ok(found)
    }
}

/// Whether a name is one of a single file or folder, whatever else it is made part of.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

fn nlvr_item(object: &Object<'_>, root: &Path, number: usize) -> Result<NlvrItem, DataError> {
    let label = match object.get("label") {
        Some(Value::Bool(label)) => *label,
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => true,
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => false,
        Some(value) => return Err(object.wrong("label", "True or False", value)),
        None => return Err(object.missing("label", "True or False")),
    };
    let sentence = object.text("sentence")?;
    if object.get("images").is_some() {
        let images = object.texts("images")?;
        let [left, right] = images.as_slice() else {
            let found = format!("{} of them", images.len());
            return Err(object.context.error(object.name("images"), "two images", found));
        };
        let file = |i: usize, text: &str| object.context.file(&object.name(&format!("images[{i}]")), root, text);
        let images = [file(0, left)?, file(1, right)?];
        let id = match object.get("identifier") {
            Some(_) => object.id("identifier")?,
            None => number.to_string(),
        };
        return Ok(NlvrItem { id, images, sentence, label });
    }
    // `train-10171-0-0`: the split, the set of images, the pair, the sentence. The images are named after the pair.
    let id = object.text("identifier")?;
    let pair = id.rsplit_once('-').filter(|(pair, _)| pair.split('-').count() == 3).map(|(pair, _)| pair);
    let Some(pair) = pair.filter(|pair| is_plain(pair)) else {
        let expected = "an identifier such as dev-850-0-1";
        return Err(object.context.error(object.name("identifier"), expected, excerpt(&id)));
    };
    let folder = match (pair.split('-').next(), object.get("directory")) {
        (Some("train"), Some(Value::Number(directory))) => format!("images/train/{directory}"),
        (Some("train"), Some(Value::String(directory))) if is_plain(directory) => format!("images/train/{directory}"),
        (Some("train"), _) => return Err(object.missing("directory", "the folder of the images")),
        (split, _) => split.unwrap_or_default().to_owned(),
    };
    let image = |side| root.join(&folder).join(format!("{pair}-img{side}.png"));
    Ok(NlvrItem { images: [image(0), image(1)], id, sentence, label })
}
