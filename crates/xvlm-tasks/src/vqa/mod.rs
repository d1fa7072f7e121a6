//! Visual question answering. A model made for it encodes the question with the image, and a decoder writes the answer from
//! those states; in a model for pre-training, the answer is what continues the question.

mod evaluate;
mod rank;

use candle_core::Tensor;
use xvlm_data::pre_question;
use xvlm_encoders::{Attention, Pass, Task, Xvlm};
use xvlm_kernels as kernels;
use xvlm_losses as losses;

use crate::BATCH;
use crate::error::TaskError;
use crate::generate::{Source, Written, write};
use crate::model::{ImageTokens, Model, Texts};
use crate::search::Search;

pub use evaluate::{Answering, Evaluation, Given, Options, Scores, evaluate, test_items, write_results};
pub use rank::{AnswerList, Ranked, Ranking, rank, rank_answers};

/// The original cuts questions in training (`max_words`), but lets a test have longer ones.
const MAX_WORDS: usize = 50;

/// Answers questions, each given with the row of `images` it is about.
///
/// # Errors
/// If the model is made for another task, or a tensor operation fails.
pub fn answer(
    model: &Model,
    images: &ImageTokens,
    questions: &[(u32, &str)],
    search: Search,
) -> Result<Vec<Written>, TaskError> {
    let mut answers = Vec::with_capacity(questions.len());
    for questions in questions.chunks(BATCH) {
        let Asked { source, rows } = asked(model, images, questions, 0)?;
        answers.extend(write(model, &source, &rows, search)?);
    }
    Ok(answers)
}

/// Questions as the layers that write take them up.
struct Asked {
    /// What is looked at: states of the questions, or images.
    source: Source,
    /// For each question, a row of the source and the tokens that the answer goes on.
    rows: Vec<(u32, Vec<u32>)>,
}

/// Encodes questions, of which each is to be answered with at most `longest` tokens.
fn asked(model: &Model, images: &ImageTokens, questions: &[(u32, &str)], longest: usize) -> Result<Asked, TaskError> {
    model.fit_for("answers", &[Task::Pretrain, Task::Vqa])?;
    let (config, tokenizer) = (model.config(), model.tokenizer());
    let room = config.model.text_config.longest_text();
    let is_encoded = config.model.task == Task::Vqa;
    let (max_words, max_tokens) = match is_encoded {
        true => (config.max_words.max(MAX_WORDS), room),
        false => (config.max_words, config.max_tokens.min(room.saturating_sub(longest)).max(1)),
    };
    let start = |&(image, question): &(u32, &str)| -> Result<(u32, Vec<u32>), TaskError> {
        Ok((image, tokenizer.encode(&pre_question(question, max_words), max_tokens, false)?))
    };
    let rows = questions.iter().map(start).collect::<Result<Vec<_>, _>>()?;
    let images = Source::images(images)?;
    if !is_encoded || rows.is_empty() {
        return Ok(Asked { source: images, rows });
    }
    let (index, rows): (Vec<u32>, Vec<Vec<u32>>) = rows.into_iter().unzip();
    let source = question_states(model.xvlm(), &images, &model.pad(&rows)?, &index, &Pass::inference())?;
    let rows = (0..index.len() as u32).map(|row| (row, vec![tokenizer.cls_id()])).collect();
    Ok(Asked { source, rows })
}

/// Questions that have looked at their images: what the decoder reads.
///
/// # Errors
/// If a tensor operation fails.
pub fn question_states(
    model: &Xvlm,
    images: &Source,
    questions: &Texts,
    index: &[u32],
    pass: &Pass,
) -> candle_core::Result<Source> {
    let Texts { ids, mask } = questions;
    let encoded = model.encode_text(ids, mask, Attention::Full, pass)?;
    let tokens = images.look_at(index, |looks| model.fuse(&encoded, mask, looks, Attention::Full, pass))?;
    Ok(Source { tokens, mask: mask.clone() })
}

/// What each answer costs given its question (row `question` of `states`) → `[A]`: see [`losses::text_costs`]. Answers begin
/// with `[CLS]` and end with `[SEP]`.
///
/// # Errors
/// If a tensor operation fails.
pub fn answer_costs(
    model: &Xvlm,
    states: &Source,
    answers: &Texts,
    question: &[u32],
    pass: &Pass,
) -> candle_core::Result<Tensor> {
    let (_, t) = answers.ids.dims2()?;
    let decoded = states.look_at(question, |looks| model.decode(&answers.ids, &answers.mask, looks, pass))?;
    let (ids, mask) = (answers.ids.to_vec2::<u32>()?, answers.mask.to_vec2::<f32>()?);
    let follows = |(ids, mask): (&Vec<u32>, &Vec<f32>)| -> Vec<i64> {
        let next = (1..t).map(|i| if mask[i] > 0.0 { i64::from(ids[i]) } else { kernels::IGNORE });
        next.chain([kernels::IGNORE]).collect()
    };
    let labels: Vec<i64> = ids.iter().zip(&mask).flat_map(follows).collect();
    losses::text_costs(&model.next_token_logits(&decoded)?, &labels)
}

/// The loss of answering (`models/model_vqa.py`): the costs of the answers, each with its weight, over the number of questions.
/// Question `i` is about row `index[i]` of the images, answer `i` is one to row `question[i]` of the questions.
///
/// # Errors
/// If a tensor operation fails, or the model has no decoder for answers.
pub fn loss(
    model: &Xvlm,
    images: &ImageTokens,
    (questions, index): (&Texts, &[u32]),
    (answers, question): (&Texts, &[u32]),
    weights: &Tensor,
    pass: &Pass,
) -> candle_core::Result<Tensor> {
    let states = question_states(model, &Source::images(images)?, questions, index, pass)?;
    let costs = answer_costs(model, &states, answers, question, pass)?;
    (costs * weights)?.sum_all()? / index.len() as f64
}
