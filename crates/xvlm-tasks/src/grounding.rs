//! Visual grounding (§3.3.2 of the paper): the box that a text means.

use std::path::Path;

use candle_core::Tensor;
use serde::Serialize;
use xvlm_data::annotations::{GroundingItem, read_grounding};
use xvlm_data::{Picture, TextTensors};
use xvlm_encoders::{Attention, Concepts, Pass, Task, VisionConfig, Xvlm};
use xvlm_kernels::{self as kernels, Cover};
use xvlm_metrics::boxes::{BoxScores, refer_iou};
use xvlm_train::Losses;

use crate::align::{Alignment, BoxTargets};
use crate::config::Objective;
use crate::error::{ConfigProblem, TaskError};
use crate::generate::Source;
use crate::model::{ImageTokens, Model, Texts};
use crate::{BATCH, Counter, Item, ask_all, some};

/// Where a text points.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Found {
    /// `(cx, cy, w, h)` in fractions of the image.
    pub bounds: [f32; 4],
    /// Probability that the text matches what is inside the box; none from a model that has no matching head, such as one
    /// that was fine-tuned for boxes alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probability: Option<f32>,
}

impl Found {
    /// The box in pixels `(x, y, w, h)` of an image of the size given, cut at its borders.
    pub fn pixels(&self, width: u32, height: u32) -> [f32; 4] {
        let [cx, cy, w, h] = self.bounds;
        let span = |centre: f32, extent: f32, size: u32| {
            let edge = |at: f32| at.clamp(0.0, 1.0) * size as f32;
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
    model.fit_for("boxes", &[Task::Pretrain, Task::Grounding])?;
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

/// Which patches of each image a text is about, and what that was concluded from.
#[derive(Clone, Debug)]
pub struct Heat {
    /// Attention probabilities of a fusion layer `[B, heads, T, 1+L]`.
    pub attention: Tensor,
    /// How matching changes with each of them, of the same shape.
    pub gradient: Tensor,
    /// `[B, 2]`.
    pub match_logits: Tensor,
    /// `[B, P, P]` over the grid of patches.
    pub map: Tensor,
}

/// Finds what a text is about without ever having seen a box (§4.2 of the paper; Grad-CAM, Selvaraju et al. 2017, as
/// `Grounding.py` does it). Text `i` is about row `i` of the images.
///
/// The map is the attention that a fusion layer pays to each patch, times its positive influence on matching, averaged over
/// heads and tokens.
///
/// # Errors
/// If a tensor operation fails, the model has no matching head, or `layer` has no cross attention.
pub fn heat(model: &Xvlm, images: &ImageTokens, texts: &Texts, layer: usize) -> candle_core::Result<Heat> {
    let pass = Pass::inference().watching_attention(layer);
    let encoded = model.encode_text(&texts.ids, &texts.mask, Attention::Full, &pass)?;
    let index: Vec<u32> = (0..images.len() as u32).collect();
    let fused = Source::images(images)?
        .look_at(&index, |looks| model.fuse(&encoded, &texts.mask, looks, Attention::Full, &pass))?;
    let Some(attention) = pass.attention() else {
        let text = &model.config().text_config;
        let (first, end) = (text.fusion_layer, text.num_hidden_layers);
        candle_core::bail!("layer: expected one with cross attention, {first} to {}, found {layer}", end - 1);
    };
    let match_logits = model.match_logits(&fused)?;
    let gradients = match_logits.narrow(1, 1, 1)?.sum_all()?.backward()?;
    let Some(gradient) = gradients.get(&attention).cloned() else {
        candle_core::bail!("layer {layer}: expected the match to depend on its attention, found that it does not");
    };
    let attention = attention.as_detached_tensor();
    let (b, _, t, tokens) = attention.dims4()?;
    let patches = |x: &Tensor| x.narrow(3, 1, tokens - 1);
    let influence = (patches(&attention)? * patches(&gradient)?.relu()?)?;
    let side = model.config().vision_config.grid();
    let words = texts.mask.reshape((b, 1, t, 1))?;
    let map = influence.broadcast_mul(&words)?.mean(1)?.mean(1)?.reshape((b, side, side))?;
    Ok(Heat { attention, gradient, match_logits: match_logits.detach(), map })
}

/// How much of a heat map `[P, P]` lies in each proposed box, by which weakly supervised grounding chooses among them: the map
/// is stretched over the image (`width` × `height` pixels), summed inside the box, and divided by the root of the box's area
/// (`grounding_eval` of the original, α = 0.5). Boxes are `(x, y, w, h)` in pixels; one without area has no score above 0.
///
/// # Errors
/// If the map has not two dimensions, or a size is 0.
pub fn rank_proposals(map: &Tensor, width: u32, height: u32, proposals: &[[f32; 4]]) -> candle_core::Result<Vec<f32>> {
    let (width, height) = (width as usize, height as usize);
    let map = kernels::resize_bicubic(&map.unsqueeze(2)?, height, width)?.flatten_all()?.to_vec1::<f32>()?;
    let score = |&[x, y, w, h]: &[f32; 4]| {
        // As the original: the edges are cut to whole pixels, the area is not.
        let pixel = |edge: f32, size: usize| (edge.max(0.0) as usize).min(size);
        let span = |from: f32, extent: f32, size| pixel(from, size)..pixel(from + extent.max(0.0), size);
        let columns = span(x, w, width);
        let rows = span(y, h, height).map(|row| &map[row * width..][columns.clone()]);
        let sum: f64 = rows.flatten().map(|&heat| f64::from(heat)).sum();
        if w * h > 0.0 { (sum / f64::from(w * h).sqrt()) as f32 } else { 0.0 }
    };
    Ok(proposals.iter().map(score).collect())
}

/// What the model found for each item of a data set, and the scores.
pub struct Evaluation {
    /// The items.
    pub items: Vec<GroundingItem>,
    /// What was found for each.
    pub found: Vec<Found>,
    /// Accuracy at IoU 0.5 and mean IoU.
    pub scores: BoxScores,
}

impl Item for GroundingItem {
    fn image(&self) -> &Path {
        &self.image
    }

    fn text(&self) -> &str {
        &self.text
    }
}

/// Evaluates on `grounding.json` of a folder.
///
/// # Errors
/// If the file or an image cannot be read, or an image has another size than the file says.
pub fn evaluate(model: &Model, data: &Path, counter: Counter) -> Result<Evaluation, TaskError> {
    let file = data.join("grounding.json");
    let items = some(read_grounding(&file)?, data, "grounding.json")?;
    let check = |item: &GroundingItem, picture: &Picture| {
        let sizes = [(picture.width(), picture.height()), (item.width, item.height)];
        if sizes[0] == sizes[1] {
            return Ok(());
        }
        let [expected, found] = sizes.map(|(width, height)| format!("{width} x {height}"));
        let message = format!("{}: width, height: expected {expected}, as the image, found {found}", item.ref_id);
        Err(ConfigProblem { file: file.display().to_string(), message }.into())
    };
    let found = ask_all(model, &items, check, |images, texts| ground(model, images, texts), counter)?;
    let overlaps: Vec<f32> = items
        .iter()
        .zip(&found)
        .map(|(item, found)| refer_iou(found.pixels(item.width, item.height), item.bbox))
        .collect();
    Ok(Evaluation { scores: BoxScores::from_ious(&overlaps), items, found })
}
