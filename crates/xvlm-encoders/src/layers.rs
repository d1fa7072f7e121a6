//! Layers that several encoders share.

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use xvlm_kernels as kernels;

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

    /// `x [.., input]` → `[.., output]`.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::linear(x, &self.weight, &self.bias)
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
}

/// Linear, GELU, linear: the feed-forward half of a transformer block.
#[derive(Clone, Debug)]
pub(crate) struct FeedForward {
    pub(crate) inner: Linear,
    pub(crate) outer: Linear,
}

impl FeedForward {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.outer.forward(&kernels::gelu(&self.inner.forward(x)?)?)
    }
}
