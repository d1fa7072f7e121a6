//! Writing about an image token by token: what captions and answers have in common, in training and in use.

use candle_core::{DType, Result, Tensor};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use xvlm_data::GenerationTensors;
use xvlm_encoders::{Concepts, Pass, Xvlm};
use xvlm_losses as losses;

use crate::BATCH;
use crate::error::TaskError;
use crate::model::{ImageTokens, Model};
use crate::search::{Sampling, Search, Sequence, TextSearch};

/// The share of a label that is spread over the vocabulary (`label_smoothing` of the original's `configs/Captioning.yaml`).
pub const LABEL_SMOOTHING: f32 = 0.1;

/// A text the model wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// The text, without what it was to continue.
    pub text: String,
    /// How likely it is: see [`crate::Sequence::score`].
    pub score: f32,
}

/// What texts look at: the patch tokens of images or regions, or the states of questions.
#[derive(Clone, Debug)]
pub struct Source {
    /// `[N, L, C]`.
    pub tokens: Tensor,
    /// Which tokens of each are visible `[N, L]`, 0 or 1.
    pub mask: Tensor,
}

impl Source {
    /// Whole images.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn images(images: &ImageTokens) -> Result<Self> {
        Self::whole(&images.0)
    }

    /// Tokens `[N, L, C]`, all of which are visible.
    pub(crate) fn whole(tokens: &Tensor) -> Result<Self> {
        let (n, l, _) = tokens.dims3()?;
        Ok(Self { tokens: tokens.clone(), mask: Tensor::ones((n, l), DType::F32, tokens.device())? })
    }

    /// Runs `look` with rows that look at the sources `index` names. Keys and values are computed for each source once, and
    /// only for those that are looked at.
    ///
    /// # Errors
    /// If an index names no source, or `look` fails.
    pub fn look_at<T>(&self, index: &[u32], look: impl FnOnce(&Concepts) -> Result<T>) -> Result<T> {
        let device = self.tokens.device();
        let mut used = index.to_vec();
        used.sort_unstable();
        used.dedup();
        let rows: Vec<u32> = index.iter().map(|source| used.partition_point(|other| other < source) as u32).collect();
        let tokens = self.tokens.index_select(&Tensor::new(used, device)?, 0)?;
        let mask = self.mask.index_select(&Tensor::new(index, device)?, 0)?;
        look(&Concepts { tokens: &tokens, index: &rows, mask: &mask })
    }
}

/// The loss of writing texts about images token by token: teacher forcing with a causal mask.
///
/// # Errors
/// If a tensor operation fails, or the model cannot write.
pub fn writing_loss(
    model: &Xvlm,
    batch: &GenerationTensors,
    images: &Tensor,
    smoothing: f32,
    pass: &Pass,
) -> Result<Tensor> {
    let (b, t) = batch.ids.dims2()?;
    let mask = Tensor::ones((b, images.dim(1)?), DType::F32, images.device())?;
    let looks = Concepts { tokens: images, index: &batch.image_index, mask: &mask };
    let decoded = model.decode(&batch.ids, &batch.mask, &looks, pass)?;
    let (positions, labels): (Vec<u32>, Vec<i64>) =
        batch.labels.iter().enumerate().filter(|(_, label)| **label >= 0).map(|(i, &label)| (i as u32, label)).unzip();
    let written = decoded.reshape((b * t, ()))?.index_select(&Tensor::new(positions, images.device())?, 0)?;
    losses::generation(&model.next_token_logits(&written)?, &labels, smoothing)
}

/// How tokens are drawn, and with what generator.
pub type Draw<'a> = (Sampling, &'a mut ChaCha8Rng);

/// Continues each row of token ids about its source.
pub(crate) fn write(
    model: &Model,
    source: &Source,
    rows: &[(u32, Vec<u32>)],
    search: Search,
) -> std::result::Result<Vec<Written>, TaskError> {
    write_rows(model, source, rows, search, None)
}

/// Continues each row of token ids about its source, by search or by drawing.
pub(crate) fn write_rows(
    model: &Model,
    source: &Source,
    rows: &[(u32, Vec<u32>)],
    search: Search,
    mut draw: Option<Draw>,
) -> std::result::Result<Vec<Written>, TaskError> {
    let mut written = Vec::with_capacity(rows.len());
    for rows in rows.chunks(BATCH) {
        let (index, prompts): (Vec<u32>, Vec<Vec<u32>>) = rows.iter().cloned().unzip();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let room = model.config().model.text_config.longest_text().saturating_sub(longest);
        let search = Search { max_tokens: search.max_tokens.min(room), ..search };
        let end = model.tokenizer().sep_id();
        let draw = draw.as_mut().map(|(sampling, rng)| (*sampling, &mut **rng));
        let texts = source.look_at(&index, |looks| search_texts(model.xvlm(), looks, &prompts, search, end, draw))?;
        for (prompt, sequence) in prompts.iter().zip(texts) {
            let new = sequence.ids.get(prompt.len()..).unwrap_or_default();
            written.push(Written { text: model.tokenizer().decode(new), score: sequence.score });
        }
    }
    Ok(written)
}

/// Searches for the texts that continue prompts about what they look at, or draws them; `end` is the token that ends a text.
/// Tokens of prompts and texts together must not be more than the model has positions for.
///
/// # Errors
/// If a tensor operation fails, or the model cannot write.
pub fn search_texts(
    model: &Xvlm,
    looks: &Concepts,
    prompts: &[Vec<u32>],
    search: Search,
    end: u32,
    draw: Option<Draw>,
) -> Result<Vec<Sequence>> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut texts = match draw {
        Some((sampling, rng)) => TextSearch::drawn(prompts.iter().cloned(), search, sampling, end, rng),
        None => TextSearch::new(prompts.iter().cloned(), search, end),
    };
    let mut decoding = model.begin_texts(looks, longest + search.max_tokens)?;
    let mut new = prompts.to_vec();
    while !texts.is_over() {
        let states = decoding.extend(&new)?;
        let logits = model.next_token_logits(&states)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        texts.advance(logits.iter().map(Vec::as_slice));
        decoding.select(&texts.parents().collect::<Vec<_>>())?;
        new = texts.live().map(|(_, ids)| ids[ids.len() - 1..].to_vec()).collect();
    }
    Ok(texts.finish())
}
