//! What a run of fine-tuning is going to be, before it is: parameters, memory of what is trained, data and schedule, and its first
//! batch. All of it is exact but for the gradients on their way to other processes, of which it is about what there is; what a task's
//! losses keep for the backward pass is not estimated.

use std::sync::Arc;

use serde::Serialize;
use xvlm_data::TextTokenizer;
use xvlm_data::tensors::TextTensors;
use xvlm_encoders::{Blueprint, Xvlm};
use xvlm_train::{Precision, Progress};
use xvlm_weights::ModelFiles;

use super::FinetuneConfig;
use super::learn::Batch;
use super::run::{Opened, named_start, start_of};
use super::start::initial_weights;
use super::validate::Validation;
use crate::error::TaskError;
use crate::plan::{self, ParameterCounts, Schedule};
use crate::session::Session;

/// What a run is going to be.
#[derive(Clone, Debug, Serialize)]
pub struct FinetunePlan {
    /// The name of the task.
    pub task: &'static str,
    /// What is trained.
    pub parameters: ParameterCounts,
    /// The parameters that start from random numbers, since the model to start from has none of them.
    pub fresh: Vec<String>,
    /// What one process will hold on its device, beside activations.
    pub memory: TrainingState,
    /// What is trained on.
    pub data: TrainingItems,
    /// How long, and how fast.
    pub schedule: Schedule,
}

/// Bytes that one process holds on its device from step to step, and a step's pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TrainingState {
    /// The parameters as the model computes with them.
    pub weights: u64,
    /// What their `f32` masters have beyond them, if they are of a smaller type: on the CPU, the 16 bits that `bf16` lacks.
    pub masters: u64,
    /// A gradient for each trainable parameter.
    pub gradients: u64,
    /// Gradients on their way to other processes and back, if there are others: about.
    pub reduction: u64,
    /// The optimizer's two moments.
    pub moments: u64,
    /// The mean of the weights, if one is kept.
    pub ema: u64,
    /// The pixels of the batches of an optimizer step.
    pub pixels: u64,
}

impl TrainingState {
    /// All of it.
    pub fn sum(&self) -> u64 {
        let Self { weights, masters, gradients, reduction, moments, ema, pixels } = *self;
        weights + masters + gradients + reduction + moments + ema + pixels
    }
}

/// The items of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TrainingItems {
    /// Items of an epoch.
    pub items: u64,
    /// Items of an optimizer step of all processes: the effective batch.
    pub items_per_step: u64,
    /// How often the run goes through the items.
    pub epochs: f64,
    /// Whether checkpoints are validated.
    pub validated: bool,
}

/// The first batch of a run.
pub struct FirstBatch {
    /// `[N, 3, side, side]`, normalised.
    pub pixels: Vec<f32>,
    /// Pixels along a side of a picture.
    pub side: usize,
    /// What is said of each picture.
    pub pictures: Vec<Vec<Said>>,
}

/// A text of the first batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// Its tokens, or its words where it becomes tokens later.
    pub text: String,
    /// Its box `(cx, cy, w, h)` in fractions of the picture, if it has one.
    pub bounds: Option<[f32; 4]>,
}

/// Plans the run of a configuration in `ranks` processes, each on the CPU or on a GPU, which need not be there, and draws its
/// first batch. The model to start from is as of [`run`](super::run()). Nothing is written, but for what the configuration wants to be kept of shards.
///
/// # Errors
/// As [`run`](super::run()) before it begins to train.
pub fn plan(
    config: &FinetuneConfig,
    start: Option<&ModelFiles>,
    ranks: usize,
    on_gpu: bool,
    progress: &mut dyn Progress,
) -> Result<(FinetunePlan, FirstBatch), TaskError> {
    let named = named_start(config)?;
    let start = start_of(named.as_ref(), start)?;
    let opened = Opened::new(config, start, (0, ranks), None, progress)?;
    let Opened { config, train, tokenizer, data, first } = &opened;
    let shapes = Blueprint::of(|vb| Xvlm::new(&config.model, vb))?.shapes();
    train.optimizer.check_frozen(shapes.keys().map(String::as_str))?;
    let fresh = initial_weights(start, &config.model, train.seed)?.fresh().into_iter().map(str::to_owned).collect();
    let validation = match train.keep_best {
        true => {
            Validation::open(&config.task, opened.model_config(), tokenizer, &Session::alone(false), *first, progress)?
        }
        false => None,
    };
    let batch = data.first()?;
    let parameters = plan::count(train, &config.model, &shapes);
    let (size, trainable) = (train.precision.dtype().size_in_bytes() as u64, 4 * parameters.trainable);
    let is_sum = train.accumulate > 1 || ranks > 1;
    let memory = TrainingState {
        weights: size * parameters.total,
        masters: match (train.precision, on_gpu) {
            (Precision::F32, _) => 0,
            (Precision::Bf16, false) => trainable / 2,
            _ => trainable,
        },
        gradients: if is_sum { trainable } else { size * parameters.trainable },
        reduction: if ranks > 1 { 2 * trainable } else { 0 },
        moments: 2 * trainable,
        ema: if train.ema_decay.is_some() { trainable } else { 0 },
        pixels: 4 * (train.accumulate * batch.pixels().elem_count()) as u64,
    };
    let items_per_step = (data.batch_size * ranks * train.accumulate) as u64;
    let items = TrainingItems {
        items: data.epoch,
        items_per_step,
        epochs: (train.iterations * items_per_step) as f64 / data.epoch as f64,
        validated: validation.is_some(),
    };
    let plan = FinetunePlan {
        task: config.task.kind().name(),
        parameters,
        fresh,
        memory,
        data: items,
        schedule: plan::schedule(train, ranks),
    };
    Ok((plan, FirstBatch::of(&batch, tokenizer)?))
}

impl FirstBatch {
    fn of(batch: &Batch, tokenizer: &Arc<TextTokenizer>) -> Result<Self, TaskError> {
        let pixels = batch.pixels();
        let (images, _, side, _) = pixels.dims4()?;
        let mut pictures: Vec<Vec<Said>> = vec![Vec::new(); images];
        let mut say = |image: usize, text: String, bounds| pictures[image].push(Said { text, bounds });
        match batch {
            Batch::Pairs(batch) => {
                let texts = tokens(&batch.text, tokenizer)?;
                texts.into_iter().enumerate().for_each(|(image, text)| say(image, text, None));
            }
            Batch::Regions(batch) => {
                let boxes = batch.boxes.to_vec2::<f32>()?;
                for (row, text) in tokens(&batch.text, tokenizer)?.into_iter().enumerate() {
                    let bounds = <[f32; 4]>::try_from(boxes[row].as_slice()).ok().filter(|_| !batch.is_image[row]);
                    say(batch.image_index[row] as usize, text, bounds);
                }
            }
            Batch::Questions(batch) => {
                let mut questions = tokens(&batch.questions, tokenizer)?;
                if let Some(answers) = &batch.answers {
                    let weights = answers.weights.flatten_all()?.to_vec1::<f32>()?;
                    let texts = tokens(&answers.text, tokenizer)?;
                    for ((text, &question), weight) in texts.iter().zip(&answers.question_index).zip(weights) {
                        questions[question as usize] += &format!(" | {weight:.2}: {text}");
                    }
                }
                for (text, &image) in questions.into_iter().zip(&batch.image_index) {
                    say(image as usize, text, None);
                }
            }
            Batch::Statements(batch) => {
                let texts = tokens(&batch.text, tokenizer)?;
                let statements = batch.is_true.len();
                for (i, (text, is_true)) in texts.iter().zip(&batch.is_true).enumerate() {
                    say(i, format!("left, {is_true}: {text}"), None);
                    say(statements + i, format!("right, {is_true}: {text}"), None);
                }
            }
            Batch::Phrases(batch) => {
                let boxes = batch.boxes.to_vec2::<f32>()?;
                for (image, text) in tokens(&batch.text, tokenizer)?.into_iter().enumerate() {
                    say(image, text, boxes[image].as_slice().try_into().ok());
                }
            }
            Batch::References(batch) => {
                for (image, references) in batch.references.iter().enumerate() {
                    references.iter().for_each(|text| say(image, text.clone(), None));
                }
            }
        }
        Ok(Self { pixels: pixels.flatten_all()?.to_vec1()?, side, pictures })
    }
}

/// The tokens of texts, without padding.
fn tokens(text: &TextTensors, tokenizer: &TextTokenizer) -> Result<Vec<String>, TaskError> {
    let (ids, mask) = (text.ids.to_vec2::<u32>()?, text.mask.to_vec2::<f32>()?);
    let row = |(ids, mask): (&Vec<u32>, &Vec<f32>)| {
        let seen = ids.iter().zip(mask).filter(|(_, seen)| **seen > 0.0);
        seen.filter_map(|(&id, _)| tokenizer.id_to_token(id)).collect::<Vec<_>>().join(" ")
    };
    Ok(ids.iter().zip(&mask).map(row).collect())
}
