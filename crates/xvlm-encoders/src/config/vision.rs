//! Sizes of vision encoders.

use serde::{Deserialize, Serialize};

use super::{ConfigError, MOST_LAYERS, bounded, default_range, ensure};

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

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// Names the first field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let stages = self.depths.len();
        ensure((1..=16).contains(&stages), "vision_config.depths", "1 to 16 stages", stages)?;
        let deepest = self.depths.iter().copied().max().unwrap_or(0);
        ensure(
            deepest <= MOST_LAYERS,
            "vision_config.depths",
            format!("at most {MOST_LAYERS} blocks a stage"),
            deepest,
        )?;
        bounded(&[
            ("vision_config.image_res", self.image_res),
            ("vision_config.patch_size", self.patch_size),
            ("vision_config.embed_dim", self.embed_dim),
            ("vision_config.window_size", self.window_size),
            ("vision_config.mlp_ratio", self.mlp_ratio),
        ])?;
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

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        bounded(&[
            ("vision_config.image_res", self.image_res),
            ("vision_config.hidden_size", self.hidden_size),
            ("vision_config.intermediate_size", self.intermediate_size),
        ])?;
        let fits = self.patch_size > 0 && self.image_res > 0 && self.image_res.is_multiple_of(self.patch_size);
        ensure(fits, "vision_config.image_res", format!("a multiple of {}", self.patch_size), self.image_res)?;
        let (width, heads) = (self.hidden_size, self.num_attention_heads);
        let divides = heads > 0 && width > 0 && width.is_multiple_of(heads);
        ensure(divides, "vision_config.num_attention_heads", format!("a divisor of hidden_size ({width})"), heads)?;
        ensure(self.intermediate_size > 0, "vision_config.intermediate_size", "at least 1", self.intermediate_size)?;
        let (depth, local) = (self.num_hidden_layers, self.local_attn_depth);
        ensure(
            (1..=MOST_LAYERS).contains(&depth),
            "vision_config.num_hidden_layers",
            format!("1 to {MOST_LAYERS}"),
            depth,
        )?;
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

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        match self {
            Self::Swin(config) => config.validate(),
            Self::Vit(config) => config.validate(),
        }
    }
}
