//! Pre-training configurations of the original, and what those of fine-tuning on shards share with them.

use std::path::{Path, PathBuf};

use serde_json::Value;
use xvlm_data::{BatchConfig, LoaderConfig, MaskingGenerator, RecordKeys, SourceConfig};
use xvlm_encoders::Task;
use xvlm_train::{OptimizerConfig, Precision, ScheduleConfig, TrainConfig, Warmup};

use super::section::Section;
use super::{from_official, tokenizer};
use crate::config::{ItcGradient, PretrainConfig, RegionStream, default_cache, default_stored};
use crate::error::ConfigProblem;
use crate::model::ModelConfig;
use crate::training::Training;

/// What `images` and `regions` have.
const STREAM_KEYS: &[&str] = &[
    "batch_size",
    "caption_key",
    "careful_hflip",
    "image_key",
    "is_image_rpath",
    "iter_perc",
    "max_images",
    "max_regions",
    "min_perc_in_image",
    "num_workers",
    "tokenized",
];

/// What `optimizer` has.
const OPTIMIZER_KEYS: &[&str] = &["lr", "lr_mult", "opt", "weight_decay"];

/// What `schedular` has.
const SCHEDULE_KEYS: &[&str] = &["epochs", "lr", "num_training_steps", "num_warmup_steps", "sched"];

/// What `accelerator` has.
const ACCELERATOR_KEYS: &[&str] =
    &["CLIP_GRAD_NORM", "FP16_LOSS_SCALE", "FP16_OPT_LEVEL", "GRAD_ACCUMULATE_STEPS", "RNG_SEED", "SYNCBN"];

/// A pre-training configuration of the original (`configs/Pretrain_XVLM_*.yaml`); sizes of batches are those of one process, as
/// there. Where it does not say `careful_hflip`, pictures whose texts say left or right are not mirrored, which the original
/// does.
///
/// # Errors
/// As [`from_official`].
pub fn pretrain_config(config: &Value, path: &Path) -> Result<PretrainConfig, ConfigProblem> {
    let root = Section::new(config, path)?;
    let (images, regions) = (root.section("images")?, root.section("regions")?);
    root.expect_off("calc_image_bbox_loss")?;
    root.expect_off("load_bertL_by_sep")?;
    let [tokenized, regions_tokenized] = [images.flag_or("tokenized", false)?, regions.flag_or("tokenized", false)?];
    let model = from_official(config, path, Task::Pretrain)?;
    let train = training(&root, OptimizerConfig::default().lr_mult_names)?;
    Ok(PretrainConfig {
        train_file: sources(&root, "train_file", &images)?,
        train_file_regions: sources(&root, "train_file_regions", &regions)?,
        train_dataset_size: Some(root.size("train_dataset_size")? as u64),
        dataset: Default::default(),
        tokenizer: Some(tokenizer(&root, model.model.text_config.model_type)?),
        init_from: None,
        objectives: crate::Objective::ALL.to_vec(),
        regions: RegionStream { iter_perc: regions.number("iter_perc")? },
        data: BatchConfig {
            seed: train.seed,
            batch_size: images.size("batch_size")?,
            tokenized,
            regions_tokenized: (regions_tokenized != tokenized).then_some(regions_tokenized),
            masking: masking(&root)?,
            ..region_batches(&regions, &model)?
        },
        loader: workers(&images)?,
        image_cache_mib: default_cache(),
        model: model.model,
        train,
        // What the published models were trained with.
        itc_gradient: ItcGradient::Original,
        stored: default_stored(),
    })
}

/// Shards, and where their records have what.
pub(super) fn sources(root: &Section, field: &str, stream: &Section) -> Result<Vec<SourceConfig>, ConfigProblem> {
    stream.refuse_unknown(STREAM_KEYS)?;
    let key = |field: &str| stream.has(field).then(|| stream.text_or(field, "")).transpose();
    let is_image_rpath = stream.has("is_image_rpath").then(|| stream.flag_or("is_image_rpath", false)).transpose()?;
    let keys = RecordKeys { image_key: key("image_key")?, is_image_rpath, caption_key: key("caption_key")? };
    // The original opens paths as they are: relative to where it was started.
    let image_root = (is_image_rpath == Some(true)).then(|| PathBuf::from("."));
    let source =
        |file| SourceConfig { image_root: image_root.clone(), keys: keys.clone(), ..SourceConfig::files([file]) };
    Ok(root.texts(field)?.into_iter().map(source).collect())
}

/// Batches of regions. (`regions.batch_size` counts texts, `regions.max_regions` those of one image.)
pub(super) fn region_batches(regions: &Section, model: &ModelConfig) -> Result<BatchConfig, ConfigProblem> {
    let default = BatchConfig::default();
    Ok(BatchConfig {
        max_images: regions.size("max_images")?,
        max_regions: regions.size("batch_size")?,
        regions_per_image: regions.size("max_regions")?,
        min_perc_in_image: regions.number("min_perc_in_image")?,
        max_tokens: model.max_tokens,
        max_words: model.max_words,
        careful_hflip: regions.flag_or("careful_hflip", default.careful_hflip)?,
        tokenized: regions.flag_or("tokenized", false)?,
        ..default
    })
}

/// Which tokens are hidden.
pub(super) fn masking(root: &Section) -> Result<MaskingGenerator, ConfigProblem> {
    let default = MaskingGenerator::default();
    Ok(MaskingGenerator {
        mask_prob: root.number_or("mask_prob", default.mask_prob)?,
        max_masks: root.size_or("max_masks", default.max_masks)?,
        mask_whole_word: root.flag_or("mask_whole_word", default.mask_whole_word)?,
        skipgram_prb: root.number_or("skipgram_prb", default.skipgram_prb)?,
        skipgram_size: root.size_or("skipgram_size", default.skipgram_size)?,
    })
}

/// The threads that build batches.
pub(super) fn workers(stream: &Section) -> Result<LoaderConfig, ConfigProblem> {
    let default = LoaderConfig::default();
    Ok(LoaderConfig { workers: stream.size_or("num_workers", default.workers)?, ..default })
}

/// How to train: `optimizer`, `schedular` and `accelerator`. Parameters of which the name contains one of `lr_mult_names` get
/// `lr_mult`: what the original's class of the task has in `init_params`. Scripts that know no `accelerator` do not clip.
pub(super) fn training(root: &Section, lr_mult_names: Vec<String>) -> Result<Training, ConfigProblem> {
    let (optimizer, schedule) = (root.section("optimizer")?, root.section("schedular")?);
    let accelerator = root.section("accelerator")?;
    optimizer.refuse_unknown(OPTIMIZER_KEYS)?;
    schedule.refuse_unknown(SCHEDULE_KEYS)?;
    accelerator.refuse_unknown(ACCELERATOR_KEYS)?;
    // What would mean something else here.
    optimizer.expect_text("opt", "adamW")?;
    schedule.expect_text("sched", "linear")?;
    accelerator.expect_text("FP16_LOSS_SCALE", "dynamic")?;
    // 16 bits with weights in 32 (apex's O1 and O2); what keeps these apart is settled by the model here.
    let precision = match accelerator.text_or("FP16_OPT_LEVEL", "O0")?.as_str() {
        "O0" => Precision::F32,
        "O1" | "O2" => Precision::F16,
        other => return Err(accelerator.problem("FP16_OPT_LEVEL", "O0, O1 or O2", other)),
    };
    let clip = match root.has("accelerator") {
        true => accelerator.number_or("CLIP_GRAD_NORM", 1.0)?,
        false => 0.0,
    };
    let (epochs, iterations) = match schedule.has("num_training_steps") {
        true => (None, schedule.size("num_training_steps")? as u64),
        false => (Some(schedule.size("epochs")? as u64), TrainConfig::default().iterations),
    };
    let config = TrainConfig {
        iterations,
        optimizer: OptimizerConfig {
            lr: optimizer.number("lr")?,
            weight_decay: optimizer.number("weight_decay")?,
            lr_mult: optimizer.number_or("lr_mult", 1.0)?,
            lr_mult_names,
            ..OptimizerConfig::default()
        },
        schedule: ScheduleConfig {
            // As the original: a share if it is below 1.
            warmup: match schedule.number("num_warmup_steps")? {
                share if share < 1.0 => Warmup::Fraction(share),
                steps => Warmup::Iterations(steps as u64),
            },
            ..ScheduleConfig::default()
        },
        clip: (clip > 0.0).then_some(clip as f32),
        accumulate: accelerator.size_or("GRAD_ACCUMULATE_STEPS", 1)?,
        precision,
        seed: accelerator.size_or("RNG_SEED", 42)? as u64,
        ..TrainConfig::default()
    };
    Ok(Training { epochs, config })
}
