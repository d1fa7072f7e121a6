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
use crate::retrieval::{self, Compared};

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
    let place = |(i, &(picture, bounds)): (usize, &(u32, [f32; 4]))| {
        let Some(of) = pictures.get(picture as usize) else {
            let message = format!("box {i}: expected a picture below {}, found {picture}", pictures.len());
            return Err(candle_core::Error::Msg(message).into());
        };
        let (width, height) = (of.width(), of.height());
        fractions(bounds, width, height).map(|bounds| (picture, bounds)).ok_or_else(|| {
            let (origin, field) = (format!("picture {picture}"), format!("box {i}"));
            DataError::BoxOutside { origin, field, bbox: bounds, width, height }.into()
        })
    };
    let boxes = boxes.iter().enumerate().map(place).collect::<Result<Vec<_>, TaskError>>()?;
    encode_placed(model, pictures, &boxes)
}

/// A box in pixels of a picture as `(cx, cy, w, h)` in fractions of it; none if it reaches outside by more than a pixel.
pub(crate) fn fractions(bounds: [f32; 4], width: u32, height: u32) -> Option<[f32; 4]> {
    let [x, y, w, h] = clip_box(bounds, width, height)?;
    let (width, height) = (width as f32, height as f32);
    Some([(x + w / 2.0) / width, (y + h / 2.0) / height, w / width, h / height])
}

/// [`encode`] with boxes in fractions of pictures.
pub(crate) fn encode_placed(
    model: &Model,
    pictures: &[Picture],
    boxes: &[(u32, [f32; 4])],
) -> Result<Concepts, TaskError> {
    if boxes.is_empty() {
        return Ok(Concepts { images: model.encode(pictures)?, regions: None });
    }
    let grid = model.config().model.vision_config.grid();
    let row = |(_, bounds): &(u32, [f32; 4])| [vec![1.0], kernels::patch_rectangle_mask(*bounds, grid)].concat();
    let mask: Vec<f32> = boxes.iter().flat_map(row).collect();
    let mask = Tensor::from_vec(mask, (boxes.len(), 1 + grid * grid), model.device())?;
    let index: Vec<u32> = boxes.iter().map(|&(picture, _)| picture).collect();
    let regions = Regions { index: &index, mask: &mask };
    let pixels = model.pixels(pictures)?;
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
    let score = |(similarity, [no, yes]): Compared| Score { probability: 1.0 / (1.0 + (no - yes).exp()), similarity };
    let compared = retrieval::match_all(model.xvlm(), concepts, &tokens)?;
    Ok(compared.into_iter().map(|row| row.into_iter().map(score).collect()).collect())
}

/// Embeddings of concepts `[N, E]`, of unit length.
///
/// # Errors
/// If the model is made for another task, or a tensor operation fails.
pub fn embed(model: &Model, concepts: &Source) -> Result<Tensor, TaskError> {
    model.embed_images(&ImageTokens::new(concepts.tokens.clone()))
}
