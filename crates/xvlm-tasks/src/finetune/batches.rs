//! The batches of each task, from its files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use xvlm_data::annotations::{CaptionItem, Loaded, Reading, Reason, Report};
use xvlm_data::batch::{
    Asked, Described, Grounding, ImageText, ItemKind, Nlvr, Pairs, Phrase, References, Statement, Vqa,
};
use xvlm_data::{
    BatchBuilder, BatchConfig, CaptionBatch, DataError, Dataset, DatasetConfig, ImageCache, ItemBatches, ItemConfig,
    Loader, LoaderConfig, Need, Place, SourceConfig, TextTokenizer,
};
use xvlm_metrics::captions::cider::CiderD;
use xvlm_train::{Batches, BoxError, Progress};

use super::learn::Batch;
use super::{FinetuneConfig, FinetuneTask, RetrievalTask, WeakGroundingTask};
use crate::captioning::Scst;
use crate::error::{TaskError, wrong_data};
use crate::grounding::training_phrases;
use crate::pretrain::open_dataset;

/// A batch of the host, which becomes one of tensors when its turn comes.
type Made = Box<dyn FnOnce() -> candle_core::Result<Batch> + Send>;

/// What was drawn.
#[derive(Clone, Debug, Default)]
pub(super) struct Drawn {
    /// How often an item was taken, and how often it was broken.
    pub(super) counts: (u64, u64),
    /// Broken ones.
    pub(super) broken: Vec<String>,
}

/// The data of a task.
pub(super) struct TaskData {
    build: Arc<dyn Fn(u64) -> Result<Made, DataError> + Send + Sync>,
    drawn: Box<dyn Fn() -> Drawn>,
    /// Items of an epoch.
    pub(super) epoch: u64,
    /// Items in a batch of one process.
    pub(super) batch_size: usize,
    /// What captions are rewarded by, where they are.
    pub(super) scst: Option<Scst<CiderD>>,
}

impl TaskData {
    /// Opens the training files of a task, for process `rank` of `ranks`; what is learnt of shards that are fetched is kept in
    /// the folder `run`, if there is one. What is broken is told, and refused if it is too much.
    ///
    /// # Errors
    /// If a file cannot be read, has nothing to train on, or too much of it is broken.
    pub(super) fn open(
        config: &FinetuneConfig,
        tokenizer: &Arc<TextTokenizer>,
        (rank, ranks): (usize, usize),
        run: Option<&Path>,
        progress: &mut dyn Progress,
    ) -> Result<Self, TaskError> {
        let vision = &config.model.vision_config;
        let cache = Arc::new(ImageCache::new(config.image_cache_mib << 20));
        let tokenizer = Arc::clone(tokenizer);
        let mut opening = Opening { tokenizer, cache, rank, ranks, resolution: vision.image_res(), run, progress };
        match &config.task {
            FinetuneTask::Retrieval(RetrievalTask { image_root, train_file, data, .. })
            | FinetuneTask::WeakGrounding(WeakGroundingTask { image_root, train_file, data, .. }) => {
                let items = opening.told(train_file, reading(image_root).retrieval(train_file)?, data)?;
                let items = items.iter().flat_map(ImageText::of_retrieval).collect();
                opening.items(Pairs::default(), items, data, of_pairs)
            }
            FinetuneTask::Vqa(task) => {
                let (images, vg_images) = (Some(task.vqa_root.clone()), Some(task.vg_root.clone()));
                let reading = Reading { images, vg_images, ..Reading::default() };
                let items = opening.told(&task.train_file, reading.vqa(&task.train_file)?, &task.data)?;
                let asked = Asked::by_image(&items, task.questions_per_image);
                opening.items(Vqa, asked, &task.data, |batch| Ok(Batch::Questions(batch.to_tensors(&Device::Cpu)?)))
            }
            FinetuneTask::Nlvr(task) => {
                let loaded = reading(&task.image_root).nlvr(&task.train_file)?;
                let items = opening.told(&task.train_file, loaded, &task.data)?;
                let statements = items.iter().map(Statement::from).collect();
                opening
                    .items(Nlvr, statements, &task.data, |batch| Ok(Batch::Statements(batch.to_tensors(&Device::Cpu)?)))
            }
            FinetuneTask::Bbox(task) => {
                let items = opening.told(&task.train_file, training_phrases(task)?, &task.data)?;
                let phrases = items.iter().map(Phrase::from).collect();
                opening
                    .items(Grounding, phrases, &task.data, |batch| Ok(Batch::Phrases(batch.to_tensors(&Device::Cpu)?)))
            }
            FinetuneTask::Captioning(task) => {
                let items = opening.captions(&task.image_root, &task.train_file, &task.data)?;
                let items = items.iter().flat_map(ImageText::of_captions).collect();
                opening.items(Pairs { prompt: Some(task.prompt.clone()) }, items, &task.data, of_pairs)
            }
            FinetuneTask::CaptioningScst(task) => {
                let items = opening.captions(&task.image_root, &task.train_file, &task.data)?;
                let images: Vec<Described> = CaptionItem::by_image(items).iter().map(Described::from).collect();
                let captions = images.iter().map(|image| image.captions.as_slice());
                let scst = Scst::open(task, captions, &opening.tokenizer)?;
                let data = opening.items(References::default(), images, &task.data, |batch| {
                    Ok(Batch::References(batch.to_tensors(&Device::Cpu)?))
                })?;
                Ok(Self { scst: Some(scst), ..data })
            }
            FinetuneTask::NlvrPretrain(task) | FinetuneTask::CaptioningPretrain(task) => {
                let shards = Shards { field: "task.train_file", sources: &task.train_file, dataset: &task.dataset };
                let builder = opening.records(shards, &task.data, vision.stride(), Need::Captions)?;
                let build = |builder: &BatchBuilder, step| {
                    let batch = builder.captions(step)?;
                    Ok(Box::new(move || of_pairs(batch)) as Made)
                };
                Ok(of_records(builder, build, task.train_dataset_size, task.data.batch_size))
            }
            FinetuneTask::BboxPretrain(task) => {
                let (field, sources) = ("task.train_file_regions", &task.train_file_regions);
                let shards = Shards { field, sources, dataset: &task.dataset };
                let builder = opening.records(shards, &task.data, vision.stride(), Need::Elems)?;
                let build = |builder: &BatchBuilder, step| {
                    let batch = builder.regions(step)?;
                    Ok(Box::new(move || Ok(Batch::Regions(batch.to_tensors(&Device::Cpu)?))) as Made)
                };
                Ok(of_records(builder, build, task.train_dataset_size, task.data.max_regions))
            }
        }
    }

    /// The first batch of a run.
    ///
    /// # Errors
    /// If too much is broken.
    pub(super) fn first(&self) -> Result<Batch, TaskError> {
        Ok((self.build)(0)?()?)
    }

    /// What was drawn so far.
    pub(super) fn drawn(&self) -> Drawn {
        (self.drawn)()
    }

    /// The batches from iteration `start` on, built ahead on worker threads: `accumulate` of them for each optimizer step.
    ///
    /// # Errors
    /// If the system starts no thread.
    pub(super) fn batches(&self, start: u64, accumulate: usize, loader: &LoaderConfig) -> Result<Ahead, DataError> {
        let build = Arc::clone(&self.build);
        let loader = Loader::starting_at(start * accumulate as u64, loader.clone(), move |step| build(step))?;
        Ok(Ahead { loader, accumulate })
    }
}

/// The batches of a run.
pub(super) struct Ahead {
    loader: Loader<Made>,
    accumulate: usize,
}

impl Batches<Batch> for Ahead {
    fn next(&mut self) -> Result<Vec<Vec<Batch>>, BoxError> {
        let mut make = || -> Result<Batch, BoxError> { Ok(self.loader.next()?()?) };
        Ok(vec![(0..self.accumulate).map(|_| make()).collect::<Result<_, _>>()?])
    }
}

/// What data are opened with.
struct Opening<'a> {
    tokenizer: Arc<TextTokenizer>,
    cache: Arc<ImageCache>,
    rank: usize,
    ranks: usize,
    resolution: usize,
    run: Option<&'a Path>,
    progress: &'a mut dyn Progress,
}

/// Files of records.
struct Shards<'a> {
    field: &'static str,
    sources: &'a [SourceConfig],
    dataset: &'a DatasetConfig,
}

/// Reads files whose images lie in a folder; broken items are left out and counted.
fn reading(images: &Path) -> Reading {
    Reading { images: Some(images.to_owned()), ..Reading::default() }
}

/// Tells what was left out.
pub(super) fn tell(report: &Report, progress: &mut dyn Progress) {
    for (reason, skipped) in report.iter() {
        let first = skipped.examples.first().map(ToString::to_string).unwrap_or_default();
        progress.warning(&format!("left out: {} items, {reason}; the first: {first}", skipped.count));
    }
}

/// Tells what was left out of the files of a field of the configuration; refuses files of which too much was.
pub(super) fn told<T>(
    (field, files): (&str, &[PathBuf]),
    loaded: Loaded<T>,
    max_bad_fraction: f64,
    progress: &mut dyn Progress,
) -> Result<Vec<T>, TaskError> {
    let Loaded { items, report } = loaded;
    let broken = || report.iter().filter(|(reason, _)| *reason != Reason::OtherSplit);
    let left_out: u64 = broken().map(|(_, skipped)| skipped.count).sum();
    tell(&report, progress);
    let all = left_out + items.len() as u64;
    let most = 100.0 * max_bad_fraction;
    let (expected, found) = match items.is_empty() {
        true => ("at least one item".to_owned(), "none".to_owned()),
        false if left_out as f64 > max_bad_fraction * all as f64 => {
            let first = broken().flat_map(|(_, skipped)| &skipped.examples).next();
            let first = first.map(|first| format!("; the first: {first}")).unwrap_or_default();
            (format!("at most {most} % of items to be broken"), format!("{left_out} of {all}{first}"))
        }
        false => return Ok(items),
    };
    let files: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
    Err(wrong_data(files.join(", "), Place::Whole, field, expected, found))
}

impl Opening<'_> {
    fn told<T>(&mut self, files: &[PathBuf], loaded: Loaded<T>, config: &ItemConfig) -> Result<Vec<T>, TaskError> {
        told(("task.train_file", files), loaded, config.max_bad_fraction, &mut *self.progress)
    }

    /// Images with captions.
    fn captions(
        &mut self,
        images: &Path,
        files: &[PathBuf],
        config: &ItemConfig,
    ) -> Result<Vec<CaptionItem>, TaskError> {
        self.told(files, reading(images).captions(files)?, config)
    }

    /// Batches of annotated items.
    fn items<K: ItemKind<Batch: Send> + 'static>(
        &self,
        kind: K,
        items: Vec<K::Item>,
        config: &ItemConfig,
        to_tensors: impl Fn(K::Batch) -> candle_core::Result<Batch> + Copy + Send + Sync + 'static,
    ) -> Result<TaskData, TaskError> {
        let config = ItemConfig { resolution: self.resolution, ..config.clone() };
        let (epoch, batch_size) = (items.len() as u64, config.batch_size);
        let (tokenizer, cache) = (Arc::clone(&self.tokenizer), Arc::clone(&self.cache));
        let batches = ItemBatches::new(kind, Arc::new(items), tokenizer, config, cache)?;
        let batches = Arc::new(batches.for_rank(self.rank, self.ranks));
        let source = Arc::clone(&batches);
        let build = move |step| {
            let batch = source.training(step)?;
            Ok(Box::new(move || to_tensors(batch)) as Made)
        };
        let drawn = move || Drawn {
            counts: batches.counts(),
            broken: batches.broken().iter().map(ToString::to_string).collect(),
        };
        Ok(TaskData { build: Arc::new(build), drawn: Box::new(drawn), epoch, batch_size, scst: None })
    }

    /// What builds batches of records.
    fn records(
        &mut self,
        shards: Shards,
        config: &BatchConfig,
        final_stride: usize,
        need: Need,
    ) -> Result<BatchBuilder, TaskError> {
        let config = BatchConfig { resolution: self.resolution, final_stride, ..config.clone() };
        let mut reading = shards.dataset.clone();
        reading.index_dir = reading.index_dir.or_else(|| Some(self.run?.join("indices")));
        let limit = config.max_bad_fraction;
        let dataset: Arc<Dataset> =
            open_dataset(shards.field, shards.sources, &reading, need, limit, &mut *self.progress)?;
        let (tokenizer, cache) = (Arc::clone(&self.tokenizer), Arc::clone(&self.cache));
        let builder = BatchBuilder::new(Arc::clone(&dataset), tokenizer, config, cache)?.with_regions_of(dataset)?;
        Ok(builder.for_rank(self.rank, self.ranks))
    }
}

/// Images with a text each, as tensors.
fn of_pairs(batch: CaptionBatch) -> candle_core::Result<Batch> {
    Ok(Batch::Pairs(batch.to_tensors(&Device::Cpu)?))
}

fn of_records(
    builder: BatchBuilder,
    build: impl Fn(&BatchBuilder, u64) -> Result<Made, DataError> + Send + Sync + 'static,
    epoch: u64,
    batch_size: usize,
) -> TaskData {
    let builder = Arc::new(builder);
    let source = Arc::clone(&builder);
    let drawn =
        move || Drawn { counts: builder.counts(), broken: builder.broken().iter().map(ToString::to_string).collect() };
    TaskData {
        build: Arc::new(move |step| build(&source, step)),
        drawn: Box::new(drawn),
        epoch,
        batch_size,
        scst: None,
    }
}
