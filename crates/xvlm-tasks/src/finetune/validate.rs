//! How good a model is on its way, by which the best checkpoint is chosen.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use xvlm_data::TextTokenizer;
use xvlm_data::annotations::{CaptionItem, GroundingItem, Loaded, NlvrItem, Reading, RetrievalItem, read_references};
use xvlm_train::Progress;
use xvlm_train::ranks::Communicator;

use super::batches::{tell, told};
use super::{CaptioningTask, Data, FinetuneTask, ScstTask};
use crate::captioning::{self, Writing};
use crate::error::{SweepProblem, TaskError};
use crate::grounding::{self, BoxOptions, Layers, TestSet, WeakOptions};
use crate::model::{Model, ModelConfig};
use crate::session::Session;
use crate::sweep::Sweep;
use crate::{nlvr, retrieval};

/// The split of RefCOCO that training looks at; the others are for the end.
const VALIDATION: &str = "val";

/// The field of the configuration that names what is validated on.
const FIELD: &str = "task.val_file";

/// What a task is validated on.
enum Items {
    Retrieval(Vec<RetrievalItem>, retrieval::Options),
    Nlvr(Vec<NlvrItem>, nlvr::Options),
    Boxes(Vec<GroundingItem>, BoxOptions),
    Heat(Vec<GroundingItem>, WeakOptions),
    Captions(Vec<CaptionItem>, Writing, usize),
}

/// Validation during training.
pub(super) struct Validation {
    items: Items,
    /// What `config.json` of the model says.
    pub(super) config: ModelConfig,
    pub(super) tokenizer: Arc<TextTokenizer>,
    pub(super) ranks: Arc<dyn Communicator>,
    /// The first iteration after which the model is validated.
    pub(super) first: u64,
    /// Share of items that may be left out.
    max_bad_fraction: f64,
    /// Becomes true when validation is to end without a score.
    stop: Arc<AtomicBool>,
}

impl Validation {
    /// Opens the files that a task is validated on; none if it has none, or is trained without. What is left out is told.
    ///
    /// # Errors
    /// If a file cannot be read, or more than `data.max_bad_fraction` of its items are broken.
    pub(super) fn open(
        task: &FinetuneTask,
        config: ModelConfig,
        tokenizer: &Arc<TextTokenizer>,
        session: &Session,
        first: u64,
        progress: &mut dyn Progress,
    ) -> Result<Option<Self>, TaskError> {
        let max_bad_fraction = match task.data() {
            Data::Items(data) => data.max_bad_fraction,
            Data::Records(data) => data.max_bad_fraction,
        };
        let items = Items::open(task, max_bad_fraction, progress)?;
        let (tokenizer, ranks, stop) = (Arc::clone(tokenizer), Arc::clone(&session.ranks), Arc::clone(&session.stop));
        Ok(items.map(|items| Self { items, config, tokenizer, ranks, first, max_bad_fraction, stop }))
    }

    /// Mean recall, accuracy, pointing accuracy or CIDEr: higher is better. None if training is asked to stop meanwhile.
    ///
    /// # Errors
    /// If too many images are broken, or the model cannot be evaluated.
    pub(super) fn score(&self, model: &Model) -> Result<Option<f64>, TaskError> {
        match self.evaluate(model) {
            Ok(score) => Ok(Some(score)),
            Err(TaskError::Sweep(SweepProblem::Stopped { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn evaluate(&self, model: &Model) -> Result<f64, TaskError> {
        let mut counter = |_, _| {};
        let sweep = &mut Sweep {
            ranks: Arc::clone(&self.ranks),
            stop: Arc::clone(&self.stop),
            max_bad_fraction: self.max_bad_fraction,
            ..Sweep::new(&mut counter)
        };
        Ok(match &self.items {
            Items::Retrieval(items, options) => retrieval::evaluate(model, items, *options, sweep)?.scores.r_mean,
            Items::Nlvr(items, options) => nlvr::evaluate(model, items.clone(), options, sweep)?.scores.accuracy,
            Items::Boxes(items, options) => {
                grounding::evaluate(model, items.clone(), options, sweep)?.scores.all.accuracy
            }
            Items::Heat(items, options) => {
                let scores = grounding::evaluate_weakly(model, items.clone(), options, sweep)?.scores;
                if scores.proposals { scores.boxes.all.accuracy } else { scores.pointing }
            }
            Items::Captions(items, writing, batch) => {
                let evaluation = captioning::evaluate(model, items.clone(), writing, *batch, sweep)?;
                evaluation.scores.map_or(0.0, |scores| scores.cider)
            }
        })
    }
}

impl Items {
    fn open(task: &FinetuneTask, limit: f64, progress: &mut dyn Progress) -> Result<Option<Self>, TaskError> {
        let strict = limit <= 0.0;
        let reading = |images: &Path| Reading { images: Some(images.to_owned()), strict, ..Reading::default() };
        Ok(match task {
            FinetuneTask::Retrieval(task) if !task.val_file.is_empty() => {
                let options = retrieval::Options {
                    batch_size: task.batch_size_test,
                    batch_size_text: task.batch_size_test_text,
                    ..retrieval::Options::new(task.k_test)
                };
                let loaded = reading(&task.image_root).retrieval(&task.val_file)?;
                Some(Self::Retrieval(told((FIELD, &task.val_file), loaded, limit, progress)?, options))
            }
            FinetuneTask::Nlvr(task) if !task.val_file.is_empty() => {
                let options = nlvr::Options { batch: task.batch_size_test };
                let loaded = reading(&task.image_root).nlvr(&task.val_file)?;
                Some(Self::Nlvr(told((FIELD, &task.val_file), loaded, limit, progress)?, options))
            }
            FinetuneTask::Bbox(task) if task.refcoco_data.is_some() => {
                let options = BoxOptions { batch: task.batch_size_test, ..BoxOptions::default() };
                validation_split(TestSet::of_boxes(task, limit)?, progress).map(|items| Self::Boxes(items, options))
            }
            FinetuneTask::WeakGrounding(task) if task.refcoco_data.is_some() => {
                let (layers, batch) = (Layers::One(task.block_num), task.batch_size_test);
                let options = WeakOptions { layers, batch, ..WeakOptions::default() };
                validation_split(TestSet::of_weak(task, limit)?, progress).map(|items| Self::Heat(items, options))
            }
            FinetuneTask::Captioning(CaptioningTask {
                image_root,
                val_file,
                val_gt_file,
                prompt,
                search,
                batch_size_test,
                ..
            })
            | FinetuneTask::CaptioningScst(ScstTask {
                image_root,
                val_file,
                val_gt_file,
                prompt,
                search,
                batch_size_test,
                ..
            }) if !val_file.is_empty() => {
                let loaded = reading(image_root).captions(val_file)?;
                let writing = Writing { prompt: prompt.clone(), search: *search };
                let items = described((val_file, loaded), val_gt_file, limit, progress)?;
                Some(Self::Captions(items, writing, *batch_size_test))
            }
            _ => None,
        })
    }
}

/// Images with the references of a file.
fn described(
    (files, loaded): (&[PathBuf], Loaded<CaptionItem>),
    references: &Path,
    limit: f64,
    progress: &mut dyn Progress,
) -> Result<Vec<CaptionItem>, TaskError> {
    let is_whole = loaded.report.iter().next().is_none();
    let items = told((FIELD, files), loaded, limit, progress)?;
    let mut known = read_references(references)?;
    if !is_whole {
        // Those of images that are left out.
        let ids: HashSet<&str> = items.iter().map(|item| item.id.as_str()).collect();
        known.retain(|id, _| ids.contains(id.as_str()));
    }
    captioning::with_references(items, known, &references.display().to_string())
}

fn validation_split(set: TestSet, progress: &mut dyn Progress) -> Option<Vec<GroundingItem>> {
    tell(&set.report, progress);
    let is_own = |item: &GroundingItem| item.split.as_deref() == Some(VALIDATION);
    let items: Vec<GroundingItem> = set.items.into_iter().filter(is_own).collect();
    (!items.is_empty()).then_some(items)
}
