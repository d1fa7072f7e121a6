//! What differs between training and inference.

use std::cell::RefCell;

use candle_core::{Result, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// One forward pass: for inference nothing is random; for training all randomness comes from the generator given.
pub struct Pass(Option<RefCell<ChaCha8Rng>>);

impl Pass {
    /// A pass without randomness.
    pub fn inference() -> Self {
        Self(None)
    }

    /// A training pass whose randomness follows from the next number of `rng`.
    pub fn training(rng: &mut ChaCha8Rng) -> Self {
        Self(Some(RefCell::new(ChaCha8Rng::seed_from_u64(rng.random()))))
    }

    /// Whether `probability` has an effect in this pass.
    pub(crate) fn drops(&self, probability: f64) -> bool {
        self.0.is_some() && probability > 0.0
    }

    /// Sets each number to 0 with the probability given and scales the others up (inverted dropout).
    pub(crate) fn dropout(&self, x: &Tensor, probability: f64) -> Result<Tensor> {
        self.drop_with_shape(x, probability, x.dims().to_vec())
    }

    /// Stochastic depth (Huang et al. 2016): drops whole samples of a residual branch.
    pub(crate) fn drop_path(&self, x: &Tensor, probability: f64) -> Result<Tensor> {
        let mut shape = vec![1; x.rank()];
        shape[0] = x.dim(0)?;
        self.drop_with_shape(x, probability, shape)
    }

    fn drop_with_shape(&self, x: &Tensor, probability: f64, shape: Vec<usize>) -> Result<Tensor> {
        let Some(rng) = self.0.as_ref().filter(|_| probability > 0.0) else {
            return Ok(x.clone());
        };
        let mut rng = rng.borrow_mut();
        let scale = (1.0 / (1.0 - probability)) as f32;
        let kept = |_| if rng.random::<f32>() < probability as f32 { 0.0 } else { scale };
        let mask: Vec<f32> = (0..shape.iter().product()).map(kept).collect();
        x.broadcast_mul(&Tensor::from_vec(mask, shape, x.device())?.to_dtype(x.dtype())?)
    }
}
