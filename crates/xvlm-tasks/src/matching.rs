//! How well texts tell pictures, and regions of them: many of the ones with many of the others.

use candle_core::Tensor;
use serde::Serialize;
use xvlm_data::transform::clip_box;
use xvlm_data::{DataError, Picture};
use xvlm_encoders::{Pass, Regions, Task};
use xvlm_kernels as kernels;

use crate::error::TaskError;
use crate::generate::Source;
use crate::model::{ImageTokens, Model};
use crate::retrieval;

/// How well a text tells a concept.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Probability that the two belong together.
    pub probability: f32,
    /// Cosine of their embeddings: what a search over many compares.
    pub similarity: f32,
}

/// Pictures, and regions of them, after the vision encoder.
#[derive(Clone, Debug)]
pub struct Concepts {
    /// The whole pictures.
    pub images: ImageTokens,
    /// The regions, in the order in which they were given; none if there were none.
    pub regions: Option<Source>,
}

/// Encodes pictures and boxes in them: each box is given with the number of its picture, as `(x, y, w, h)` in pixels of the
/// picture as given. The vision encoder sees each picture once, and all of them as one batch.
///
/// # Errors
/// [`DataError::BoxOutside`] if a box reaches outside its picture by more than a pixel, or there are no pictures.
pub fn encode(model: &Model, pictures: &[Picture], boxes: &[(u32, [f32; 4])]) -> Result<Concepts, TaskError> {
    if boxes.is_empty() {
        return Ok(Concepts { images: model.encode(pictures)?, regions: None });
    }
    let vision = &model.config().model.vision_config;
    let grid = vision.grid();
    let mut mask = Vec::with_capacity(boxes.len() * (1 + grid * grid));
    for (i, &(picture, bounds)) in boxes.iter().enumerate() {
        let Some(picture) = pictures.get(picture as usize) else {
            let message = format!("box {i}: expected a picture below {}, found {picture}", pictures.len());
            return Err(candle_core::Error::Msg(message).into());
        };
        let (width, height) = (picture.width(), picture.height());
        let Some([x, y, w, h]) = clip_box(bounds, width, height) else {
            let (origin, field) = (format!("picture {}", boxes[i].0), format!("box {i}"));
            return Err(DataError::BoxOutside { origin, field, bbox: bounds, width, height }.into());
        };
        let (width, height) = (width as f32, height as f32);
        let centred = [(x + w / 2.0) / width, (y + h / 2.0) / height, w / width, h / height];
        mask.push(1.0);
        mask.extend(kernels::patch_rectangle_mask(centred, grid));
    }
    let mask = Tensor::from_vec(mask, (boxes.len(), 1 + grid * grid), model.device())?;
    let index: Vec<u32> = boxes.iter().map(|&(picture, _)| picture).collect();
    let pixels = model.pixels(pictures)?;
    let regions = Regions { index: &index, mask: &mask };
    let (tokens, images) = model.xvlm().encode_regions(&pixels, regions, &Pass::inference())?;
    Ok(Concepts { images: ImageTokens::new(images), regions: Some(Source { tokens, mask }) })
}

/// How well each text tells each concept: a row a concept, in which each text has its place.
///
/// # Errors
/// If a text has no words, or the model is made for another task.
pub fn scores(model: &Model, concepts: &Source, texts: &[&str]) -> Result<Vec<Vec<Score>>, TaskError> {
    model.fit_for("matching", &[Task::Pretrain, Task::Retrieval])?;
    let tokens = texts.iter().map(|text| model.token_row(text)).collect::<Result<Vec<_>, _>>()?;
    if tokens.is_empty() {
        return Ok(vec![Vec::new(); concepts.tokens.dim(0)?]);
    }
    let (similarities, logits) = retrieval::match_all(model.xvlm(), concepts, &tokens)?;
    let paired = similarities.into_iter().zip(logits);
    let probability = |[no, yes]: [f32; 2]| 1.0 / (1.0 + (no - yes).exp());
    Ok(paired
        .map(|(similarities, logits)| {
            let scored = similarities.into_iter().zip(logits);
            scored.map(|(similarity, logits)| Score { probability: probability(logits), similarity }).collect()
        })
        .collect())
}

/// Embeddings of concepts `[N, E]`, of unit length.
///
/// # Errors
/// If the model is made for another task, or a tensor operation fails.
pub fn embed(model: &Model, concepts: &Source) -> Result<Tensor, TaskError> {
    model.embed_images(&ImageTokens::new(concepts.tokens.clone()))
}
