//! Natural language for visual reasoning (NLVR2, Suhr et al. 2019): is a statement about two images true? And text assignment
//! (§4.2 of the paper), which prepares a model for it: which of two images is a text about?

mod evaluate;

use candle_core::{D, Result, Tensor};
use rand::Rng;
use xvlm_encoders::{Attention, Pass, Task, Xvlm};
use xvlm_kernels as kernels;

use crate::BATCH;
use crate::error::TaskError;
use crate::generate::Source;
use crate::model::{ImageTokens, Model, Texts};

pub use evaluate::{Evaluation, Options, evaluate, test_items, write_results};

/// The temperature of the similarities that other images are drawn by (`models/model_nlvr_pretrain.py`).
const TEMPERATURE: f64 = 0.07;

/// Texts fused with two of the images each. Keys and values are computed for each image once, and on each side only for those
/// that are looked at there.
fn fuse(model: &Xvlm, images: &ImageTokens, texts: &Texts, pairs: [&[u32]; 2], pass: &Pass) -> Result<Tensor> {
    let Texts { ids, mask } = texts;
    let encoded = model.encode_text(ids, mask, Attention::Full, pass)?;
    let source = Source::images(images)?;
    source.look_at(pairs[0], |left| {
        source.look_at(pairs[1], |right| model.fuse_pair(&encoded, mask, &[left.clone(), right.clone()], pass))
    })
}

/// How likely each statement is to be true of two rows of `images`, the left and the right one.
///
/// # Errors
/// If the model is made for another task, a statement is empty, or there is no image of a number.
pub fn judge(
    model: &Model,
    images: &ImageTokens,
    statements: &[([u32; 2], &str)],
) -> std::result::Result<Vec<f32>, TaskError> {
    model.fit_for("judgements", &[Task::Nlvr])?;
    let mut judged = Vec::with_capacity(statements.len());
    for statements in statements.chunks(BATCH) {
        let texts: Vec<&str> = statements.iter().map(|(_, text)| *text).collect();
        let [left, right] = [0, 1].map(|side| statements.iter().map(|(pair, _)| pair[side]).collect::<Vec<_>>());
        let fused = fuse(model.xvlm(), images, &model.tokenise(&texts)?, [&left, &right], &Pass::inference())?;
        let probabilities = kernels::softmax(&model.xvlm().statement_logits(&fused)?, D::Minus1)?;
        judged.extend(probabilities.narrow(1, 1, 1)?.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(judged)
}

/// Logits of each statement's being false and true `[B, 2]`; the images are the first of all statements, then the second of
/// all statements.
///
/// # Errors
/// If there are not two images a statement, or the model is not made for it.
pub fn statement_logits(model: &Xvlm, images: &ImageTokens, texts: &Texts, pass: &Pass) -> Result<Tensor> {
    let b = texts.ids.dim(0)? as u32;
    if images.len() != 2 * b as usize {
        candle_core::bail!("images: expected two for each of {b} statements, found {}", images.len());
    }
    let (first, second): (Vec<u32>, Vec<u32>) = (0..b).map(|row| (row, b + row)).unzip();
    model.statement_logits(&fuse(model, images, texts, [&first, &second], pass)?)
}

/// The loss of judging statements: `is_true` has one entry a statement.
///
/// # Errors
/// As [`statement_logits`].
pub fn loss(model: &Xvlm, images: &ImageTokens, texts: &Texts, is_true: &[bool], pass: &Pass) -> Result<Tensor> {
    let labels: Vec<i64> = is_true.iter().map(|&holds| i64::from(holds)).collect();
    kernels::cross_entropy(&statement_logits(model, images, texts, pass)?, &labels, 0.0)
}

/// Two images for a text, and which of them it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Rows of the images.
    pub images: [u32; 2],
    /// 0: the first, 1: the second, 2: none.
    pub label: i64,
}

/// Where the random choices of [`assign`] come from.
pub trait Draws {
    /// A number from 0 to below 1.
    fn uniform(&mut self) -> f32;
    /// `count` different indices, each drawn in proportion to its weight among those that are left.
    fn pick(&mut self, weights: &[f32], count: usize) -> Vec<u32>;
}

impl<R: Rng> Draws for R {
    fn uniform(&mut self) -> f32 {
        self.random()
    }

    fn pick(&mut self, weights: &[f32], count: usize) -> Vec<u32> {
        let mut weights = weights.to_vec();
        let mut picked = Vec::with_capacity(count);
        for _ in 0..count.min(weights.len()) {
            let mut left = self.random::<f32>() * weights.iter().sum::<f32>();
            let mut chosen = None;
            for (i, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
                chosen = Some(i);
                left -= weight;
                if left < 0.0 {
                    break;
                }
            }
            let Some(chosen) = chosen else { break };
            weights[chosen] = 0.0;
            picked.push(chosen as u32);
        }
        picked
    }
}

/// The weights that other images are drawn by for each image `[N, N]`: similar ones are harder.
///
/// # Errors
/// If the model has no projection of images.
pub fn assignment_weights(model: &Xvlm, images: &ImageTokens) -> Result<Vec<Vec<f32>>> {
    let features = model.project_image(&images.0)?.detach();
    let similarities = (features.matmul(&features.t()?)? / TEMPERATURE)?;
    let mut weights = kernels::softmax(&similarities, D::Minus1)?.to_vec2::<f32>()?;
    weights.iter_mut().enumerate().for_each(|(row, weights)| weights[row] = 0.0);
    Ok(weights)
}

/// Draws two images for each text: with probability 2/3 its own and another, in either order, else two others.
///
/// # Errors
/// If there are fewer than three images.
pub fn assign(weights: &[Vec<f32>], draws: &mut impl Draws) -> Result<Vec<Assignment>> {
    if weights.len() < 3 {
        candle_core::bail!("images: expected at least three to assign texts to, found {}", weights.len());
    }
    let one = |(own, weights): (u32, &Vec<f32>)| {
        if draws.uniform() > 1.0 / 3.0 {
            let other = draws.pick(weights, 1).first().copied().unwrap_or(own);
            match draws.uniform() > 0.5 {
                true => Assignment { images: [own, other], label: 0 },
                false => Assignment { images: [other, own], label: 1 },
            }
        } else {
            let others = draws.pick(weights, 2);
            let other = |i: usize| others.get(i).copied().unwrap_or(own);
            Assignment { images: [other(0), other(1)], label: 2 }
        }
    };
    Ok((0u32..).zip(weights).map(one).collect())
}

/// Logits of each text's being about the first, the second and none of its images `[B, 3]`, and the loss of saying so.
///
/// # Errors
/// If the model is not made for it.
pub fn assignment(
    model: &Xvlm,
    images: &ImageTokens,
    texts: &Texts,
    assignments: &[Assignment],
    pass: &Pass,
) -> Result<(Tensor, Tensor)> {
    let index = |i: usize| assignments.iter().map(|assignment| assignment.images[i]).collect::<Vec<_>>();
    let fused = fuse(model, images, texts, [&index(0), &index(1)], pass)?;
    let logits = model.assignment_logits(&fused)?;
    let labels: Vec<i64> = assignments.iter().map(|assignment| assignment.label).collect();
    let loss = kernels::cross_entropy(&logits, &labels, 0.0)?;
    Ok((logits, loss))
}
