//! A run of fine-tuning.

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use xvlm_data::TextTokenizer;
use xvlm_encoders::{Parameters, Xvlm};
use xvlm_train::{Batches, BoxError, Progress, RunFolder, Silent, Summary, TrainConfig, Trained};
use xvlm_weights::{LoadRules, ModelFiles, ModelFolder};

use super::batches::TaskData;
use super::learn::{Batch, Finetuning};
use super::start::initial_weights;
use super::validate::Validation;
use super::{Data, FinetuneConfig, FinetuneTask};
use crate::error::{ConfigProblem, TaskError};
use crate::model::{ModelConfig, check_texts};
use crate::search::Search;
use crate::session::{Finished, Kept, Session, tell_broken};
use crate::training::Training;
use crate::yaml::Configuration;

/// Fine-tunes as configured, from the model that the configuration names (`init_from`), or else from that in `start`. The run lies in `out`, the finished
/// model in `out/model`, that of the best checkpoint in `out/best`, as of [`pretrain::run`](crate::pretrain::run).
///
/// Of several ranks, each calls this; rank 0 writes, and tells `progress`.
///
/// # Errors
/// If there is no model to start from, the configuration has nothing to train on, a file cannot be read or written, too many items are broken, or the loss is not
/// finite. Other ranks may then be waiting for this one, until it calls
/// [`Communicator::abort`](xvlm_train::ranks::Communicator::abort).
pub fn run(
    config: &FinetuneConfig,
    start: Option<&ModelFiles>,
    out: &Path,
    session: &Session,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<Summary, TaskError> {
    let mut silent = Silent;
    let progress = if session.is_first_rank() { progress } else { &mut silent };
    let named = named_start(config)?;
    let start = start_of(named.as_ref(), start)?;
    let (rank, ranks) = (session.ranks.rank(), session.ranks.size());
    let mut opened = Opened::new(config, start, (rank, ranks), Some(out), progress)?;
    let scst = opened.data.scst.take();
    let Opened { config, train, tokenizer, data, first } = &opened;
    let mut model = open_model(config, train, start, device, progress)?;
    if let Some(scst) = scst {
        model = model.with_rewards(scst, Arc::clone(tokenizer));
    }
    if train.keep_best {
        let model_config = opened.model_config();
        let validation = Validation::open(&config.task, model_config, tokenizer, session, *first, progress)?;
        model = validation.into_iter().fold(model, Finetuning::with_validation);
    }
    let run = RunFolder::new(out)?;
    let batches = |start| -> Result<Box<dyn Batches<Batch>>, BoxError> {
        if session.is_first_rank() {
            config.keep(&run)?;
        }
        Ok(Box::new(data.batches(start, train.accumulate, &config.loader)?))
    };
    config.check(&run, session, progress)?;
    let Trained { summary, weights } = xvlm_train::train(&model, batches, train, &session.job(&run), progress)?;
    let drawn = data.drawn();
    tell_broken(drawn.counts, drawn.broken, session, progress)?;
    if session.is_first_rank() && !summary.stopped {
        let (model, stored) = (opened.model_config(), config.stored);
        Finished { run: &run, train, summary: &summary, model, tokenizer, stored }.write(out, weights, progress)?;
    }
    Ok(summary)
}

/// The model that a configuration starts from, if it names one.
pub(super) fn named_start(config: &FinetuneConfig) -> Result<Option<ModelFiles>, TaskError> {
    Ok(config.init_from.as_ref().map(|dir| ModelFolder::open(dir)).transpose()?)
}

/// The model to start from: that of the configuration, or else the other.
pub(super) fn start_of<'a>(
    named: Option<&'a ModelFiles>,
    other: Option<&'a ModelFiles>,
) -> Result<&'a ModelFiles, ConfigProblem> {
    named.or(other).ok_or_else(|| {
        problem(
            "init_from: expected the folder of a model to start from, or the built-in model (--built-in), found none",
        )
    })
}

fn problem(message: impl Into<String>) -> ConfigProblem {
    ConfigProblem { file: "configuration".to_owned(), message: message.into() }
}

/// What a run begins with.
pub(super) struct Opened {
    /// The configuration, with what follows from the tokenizer and the data.
    pub(super) config: FinetuneConfig,
    pub(super) train: Training,
    pub(super) tokenizer: Arc<TextTokenizer>,
    pub(super) data: TaskData,
    /// The first iteration after which the model is validated.
    pub(super) first: u64,
}

impl Opened {
    /// Opens what a configuration names, for process `rank` of `ranks`; what is learnt of shards is kept in the folder `out`, if
    /// there is one.
    pub(super) fn new(
        config: &FinetuneConfig,
        start: &ModelFiles,
        (rank, ranks): (usize, usize),
        out: Option<&Path>,
        progress: &mut dyn Progress,
    ) -> Result<Self, TaskError> {
        let mut config = config.clone();
        let tokenizer = Arc::new(tokenizer(&config, start)?);
        if config.model.text_config.vocab_size == 0 {
            config.model.text_config.vocab_size = tokenizer.vocab_size();
        }
        config.check_values().map_err(problem)?;
        check_texts(&config.model, config.task.data().max_tokens(), &tokenizer).map_err(problem)?;
        let Some(mut train) = config.train.clone() else {
            return Err(problem("train: expected a section, since there is to be training, found none").into());
        };
        let data = TaskData::open(&config, &tokenizer, (rank, ranks), out, progress)?;
        let batch = (data.batch_size * ranks * train.accumulate) as u64;
        // In the original an epoch is validated once it is over, from epoch `start_eval` on, counted from 0.
        let first =
            if train.epochs.is_some() { (config.task.start_eval() + 1) * data.epoch.div_ceil(batch) } else { 0 };
        train.fix_length(data.epoch, batch);
        config.train = Some(train.clone());
        if let Some(scst) = &data.scst {
            let (longest, found) = (config.model.text_config.longest_text(), scst.longest());
            if found > longest {
                let expected =
                    format!("room for the prompt and the caption in {longest} tokens, found {found} of them");
                return Err(problem(format!("task.search.max_tokens: expected {expected}")).into());
            }
        }
        Ok(Self { config, train, tokenizer, data, first })
    }

    /// What `config.json` of the finished model holds.
    pub(super) fn model_config(&self) -> ModelConfig {
        model_config(&self.config)
    }
}

/// The tokenizer that the configuration names, or that of the model to start from.
fn tokenizer(config: &FinetuneConfig, start: &ModelFiles) -> Result<TextTokenizer, TaskError> {
    Ok(match &config.tokenizer {
        Some(path) => TextTokenizer::from_file(path)?,
        None => TextTokenizer::from_bytes(&format!("{}/tokenizer.json", start.name), &start.tokenizer)?,
    })
}

/// The task's model with its losses, from the weights of `start`; what that lacks is random, and told.
fn open_model(
    config: &FinetuneConfig,
    train: &TrainConfig,
    start: &ModelFiles,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<Finetuning, TaskError> {
    let parameters = Parameters::new(train.seed).freezing(&train.optimizer.frozen_names);
    let model = Xvlm::new(&config.model, parameters.builder(train.precision.dtype(), device))?;
    let named = parameters.named();
    let weights = initial_weights(start, &config.model, train.seed)?;
    let fresh = weights.fresh();
    if !fresh.is_empty() {
        progress.warning(&format!("random, since {} has none: {}", start.name, fresh.join(", ")));
    }
    xvlm_weights::assign(start.weights.name(), &weights.tensors, &named, &LoadRules::default())?;
    Ok(Finetuning::new(model, named, config))
}

/// What `config.json` of the finished model holds.
fn model_config(config: &FinetuneConfig) -> ModelConfig {
    let (max_tokens, max_words) = match config.task.data() {
        Data::Items(data) => (data.max_tokens, data.max_words),
        Data::Records(data) => (data.max_tokens, data.max_words),
    };
    let (prompt, search) = match &config.task {
        FinetuneTask::Captioning(task) => (Some(task.prompt.clone()), task.search),
        FinetuneTask::CaptioningScst(task) => (Some(task.prompt.clone()), task.search),
        _ => (None, Search::default()),
    };
    let base = ModelConfig::of(config.model.clone());
    ModelConfig { max_tokens, max_words, prompt: prompt.unwrap_or(base.prompt), search, model: base.model }
}

impl Kept for FinetuneConfig {
    const OWN: &'static [&'static str] = &[
        "/task/train_file",
        "/task/train_file_regions",
        "/task/val_file",
        "/task/test_file",
        "/task/image_root",
        "/task/vqa_root",
        "/task/vg_root",
        "/task/answer_list",
        "/task/refcoco_data",
        "/task/det_file",
        "/task/coco_file",
        "/task/val_gt_file",
        "/task/test_gt_file",
        "/task/cider_cached_tokens",
        "/task/dataset/index_dir",
        "/task/dataset/limits",
        "/tokenizer",
        "/init_from",
        "/loader",
        "/image_cache_mib",
    ];
    const FREE: &'static [&'static str] = &[
        "/task/test_file",
        "/task/test_gt_file",
        "/task/answer_list",
        "/task/det_file",
        "/task/coco_file",
        "/task/batch_size_test",
        "/task/batch_size_test_text",
        "/task/k_test",
        "/task/train_dataset_size",
        "/task/dataset/index_dir",
        "/task/dataset/limits",
        "/train",
        "/loader",
        "/image_cache_mib",
        "/stored",
        "/init_from",
        "/data/max_bad_fraction",
    ];
}
