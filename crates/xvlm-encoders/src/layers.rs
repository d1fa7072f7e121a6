//! Layers that several encoders share.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use xvlm_kernels as kernels;

use crate::config::Activation;

/// `x · Wᵀ + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// Weights drawn from a normal distribution of the standard deviation given, biases 0: what Swin and BERT start from.
    ///
    /// # Errors
    /// If the builder has a parameter of that name and another shape.
    pub fn normal(input: usize, output: usize, deviation: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((output, input), "weight", Init::Randn { mean: 0.0, stdev: deviation })?;
        Ok(Self { weight, bias: vb.get_with_hints(output, "bias", Init::Const(0.0))? })
    }

    /// Like [`Self::normal`], without biases.
    ///
    /// # Errors
    /// As [`Self::normal`].
    pub fn without_bias(input: usize, output: usize, deviation: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((output, input), "weight", Init::Randn { mean: 0.0, stdev: deviation })?;
        Ok(Self { bias: Tensor::zeros(output, weight.dtype(), weight.device())?, weight })
    }

    /// PyTorch's default: weights and biases uniform in ±1/√input. Projections and heads start from it.
    ///
    /// # Errors
    /// As [`Self::normal`].
    pub fn uniform(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        let bound = (input as f64).powf(-0.5);
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = vb.get_with_hints((output, input), "weight", init)?;
        Ok(Self { weight, bias: vb.get_with_hints(output, "bias", init)? })
    }

    /// Several layers with one input as one, their outputs side by side.
    pub(crate) fn stacked(layers: &[&Self]) -> Result<Self> {
        let weights: Vec<_> = layers.iter().map(|layer| &layer.weight).collect();
        let biases: Vec<_> = layers.iter().map(|layer| &layer.bias).collect();
        Ok(Self { weight: Tensor::cat(&weights, 0)?, bias: Tensor::cat(&biases, 0)? })
    }

    /// What [`Self::stacked`] makes of `x`, without a stack that outlives it.
    pub(crate) fn forward_stacked(layers: &[&Self], x: &Tensor) -> Result<Tensor> {
        let weights: Vec<_> = layers.iter().map(|layer| &layer.weight).collect();
        let biases: Vec<_> = layers.iter().map(|layer| &layer.bias).collect();
        kernels::stacked_linear(x, &weights, &biases)
    }

    /// `x [.., input]` → `[.., output]`.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::linear(x, &self.weight, &self.bias)
    }

    /// GELU of [`Self::forward`], with the bias added on the way.
    pub(crate) fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        kernels::bias_gelu(&kernels::linear_without_bias(x, &self.weight)?, &self.bias)
    }
}

/// Layer normalisation over the last dimension.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Weights 1, biases 0.
    ///
    /// # Errors
    /// If the builder has a parameter of that name and another shape.
    pub fn new(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(width, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(width, "bias", Init::Const(0.0))?,
            eps,
        })
    }

    /// `x [.., width]` → the same shape.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::layer_norm(x, &self.weight, &self.bias, self.eps)
    }

    /// Of `x + residual`, both `[.., width]`.
    pub(crate) fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        kernels::add_layer_norm(x, residual, &self.weight, &self.bias, self.eps)
    }
}

/// Linear, non-linearity, linear: the feed-forward half of a transformer block.
#[derive(Clone, Debug)]
pub(crate) struct FeedForward {
    pub(crate) inner: Linear,
    pub(crate) activation: Activation,
    pub(crate) outer: Linear,
}

impl FeedForward {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.inner.forward(x)?;
        match self.activation {
            Activation::Gelu => kernels::gelu_linear(&x, &self.outer.weight, &self.outer.bias),
            Activation::QuickGelu => self.outer.forward(&kernels::quick_gelu(&x)?),
        }
    }
}

/// Images to tokens: a convolution whose kernels do not overlap is a linear map of patches.
#[derive(Clone, Debug)]
pub(crate) struct PatchEmbedding {
    weight: Tensor,
    bias: Tensor,
    image_res: usize,
    patch: usize,
}

impl PatchEmbedding {
    pub(crate) fn new(image_res: usize, patch: usize, width: usize, has_bias: bool, vb: VarBuilder) -> Result<Self> {
        let bound = ((3 * patch * patch) as f64).powf(-0.5);
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = vb.get_with_hints((width, 3, patch, patch), "weight", init)?;
        let bias = match has_bias {
            true => vb.get_with_hints(width, "bias", init)?,
            false => Tensor::zeros(width, weight.dtype(), weight.device())?,
        };
        Ok(Self { weight, bias, image_res, patch })
    }

    /// Pixels `[N, 3, R, R]` → `[N, (R / patch)², width]` in image order.
    pub(crate) fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (n, channels, height, width) = pixels.dims4()?;
        let (res, patch) = (self.image_res, self.patch);
        if (channels, height, width) != (3, res, res) {
            candle_core::bail!("pixels: expected shape [_, 3, {res}, {res}], found {:?}", pixels.dims());
        }
        let side = res / patch;
        let patches = pixels
            .to_dtype(self.weight.dtype())?
            .reshape((n, 3, side, patch, side, patch))?
            .permute([0, 2, 4, 1, 3, 5])?
            .contiguous()?
            .reshape((n, side * side, 3 * patch * patch))?;
        kernels::linear(&patches, &self.weight.flatten_from(1)?, &self.bias)
    }
}

/// What is added to the attention scores of a position that is not to be seen (as in the original).
pub(crate) const HIDDEN: f32 = -10_000.0;

/// What is added to attention scores: 0 where the mask is 1, [`HIDDEN`] where it is 0.
pub(crate) fn hide(mask: &Tensor) -> Result<Tensor> {
    mask.to_dtype(DType::F32)?.affine(-f64::from(HIDDEN), f64::from(HIDDEN))
}
