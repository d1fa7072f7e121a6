//! Reading the files of fine-tuning and evaluation sets, in X-VLM's own form or as published.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::coco::numbers;
use super::items::{CaptionItem, FillItem, GroundingItem, NlvrItem, RetrievalItem, VqaItem, VqaSource};
use super::karpathy::sentences;
use super::refer::{Instances, Reference, read_instances, read_references_lenient};
use super::report::{Reason, Report};
use super::stream::{JsonItems, Lines, open_plain, parse_item};
use crate::error::{DataError, Place, excerpt};
use crate::json::{Context, Object, folder, io_error, read_value};
use crate::transform::clip_box;

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
    /// The folder that paths of images are relative to; the folder of each file by default.
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
    const ENOUGH: u64 = 1 << 12;
    let mut start = Vec::new();
    open_plain(path)?.take(ENOUGH).read_to_end(&mut start).map_err(|source| io_error(path, source))?;
    let start = start.strip_prefix(&[0xef, 0xbb, 0xbf]).unwrap_or(&start).trim_ascii_start();
    match start.first() {
        Some(b'[') => Ok(Begins::List),
        Some(b'{') => Ok(Begins::Object),
        _ => {
            let found = excerpt(&String::from_utf8_lossy(&start[..start.len().min(60)]));
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
    fn accept(&mut self, context: Context<'_>, id: Option<(&str, &str)>, images: &[&Path]) -> Result<bool, DataError> {
        if let Some((field, id)) = id {
            if self.ids.contains(id) {
                self.refuse(
                    Reason::DuplicateId,
                    context.error(field, "an identifier of its own", format!("{id:?} again")),
                )?;
                return Ok(false);
            }
        }
        if self.reading.check_images {
            if let Some(missing) = images.iter().find(|image| !image.is_file()) {
                let found = format!("{}, which is no file", missing.display());
                self.refuse(Reason::MissingImage, context.error("image", "an image file", found))?;
                return Ok(false);
            }
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
            let parsed = parse_item(path, Place::Item(number), item.bytes);
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
    /// retrieval does. Without an `image_id`, an image is known by its file.
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
                    let image_id = match object.get("image_id") {
                        Some(_) => object.id("image_id")?,
                        None => file.rsplit('/').next().unwrap_or_default().to_owned(),
                    };
                    let (image, split) = (root.join(&file), optional_text(&object, "split")?);
                    let skip = run.other_split(split.as_deref(), || format!("{}{}", path.display(), context.place));
                    if !skip && run.accept(context, None, &[&image])? {
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
                    let (image, captions) = (root.join(&file), object.texts("caption")?);
                    if run.accept(context, None, &[&image])? {
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
                    if run.accept(context, id, &[&item.image])? {
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
                let mut add = |run: &mut Run<'_>, context: Context<'_>, value: &Value| {
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
                        add(run, Context { path, place: Place::Item(number) }, value)
                    })?;
                    continue;
                }
                let mut lines = Lines::open(path)?;
                while let Some(line) = lines.next()? {
                    if line.bytes.trim_ascii().is_empty() {
                        continue;
                    }
                    let place = Place::Line(line.number);
                    let parsed = parse_item(path, place, line.bytes);
                    if let Err(error) = parsed.and_then(|value| add(run, Context { path, place }, &value)) {
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
            let mut found = Vec::new();
            for path in &lists {
                run.each(path, &[], |run, _, number, value| {
                    let context = Context { path, place: Place::Item(number) };
                    let object = context.object(value, "record")?;
                    if let Some(item) = grounding_item(run, &object, path, &refer)? {
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
                        image: root.join(object.text("image")?),
                        text: object.text("text")?,
                        answers: some_texts(&object, "answers")?,
                        kind: optional_text(&object, "kind")?.unwrap_or_default(),
                    };
                    if run.accept(context, None, &[&item.image])? {
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
        let mut ids = HashSet::new();
        let count = self.each(path, &["images", "annotations"], |run, section, number, value| {
            let context = Context { path, place: Place::Item(number) };
            if section == 1 {
                let object = context.object(value, "annotation")?;
                captions.push((number, object.id("image_id")?, object.text("caption")?));
                return Ok(());
            }
            let object = context.object(value, "record")?;
            let id = object.id(first_of(&object, &["id", "cocoid", "imgid"]))?;
            let file = object.text(first_of(&object, &["file_name", "filename"]))?;
            let sub = optional_text(&object, "filepath")?.unwrap_or_default();
            let split = optional_text(&object, "split")?;
            if run.other_split(split.as_deref(), || format!("{}{}", path.display(), context.place)) {
                return Ok(());
            }
            if !ids.insert(id.clone()) {
                let error = context.error("id", "an identifier of its own", format!("{id:?} again"));
                return run.refuse(Reason::DuplicateId, error);
            }
            let image = root.join(sub).join(file);
            let sentences = sentences(&object)?;
            if run.accept(context, None, &[&image])? {
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

fn vqa_item(run: &Run<'_>, object: &Object<'_>, path: &Path, number: usize) -> Result<VqaItem, DataError> {
    let source = match optional_text(object, "dataset")?.as_deref() {
        None | Some("vqa") => VqaSource::Vqa,
        Some("vg") => VqaSource::VisualGenome,
        Some("gqa") => VqaSource::Gqa,
        Some(other) => {
            return Err(object.context.error(object.name("dataset"), "vqa, vg or gqa", format!("{other:?}")));
        }
    };
    let root = match source {
        VqaSource::Vqa => None,
        VqaSource::VisualGenome => run.reading.vg_images.clone(),
        VqaSource::Gqa => run.reading.gqa_images.clone(),
    };
    let question_id = match object.get("question_id") {
        Some(_) => object.id("question_id")?,
        // X-VLM's `vg_qa.json` has none.
        None if source != VqaSource::Vqa => {
            format!("{}#{number}", path.file_stem().unwrap_or_default().to_string_lossy())
        }
        None => return Err(object.missing("question_id", "a number or a string")),
    };
    Ok(VqaItem {
        question_id,
        image: root.unwrap_or_else(|| run.root(path)).join(object.text("image")?),
        question: object.text("question")?,
        answers: object.texts("answer")?,
        kind: optional_text(object, "kind")?.unwrap_or_default(),
        source,
    })
}

/// VQA v2 as published: questions and annotations are matched when all files are read.
#[derive(Default)]
struct Published {
    questions: Vec<Question>,
    annotations: HashMap<String, Answered>,
    order: Vec<String>,
    annotated: bool,
}

struct Question {
    id: String,
    image_id: u64,
    question: String,
    file: PathBuf,
    number: usize,
    subset: String,
}

struct Answered {
    image_id: u64,
    answers: Vec<String>,
    kind: String,
    file: PathBuf,
    number: usize,
}

impl Published {
    fn read(&mut self, run: &mut Run<'_>, path: &Path) -> Result<(), DataError> {
        let first = self.questions.len();
        let mut subset = None;
        let count = run.each(path, &["questions", "annotations", "data_subtype"], |run, section, number, value| {
            let context = Context { path, place: Place::Item(number) };
            if section == 2 {
                subset = value.as_str().map(str::to_owned);
                return Ok(());
            }
            let object = context.object(value, "record")?;
            let id = object.id("question_id")?;
            let image_id = object.get("image_id").and_then(Value::as_u64);
            let image_id = image_id.ok_or_else(|| object.missing("image_id", "the number of an image"))?;
            if section == 0 {
                let (question, file, subset) = (object.text("question")?, path.to_owned(), String::new());
                self.questions.push(Question { id, image_id, question, file, number, subset });
                return Ok(());
            }
            let answer = |(i, value)| {
                let name = format!("answers[{i}]");
                object.context.object(value, &name)?.text("answer")
            };
            let answers = object.list("answers")?.iter().enumerate().map(answer).collect::<Result<_, _>>()?;
            let kind = optional_text(&object, "answer_type")?.unwrap_or_default();
            if self.annotations.contains_key(&id) {
                let error = context.error("question_id", "an identifier of its own", format!("{id:?} again"));
                return run.refuse(Reason::DuplicateId, error);
            }
            self.order.push(id.clone());
            self.annotations.insert(id, Answered { image_id, answers, kind, file: path.to_owned(), number });
            Ok(())
        })?;
        let context = Context { path, place: Place::Whole };
        if count == 0 {
            return Err(context.error("questions", "a list of questions, or `annotations`", "neither"));
        }
        if self.questions.len() == first {
            self.annotated = true;
            return Ok(());
        }
        // "test-dev2015" is a part of "test2015".
        let subset = subset.ok_or_else(|| context.error("data_subtype", "a subset such as train2014", "nothing"))?;
        let subset = if subset == "test-dev2015" { "test2015".to_owned() } else { subset };
        self.questions[first..].iter_mut().for_each(|question| subset.clone_into(&mut question.subset));
        Ok(())
    }

    fn items(mut self, run: &mut Run<'_>) -> Result<Vec<VqaItem>, DataError> {
        let mut found = Vec::with_capacity(self.questions.len());
        for Question { id, image_id, question, file, number, subset } in self.questions {
            let context = Context { path: &file, place: Place::Item(number) };
            let image = run.root(&file).join(&subset).join(format!("COCO_{subset}_{image_id:012}.jpg"));
            let answered = self.annotations.remove(&id);
            let (answers, kind) = match answered {
                Some(answered) if answered.image_id != image_id => {
                    let context = Context { path: &answered.file, place: Place::Item(answered.number) };
                    let found = format!("image {}", answered.image_id);
                    let error = context.error("image_id", format!("image {image_id}, as question {id}"), found);
                    run.refuse(Reason::OtherImage, error)?;
                    continue;
                }
                Some(answered) => (answered.answers, answered.kind),
                None if self.annotated => {
                    let error = context.error("question_id", "a question with an annotation", format!("{id:?}"));
                    run.refuse(Reason::QuestionWithoutAnnotation, error)?;
                    continue;
                }
                None => (Vec::new(), String::new()),
            };
            if run.accept(context, Some(("question_id", &id)), &[&image])? {
                found.push(VqaItem { question_id: id, image, question, answers, kind, source: VqaSource::Vqa });
            }
        }
        for id in self.order {
            if let Some(Answered { file, number, .. }) = self.annotations.remove(&id) {
                let context = Context { path: &file, place: Place::Item(number) };
                let error = context.error("question_id", "a question that is asked", format!("{id:?}"));
                run.refuse(Reason::AnnotationWithoutQuestion, error)?;
            }
        }
        Ok(found)
    }
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
        let id = match object.get("identifier") {
            Some(_) => object.id("identifier")?,
            None => number.to_string(),
        };
        return Ok(NlvrItem { id, images: [root.join(left), root.join(right)], sentence, label });
    }
    // `train-10171-0-0`: the split, the set of images, the pair, the sentence. The images are named after the pair.
    let id = object.text("identifier")?;
    let pair = id.rsplit_once('-').filter(|(pair, _)| pair.split('-').count() == 3).map(|(pair, _)| pair);
    let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    let Some(pair) = pair.filter(|pair| plain(pair)) else {
        let expected = "an identifier such as dev-850-0-1";
        return Err(object.context.error(object.name("identifier"), expected, excerpt(&id)));
    };
    let folder = match (pair.split('-').next(), object.get("directory")) {
        (Some("train"), Some(Value::Number(directory))) => format!("images/train/{directory}"),
        (Some("train"), Some(Value::String(directory))) if plain(directory) => format!("images/train/{directory}"),
        (Some("train"), _) => return Err(object.missing("directory", "the folder of the images")),
        (split, _) => split.unwrap_or_default().to_owned(),
    };
    let image = |side| root.join(&folder).join(format!("{pair}-img{side}.png"));
    Ok(NlvrItem { images: [image(0), image(1)], id, sentence, label })
}

/// RefCOCO's published files.
#[derive(Default)]
struct Refer {
    references: Vec<(Reference, usize, PathBuf)>,
    by_id: HashMap<String, usize>,
    instances: Vec<Instances>,
}

impl Refer {
    fn read(&mut self, run: &mut Run<'_>, path: &Path) -> Result<(), DataError> {
        let (references, report) = read_references_lenient(path)?;
        let instances = folder(path).join("instances.json");
        let mut of_instances = Report::default();
        self.instances.push(read_instances(&instances, &mut of_instances)?);
        for (reason, skipped) in report.iter().chain(of_instances.iter()) {
            let found = skipped.examples.first().cloned().unwrap_or_default();
            if run.reading.strict {
                return Err(Context { path, place: Place::Whole }.error("file", format!("no {reason}"), found));
            }
        }
        run.report.merge(&report);
        run.report.merge(&of_instances);
        let file = self.instances.len() - 1;
        for (number, reference) in references.into_iter().enumerate() {
            if self.by_id.contains_key(&reference.ref_id) {
                let context = Context { path, place: Place::Item(number) };
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
    fn look_up(&self, place: usize) -> Result<([f32; 4], &super::refer::Image), DataError> {
        let (reference, file, path) = &self.references[place];
        let context = Context { path, place: Place::Item(place) };
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

    fn items(&self, run: &mut Run<'_>) -> Result<Vec<GroundingItem>, DataError> {
        let mut found = Vec::new();
        for (place, (reference, _, path)) in self.references.iter().enumerate() {
            let context = Context { path, place: Place::Item(place) };
            let Reference { ref_id, image_id, split, sentences, .. } = reference;
            if run.other_split(Some(split), || format!("{}: reference {ref_id}", path.display())) {
                continue;
            }
            let (bbox, image) = match self
                .look_up(place)
                .and_then(|(bbox, image)| Ok((whole(context, bbox, image.width, image.height)?, image)))
            {
                Ok(looked_up) => looked_up,
                Err(error) => {
                    run.refuse(Reason::Malformed, error)?;
                    continue;
                }
            };
            let file = run.root(path).join(&image.file);
            for text in sentences {
                if run.accept(context, None, &[&file])? {
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
fn whole(context: Context<'_>, bbox: [f32; 4], width: u32, height: u32) -> Result<[f32; 4], DataError> {
    match clip_box(bbox, width, height) {
        Some(_) => Ok(bbox),
        None => {
            let expected = format!("a box [x, y, w, h] inside the {width}x{height} image");
            Err(context.error("bbox", expected, format!("{bbox:?}")))
        }
    }
}

fn grounding_item(
    run: &mut Run<'_>,
    object: &Object<'_>,
    path: &Path,
    refer: &Refer,
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
            split = split.or_else(|| Some(reference.split.clone()));
            (bbox, image.width, image.height, reference.image_id.clone())
        }
        _ => {
            let image_id = match object.get("image_id") {
                Some(_) => object.id("image_id")?,
                None => file.rsplit('/').next().unwrap_or_default().to_owned(),
            };
            (object.bbox("bbox")?, object.pixels("width")?, object.pixels("height")?, image_id)
        }
    };
    let bbox = whole(object.context, bbox, width, height)?;
    let proposal = |(i, value): (usize, &Value)| {
        let name = object.name(&format!("dets[{i}]"));
        let four = value.as_array().filter(|numbers| numbers.len() >= 4).map(|numbers| Value::from(&numbers[..4]));
        let wrapped = serde_json::json!({ "box": four });
        let inner = object.context.object(&wrapped, &name)?;
        numbers(&inner, "box")
    };
    let proposals = object.list("dets")?.iter().enumerate().map(proposal).collect::<Result<_, _>>()?;
    let image = run.root(path).join(&file);
    let place = object.context.place;
    let skip = run.other_split(split.as_deref(), || format!("{}{place}", path.display()));
    if skip || !run.accept(object.context, None, &[&image])? {
        return Ok(None);
    }
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
