//! Pre-training (§3 of the paper): both streams, all losses.
//!
//! One iteration is an image–text batch and, with probability `regions.iter_perc`, a region batch, each an optimizer step
//! of its own. The way of one step reads like this: batch → [`Xvlm::encode_regions`] → text → losses.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_data::{
    BatchBuilder, CaptionBatch, CaptionTensors, DataError, Dataset, DatasetConfig, ImageCache, Loader, Need,
    RegionBatch, RegionTensors, SourceConfig, StorageOptions, TextTokenizer, scenes,
};
use xvlm_encoders::{Parameters, Pass, Regions, Xvlm, XvlmConfig};
use xvlm_losses as losses;
use xvlm_train::{Batches, BoxError, Job, Losses, Progress, RunFolder, Step, Summary, TrainConfig, Trainable, Trained};
use xvlm_weights::{LoadRules, ModelFolder};

use crate::align::{Alignment, BoxTargets, Named, Negatives};
use crate::config::{Objective, PretrainConfig};
use crate::error::{ConfigProblem, TaskError};
use crate::generate::{LABEL_SMOOTHING, Source, writing_loss};
use crate::model::{Model, ModelConfig, check_texts};
use crate::search::Search;

/// Bounds of the temperature after each step (the original's `xvlm.temp.clamp_`).
const TEMPERATURE: (f64, f64) = (0.001, 0.5);

/// One batch of either stream.
pub enum Batch {
    /// Whole images with a text each.
    Captions(CaptionTensors),
    /// Boxes in images with a text each.
    Regions(RegionTensors),
}

/// The model with its pre-training losses.
pub struct Pretraining {
    model: Xvlm,
    parameters: Vec<(String, Var)>,
    objectives: Vec<Objective>,
}

impl Pretraining {
    /// A freshly initialised model.
    ///
    /// # Errors
    /// If the sizes do not fit together.
    pub fn new(config: &XvlmConfig, seed: u64, device: &Device) -> Result<Self> {
        Self::to_train(config, &TrainConfig { seed, ..TrainConfig::default() }, device)
    }

    /// A freshly initialised model that computes in the configured precision, of which the parts that are frozen have no
    /// gradients.
    ///
    /// # Errors
    /// If the sizes do not fit together.
    pub fn to_train(config: &XvlmConfig, train: &TrainConfig, device: &Device) -> Result<Self> {
        let parameters = Parameters::new(train.seed).freezing(&train.optimizer.frozen_names);
        let model = Xvlm::new(config, parameters.builder(train.precision.dtype(), device))?;
        Ok(Self::with_model(model, parameters.named()))
    }

    /// A model with its parameters.
    pub fn with_model(model: Xvlm, parameters: Vec<(String, Var)>) -> Self {
        Self { model, parameters, objectives: Objective::ALL.to_vec() }
    }

    /// The same, with the losses of some objectives only.
    pub fn with_objectives(self, objectives: &[Objective]) -> Self {
        Self { objectives: objectives.to_vec(), ..self }
    }

    fn has(&self, objective: Objective) -> bool {
        self.objectives.contains(&objective)
    }

    /// The model inside.
    pub fn model(&self) -> &Xvlm {
        &self.model
    }

    /// The losses of a batch in a pass, with negatives chosen by `negatives`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn losses_of(&self, batch: &Batch, pass: &Pass, negatives: Negatives) -> Result<Losses> {
        Ok(Losses(match batch {
            Batch::Captions(batch) => self.captions(batch, pass, negatives)?,
            Batch::Regions(batch) => self.regions(batch, pass, negatives)?,
        }))
    }

    /// Image stream: ITC, ITM and MLM of each image with its text, and the texts that are to be generated.
    fn captions(&self, batch: &CaptionTensors, pass: &Pass, negatives: Negatives) -> Result<Named> {
        let images = self.model.encode_image(&batch.pixels, pass)?;
        let mut named =
            self.alignment(pass, None).losses(&batch.text, Some(&Source::whole(&images)?), None, negatives)?;
        if let Some(generation) = batch.generation.as_ref().filter(|_| self.has(Objective::Generation)) {
            named.push(("generation", writing_loss(&self.model, generation, &images, LABEL_SMOOTHING, pass)?));
        }
        Ok(named)
    }

    /// Region stream: the same for each region with its text, and the box of the text in the whole image.
    fn regions(&self, batch: &RegionTensors, pass: &Pass, negatives: Negatives) -> Result<Named> {
        let regions = Regions { index: &batch.image_index, mask: &batch.region_mask };
        let (concepts, images) = self.model.encode_regions(&batch.pixels, regions, pass)?;
        let concepts = Source { tokens: concepts, mask: batch.region_mask.clone() };
        let targets =
            BoxTargets { images: &images, index: &batch.image_index, boxes: &batch.boxes, is_image: &batch.is_image };
        self.alignment(pass, Some(&batch.row_weights)).losses(&batch.text, Some(&concepts), Some(targets), negatives)
    }

    fn alignment<'a>(&'a self, pass: &'a Pass, weights: Option<&'a [f32]>) -> Alignment<'a> {
        Alignment { model: &self.model, objectives: &self.objectives, pass, weights }
    }
}

/// What a loss is called in reports if it is of the region stream; only that stream has boxes.
fn of_regions(name: &'static str) -> &'static str {
    match name {
        "itc" => "region_itc",
        "itm" => "region_itm",
        "mlm" => "region_mlm",
        other => other,
    }
}

impl Trainable for Pretraining {
    type Batch = Batch;

    fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    fn losses(&self, batch: &Batch, step: &mut Step) -> std::result::Result<Losses, BoxError> {
        let pass = Pass::training(step.rng).on(step.tape);
        let weights = match batch {
            Batch::Captions(_) => None,
            Batch::Regions(batch) => Some(batch.row_weights.as_slice()),
        };
        let mut negatives = |scores: &Tensor, keys: &[i64]| losses::hard_negatives(scores, keys, weights, step.rng);
        let mut losses = self.losses_of(batch, &pass, &mut negatives)?;
        if let Batch::Regions(_) = batch {
            losses.0.iter_mut().for_each(|(name, _)| *name = of_regions(name));
        }
        Ok(losses)
    }

    fn samples(batch: &Batch) -> usize {
        match batch {
            Batch::Captions(batch) => batch.pixels.dims()[0],
            Batch::Regions(batch) => batch.pixels.dims()[0],
        }
    }

    fn records(batch: &Batch) -> Vec<String> {
        match batch {
            Batch::Captions(batch) => batch.origins.clone(),
            Batch::Regions(batch) => batch.origins.clone(),
        }
    }

    fn after_step(&self) -> std::result::Result<(), BoxError> {
        for (_, temperature) in self.parameters.iter().filter(|(name, _)| name == "temp") {
            temperature.set(&temperature.clamp(TEMPERATURE.0, TEMPERATURE.1)?)?;
        }
        Ok(())
    }
}

/// The batches of a run in order, built ahead on worker threads.
pub struct PretrainBatches {
    loader: Loader<(CaptionBatch, Option<RegionBatch>)>,
    accumulate: usize,
    device: Device,
}

impl PretrainBatches {
    /// Batches from iteration `start` on. What an iteration gets depends on the seed and its number alone.
    ///
    /// # Errors
    /// If the system starts no thread.
    pub fn new(
        builder: Arc<BatchBuilder>,
        config: &PretrainConfig,
        start: u64,
        device: &Device,
    ) -> std::result::Result<Self, DataError> {
        let (iter_perc, accumulate) = (config.regions.iter_perc, config.train.accumulate);
        let build = move |number: u64| {
            // Whether there are regions is one question an iteration.
            let mut rng = ChaCha8Rng::seed_from_u64(builder.config().seed);
            rng.set_stream(number / accumulate as u64);
            let regions = if rng.random_bool(iter_perc) { Some(builder.regions(number)?) } else { None };
            Ok((builder.captions(number)?, regions))
        };
        let loader = Loader::starting_at(start * accumulate as u64, config.loader.clone(), build)?;
        Ok(Self { loader, accumulate, device: device.clone() })
    }
}

impl Batches<Batch> for PretrainBatches {
    fn next(&mut self) -> std::result::Result<Vec<Vec<Batch>>, BoxError> {
        let (mut captions, mut regions) = (Vec::new(), Vec::new());
        for _ in 0..self.accumulate {
            let (caption_batch, region_batch) = self.loader.next()?;
            captions.push(Batch::Captions(caption_batch.to_tensors(&self.device)?));
            if let Some(batch) = region_batch {
                regions.push(Batch::Regions(batch.to_tensors(&self.device)?));
            }
        }
        Ok(if regions.is_empty() { vec![captions] } else { vec![captions, regions] })
    }
}

/// Pre-trains as configured. The run lies in `out` (`config.yaml`, `metrics.jsonl`, checkpoints), the finished model in
/// `out/model`.
///
/// # Errors
/// If a file cannot be read or written, too many records are broken, or the loss is not finite.
pub fn run(
    config: &PretrainConfig,
    out: &Path,
    resume: bool,
    device: &Device,
    progress: &mut dyn Progress,
) -> std::result::Result<Summary, TaskError> {
    let mut config = config.clone();
    let builder = Arc::new(open_batches(&mut config, Some(out), progress)?);
    let pretraining = Pretraining::to_train(&config.model, &config.train, device)?.with_objectives(&config.objectives);
    if let Some(dir) = &config.init_from {
        let files = ModelFolder::open(dir)?;
        xvlm_weights::assign(&files.name, &files.tensors, &pretraining.parameters, &LoadRules::default())?;
    }
    let batches = |start| -> std::result::Result<Box<dyn Batches<Batch>>, BoxError> {
        Ok(Box::new(PretrainBatches::new(Arc::clone(&builder), &config, start, device)?))
    };
    let run = RunFolder::new(out)?;
    keep_config(&config, &run, resume)?;
    let job = Job::alone(&run, resume);
    let Trained { summary, weights } = xvlm_train::train(&pretraining, batches, &config.train, &job, progress)?;
    let (drawn, broken) = builder.counts();
    if broken > 0 {
        progress.warning(&format!("{broken} of {drawn} records that were drawn are broken:"));
        builder.broken().iter().for_each(|record| progress.warning(&format!("  {record}")));
    }
    let model = ModelConfig {
        model: config.model.clone(),
        max_tokens: config.data.max_tokens,
        max_words: config.data.max_words,
        prompt: config.data.generation.clone().unwrap_or_default().prompt,
        search: Search::default(),
    };
    Model::write(&out.join("model"), &model, weights, builder.tokenizer(), config.stored)?;
    Ok(summary)
}

/// Opens the data of a run: what builds its batches. Values of the configuration that follow from others are filled in.
/// What is learnt of shards that are fetched is kept in the folder of the run, if there is one, unless the configuration
/// names another place.
///
/// # Errors
/// If a value makes no sense, a file cannot be read, or too many records are seen to be broken.
pub fn open_batches(
    config: &mut PretrainConfig,
    run: Option<&Path>,
    progress: &mut dyn Progress,
) -> std::result::Result<BatchBuilder, TaskError> {
    let tokenizer = Arc::new(match &config.tokenizer {
        Some(path) => TextTokenizer::from_file(path)?,
        None => TextTokenizer::from_vocabulary(&scenes::vocabulary())?,
    });
    if config.model.text_config.vocab_size == 0 {
        config.model.text_config.vocab_size = tokenizer.vocab_size();
    }
    config.data.resolution = config.model.vision_config.image_res();
    config.data.final_stride = config.model.vision_config.stride();
    let problem = |message| ConfigProblem { file: "configuration".to_owned(), message };
    config.check_values().map_err(problem)?;
    check_texts(&config.model, config.data.max_tokens, &tokenizer).map_err(problem)?;
    let mut reading = config.dataset.clone();
    reading.index_dir = reading.index_dir.or_else(|| run.map(|run| run.join("indices")));
    let limit = config.data.max_bad_fraction;
    let mut open =
        |field, sources: &[SourceConfig], need| open_dataset(field, sources, &reading, need, limit, progress);
    let dataset = open("train_file", &config.train_file, Need::Captions)?;
    let has_regions = config.regions.iter_perc > 0.0;
    let regions = match config.train_file_regions.as_slice() {
        [] if has_regions => {
            check_count(&config.train_file, &dataset, Need::Elems)?;
            Arc::clone(&dataset)
        }
        sources if has_regions => open("train_file_regions", sources, Need::Elems)?,
        _ => Arc::clone(&dataset),
    };
    let cache = Arc::new(ImageCache::new(config.image_cache_mib << 20));
    Ok(BatchBuilder::new(dataset, tokenizer, config.data.clone(), cache)?.with_regions_of(regions)?)
}

/// Opens one stream's data; records that are seen to be broken are told, and refused if they are too many.
fn open_dataset(
    field: &str,
    sources: &[SourceConfig],
    config: &DatasetConfig,
    need: Need,
    max_bad_fraction: f64,
    progress: &mut dyn Progress,
) -> std::result::Result<Arc<Dataset>, TaskError> {
    if sources.is_empty() {
        let message = format!("{field}: expected at least one file, found none");
        return Err(ConfigProblem { file: "configuration".to_owned(), message }.into());
    }
    let dataset = Dataset::open(sources, config, &StorageOptions::default())?;
    dataset.check_broken(max_bad_fraction)?;
    dataset.broken().examples().iter().for_each(|error| progress.warning(&format!("left out: {error}")));
    check_count(sources, &dataset, need)?;
    Ok(Arc::new(dataset))
}

/// Refuses data of which it is known that they have nothing of what is needed.
fn check_count(sources: &[SourceConfig], dataset: &Dataset, need: Need) -> std::result::Result<(), TaskError> {
    if dataset.count(need) != Some(0) {
        return Ok(());
    }
    let message = match need {
        Need::Elems => "elems: expected a record with elems, or regions.iter_perc 0, found none",
        _ => "caption: expected a record with a caption, found none",
    };
    let file = sources.iter().flat_map(|source| &source.files).map(String::as_str).collect::<Vec<_>>().join(", ");
    Err(ConfigProblem { file, message: message.to_owned() }.into())
}

/// Writes `config.yaml` into the folder of the run; a run that is resumed must be configured as it was, but for what only
/// says how long to go on, how quickly, and what to leave behind.
fn keep_config(config: &PretrainConfig, run: &RunFolder, resume: bool) -> std::result::Result<(), TaskError> {
    const FREE: [&str; 8] = [
        "/train",
        "/loader",
        "/image_cache_mib",
        "/stored",
        "/init_from",
        "/data/max_bad_fraction",
        "/dataset/index_dir",
        "/dataset/limits",
    ];
    let path = run.path().join("config.yaml");
    let problem = |message: String| ConfigProblem { file: path.display().to_string(), message };
    let is_new = run.checkpoints()?.is_empty();
    if resume && !is_new && path.exists() {
        let text = std::fs::read_to_string(&path).map_err(|error| problem(error.to_string()))?;
        let mut before: serde_json::Value =
            serde_norway::from_str(&text).map_err(|error| problem(error.to_string()))?;
        let mut now = serde_json::to_value(config).map_err(|error| problem(error.to_string()))?;
        for config in [&mut before, &mut now] {
            for free in FREE {
                config.pointer_mut(free).map(serde_json::Value::take);
            }
        }
        for (field, now) in now.as_object().into_iter().flatten() {
            if let Some((field, expected, found)) = xvlm_train::difference(field, &before[field.as_str()], now) {
                return Err(problem(format!("{field}: expected {expected}, as the run began, found {found}")).into());
            }
        }
    }
    if resume || is_new {
        let text = serde_norway::to_string(config).map_err(|error| problem(error.to_string()))?;
        xvlm_weights::write_file_atomically(&path, |out| out.write_all(text.as_bytes()))?;
    }
    Ok(())
}
