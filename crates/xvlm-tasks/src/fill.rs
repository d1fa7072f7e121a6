//! Filling in the blank of a phrase about a picture, with the masked-language head.

use std::path::Path;

use candle_core::D;
use serde::Serialize;
use xvlm_data::annotations::{FillItem, read_fill};
use xvlm_data::pre_caption;
use xvlm_encoders::{Attention, Task};
use xvlm_kernels as kernels;
use xvlm_metrics::fill::FillScores;

use crate::error::TaskError;
use crate::model::{ImageTokens, Model};
use crate::{BATCH, Counter, Item, ask_all, some};

/// A word for the blank.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Completion {
    /// The word.
    pub word: String,
    /// Its probability.
    pub probability: f32,
}

/// Ranks the words of the vocabulary for the blank (`___` or `[MASK]`) of each phrase, given with the row of `images` it
/// is about; the `top` best of each. Pieces of words and special tokens are left out.
///
/// # Errors
/// If a phrase has no blank or several, or the model is made for another task.
pub fn fill(
    model: &Model,
    images: &ImageTokens,
    phrases: &[(u32, &str)],
    top: usize,
) -> Result<Vec<Vec<Completion>>, TaskError> {
    model.fit_for("blanks", &[Task::Pretrain])?;
    let words = whole_words(model);
    let mut completions = Vec::new();
    for phrases in phrases.chunks(4 * BATCH) {
        let index: Vec<u32> = phrases.iter().map(|(image, _)| *image).collect();
        let rows = phrases.iter().map(|(_, text)| with_blank(model, text)).collect::<Result<Vec<_>, _>>()?;
        let tokens = model.pad(&rows.iter().map(|(ids, _)| ids.clone()).collect::<Vec<_>>())?;
        let fused = model.look(&model.encode_texts(&tokens)?, &tokens.mask, images, &index, Attention::Full)?;
        let (b, t, _) = fused.dims3()?;
        let blanks: Vec<u32> = rows.iter().enumerate().map(|(i, (_, blank))| (i * t + blank) as u32).collect();
        let blanks = candle_core::Tensor::new(blanks, model.device())?;
        let logits = model.xvlm().mlm_logits(&fused.reshape((b * t, ()))?.index_select(&blanks, 0)?)?;
        let probabilities: Vec<Vec<f32>> = kernels::softmax(&logits, D::Minus1)?.to_vec2()?;
        completions.extend(probabilities.iter().map(|row| {
            let mut ranked: Vec<&(u32, String)> = words.iter().collect();
            ranked.sort_by(|a, b| row[b.0 as usize].total_cmp(&row[a.0 as usize]));
            let completion =
                |(id, word): &(u32, String)| Completion { word: word.clone(), probability: row[*id as usize] };
            ranked.into_iter().take(top).map(completion).collect::<Vec<_>>()
        }));
    }
    Ok(completions)
}

/// Token ids of a phrase and the position of its blank.
fn with_blank(model: &Model, text: &str) -> Result<(Vec<u32>, usize), TaskError> {
    let config = model.config();
    let marked = text.replace("[MASK]", "__");
    // A blank is a run of two or more underscores.
    let (mut sides, mut rest) = (Vec::new(), marked.as_str());
    while let Some(at) = rest.find("__") {
        sides.push(&rest[..at]);
        rest = rest[at..].trim_start_matches('_');
    }
    sides.push(rest);
    let [before, after] = sides.as_slice() else {
        return Err(TaskError::Blank { text: text.to_owned(), found: sides.len() - 1 });
    };
    let tokenizer = model.tokenizer();
    let pieces = |side: &str| -> Result<Vec<u32>, TaskError> {
        match side.trim().is_empty() {
            true => Ok(Vec::new()),
            false => Ok(tokenizer.tokens(&pre_caption(side, usize::MAX)?)?),
        }
    };
    // Of a phrase that is too long, what is next to the blank stays.
    let (before, after) = (pieces(before)?, pieces(after)?);
    let room = config.max_tokens.saturating_sub(2);
    let left = before.len().min(room - after.len().min(room / 2));
    let right = after.len().min(room - left);
    let ids = [&[tokenizer.cls_id()], &before[before.len() - left..], &[tokenizer.mask_id()], &after[..right]].concat();
    Ok((ids, 1 + left))
}

/// Tokens that are words of their own.
fn whole_words(model: &Model) -> Vec<(u32, String)> {
    let tokenizer = model.tokenizer();
    (0..tokenizer.vocab_size() as u32)
        .filter_map(|id| Some((id, tokenizer.id_to_token(id)?)))
        .filter(|(_, token)| !token.starts_with("##") && !token.starts_with('['))
        .filter(|(_, token)| token.chars().any(char::is_alphanumeric))
        .collect()
}

/// What the model proposed for each item of a data set, and the scores.
pub struct Evaluation {
    /// The items.
    pub items: Vec<FillItem>,
    /// The best five words for each.
    pub completions: Vec<Vec<Completion>>,
    /// How often an accepted word came first, and among the first five.
    pub scores: FillScores,
}

impl Item for FillItem {
    fn image(&self) -> &Path {
        &self.image
    }

    fn text(&self) -> &str {
        &self.text
    }
}

/// Evaluates on `fill.json` of a folder.
///
/// # Errors
/// If the file or an image cannot be read.
pub fn evaluate(model: &Model, data: &Path, counter: Counter) -> Result<Evaluation, TaskError> {
    let items = some(read_fill(data.join("fill.json"))?, data, "fill.json")?;
    let ask = |images: &ImageTokens, phrases: &[(u32, &str)]| fill(model, images, phrases, 5);
    let completions = ask_all(model, &items, |_, _| Ok(()), ask, counter)?;
    let ranks = items.iter().zip(&completions).map(|(item, completions): (_, &Vec<Completion>)| {
        let accepted = |c: &Completion| item.answers.iter().any(|answer| answer.eq_ignore_ascii_case(&c.word));
        (item.kind.as_str(), completions.iter().position(accepted))
    });
    Ok(Evaluation { scores: FillScores::new(ranks), items, completions })
}
