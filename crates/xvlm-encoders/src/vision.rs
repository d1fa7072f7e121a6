//! The vision encoder, whichever it is.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use xvlm_kernels::{self as kernels, Cover};

use crate::config::VisionConfig;
use crate::layers::Linear;
use crate::pass::Pass;
use crate::swin::Swin;
use crate::vit::Vit;

/// Boxes inside images.
#[derive(Clone, Copy, Debug)]
pub struct Regions<'a> {
    /// The image of each region `[B]`.
    pub index: &'a [u32],
    /// The patches each region covers `[B, 1+L]`, 0 or 1; column 0 is always 1.
    pub mask: &'a Tensor,
}

impl Regions<'_> {
    pub(crate) fn check(&self, images: usize, tokens: usize) -> Result<()> {
        let rows = self.index.len();
        if self.mask.dims() != [rows, tokens] {
            candle_core::bail!("region mask: expected shape [{rows}, {tokens}], found {:?}", self.mask.dims());
        }
        match self.index.iter().find(|&&image| image as usize >= images) {
            Some(image) => candle_core::bail!("image index: expected numbers below {images}, found {image}"),
            None => Ok(()),
        }
    }
}

/// A vision encoder: pixels to patch tokens.
#[derive(Clone, Debug)]
pub enum Vision {
    /// Tokens merge from stage to stage; the pooled token is their mean.
    Swin(Swin),
    /// The pooled token is a class token.
    Vit(Vit),
}

impl Vision {
    /// Builds the encoder.
    ///
    /// # Errors
    /// If the builder has a parameter of another shape.
    pub fn new(config: &VisionConfig, vb: VarBuilder) -> Result<Self> {
        Ok(match config {
            VisionConfig::Swin(config) => Self::Swin(Swin::new(config, vb)?),
            VisionConfig::Vit(config) => Self::Vit(Vit::new(config, vb)?),
        })
    }

    /// Pixels `[N, 3, R, R]` → tokens `[N, 1+L, C]`, the pooled one first.
    ///
    /// # Errors
    /// If the pixels do not have the configured resolution.
    pub fn encode(&self, pixels: &Tensor, pass: &Pass) -> Result<Tensor> {
        match self {
            Self::Swin(swin) => with_mean(&swin.forward(pixels, pass)?),
            Self::Vit(vit) => vit.forward(pixels, None, pass),
        }
    }

    /// Pixels `[N, 3, R, R]` and boxes in them → region tokens `[B, 1+L, C]` and image tokens `[N, 1+L, C]` (§3.1 of the
    /// paper). Swin: the mean of the patches a region covers, then all patches of its image. ViT: its last blocks see only
    /// the patches of the region.
    ///
    /// # Errors
    /// If the pixels do not have the configured resolution, or a region names an image that is not there.
    pub fn encode_regions(&self, pixels: &Tensor, regions: Regions, pass: &Pass) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Swin(swin) => {
                let patches = swin.forward(pixels, pass)?;
                let (n, l, _) = patches.dims3()?;
                regions.check(n, 1 + l)?;
                let covered = regions.mask.narrow(1, 1, l)?;
                Ok((kernels::patch_pool(&patches, regions.index, Cover::Mask(&covered))?, with_mean(&patches)?))
            }
            Self::Vit(vit) => {
                let tokens = vit.forward(pixels, Some(regions), pass)?;
                let rows = regions.index.len();
                Ok((tokens.narrow(0, 0, rows)?, tokens.narrow(0, rows, tokens.dim(0)? - rows)?))
            }
        }
    }

    pub(crate) fn linears(&mut self) -> Box<dyn Iterator<Item = &mut Linear> + '_> {
        match self {
            Self::Swin(swin) => Box::new(swin.linears()),
            Self::Vit(vit) => Box::new(vit.linears()),
        }
    }
}

/// The mean of the patches before them.
fn with_mean(patches: &Tensor) -> Result<Tensor> {
    let (n, l, _) = patches.dims3()?;
    let index: Vec<u32> = (0..n as u32).collect();
    kernels::patch_pool(patches, &index, Cover::Mask(&Tensor::ones((n, l), DType::F32, patches.device())?))
}
