//! Boxes by regression: predicted from the whole image, one for each text.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;
use xvlm_data::TextTensors;
use xvlm_data::annotations::GroundingItem;
use xvlm_encoders::{Attention, Concepts, Pass, Task, VisionConfig, Xvlm};
use xvlm_kernels::{self as kernels, Cover};
use xvlm_train::Losses;

use super::{GroundingScores, check};
use crate::BATCH;
use crate::align::{Alignment, BoxTargets};
use crate::config::Objective;
use crate::error::TaskError;
use crate::model::{ImageTokens, Model};
use crate::sweep::{LeftOut, Sweep, Work};

/// The tasks whose models predict boxes.
const MADE_FOR: &[Task] = &[Task::Pretrain, Task::Grounding];

/// Where a text points.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// `(cx, cy, w, h)` in fractions of the image.
    pub bounds: [f32; 4],
    /// Probability that the text matches what is inside the box; none from a model that has no matching head, such as one
    /// that was fine-tuned for boxes alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probability: Option<f32>,
}

impl Found {
    /// The box in pixels `(x, y, w, h)` of an image of the size given, cut at its borders.
    pub fn pixels(&self, width: u32, height: u32) -> [f32; 4] {
        self.edges(width, height, |edge| edge.clamp(0.0, 1.0))
    }

    /// The same box, which may reach outside the image: what the original scores.
    pub fn pixels_uncut(&self, width: u32, height: u32) -> [f32; 4] {
        self.edges(width, height, |edge| edge)
    }

    fn edges(&self, width: u32, height: u32, cut: impl Fn(f32) -> f32) -> [f32; 4] {
        let [cx, cy, w, h] = self.bounds;
        let span = |centre: f32, extent: f32, size: u32| {
            let edge = |at: f32| cut(at) * size as f32;
            let (low, high) = (edge(centre - extent / 2.0), edge(centre + extent / 2.0));
            (low, high - low)
        };
        let ((x, w), (y, h)) = (span(cx, w, width), span(cy, h, height));
        [x, y, w, h]
    }
}

/// Finds the box of each text, given with the row of `images` it is about. The box is predicted from the whole image; the
/// probability then comes from matching the text with the region inside that box.
///
/// # Errors
/// If a text is empty, or the model is made for another task.
pub fn ground(model: &Model, images: &ImageTokens, texts: &[(u32, &str)]) -> Result<Vec<Found>, TaskError> {
    model.fit_for("boxes", MADE_FOR)?;
    let mut found = Vec::new();
    for texts in texts.chunks(4 * BATCH) {
        let index: Vec<u32> = texts.iter().map(|(image, _)| *image).collect();
        let texts: Vec<&str> = texts.iter().map(|(_, text)| *text).collect();
        let tokens = model.tokenise(&texts)?;
        let encoded = model.encode_texts(&tokens)?;
        let fused = model.look(&encoded, &tokens.mask, images, &index, Attention::Full)?;
        let predicted: Vec<[f32; 4]> = model
            .xvlm()
            .predict_box(&fused)?
            .to_vec2::<f32>()?
            .iter()
            .map(|row| [row[0], row[1], row[2], row[3]])
            .collect();

        if !model.xvlm().can_match() {
            found.extend(predicted.into_iter().map(|bounds| Found { bounds, probability: None }));
            continue;
        }
        let (regions, mask) = inside(model, images, &index, &predicted)?;
        let rows: Vec<u32> = (0..predicted.len() as u32).collect();
        let concepts = Concepts { tokens: &regions, index: &rows, mask: &mask };
        let fused = model.xvlm().fuse(&encoded, &tokens.mask, &concepts, Attention::Full, &Pass::inference())?;
        let probabilities = model.match_probabilities(&fused)?.into_iter().map(Some);
        found.extend(
            predicted.into_iter().zip(probabilities).map(|(bounds, probability)| Found { bounds, probability }),
        );
    }
    Ok(found)
}

/// The regions inside boxes of images that are encoded already, `[B, 1+L, C]` and `[B, 1+L]`. A ViT has to encode a region to
/// pool it: there, the pooled token stays that of the whole image, before the patches of the region.
fn inside(
    model: &Model,
    images: &ImageTokens,
    index: &[u32],
    boxes: &[[f32; 4]],
) -> candle_core::Result<(Tensor, Tensor)> {
    let vision = &model.config().model.vision_config;
    let grid = vision.grid();
    let covered: Vec<f32> = boxes.iter().flat_map(|&bounds| kernels::patch_rectangle_mask(bounds, grid)).collect();
    let covered = Tensor::from_vec(covered, (boxes.len(), grid * grid), model.device())?;
    let mask = Tensor::cat(&[&covered.narrow(1, 0, 1)?.ones_like()?, &covered], 1)?;
    let regions = match vision {
        VisionConfig::Swin(_) => {
            let patches = images.0.narrow(1, 1, images.0.dim(1)? - 1)?;
            kernels::patch_pool(&patches, index, Cover::Mask(&covered))?
        }
        VisionConfig::Vit(_) => images.0.index_select(&Tensor::new(index, model.device())?, 0)?,
    };
    Ok((regions, mask))
}

/// The losses of fine-tuning (`models/model_bbox.py`): L1 and GIoU of the box found for each text in the image `index` names,
/// against `boxes [B, 4]`, `(cx, cy, w, h)` in fractions of the image. Rows that tell a whole image do not count.
///
/// # Errors
/// If a tensor operation fails, or the model has no box head.
pub fn losses(
    model: &Xvlm,
    images: &ImageTokens,
    texts: &TextTensors,
    index: &[u32],
    boxes: &Tensor,
    is_image: &[bool],
    pass: &Pass,
) -> candle_core::Result<Losses> {
    let targets = BoxTargets { images: &images.0, index, boxes, is_image };
    let alignment = Alignment { model, objectives: &[Objective::Box], pass, weights: None, ranks: None };
    Ok(Losses(alignment.losses(texts, None, Some(targets), &mut |_, _| Ok(Vec::new()))?))
}

/// How boxes are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoxOptions {
    /// Images at a time.
    pub batch: usize,
    /// Score boxes that reach outside their image as they are, as the original does, instead of cut at its borders. Boxes of the
    /// truth lie inside, so that cutting can only bring them nearer.
    pub as_original: bool,
}

impl Default for BoxOptions {
    fn default() -> Self {
        Self { batch: BATCH, as_original: false }
    }
}

/// What the model found for each item of a data set, and the scores.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The items that have answers.
    pub items: Vec<GroundingItem>,
    /// What was found for each.
    pub answers: Vec<Found>,
    /// Accuracy at an IoU of 0.5 and mean IoU, by the rule of the RefCOCO evaluation.
    pub scores: GroundingScores,
    /// What has no answer.
    pub left_out: Vec<LeftOut>,
}

impl Evaluation {
    /// The boxes that are scored, `(x, y, w, h)` in pixels.
    pub fn boxes<'a>(&'a self, options: &'a BoxOptions) -> impl Iterator<Item = [f32; 4]> + 'a {
        boxes(&self.items, &self.answers, options.as_original)
    }
}

fn boxes<'a>(
    items: &'a [GroundingItem],
    answers: &'a [Found],
    as_original: bool,
) -> impl Iterator<Item = [f32; 4]> + 'a {
    items.iter().zip(answers).map(move |(item, found)| match as_original {
        true => found.pixels_uncut(item.width, item.height),
        false => found.pixels(item.width, item.height),
    })
}

/// Finds the box of each phrase, and scores it. An item whose image cannot be opened, or has another size than its annotation
/// says, or whose phrase has no word, is left out.
///
/// # Errors
/// If the model is made for another task, there are no items, or as [`Sweep::run`].
pub fn evaluate(
    model: &Model,
    items: Vec<GroundingItem>,
    options: &BoxOptions,
    sweep: &mut Sweep,
) -> Result<Evaluation, TaskError> {
    model.fit_for("boxes", MADE_FOR)?;
    let work = Work { name: "boxes", options: json!(null), batch: options.batch };
    let ask = |images: &ImageTokens, texts: &[(u32, &str)]| ground(model, images, texts);
    let (items, answers, left_out) = super::ask(sweep, &work, model, &items, check, ask)?.split(items);
    let scores = GroundingScores::of(&items, boxes(&items, &answers, options.as_original).map(Some));
    Ok(Evaluation { items, answers, scores, left_out })
}
