//! The losses of each task, as the training loop knows them.

use std::cell::Cell;
use std::sync::Arc;

use candle_core::{Result, Tensor, Var};
use xvlm_data::tensors::{PhraseTensors, QuestionTensors, ReferenceTensors, StatementTensors};
use xvlm_data::{CaptionTensors, GenerationTensors, RegionTensors, TextTensors, TextTokenizer};
use xvlm_encoders::{Pass, Xvlm};
use xvlm_kernels::IGNORE;
use xvlm_losses as losses;
use xvlm_metrics::captions::cider::CiderD;
use xvlm_train::{BoxError, FinishedWeights, Losses, Step, Trainable};

use super::validate::Validation;
use super::{FinetuneConfig, FinetuneTask};
use crate::captioning::Scst;
use crate::config::ItcGradient;
use crate::finite::first_not_finite;
use crate::generate::writing_loss;
use crate::model::{ImageTokens, Model, Texts};
use crate::pretrain::clamp_temperature;
use crate::{grounding, nlvr, retrieval, vqa};

/// What the mean reward of captions is called in reports.
const REWARD: &str = "reward";

/// One batch of a task.
pub enum Batch {
    /// Whole images with a text each.
    Pairs(CaptionTensors),
    /// Boxes in images with a text each.
    Regions(RegionTensors),
    /// Questions about images.
    Questions(QuestionTensors),
    /// Statements about two images.
    Statements(StatementTensors),
    /// Phrases with their boxes.
    Phrases(PhraseTensors),
    /// Images with reference captions.
    References(ReferenceTensors),
}

impl Batch {
    /// `[N, 3, R, R]`.
    pub(super) fn pixels(&self) -> &Tensor {
        match self {
            Self::Pairs(batch) => &batch.pixels,
            Self::Regions(batch) => &batch.pixels,
            Self::Questions(batch) => &batch.pixels,
            Self::Statements(batch) => &batch.pixels,
            Self::Phrases(batch) => &batch.pixels,
            Self::References(batch) => &batch.pixels,
        }
    }

    /// Where each image is from, as far as the batch knows.
    fn records(&self) -> &[String] {
        match self {
            Self::Pairs(batch) => &batch.origins,
            Self::Regions(batch) => &batch.origins,
            _ => &[],
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Pairs(_) => "images with a text each",
            Self::Regions(_) => "regions",
            Self::Questions(_) => "questions",
            Self::Statements(_) => "statements",
            Self::Phrases(_) => "phrases",
            Self::References(_) => "images with references",
        }
    }
}

/// What is learnt.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Learning {
    Retrieval(ItcGradient),
    Answers,
    Statements,
    Assignment,
    Boxes,
    /// Captions after a prompt, with that share of labels spread over the vocabulary.
    Captions(f32),
    /// The next word of whole texts.
    Words,
    /// Captions that are rewarded.
    Rewards,
}

/// A task's model with its losses.
pub struct Finetuning {
    model: Xvlm,
    parameters: Vec<(String, Var)>,
    learning: Learning,
    /// What captions are rewarded by, and what their tokens mean.
    rewards: Option<(Scst<CiderD>, Arc<TextTokenizer>)>,
    /// Mean reward, mean baseline and share of captions without a word of the last batch.
    rewarded: Cell<Option<[f64; 3]>>,
    /// What says which checkpoint is the best.
    validation: Option<Validation>,
}

impl Finetuning {
    /// A model with its parameters, and what it is to learn.
    pub fn new(model: Xvlm, parameters: Vec<(String, Var)>, config: &FinetuneConfig) -> Self {
        let learning = match &config.task {
            FinetuneTask::Retrieval(task) => Learning::Retrieval(task.itc_gradient),
            FinetuneTask::WeakGrounding(task) => Learning::Retrieval(task.itc_gradient),
            FinetuneTask::Vqa(_) => Learning::Answers,
            FinetuneTask::Nlvr(_) => Learning::Statements,
            FinetuneTask::NlvrPretrain(_) => Learning::Assignment,
            FinetuneTask::Bbox(_) | FinetuneTask::BboxPretrain(_) => Learning::Boxes,
            FinetuneTask::Captioning(task) => Learning::Captions(task.label_smoothing as f32),
            FinetuneTask::CaptioningPretrain(_) => Learning::Words,
            FinetuneTask::CaptioningScst(_) => Learning::Rewards,
        };
        Self { model, parameters, learning, rewards: None, rewarded: Cell::new(None), validation: None }
    }

    /// The same, for captions that are rewarded: by what.
    pub fn with_rewards(self, scst: Scst<CiderD>, tokenizer: Arc<TextTokenizer>) -> Self {
        Self { rewards: Some((scst, tokenizer)), ..self }
    }

    /// The same, validated at each checkpoint.
    pub(super) fn with_validation(self, validation: Validation) -> Self {
        Self { validation: Some(validation), ..self }
    }

    /// The model inside.
    pub fn model(&self) -> &Xvlm {
        &self.model
    }

    fn losses_in(&self, pass: &Pass, batch: &Batch, step: &mut Step) -> Result<Losses> {
        let model = &self.model;
        let encode = || Ok::<_, candle_core::Error>(ImageTokens::new(model.encode_image(batch.pixels(), pass)?));
        let one = |name, loss| Ok(Losses(vec![(name, loss)]));
        match (&self.learning, batch) {
            (Learning::Retrieval(itc_gradient), Batch::Pairs(batch)) => {
                let rng = &mut *step.rng;
                let mut negatives = |scores: &Tensor, keys: &[i64]| losses::hard_negatives(scores, keys, None, rng);
                let ranks = Some((step.ranks, *itc_gradient));
                retrieval::losses(model, &encode()?, &batch.text, pass, &mut negatives, ranks)
            }
            (Learning::Answers, Batch::Questions(batch)) => {
                let Some(answers) = &batch.answers else {
                    candle_core::bail!("questions: expected answers, found none")
                };
                let questions = (&texts(&batch.questions), batch.image_index.as_slice());
                let given = (&texts(&answers.text), answers.question_index.as_slice());
                one("answer", vqa::loss(model, &encode()?, questions, given, &answers.weights, pass)?)
            }
            (Learning::Statements, Batch::Statements(batch)) => {
                one("statement", nlvr::loss(model, &encode()?, &texts(&batch.text), &batch.is_true, pass)?)
            }
            (Learning::Assignment, Batch::Pairs(batch)) => {
                let images = encode()?;
                let assignments = nlvr::assign(&nlvr::assignment_weights(model, &images)?, step.rng)?;
                let (_, loss) = nlvr::assignment(model, &images, &texts(&batch.text), &assignments, pass)?;
                one("assignment", loss)
            }
            (Learning::Boxes, Batch::Phrases(batch)) => {
                let images = encode()?;
                let index: Vec<u32> = (0..images.len() as u32).collect();
                let is_image = vec![false; images.len()];
                grounding::losses(model, &images, &batch.text, &index, &batch.boxes, &is_image, pass)
            }
            (Learning::Boxes, Batch::Regions(batch)) => {
                let RegionTensors { text, image_index, boxes, is_image, .. } = batch;
                grounding::losses(model, &encode()?, text, image_index, boxes, is_image, pass)
            }
            (Learning::Captions(smoothing), Batch::Pairs(CaptionTensors { generation: Some(rows), .. })) => {
                one("caption", writing_loss(model, rows, encode()?.tensor(), *smoothing, pass)?)
            }
            (Learning::Words, Batch::Pairs(batch)) => {
                one("caption", writing_loss(model, &rows(&batch.text)?, encode()?.tensor(), 0.0, pass)?)
            }
            (learning, batch) => candle_core::bail!("batch: expected one for {learning:?}, found {}", batch.name()),
        }
    }
}

fn texts(batch: &TextTensors) -> Texts {
    Texts { ids: batch.ids.clone(), mask: batch.mask.clone() }
}

/// Texts, each about the image of its row, as rows for a decoder that is to write all of them
/// (`models/model_captioning_pretrain.py`).
fn rows(text: &TextTensors) -> Result<GenerationTensors> {
    let (ids, mask) = (text.ids.to_vec2::<u32>()?, text.mask.to_vec2::<f32>()?);
    let next = |(ids, mask): (&Vec<u32>, &Vec<f32>)| {
        let words = ids.iter().zip(mask).skip(1);
        let words = words.map(|(&id, &is_there)| if is_there > 0.0 { i64::from(id) } else { IGNORE });
        words.chain([IGNORE]).collect::<Vec<_>>()
    };
    let labels = ids.iter().zip(&mask).flat_map(next).collect();
    let image_index = (0..ids.len() as u32).collect();
    Ok(GenerationTensors { ids: text.ids.clone(), mask: text.mask.clone(), labels, image_index })
}

impl Trainable for Finetuning {
    type Batch = Batch;

    fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    fn to_device(&self, batch: Batch) -> std::result::Result<Batch, BoxError> {
        let Some((_, parameter)) = self.parameters.first() else { return Ok(batch) };
        let device = parameter.device();
        Ok(match batch {
            Batch::Pairs(batch) => Batch::Pairs(batch.to_device(device)?),
            Batch::Regions(batch) => Batch::Regions(batch.to_device(device)?),
            Batch::Questions(batch) => Batch::Questions(batch.to_device(device)?),
            Batch::Statements(batch) => Batch::Statements(batch.to_device(device)?),
            Batch::Phrases(batch) => Batch::Phrases(batch.to_device(device)?),
            Batch::References(batch) => Batch::References(batch.to_device(device)?),
        })
    }

    fn losses(&self, batch: &Batch, step: &mut Step) -> std::result::Result<Losses, BoxError> {
        if let (Some((scst, tokenizer)), Batch::References(batch)) = (&self.rewards, batch) {
            let done = scst.losses(&self.model, batch, tokenizer, step)?;
            self.rewarded.set(Some([done.reward, done.baseline, done.empty]));
            return Ok(Losses(vec![("scst", done.loss)]));
        }
        let pass = Pass::training(step.rng).on(step.tape);
        Ok(self.losses_in(&pass, batch, step)?)
    }

    fn observations(&self) -> Vec<(&'static str, f64)> {
        let names = [REWARD, "baseline", "wordless"];
        self.rewarded.get().map_or_else(Vec::new, |numbers| names.into_iter().zip(numbers).collect())
    }

    fn samples(batch: &Batch) -> usize {
        batch.pixels().dims()[0]
    }

    fn records(batch: &Batch) -> Vec<String> {
        batch.records().to_vec()
    }

    fn first_not_finite(&self, batch: &Batch, step: &mut Step) -> Option<String> {
        let shown = (batch.pixels(), batch.records());
        first_not_finite(shown, &self.parameters, step, |pass, step| self.losses_in(pass, batch, step))
    }

    fn score(&self, iteration: u64, weights: FinishedWeights) -> std::result::Result<Option<f64>, BoxError> {
        let Some(validation) = self.validation.as_ref().filter(|validation| iteration >= validation.first) else {
            return Ok(None);
        };
        let Some((_, parameter)) = self.parameters.first() else { return Ok(None) };
        let (config, tokenizer) = (validation.config.clone(), (*validation.tokenizer).clone());
        let model = Model::with_weights(config, weights()?, tokenizer, parameter.device())?;
        Ok(validation.score(&model)?)
    }

    fn judged_by(&self) -> Option<&'static str> {
        // The loss of rewarded captions is that of what was drawn: a lower one is not that of a better model.
        (self.learning == Learning::Rewards).then_some(REWARD)
    }

    fn after_step(&self) -> std::result::Result<(), BoxError> {
        Ok(clamp_temperature(&self.parameters)?)
    }
}
