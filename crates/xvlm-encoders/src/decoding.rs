//! Texts written token by token: what the layers have computed for the tokens so far is kept, and so is what they read of
//! the concepts, so that a new token costs one token.

use candle_core::{Result, Tensor};
use xvlm_kernels::{self as kernels, KeyValueCache};

use crate::bert::{Bert, Concepts};
use crate::config::TextModel;
use crate::layers::{HIDDEN, Linear, hide};
use crate::pass::Pass;

/// Texts that are being written about concepts, with keys and values of their tokens so far. For inference: nothing here has
/// gradients.
#[derive(Debug)]
pub struct Decoding<'a> {
    bert: &'a Bert,
    layers: Vec<LayerState>,
    /// For each text, the concept it looks at, and what is added to the scores of that concept's tokens `[B, 1+L]`.
    index: Vec<u32>,
    seen: Tensor,
    texts: Vec<Text>,
}

/// What one layer keeps.
#[derive(Debug)]
struct LayerState {
    /// What computes queries, keys and values of the tokens.
    qkv: Linear,
    own: KeyValueCache,
    /// Keys and values of the concepts `[N, 1+L, 2·H]`, in fusion layers.
    concepts: Option<Tensor>,
}

/// What is kept of one text.
#[derive(Clone, Debug, Default)]
struct Text {
    /// Tokens so far.
    tokens: u32,
    /// What is added to the score of each column of the cache: tokens are seen, padding between them is not.
    bias: Vec<f32>,
}

impl<'a> Decoding<'a> {
    /// Begins as many texts as `concepts` has an index for, each of at most `longest` tokens.
    pub(crate) fn new(bert: &'a Bert, concepts: &Concepts, longest: usize) -> Result<Self> {
        let width = bert.config().hidden_size;
        let (texts, like) = (concepts.index.len(), concepts.tokens);
        let state = |layer: &crate::bert::Layer| {
            Ok(LayerState {
                qkv: layer.attention.qkv.for_inference()?,
                own: KeyValueCache::new(texts, longest, width, like.dtype(), like.device())?,
                concepts: layer.cross.as_ref().map(|cross| cross.read(concepts.tokens)).transpose()?,
            })
        };
        Ok(Self {
            bert,
            layers: bert.layers.iter().map(state).collect::<Result<_>>()?,
            index: concepts.index.to_vec(),
            seen: hide(concepts.mask)?,
            texts: vec![Text::default(); texts],
        })
    }

    /// Goes on with at least one token for each text → the last layer's state of each text's last one `[B, H]`, as
    /// [`crate::Xvlm::decode`] has it over the whole text.
    ///
    /// # Errors
    /// If there are not as many continuations as texts, one is empty, or a text gets longer than there are positions; then
    /// nothing has changed. If the texts get longer than was planned for, they cannot be gone on with.
    pub fn extend(&mut self, continuations: &[Vec<u32>]) -> Result<Tensor> {
        let count = self.texts.len();
        if continuations.len() != count || continuations.iter().any(|new| new.is_empty()) {
            let lengths: Vec<usize> = continuations.iter().map(|new| new.len()).collect();
            candle_core::bail!(
                "texts: expected {count} continuations of at least one token, found lengths {lengths:?}"
            );
        }
        let config = self.bert.config();
        let longest = config.longest_text();
        let length = |(text, new): (&Text, &Vec<u32>)| text.tokens as usize + new.len();
        if let Some(found) = self.texts.iter().zip(continuations).map(length).find(|length| *length > longest) {
            candle_core::bail!("text: expected at most {longest} tokens, found {found}");
        }
        let columns = continuations.iter().map(|new| new.len()).max().unwrap_or(0);
        let first_place = match config.model_type {
            TextModel::Bert => 0,
            TextModel::Roberta => config.pad_token_id + 1,
        };
        let (mut ids, mut places, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for (row, (text, new)) in self.texts.iter_mut().zip(continuations).enumerate() {
            let padding = columns - new.len();
            ids.extend(new.iter().copied().chain(std::iter::repeat_n(config.pad_token_id, padding)));
            // Where padding stands does not matter: nothing sees it.
            places.extend((0..columns).map(|i| first_place + text.tokens + i.min(new.len() - 1) as u32));
            text.bias.extend((0..columns).map(|i| if i < new.len() { 0.0 } else { HIDDEN }));
            text.tokens += new.len() as u32;
            last.push((row * columns + new.len() - 1) as u32);
        }
        let device = self.seen.device();
        let tensor = |ids: Vec<u32>| Tensor::from_vec(ids, (count, columns), device);
        let bias: Vec<f32> = self.texts.iter().flat_map(|text| text.bias.iter().copied()).collect();
        let bias = Tensor::from_vec(bias, (count, ()), device)?;
        let pass = Pass::inference();
        let places = kernels::embedding(&self.bert.positions, &tensor(places)?, None)?;
        let mut x = self.bert.embed(&tensor(ids)?, &places, &pass)?;
        for (layer, state) in self.bert.layers.iter().zip(&mut self.layers) {
            let qkv = state.qkv.forward(&x)?;
            let attended = kernels::cached_attention(&qkv, &mut state.own, &bias, config.num_attention_heads)?;
            x = layer.attention.output.forward(&attended, &x, &pass)?;
            if let (Some(cross), Some(kv)) = (&layer.cross, &state.concepts) {
                x = cross.look(&x, kv, &self.index, &self.seen, layer.number, &pass)?;
            }
            x = layer.feed(&x, &pass)?;
        }
        x.flatten(0, 1)?.index_select(&Tensor::new(last, device)?, 0)
    }

    /// Goes on with these of the texts in this order; some may be there several times, as the beams of a search are.
    ///
    /// # Errors
    /// If there is no text of that number.
    pub fn select(&mut self, rows: &[u32]) -> Result<()> {
        let count = self.texts.len();
        if let Some(row) = rows.iter().find(|&&row| row as usize >= count) {
            candle_core::bail!("texts: expected numbers below {count}, found {row}");
        }
        if rows.iter().copied().eq(0..count as u32) {
            return Ok(());
        }
        for state in &mut self.layers {
            state.own.select(rows)?;
        }
        self.seen = match rows {
            // Nor does candle choose none on a GPU.
            [] => self.seen.narrow(0, 0, 0)?,
            _ => self.seen.index_select(&Tensor::new(rows, self.seen.device())?, 0)?,
        };
        self.index = rows.iter().map(|&row| self.index[row as usize]).collect();
        self.texts = rows.iter().map(|&row| self.texts[row as usize].clone()).collect();
        Ok(())
    }
}
