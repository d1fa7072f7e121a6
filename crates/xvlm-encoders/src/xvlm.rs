//! X-VLM: vision encoder, text and fusion layers, projections and heads put together.
//!
//! Parameter names are those of the official pre-training checkpoints (`models/model_pretrain.py`, `models/xvlm.py`).

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use xvlm_kernels as kernels;

use crate::bert::{Attention, Bert, Concepts};
use crate::config::XvlmConfig;
use crate::heads::{Head, MlmHead};
use crate::layers::Linear;
use crate::pass::Pass;
use crate::swin::Swin;

/// Boxes inside images.
#[derive(Clone, Copy, Debug)]
pub struct Regions<'a> {
    /// The image of each region `[B]`.
    pub index: &'a [u32],
    /// The patches each region covers `[B, 1+L]`, 0 or 1; column 0 is always 1.
    pub mask: &'a Tensor,
}

/// The model.
#[derive(Clone, Debug)]
pub struct Xvlm {
    config: XvlmConfig,
    vision: Swin,
    text: Bert,
    vision_projection: Linear,
    text_projection: Linear,
    temperature: Tensor,
    match_head: Head,
    box_head: Head,
    mlm_head: MlmHead,
}

impl Xvlm {
    /// Builds the model.
    ///
    /// # Errors
    /// If sizes do not fit together, or the builder has a parameter of another shape.
    pub fn new(config: &XvlmConfig, vb: VarBuilder) -> Result<Self> {
        config.validate().map_err(candle_core::Error::wrap)?;
        let (vision_width, text_width) = (config.vision_config.width(), config.text_config.hidden_size);
        let text = vb.pp("text_encoder");
        Ok(Self {
            vision: Swin::new(&config.vision_config, vb.pp("vision_encoder"))?,
            text: Bert::new(&config.text_config, vision_width, text.pp("bert"))?,
            vision_projection: Linear::uniform(vision_width, config.embed_dim, vb.pp("vision_proj"))?,
            text_projection: Linear::uniform(text_width, config.embed_dim, vb.pp("text_proj"))?,
            temperature: vb.get_with_hints((), "temp", Init::Const(config.temp))?,
            match_head: Head::new(text_width, 2, vb.pp("itm_head"))?,
            box_head: Head::new(text_width, 4, vb.pp("bbox_head"))?,
            mlm_head: MlmHead::new(&config.text_config, text.pp("cls").pp("predictions"))?,
            config: config.clone(),
        })
    }

    /// The sizes.
    pub fn config(&self) -> &XvlmConfig {
        &self.config
    }

    /// The temperature that similarities are divided by, a scalar.
    pub fn temperature(&self) -> &Tensor {
        &self.temperature
    }

    /// Pixels `[N, 3, R, R]` → patch tokens `[N, 1+L, C]`; row 0 is the mean of the patches.
    ///
    /// # Errors
    /// If the pixels do not have the configured resolution.
    pub fn encode_image(&self, pixels: &Tensor, pass: &Pass) -> Result<Tensor> {
        with_mean(&self.vision.forward(pixels, pass)?)
    }

    /// Pixels `[N, 3, R, R]` and boxes in them → region tokens `[B, 1+L, C]` (row 0 is the mean of the patches a region
    /// covers, then all patches of its image; §3.1 of the paper) and image tokens `[N, 1+L, C]`. Each image is encoded once.
    ///
    /// # Errors
    /// If the pixels do not have the configured resolution, or a region names an image that is not there.
    pub fn encode_regions(&self, pixels: &Tensor, regions: Regions, pass: &Pass) -> Result<(Tensor, Tensor)> {
        let patches = self.vision.forward(pixels, pass)?;
        let covered = regions.mask.narrow(1, 1, regions.mask.dim(1)? - 1)?;
        Ok((kernels::patch_pool(&patches, regions.index, &covered)?, with_mean(&patches)?))
    }

    /// Token ids `[B, T]` (u32) and mask `[B, T]` → `[B, T, H]`.
    ///
    /// # Errors
    /// On a wrong shape, or a text longer than the model allows.
    pub fn encode_text(&self, ids: &Tensor, mask: &Tensor, attention: Attention, pass: &Pass) -> Result<Tensor> {
        self.text.encode(ids, mask, attention, pass)
    }

    /// Encoded texts `[B, T, H]`, their mask `[B, T]` and the concepts they look at → `[B, T, H]`.
    ///
    /// # Errors
    /// On a wrong shape or index.
    pub fn fuse(
        &self,
        text: &Tensor,
        mask: &Tensor,
        concepts: &Concepts,
        attention: Attention,
        pass: &Pass,
    ) -> Result<Tensor> {
        self.text.fuse(text, mask, concepts, attention, pass)
    }

    /// Patch tokens `[B, 1+L, C]` → embeddings `[B, E]` of unit length, from row 0.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn project_image(&self, tokens: &Tensor) -> Result<Tensor> {
        unit(&self.vision_projection.forward(&first(tokens)?)?)
    }

    /// Encoded texts `[B, T, H]` → embeddings `[B, E]` of unit length, from `[CLS]`.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn project_text(&self, text: &Tensor) -> Result<Tensor> {
        unit(&self.text_projection.forward(&first(text)?)?)
    }

    /// Fused texts `[B, T, H]` → `[B, 2]`: logits of not matching and of matching.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn match_logits(&self, fused: &Tensor) -> Result<Tensor> {
        self.match_head.forward(&first(fused)?)
    }

    /// Texts fused with whole images `[B, T, H]` → boxes `[B, 4]`, `(cx, cy, w, h)` in fractions of the image.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn predict_box(&self, fused: &Tensor) -> Result<Tensor> {
        candle_nn::ops::sigmoid(&self.box_head.forward(&first(fused)?)?)
    }

    /// Fused tokens `[.., H]` → logits over the vocabulary `[.., V]`.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn mlm_logits(&self, fused: &Tensor) -> Result<Tensor> {
        self.mlm_head.forward(fused, self.text.words())
    }
}

/// The mean of the patches before them.
fn with_mean(patches: &Tensor) -> Result<Tensor> {
    Tensor::cat(&[&patches.mean_keepdim(1)?, patches], 1)
}

/// Token 0 of each row.
fn first(tokens: &Tensor) -> Result<Tensor> {
    tokens.narrow(1, 0, 1)?.squeeze(1)?.contiguous()
}

/// Rows of unit length (`F.normalize`, which keeps lengths above 1e-12).
fn unit(x: &Tensor) -> Result<Tensor> {
    let squares = x.to_dtype(DType::F32)?.sqr()?.sum_keepdim(D::Minus1)?;
    x.broadcast_div(&squares.maximum(1e-24)?.sqrt()?.to_dtype(x.dtype())?)
}
