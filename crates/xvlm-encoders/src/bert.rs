//! BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) split in two: lower layers encode text, upper layers also attend
//! to patch tokens. With a fusion layer of 0 and a causal mask it is a decoder.
//!
//! Parameter names are those of the official checkpoints (`encoder.layer.6.crossattention.self.query.weight`).

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use xvlm_kernels as kernels;

use crate::config::{Activation, BertConfig, TextModel};
use crate::layers::{FeedForward, LayerNorm, Linear, Words, hide};
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
    pub(crate) words: Words,
    pub(crate) positions: Tensor,
    types: Tensor,
    norm: LayerNorm,
    pub(crate) layers: Vec<Layer>,
}

impl Bert {
    /// Builds all layers; those from the fusion layer upwards read tokens of `vision_width`.
    ///
    /// # Errors
    /// If the builder has a parameter of another shape.
    pub fn new(config: &BertConfig, vision_width: usize, vb: VarBuilder) -> Result<Self> {
        Self::build(config, vision_width, 1, vb)
    }

    /// For statements about two images: each fusion layer becomes two, of which the first looks at the first image and the
    /// second at the second. Both have the same keys and values, named after the first (`models/model_nlvr.py`).
    ///
    /// # Errors
    /// If the builder has a parameter of another shape.
    pub fn paired(config: &BertConfig, vision_width: usize, vb: VarBuilder) -> Result<Self> {
        Self::build(config, vision_width, 2, vb)
    }

    fn build(config: &BertConfig, vision_width: usize, images: usize, vb: VarBuilder) -> Result<Self> {
        let embeddings = vb.pp("embeddings");
        let width = config.hidden_size;
        let normal = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let table = |name: &str, rows: usize| embeddings.pp(name).get_with_hints((rows, width), "weight", normal);
        let named = |i: usize| vb.pp("encoder").pp("layer").pp(i);
        let first_of_pair = |i: usize| i - (i - config.fusion_layer) % images;
        let layer = |i: usize| {
            let reads = (i >= config.fusion_layer).then(|| (vision_width, named(first_of_pair(i))));
            Layer::new(config, i, reads, named(i))
        };
        let depth = config.fusion_layer + images * (config.num_hidden_layers - config.fusion_layer);
        Ok(Self {
            words: Words::new(config.vocab_size, width, config.initializer_range, embeddings.pp("word_embeddings"))?,
            positions: table("position_embeddings", config.max_position_embeddings)?,
            types: table("token_type_embeddings", config.type_vocab_size)?,
            norm: LayerNorm::new(width, config.layer_norm_eps, embeddings.pp("LayerNorm"))?,
            layers: (0..depth).map(layer).collect::<Result<_>>()?,
            config: config.clone(),
        })
    }

    /// The sizes.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The table of word embeddings `[V, H]`.
    pub fn words(&self) -> &Words {
        &self.words
    }

    /// Token ids `[B, T]` (u32) and mask `[B, T]` (1 is a token, 0 padding) → `[B, T, H]`, through the text layers.
    ///
    /// # Errors
    /// On a wrong shape, or a text that is longer than there are positions.
    pub fn encode(&self, ids: &Tensor, mask: &Tensor, attention: Attention, pass: &Pass) -> Result<Tensor> {
        let (_, t) = ids.dims2()?;
        let longest = self.config.longest_text();
        if t > longest {
            candle_core::bail!("text: expected at most {longest} tokens, found {t}");
        }
        let padding = self.config.pad_token_id;
        let places = match self.config.model_type {
            TextModel::Bert => self.positions.narrow(0, 0, t)?,
            TextModel::Roberta => kernels::embedding(&self.positions, &counted(ids, padding)?, Some(padding))?,
        };
        let mut x = self.embed(ids, &places, pass)?;
        pass.keep(|| "embeddings".to_owned(), &x);
        let bias = hide(mask)?;
        for layer in &self.layers[..self.config.fusion_layer] {
            x = layer.forward(x, &bias, attention, None, pass)?;
        }
        Ok(x)
    }

    /// Token ids `[B, T]` and the embeddings of their places, which can be added to `[B, T, H]`, → `[B, T, H]`.
    pub(crate) fn embed(&self, ids: &Tensor, places: &Tensor, pass: &Pass) -> Result<Tensor> {
        let words = self.words.rows(ids, self.config.pad_token_id)?;
        let places = places.broadcast_add(&self.types.narrow(0, 0, 1)?)?;
        pass.dropout(&self.norm.forward(&words.broadcast_add(&places)?)?, self.config.hidden_dropout_prob)
    }

    /// Encoded texts `[B, T, H]` with their mask and what they look at → `[B, T, H]`, through the fusion layers. Those look
    /// at the concepts in turn: at the same ones if one is given, at the first and the second if two are.
    ///
    /// # Errors
    /// On a wrong shape or index, or if there are no concepts.
    pub fn fuse(
        &self,
        text: &Tensor,
        mask: &Tensor,
        concepts: &[Concepts],
        attention: Attention,
        pass: &Pass,
    ) -> Result<Tensor> {
        if concepts.is_empty() {
            candle_core::bail!("concepts to fuse with: expected at least one, found none");
        }
        let bias = hide(mask)?;
        let look = |concepts: &Concepts| {
            // All layers read the tokens: the gradients are added up here, before they go further down.
            let tokens = concepts.tokens.clone();
            Ok(Look {
                tokens: pass.segment(move |_| Ok(tokens.clone()))?,
                index: concepts.index.into(),
                seen: hide(concepts.mask)?,
            })
        };
        let looks = concepts.iter().map(look).collect::<Result<Vec<_>>>()?;
        let mut x = text.clone();
        for (layer, look) in self.layers[self.config.fusion_layer..].iter().zip(looks.iter().cycle()) {
            x = layer.forward(x, &bias, attention, Some(look), pass)?;
        }
        Ok(x)
    }
}

/// All linear layers.
impl Bert {
    pub(crate) fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(|layer| {
            let SelfAttention { qkv, output } = &mut layer.attention;
            let cross = layer.cross.as_mut().map(|CrossAttention { query, kv, output }| [query, kv, &mut output.dense]);
            [qkv, &mut output.dense].into_iter().chain(cross.into_iter().flatten()).chain(layer.feed_forward.linears())
        })
    }
}

/// What a fusion layer looks at: patch tokens, the row of them that each text sees, and what is added to the scores.
#[derive(Clone, Debug)]
struct Look {
    tokens: Tensor,
    index: Arc<[u32]>,
    seen: Tensor,
}

/// The place of each token among those that are not padding, from `padding + 1`; `padding` for padding.
fn counted(ids: &Tensor, padding: u32) -> Result<Tensor> {
    let tokens = ids.ne(padding)?.to_dtype(DType::F32)?;
    let places = (tokens.cumsum(1)? * tokens)? + f64::from(padding);
    places?.to_dtype(DType::U32)
}

#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) number: usize,
    pub(crate) attention: SelfAttention,
    pub(crate) cross: Option<CrossAttention>,
    feed_forward: FeedForward,
    norm: LayerNorm,
    dropout: f64,
}

impl Layer {
    /// A layer with cross attention `reads` tokens of a width, with the keys and values of a layer (itself, or another).
    fn new(config: &BertConfig, number: usize, reads: Option<(usize, VarBuilder)>, vb: VarBuilder) -> Result<Self> {
        let (width, hidden, range) = (config.hidden_size, config.intermediate_size, config.initializer_range);
        Ok(Self {
            number,
            attention: SelfAttention::new(config, vb.pp("attention"))?,
            cross: reads
                .map(|(vision_width, keys)| {
                    CrossAttention::new(config, vision_width, keys.pp("crossattention"), vb.pp("crossattention"))
                })
                .transpose()?,
            feed_forward: FeedForward {
                inner: Linear::normal(width, hidden, range, vb.pp("intermediate").pp("dense"))?,
                activation: Activation::Gelu,
                outer: Linear::normal(hidden, width, range, vb.pp("output").pp("dense"))?,
            },
            norm: LayerNorm::new(width, config.layer_norm_eps, vb.pp("output").pp("LayerNorm"))?,
            dropout: config.hidden_dropout_prob,
        })
    }

    fn forward(
        &self,
        x: Tensor,
        bias: &Tensor,
        attention: Attention,
        look: Option<&Look>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let (layer, bias, look) = (self.clone(), bias.clone(), look.cloned());
        let x = pass.segment(move |pass| {
            let mut x = layer.attention.forward(&x, &bias, attention, pass)?;
            if let (Some(cross), Some(Look { tokens, index, seen })) = (&layer.cross, &look) {
                x = cross.look(&x, &cross.read(tokens)?, index, seen, layer.number, pass)?;
            }
            layer.feed(&x, pass)
        })?;
        pass.keep(|| format!("layer.{}", self.number), &x);
        Ok(x)
    }

    /// What follows attention.
    pub(crate) fn feed(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let fed = pass.dropout(&self.feed_forward.forward(x)?, self.dropout)?;
        self.norm.forward_sum(&fed, x)
    }
}

/// What follows both kinds of attention: projection, dropout, residual, norm.
#[derive(Clone, Debug)]
pub(crate) struct AttentionOutput {
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

    pub(crate) fn forward(&self, attended: &Tensor, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.norm.forward_sum(&pass.dropout(&self.dense.forward(attended)?, self.dropout)?, x)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct SelfAttention {
    /// Queries, keys and values.
    pub(crate) qkv: Linear,
    pub(crate) output: AttentionOutput,
}

impl SelfAttention {
    fn new(config: &BertConfig, vb: VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let linear = |name: &str| Linear::normal(width, width, config.initializer_range, vb.pp("self").pp(name));
        let output = AttentionOutput::new(config, vb.pp("output"))?;
        Ok(Self { qkv: Linear::stacked([linear("query")?, linear("key")?, linear("value")?]), output })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor, attention: Attention, pass: &Pass) -> Result<Tensor> {
        let qkv = self.qkv.forward(x)?;
        let causal = attention == Attention::Causal;
        let attended = pass.attend(self.output.attention_dropout, |dropped| {
            kernels::self_attention(&qkv, bias, self.output.heads, causal, dropped)
        })?;
        self.output.forward(&attended, x, pass)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct CrossAttention {
    query: Linear,
    /// Keys and values.
    kv: Linear,
    output: AttentionOutput,
}

impl CrossAttention {
    /// Keys and values are `keys`' parameters, everything else is `vb`'s.
    fn new(config: &BertConfig, vision_width: usize, keys: VarBuilder, vb: VarBuilder) -> Result<Self> {
        let linear = |vb: &VarBuilder, name: &str, input: usize| {
            Linear::normal(input, config.hidden_size, config.initializer_range, vb.pp("self").pp(name))
        };
        Ok(Self {
            query: linear(&vb, "query", config.hidden_size)?,
            kv: Linear::stacked([linear(&keys, "key", vision_width)?, linear(&keys, "value", vision_width)?]),
            output: AttentionOutput::new(config, vb.pp("output"))?,
        })
    }

    /// Keys and values of patch tokens: `[N, 1+L, C]` → `[N, 1+L, 2·H]`.
    pub(crate) fn read(&self, tokens: &Tensor) -> Result<Tensor> {
        self.kv.forward(tokens)
    }

    /// Texts `x` look at the keys and values that [`Self::read`] made, each at those its index names.
    pub(crate) fn look(
        &self,
        x: &Tensor,
        kv: &Tensor,
        index: &[u32],
        seen: &Tensor,
        layer: usize,
        pass: &Pass,
    ) -> Result<Tensor> {
        let q = self.query.forward(x)?;
        let attended = pass.attend_across(layer, self.output.attention_dropout, |dropped| {
            kernels::cross_attention(&q, kv, index, seen, self.output.heads, dropped)
        })?;
        self.output.forward(&attended, x, pass)
    }
}
