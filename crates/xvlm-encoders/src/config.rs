//! Sizes of the model. Field names are those of the official configuration files.

use serde::{Deserialize, Serialize};

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

fn ensure(
    holds: bool,
    field: &'static str,
    expected: impl Into<String>,
    found: impl ToString,
) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError { field, expected: expected.into(), found: found.to_string() }) }
}

/// A Swin transformer (Liu et al. 2021).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwinConfig {
    /// Side of the square input, in pixels.
    pub image_res: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Width of the first stage; doubles with every stage.
    pub embed_dim: usize,
    /// Blocks of each stage.
    pub depths: Vec<usize>,
    /// Attention heads of each stage.
    pub num_heads: Vec<usize>,
    /// Side of an attention window, in tokens; a stage smaller than that has one window.
    pub window_size: usize,
    /// Width of the hidden layer of a block over its own width.
    #[serde(default = "default_mlp_ratio")]
    pub mlp_ratio: usize,
    /// Stochastic depth of the last block; rises linearly from 0.
    #[serde(default)]
    pub drop_path_rate: f64,
    /// Whether absolute position embeddings are added to the patches.
    #[serde(default)]
    pub ape: bool,
    /// Amplitude of the fixed sines and cosines of a patch's place that are added to it; none by default. Absolute position
    /// embeddings are drawn at random, one for each place, and take long to mean something; waves mean something at once.
    #[serde(default)]
    pub sine_positions: f64,
    /// Standard deviation of freshly drawn weights. 0.02; the original truncates at ±2, a hundred deviations away.
    #[serde(default = "default_range")]
    pub initializer_range: f64,
}

fn default_mlp_ratio() -> usize {
    4
}

impl SwinConfig {
    /// Swin-B at a resolution: windows of 7 tokens at 224 pixels, 12 at 384, 15 at 480.
    pub fn base(image_res: usize) -> Self {
        Self {
            image_res,
            patch_size: 4,
            embed_dim: 128,
            depths: vec![2, 2, 18, 2],
            num_heads: vec![4, 8, 16, 32],
            window_size: image_res / 32,
            mlp_ratio: 4,
            drop_path_rate: 0.1,
            ape: false,
            sine_positions: 0.0,
            initializer_range: 0.02,
        }
    }

    /// Width of the output tokens.
    pub fn width(&self) -> usize {
        self.embed_dim << (self.depths.len().max(1) - 1)
    }

    /// Pixels an output token stands for, along one side.
    pub fn stride(&self) -> usize {
        self.patch_size << (self.depths.len().max(1) - 1)
    }

    /// Output tokens along one side.
    pub fn grid(&self) -> usize {
        self.image_res / self.stride()
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let stages = self.depths.len();
        ensure((1..=16).contains(&stages), "vision_config.depths", "1 to 16 stages", stages)?;
        ensure(self.mlp_ratio > 0, "vision_config.mlp_ratio", "at least 1", self.mlp_ratio)?;
        let drops = (0.0..1.0).contains(&self.drop_path_rate);
        ensure(drops, "vision_config.drop_path_rate", "0 to below 1", self.drop_path_rate)?;
        ensure(
            self.num_heads.len() == self.depths.len(),
            "vision_config.num_heads",
            format!("{} numbers, one a stage", self.depths.len()),
            self.num_heads.len(),
        )?;
        let fits = self.patch_size > 0 && self.image_res > 0 && self.image_res.is_multiple_of(self.stride());
        ensure(fits, "vision_config.image_res", format!("a multiple of {}", self.stride()), self.image_res)?;
        for (stage, &heads) in self.num_heads.iter().enumerate() {
            let width = self.embed_dim << stage;
            let divides = heads > 0 && width > 0 && width.is_multiple_of(heads);
            ensure(divides, "vision_config.num_heads", format!("a divisor of {width} in stage {stage}"), heads)?;
            let side = self.image_res / (self.patch_size << stage);
            let window = self.window_size.min(side);
            ensure(
                window > 0 && side.is_multiple_of(window),
                "vision_config.window_size",
                format!("a divisor of the {side} tokens along a side in stage {stage}"),
                self.window_size,
            )?;
        }
        Ok(())
    }
}

/// What a vision transformer's parameters are called and how it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VitFamily {
    /// As in CLIP (Radford et al. 2021): a norm before the blocks, no bias in the patch embedding.
    Clip,
    /// As in DeiT (Touvron et al. 2021).
    Deit,
}

/// The non-linearity inside a feed-forward layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · Φ(x)`.
    #[default]
    Gelu,
    /// `x · σ(1.702 x)`.
    QuickGelu,
}

/// A plain vision transformer (Dosovitskiy et al. 2021).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VitConfig {
    /// Whose parameter names it has.
    pub family: VitFamily,
    /// Side of the square input, in pixels.
    pub image_res: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Width of the tokens.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads of each block.
    pub num_attention_heads: usize,
    /// Width of the hidden layer of a block.
    pub intermediate_size: usize,
    /// How many blocks, the last ones, see of an image only the patches a region covers when a region is encoded.
    pub local_attn_depth: usize,
    /// The non-linearity inside a block.
    #[serde(default)]
    pub hidden_act: Activation,
    /// Added to variances in layer normalisation.
    pub norm_eps: f64,
    /// Dropout on attention probabilities.
    #[serde(default)]
    pub attention_dropout: f64,
    /// Standard deviation of freshly drawn weights.
    #[serde(default = "default_range")]
    pub initializer_range: f64,
}

impl VitConfig {
    /// CLIP's ViT-B/16 at a resolution, with regions in its last four blocks.
    pub fn clip_base(image_res: usize) -> Self {
        let (hidden_act, norm_eps) = (Activation::QuickGelu, 1e-5);
        Self { family: VitFamily::Clip, hidden_act, norm_eps, ..Self::deit_base(image_res) }
    }

    /// DeiT-B/16 at a resolution, with regions in its last four blocks.
    pub fn deit_base(image_res: usize) -> Self {
        Self {
            family: VitFamily::Deit,
            image_res,
            patch_size: 16,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            local_attn_depth: 4,
            hidden_act: Activation::Gelu,
            norm_eps: 1e-6,
            attention_dropout: 0.0,
            initializer_range: 0.02,
        }
    }

    /// Patches along one side.
    pub fn grid(&self) -> usize {
        self.image_res / self.patch_size
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let fits = self.patch_size > 0 && self.image_res > 0 && self.image_res.is_multiple_of(self.patch_size);
        ensure(fits, "vision_config.image_res", format!("a multiple of {}", self.patch_size), self.image_res)?;
        let (width, heads) = (self.hidden_size, self.num_attention_heads);
        let divides = heads > 0 && width > 0 && width.is_multiple_of(heads);
        ensure(divides, "vision_config.num_attention_heads", format!("a divisor of hidden_size ({width})"), heads)?;
        ensure(self.intermediate_size > 0, "vision_config.intermediate_size", "at least 1", self.intermediate_size)?;
        let (depth, local) = (self.num_hidden_layers, self.local_attn_depth);
        ensure((1..=256).contains(&depth), "vision_config.num_hidden_layers", "1 to 256 layers", depth)?;
        ensure((1..=depth).contains(&local), "vision_config.local_attn_depth", format!("1 to {depth}"), local)?;
        let drops = (0.0..1.0).contains(&self.attention_dropout);
        ensure(drops, "vision_config.attention_dropout", "0 to below 1", self.attention_dropout)
    }
}

/// A vision encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum VisionConfig {
    /// Windows of tokens that merge from stage to stage.
    Swin(SwinConfig),
    /// The same tokens from the first to the last block.
    Vit(VitConfig),
}

impl VisionConfig {
    /// Side of the square input, in pixels.
    pub fn image_res(&self) -> usize {
        match self {
            Self::Swin(config) => config.image_res,
            Self::Vit(config) => config.image_res,
        }
    }

    /// Width of the output tokens.
    pub fn width(&self) -> usize {
        match self {
            Self::Swin(config) => config.width(),
            Self::Vit(config) => config.hidden_size,
        }
    }

    /// Output tokens along one side, the pooled one not counted.
    pub fn grid(&self) -> usize {
        match self {
            Self::Swin(config) => config.grid(),
            Self::Vit(config) => config.grid(),
        }
    }

    /// Pixels an output token stands for, along one side.
    pub fn stride(&self) -> usize {
        match self {
            Self::Swin(config) => config.stride(),
            Self::Vit(config) => config.patch_size,
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        match self {
            Self::Swin(config) => config.validate(),
            Self::Vit(config) => config.validate(),
        }
    }
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

    /// The model of one of [`Self::PRESETS`]; none if there is none of that name.
    pub fn preset(name: &str) -> Option<Self> {
        let known = Self::PRESETS.iter().find(|preset| **preset == name)?;
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
                let window = swin.window_size * image_res;
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
        ensure(self.embed_dim > 0, "embed_dim", "a positive number", self.embed_dim)?;
        ensure(self.temp > 0.0, "temp", "a positive number", self.temp)
    }
}
