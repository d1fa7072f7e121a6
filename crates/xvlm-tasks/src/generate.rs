//! Writing about a picture token by token, by beam search: what captions and answers have in common.

use std::cmp::Ordering;

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};
use xvlm_encoders::{Attention, Pass};
use xvlm_kernels as kernels;

use crate::BATCH;
use crate::error::TaskError;
use crate::model::{ImageTokens, Model};

/// How a text is searched for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Search {
    /// Texts followed at a time; 1 is greedy. The original's captioning uses 3.
    pub beams: usize,
    /// No end before that many new tokens.
    pub min_tokens: usize,
    /// No more than that many new tokens.
    pub max_tokens: usize,
}

impl Default for Search {
    fn default() -> Self {
        Self { beams: 3, min_tokens: 5, max_tokens: 30 }
    }
}

impl Search {
    /// For answers, which may be one word.
    pub fn answers() -> Self {
        Self { beams: 1, min_tokens: 1, max_tokens: 10 }
    }
}

/// A text the model wrote.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Written {
    /// The text, without what it was to continue.
    pub text: String,
    /// Mean log-probability of its tokens.
    pub score: f32,
}

/// A text on its way.
#[derive(Clone)]
struct Hypothesis {
    ids: Vec<u32>,
    log_probability: f32,
}

/// The texts followed for one image.
struct Beam {
    image: u32,
    prompt: usize,
    live: Vec<Hypothesis>,
    ended: Vec<(Hypothesis, f32)>,
}

impl Beam {
    fn best_ended(&self) -> f32 {
        self.ended.iter().map(|(_, score)| *score).fold(f32::NEG_INFINITY, f32::max)
    }

    /// Mean log-probability of the new tokens.
    fn score(&self, hypothesis: &Hypothesis) -> f32 {
        hypothesis.log_probability / (hypothesis.ids.len() - self.prompt).max(1) as f32
    }

    fn finish(mut self) -> (Hypothesis, f32) {
        let live: Vec<_> = self.live.drain(..).collect();
        for hypothesis in live {
            let score = self.score(&hypothesis);
            self.ended.push((hypothesis, score));
        }
        let best = self.ended.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
        best.unwrap_or((Hypothesis { ids: Vec::new(), log_probability: 0.0 }, 0.0))
    }
}

/// Continues each row of token ids about its image by beam search.
pub(crate) fn write(
    model: &Model,
    images: &ImageTokens,
    rows: &[(u32, Vec<u32>)],
    search: Search,
) -> Result<Vec<Written>, TaskError> {
    let mut written = Vec::with_capacity(rows.len());
    for rows in rows.chunks(BATCH) {
        let start = |(image, ids): &(u32, Vec<u32>)| Beam {
            image: *image,
            prompt: ids.len(),
            live: vec![Hypothesis { ids: ids.clone(), log_probability: 0.0 }],
            ended: Vec::new(),
        };
        let mut beams: Vec<Beam> = rows.iter().map(start).collect();
        let longest = rows.iter().map(|(_, ids)| ids.len()).max().unwrap_or(0);
        let room = model.config().model.text_config.max_position_embeddings.saturating_sub(longest);
        for step in 0..search.max_tokens.min(room) {
            if !advance(model, images, &mut beams, search, step)? {
                break;
            }
        }
        for beam in beams {
            let prompt = beam.prompt;
            let (hypothesis, score) = beam.finish();
            let new = hypothesis.ids.get(prompt..).unwrap_or_default();
            written.push(Written { text: model.tokenizer().decode(new), score });
        }
    }
    Ok(written)
}

/// Appends a token to every live text; says whether any is left.
fn advance(
    model: &Model,
    images: &ImageTokens,
    beams: &mut [Beam],
    search: Search,
    step: usize,
) -> Result<bool, TaskError> {
    let (mut ids, mut index) = (Vec::new(), Vec::new());
    for beam in beams.iter() {
        ids.extend(beam.live.iter().map(|hypothesis| hypothesis.ids.clone()));
        index.extend(beam.live.iter().map(|_| beam.image));
    }
    if ids.is_empty() {
        return Ok(false);
    }
    let scores = next_token(model, images, &ids, &index)?;
    let mut scores = scores.iter();
    let end = model.tokenizer().sep_id();
    for beam in beams.iter_mut() {
        let mut candidates: Vec<(f32, usize, u32)> = Vec::new();
        for (parent, hypothesis) in beam.live.iter().enumerate() {
            let Some(row) = scores.next() else { break };
            let allowed =
                |token: u32| token != model.tokenizer().pad_id() && (token != end || step >= search.min_tokens);
            let mut tokens: Vec<u32> = (0..row.len() as u32).filter(|&token| allowed(token)).collect();
            let by_score = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]);
            let kept = (2 * search.beams).min(tokens.len());
            if kept > 0 && kept < tokens.len() {
                tokens.select_nth_unstable_by(kept - 1, by_score);
            }
            let scored = |&token: &u32| (hypothesis.log_probability + row[token as usize], parent, token);
            candidates.extend(tokens[..kept].iter().map(scored));
        }
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
        let mut live = Vec::new();
        for (log_probability, parent, token) in candidates.into_iter().take(2 * search.beams) {
            let mut ids = beam.live[parent].ids.clone();
            if token == end {
                let score = log_probability / (ids.len() + 1 - beam.prompt) as f32;
                beam.ended.push((Hypothesis { ids, log_probability }, score));
            } else if live.len() < search.beams {
                ids.push(token);
                live.push(Hypothesis { ids, log_probability });
            }
        }
        // A longer text can only lose probability: its mean may still rise, up to that at the longest length.
        let hope = live
            .iter()
            .map(|h: &Hypothesis| h.log_probability / search.max_tokens as f32)
            .fold(f32::NEG_INFINITY, f32::max);
        let settled = beam.ended.len() >= search.beams && beam.best_ended().total_cmp(&hope) != Ordering::Less;
        beam.live = if settled { Vec::new() } else { live };
    }
    Ok(beams.iter().any(|beam| !beam.live.is_empty()))
}

/// Log-probabilities of the token after each row of ids.
fn next_token(
    model: &Model,
    images: &ImageTokens,
    ids: &[Vec<u32>],
    index: &[u32],
) -> Result<Vec<Vec<f32>>, TaskError> {
    let tokens = model.pad(ids)?;
    let pass = Pass::inference();
    let encoded = model.xvlm().encode_text(&tokens.ids, &tokens.mask, Attention::Causal, &pass)?;
    let fused = model.look(&encoded, &tokens.mask, images, index, Attention::Causal)?;
    let (b, t, _) = fused.dims3()?;
    let last: Vec<u32> = ids.iter().enumerate().map(|(row, ids)| (row * t + ids.len() - 1) as u32).collect();
    let last = fused.reshape((b * t, ()))?.index_select(&Tensor::new(last, model.device())?, 0)?;
    Ok(kernels::log_softmax(&model.xvlm().mlm_logits(&last)?, D::Minus1)?.to_vec2()?)
}
