//! What turns tokens into answers.

use std::sync::OnceLock;

use candle_core::{Result, Tensor, TensorId};
use candle_nn::{Init, VarBuilder};
use xvlm_kernels::{self as kernels, Epilogue, PackedLinear, PackedWeights};

use crate::config::{Activation, BertConfig, TextModel};
use crate::layers::{LayerNorm, Linear, Words};

/// Linear to twice the width, layer norm, GELU, linear to the output (`build_mlp` in the original's `models/xvlm.py`).
#[derive(Clone, Debug)]
pub struct Head {
    inner: Linear,
    norm: LayerNorm,
    outer: Linear,
}

impl Head {
    /// Builds the head; parameters are numbered as in the official checkpoints (`0`, `1`, `3`).
    ///
    /// # Errors
    /// If the builder has a parameter of another shape.
    pub fn new(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            inner: Linear::uniform(input, 2 * input, vb.pp("0"))?,
            norm: LayerNorm::new(2 * input, 1e-5, vb.pp("1"))?,
            outer: Linear::uniform(2 * input, output, vb.pp("3"))?,
        })
    }

    /// `[B, input]` → `[B, output]`.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.outer.forward(&kernels::gelu(&self.norm.forward(&self.inner.forward(x)?)?)?)
    }

    pub(crate) fn linears(&mut self) -> [&mut Linear; 2] {
        [&mut self.inner, &mut self.outer]
    }
}

/// The language head of BERT (`cls.predictions`) or RoBERTa (`lm_head`); its last weights are the word embeddings.
#[derive(Clone, Debug)]
pub struct MlmHead {
    dense: Linear,
    norm: LayerNorm,
    bias: Tensor,
    /// For inference: what word embeddings and bias are to be laid out in.
    packed: Option<Packed>,
}

#[derive(Clone, Debug)]
struct Packed {
    weights: PackedWeights,
    /// The word embeddings.
    words: TensorId,
    /// They themselves, once they have been asked for.
    layer: OnceLock<PackedLinear>,
}

impl MlmHead {
    /// Builds the head from what it is part of.
    ///
    /// # Errors
    /// If the builder has a parameter of another shape.
    pub fn new(config: &BertConfig, vb: VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let (head, transform, norm) = match config.model_type {
            TextModel::Bert => {
                let head = vb.pp("cls").pp("predictions");
                (head.clone(), head.pp("transform"), "LayerNorm")
            }
            TextModel::Roberta => (vb.pp("lm_head"), vb.pp("lm_head"), "layer_norm"),
        };
        Ok(Self {
            dense: Linear::normal(width, width, config.initializer_range, transform.pp("dense"))?,
            norm: LayerNorm::new(width, config.layer_norm_eps, transform.pp(norm))?,
            bias: head.get_with_hints(config.vocab_size, "bias", Init::Const(0.0))?,
            packed: None,
        })
    }

    /// Tokens `[.., H]` and word embeddings `[V, H]` → logits `[.., V]`.
    ///
    /// They are of the type of the tokens, also where a loss then widens them: PyTorch's autocast rounds them alike.
    ///
    /// # Errors
    /// On a wrong shape, or if the file that the word embeddings are read from was written to.
    pub fn forward(&self, x: &Tensor, words: &Words) -> Result<Tensor> {
        let x = self.norm.forward(&self.dense.forward_active(x, Activation::Gelu)?)?;
        let Some(Packed { weights, layer, .. }) = self.packed.as_ref().filter(|packed| packed.words == words.id())
        else {
            return kernels::linear(&x, &words.tensor()?, &self.bias);
        };
        let layer = match layer.get() {
            Some(layer) => layer,
            None => {
                let new = words.as_layer(&self.bias, *weights)?;
                layer.get_or_init(|| new)
            }
        };
        layer.forward(&x, Epilogue::Nothing)
    }

    /// Has these word embeddings and the bias laid out for inference when they are first asked for, as many tasks never do, unless
    /// that was said before; what is not of them is among [`Self::linears`]. With other embeddings it computes as before.
    pub(crate) fn pack(&mut self, weights: PackedWeights, words: &Words) {
        self.packed.get_or_insert_with(|| Packed { weights, words: words.id(), layer: OnceLock::new() });
    }

    pub(crate) fn linears(&mut self) -> [&mut Linear; 1] {
        [&mut self.dense]
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::sync::Arc;

    use candle_core::{DType, Device};
    use xvlm_kernels::{StoredBytes, StoredTensor};

    use super::*;
    use crate::parameters::Parameters;

    /// Whether they stay where they are stored or not, and whichever words a head was packed for.
    #[test]
    fn a_head_computes_with_the_words_it_is_given() {
        let config = serde_json::json!({
            "vocab_size": 7, "hidden_size": 4, "num_hidden_layers": 1, "fusion_layer": 1, "num_attention_heads": 1,
            "intermediate_size": 8, "max_position_embeddings": 4,
        });
        let config: BertConfig = serde_json::from_value(config).unwrap();
        let device = &Device::Cpu;
        let drawn = Parameters::new(3).builder(DType::F32, device);
        let head = MlmHead::new(&config, drawn.clone()).unwrap();
        let words = Words::new(7, 4, 1.0, drawn.pp("words")).unwrap();
        let numbers = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (x, ids) = (Tensor::randn(0f32, 1.0, (2, 3, 4), device).unwrap(), Tensor::new(&[6u32, 0], device).unwrap());
        let logits = numbers(head.forward(&x, &words).unwrap());
        let mut bytes = Vec::new();
        words.tensor().unwrap().write_bytes(&mut bytes).unwrap();
        let of_program: &'static [u8] = bytes.clone().leak();
        for bytes in [Cow::Borrowed(of_program), Cow::Owned(bytes)] {
            let stored = StoredTensor::new(Arc::new(StoredBytes::Memory(bytes)), 0..112, DType::F32, &[7, 4]).unwrap();
            let mut same = Words::new(7, 4, 1.0, Parameters::zeros().builder(DType::F32, device)).unwrap();
            same.pack(&|_| Ok(Some(stored.clone()))).unwrap();
            assert_eq!(numbers(same.rows(&ids, 0).unwrap()), numbers(words.rows(&ids, 0).unwrap()));
            let [mut packed, mut packed_for_others] = [head.clone(), head.clone()];
            packed.pack(PackedWeights::AsGiven, &same);
            packed_for_others.pack(PackedWeights::AsGiven, &words);
            for head in [&head, &packed, &packed_for_others] {
                let found = numbers(head.forward(&x, &same).unwrap());
                assert!(found.iter().zip(&logits).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} for {logits:?}");
            }
        }
    }
}
