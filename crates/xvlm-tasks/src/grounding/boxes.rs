//! Boxes by regression: predicted from the whole image, one for each text.

use std::collections::BTreeMap;

use candle_core::{IndexOp, Tensor};
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
use crate::model::{ImageTokens, Model, Texts};
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
    let tokens = texts.iter().map(|(_, text)| model.token_row(text)).collect::<Result<Vec<_>, _>>()?;
    let mut found = vec![None; texts.len()];
    for places in by_length(&tokens) {
        let index: Vec<u32> = places.iter().map(|&at| texts[at].0).collect();
        let tokens = model.pad(&places.iter().map(|&at| tokens[at].clone()).collect::<Vec<_>>())?;
        places.iter().zip(ground_some(model, images, &index, &tokens)?).for_each(|(&at, of)| found[at] = Some(of));
    }
    Ok(found.into_iter().flatten().collect())
}

/// Texts that go through the model together, as places in `tokens`: at most `4 · BATCH`, of which none is padded for long, since
/// those of like length are together. A batch costs its tokens, padding included, and as much again as [`BATCH_COST`] tokens.
fn by_length(tokens: &[Vec<u32>]) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..tokens.len()).collect();
    order.sort_by_key(|&at| tokens[at].len());
    // Of the first so many in this order: the least they cost, and where their last batch begins.
    let mut least = vec![(0, 0)];
    for end in 1..=order.len() {
        let longest = tokens[order[end - 1]].len();
        let cost = |start: usize| (least[start].0 + (end - start) * longest + BATCH_COST, start);
        least.extend((end.saturating_sub(4 * BATCH)..end).map(cost).min());
    }
    let (mut batches, mut end) = (Vec::new(), order.len());
    while end > 0 {
        let start = least[end].1;
        batches.push(order[start..end].to_vec());
        end = start;
    }
    batches.reverse();
    batches
}

/// The tokens whose arithmetic takes as long as reading the weights once, about: those of few are read from memory, not from a
/// cache, whatever their number.
const BATCH_COST: usize = 64;

/// Finds the boxes of texts that are tokenised, as [`ground`].
fn ground_some(model: &Model, images: &ImageTokens, index: &[u32], tokens: &Texts) -> Result<Vec<Found>, TaskError> {
    let encoded = model.encode_texts(tokens)?;
    let fused = model.look(&encoded, &tokens.mask, images, index, Attention::Full)?;
    let predicted = model.xvlm().predict_box(&fused)?.to_vec2::<f32>()?;
    let predicted: Vec<[f32; 4]> = predicted.iter().map(|row| [row[0], row[1], row[2], row[3]]).collect();
    if !model.xvlm().can_match() {
        return Ok(predicted.into_iter().map(|bounds| Found { bounds, probability: None }).collect());
    }
    let Inside { tokens: regions, index, mask } = inside(model, images, index, &predicted)?;
    let concepts = Concepts { tokens: &regions, index: &index, mask: &mask };
    let fused = model.xvlm().fuse(&encoded, &tokens.mask, &concepts, Attention::Full, &Pass::inference())?;
    let probabilities = model.match_probabilities(&fused)?.into_iter().map(Some);
    let found = predicted.into_iter().zip(probabilities);
    Ok(found.map(|(bounds, probability)| Found { bounds, probability }).collect())
}

/// Regions of images that are encoded already. Regions of one image have its patches in common, and so their keys and values: a
/// row of tokens is the pooled tokens of all regions of an image, of which each sees its own, and then the patches.
struct Inside {
    /// `[N, P + L, C]`, for as many images as have a region, and as many pooled tokens as an image has regions at most.
    tokens: Tensor,
    /// The row of each region.
    index: Vec<u32>,
    /// What each region sees `[B, P + L]`.
    mask: Tensor,
}

/// The regions inside boxes of images. A ViT has to encode a region to pool it: there, the pooled token stays that of the whole
/// image, before the patches of the region.
fn inside(model: &Model, images: &ImageTokens, index: &[u32], boxes: &[[f32; 4]]) -> candle_core::Result<Inside> {
    let (vision, device) = (&model.config().model.vision_config, model.device());
    let grid = vision.grid();
    let covered: Vec<Vec<f32>> = boxes.iter().map(|&bounds| kernels::patch_rectangle_mask(bounds, grid)).collect();
    let mut regions: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (region, &image) in (0u32..).zip(index) {
        regions.entry(image).or_default().push(region);
    }
    let mut rows = vec![0; boxes.len()];
    for (row, regions) in (0u32..).zip(regions.values()) {
        regions.iter().for_each(|&region| rows[region as usize] = row);
    }
    let used = Tensor::new(regions.keys().copied().collect::<Vec<_>>(), device)?;
    let tokens = images.0.index_select(&used, 0)?;
    let (tokens, own): (Tensor, Vec<Vec<f32>>) = match vision {
        VisionConfig::Swin(_) => {
            let patches = images.0.narrow(1, 1, images.0.dim(1)? - 1)?;
            let mask = Tensor::from_vec(covered.concat(), (boxes.len(), grid * grid), device)?;
            let pooled = kernels::patch_pool(&patches, index, Cover::Mask(&mask))?.i((.., 0))?.contiguous()?;
            let most = regions.values().map(Vec::len).max().unwrap_or(0);
            // Where an image has fewer regions, nothing sees what fills the row.
            let filled = regions.values().flat_map(|regions| (0..most).map(|i| regions[i.min(regions.len() - 1)]));
            let filled = Tensor::new(filled.collect::<Vec<_>>(), device)?;
            let pooled = pooled.index_select(&filled, 0)?.reshape((regions.len(), most, ()))?;
            let mut own = vec![vec![0.0; most]; boxes.len()];
            for regions in regions.values() {
                regions.iter().enumerate().for_each(|(place, &region)| own[region as usize][place] = 1.0);
            }
            (Tensor::cat(&[&pooled, &tokens.narrow(1, 1, grid * grid)?], 1)?, own)
        }
        VisionConfig::Vit(_) => (tokens, vec![vec![1.0]; boxes.len()]),
    };
    let mask: Vec<f32> = own.into_iter().zip(covered).flat_map(|(own, covered)| [own, covered].concat()).collect();
    let mask = Tensor::from_vec(mask, (boxes.len(), ()), device)?;
    Ok(Inside { tokens, index: rows, mask })
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

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use serde_json::json;
    use xvlm_data::{Picture, TextTokenizer};
    use xvlm_encoders::Parameters;

    use super::*;
    use crate::generate::Source;
    use crate::matching;
    use crate::model::ModelConfig;

    #[test]
    fn texts_of_like_length_go_together() {
        let texts = |lengths: &[usize]| lengths.iter().map(|&length| vec![0; length]).collect::<Vec<_>>();
        let batches = |lengths: &[usize]| {
            let batches = by_length(&texts(lengths));
            let mut all = batches.concat();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..lengths.len()));
            batches
        };
        assert!(batches(&[]).is_empty());
        assert_eq!(batches(&[4]), [[0]]);
        // A batch more would cost more than the padding.
        assert_eq!(batches(&[9, 5, 7]).len(), 1);
        // Thirty short texts are not padded to the length of a long one.
        let mut lengths = vec![6; 31];
        lengths[3] = 30;
        assert_eq!(batches(&lengths)[1], [3]);
        let found = batches(&[6; 300]);
        assert!(found.len() == 3 && found.iter().all(|batch| batch.len() <= 4 * BATCH));
    }

    fn model(vision: serde_json::Value) -> Model {
        let tokenizer = TextTokenizer::from_vocabulary(&["a red star in the sky".to_owned()]).unwrap();
        let config = serde_json::from_value(json!({
            "vision_config": vision,
            "text_config": {
                "vocab_size": tokenizer.vocab_size(), "hidden_size": 16, "num_hidden_layers": 2, "fusion_layer": 1,
                "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 48,
                "initializer_range": 0.3,
            },
            "embed_dim": 16,
        }))
        .unwrap();
        let parameters = Parameters::new(5);
        Xvlm::new(&config, parameters.builder(DType::F32, &Device::Cpu)).unwrap();
        let weights = parameters.named().into_iter().map(|(name, var)| (name, var.as_detached_tensor()));
        Model::with_weights(ModelConfig::of(config), weights, tokenizer, &Device::Cpu).unwrap()
    }

    fn pictures() -> Vec<Picture> {
        let picture = |seed: u32| {
            let bytes = (0..32 * 32 * 3).map(|i| ((i * 37 + seed * 101) % 251) as u8);
            Picture::from_rgb(32, 32, bytes.collect()).unwrap()
        };
        (1..4).map(picture).collect()
    }

    #[test]
    fn regions_that_share_an_image_match_as_those_that_have_it_for_themselves() {
        let swin = json!({
            "kind": "swin", "image_res": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
            "window_size": 4,
        });
        let model = model(swin);
        let images = model.encode(&pictures()).unwrap();
        let index = [2, 0, 2, 2];
        let boxes = [[0.3, 0.3, 0.4, 0.4], [0.5, 0.5, 1.0, 1.0], [0.8, 0.2, 0.1, 0.3], [0.1, 0.9, 0.2, 0.2]];
        let texts = ["a red star", "the sky", "a star in the sky", "red"];

        let tokens = model.tokenise(&texts).unwrap();
        let encoded = model.encode_texts(&tokens).unwrap();
        let Inside { tokens: shared, index: rows, mask } = inside(&model, &images, &index, &boxes).unwrap();
        assert_eq!((shared.dim(0).unwrap(), rows.as_slice()), (2, &[1, 0, 1, 1][..]));
        let concepts = Concepts { tokens: &shared, index: &rows, mask: &mask };
        let fused = model.xvlm().fuse(&encoded, &tokens.mask, &concepts, Attention::Full, &Pass::inference()).unwrap();
        let found = model.match_probabilities(&fused).unwrap();

        let placed: Vec<(u32, [f32; 4])> = index.into_iter().zip(boxes).collect();
        let regions = matching::encode_placed(&model, &pictures(), &placed).unwrap().regions.unwrap();
        for (at, text) in texts.iter().enumerate() {
            let own = Source {
                tokens: regions.tokens.narrow(0, at, 1).unwrap(),
                mask: regions.mask.narrow(0, at, 1).unwrap(),
            };
            let expected = matching::scores(&model, &own, &[text]).unwrap()[0][0].probability;
            assert!((found[at] - expected).abs() < 1e-5, "{text}: {} {expected}", found[at]);
        }
        // Together or alone, in whatever order.
        let together = ground(&model, &images, &index.into_iter().zip(texts).collect::<Vec<_>>()).unwrap();
        for ((image, text), together) in index.into_iter().zip(texts).zip(together) {
            let alone = ground(&model, &images, &[(image, text)]).unwrap().remove(0);
            let numbers = |found: &Found| [&found.bounds[..], &[found.probability.unwrap()]].concat();
            for (together, alone) in numbers(&together).into_iter().zip(numbers(&alone)) {
                assert!((together - alone).abs() < 1e-5, "{text}: {together} {alone}");
            }
        }
    }
}
