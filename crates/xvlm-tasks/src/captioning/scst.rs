//! Self-critical sequence training (Rennie et al. 2017; the original's `Captioning_scst.py`): captions are drawn, and those
//! that are rewarded more than a baseline become likelier.

use candle_core::{Result, Tensor};
use rand_chacha::ChaCha8Rng;
use xvlm_data::annotations::{DocumentCounts, read_document_counts};
use xvlm_data::tensors::ReferenceTensors;
use xvlm_data::{TextTokenizer, pre_caption};
use xvlm_encoders::{Pass, Xvlm};
use xvlm_losses as losses;
use xvlm_metrics::captions::cider::{CiderD, DocumentFrequencies, with_end};
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

impl Scst<CiderD> {
    /// Rewards by CIDEr-D, with the document frequencies of the configuration's file, or, without one, of the captions of the
    /// training images, each an image's.
    ///
    /// # Errors
    /// If the file cannot be read, or as [`Self::new`].
    pub fn open<'a>(
        task: &ScstTask,
        images: impl IntoIterator<Item = &'a [String]>,
        tokenizer: &TextTokenizer,
    ) -> std::result::Result<Self, TaskError> {
        let frequencies = match &task.cider_cached_tokens {
            Some(file) => {
                let DocumentCounts { documents, counts } = read_document_counts(file)?;
                DocumentFrequencies::from_counts(documents, counts)?
            }
            None => DocumentFrequencies::of_references(&documents(images, task.data.max_words))?,
        };
        Self::new(task, CiderD::new(frequencies), tokenizer)
    }
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

    /// The most tokens of a caption with its prompt.
    pub(crate) fn longest(&self) -> usize {
        self.prompt.len() + self.max_tokens
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
        let texts = source.look_at(&index, |looks| search_texts(model, looks, &prompts, search, self.end, draw))?;
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
    fn loss(&self, model: &Xvlm, images: &Tensor, drawn: &[Drawn], advantages: &[f32], pass: &Pass) -> Result<Tensor> {
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

/// The captions of training images as they are rewarded ([`with_end`]): what document frequencies are computed from where no
/// file has them. Captions of which cleaning leaves nothing are none, and images without others are no documents.
pub fn documents<'a>(images: impl IntoIterator<Item = &'a [String]>, max_words: usize) -> Vec<Vec<String>> {
    let cleaned = |text: &String| pre_caption(text, max_words).ok().map(|text| with_end(&text));
    let documents = images.into_iter().map(|captions| captions.iter().filter_map(cleaned).collect());
    documents.filter(|captions: &Vec<String>| !captions.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::sync::Arc;

    use candle_core::{D, DType, Device, Var};
    use rand::SeedableRng;
    use serde_json::json;
    use xvlm_encoders::{Parameters, Task};
    use xvlm_kernels as kernels;
    use xvlm_train::ranks::{Alone, Communicator};
    use xvlm_train::{Gradients, Tape};

    use super::*;

    /// Rewards a word.
    struct Word(&'static str);

    impl Reward for Word {
        fn rewards(&self, captions: &[String], references: &[String]) -> std::result::Result<Vec<f64>, TaskError> {
            assert!(references.iter().chain(captions).all(|text| text.ends_with(" <eos>")), "{captions:?}");
            let share = |text: &String| {
                let words: Vec<&str> = text.split_whitespace().collect();
                words.iter().filter(|word| **word == self.0).count() as f64 / words.len() as f64
            };
            Ok(captions.iter().map(share).collect())
        }
    }

    fn tokenizer() -> TextTokenizer {
        TextTokenizer::from_vocabulary(&["a", "picture", "of", "red", "blue"].map(str::to_owned)).unwrap()
    }

    fn model(tokenizer: &TextTokenizer, dtype: DType) -> (Xvlm, Vec<(String, Var)>) {
        let config = json!({
            "task": Task::Captioning,
            "vision_config": {
                "kind": "swin",
                "image_res": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
            },
            "text_config": {
                "vocab_size": tokenizer.vocab_size(), "hidden_size": 16, "num_hidden_layers": 2, "fusion_layer": 1,
                "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 24,
            },
            "embed_dim": 16,
        });
        let parameters = Parameters::new(3);
        let config = serde_json::from_value(config).unwrap();
        let model = Xvlm::new(&config, parameters.builder(dtype, &Device::Cpu)).unwrap();
        (model, parameters.named())
    }

    fn scst(tokenizer: &TextTokenizer, baseline: Baseline) -> Scst<Word> {
        Scst {
            reward: Word("red"),
            prompt: prompt_tokens("a picture of", tokenizer, 30, 40).unwrap(),
            max_tokens: 5,
            samples: 4,
            baseline,
            end: tokenizer.sep_id(),
            padding: tokenizer.pad_id(),
        }
    }

    fn pixels(images: usize, dtype: DType) -> Tensor {
        let values: Vec<f32> = (0..images * 3 * 16 * 16).map(|i| (i as f32 * 0.37).sin()).collect();
        Tensor::from_vec(values, (images, 3, 16, 16), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }

    fn drawn(scst: &Scst<Word>) -> Vec<Drawn> {
        // Captions of several lengths: one that ends, one that was cut off, one without a word.
        let word = |text: &str| tokenizer().token_to_id(text).unwrap();
        let (red, blue) = (word("red"), word("blue"));
        [(0, vec![red, blue, scst.end]), (1, vec![blue, red, red, blue, red]), (1, vec![scst.end])]
            .map(|(image, tokens)| Drawn { image, tokens })
            .into()
    }

    #[test]
    fn the_loss_is_that_of_the_texts_one_by_one() {
        let tokenizer = tokenizer();
        let ((model, _), scst) = (model(&tokenizer, DType::F32), scst(&tokenizer, Baseline::Greedy));
        let (drawn, advantages) = (drawn(&scst), [0.5, -1.5, 2.0]);
        let pass = Pass::inference();
        let images = model.encode_image(&pixels(2, DType::F32), &pass).unwrap();
        let found = scst.loss(&model, &images, &drawn, &advantages, &pass).unwrap().to_scalar::<f32>().unwrap();
        let source = Source::whole(&images).unwrap();
        let mut expected = 0.0;
        for (drawn, advantage) in drawn.iter().zip(advantages) {
            let mut total = 0.0;
            for (place, &token) in drawn.tokens.iter().enumerate() {
                let ids: Vec<u32> = scst.prompt.iter().chain(&drawn.tokens[..place]).copied().collect();
                let t = ids.len();
                let ids = Tensor::from_vec(ids, (1, t), &Device::Cpu).unwrap();
                let mask = Tensor::ones((1, t), DType::F32, &Device::Cpu).unwrap();
                let states = source.look_at(&[drawn.image], |looks| model.decode(&ids, &mask, looks, &pass)).unwrap();
                let last = states.narrow(1, t - 1, 1).unwrap().squeeze(1).unwrap().contiguous().unwrap();
                let logits = model.next_token_logits(&last).unwrap();
                let log = kernels::log_softmax(&logits, D::Minus1).unwrap().to_vec2::<f32>().unwrap();
                total += log[0][token as usize];
            }
            expected -= advantage * total / drawn.tokens.len() as f32 / 3.0;
        }
        assert!((found - expected).abs() < 1e-4, "{found} for {expected}");
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let tokenizer = tokenizer();
        let ((model, parameters), scst) = (model(&tokenizer, DType::F64), scst(&tokenizer, Baseline::Greedy));
        let (drawn, advantages) = (drawn(&scst), [0.5, -1.5, 2.0]);
        let pixels = pixels(2, DType::F64);
        let loss = || {
            let pass = Pass::inference();
            let images = model.encode_image(&pixels, &pass).unwrap();
            scst.loss(&model, &images, &drawn, &advantages, &pass).unwrap()
        };
        let gradients = loss().backward().unwrap();
        let mut seen = 0;
        for (name, var) in &parameters {
            // Every part of the model; what a parameter's first numbers do not reach, its last do.
            let shape = var.shape().clone();
            let before = var.as_detached_tensor().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let at = before.len() / 2;
            let gradient = gradients
                .get(var)
                .map_or(0.0, |gradient| gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap()[at]);
            let moved = |by: f64| {
                let mut values = before.clone();
                values[at] += by;
                var.set(&Tensor::from_vec(values, &shape, &Device::Cpu).unwrap()).unwrap();
                loss().to_scalar::<f64>().unwrap()
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            moved(0.0);
            assert!(
                (gradient - difference).abs() < 1e-7 * (1.0 + difference.abs()),
                "{name}: {gradient}, {difference}"
            );
            seen += usize::from(gradient.abs() > 1e-9);
        }
        assert!(seen > parameters.len() / 2, "{seen} of {}", parameters.len());
    }

    #[test]
    fn what_is_rewarded_becomes_likelier() {
        let tokenizer = tokenizer();
        let references = vec![vec!["red".to_owned()]; 2];
        for baseline in [Baseline::Greedy, Baseline::Sample] {
            let (model, parameters) = model(&tokenizer, DType::F32);
            let scst = scst(&tokenizer, baseline);
            let batch = ReferenceTensors { pixels: pixels(2, DType::F32), references: references.clone() };
            let ranks = Arc::new(Alone) as Arc<dyn Communicator>;
            let rng = &mut ChaCha8Rng::seed_from_u64(5);
            let mut rewards = Vec::new();
            for _ in 0..60 {
                let tape: Rc<Tape> = Rc::default();
                let done =
                    scst.losses(&model, &batch, &tokenizer, &mut Step { rng, tape: &tape, ranks: &ranks }).unwrap();
                rewards.push(done.reward);
                let mut gradients = Gradients::default();
                tape.backward(done.loss, &mut gradients, |_, _| Ok(())).unwrap();
                for (_, var) in &parameters {
                    if let Some(gradient) = gradients.get(var) {
                        var.set(&(var.as_detached_tensor() - (gradient * 2.0).unwrap()).unwrap()).unwrap();
                    }
                }
            }
            let (before, after) = (mean(&rewards[..10]), mean(&rewards[50..]));
            assert!(after > before + 0.1, "{baseline:?}: {before} before, {after} after");
        }
    }

    #[test]
    fn a_model_of_half_a_type_is_trained_too() {
        let tokenizer = tokenizer();
        let (model, parameters) = model(&tokenizer, DType::BF16);
        let scst = scst(&tokenizer, Baseline::Sample);
        let references = vec![vec!["red".to_owned()]; 2];
        let batch = ReferenceTensors { pixels: pixels(2, DType::F32), references };
        let (tape, ranks): (Rc<Tape>, _) = (Rc::default(), Arc::new(Alone) as Arc<dyn Communicator>);
        let rng = &mut ChaCha8Rng::seed_from_u64(5);
        let done = scst.losses(&model, &batch, &tokenizer, &mut Step { rng, tape: &tape, ranks: &ranks }).unwrap();
        assert!(done.loss.dtype() == DType::F32 && done.loss.to_scalar::<f32>().unwrap().is_finite());
        let mut gradients = Gradients::default();
        tape.backward(done.loss, &mut gradients, |_, _| Ok(())).unwrap();
        assert!(parameters.iter().filter(|(_, var)| gradients.get(var).is_some()).count() > parameters.len() / 2);
    }

    #[test]
    fn rewards_are_measured_against_a_baseline() {
        let rewards = [1.0, 2.0, 6.0, 4.0];
        assert_eq!(baselines(&rewards, 2, Some(&[0.5, 7.0])), [0.5, 0.5, 7.0, 7.0]);
        assert_eq!(baselines(&rewards, 2, None), [2.0, 1.0, 4.0, 6.0]);
        assert_eq!(baselines(&rewards, 4, None), [4.0, 11.0 / 3.0, 7.0 / 3.0, 3.0]);
    }

    #[test]
    fn a_caption_that_was_cut_off_loses_its_last_word() {
        let tokenizer = tokenizer();
        let scst = scst(&tokenizer, Baseline::Greedy);
        let texts: Vec<String> = drawn(&scst).iter().map(|drawn| scst.text(drawn, &tokenizer)).collect();
        assert_eq!(texts, ["red blue", "blue red red blue", ""]);
    }

    #[test]
    fn documents_are_cleaned_and_have_an_end() {
        let images = [vec!["A red circle.".to_owned(), "?".to_owned(), "Blue!".to_owned()], vec!["?".to_owned()]];
        let found = documents(images.iter().map(Vec::as_slice), 30);
        assert_eq!(found, [["a red circle <eos>", "blue <eos>"]]);
    }
}
