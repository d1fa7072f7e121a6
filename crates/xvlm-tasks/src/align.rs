//! The losses that align texts with their concepts, which pre-training and two of the tasks have in common.

use std::sync::Arc;

use candle_core::{DType, Error, Result, Tensor};
use xvlm_data::TextTensors;
use xvlm_encoders::{Attention, Concepts, Pass, Xvlm};
use xvlm_kernels::scale_gradient;
use xvlm_losses::{self as losses, BoxRule, Pair};
use xvlm_train::ranks::{Communicator, Gather};

use crate::config::{ItcGradient, Objective};
use crate::generate::Source;

/// Losses by name.
pub(crate) type Named = Vec<(&'static str, Tensor)>;

/// Chooses the negatives for matching from the similarities `[B, B]` (a row for each concept) and the keys of the texts.
pub type Negatives<'a> = &'a mut dyn FnMut(&Tensor, &[i64]) -> Result<Vec<Pair>>;

/// Where texts that are trained on their box look, and what they should find.
pub(crate) struct BoxTargets<'a> {
    /// Whole images `[N, 1+L, C]`.
    pub(crate) images: &'a Tensor,
    /// The image of each text.
    pub(crate) index: &'a [u32],
    /// `[B, 4]`, `(cx, cy, w, h)`.
    pub(crate) boxes: &'a Tensor,
    /// Whether a text tells a whole image.
    pub(crate) is_image: &'a [bool],
}

/// Rows of one batch of fusion: which text looks at which concept.
#[derive(Default)]
struct Fusion {
    texts: Vec<u32>,
    concepts: Vec<u32>,
}

impl Fusion {
    fn add(&mut self, texts: impl Iterator<Item = u32>, concepts: impl Iterator<Item = u32>) {
        self.texts.extend(texts);
        self.concepts.extend(concepts);
    }
}

/// A model and what it is trained for.
pub(crate) struct Alignment<'a> {
    pub(crate) model: &'a Xvlm,
    pub(crate) objectives: &'a [Objective],
    pub(crate) pass: &'a Pass,
    /// How much each text counts in ITC, if not all the same; see [`losses::contrastive`].
    pub(crate) weights: Option<&'a [f32]>,
    /// The processes whose samples are compared with each other in ITC, if there are several.
    pub(crate) ranks: Option<(&'a Arc<dyn Communicator>, ItcGradient)>,
}

impl Alignment<'_> {
    /// The losses of texts with their concepts, a row for each text, and with their boxes, as far as there are any. All that
    /// goes through the fusion layers goes as one batch: matching pairs, hard negatives, masked texts, texts that look for
    /// their box.
    pub(crate) fn losses(
        &self,
        text: &TextTensors,
        concepts: Option<&Source>,
        targets: Option<BoxTargets>,
        negatives: Negatives,
    ) -> Result<Named> {
        let Self { model, objectives, pass, .. } = self;
        let has = |objective| objectives.contains(&objective);
        let (b, t) = text.ids.dims2()?;
        let (rows, device) = (0..b as u32, text.ids.device());
        // The texts, then their masked copies.
        let (mut ids, mut text_mask) = (text.ids.clone(), text.mask.clone());
        let has_mlm = concepts.is_some() && has(Objective::Mlm) && !text.masked_labels.is_empty();
        if has_mlm {
            ids = Tensor::cat(&[&ids, &text.masked_ids], 0)?;
            text_mask = Tensor::cat(&[&text_mask, &text_mask], 0)?;
        }
        let encoded = model.encode_text(&ids, &text_mask, Attention::Full, pass)?;
        let mut named = Named::new();

        // Rows to fuse: which text looks at which concept, and what of it is visible.
        let mut fusion = Fusion::default();
        let (mut tokens, mut masks) = (Vec::new(), Vec::new());
        let mut matched = 0;
        if let Some(Source { tokens: concepts, mask }) = concepts {
            if has(Objective::Itc) || has(Objective::Itm) {
                let image_features = model.project_image(concepts)?;
                let text_features = model.project_text(&encoded.narrow(0, 0, b)?)?;
                let (itc, similarities) = self.contrast(&image_features, &text_features, &text.keys)?;
                if has(Objective::Itc) {
                    named.push(("itc", itc));
                }
                if has(Objective::Itm) {
                    fusion.add(rows.clone(), rows.clone());
                    let negatives = negatives(&similarities, &text.keys)?;
                    fusion.add(negatives.iter().map(|pair| pair.text), negatives.iter().map(|pair| pair.concept));
                }
            }
            matched = fusion.texts.len();
            if has_mlm {
                fusion.add(rows.clone().map(|row| b as u32 + row), rows.clone());
            }
            if !fusion.texts.is_empty() {
                tokens.push(concepts);
                masks.push(mask.index_select(&Tensor::new(fusion.concepts.as_slice(), device)?, 0)?);
            }
        }
        let targets = targets.filter(|_| has(Objective::Box));
        if let Some(targets) = &targets {
            let before = tokens.first().map_or(Ok(0), |concepts| concepts.dim(0))? as u32;
            fusion.add(rows, targets.index.iter().map(|image| before + image));
            tokens.push(targets.images);
            masks.push(Tensor::ones((b, targets.images.dim(1)?), DType::F32, device)?);
        }
        if fusion.texts.is_empty() {
            return Ok(named);
        }
        let texts = Tensor::new(fusion.texts.as_slice(), device)?;
        let (tokens, mask) = (Tensor::cat(&tokens, 0)?, Tensor::cat(&masks, 0)?);
        let looks = Concepts { tokens: &tokens, index: &fusion.concepts, mask: &mask };
        let text_mask = text_mask.index_select(&texts, 0)?;
        let fused = model.fuse(&encoded.index_select(&texts, 0)?, &text_mask, &looks, Attention::Full, pass)?;

        if matched > 0 {
            named.push(("itm", losses::matching(&model.match_logits(&fused.narrow(0, 0, matched)?)?, b)?));
        }
        let mut at = matched;
        if has_mlm {
            let masked = fused.narrow(0, at, b)?.reshape((b * t, ()))?;
            let masked = masked.index_select(&text.masked_positions, 0)?;
            named.push(("mlm", losses::masked_language(&model.mlm_logits(&masked)?, &text.masked_labels)?));
            at += b;
        }
        if let Some(targets) = targets {
            let found = model.predict_box(&fused.narrow(0, at, b)?)?;
            let (l1, giou) = losses::boxes(&found, targets.boxes, targets.is_image, BoxRule::Row)?;
            named.extend([("bbox", l1), ("giou", giou)]);
        }
        Ok(named)
    }

    /// ITC of the rows `[B, E]` of all ranks, and the similarities `[B, B]` of this rank's.
    fn contrast(&self, concepts: &Tensor, texts: &Tensor, keys: &[i64]) -> Result<(Tensor, Tensor)> {
        let Self { model, objectives, weights, .. } = self;
        let temperature = model.temperature()?;
        let several = self.ranks.filter(|(ranks, _)| ranks.size() > 1 && objectives.contains(&Objective::Itc));
        let Some((ranks, gradient)) = several else {
            return losses::contrastive(concepts, texts, temperature, keys, *weights);
        };
        let gather = Gather::new(ranks, keys.len()).map_err(Error::wrap)?;
        let factor = match gradient {
            ItcGradient::Whole => ranks.size() as f64,
            ItcGradient::Original => 1.0,
        };
        let join = |features: &Tensor| gather.join(&scale_gradient(features, factor)?).map_err(Error::wrap);
        let (concepts, texts) = (join(concepts)?, join(texts)?);
        let keys = gather.join_numbers(keys).map_err(Error::wrap)?;
        let weights = weights.map(|weights| gather.join_numbers(weights)).transpose().map_err(Error::wrap)?;
        let (itc, similarities) = losses::contrastive(&concepts, &texts, temperature, &keys, weights.as_deref())?;
        let own = gather.own();
        let similarities = similarities.detach().narrow(0, own.start, own.len())?.narrow(1, own.start, own.len())?;
        Ok((itc, similarities.contiguous()?))
    }
}
