//! Fine-tuning configurations of the original. What its scripts and `dataset/__init__.py` settle without asking a file is
//! filled in.

use std::path::Path;

use serde_json::Value;
use xvlm_data::{BatchConfig, ItemConfig, LoaderConfig};
use xvlm_encoders::BertConfig;

use super::pretrain::{masking, region_batches, sources, training, workers};
use super::section::Section;
use super::{from_official, tokenizer};
use crate::config::{ItcGradient, default_cache, default_stored};
use crate::error::ConfigProblem;
use crate::finetune::{
    Baseline, BboxPretrainTask, BboxTask, CaptioningTask, FinetuneConfig, FinetuneKind, FinetuneTask, NlvrTask,
    PairsTask, RetrievalTask, ScstTask, VqaTask, WeakGroundingTask,
};
use crate::model::ModelConfig;

/// Threads of each loader in the original's scripts of fine-tuning.
const WORKERS: usize = 4;

/// A fine-tuning configuration of the original (`configs/*.yaml`, `configs/vlue-base-test/*.yaml`); sizes of batches are those
/// of one process, as there. Pictures whose texts say left or right are not mirrored, which the original does where it does
/// not look at texts.
///
/// # Errors
/// As [`from_official`].
pub fn finetune_config(config: &Value, path: &Path, kind: FinetuneKind) -> Result<FinetuneConfig, ConfigProblem> {
    let root = Section::new(config, path)?;
    let model = from_official(config, path, kind.model_task())?;
    model.model.validate().map_err(|error| root.problem(error.field, &error.expected, &error.found))?;
    root.expect_off("load_bertL_by_sep")?;
    let loader = match kind {
        FinetuneKind::NlvrPretrain | FinetuneKind::CaptioningPretrain => workers(&root.section("images")?)?,
        FinetuneKind::BboxPretrain => workers(&root.section("regions")?)?,
        _ => LoaderConfig { workers: WORKERS, ..LoaderConfig::default() },
    };
    let trains = root.has("optimizer");
    let mut train = trains.then(|| training(&root, fresh(kind, &model.model.text_config))).transpose()?;
    if kind == FinetuneKind::CaptioningScst {
        // The model is evaluated where a checkpoint is made.
        let steps = root.size("eval_steps")? as u64;
        train.iter_mut().for_each(|train| train.checkpoint_every = steps);
    }
    Ok(FinetuneConfig {
        task: task(&root, kind, &model)?,
        tokenizer: Some(tokenizer(&root, model.model.text_config.model_type)?),
        init_from: None,
        loader,
        image_cache_mib: default_cache(),
        train,
        model: model.model,
        stored: default_stored(),
    })
}

/// Parts of the names of what a task's model does not get from pre-training (`init_params` of `models/model_*.py`).
fn fresh(kind: FinetuneKind, text: &BertConfig) -> Vec<String> {
    match kind {
        FinetuneKind::Nlvr => vec!["cls_head".to_owned()],
        FinetuneKind::NlvrPretrain => vec!["ta_head".to_owned()],
        // The decoder looks at states of questions, which are narrower than patches.
        FinetuneKind::Vqa => {
            let layers = 0..text.decoder().num_hidden_layers;
            let parameter =
                |layer: usize, of: &str| format!("text_decoder.bert.encoder.layer.{layer}.crossattention.self.{of}");
            layers.flat_map(|layer| [parameter(layer, "key"), parameter(layer, "value")]).collect()
        }
        _ => Vec::new(),
    }
}

fn task(root: &Section, kind: FinetuneKind, model: &ModelConfig) -> Result<FinetuneTask, ConfigProblem> {
    let [train_file, val_file, test_file] =
        [root.files("train_file")?, root.files("val_file")?, root.files("test_file")?];
    let image_root = || root.needed_path("image_root");
    let vlue_test = root.flag_or("vlue_test", false)?;
    let seed = root.section("accelerator")?.size_or("RNG_SEED", 42)? as u64;
    let pairs = |append_sep| -> Result<PairsTask, ConfigProblem> {
        let images = root.section("images")?;
        Ok(PairsTask {
            train_file: sources(root, "train_file", &images)?,
            train_dataset_size: root.size("train_dataset_size")? as u64,
            dataset: Default::default(),
            data: BatchConfig {
                seed,
                batch_size: images.size("batch_size")?,
                max_words: model.max_words,
                max_tokens: model.max_tokens,
                tokenized: images.flag_or("tokenized", false)?,
                append_sep,
                masking: masking(root)?,
                ..BatchConfig::default()
            },
        })
    };
    Ok(match kind {
        FinetuneKind::Retrieval => FinetuneTask::Retrieval(RetrievalTask {
            data: items(root, "batch_size_train")?,
            train_file,
            val_file,
            test_file,
            image_root: image_root()?,
            batch_size_test: root.size("batch_size_test")?,
            batch_size_test_text: root.size("batch_size_test_text")?,
            k_test: root.size("k_test")?,
            itc_gradient: ItcGradient::Original,
        }),
        FinetuneKind::Vqa => FinetuneTask::Vqa(VqaTask {
            data: items(root, "batch_size_train")?,
            train_file,
            test_file,
            answer_list: root.needed_path("answer_list")?,
            vqa_root: root.needed_path("vqa_root")?,
            vg_root: root.needed_path("vg_root")?,
            batch_size_test: root.size("batch_size_test")?,
            k_test: root.size("k_test")?,
            questions_per_image: 1,
            start_eval: root.size_or("start_eval", 0)? as u64,
        }),
        FinetuneKind::Nlvr => FinetuneTask::Nlvr(NlvrTask {
            // `NLVR.py` cuts texts by words, but not by tokens.
            data: ItemConfig {
                max_tokens: root.size_or("max_tokens", model.model.text_config.longest_text())?,
                ..items(root, "batch_size")?
            },
            train_file,
            val_file,
            test_file,
            image_root: image_root()?,
            batch_size_test: root.size("batch_size")?,
        }),
        FinetuneKind::NlvrPretrain => FinetuneTask::NlvrPretrain(pairs(false)?),
        FinetuneKind::WeakGrounding => FinetuneTask::WeakGrounding(WeakGroundingTask {
            // The whole image: a part of it may not have what the phrase means.
            data: ItemConfig { crop: None, ..items(root, "batch_size")? },
            train_file,
            test_file,
            image_root: image_root()?,
            refcoco_data: root.path("refcoco_data")?,
            det_file: root.path("det_file")?,
            coco_file: root.path("coco_file")?,
            vlue_test,
            itc_gradient: ItcGradient::Original,
            block_num: root.size("block_num")?,
            batch_size_test: root.size("batch_size")?,
        }),
        FinetuneKind::Bbox => FinetuneTask::Bbox(BboxTask {
            data: ItemConfig {
                careful_hflip: root.flag_or("careful_hflip", ItemConfig::default().careful_hflip)?,
                ..items(root, "batch_size")?
            },
            train_file,
            test_file,
            image_root: image_root()?,
            refcoco_data: root.path("refcoco_data")?,
            vlue_test,
            batch_size_test: root.size("batch_size")?,
        }),
        FinetuneKind::BboxPretrain => {
            root.expect_off("calc_image_bbox_loss")?;
            let regions = root.section("regions")?;
            // There is no other stream.
            if regions.number_or("iter_perc", 1.0)? != 1.0 {
                return Err(regions.problem("iter_perc", "1", &regions.number("iter_perc")?.to_string()));
            }
            FinetuneTask::BboxPretrain(BboxPretrainTask {
                train_file_regions: sources(root, "train_file_regions", &regions)?,
                train_dataset_size: root.size("train_dataset_size")? as u64,
                dataset: Default::default(),
                data: BatchConfig { seed, masking: masking(root)?, ..region_batches(&regions, model)? },
            })
        }
        FinetuneKind::Captioning => FinetuneTask::Captioning(CaptioningTask {
            data: captions(root)?,
            train_file,
            val_file,
            test_file,
            image_root: image_root()?,
            val_gt_file: root.needed_path("val_gt_file")?,
            test_gt_file: root.needed_path("test_gt_file")?,
            prompt: model.prompt.clone(),
            label_smoothing: root.number("label_smoothing")?,
            search: model.search,
            batch_size_test: root.size("batch_size_test")?,
            start_eval: root.size_or("start_eval", 0)? as u64,
        }),
        FinetuneKind::CaptioningPretrain => FinetuneTask::CaptioningPretrain(pairs(true)?),
        FinetuneKind::CaptioningScst => FinetuneTask::CaptioningScst(ScstTask {
            data: captions(root)?,
            train_file,
            val_file,
            test_file,
            image_root: image_root()?,
            val_gt_file: root.needed_path("val_gt_file")?,
            test_gt_file: root.needed_path("test_gt_file")?,
            prompt: model.prompt.clone(),
            search: model.search,
            cider_cached_tokens: Some(root.needed_path("cider_cached_tokens")?),
            sc_train_sample_n: root.size("sc_train_sample_n")?,
            sc_baseline_type: match root.text_or("sc_baseline_type", "greedy")?.as_str() {
                "greedy" => Baseline::Greedy,
                "sample" => Baseline::Sample,
                other => return Err(root.problem("sc_baseline_type", "greedy or sample", other)),
            },
            batch_size_test: root.size("batch_size_test")?,
        }),
    })
}

/// Batches of items. Texts have at most 30 words (the default of `dataset/*_dataset.py`), whatever the file says; a file that
/// only evaluates tells no size of training batches.
fn items(root: &Section, batch_size: &str) -> Result<ItemConfig, ConfigProblem> {
    let default = ItemConfig::default();
    Ok(ItemConfig {
        batch_size: root.size_or(batch_size, default.batch_size)?,
        max_tokens: root.size_or("max_tokens", default.max_tokens)?,
        ..default
    })
}

/// Batches of captions to be written, which have as many words as `max_tokens` says (`dataset/__init__.py`).
fn captions(root: &Section) -> Result<ItemConfig, ConfigProblem> {
    Ok(ItemConfig { max_words: root.size("max_tokens")?, ..items(root, "batch_size_train")? })
}
