//! Encoded texts.

use candle_core::{DType, Tensor};
use xvlm_encoders::{Attention, Pass, Xvlm};

use super::Options;

/// Encoded texts without their padding.
pub(super) struct States {
    /// The states of all tokens, text after text `[R, H]`.
    flat: Tensor,
    /// Where each text begins.
    starts: Vec<u32>,
    /// Its number of tokens.
    lengths: Vec<usize>,
}

impl States {
    /// Embeddings of all texts `[M, E]`.
    pub(super) fn embeddings(&self, model: &Xvlm) -> candle_core::Result<Tensor> {
        let first = self.flat.index_select(&Tensor::new(self.starts.as_slice(), self.flat.device())?, 0)?;
        model.project_text(&first.unsqueeze(1)?)
    }

    /// States and mask of some texts, padded to the longest of them `[B, T, H]`, `[B, T]`.
    pub(super) fn rows(&self, texts: &[u32]) -> candle_core::Result<(Tensor, Tensor)> {
        let device = self.flat.device();
        let longest = texts.iter().map(|&text| self.lengths[text as usize]).max().unwrap_or(0);
        let (mut index, mut mask) = (Vec::new(), Vec::new());
        for &text in texts {
            let (start, length) = (self.starts[text as usize], self.lengths[text as usize]);
            for token in 0..longest {
                let is_there = token < length;
                index.push(if is_there { start + token as u32 } else { start });
                mask.push(if is_there { 1f32 } else { 0.0 });
            }
        }
        let shape = (texts.len(), longest);
        let states = self.flat.index_select(&Tensor::new(index, device)?, 0)?;
        Ok((states.reshape((shape.0, shape.1, ()))?, Tensor::from_vec(mask, shape, device)?))
    }
}

/// Encodes texts, those of like length together: `each` gets the numbers of some of them, and their states `[B, T, H]`.
fn encode_each(
    model: &Xvlm,
    tokens: &[Vec<u32>],
    texts: &[u32],
    batch: usize,
    mut each: impl FnMut(&[u32], Tensor) -> candle_core::Result<()>,
) -> candle_core::Result<()> {
    let device = model.temperature()?.device();
    let mut order = texts.to_vec();
    order.sort_by_key(|&text| (tokens[text as usize].len(), text));
    for texts in order.chunks(batch.max(1)) {
        let longest = texts.iter().map(|&text| tokens[text as usize].len()).max().unwrap_or(0);
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for &text in texts {
            let own = &tokens[text as usize];
            let padding = longest - own.len();
            ids.extend(own.iter().copied().chain(std::iter::repeat_n(0, padding)));
            mask.extend(own.iter().map(|_| 1f32).chain(std::iter::repeat_n(0.0, padding)));
        }
        let shape = (texts.len(), longest);
        let ids = Tensor::from_vec(ids, shape, device)?;
        let mask = Tensor::from_vec(mask, shape, device)?;
        each(texts, model.encode_text(&ids, &mask, Attention::Full, &Pass::inference())?)?;
    }
    Ok(())
}

/// The states of some texts; `starts` and `lengths` are as long as all, those of others are 0.
pub(super) fn encode(model: &Xvlm, tokens: &[Vec<u32>], texts: &[u32], batch: usize) -> candle_core::Result<States> {
    let (mut parts, mut end) = (Vec::new(), 0);
    let (mut starts, mut lengths) = (vec![0; tokens.len()], vec![0; tokens.len()]);
    encode_each(model, tokens, texts, batch, |texts, states| {
        for (row, &text) in texts.iter().enumerate() {
            let length = tokens[text as usize].len();
            (starts[text as usize], lengths[text as usize]) = (end, length);
            end += length as u32;
            parts.push(states.get(row)?.narrow(0, 0, length)?);
        }
        Ok(())
    })?;
    Ok(States { flat: Tensor::cat(&parts, 0)?, starts, lengths })
}

/// Embeddings of all texts `[M, E]`, and their states, which are of type `dtype`, if there is room for them.
pub(super) fn encode_texts(
    model: &Xvlm,
    tokens: &[Vec<u32>],
    dtype: DType,
    options: Options,
) -> candle_core::Result<(Tensor, Option<States>)> {
    let all: Vec<u32> = (0..tokens.len() as u32).collect();
    let whole: usize = tokens.iter().map(Vec::len).sum();
    if whole <= tokens_within(model, dtype, options.memory_mib) {
        let states = encode(model, tokens, &all, options.batch_size_text)?;
        return Ok((states.embeddings(model)?, Some(states)));
    }
    let (mut rows, mut order) = (Vec::new(), Vec::new());
    encode_each(model, tokens, &all, options.batch_size_text, |texts, states| {
        order.extend_from_slice(texts);
        rows.push(model.project_text(&states)?);
        Ok(())
    })?;
    let mut place = vec![0u32; order.len()];
    order.iter().enumerate().for_each(|(at, &text)| place[text as usize] = at as u32);
    let rows = Tensor::cat(&rows, 0)?;
    Ok((rows.index_select(&Tensor::new(place, rows.device())?, 0)?, None))
}

/// Tokens whose states, of type `dtype`, fit into some memory.
pub(super) fn tokens_within(model: &Xvlm, dtype: DType, mebibytes: usize) -> usize {
    let bytes = model.config().text_config.hidden_size * dtype.size_in_bytes();
    (mebibytes << 20) / bytes
}
