//! Blanks in texts for masked language modelling (X-VLM `dataset/pretrain_dataset.py`,
//! `TextMaskingGenerator`): whole words and short runs of words.

use std::collections::BTreeSet;

use rand::Rng;
use rand::seq::{IteratorRandom, SliceRandom};
use serde::{Deserialize, Serialize};

use crate::tokens::TextTokenizer;

/// How blanks are chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaskingGenerator {
    /// Share of a text's tokens to predict. Default 0.25.
    pub mask_prob: f64,
    /// Most tokens of a text to predict. Default 8.
    pub max_masks: usize,
    /// Probability to take a run of words instead of one. Default 0.2.
    pub skipgram_prb: f64,
    /// Longest such run; the shortest is 2. Default 3.
    pub skipgram_size: usize,
    /// Whether a piece takes the rest of its word with it. Default true.
    pub mask_whole_word: bool,
}

impl Default for MaskingGenerator {
    fn default() -> Self {
        Self { mask_prob: 0.25, max_masks: 8, skipgram_prb: 0.2, skipgram_size: 3, mask_whole_word: true }
    }
}

/// A text with blanks and what belongs there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Masked {
    /// The tokens with blanks.
    pub ids: Vec<u32>,
    /// Where something is to be predicted, ascending; never 0.
    pub positions: Vec<u32>,
    /// The original token at each of these positions.
    pub labels: Vec<u32>,
}

impl MaskingGenerator {
    /// Makes blanks in `ids`, a text that begins with `[CLS]`: of the chosen tokens 80 % become
    /// `[MASK]`, 10 % any token, and 10 % stay. A text of `[CLS]` alone comes back unchanged.
    pub fn mask(&self, ids: &[u32], tokenizer: &TextTokenizer, rng: &mut impl Rng) -> Masked {
        let positions = self.positions(ids, tokenizer, rng);
        let mut masked = ids.to_vec();
        for &position in &positions {
            if rng.random_bool(0.8) {
                masked[position] = tokenizer.mask_id();
            } else if rng.random_bool(0.5) {
                masked[position] = rng.random_range(0..tokenizer.vocab_size() as u32);
            }
        }
        Masked {
            ids: masked,
            labels: positions.iter().map(|&position| ids[position]).collect(),
            positions: positions.iter().map(|&position| position as u32).collect(),
        }
    }

    fn positions(&self, ids: &[u32], tokenizer: &TextTokenizer, rng: &mut impl Rng) -> Vec<usize> {
        // Python rounds halves to even.
        let share = (ids.len() as f64 * self.mask_prob).round_ties_even() as usize;
        let wanted = share.max(1).min(self.max_masks);
        let mut candidates: Vec<usize> = (1..ids.len()).collect();
        candidates.shuffle(rng);
        let mut chosen = BTreeSet::new();
        for start in candidates {
            if chosen.len() >= wanted {
                break;
            }
            if chosen.contains(&start) {
                continue;
            }
            let run = self.skipgram_size >= 2 && rng.random_bool(self.skipgram_prb.clamp(0.0, 1.0));
            let count = if run { rng.random_range(2..=self.skipgram_size) } else { 1 };
            let (mut start, mut end) = (start, (start + count).min(ids.len()));
            if self.mask_whole_word {
                while start > 1 && tokenizer.continues_word(ids[start]) {
                    start -= 1;
                }
                while end < ids.len() && tokenizer.continues_word(ids[end]) {
                    end += 1;
                }
            }
            chosen.extend(start..end);
        }
        if chosen.len() <= wanted {
            return chosen.into_iter().collect();
        }
        // The last word or run went over the limit.
        let mut kept = chosen.into_iter().choose_multiple(rng, wanted);
        kept.sort_unstable();
        kept
    }
}
