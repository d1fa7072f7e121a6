//! Visual question answering. A model made for it encodes the question with the image, and a decoder writes the answer from
//! those states; in a model for pre-training, the answer is what continues the question.

use std::path::Path;

use candle_core::{D, DType, Tensor};
use xvlm_data::annotations::{VqaItem, read_vqa};
use xvlm_data::{pre_caption, pre_question};
use xvlm_encoders::{Attention, Pass, Task, Xvlm};
use xvlm_kernels as kernels;
use xvlm_losses as losses;
use xvlm_metrics::vqa::ExactScores;

use crate::error::TaskError;
use crate::generate::{Source, Written, write};
use crate::model::{ImageTokens, Model, Texts};
use crate::search::Search;
use crate::{BATCH, Counter, Item, ask_all, some};

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
    model.fit_for("answers", &[Task::Pretrain, Task::Vqa])?;
    let config = model.config();
    let start = |&(image, question): &(u32, &str)| -> Result<(u32, Vec<u32>), TaskError> {
        let cleaned = pre_question(question, config.max_words);
        Ok((image, model.tokenizer().encode(&cleaned, config.max_tokens, false)?))
    };
    let rows = questions.iter().map(start).collect::<Result<Vec<_>, _>>()?;
    if config.model.task != Task::Vqa {
        return write(model, &Source::images(images)?, &rows, search);
    }
    let begin = vec![model.tokenizer().cls_id()];
    let mut answers = Vec::with_capacity(rows.len());
    for rows in rows.chunks(BATCH) {
        let (index, rows): (Vec<u32>, Vec<Vec<u32>>) = rows.iter().cloned().unzip();
        let questions = model.pad(&rows)?;
        let states = question_states(model.xvlm(), &Source::images(images)?, &questions, &index, &Pass::inference())?;
        let rows: Vec<(u32, Vec<u32>)> = (0..index.len() as u32).map(|row| (row, begin.clone())).collect();
        answers.extend(write(model, &states, &rows, search)?);
    }
    Ok(answers)
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

/// An answer of a list, ranked for a question.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranked {
    /// Its number in the list.
    pub answer: u32,
    /// Its probability among those that were ranked.
    pub probability: f32,
}

/// Ranks a list of answers for each question (`XVLM.rank_answer`): the `k` whose first token is likeliest after `[CLS]` are
/// compared by the probability of the whole answer, into which the first token enters twice. Best first.
///
/// # Errors
/// If a tensor operation fails, or an answer has no token after `[CLS]`.
pub fn rank(model: &Xvlm, states: &Source, answers: &Texts, k: usize) -> candle_core::Result<Vec<Vec<Ranked>>> {
    let pass = Pass::inference();
    let (count, length) = answers.ids.dims2()?;
    if count == 0 || length < 2 {
        candle_core::bail!("answers: expected at least one, of [CLS] and a token, found shape [{count}, {length}]");
    }
    let device = answers.ids.device();
    let questions = states.tokens.dim(0)?;
    let index: Vec<u32> = (0..questions as u32).collect();
    let begin = answers.ids.narrow(0, 0, 1)?.narrow(1, 0, 1)?.broadcast_as((questions, 1))?.contiguous()?;
    let seen = Tensor::ones((questions, 1), DType::F32, device)?;
    let decoded = states.look_at(&index, |looks| model.decode(&begin, &seen, looks, &pass))?;
    let first = kernels::log_softmax(&model.next_token_logits(&decoded.squeeze(1)?)?, D::Minus1)?;
    let first = first.index_select(&answers.ids.narrow(1, 1, 1)?.squeeze(1)?, 1)?.to_vec2::<f32>()?;

    let mut ranked = Vec::with_capacity(questions);
    for (question, first) in (0u32..).zip(&first) {
        let mut order: Vec<u32> = (0..count as u32).collect();
        order.sort_by(|&a, &b| first[b as usize].total_cmp(&first[a as usize]).then(a.cmp(&b)));
        order.truncate(k);
        let chosen = Tensor::new(order.as_slice(), device)?;
        let chosen = Texts { ids: answers.ids.index_select(&chosen, 0)?, mask: answers.mask.index_select(&chosen, 0)? };
        let costs = answer_costs(model, states, &chosen, &vec![question; order.len()], &pass)?.to_vec1::<f32>()?;
        let scores: Vec<f32> = order.iter().zip(costs).map(|(&answer, cost)| first[answer as usize] - cost).collect();
        let probabilities = kernels::softmax(&Tensor::new(scores, device)?, 0)?.to_vec1::<f32>()?;
        let mut row: Vec<Ranked> =
            order.into_iter().zip(probabilities).map(|(answer, probability)| Ranked { answer, probability }).collect();
        row.sort_by(|a, b| b.probability.total_cmp(&a.probability));
        ranked.push(row);
    }
    Ok(ranked)
}

/// What the model answered to each question of a data set, and the scores.
pub struct Evaluation {
    /// The questions.
    pub items: Vec<VqaItem>,
    /// What was answered to each.
    pub answers: Vec<Written>,
    /// How often that is one of the answers in the file.
    pub scores: ExactScores,
}

impl Item for VqaItem {
    fn image(&self) -> &Path {
        &self.image
    }

    fn text(&self) -> &str {
        &self.question
    }
}

/// Evaluates on `vqa.json` of a folder.
///
/// # Errors
/// If the file or an image cannot be read, or a question has no answer.
pub fn evaluate(model: &Model, data: &Path, counter: Counter) -> Result<Evaluation, TaskError> {
    let items = some(read_vqa(data.join("vqa.json"))?, data, "vqa.json")?;
    if let Some(item) = items.iter().find(|item| item.answers.is_empty()) {
        let what = format!("{}, answers to question {}", data.join("vqa.json").display(), item.question_id);
        return Err(TaskError::Empty { what });
    }
    let ask = |images: &ImageTokens, questions: &[(u32, &str)]| answer(model, images, questions, Search::answers());
    let answers = ask_all(model, &items, |_, _| Ok(()), ask, counter)?;
    // The model learnt to write cleaned texts; one that cleaning leaves nothing of cannot be right.
    let clean = |text: &str| pre_caption(text, usize::MAX).ok();
    let is_right = |item: &VqaItem, given: &Written| {
        let given = clean(&given.text);
        given.is_some() && item.answers.iter().any(|answer| clean(answer) == given)
    };
    let right = items.iter().zip(&answers).map(|(item, given)| (item.kind.as_str(), is_right(item, given)));
    Ok(Evaluation { scores: ExactScores::new(right), items, answers })
}
