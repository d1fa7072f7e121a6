//! What differs between training and inference.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use candle_core::{Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_kernels::{self as kernels, Tape};

/// One forward pass: for inference nothing is random; for training all randomness comes from the generator given.
///
/// A pass can also keep what it computes on the way, for those who want to look inside.
#[derive(Default)]
pub struct Pass {
    rng: Option<RefCell<ChaCha8Rng>>,
    tape: Option<Rc<Tape>>,
    kept: Option<RefCell<BTreeMap<String, Tensor>>>,
    /// The first output that was seen not to be finite.
    first_not_finite: Option<RefCell<Option<String>>>,
    attention: Option<WatchedAttention>,
}

struct WatchedAttention {
    layer: usize,
    probabilities: RefCell<Option<Var>>,
}

impl Pass {
    /// A pass without randomness.
    pub fn inference() -> Self {
        Self::default()
    }

    /// A training pass whose randomness follows from the next number of `rng`.
    pub fn training(rng: &mut ChaCha8Rng) -> Self {
        Self::seeded(Some(rng.random()))
    }

    fn seeded(seed: Option<u64>) -> Self {
        Self { rng: seed.map(|seed| RefCell::new(ChaCha8Rng::seed_from_u64(seed))), ..Self::default() }
    }

    /// The same pass with each block and layer as a segment of a tape, which the backward pass is then to be made with.
    pub fn on(self, tape: &Rc<Tape>) -> Self {
        Self { tape: Some(Rc::clone(tape)), ..self }
    }

    /// The same pass, keeping the output of every block and layer.
    ///
    /// Swin keeps `patch_embed`, `layers.I.blocks.J` and `layers.I` (after merging), ViT `patch_embed`, `pre_layrnorm` and
    /// `block.I`, the text layers `embeddings` and `layer.I`. An encoder that runs twice keeps the later run.
    pub fn keeping(self) -> Self {
        Self { kept: Some(RefCell::default()), ..self }
    }

    /// The same pass, checking the output of every block and layer: slow, and for those who look for the place where numbers
    /// are not finite any more. Names are those of [`Self::keeping`].
    pub fn checking(self) -> Self {
        Self { first_not_finite: Some(RefCell::default()), ..self }
    }

    /// The first output that was checked and has numbers that are not finite.
    pub fn first_not_finite(&self) -> Option<String> {
        self.first_not_finite.as_ref().and_then(|first| first.borrow().clone())
    }

    /// The same pass, keeping the cross-attention probabilities of a layer as a variable of their own: what comes after has
    /// gradients with respect to them, what was before has none.
    pub fn watching_attention(self, layer: usize) -> Self {
        Self { attention: Some(WatchedAttention { layer, probabilities: RefCell::default() }), ..self }
    }

    /// What was kept under a name.
    pub fn kept(&self, name: &str) -> Option<Tensor> {
        self.kept.as_ref().and_then(|kept| kept.borrow().get(name).cloned())
    }

    /// The probabilities that were watched `[B, heads, T, 1+L]`.
    pub fn attention(&self) -> Option<Var> {
        self.attention.as_ref().and_then(|watched| watched.probabilities.borrow().clone())
    }

    pub(crate) fn keep(&self, name: impl Fn() -> String, x: &Tensor) {
        if let Some(kept) = &self.kept {
            kept.borrow_mut().insert(name(), x.clone());
        }
        if let Some(first) = &self.first_not_finite {
            let mut first = first.borrow_mut();
            if first.is_none() && !kernels::all_finite(x).unwrap_or(true) {
                *first = Some(name());
            }
        }
    }

    /// Runs a piece of the pass that draws numbers of its own, the same each time: a segment of the tape, if there is one. Who
    /// looks inside a pass sees it whole.
    pub(crate) fn segment(&self, run: impl Fn(&Self) -> Result<Tensor> + 'static) -> Result<Tensor> {
        let seed = self.rng.as_ref().map(|rng| rng.borrow_mut().random());
        match (&self.tape, &self.kept, &self.first_not_finite, &self.attention) {
            (Some(tape), None, None, None) => tape.segment(move || run(&Self::seeded(seed))),
            _ => {
                let swap = |piece| self.rng.as_ref().zip(piece).map(|(rng, piece)| rng.replace(piece));
                let whole = swap(seed.map(ChaCha8Rng::seed_from_u64));
                let result = run(self);
                swap(whole);
                result
            }
        }
    }

    /// Attends with dropout on the probabilities, if there is any in this pass.
    pub(crate) fn attend(
        &self,
        dropout: f64,
        attend: impl FnOnce(Option<kernels::Dropped>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        attend(self.drawn(dropout).map(kernels::Dropped::AtRandom))
    }

    /// As [`Self::attend`], for the cross-attention of a layer, which may be watched.
    pub(crate) fn attend_across(
        &self,
        layer: usize,
        dropout: f64,
        attend: impl FnOnce(Option<kernels::Dropped>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Some(watched) = self.attention.as_ref().filter(|watched| watched.layer == layer) else {
            return self.attend(dropout, attend);
        };
        attend(Some(kernels::Dropped::By(&|probabilities: &Tensor| {
            let probabilities = Var::from_tensor(&probabilities.detach())?;
            let dropped = self.dropout(&probabilities, dropout);
            *watched.probabilities.borrow_mut() = Some(probabilities);
            dropped
        })))
    }

    /// Whether anything is random.
    pub(crate) fn is_training(&self) -> bool {
        self.rng.is_some()
    }

    /// Dropout with the next number of the generator; none if it has no effect in this pass.
    fn drawn(&self, probability: f64) -> Option<kernels::Dropout> {
        let rng = self.rng.as_ref().filter(|_| probability > 0.0)?;
        Some(kernels::Dropout { probability, seed: rng.borrow_mut().random() })
    }

    /// Sets each number to 0 with the probability given and scales the others up (inverted dropout).
    pub(crate) fn dropout(&self, x: &Tensor, probability: f64) -> Result<Tensor> {
        self.drawn(probability).map_or_else(|| Ok(x.clone()), |dropout| kernels::dropout(x, dropout))
    }

    /// Adds a residual branch with stochastic depth (Huang et al. 2016): of `[N, ..]`, whole samples of it are dropped.
    pub(crate) fn add_branch(&self, x: &Tensor, branch: &Tensor, probability: f64) -> Result<Tensor> {
        let scales = self.rng.as_ref().filter(|_| probability > 0.0).map(|rng| {
            let mut rng = rng.borrow_mut();
            let scale = (1.0 / (1.0 - probability)) as f32;
            let kept = |_| if rng.random::<f32>() < probability as f32 { 0.0 } else { scale };
            (0..x.dims().first().copied().unwrap_or(0)).map(kept).collect::<Vec<f32>>()
        });
        kernels::add_branch(x, branch, scales.as_deref())
    }
}
