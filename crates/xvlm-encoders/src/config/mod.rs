//! Sizes of the model. Field names are those of the official configuration files.

mod vision;

use serde::{Deserialize, Serialize};

pub use vision::{Activation, SwinConfig, VisionConfig, VitConfig, VitFamily};

/// A size that cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("model configuration: {field}: expected {expected}, found {found}")]
pub struct ConfigError {
    /// The field, with its section.
    pub field: &'static str,
    /// What it should be.
    pub expected: String,
    /// What it is.
    pub found: String,
}

/// What no size of a model reaches: products of two of them are still numbers.
const LARGEST: usize = 1 << 24;
/// What no stack of layers reaches.
const MOST_LAYERS: usize = 256;

/// Refuses the first size that is larger than any model has.
fn bounded(sizes: &[(&'static str, usize)]) -> Result<(), ConfigError> {
    let expected = || format!("at most {LARGEST}");
    sizes.iter().try_for_each(|&(field, size)| ensure(size <= LARGEST, field, expected(), size))
}

fn ensure(
    holds: bool,
    field: &'static str,
    expected: impl Into<String>,
    found: impl ToString,
) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError { field, expected: expected.into(), found: found.to_string() }) }
}

/// How positions are counted, and what parameters outside the layers are called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextModel {
    /// As in BERT: from 0.
    #[default]
    Bert,
    /// As in RoBERTa (Liu et al. 2019): from `pad_token_id + 1`, padding not counted.
    Roberta,
}

/// A BERT (Devlin et al. 2019) whose layers from [`Self::fusion_layer`] upwards have cross attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BertConfig {
    /// Whose conventions it follows.
    #[serde(default)]
    pub model_type: TextModel,
    /// The token that fills up short texts; its embedding is never trained.
    #[serde(default)]
    pub pad_token_id: u32,
    /// Number of different tokens.
    pub vocab_size: usize,
    /// Width of the tokens.
    pub hidden_size: usize,
    /// Number of layers, text and fusion together.
    pub num_hidden_layers: usize,
    /// Index of the first layer that has cross attention.
    pub fusion_layer: usize,
    /// Attention heads of each layer.
    pub num_attention_heads: usize,
    /// Width of the hidden layer of a block.
    pub intermediate_size: usize,
    /// Longest text, in tokens.
    pub max_position_embeddings: usize,
    /// Number of token types (X-VLM uses the first only).
    #[serde(default = "default_token_types")]
    pub type_vocab_size: usize,
    /// Added to variances in layer normalisation.
    #[serde(default = "default_eps")]
    pub layer_norm_eps: f64,
    /// Dropout on hidden states.
    #[serde(default)]
    pub hidden_dropout_prob: f64,
    /// Dropout on attention probabilities.
    #[serde(default)]
    pub attention_probs_dropout_prob: f64,
    /// Standard deviation of freshly drawn weights.
    #[serde(default = "default_range")]
    pub initializer_range: f64,
}

fn default_token_types() -> usize {
    2
}

fn default_eps() -> f64 {
    1e-12
}

fn default_range() -> f64 {
    0.02
}

impl BertConfig {
    /// BERT-base with cross attention in its upper half.
    pub fn base() -> Self {
        Self {
            model_type: TextModel::Bert,
            pad_token_id: 0,
            vocab_size: 30_522,
            hidden_size: 768,
            num_hidden_layers: 12,
            fusion_layer: 6,
            num_attention_heads: 12,
            intermediate_size: 3072,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            initializer_range: 0.02,
        }
    }

    /// RoBERTa-base with cross attention in its upper half.
    pub fn roberta_base() -> Self {
        Self {
            model_type: TextModel::Roberta,
            pad_token_id: 1,
            vocab_size: 50_265,
            max_position_embeddings: 514,
            type_vocab_size: 1,
            layer_norm_eps: 1e-5,
            ..Self::base()
        }
    }

    /// Longest text, in tokens.
    pub fn longest_text(&self) -> usize {
        match self.model_type {
            TextModel::Bert => self.max_position_embeddings,
            TextModel::Roberta => self.max_position_embeddings.saturating_sub(self.pad_token_id as usize + 1),
        }
    }

    /// The decoder that reads the states of this encoder: as many layers as this has fusion layers, each with cross
    /// attention (`models/model_vqa.py`).
    pub fn decoder(&self) -> Self {
        Self { num_hidden_layers: self.num_hidden_layers - self.fusion_layer, fusion_layer: 0, ..self.clone() }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let layers = self.num_hidden_layers;
        ensure(
            (1..=MOST_LAYERS).contains(&layers),
            "text_config.num_hidden_layers",
            format!("1 to {MOST_LAYERS}"),
            layers,
        )?;
        bounded(&[
            ("text_config.vocab_size", self.vocab_size),
            ("text_config.hidden_size", self.hidden_size),
            ("text_config.intermediate_size", self.intermediate_size),
            ("text_config.max_position_embeddings", self.max_position_embeddings),
            ("text_config.type_vocab_size", self.type_vocab_size),
        ])?;
        ensure(self.vocab_size > 0, "text_config.vocab_size", "a positive number", self.vocab_size)?;
        ensure(
            self.num_attention_heads > 0
                && self.hidden_size > 0
                && self.hidden_size.is_multiple_of(self.num_attention_heads),
            "text_config.num_attention_heads",
            format!("a divisor of hidden_size ({})", self.hidden_size),
            self.num_attention_heads,
        )?;
        ensure(
            self.fusion_layer < self.num_hidden_layers,
            "text_config.fusion_layer",
            format!("less than num_hidden_layers ({})", self.num_hidden_layers),
            self.fusion_layer,
        )?;
        ensure(self.type_vocab_size > 0, "text_config.type_vocab_size", "at least 1", self.type_vocab_size)?;
        ensure(self.intermediate_size > 0, "text_config.intermediate_size", "at least 1", self.intermediate_size)?;
        let positions = self.max_position_embeddings;
        ensure(self.longest_text() > 0, "text_config.max_position_embeddings", "room for one token", positions)?;
        let (padding, words) = (self.pad_token_id, self.vocab_size);
        ensure((padding as usize) < words, "text_config.pad_token_id", format!("less than {words}"), padding)?;
        for (field, probability) in [
            ("text_config.hidden_dropout_prob", self.hidden_dropout_prob),
            ("text_config.attention_probs_dropout_prob", self.attention_probs_dropout_prob),
        ] {
            ensure((0.0..1.0).contains(&probability), field, "0 to below 1", probability)?;
        }
        Ok(())
    }
}

/// What a model is for. It decides which parts the model has; each is what the class of that name in the original has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// All losses of pre-training (`models/model_pretrain.py`).
    #[default]
    Pretrain,
    /// Search (`models/model_retrieval.py`): contrast and matching.
    Retrieval,
    /// The box of a text (`models/model_bbox.py`).
    Grounding,
    /// A statement about two images (`models/model_nlvr.py`).
    Nlvr,
    /// Which of two images a text is about (`models/model_nlvr_pretrain.py`): prepares [`Task::Nlvr`].
    NlvrPretrain,
    /// Questions (`models/model_vqa.py`): an encoder of questions, a decoder of answers.
    Vqa,
    /// Captions (`models/model_captioning.py`): a decoder alone.
    Captioning,
}

impl Task {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Pretrain, Self::Retrieval, Self::Grounding, Self::Nlvr, Self::NlvrPretrain, Self::Vqa, Self::Captioning];

    /// The task of a name in configurations.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pretrain => "pretrain",
            Self::Retrieval => "retrieval",
            Self::Grounding => "grounding",
            Self::Nlvr => "nlvr",
            Self::NlvrPretrain => "nlvr_pretrain",
            Self::Vqa => "vqa",
            Self::Captioning => "captioning",
        }
    }
}

/// The whole model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct XvlmConfig {
    /// What the model is for.
    #[serde(default)]
    pub task: Task,
    /// The vision encoder.
    pub vision_config: VisionConfig,
    /// The text and fusion layers.
    pub text_config: BertConfig,
    /// Width of the embeddings that contrastive learning and search compare.
    pub embed_dim: usize,
    /// The temperature that similarities are divided by, before training.
    #[serde(default = "default_temp")]
    pub temp: f64,
}

fn default_temp() -> f64 {
    0.07
}

impl XvlmConfig {
    /// The base model (216 M parameters) at a resolution.
    pub fn base(image_res: usize) -> Self {
        Self::with_vision(VisionConfig::Swin(SwinConfig::base(image_res)))
    }

    /// BERT-base and a vision encoder.
    pub fn with_vision(vision_config: VisionConfig) -> Self {
        Self { task: Task::Pretrain, vision_config, text_config: BertConfig::base(), embed_dim: 256, temp: 0.07 }
    }

    /// Models of the original's configurations, by name: vision encoder, size, text encoder if it is not BERT, resolution.
    pub const PRESETS: [&str; 9] = [
        "base-224",
        "base-384",
        "base-480",
        "base-roberta-224",
        "base-roberta-384",
        "clip-vit-base-224",
        "clip-vit-base-384",
        "deit-base-224",
        "deit-base-384",
    ];

    /// The model of one of [`Self::PRESETS`], at 224 pixels if the name tells no resolution; none if there is none of that name.
    pub fn preset(name: &str) -> Option<Self> {
        let is_named = |preset: &&&str| **preset == name || preset.strip_suffix("-224") == Some(name);
        let known = Self::PRESETS.iter().find(is_named)?;
        let (kind, image_res) = known.rsplit_once('-')?;
        let image_res = image_res.parse().ok()?;
        let mut config = Self::with_vision(match kind {
            "clip-vit-base" => VisionConfig::Vit(VitConfig::clip_base(image_res)),
            "deit-base" => VisionConfig::Vit(VitConfig::deit_base(image_res)),
            _ => VisionConfig::Swin(SwinConfig::base(image_res)),
        });
        if kind.ends_with("roberta") {
            config.text_config = BertConfig::roberta_base();
        }
        Some(config)
    }

    /// The same model for images of another size. The windows of a Swin transformer grow with the image, as in the original
    /// (7 tokens at 224 pixels, 12 at 384).
    ///
    /// # Errors
    /// If no whole window, or no whole number of patches, fits.
    pub fn at_resolution(mut self, image_res: usize) -> Result<Self, ConfigError> {
        match &mut self.vision_config {
            VisionConfig::Vit(vit) => vit.image_res = image_res,
            VisionConfig::Swin(swin) => {
                let window = swin.window_size.saturating_mul(image_res);
                let grows = swin.image_res > 0 && window.is_multiple_of(swin.image_res) && window > 0;
                let expected = || {
                    format!(
                        "one at which windows of {} tokens at {} grow to whole ones",
                        swin.window_size, swin.image_res
                    )
                };
                ensure(grows, "vision_config.image_res", expected(), image_res)?;
                swin.window_size = window / swin.image_res;
                swin.image_res = image_res;
            }
        }
        self.validate()?;
        Ok(self)
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// Names the first field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.vision_config.validate()?;
        self.text_config.validate()?;
        ensure((1..=LARGEST).contains(&self.embed_dim), "embed_dim", format!("1 to {LARGEST}"), self.embed_dim)?;
        ensure(self.temp > 0.0, "temp", "a positive number", self.temp)
    }
}
