//! Self-critical sequence training (Rennie et al. 2017; the original's `Captioning_scst.py`): captions are drawn, and those
//! that are rewarded more than a baseline become likelier.

use candle_core::{Result, Tensor};
use rand_chacha::ChaCha8Rng;
use xvlm_data::tensors::ReferenceTensors;
use xvlm_data::{TextTokenizer, pre_caption};
use xvlm_encoders::{Pass, Xvlm};
use xvlm_losses as losses;
use xvlm_metrics::captions::cider::{CiderD, with_end};
use xvlm_train::Step;

use super::prompt_tokens;
use crate::error::TaskError;
use crate::finetune::{Baseline, ScstTask};
use crate::generate::{Source, search_texts};
use crate::search::{Sampling, Search, Sequence};

/// What captions are worth.
pub trait Reward {
    /// The rewards of captions of one image, given its references; all are words with single spaces between them.
    ///
    /// # Errors
    /// What keeps a caption from being rewarded.
    fn rewards(&self, captions: &[String], references: &[String]) -> std::result::Result<Vec<f64>, TaskError>;
}

impl Reward for CiderD {
    fn rewards(&self, captions: &[String], references: &[String]) -> std::result::Result<Vec<f64>, TaskError> {
        let references = self.references(references)?;
        Ok(captions.iter().map(|caption| self.score(caption, &references)).collect())
    }
}

/// Training on rewards.
#[derive(Clone, Debug)]
pub struct Scst<R> {
    reward: R,
    prompt: Vec<u32>,
    max_tokens: usize,
    samples: usize,
    baseline: Baseline,
    end: u32,
    padding: u32,
}

/// What a batch of captions that were drawn has to teach.
#[derive(Clone, Debug)]
pub struct Rewarded {
    /// What is to be minimised, a scalar: it has gradients.
    pub loss: Tensor,
    /// Mean reward of the captions that were drawn.
    pub reward: f64,
    /// Mean of what they are measured against.
    pub baseline: f64,
    /// Share of the captions that were drawn without a word.
    pub empty: f64,
}

/// A caption that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The image it is about, a row of the batch.
    pub image: u32,
    /// The tokens that were drawn after the prompt, the end among them if it was drawn.
    pub tokens: Vec<u32>,
}

impl<R: Reward> Scst<R> {
    /// As a configuration says. The longest caption is that of [`ScstTask::search`]; as in the original, its least length and
    /// its penalty of repetition are of no account here, so that the distribution that is drawn from is the model's own.
    ///
    /// # Errors
    /// If the prompt cannot be tokenised.
    pub fn new(task: &ScstTask, reward: R, tokenizer: &TextTokenizer) -> std::result::Result<Self, TaskError> {
        Ok(Self {
            reward,
            prompt: prompt_tokens(&task.prompt, tokenizer, task.data.max_words, task.data.max_tokens)?,
            max_tokens: task.search.max_tokens,
            samples: task.sc_train_sample_n,
            baseline: task.sc_baseline_type,
            end: tokenizer.sep_id(),
            padding: tokenizer.pad_id(),
        })
    }

    /// Draws captions of each image, rewards them, and returns the loss that makes those likelier that are above the baseline.
    ///
    /// A caption is drawn by the model as it is in use, and the gradient is that of the same model. (The original draws with
    /// dropout, and takes the gradient with it.)
    ///
    /// # Errors
    /// If the model cannot write, or a caption cannot be rewarded.
    pub fn losses(
        &self,
        model: &Xvlm,
        batch: &ReferenceTensors,
        tokenizer: &TextTokenizer,
        step: &mut Step,
    ) -> std::result::Result<Rewarded, TaskError> {
        let pass = Pass::inference().on(step.tape);
        let images = model.encode_image(&batch.pixels, &pass)?;
        let source = Source::whole(&images.detach())?;
        let drawn = self.draw(model, &source, step.rng)?;
        let rewards = self.rewards(&drawn, &batch.references, tokenizer)?;
        let greedy = match self.baseline {
            Baseline::Greedy => {
                let greedy = self.greedy(model, &source)?;
                Some(self.rewards(&greedy, &batch.references, tokenizer)?)
            }
            Baseline::Sample => None,
        };
        let baselines = baselines(&rewards, self.samples, greedy.as_deref());
        let advantages: Vec<f32> = rewards.iter().zip(&baselines).map(|(r, b)| (r - b) as f32).collect();
        let empty = drawn.iter().filter(|drawn| self.text(drawn, tokenizer).trim().is_empty()).count();
        Ok(Rewarded {
            loss: self.loss(model, &images, &drawn, &advantages, &pass)?,
            reward: mean(&rewards),
            baseline: mean(&baselines),
            empty: empty as f64 / drawn.len().max(1) as f64,
        })
    }

    /// Captions drawn by the model: those of the first image, then those of the next.
    fn draw(&self, model: &Xvlm, source: &Source, rng: &mut ChaCha8Rng) -> Result<Vec<Drawn>> {
        let images = source.tokens.dim(0)? as u32;
        let index: Vec<u32> = (0..images).flat_map(|image| std::iter::repeat_n(image, self.samples)).collect();
        self.write(model, source, index, Some(rng))
    }

    /// The caption of each image that takes the likeliest word each time.
    fn greedy(&self, model: &Xvlm, source: &Source) -> Result<Vec<Drawn>> {
        self.write(model, source, (0..source.tokens.dim(0)? as u32).collect(), None)
    }

    fn write(
        &self,
        model: &Xvlm,
        source: &Source,
        index: Vec<u32>,
        rng: Option<&mut ChaCha8Rng>,
    ) -> Result<Vec<Drawn>> {
        let prompts = vec![self.prompt.clone(); index.len()];
        let search = Search {
            beams: 1,
            min_tokens: 0,
            max_tokens: self.max_tokens,
            repetition_penalty: 1.0,
            end_at_limit: false,
        };
        let draw = rng.map(|rng| (Sampling::default(), rng));
        let texts =
            source.look_at(&index, |looks| search_texts(model, looks, &prompts, search, self.end, draw))?;
        let drawn = |(image, text): (u32, Sequence)| {
            let mut tokens = text.ids.get(self.prompt.len()..).unwrap_or_default().to_vec();
            // Before the limit, nothing but the end ends a text.
            tokens.extend((tokens.len() < self.max_tokens).then_some(self.end));
            Drawn { image, tokens }
        };
        Ok(index.into_iter().zip(texts).map(drawn).collect())
    }

    /// The text of a caption. Of one that did not end, the last token gives way to the end, as in the original.
    fn text(&self, drawn: &Drawn, tokenizer: &TextTokenizer) -> String {
        tokenizer.decode(&drawn.tokens[..drawn.tokens.len().saturating_sub(1)])
    }

    fn rewards(
        &self,
        drawn: &[Drawn],
        references: &[Vec<String>],
        tokenizer: &TextTokenizer,
    ) -> std::result::Result<Vec<f64>, TaskError> {
        let mut rewards = Vec::with_capacity(drawn.len());
        for of_image in drawn.chunk_by(|a, b| a.image == b.image) {
            let captions: Vec<String> = of_image.iter().map(|drawn| with_end(&self.text(drawn, tokenizer))).collect();
            let own = references.get(of_image[0].image as usize).map_or(&[][..], Vec::as_slice);
            let own: Vec<String> = own.iter().map(|text| with_end(text)).collect();
            rewards.extend(self.reward.rewards(&captions, &own)?);
        }
        Ok(rewards)
    }

    /// The mean over captions of `−advantage · mean over tokens of log p(token)`, the end's among them, with the gradients of
    /// the images `[N, 1+L, C]` and of the model.
    ///
    /// # Errors
    /// If the model cannot write.
    fn loss(
        &self,
        model: &Xvlm,
        images: &Tensor,
        drawn: &[Drawn],
        advantages: &[f32],
        pass: &Pass,
    ) -> Result<Tensor> {
        let given = self.prompt.len();
        // The last token of a text is only predicted.
        let longest = drawn.iter().map(|drawn| given + drawn.tokens.len()).max().unwrap_or(0).saturating_sub(1);
        let (mut ids, mut mask, mut positions, mut tokens, mut weights) = (vec![], vec![], vec![], vec![], vec![]);
        for (row, (drawn, advantage)) in drawn.iter().zip(advantages).enumerate() {
            let read = drawn.tokens.len().saturating_sub(1);
            let start = row * longest;
            ids.extend(self.prompt.iter().chain(&drawn.tokens[..read]).copied());
            ids.resize(start + longest, self.padding);
            mask.extend(std::iter::repeat_n(1f32, given + read));
            mask.resize(start + longest, 0.0);
            positions.extend((start + given - 1..).map(|at| at as u32).take(drawn.tokens.len()));
            tokens.extend(&drawn.tokens);
            let share = advantage / (drawn.tokens.len() * advantages.len()) as f32;
            weights.extend(std::iter::repeat_n(share, drawn.tokens.len()));
        }
        let device = images.device();
        let shape = (drawn.len(), longest);
        let (ids, mask) = (Tensor::from_vec(ids, shape, device)?, Tensor::from_vec(mask, shape, device)?);
        let index: Vec<u32> = drawn.iter().map(|drawn| drawn.image).collect();
        let decoded = Source::whole(images)?.look_at(&index, |looks| model.decode(&ids, &mask, looks, pass))?;
        let decoded = decoded.flatten(0, 1)?.index_select(&Tensor::new(positions, device)?, 0)?;
        losses::policy_gradient(&model.next_token_logits(&decoded)?, &tokens, &weights)
    }
}

/// What the reward of each caption is measured against: that of its image's greedy caption, or the mean of the other captions
/// that were drawn for the image. Captions of an image stand together, `samples` of each.
fn baselines(rewards: &[f64], samples: usize, greedy: Option<&[f64]>) -> Vec<f64> {
    let of_image = |(image, own): (usize, &[f64])| -> Vec<f64> {
        match greedy {
            Some(greedy) => vec![greedy[image]; own.len()],
            None => {
                let total: f64 = own.iter().sum();
                own.iter().map(|reward| (total - reward) / own.len().saturating_sub(1).max(1) as f64).collect()
            }
        }
    };
    rewards.chunks(samples.max(1)).enumerate().flat_map(of_image).collect()
}

fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len().max(1) as f64
}

/// The captions of training images as they are rewarded ([`with_end`]): what document frequencies are computed from where no file has
/// them.
///
/// # Errors
/// If cleaning leaves nothing of a caption.
pub fn documents<'a>(
    images: impl IntoIterator<Item = &'a [String]>,
    max_words: usize,
) -> std::result::Result<Vec<Vec<String>>, TaskError> {
    let of_image = |captions: &[String]| captions.iter().map(|text| Ok(with_end(&pre_caption(text, max_words)?))).collect();
    images.into_iter().map(of_image).collect()
}
