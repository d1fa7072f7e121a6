//! What the readers of pre-training sets have in common: images with their texts and boxes, what is left out of them, and
//! what of a box and a text is kept.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::annotations::report::{Reason, Report};
use crate::error::{DataError, Place, excerpt};
use crate::json::Object;
use crate::records::paths::{file_inside, inside};
use crate::records::{Element, ImageSource, Origin, Record};
use crate::tokens::pre_caption;

/// An image with what its data set tells about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Annotated {
    /// The image's identifier in its data set.
    pub id: String,
    /// Width and height in pixels that the boxes refer to, where the data set tells them.
    pub size: Option<(u32, u32)>,
    /// Whether boxes are fractions of the image's width and height instead of pixels, as Open Images gives them.
    pub fractions: bool,
    /// The image file and the texts; boxes lie inside the image, whose size is not known where `size` is `None`.
    pub record: Record,
}

/// An image as a reader finds it: nothing is checked yet.
pub(crate) struct Raw {
    pub(crate) id: String,
    /// What the image is called elsewhere, such as `coco:42`, for [`Exclusions`].
    pub(crate) aliases: Vec<String>,
    pub(crate) image: PathBuf,
    pub(crate) size: Option<(u32, u32)>,
    /// Whether boxes are fractions of the image instead of pixels.
    pub(crate) fractions: bool,
    pub(crate) captions: Vec<String>,
    pub(crate) elems: Vec<Element>,
    pub(crate) questions: Vec<(String, String)>,
    pub(crate) origin: Origin,
}

/// A reader of one data set.
pub(crate) trait Reader: Send {
    /// The next image; `None` at the end. What is left out on the way is counted.
    fn next(&mut self, report: &mut Report) -> Result<Option<Raw>, DataError>;

    /// About how many images there are, where that is known.
    fn images(&self) -> Option<u64>;
}

/// The images of a data set one after another, in the order of its files, and what was left out so far.
pub struct Records {
    reader: Box<dyn Reader>,
    exclude: Exclusions,
    report: Report,
    failed: bool,
}

impl Records {
    pub(crate) fn new(reader: impl Reader + 'static) -> Self {
        Self { reader: Box::new(reader), exclude: Exclusions::default(), report: Report::default(), failed: false }
    }

    /// Counts what was left out while opening.
    pub(crate) fn with_report(mut self, report: Report) -> Self {
        self.report.merge(&report);
        self
    }

    /// Leaves out these images.
    #[must_use]
    pub fn without(mut self, exclude: Exclusions) -> Self {
        self.exclude = exclude;
        self
    }

    /// What was left out so far.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// About how many images there are, where the files tell it.
    #[must_use]
    pub fn images(&self) -> Option<u64> {
        self.reader.images()
    }

    fn step(&mut self) -> Result<Option<Annotated>, DataError> {
        while let Some(raw) = self.reader.next(&mut self.report)? {
            if self.exclude.covers(&raw) {
                self.report.skip(Reason::Excluded, || format!("{}: image {}", raw.origin, raw.id));
                continue;
            }
            if let Some(annotated) = clean(raw, &mut self.report) {
                return Ok(Some(annotated));
            }
        }
        Ok(None)
    }
}

impl Iterator for Records {
    type Item = Result<Annotated, DataError>;

    /// The next image; an error (a file that cannot be read, a document that is no JSON) ends the stream.
    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self.step().transpose();
        self.failed = next.as_ref().is_none_or(Result::is_err);
        next
    }
}

/// Keeps the texts that have words and the boxes that show something; `None` if nothing is left.
fn clean(raw: Raw, report: &mut Report) -> Option<Annotated> {
    let Raw { id, image, size, fractions, captions, elems, questions, origin, .. } = raw;
    let worded = |text: &str, report: &mut Report| {
        let kept = one_line(text);
        if kept.chars().any(char::is_alphanumeric) && pre_caption(&kept, usize::MAX).is_ok() {
            return Some(kept);
        }
        report.skip(Reason::EmptyText, || format!("{origin}: image {id}: {text:?}"));
        None
    };
    let captions = captions.iter().filter_map(|text| worded(text, report)).collect();
    let questions = questions
        .iter()
        .filter_map(|(question, answer)| Some((worded(question, report)?, worded(answer, report)?)))
        .collect();
    let mut kept: Vec<Element> = Vec::with_capacity(elems.len());
    let mut at: HashMap<[u32; 4], Vec<usize>> = HashMap::new();
    for Element { bbox, texts, attributes, labels } in elems {
        let clipped = match size {
            // How many pixels are left is seen when the image is.
            _ if fractions => clip_sides(bbox, 1, 1, f64::from(f32::EPSILON)),
            Some((width, height)) => clip(bbox, width, height),
            None => clip(bbox, u32::MAX, u32::MAX),
        };
        let Some(clipped) = clipped else {
            report.skip(Reason::DegenerateBox, || {
                let size = size.map_or(String::new(), |(width, height)| format!(" in {width}x{height} pixels"));
                format!("{origin}: image {id}: box {bbox:?}{size}")
            });
            continue;
        };
        let texts: Vec<String> = texts.iter().filter_map(|text| worded(text, report)).collect();
        if texts.is_empty() {
            continue;
        }
        let word = |word: &String| Some(one_line(word)).filter(|word| !word.is_empty());
        let attributes = attributes.iter().filter_map(word).collect();
        let labels = labels.iter().filter_map(word).collect();
        let element = Element { bbox: clipped, texts, attributes, labels };
        let there = at.entry(element.bbox.map(f32::to_bits)).or_default();
        match there.iter().find(|&&i| same_texts(&kept[i].texts, &element.texts)) {
            Some(&i) => {
                let other = &mut kept[i];
                for word in element.attributes {
                    if !other.attributes.contains(&word) {
                        other.attributes.push(word);
                    }
                }
                report
                    .skip(Reason::DuplicateElement, || format!("{origin}: image {id}: {bbox:?} {:?}", other.texts[0]));
            }
            None => {
                there.push(kept.len());
                kept.push(element);
            }
        }
    }
    let record = Record { image: ImageSource::Path(image), captions, elems: kept, questions, origin };
    if record.captions.is_empty() && record.elems.is_empty() && record.questions.is_empty() {
        report.skip(Reason::NoText, || format!("{}: image {id}", record.origin));
        return None;
    }
    Some(Annotated { id, size, fractions, record })
}

fn same_texts(a: &[String], b: &[String]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.eq_ignore_ascii_case(b))
}

/// White space, line ends among it, becomes single spaces.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The part of a box `(x, y, w, h)` that is inside an image; `None` unless at least a pixel each way is left (the original
/// cuts coordinates to whole pixels, and refuses boxes that then are empty).
pub(crate) fn clip(bbox: [f32; 4], width: u32, height: u32) -> Option<[f32; 4]> {
    clip_sides(bbox, width, height, 1.0)
}

/// [`clip`], where at least `smallest` has to be left of each side.
fn clip_sides(bbox: [f32; 4], width: u32, height: u32, smallest: f64) -> Option<[f32; 4]> {
    let [x, y, w, h] = bbox.map(f64::from);
    let along = |lo: f64, size: f64, side: u32| {
        let (from, to) = (lo.max(0.0), (lo + size).min(f64::from(side)));
        // What is no number compares as false.
        (to - from >= smallest).then_some((from as f32, (to - from) as f32))
    };
    if !bbox.iter().all(|number| number.is_finite()) {
        return None;
    }
    let ((x, w), (y, h)) = (along(x, w, width)?, along(y, h, height)?);
    Some([x, y, w, h])
}

/// Images to leave out, such as those that down-stream tasks are tested on.
///
/// An image is known by its identifier, the name of its file (with or without extension), and where its data set tells them
/// by the COCO and Flickr photographs that it is, as `coco:42` and `flickr:36979`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exclusions {
    names: HashSet<Box<str>>,
}

impl Exclusions {
    /// Number of names.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Leaves out the image of this name too.
    pub fn add(&mut self, name: impl Into<Box<str>>) {
        self.names.insert(name.into());
    }

    /// Adds a file: a text file of names, one a line (`#` begins a comment); or, by its content, Karpathy's `dataset_*.json`,
    /// a JSON list of items with an `image` as X-VLM's, or a `refs(*).p` of RefCOCO: of these the images of the splits
    /// `val*` and `test*`, or all where the file tells no splits.
    ///
    /// # Errors
    /// [`DataError`] naming file, item and field.
    pub fn read(&mut self, path: &Path) -> Result<(), DataError> {
        super::exclusions::read(path, &mut |name| self.add(name))
    }

    fn covers(&self, raw: &Raw) -> bool {
        if self.names.is_empty() {
            return false;
        }
        let has = |name: &str| self.names.contains(name);
        let file = |part: Option<&std::ffi::OsStr>| part.and_then(|part| part.to_str()).is_some_and(has);
        has(&raw.id)
            || raw.aliases.iter().any(|alias| has(alias))
            || file(raw.image.file_name())
            || file(raw.image.file_stem())
    }
}

/// Where an image is told of.
pub(crate) fn origin(file: &Arc<Path>, place: Place) -> Origin {
    Origin { file: Arc::clone(file), place }
}

/// Counts what is wrong with an item; what is wrong with its file ends the reading.
pub(crate) fn skip_item(error: DataError, report: &mut Report) -> Result<(), DataError> {
    match error {
        DataError::Field { .. } | DataError::Json { .. } => {
            report.skip(Reason::Malformed, || error);
            Ok(())
        }
        error => Err(error),
    }
}

/// Folders in which the images of a set may lie, as they are published and as people lay them out.
#[derive(Debug, Default)]
pub(crate) struct Folders {
    found: HashMap<String, PathBuf>,
}

impl Folders {
    /// The first of `names` (`""` for the root itself) that is a folder inside `root`; the first of all if none is.
    pub(crate) fn pick(&mut self, root: &Path, names: &[&str]) -> PathBuf {
        let key = names.join("\n");
        let folder = |name: &&str| if name.is_empty() { Some(root.to_owned()) } else { inside(root, name) };
        let pick = || {
            let there = names.iter().filter_map(folder).find(|path| path.is_dir());
            there.or_else(|| names.first().and_then(folder)).unwrap_or_else(|| root.to_owned())
        };
        self.found.entry(key).or_insert_with(pick).clone()
    }
}

/// A file that an annotation names, inside a folder; or, for a message, the name that leads out of it.
pub(crate) fn image_file(folder: &Path, name: &str) -> Result<PathBuf, String> {
    file_inside(folder, name).ok_or_else(|| format!("{:?}", excerpt(name)))
}

/// Counts an image whose name leads out of its folder.
pub(crate) fn skip_outside(origin: &Origin, found: &str, report: &mut Report) {
    report.skip(Reason::Malformed, || format!("{origin}: image: expected a path inside its folder, found {found}"));
}

/// The subset of COCO, such as `train2014`, that a file is of by its name; empty if that does not tell.
pub(crate) fn coco_subset(file_name: &str) -> &str {
    file_name.strip_prefix("COCO_").and_then(|rest| rest.split('_').next()).unwrap_or_default()
}

/// The subset of COCO that an image is of by its `coco_url`, as those of 2017 are.
pub(crate) fn coco_url_subset<'a>(object: &Object<'a>) -> Option<&'a str> {
    object.get("coco_url").and_then(Value::as_str).and_then(|url| url.rsplit('/').nth(1))
}

/// The COCO image of a file such as `COCO_val2014_000000000042.jpg` or (2017) `000000000042.jpg`.
pub(crate) fn coco_id(file_name: &str) -> Option<u64> {
    let stem = file_name.rsplit('/').next()?.rsplit_once('.').map_or(file_name, |(stem, _)| stem);
    let stem = stem.rsplit('/').next()?;
    let digits = match stem.strip_prefix("COCO_") {
        Some(rest) => rest.rsplit('_').next()?,
        None => stem,
    };
    (digits.len() == 12 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_clipped_to_the_image() {
        assert_eq!(clip([-5.0, 10.0, 20.0, 200.0], 100, 50), Some([0.0, 10.0, 15.0, 40.0]));
        assert_eq!(clip([99.5, 0.0, 10.0, 10.0], 100, 50), None);
        assert_eq!(clip([10.0, 10.0, 0.5, 10.0], 100, 50), None);
        assert_eq!(clip([10.0, 10.0, -4.0, 10.0], 100, 50), None);
        assert_eq!(clip([f32::NAN, 0.0, 10.0, 10.0], 100, 50), None);
        assert_eq!(clip([0.0, 0.0, f32::INFINITY, 10.0], 100, 50), None);
        assert_eq!(clip([120.0, 0.0, 10.0, 10.0], 100, 50), None);
    }

    #[test]
    fn names_lead_nowhere_else() {
        let folder = Path::new("images");
        assert_eq!(image_file(folder, "a/b.jpg"), Ok(PathBuf::from("images/a/b.jpg")));
        for name in ["../b.jpg", "/etc/passwd", "a/../../b.jpg", "", ".", ".."] {
            assert!(image_file(folder, name).is_err(), "{name}");
        }
    }

    #[test]
    fn coco_ids_are_in_file_names() {
        assert_eq!(coco_id("val2014/COCO_val2014_000000000042.jpg"), Some(42));
        assert_eq!(coco_id("COCO_train2014_000000581857.jpg"), Some(581_857));
        assert_eq!(coco_id("000000000042.jpg"), Some(42));
        assert_eq!(coco_id("36979.jpg"), None);
        assert_eq!(coco_id("COCO_x.jpg"), None);
    }
}
