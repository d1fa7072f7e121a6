//! The configuration files of the original repository (`configs/*.yaml`, `configs/config_*.json`), read as they are.
//!
//! A YAML file of the original tells data, model and training together, with the vision and text encoders in JSON files of
//! their own. Those are looked for where the file says: in the working directory, beside the file, and in the folders above
//! it.

mod encoders;
mod finetune;
mod pretrain;
mod section;

use std::path::{Path, PathBuf};

use serde_json::Value;
use xvlm_encoders::{Task, TextModel, XvlmConfig};

use crate::error::ConfigProblem;
use crate::model::ModelConfig;
use crate::search::Search;
use section::Section;

pub use encoders::{text_config, vision_config};
pub use finetune::finetune_config;
pub use pretrain::pretrain_config;

/// Whether a configuration is one of the original: it says which vision encoder it has in the original's words.
pub fn is_official(config: &Value) -> bool {
    ["use_swin", "use_clip_vit", "use_roberta"].iter().any(|key| config.get(key).is_some())
}

/// Reads YAML or JSON.
///
/// # Errors
/// If the file cannot be read, or holds no mapping.
pub fn read(path: &Path) -> Result<Value, ConfigProblem> {
    let problem = |message: String| ConfigProblem { file: path.display().to_string(), message };
    let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
    let value: Value = serde_norway::from_str(&text).map_err(|error| problem(error.to_string()))?;
    match value {
        Value::Object(_) => Ok(value),
        _ => Err(problem("expected a mapping of names to values, found something else".to_owned())),
    }
}

/// What `config.json` of a model folder says, from a configuration file: one of the original, or a `config.json`.
///
/// # Errors
/// If the file cannot be read, lacks a value, or its sizes do not fit together.
pub fn model_config(path: &Path, task: Task) -> Result<ModelConfig, ConfigProblem> {
    let value = read(path)?;
    let config = match is_official(&value) {
        true => from_official(&value, path, task)?,
        false => {
            let own: Result<ModelConfig, _> = serde_path_to_error::deserialize(&value);
            let mut own = own.map_err(|error| {
                let message = format!("{}: {}", error.path(), error.inner());
                ConfigProblem { file: path.display().to_string(), message }
            })?;
            own.model.task = task;
            own
        }
    };
    let valid = config.model.validate();
    valid.map_err(|error| ConfigProblem { file: path.display().to_string(), message: error.to_string() })?;
    Ok(config)
}

/// The same from a configuration of the original that has been read; `path` is its file, for messages and for the files it
/// names.
///
/// # Errors
/// If a value is missing or of the wrong type, or a file that is named cannot be read.
pub fn from_official(config: &Value, path: &Path, task: Task) -> Result<ModelConfig, ConfigProblem> {
    let root = Section::new(config, path)?;
    root.refuse_unknown(KEYS)?;
    let model = XvlmConfig {
        task,
        vision_config: encoders::vision(&root)?,
        text_config: encoders::text(&root)?,
        embed_dim: root.size_or("embed_dim", 256)?,
        temp: root.number_or("temp", 0.07)?,
    };
    if task == Task::Vqa {
        let text = &model.text_config;
        root.expect("num_dec_layers", text.num_hidden_layers.saturating_sub(text.fusion_layer))?;
    }
    let default = ModelConfig::of(model);
    let prompt = root.text_or("prompt", &default.prompt)?.trim().to_owned();
    // The original counts the prompt and its first token too; a word of it is a token of BERT.
    let begun = 1 + prompt.split_whitespace().count();
    let more = |field: &str, tokens: usize| Ok(root.size_or(field, begun + tokens)?.saturating_sub(begun));
    let search = Search {
        beams: root.size_or("num_beams", default.search.beams)?,
        min_tokens: more("min_length", default.search.min_tokens)?,
        max_tokens: more("max_length", default.search.max_tokens)?,
        ..default.search
    };
    let (max_tokens, max_words) =
        (root.size_or("max_tokens", default.max_tokens)?, root.size_or("max_words", default.max_words)?);
    Ok(ModelConfig { max_tokens, max_words, prompt, search, ..default })
}

/// What the original's YAML files have; what of it is not read here says how to fine-tune, or where files are.
const KEYS: &[&str] = &[
    "accelerator",
    "answer_list",
    "batch_size",
    "batch_size_test",
    "batch_size_test_text",
    "batch_size_train",
    "block_num",
    "calc_image_bbox_loss",
    "careful_hflip",
    "cider_cached_tokens",
    "ckpt_frequent",
    "ckpt_frequent_step",
    "coco_file",
    "det_file",
    "embed_dim",
    "eval_steps",
    "image_res",
    "image_root",
    "images",
    "k_test",
    "label_smoothing",
    "load_bertL_by_sep",
    "mask_prob",
    "mask_whole_word",
    "max_length",
    "max_masks",
    "max_tokens",
    "max_words",
    "min_length",
    "num_beams",
    "num_dec_layers",
    "optimizer",
    "pad_token_id",
    "patch_size",
    "prompt",
    "refcoco_data",
    "regions",
    "sc_baseline_type",
    "sc_beam_size",
    "sc_train_sample_n",
    "schedular",
    "skipgram_prb",
    "skipgram_size",
    "start_eval",
    "temp",
    "test_file",
    "test_gt_file",
    "text_config",
    "text_encoder",
    "train_dataset_size",
    "train_file",
    "train_file_regions",
    "use_clip_vit",
    "use_roberta",
    "use_swin",
    "val_file",
    "val_gt_file",
    "vg_root",
    "vision_config",
    "vlue_test",
    "vqa_root",
];

/// The vocabulary in the folder that the original's `BertTokenizer` or `RobertaTokenizer` is read from.
fn tokenizer(root: &Section, model: TextModel) -> Result<PathBuf, ConfigProblem> {
    let (folder, file) = match model {
        TextModel::Bert => ("data/bert-base-uncased", "vocab.txt"),
        TextModel::Roberta => ("data/roberta-base", "vocab.json"),
    };
    Ok(PathBuf::from(root.text_or("text_encoder", folder)?).join(file))
}
