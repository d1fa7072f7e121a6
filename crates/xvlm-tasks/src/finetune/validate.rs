//! How good a model is on its way, by which the best checkpoint is chosen.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use xvlm_data::TextTokenizer;
use xvlm_data::annotations::{CaptionItem, GroundingItem, NlvrItem, Reading, RetrievalItem, read_references};
use xvlm_train::ranks::Communicator;

use super::FinetuneTask;
use crate::captioning::{self, Writing};
use crate::error::TaskError;
use crate::grounding::{self, BoxOptions, Layers, TestSet, WeakOptions};
use crate::model::{Model, ModelConfig};
use crate::search::Search;
use crate::sweep::Sweep;
use crate::{nlvr, retrieval};

/// The split of RefCOCO that training looks at; the others are for the end.
const VALIDATION: &str = "val";

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
}

impl Validation {
    /// Opens the files that a task is validated on; none if it has none, or is trained without.
    ///
    /// # Errors
    /// If a file cannot be read, or an item is broken.
    pub(super) fn open(
        task: &FinetuneTask,
        config: ModelConfig,
        tokenizer: &Arc<TextTokenizer>,
        ranks: &Arc<dyn Communicator>,
        first: u64,
    ) -> Result<Option<Self>, TaskError> {
        let items = Items::open(task)?;
        let (tokenizer, ranks) = (Arc::clone(tokenizer), Arc::clone(ranks));
        Ok(items.map(|items| Self { items, config, tokenizer, ranks, first }))
    }

    /// Mean recall, accuracy, pointing accuracy or CIDEr: higher is better.
    ///
    /// # Errors
    /// If an image is broken, or the model cannot be evaluated.
    pub(super) fn score(&self, model: &Model) -> Result<f64, TaskError> {
        let mut counter = |_, _| {};
        let sweep = &mut Sweep { ranks: Arc::clone(&self.ranks), ..Sweep::new(&mut counter) };
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
    fn open(task: &FinetuneTask) -> Result<Option<Self>, TaskError> {
        let reading = |images: &Path| Reading { images: Some(images.to_owned()), ..Reading::strict() };
        Ok(match task {
            FinetuneTask::Retrieval(task) if !task.val_file.is_empty() => {
                let options = retrieval::Options {
                    batch_size: task.batch_size_test,
                    batch_size_text: task.batch_size_test_text,
                    ..retrieval::Options::new(task.k_test)
                };
                Some(Self::Retrieval(reading(&task.image_root).retrieval(&task.val_file)?.items, options))
            }
            FinetuneTask::Nlvr(task) if !task.val_file.is_empty() => {
                let options = nlvr::Options { batch: task.batch_size_test };
                Some(Self::Nlvr(reading(&task.image_root).nlvr(&task.val_file)?.items, options))
            }
            FinetuneTask::Bbox(task) if task.refcoco_data.is_some() => {
                let options = BoxOptions { batch: task.batch_size_test, ..BoxOptions::default() };
                validation_split(TestSet::of_boxes(task, 0.0)?).map(|items| Self::Boxes(items, options))
            }
            FinetuneTask::WeakGrounding(task) if task.refcoco_data.is_some() => {
                let (layers, batch) = (Layers::One(task.block_num), task.batch_size_test);
                let options = WeakOptions { layers, batch, ..WeakOptions::default() };
                validation_split(TestSet::of_weak(task, 0.0)?).map(|items| Self::Heat(items, options))
            }
            FinetuneTask::Captioning(task) if !task.val_file.is_empty() => Some(Self::captions(
                (&task.image_root, &task.val_file, &task.val_gt_file),
                (&task.prompt, task.search),
                task.batch_size_test,
            )?),
            FinetuneTask::CaptioningScst(task) if !task.val_file.is_empty() => Some(Self::captions(
                (&task.image_root, &task.val_file, &task.val_gt_file),
                (&task.prompt, task.search),
                task.batch_size_test,
            )?),
            _ => None,
        })
    }

    fn captions(
        (images, files, references): (&Path, &[PathBuf], &Path),
        (prompt, search): (&str, Search),
        batch: usize,
    ) -> Result<Self, TaskError> {
        let reading = Reading { images: Some(images.to_owned()), ..Reading::strict() };
        let items = reading.captions(files)?.items;
        let file = references.display().to_string();
        let items = captioning::with_references(items, read_references(references)?, &file)?;
        Ok(Self::Captions(items, Writing { prompt: prompt.to_owned(), search }, batch))
    }
}

fn validation_split(set: TestSet) -> Option<Vec<GroundingItem>> {
    let is_own = |item: &GroundingItem| item.split.as_deref() == Some(VALIDATION);
    let items: Vec<GroundingItem> = set.items.into_iter().filter(is_own).collect();
    (!items.is_empty()).then_some(items)
}
