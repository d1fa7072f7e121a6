//! Where a model looks while it matches a text with an image (Grad-CAM, Selvaraju et al. 2017, as `Grounding.py` does it).

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use xvlm_encoders::{Attention, BertConfig, Pass, Task, Xvlm};
use xvlm_kernels as kernels;

use crate::BATCH;
use crate::error::{ConfigProblem, TaskError};
use crate::generate::Source;
use crate::model::{ImageTokens, Model, Texts};

/// The tasks whose models match texts with images.
pub(super) const MADE_FOR: &[Task] = &[Task::Pretrain, Task::Retrieval];

/// Which patches of each image a text is about, and what that was concluded from: `f32`, whatever the model computes with.
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

/// Finds what a text is about without ever having seen a box (§4.2 of the paper). Text `i` is about row `index[i]` of the
/// images.
///
/// The map is the attention that a fusion layer pays to each patch, times its positive influence on matching, averaged over
/// heads and tokens. Gradients are computed of what comes after the attention of that layer, and of nothing before it.
///
/// # Errors
/// If a tensor operation fails, the model has no matching head, or `layer` has no cross attention.
pub fn heat(
    model: &Xvlm,
    images: &ImageTokens,
    texts: &Texts,
    index: &[u32],
    layer: usize,
) -> candle_core::Result<Heat> {
    let encoded = model.encode_text(&texts.ids, &texts.mask, Attention::Full, &Pass::inference())?;
    heat_of(model, images, &encoded, &texts.mask, index, layer)
}

/// As [`heat`], of texts that are encoded already.
fn heat_of(
    model: &Xvlm,
    images: &ImageTokens,
    encoded: &Tensor,
    mask: &Tensor,
    index: &[u32],
    layer: usize,
) -> candle_core::Result<Heat> {
    let pass = Pass::inference().watching_attention(layer);
    let fused =
        Source::images(images)?.look_at(index, |looks| model.fuse(encoded, mask, looks, Attention::Full, &pass))?;
    let Some(attention) = pass.attention() else {
        let layers = fusion_layers(&model.config().text_config);
        candle_core::bail!(
            "layer: expected one with cross attention, {} to {}, found {layer}",
            layers.start,
            layers.end - 1
        );
    };
    let match_logits = model.match_logits(&fused)?;
    let gradients = match_logits.narrow(1, 1, 1)?.sum_all()?.backward()?;
    let Some(gradient) = gradients.get(&attention).cloned() else {
        candle_core::bail!("layer {layer}: expected the match to depend on its attention, found that it does not");
    };
    let (attention, gradient) = (attention.as_detached_tensor().to_dtype(DType::F32)?, gradient.to_dtype(DType::F32)?);
    let (b, _, t, tokens) = attention.dims4()?;
    let patches = |x: &Tensor| x.narrow(3, 1, tokens - 1);
    let influence = (patches(&attention)? * patches(&gradient)?.relu()?)?;
    let side = model.config().vision_config.grid();
    let words = mask.reshape((b, 1, t, 1))?;
    let map = influence.broadcast_mul(&words)?.mean(1)?.mean(1)?.reshape((b, side, side))?;
    Ok(Heat { attention, gradient, match_logits: match_logits.detach(), map })
}

fn fusion_layers(text: &BertConfig) -> Range<usize> {
    text.fusion_layer..text.num_hidden_layers
}

/// The layers whose cross attention is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    /// One, counted from the first text layer: `block_num` of the original's configurations.
    One(usize),
    /// All that have one: the sum of their maps. It needs no choice of a layer, which the original makes by what scores best.
    #[default]
    All,
}

impl Layers {
    /// The layers of a model that are meant.
    pub(super) fn of(self, text: &BertConfig) -> Result<Range<usize>, ConfigProblem> {
        let all = fusion_layers(text);
        match self {
            Self::All => Ok(all),
            Self::One(layer) if all.contains(&layer) => Ok(layer..layer + 1),
            Self::One(layer) => {
                let (first, last) = (all.start, all.end - 1);
                let message = format!("expected a layer with cross attention, {first} to {last}, found {layer}");
                Err(ConfigProblem { file: "layer".to_owned(), message })
            }
        }
    }
}

/// How much a text is about each patch of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeatMap {
    /// Patches along a side, `P`.
    pub side: usize,
    /// `P²` numbers, row by row: of each patch the mean over heads and tokens of attention × positive gradient. 0 is none;
    /// otherwise only their proportions mean something.
    pub values: Vec<f32>,
    /// Probability that the text tells the image.
    pub probability: f32,
}

/// Heat maps of texts, each given with the row of `images` it is about.
///
/// # Errors
/// If a text is empty, the model is made for another task, or has no such layer.
pub fn heat_maps(
    model: &Model,
    images: &ImageTokens,
    texts: &[(u32, &str)],
    layers: Layers,
) -> Result<Vec<HeatMap>, TaskError> {
    model.fit_for("heat maps", MADE_FOR)?;
    let layers = layers.of(&model.config().model.text_config)?;
    let side = model.config().model.vision_config.grid();
    let mut maps = Vec::with_capacity(texts.len());
    for texts in texts.chunks(BATCH) {
        let (index, texts): (Vec<u32>, Vec<&str>) = texts.iter().copied().unzip();
        let tokens = model.tokenise(&texts)?;
        let encoded = model.encode_texts(&tokens)?;
        let (mut sum, mut logits) = (None, None);
        for layer in layers.clone() {
            let heat = heat_of(model.xvlm(), images, &encoded, &tokens.mask, &index, layer)?;
            sum = Some(match sum {
                None => heat.map,
                Some(sum) => (sum + heat.map)?,
            });
            logits = Some(heat.match_logits);
        }
        let (Some(sum), Some(logits)) = (sum, logits) else { continue };
        // The mean over the tokens of the batch's longest text, made one over those of each text.
        let lengths = tokens.mask.sum(1)?.to_vec1::<f32>()?;
        let longest = tokens.mask.dim(1)? as f32;
        let rows = sum.reshape((index.len(), side * side))?.to_vec2::<f32>()?;
        let probabilities = Model::probabilities(&logits)?;
        maps.extend(rows.into_iter().zip(lengths).zip(probabilities).map(|((mut values, length), probability)| {
            values.iter_mut().for_each(|value| *value *= longest / length);
            HeatMap { side, values, probability }
        }));
    }
    Ok(maps)
}

impl HeatMap {
    /// Whether the text is about no patch: nothing that the layer looks at speaks for a match.
    pub fn is_cold(&self) -> bool {
        self.values.iter().all(|&value| value <= 0.0)
    }

    /// Where a text points, `(x, y)` in pixels of an image of the size given: the centre of the heat in the hottest patch and
    /// the eight around it. That tells more than the patch, of which there are few; the centre of the image if it is cold.
    pub fn point(&self, width: u32, height: u32) -> [f32; 2] {
        let side = self.side;
        let mut hottest = 0;
        for (patch, value) in self.values.iter().enumerate() {
            if *value > self.values[hottest] {
                hottest = patch;
            }
        }
        let near = |at: usize| at.saturating_sub(1)..(at + 2).min(side);
        let (mut weight, mut x, mut y) = (0.0, 0.0, 0.0);
        for row in near(hottest / side.max(1)) {
            for column in near(hottest % side.max(1)) {
                let heat = f64::from(self.values[row * side + column].max(0.0));
                weight += heat;
                x += heat * (column as f64 + 0.5);
                y += heat * (row as f64 + 0.5);
            }
        }
        let place = |sum: f64, size: u32| {
            let share = if weight > 0.0 { sum / weight / side as f64 } else { 0.5 };
            (share * f64::from(size)) as f32
        };
        [place(x, width), place(y, height)]
    }

    /// The map stretched over an image of the size given.
    ///
    /// # Errors
    /// If a size is 0.
    pub fn stretched(&self, width: u32, height: u32) -> Result<StretchedHeat, TaskError> {
        let map = Tensor::from_vec(self.values.clone(), (self.side, self.side), &Device::Cpu)?;
        Ok(StretchedHeat::new(&map, width, height)?)
    }
}

/// A heat map with a number for each pixel.
#[derive(Clone, Debug, PartialEq)]
pub struct StretchedHeat {
    width: usize,
    height: usize,
    values: Vec<f32>,
}

impl StretchedHeat {
    /// The share of the maximum above which heat belongs to what a text means (Zhou et al. 2016, class activation maps).
    pub const SHARE: f32 = 0.2;

    /// Stretches a map `[P, P]` over `width` × `height` pixels, as the original does: bicubic, so that it may be a little below 0.
    ///
    /// # Errors
    /// If the map has not two dimensions, or a size is 0.
    pub fn new(map: &Tensor, width: u32, height: u32) -> candle_core::Result<Self> {
        let (width, height) = (width as usize, height as usize);
        let values = kernels::resize_bicubic(&map.unsqueeze(2)?, height, width)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Self { width, height, values })
    }

    /// Width and height in pixels.
    pub fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// The numbers, row by row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The hottest pixel: column and row.
    fn hottest(&self) -> (usize, usize) {
        let hottest = (0..self.values.len()).reduce(|a, b| if self.values[b] > self.values[a] { b } else { a });
        let hottest = hottest.unwrap_or(0);
        (hottest % self.width, hottest / self.width)
    }

    /// The centre of the hottest pixel, `(x, y)`.
    pub fn maximum(&self) -> [f32; 2] {
        let (x, y) = self.hottest();
        [x as f32 + 0.5, y as f32 + 0.5]
    }

    /// The box `(x, y, w, h)` in pixels around what is connected with the hottest pixel and has at least `share` of its heat;
    /// the whole image if no pixel is above 0.
    pub fn bounds(&self, share: f32) -> [f32; 4] {
        let start = self.hottest();
        let maximum = self.values[start.1 * self.width + start.0];
        if maximum.is_nan() || maximum <= 0.0 {
            return [0.0, 0.0, self.width as f32, self.height as f32];
        }
        let mut seen = vec![false; self.values.len()];
        let mut open = vec![start];
        let (mut low, mut high) = (start, start);
        while let Some((x, y)) = open.pop() {
            let place = y * self.width + x;
            if std::mem::replace(&mut seen[place], true) {
                continue;
            }
            low = (low.0.min(x), low.1.min(y));
            high = (high.0.max(x), high.1.max(y));
            let beside = [
                (x > 0).then(|| (x - 1, y)),
                (x + 1 < self.width).then_some((x + 1, y)),
                (y > 0).then(|| (x, y - 1)),
                (y + 1 < self.height).then_some((x, y + 1)),
            ];
            let is_hot = |&(x, y): &(usize, usize)| {
                let place = y * self.width + x;
                !seen[place] && self.values[place] >= share * maximum
            };
            open.extend(beside.into_iter().flatten().filter(is_hot));
        }
        [low.0, low.1, high.0 + 1 - low.0, high.1 + 1 - low.1].map(|number| number as f32)
    }

    /// How much of the heat lies in each proposed box, by which weakly supervised grounding chooses among them: the sum inside
    /// the box, divided by the root of the box's area (`grounding_eval` of the original, α = 0.5). Boxes are `(x, y, w, h)` in
    /// pixels; one without area has the score 0.
    pub fn rank(&self, proposals: &[[f32; 4]]) -> Vec<f32> {
        // Sums of all that is above and to the left.
        let stride = self.width + 1;
        let mut sums = vec![0f64; stride * (self.height + 1)];
        for (row, values) in self.values.chunks(self.width).enumerate() {
            let mut sum = 0.0;
            for (column, &value) in values.iter().enumerate() {
                sum += f64::from(value);
                sums[(row + 1) * stride + column + 1] = sums[row * stride + column + 1] + sum;
            }
        }
        let score = |&[x, y, w, h]: &[f32; 4]| {
            // As the original: the edges are cut to whole pixels, the area is not.
            let pixel = |edge: f32, size: usize| (edge.max(0.0) as usize).min(size);
            let span = |from: f32, extent: f32, size| (pixel(from, size), pixel(from + extent.max(0.0), size));
            let ((left, right), (top, bottom)) = (span(x, w, self.width), span(y, h, self.height));
            let to = |column: usize, row: usize| sums[row * stride + column];
            let sum = to(right, bottom) - to(left, bottom) - to(right, top) + to(left, top);
            if w > 0.0 && h > 0.0 { (sum / f64::from(w * h).sqrt()) as f32 } else { 0.0 }
        };
        proposals.iter().map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(side: usize, values: &[f32]) -> HeatMap {
        HeatMap { side, values: values.to_vec(), probability: 0.5 }
    }

    #[test]
    fn the_point_is_the_centre_of_the_heat_around_the_hottest_patch() {
        #[rustfmt::skip]
        let values = [
            0.0, 0.0, 0.0, 9.0,
            0.0, 0.0, 0.0, 0.0,
            0.0, 8.0, 8.0, 0.0,
            0.0, 0.0, 0.0, 0.0,
        ];
        // The lone patch is the hottest.
        assert_eq!(map(4, &values).point(40, 80), [35.0, 10.0]);
        let mut values = values;
        values[3] = 7.0;
        assert_eq!(map(4, &values).point(40, 80), [20.0, 50.0]);
        let cold = map(4, &[0.0; 16]);
        assert!(cold.is_cold() && !map(4, &values).is_cold());
        assert_eq!(cold.point(40, 80), [20.0, 40.0]);
        assert_eq!(cold.stretched(40, 80).unwrap().bounds(0.2), [0.0, 0.0, 40.0, 80.0]);
    }

    #[test]
    fn a_box_is_drawn_around_connected_heat() {
        #[rustfmt::skip]
        let values = vec![
            0.0, 0.1, 0.5, 0.0, 0.9,
            0.0, 0.4, 1.0, 0.1, 0.0,
            0.0, 0.0, 0.3, 0.0, 0.0,
        ];
        let heat = StretchedHeat { width: 5, height: 3, values };
        assert_eq!(heat.maximum(), [2.5, 1.5]);
        assert_eq!(heat.bounds(0.2), [1.0, 0.0, 2.0, 3.0]);
        assert_eq!(heat.bounds(0.45), [2.0, 0.0, 1.0, 2.0]);
        assert_eq!(heat.bounds(0.1), [1.0, 0.0, 3.0, 3.0]);
        assert!(map(2, &[0.0; 4]).stretched(0, 3).is_err());
    }

    #[test]
    fn proposals_are_ranked_by_the_heat_inside() {
        let heat = StretchedHeat { width: 4, height: 2, values: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0] };
        let boxes = [
            [0.0, 0.0, 4.0, 2.0],
            [1.9, 0.0, 2.0, 1.0],
            [-3.0, -3.0, 4.0, 4.0],
            [2.0, 1.0, 9.0, 9.0],
            [1.0, 1.0, 0.0, 2.0],
            [-2.0, 0.0, -2.0, -2.0],
            [9.0, 9.0, 2.0, 2.0],
        ];
        let expected = [36.0 / 8f32.sqrt(), 5.0 / 2f32.sqrt(), 1.0 / 4.0, 15.0 / 9.0, 0.0, 0.0, 0.0];
        for (found, expected) in heat.rank(&boxes).into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
}
