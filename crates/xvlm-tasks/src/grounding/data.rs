//! What grounding is evaluated on, and the file of results.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};
use xvlm_data::Place;
use xvlm_data::annotations::{GroundingItem, Loaded, Reading, Reason, Report, read_proposals};

use crate::error::{SweepProblem, TaskError, wrong_data};
use crate::finetune::{BboxTask, WeakGroundingTask};
use crate::json_id;
use crate::some;

/// The files of references of RefCOCO, RefCOCO+ and RefCOCOg, by the splits they are of.
const REFERENCES: [&str; 3] = ["refs(unc).p", "refs(umd).p", "refs(google).p"];
/// The folder that the original's configurations mean.
const REFCOCO_PLUS: &str = "refcoco+";
/// The split that nothing is evaluated on.
const TRAIN: &str = "train";

/// Phrases and their boxes.
#[derive(Clone, Debug)]
pub struct TestSet {
    /// The phrases.
    pub items: Vec<GroundingItem>,
    /// What was left out while reading.
    pub report: Report,
}

impl TestSet {
    /// `grounding.json` of a folder.
    ///
    /// # Errors
    /// If the file cannot be read, has a broken item, or has none.
    pub fn of_folder(data: &Path) -> Result<Self, TaskError> {
        let (file, strict) = ("grounding.json", Reading::strict());
        let loaded = strict.grounding(&[data.join(file)])?;
        Ok(Self { items: some(loaded.items, data, file)?, report: loaded.report })
    }

    /// The test files of a configuration: lists, which get their boxes from RefCOCO's published files unless they have them, or
    /// published files themselves. Items of the training split are left out, and so are broken ones, up to a share of all.
    ///
    /// # Errors
    /// If a file cannot be read, no item is left, or more than `max_bad_fraction` of them are broken.
    pub fn of_boxes(task: &BboxTask, max_bad_fraction: f64) -> Result<Self, TaskError> {
        let references = task.refcoco_data.as_deref().filter(|_| !task.vlue_test);
        Self::read(&task.test_file, &task.image_root, references, max_bad_fraction)
    }

    /// As [`Self::of_boxes`], with the boxes of a detector: those of `det_file` by image, or those that the items have.
    ///
    /// # Errors
    /// As [`Self::of_boxes`].
    pub fn of_weak(task: &WeakGroundingTask, max_bad_fraction: f64) -> Result<Self, TaskError> {
        let references = task.refcoco_data.as_deref().filter(|_| !task.vlue_test);
        let mut set = Self::read(&task.test_file, &task.image_root, references, max_bad_fraction)?;
        if let Some(file) = task.det_file.as_deref().filter(|_| !task.vlue_test) {
            set.propose(file)?;
        }
        Ok(set)
    }

    /// Gives each item the boxes that a file has for its image, in place of its own; see [`read_proposals`].
    ///
    /// # Errors
    /// If the file cannot be read, or has boxes for none of the images.
    pub fn propose(&mut self, file: &Path) -> Result<(), TaskError> {
        let proposals = read_proposals(file)?;
        for item in &mut self.items {
            item.proposals = proposals.get(&item.image_id).cloned().unwrap_or_default();
        }
        if self.items.iter().all(|item| item.proposals.is_empty()) {
            let (expected, found) = ("boxes for the images that are asked about", "none for any of them");
            return Err(wrong_data(file, Place::Whole, "image_id", expected, found));
        }
        Ok(())
    }

    fn read(
        files: &[PathBuf],
        images: &Path,
        references: Option<&Path>,
        max_bad_fraction: f64,
    ) -> Result<Self, TaskError> {
        let files = with_references(files, references)?;
        let strict = max_bad_fraction <= 0.0;
        let reading = Reading { images: Some(images.to_owned()), strict, ..Reading::default() };
        let loaded = reading.grounding(&files)?;
        let (mut items, mut report) = (loaded.items, loaded.report);
        let left_out = report.iter().map(|(_, skipped)| skipped.count).sum::<u64>() as usize;
        let units = left_out + items.len();
        if left_out as f64 > max_bad_fraction * units as f64 {
            let first = report.iter().find_map(|(_, skipped)| skipped.examples.first().cloned()).unwrap_or_default();
            return Err(SweepProblem::TooManyBroken { left_out, units, limit: max_bad_fraction, first }.into());
        }
        items.retain(|item| {
            let tested = item.split.as_deref() != Some(TRAIN);
            if !tested {
                report.skip(Reason::OtherSplit, || format!("reference {} of the split {TRAIN}", item.ref_id));
            }
            tested
        });
        if items.is_empty() {
            let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
            return Err(TaskError::Empty { what: names.join(", ") });
        }
        Ok(Self { items, report })
    }
}

/// The phrases that boxes are trained on: of lists all; of published files those of the training split.
///
/// # Errors
/// If a file cannot be read.
pub(crate) fn training_phrases(task: &BboxTask) -> Result<Loaded<GroundingItem>, TaskError> {
    let files = with_references(&task.train_file, task.refcoco_data.as_deref().filter(|_| !task.vlue_test))?;
    let splits = match files.iter().all(|file| is_published(file)) {
        true => vec![TRAIN.to_owned()],
        false => Vec::new(),
    };
    Ok(Reading { images: Some(task.image_root.clone()), splits, ..Reading::default() }.grounding(&files)?)
}

/// Lists of phrases together with the published file that has their boxes.
fn with_references(files: &[PathBuf], references: Option<&Path>) -> Result<Vec<PathBuf>, TaskError> {
    let mut files = files.to_vec();
    if let Some(references) = references.filter(|_| !files.iter().all(|file| is_published(file))) {
        files.push(find_references(references)?);
    }
    Ok(files)
}

fn is_published(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "p")
}

/// The published file that `refcoco_data` means: the file itself, or one in that folder or in `refcoco+` below it.
fn find_references(data: &Path) -> Result<PathBuf, TaskError> {
    if data.is_file() {
        return Ok(data.to_owned());
    }
    let folders = [data.to_owned(), data.join(REFCOCO_PLUS)];
    let places = folders.iter().flat_map(|folder| REFERENCES.iter().map(|name| folder.join(name)));
    places.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        let expected = format!("one of {}, here or in {REFCOCO_PLUS} below", REFERENCES.join(", "));
        wrong_data(data, Place::Whole, "task.refcoco_data", expected, "none")
    })
}

/// Writes what was found for each item, the form of a data set's phrases: a list of `{"ref_id", "bbox", "point"}`, an entry a phrase,
/// with a box `(x, y, w, h)` and a point `(x, y)`, if there is one, in pixels.
///
/// # Errors
/// If the file cannot be written.
pub fn write_results(
    items: &[GroundingItem],
    found: impl IntoIterator<Item = ([f32; 4], Option<[f32; 2]>)>,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    #[derive(Serialize)]
    struct Entry {
        ref_id: Value,
        bbox: [f32; 4],
        #[serde(skip_serializing_if = "Option::is_none")]
        point: Option<[f32; 2]>,
    }
    write!(out, "[")?;
    for (i, (item, (bbox, point))) in items.iter().zip(found).enumerate() {
        let entry = json!(Entry { ref_id: json_id(&item.ref_id), bbox, point });
        write!(out, "{}{entry}", if i == 0 { "\n" } else { ",\n" })?;
    }
    writeln!(out, "\n]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FinetuneConfig;
    use crate::finetune::FinetuneTask;

    #[test]
    fn training_has_the_boxes_of_the_published_file_and_its_training_split() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &[u8]| std::fs::write(dir.path().join(name), content).unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../xvlm-data/tests/golden/refs_python2_2.p");
        write("refs(umd).p", &std::fs::read(golden).unwrap());
        let image = |id: u32| json!({"id": id, "file_name": format!("{id}.jpg"), "height": 80, "width": 100});
        let annotation = |id: u32, image: u32| json!({"id": id, "image_id": image, "bbox": [1, 2, 3, 4]});
        let instances =
            json!({"images": [image(42), image(43)], "annotations": [annotation(7, 42), annotation(8, 43)]});
        write("instances.json", instances.to_string().as_bytes());
        write("train.json", json!([{"image": "42.jpg", "text": "a cup", "ref_id": 11}]).to_string().as_bytes());
        let texts = |train_file: &str| {
            let path = dir.path().display();
            let overrides = [format!("task.train_file={path}/{train_file}"), format!("task.refcoco_data={path}")];
            let FinetuneTask::Bbox(task) = FinetuneConfig::preset("refcoco-bbox", &overrides).unwrap().task else {
                panic!("another task");
            };
            let items = training_phrases(&task).unwrap().items;
            items.into_iter().map(|item| (item.text, item.bbox)).collect::<Vec<_>>()
        };
        let bbox = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(texts("train.json"), [("a cup".to_owned(), bbox)]);
        let published = [("the red cup".to_owned(), bbox), ("left cup".to_owned(), bbox)];
        assert_eq!(texts("refs(umd).p"), published);
    }
}
