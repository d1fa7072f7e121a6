//! The configuration files of the original repository (`configs/*.yaml`, `configs/config_*.json`), read as they are.
//!
//! A YAML file of the original tells data, model and training together, with the vision and text encoders in JSON files of
//! their own. Those are looked for where the file says: in the working directory, beside the file, and in the folders above
//! it.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use xvlm_data::{BatchConfig, MaskingGenerator, RecordKeys, SourceConfig};
use xvlm_encoders::{
    Activation, BertConfig, SwinConfig, Task, TextModel, VisionConfig, VitConfig, VitFamily, XvlmConfig,
};
use xvlm_train::{OptimizerConfig, ScheduleConfig, TrainConfig, Warmup};

use crate::config::{ItcGradient, PretrainConfig, RegionStream, suggestion};
use crate::error::ConfigProblem;
use crate::model::ModelConfig;
use crate::search::Search;

/// Side of a patch of every Swin of the original, before patches merge.
const SWIN_PATCH: usize = 4;

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
        vision_config: vision(&root)?,
        text_config: text(&root)?,
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

/// A pre-training configuration of the original (`configs/Pretrain_XVLM_*.yaml`), for one process. Where it does not say
/// `careful_hflip`, pictures whose texts say left or right are not mirrored, which the original does.
///
/// # Errors
/// As [`from_official`].
pub fn pretrain_config(config: &Value, path: &Path) -> Result<PretrainConfig, ConfigProblem> {
    let root = Section::new(config, path)?;
    let (images, regions) = (root.section("images")?, root.section("regions")?);
    let (optimizer, schedule) = (root.section("optimizer")?, root.section("schedular")?);
    let accelerator = root.section("accelerator")?;
    // What would mean something else here.
    optimizer.expect_text("opt", "adamW")?;
    schedule.expect_text("sched", "linear")?;
    accelerator.expect("GRAD_ACCUMULATE_STEPS", 1)?;
    if root.flag_or("calc_image_bbox_loss", false)? {
        return Err(root.problem("calc_image_bbox_loss", "false", "true"));
    }
    let tokenized = images.flag_or("tokenized", false)?;
    if regions.flag_or("tokenized", false)? != tokenized {
        let expected = format!("{tokenized}, as in images");
        return Err(regions.problem("tokenized", &expected, &(!tokenized).to_string()));
    }
    let model = from_official(config, path, Task::Pretrain)?;
    let batch_size = images.size("batch_size")?;
    let epochs = schedule.size("epochs")?;
    let records = root.size("train_dataset_size")?;
    let seed = accelerator.size_or("RNG_SEED", 42)? as u64;
    let default = BatchConfig::default();
    let sources = |field: &str, stream: &Section| -> Result<Vec<SourceConfig>, ConfigProblem> {
        stream.refuse_unknown(STREAM_KEYS)?;
        let key = |field: &str| stream.has(field).then(|| stream.text_or(field, "")).transpose();
        let is_image_rpath =
            stream.has("is_image_rpath").then(|| stream.flag_or("is_image_rpath", false)).transpose()?;
        let keys = RecordKeys { image_key: key("image_key")?, is_image_rpath, caption_key: key("caption_key")? };
        // The original opens paths as they are: relative to where it was started.
        let image_root = (is_image_rpath == Some(true)).then(|| PathBuf::from("."));
        let source =
            |file| SourceConfig { image_root: image_root.clone(), keys: keys.clone(), ..SourceConfig::files([file]) };
        Ok(root.texts(field)?.into_iter().map(source).collect())
    };
    Ok(PretrainConfig {
        train_file: sources("train_file", &images)?,
        train_file_regions: sources("train_file_regions", &regions)?,
        dataset: Default::default(),
        tokenizer: Some(tokenizer(&root, model.model.text_config.model_type)?),
        init_from: None,
        model: model.model,
        objectives: crate::Objective::ALL.to_vec(),
        regions: RegionStream { iter_perc: regions.number("iter_perc")? },
        data: BatchConfig {
            seed,
            batch_size,
            max_images: regions.size("max_images")?,
            max_regions: regions.size("batch_size")?,
            regions_per_image: regions.size("max_regions")?,
            min_perc_in_image: regions.number("min_perc_in_image")?,
            max_tokens: model.max_tokens,
            max_words: model.max_words,
            tokenized,
            careful_hflip: regions.flag_or("careful_hflip", default.careful_hflip)?,
            masking: MaskingGenerator {
                mask_prob: root.number_or("mask_prob", default.masking.mask_prob)?,
                max_masks: root.size_or("max_masks", default.masking.max_masks)?,
                mask_whole_word: root.flag_or("mask_whole_word", default.masking.mask_whole_word)?,
                skipgram_prb: root.number_or("skipgram_prb", default.masking.skipgram_prb)?,
                skipgram_size: root.size_or("skipgram_size", default.masking.skipgram_size)?,
            },
            ..default
        },
        loader: Default::default(),
        image_cache_mib: 2048,
        train: TrainConfig {
            iterations: (epochs * records.div_ceil(batch_size.max(1))) as u64,
            optimizer: OptimizerConfig {
                lr: optimizer.number("lr")?,
                weight_decay: optimizer.number("weight_decay")?,
                lr_mult: optimizer.number_or("lr_mult", 1.0)?,
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
            clip: Some(accelerator.number_or("CLIP_GRAD_NORM", 1.0)? as f32),
            seed,
            ..TrainConfig::default()
        },
        // What the published models were trained with.
        itc_gradient: ItcGradient::Original,
        stored: xvlm_weights::StoredType::F32,
    })
}

/// The vocabulary in the folder that the original's `BertTokenizer` or `RobertaTokenizer` is read from.
fn tokenizer(root: &Section, model: TextModel) -> Result<PathBuf, ConfigProblem> {
    let (folder, file) = match model {
        TextModel::Bert => ("data/bert-base-uncased", "vocab.txt"),
        TextModel::Roberta => ("data/roberta-base", "vocab.json"),
    };
    Ok(PathBuf::from(root.text_or("text_encoder", folder)?).join(file))
}

fn vision(root: &Section) -> Result<VisionConfig, ConfigProblem> {
    let image_res = root.size("image_res")?;
    let patch_size = root.size("patch_size")?;
    if root.flag_or("use_clip_vit", false)? {
        let vision = root.file("vision_config")?;
        vision.expect("patch_size", patch_size)?;
        return Ok(VisionConfig::Vit(VitConfig {
            hidden_size: vision.size("vision_width")?,
            num_hidden_layers: vision.size("num_hidden_layers")?,
            num_attention_heads: vision.size("num_attention_heads")?,
            intermediate_size: vision.size("intermediate_size")?,
            local_attn_depth: vision.size("local_attn_depth")?,
            hidden_act: activation(&vision, Activation::QuickGelu)?,
            attention_dropout: vision.number_or("attention_dropout", 0.0)?,
            patch_size,
            ..VitConfig::clip_base(image_res)
        }));
    }
    if root.flag_or("use_swin", false)? {
        let vision = root.file("vision_config")?;
        vision.expect("image_res", image_res)?;
        let swin = swin(&vision)?;
        let valid = swin.validate();
        valid.map_err(|error| vision.problem("", &error.expected, &format!("{} {}", error.field, error.found)))?;
        let width = swin.width();
        vision.expect("vision_width", width)?;
        root.expect("patch_size", swin.stride())?;
        return Ok(VisionConfig::Swin(swin));
    }
    root.expect("patch_size", 16)?;
    Ok(VisionConfig::Vit(VitConfig::deit_base(image_res)))
}

fn swin(vision: &Section) -> Result<SwinConfig, ConfigProblem> {
    Ok(SwinConfig {
        embed_dim: vision.size("embed_dim")?,
        depths: vision.sizes("depths")?,
        num_heads: vision.sizes("num_heads")?,
        window_size: vision.size("window_size")?,
        patch_size: SWIN_PATCH,
        ..SwinConfig::base(vision.size("image_res")?)
    })
}

fn activation(section: &Section, default: Activation) -> Result<Activation, ConfigProblem> {
    let name = match default {
        Activation::Gelu => "gelu",
        Activation::QuickGelu => "quick_gelu",
    };
    match section.text_or("hidden_act", name)?.as_str() {
        "gelu" => Ok(Activation::Gelu),
        "quick_gelu" => Ok(Activation::QuickGelu),
        other => Err(section.problem("hidden_act", "gelu or quick_gelu", other)),
    }
}

fn text(root: &Section) -> Result<BertConfig, ConfigProblem> {
    let text = root.file("text_config")?;
    let config = bert(&text)?;
    let is_roberta = config.model_type == TextModel::Roberta;
    let says_roberta = root.flag_or("use_roberta", is_roberta)?;
    if says_roberta != is_roberta {
        let expected = format!("{is_roberta}, as model_type of {} says", text.file.display());
        return Err(root.problem("use_roberta", &expected, &says_roberta.to_string()));
    }
    Ok(config)
}

fn bert(text: &Section) -> Result<BertConfig, ConfigProblem> {
    let (model_type, base) = match text.text_or("model_type", "bert")?.as_str() {
        "bert" => (TextModel::Bert, BertConfig::base()),
        "roberta" => (TextModel::Roberta, BertConfig::roberta_base()),
        other => return Err(text.problem("model_type", "bert or roberta", other)),
    };
    if text.text_or("hidden_act", "gelu")? != "gelu" {
        return Err(text.problem("hidden_act", "gelu", &text.text_or("hidden_act", "")?));
    }
    Ok(BertConfig {
        model_type,
        pad_token_id: text.size_or("pad_token_id", base.pad_token_id as usize)? as u32,
        vocab_size: text.size("vocab_size")?,
        hidden_size: text.size("hidden_size")?,
        num_hidden_layers: text.size("num_hidden_layers")?,
        fusion_layer: text.size("fusion_layer")?,
        num_attention_heads: text.size("num_attention_heads")?,
        intermediate_size: text.size("intermediate_size")?,
        max_position_embeddings: text.size("max_position_embeddings")?,
        type_vocab_size: text.size_or("type_vocab_size", base.type_vocab_size)?,
        layer_norm_eps: text.number_or("layer_norm_eps", base.layer_norm_eps)?,
        hidden_dropout_prob: text.number_or("hidden_dropout_prob", 0.1)?,
        attention_probs_dropout_prob: text.number_or("attention_probs_dropout_prob", 0.1)?,
        initializer_range: text.number_or("initializer_range", 0.02)?,
    })
}

/// A vision encoder's own configuration: a JSON file of the original, or the arguments of its class (`SwinTransformer`,
/// `CLIPVisionTransformer`, `VisionTransformer`).
///
/// # Errors
/// As [`from_official`].
pub fn vision_config(config: &Value, path: &Path) -> Result<VisionConfig, ConfigProblem> {
    let section = Section::new(config, path)?;
    if section.has("window_size") {
        return Ok(VisionConfig::Swin(swin(&section)?));
    }
    let eps = |default| section.number_or("norm_eps", default);
    Ok(VisionConfig::Vit(if section.has("hidden_act") {
        VitConfig {
            patch_size: section.size("patch_size")?,
            hidden_size: section.size("hidden_size").or_else(|_| section.size("vision_width"))?,
            num_hidden_layers: section.size("num_hidden_layers")?,
            num_attention_heads: section.size("num_attention_heads")?,
            intermediate_size: section.size("intermediate_size")?,
            local_attn_depth: section.size_or("local_attn_depth", 4)?,
            hidden_act: activation(&section, Activation::QuickGelu)?,
            norm_eps: eps(1e-5)?,
            ..VitConfig::clip_base(section.size("image_size")?)
        }
    } else {
        let width = section.size("embed_dim")?;
        VitConfig {
            family: VitFamily::Deit,
            patch_size: section.size("patch_size")?,
            hidden_size: width,
            num_hidden_layers: section.size("depth")?,
            num_attention_heads: section.size("num_heads")?,
            intermediate_size: (section.number_or("mlp_ratio", 4.0)? * width as f64) as usize,
            local_attn_depth: section.size_or("local_attn_depth", 4)?,
            norm_eps: eps(1e-6)?,
            ..VitConfig::deit_base(section.size("img_size")?)
        }
    }))
}

/// A text encoder's own configuration: `config_bert.json`, `config_roberta.json`.
///
/// # Errors
/// As [`from_official`].
pub fn text_config(config: &Value, path: &Path) -> Result<BertConfig, ConfigProblem> {
    bert(&Section::new(config, path)?)
}

/// Named values of a file, or of a part of one.
struct Section {
    values: Map<String, Value>,
    file: PathBuf,
    /// What goes before a name in messages.
    prefix: String,
}

impl Section {
    fn new(value: &Value, file: &Path) -> Result<Self, ConfigProblem> {
        let section = Self { values: Map::new(), file: file.to_owned(), prefix: String::new() };
        match value {
            Value::Object(values) => Ok(Self { values: values.clone(), ..section }),
            other => Err(section.problem("", "a mapping of names to values", &other.to_string())),
        }
    }

    fn problem(&self, field: &str, expected: &str, found: &str) -> ConfigProblem {
        let message = format!("{}{field}: expected {expected}, found {found}", self.prefix);
        ConfigProblem { file: self.file.display().to_string(), message }
    }

    fn has(&self, field: &str) -> bool {
        self.values.contains_key(field)
    }

    /// A value as `read` understands it.
    fn get<T>(
        &self,
        field: &str,
        default: Option<T>,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, ConfigProblem> {
        match (self.values.get(field), default) {
            (Some(value), _) => read(value).ok_or_else(|| self.problem(field, expected, &value.to_string())),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.problem(field, expected, "nothing")),
        }
    }

    fn size(&self, field: &str) -> Result<usize, ConfigProblem> {
        self.get(field, None, "a whole number", size)
    }

    fn size_or(&self, field: &str, default: usize) -> Result<usize, ConfigProblem> {
        self.get(field, Some(default), "a whole number", size)
    }

    fn sizes(&self, field: &str) -> Result<Vec<usize>, ConfigProblem> {
        self.get(field, None, "a list of whole numbers", |value| value.as_array()?.iter().map(size).collect())
    }

    fn number(&self, field: &str) -> Result<f64, ConfigProblem> {
        self.get(field, None, "a number", number)
    }

    fn number_or(&self, field: &str, default: f64) -> Result<f64, ConfigProblem> {
        self.get(field, Some(default), "a number", number)
    }

    fn flag_or(&self, field: &str, default: bool) -> Result<bool, ConfigProblem> {
        self.get(field, Some(default), "true or false", Value::as_bool)
    }

    fn text_or(&self, field: &str, default: &str) -> Result<String, ConfigProblem> {
        self.get(field, Some(default.to_owned()), "a text", |value| value.as_str().map(str::to_owned))
    }

    fn texts(&self, field: &str) -> Result<Vec<String>, ConfigProblem> {
        self.get(field, Some(Vec::new()), "a list of texts", |value| {
            value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
        })
    }

    /// Checks a size that the file says a second time.
    fn expect(&self, field: &str, expected: usize) -> Result<(), ConfigProblem> {
        match self.size_or(field, expected)? {
            found if found == expected => Ok(()),
            found => Err(self.problem(field, &expected.to_string(), &found.to_string())),
        }
    }

    /// Checks a word that only one is understood of.
    fn expect_text(&self, field: &str, expected: &str) -> Result<(), ConfigProblem> {
        match self.text_or(field, expected)? {
            found if found == expected => Ok(()),
            found => Err(self.problem(field, expected, &found)),
        }
    }

    fn refuse_unknown(&self, known: &[&str]) -> Result<(), ConfigProblem> {
        match self.values.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(unknown) => {
                let message = format!("unknown field `{unknown}`{}", suggestion(unknown, known.iter().copied()));
                Err(ConfigProblem { file: self.file.display().to_string(), message })
            }
        }
    }

    /// A part of the file; empty if it is not there.
    fn section(&self, field: &str) -> Result<Self, ConfigProblem> {
        let values = self.get(field, Some(Map::new()), "a mapping", |value| value.as_object().cloned())?;
        Ok(Self { values, file: self.file.clone(), prefix: format!("{}{field}.", self.prefix) })
    }

    /// A part of the file, or a file of its own that is named there.
    fn file(&self, field: &str) -> Result<Self, ConfigProblem> {
        let name = match self.values.get(field) {
            Some(Value::String(name)) => name,
            Some(Value::Object(_)) => return self.section(field),
            Some(other) => return Err(self.problem(field, "a file or a mapping", &other.to_string())),
            None => return Err(self.problem(field, "a file or a mapping", "nothing")),
        };
        let above = self.file.ancestors().skip(1).map(|folder| folder.join(name));
        let tried: Vec<PathBuf> = [PathBuf::from(name)].into_iter().chain(above).collect();
        match tried.iter().find(|path| path.is_file()) {
            Some(path) => Self::new(&read(path)?, path),
            None => {
                Err(self.problem(field, "a file that is there", &format!("{name}, neither here nor above the file")))
            }
        }
    }
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok())
}

/// A number; YAML 1.1 reads `1e-4`, which has no point, as a text.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}
