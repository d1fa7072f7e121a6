//! BERT (Devlin et al. 2019) split in two: lower layers encode text, upper layers also attend to patch tokens.
//!
//! Parameter names are those of the official checkpoints (`encoder.layer.6.crossattention.self.query.weight`).

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use xvlm_kernels as kernels;

use crate::config::BertConfig;
use crate::layers::{FeedForward, LayerNorm, Linear};
use crate::pass::Pass;

/// Which tokens a token of the text sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// All of them: for understanding.
    Full,
    /// Itself and those before it: for generating.
    Causal,
}

/// What texts are fused with: patch tokens, and which of them each text looks at.
#[derive(Clone, Debug)]
pub struct Concepts<'a> {
    /// Patch tokens of `N` concepts `[N, 1+L, C]`.
    pub tokens: &'a Tensor,
    /// For each text, the row of `tokens` it looks at.
    pub index: &'a [u32],
    /// For each text, which of those tokens it sees `[B, 1+L]`, 0 or 1.
    pub mask: &'a Tensor,
}

/// Text and fusion layers.
#[derive(Clone, Debug)]
pub struct Bert {
    config: BertConfig,
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Bert {
    /// Builds all layers; those from the fusion layer upwards read tokens of `vision_width`.
    ///
    /// # Errors
    /// If the builder has a parameter of another shape.
    pub fn new(config: &BertConfig, vision_width: usize, vb: VarBuilder) -> Result<Self> {
        let embeddings = vb.pp("embeddings");
        let width = config.hidden_size;
        let normal = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let table = |name: &str, rows: usize| embeddings.pp(name).get_with_hints((rows, width), "weight", normal);
        let layer = |i: usize| {
            let vision = (i >= config.fusion_layer).then_some(vision_width);
            Layer::new(config, vision, vb.pp("encoder").pp("layer").pp(i))
        };
        Ok(Self {
            words: table("word_embeddings", config.vocab_size)?,
            positions: table("position_embeddings", config.max_position_embeddings)?,
            types: table("token_type_embeddings", config.type_vocab_size)?,
            norm: LayerNorm::new(width, config.layer_norm_eps, embeddings.pp("LayerNorm"))?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            config: config.clone(),
        })
    }

    /// The sizes.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The table of word embeddings `[V, H]`.
    pub(crate) fn words(&self) -> &Tensor {
        &self.words
    }

    /// Token ids `[B, T]` (u32) and mask `[B, T]` (1 is a token, 0 padding) → `[B, T, H]`, through the text layers.
    ///
    /// # Errors
    /// On a wrong shape, or a text longer than `max_position_embeddings`.
    pub fn encode(&self, ids: &Tensor, mask: &Tensor, attention: Attention, pass: &Pass) -> Result<Tensor> {
        let (_, t) = ids.dims2()?;
        let longest = self.config.max_position_embeddings;
        if t > longest {
            candle_core::bail!("text: expected at most {longest} tokens, found {t}");
        }
        let words = kernels::embedding(&self.words, ids)?;
        let places = (self.positions.narrow(0, 0, t)?.broadcast_add(&self.types.narrow(0, 0, 1)?))?;
        let x = self.norm.forward(&words.broadcast_add(&places)?)?;
        let mut x = pass.dropout(&x, self.config.hidden_dropout_prob)?;
        let bias = hide(mask)?;
        for layer in &self.layers[..self.config.fusion_layer] {
            x = layer.forward(&x, &bias, attention, None, pass)?;
        }
        Ok(x)
    }

    /// Encoded texts `[B, T, H]` with their mask and what they look at → `[B, T, H]`, through the fusion layers.
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
        let bias = hide(mask)?;
        let seen = hide(concepts.mask)?;
        let mut x = text.clone();
        for layer in &self.layers[self.config.fusion_layer..] {
            x = layer.forward(&x, &bias, attention, Some((concepts, &seen)), pass)?;
        }
        Ok(x)
    }
}

/// What is added to attention scores: 0 where the mask is 1, −10000 where it is 0 (as in the original).
fn hide(mask: &Tensor) -> Result<Tensor> {
    mask.to_dtype(DType::F32)?.affine(10_000.0, -10_000.0)
}

#[derive(Clone, Debug)]
struct Layer {
    attention: SelfAttention,
    cross: Option<CrossAttention>,
    feed_forward: FeedForward,
    norm: LayerNorm,
    dropout: f64,
}

impl Layer {
    fn new(config: &BertConfig, vision_width: Option<usize>, vb: VarBuilder) -> Result<Self> {
        let (width, hidden, range) = (config.hidden_size, config.intermediate_size, config.initializer_range);
        Ok(Self {
            attention: SelfAttention::new(config, vb.pp("attention"))?,
            cross: vision_width
                .map(|vision| CrossAttention::new(config, vision, vb.pp("crossattention")))
                .transpose()?,
            feed_forward: FeedForward {
                inner: Linear::normal(width, hidden, range, vb.pp("intermediate").pp("dense"))?,
                outer: Linear::normal(hidden, width, range, vb.pp("output").pp("dense"))?,
            },
            norm: LayerNorm::new(width, config.layer_norm_eps, vb.pp("output").pp("LayerNorm"))?,
            dropout: config.hidden_dropout_prob,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        bias: &Tensor,
        attention: Attention,
        concepts: Option<(&Concepts, &Tensor)>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let mut x = self.attention.forward(x, bias, attention, pass)?;
        if let (Some(cross), Some((concepts, seen))) = (&self.cross, concepts) {
            x = cross.forward(&x, concepts, seen, pass)?;
        }
        let fed = pass.dropout(&self.feed_forward.forward(&x)?, self.dropout)?;
        self.norm.forward(&(fed + x)?)
    }
}

/// What follows both kinds of attention: projection, dropout, residual, norm.
#[derive(Clone, Debug)]
struct AttentionOutput {
    dense: Linear,
    norm: LayerNorm,
    heads: usize,
    dropout: f64,
    attention_dropout: f64,
}

impl AttentionOutput {
    fn new(config: &BertConfig, vb: VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        Ok(Self {
            dense: Linear::normal(width, width, config.initializer_range, vb.pp("dense"))?,
            norm: LayerNorm::new(width, config.layer_norm_eps, vb.pp("LayerNorm"))?,
            heads: config.num_attention_heads,
            dropout: config.hidden_dropout_prob,
            attention_dropout: config.attention_probs_dropout_prob,
        })
    }

    /// `attend` is given the dropout on attention probabilities, if there is one in this pass.
    fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        attend: impl FnOnce(Option<kernels::Dropped>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let dropped = |probabilities: &Tensor| pass.dropout(probabilities, self.attention_dropout);
        let attended = attend(pass.drops(self.attention_dropout).then_some(&dropped))?;
        self.norm.forward(&(pass.dropout(&self.dense.forward(&attended)?, self.dropout)? + x)?)
    }
}

#[derive(Clone, Debug)]
struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: AttentionOutput,
}

impl SelfAttention {
    fn new(config: &BertConfig, vb: VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let linear = |name: &str| Linear::normal(width, width, config.initializer_range, vb.pp("self").pp(name));
        let output = AttentionOutput::new(config, vb.pp("output"))?;
        Ok(Self { query: linear("query")?, key: linear("key")?, value: linear("value")?, output })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor, attention: Attention, pass: &Pass) -> Result<Tensor> {
        let qkv = Linear::stacked(&[&self.query, &self.key, &self.value])?.forward(x)?;
        let causal = attention == Attention::Causal;
        self.output.forward(x, pass, |dropped| kernels::self_attention(&qkv, bias, self.output.heads, causal, dropped))
    }
}

#[derive(Clone, Debug)]
struct CrossAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: AttentionOutput,
}

impl CrossAttention {
    fn new(config: &BertConfig, vision_width: usize, vb: VarBuilder) -> Result<Self> {
        let linear = |name: &str, input: usize| {
            Linear::normal(input, config.hidden_size, config.initializer_range, vb.pp("self").pp(name))
        };
        Ok(Self {
            query: linear("query", config.hidden_size)?,
            key: linear("key", vision_width)?,
            value: linear("value", vision_width)?,
            output: AttentionOutput::new(config, vb.pp("output"))?,
        })
    }

    fn forward(&self, x: &Tensor, concepts: &Concepts, seen: &Tensor, pass: &Pass) -> Result<Tensor> {
        let q = self.query.forward(x)?;
        let kv = Linear::stacked(&[&self.key, &self.value])?.forward(concepts.tokens)?;
        let heads = self.output.heads;
        self.output.forward(x, pass, |dropped| kernels::cross_attention(&q, &kv, concepts.index, seen, heads, dropped))
    }
}
