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
    BatchBuilder, CaptionBatch, CaptionTensors, DataError, Dataset, DatasetConfig, ImageCache, Loader, Need, Place,
    RegionBatch, RegionTensors, SourceConfig, StorageOptions, TextTokenizer, scenes,
};
use xvlm_encoders::{Parameters, Pass, Regions, Xvlm, XvlmConfig};
use xvlm_losses as losses;
use xvlm_train::ranks::{Alone, Communicator};
use xvlm_train::{
    Batches, BoxError, Losses, Progress, RunFolder, Silent, Step, Summary, TrainConfig, Trainable, Trained,
};
use xvlm_weights::{LoadRules, ModelFolder};

use crate::align::{Alignment, BoxTargets, Named, Negatives};
use crate::config::{ItcGradient, Objective, PretrainConfig};
use crate::error::{ConfigProblem, TaskError, wrong_data};
use crate::finite::first_not_finite;
use crate::generate::{LABEL_SMOOTHING, Source, writing_loss};
use crate::model::{ModelConfig, check_texts};
use crate::search::Search;
use crate::session::{Finished, Kept, Session, tell_broken};
use crate::yaml::Configuration;

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
    itc_gradient: ItcGradient,
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
        Self { model, parameters, objectives: Objective::ALL.to_vec(), itc_gradient: ItcGradient::default() }
    }

    /// The same, with the losses of some objectives only.
    pub fn with_objectives(self, objectives: &[Objective]) -> Self {
        Self { objectives: objectives.to_vec(), ..self }
    }

    /// The losses of a batch in a training pass, by the names they have in reports.
    fn losses_in(&self, pass: &Pass, batch: &Batch, step: &mut Step) -> Result<Losses> {
        let weights = match batch {
            Batch::Captions(_) => None,
            Batch::Regions(batch) => Some(batch.row_weights.as_slice()),
        };
        let mut negatives = |scores: &Tensor, keys: &[i64]| losses::hard_negatives(scores, keys, weights, step.rng);
        let mut losses = self.losses_among(batch, pass, &mut negatives, step.ranks)?;
        if let Batch::Regions(_) = batch {
            losses.0.iter_mut().for_each(|(name, _)| *name = of_regions(name));
        }
        Ok(losses)
    }

    /// The same, with another gradient of ITC where several processes train together.
    pub fn with_itc_gradient(self, itc_gradient: ItcGradient) -> Self {
        Self { itc_gradient, ..self }
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
        self.losses_among(batch, pass, negatives, &(Arc::new(Alone) as _))
    }

    /// The same where `ranks` train together: ITC compares the samples of all, negatives are chosen among this one's own.
    ///
    /// # Errors
    /// If a tensor operation fails, or another rank does not answer.
    pub fn losses_among(
        &self,
        batch: &Batch,
        pass: &Pass,
        negatives: Negatives,
        ranks: &Arc<dyn Communicator>,
    ) -> Result<Losses> {
        Ok(Losses(match batch {
            Batch::Captions(batch) => self.captions(batch, pass, negatives, ranks)?,
            Batch::Regions(batch) => self.regions(batch, pass, negatives, ranks)?,
        }))
    }

    /// Image stream: ITC, ITM and MLM of each image with its text, and the texts that are to be generated.
    fn captions(
        &self,
        batch: &CaptionTensors,
        pass: &Pass,
        negatives: Negatives,
        ranks: &Arc<dyn Communicator>,
    ) -> Result<Named> {
        let images = self.model.encode_image(&batch.pixels, pass)?;
        let mut named =
            self.alignment(pass, None, ranks).losses(&batch.text, Some(&Source::whole(&images)?), None, negatives)?;
        if let Some(generation) = batch.generation.as_ref().filter(|_| self.has(Objective::Generation)) {
            named.push(("generation", writing_loss(&self.model, generation, &images, LABEL_SMOOTHING, pass)?));
        }
        Ok(named)
    }

    /// Region stream: the same for each region with its text, and the box of the text in the whole image.
    fn regions(
        &self,
        batch: &RegionTensors,
        pass: &Pass,
        negatives: Negatives,
        ranks: &Arc<dyn Communicator>,
    ) -> Result<Named> {
        let regions = Regions { index: &batch.image_index, mask: &batch.region_mask };
        let (concepts, images) = self.model.encode_regions(&batch.pixels, regions, pass)?;
        let concepts = Source { tokens: concepts, mask: batch.region_mask.clone() };
        let targets =
            BoxTargets { images: &images, index: &batch.image_index, boxes: &batch.boxes, is_image: &batch.is_image };
        let alignment = self.alignment(pass, Some(&batch.row_weights), ranks);
        alignment.losses(&batch.text, Some(&concepts), Some(targets), negatives)
    }

    fn alignment<'a>(
        &'a self,
        pass: &'a Pass,
        weights: Option<&'a [f32]>,
        ranks: &'a Arc<dyn Communicator>,
    ) -> Alignment<'a> {
        let ranks = Some((ranks, self.itc_gradient));
        Alignment { model: &self.model, objectives: &self.objectives, pass, weights, ranks }
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

    fn to_device(&self, batch: Batch) -> std::result::Result<Batch, BoxError> {
        let Some((_, parameter)) = self.parameters.first() else { return Ok(batch) };
        Ok(match batch {
            Batch::Captions(batch) => Batch::Captions(batch.to_device(parameter.device())?),
            Batch::Regions(batch) => Batch::Regions(batch.to_device(parameter.device())?),
        })
    }

    fn losses(&self, batch: &Batch, step: &mut Step) -> std::result::Result<Losses, BoxError> {
        let pass = Pass::training(step.rng).on(step.tape);
        Ok(self.losses_in(&pass, batch, step)?)
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

    fn first_not_finite(&self, batch: &Batch, step: &mut Step) -> Option<String> {
        let shown = match batch {
            Batch::Captions(batch) => (&batch.pixels, batch.origins.as_slice()),
            Batch::Regions(batch) => (&batch.pixels, batch.origins.as_slice()),
        };
        first_not_finite(shown, &self.parameters, step, |pass, step| self.losses_in(pass, batch, step))
    }

    fn after_step(&self) -> std::result::Result<(), BoxError> {
        Ok(clamp_temperature(&self.parameters)?)
    }
}

/// Keeps the temperature, if there is one, in its bounds.
pub(crate) fn clamp_temperature(parameters: &[(String, Var)]) -> Result<()> {
    parameters
        .iter()
        .filter(|(name, _)| name == "temp")
        .try_for_each(|(_, temperature)| temperature.set(&temperature.clamp(TEMPERATURE.0, TEMPERATURE.1)?))
}

/// The batches of a run in order, built ahead on worker threads. They lie in the memory of the host.
pub struct PretrainBatches {
    loader: Loader<(CaptionBatch, Option<RegionBatch>)>,
    accumulate: usize,
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
        Ok(Self { loader, accumulate })
    }
}

impl Batches<Batch> for PretrainBatches {
    fn next(&mut self) -> std::result::Result<Vec<Vec<Batch>>, BoxError> {
        let (mut captions, mut regions) = (Vec::new(), Vec::new());
        for _ in 0..self.accumulate {
            let (caption_batch, region_batch) = self.loader.next()?;
            captions.push(Batch::Captions(caption_batch.to_tensors(&Device::Cpu)?));
            if let Some(batch) = region_batch {
                regions.push(Batch::Regions(batch.to_tensors(&Device::Cpu)?));
            }
        }
        Ok(if regions.is_empty() { vec![captions] } else { vec![captions, regions] })
    }
}

/// Pre-trains as configured. The run lies in `out` (`config.yaml`, `metrics.jsonl`, checkpoints), the finished model in
/// `out/model`: that of the last iteration. With [`TrainConfig::keep_best`], the model of the best checkpoint is in
/// `out/best`. A run that is asked to stop has no model until it is resumed and finished.
///
/// Of several `ranks`, each calls this; rank 0 writes, and tells `progress`.
///
/// # Errors
/// If a file cannot be read or written, too many records are broken, or the loss is not finite. Other ranks may then be
/// waiting for this one, until it calls [`Communicator::abort`].
pub fn run(
    config: &PretrainConfig,
    out: &Path,
    session: &Session,
    device: &Device,
    progress: &mut dyn Progress,
) -> std::result::Result<Summary, TaskError> {
    let ranks = &session.ranks;
    let mut silent = Silent;
    let progress = if session.is_first_rank() { progress } else { &mut silent };
    let mut config = config.clone();
    config.fix_length(ranks.size());
    let builder = open_batches(&mut config, Some(out), progress)?.for_rank(ranks.rank(), ranks.size());
    let builder = Arc::new(builder);
    let pretraining = Pretraining::to_train(&config.model, &config.train, device)?
        .with_objectives(&config.objectives)
        .with_itc_gradient(config.itc_gradient);
    if let Some(dir) = &config.init_from {
        let files = ModelFolder::open(dir)?;
        let (name, tensors) = (files.weights.name(), files.tensors()?);
        xvlm_weights::assign(name, &tensors, &pretraining.parameters, &LoadRules::default())?;
    }
    let run = RunFolder::new(out)?;
    let batches = |start| -> std::result::Result<Box<dyn Batches<Batch>>, BoxError> {
        // The run is sure to go on: nobody else trains in the folder, and the checkpoint fits.
        if session.is_first_rank() {
            config.keep(&run)?;
        }
        Ok(Box::new(PretrainBatches::new(Arc::clone(&builder), &config, start)?))
    };
    config.check(&run, session, progress)?;
    let job = session.job(&run);
    let Trained { summary, weights } = xvlm_train::train(&pretraining, batches, &config.train, &job, progress)?;
    tell_broken(builder.counts(), builder.broken().iter().map(ToString::to_string), session, progress)?;
    if !session.is_first_rank() || summary.stopped {
        return Ok(summary);
    }
    let model = ModelConfig {
        model: config.model.clone(),
        max_tokens: config.data.max_tokens,
        max_words: config.data.max_words,
        prompt: config.data.generation.clone().unwrap_or_default().prompt,
        search: Search::default(),
    };
    let (tokenizer, stored) = (builder.tokenizer(), config.stored);
    Finished { run: &run, train: &config.train, summary: &summary, model, tokenizer, stored }
        .write(out, weights, progress)?;
    Ok(summary)
}

impl Kept for PretrainConfig {
    const OWN: &'static [&'static str] = &[
        "/train_file",
        "/train_file_regions",
        "/tokenizer",
        "/init_from",
        "/loader",
        "/image_cache_mib",
        "/dataset/index_dir",
        "/dataset/limits",
    ];
    const FREE: &'static [&'static str] = &[
        "/train",
        "/train_dataset_size",
        "/loader",
        "/image_cache_mib",
        "/stored",
        "/init_from",
        "/data/max_bad_fraction",
        "/dataset/index_dir",
        "/dataset/limits",
    ];
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
pub(crate) fn open_dataset(
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
    let (field, expected) = match need {
        Need::Elems => ("elems", "a record with elems, or regions.iter_perc 0"),
        _ => ("caption", "a record with a caption"),
    };
    let files = sources.iter().flat_map(|source| &source.files).map(String::as_str).collect::<Vec<_>>().join(", ");
    Err(wrong_data(files, Place::Whole, field, expected, "none"))
}
