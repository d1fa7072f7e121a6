//! Pre-training (§3 of the paper): both streams, all losses.
//!
//! One iteration is an image–text batch and, with probability `regions.iter_perc`, a region batch, each an optimizer step
//! of its own. The way of one step reads like this: batch → [`Xvlm::encode_regions`] → text → losses.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_data::{
    BatchBuilder, CaptionTensors, GenerationTensors, Loader, LoaderConfig, RegionTensors, TextTensors,
};
use xvlm_encoders::{Attention, Concepts, Parameters, Pass, Regions, Xvlm, XvlmConfig};
use xvlm_losses as losses;
use xvlm_train::{Batches, BoxError, Losses, Trainable};

/// Bounds of the temperature after each step (the original's `xvlm.temp.clamp_`).
const TEMPERATURE: (f64, f64) = (0.001, 0.5);

/// One batch of either stream.
pub enum Batch {
    /// Whole images with a text each.
    Captions(CaptionTensors),
    /// Boxes in images with a text each.
    Regions(RegionTensors),
}

/// The model with its pre-training losses.
pub struct Pretraining {
    model: Xvlm,
    parameters: Vec<(String, Var)>,
}

/// Where texts that are trained on their box look, and what they should find.
struct BoxTargets<'a> {
    images: &'a Tensor,
    index: &'a [u32],
    boxes: &'a Tensor,
    is_image: &'a [bool],
}

impl Pretraining {
    /// A freshly initialised model.
    ///
    /// # Errors
    /// If the sizes do not fit together.
    pub fn new(config: &XvlmConfig, seed: u64, device: &Device) -> Result<Self> {
        let parameters = Parameters::new(seed);
        let model = Xvlm::new(config, parameters.builder(DType::F32, device))?;
        Ok(Self { model, parameters: parameters.named() })
    }

    /// The model inside.
    pub fn model(&self) -> &Xvlm {
        &self.model
    }

    /// Image stream: ITC, ITM and MLM of each image with its text, and the texts that are to be generated.
    fn captions(&self, batch: &CaptionTensors, rng: &mut ChaCha8Rng) -> Result<Losses> {
        let pass = Pass::training(rng);
        let images = self.model.encode_image(&batch.pixels, &pass)?;
        let (n, tokens, _) = images.dims3()?;
        let mask = Tensor::ones((n, tokens), DType::F32, images.device())?;
        let mut named = self.align(&batch.text, &images, &mask, None, &pass, rng)?;
        if let Some(generation) = &batch.generation {
            named.push(("generation", self.generate(generation, &images, &pass)?));
        }
        Ok(Losses(named))
    }

    /// Region stream: the same for each region with its text, and the box of the text in the whole image.
    fn regions(&self, batch: &RegionTensors, rng: &mut ChaCha8Rng) -> Result<Losses> {
        let pass = Pass::training(rng);
        let regions = Regions { index: &batch.image_index, mask: &batch.region_mask };
        let (concepts, images) = self.model.encode_regions(&batch.pixels, regions, &pass)?;
        let targets = BoxTargets {
            images: &images,
            index: &batch.image_index,
            boxes: &batch.boxes,
            is_image: &batch.is_image,
        };
        let named = self.align(&batch.text, &concepts, &batch.region_mask, Some(targets), &pass, rng)?;
        Ok(Losses(named))
    }

    /// The losses that align texts with their concepts `[B, 1+L, C]`. Matching pairs, hard negatives, masked texts and
    /// texts that look for their box go through the fusion layers together, as rows of one batch.
    fn align(
        &self,
        text: &TextTensors,
        concepts: &Tensor,
        mask: &Tensor,
        targets: Option<BoxTargets>,
        pass: &Pass,
        rng: &mut ChaCha8Rng,
    ) -> Result<Vec<(&'static str, Tensor)>> {
        let model = &self.model;
        let (b, t) = text.ids.dims2()?;
        let rows = 0..b as u32;
        let ids = Tensor::cat(&[&text.ids, &text.masked_ids], 0)?;
        let both = Tensor::cat(&[&text.mask, &text.mask], 0)?;
        let encoded = model.encode_text(&ids, &both, Attention::Full, pass)?;

        let image_features = model.project_image(concepts)?;
        let text_features = model.project_text(&encoded.narrow(0, 0, b)?)?;
        let (itc, similarities) =
            losses::contrastive(&image_features, &text_features, model.temperature(), &text.keys)?;
        let negatives = losses::hard_negatives(&similarities, &text.keys, rng)?;

        // Rows to fuse: positives, negatives, masked texts, texts that look for their box.
        let mut texts: Vec<u32> = rows.clone().chain(negatives.iter().map(|pair| pair.text)).collect();
        let mut seen: Vec<u32> = rows.clone().chain(negatives.iter().map(|pair| pair.concept)).collect();
        let matched = texts.len();
        texts.extend(rows.clone().map(|row| b as u32 + row));
        seen.extend(rows.clone());
        let device = concepts.device();
        let mut tokens = concepts.clone();
        let mut masks = vec![mask.index_select(&Tensor::new(seen.as_slice(), device)?, 0)?];
        if let Some(targets) = &targets {
            texts.extend(rows);
            seen.extend(targets.index.iter().map(|image| b as u32 + image));
            tokens = Tensor::cat(&[&tokens, targets.images], 0)?;
            masks.push(mask.ones_like()?);
        }
        let texts = Tensor::new(texts, device)?;
        let looks = Concepts { tokens: &tokens, index: &seen, mask: &Tensor::cat(&masks, 0)? };
        let text_mask = both.index_select(&texts, 0)?;
        let fused = model.fuse(&encoded.index_select(&texts, 0)?, &text_mask, &looks, Attention::Full, pass)?;

        let itm = losses::matching(&model.match_logits(&fused.narrow(0, 0, matched)?)?, b)?;
        let mut named = vec![("itc", itc), ("itm", itm)];
        if !text.masked_labels.is_empty() {
            let masked = fused.narrow(0, matched, b)?.reshape((b * t, ()))?;
            let masked = masked.index_select(&text.masked_positions, 0)?;
            named.push(("mlm", losses::masked_language(&model.mlm_logits(&masked)?, &text.masked_labels)?));
        }
        if let Some(targets) = targets {
            let found = model.predict_box(&fused.narrow(0, matched + b, b)?)?;
            let (l1, giou) = losses::boxes(&found, targets.boxes, targets.is_image)?;
            named.extend([("bbox", l1), ("giou", giou)]);
        }
        Ok(named)
    }

    /// The loss of writing captions (and answers) token by token: the same layers with a causal mask.
    fn generate(&self, batch: &GenerationTensors, images: &Tensor, pass: &Pass) -> Result<Tensor> {
        let model = &self.model;
        let (b, t) = batch.ids.dims2()?;
        let encoded = model.encode_text(&batch.ids, &batch.mask, Attention::Causal, pass)?;
        let mask = Tensor::ones((b, images.dim(1)?), DType::F32, images.device())?;
        let looks = Concepts { tokens: images, index: &batch.image_index, mask: &mask };
        let fused = model.fuse(&encoded, &batch.mask, &looks, Attention::Causal, pass)?;
        let (positions, labels): (Vec<u32>, Vec<i64>) =
            batch.labels.iter().enumerate().filter(|(_, label)| **label >= 0).map(|(i, &label)| (i as u32, label)).unzip();
        let written = fused.reshape((b * t, ()))?.index_select(&Tensor::new(positions, images.device())?, 0)?;
        losses::generation(&model.mlm_logits(&written)?, &labels)
    }
}

impl Trainable for Pretraining {
    type Batch = Batch;

    fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    fn losses(&self, batch: &Batch, rng: &mut ChaCha8Rng) -> std::result::Result<Losses, BoxError> {
        Ok(match batch {
            Batch::Captions(batch) => self.captions(batch, rng)?,
            Batch::Regions(batch) => self.regions(batch, rng)?,
        })
    }

    fn samples(batch: &Batch) -> usize {
        match batch {
            Batch::Captions(batch) => batch.text.keys.len(),
            Batch::Regions(batch) => batch.text.keys.len(),
        }
    }

    fn after_step(&self) -> std::result::Result<(), BoxError> {
        for (_, temperature) in self.parameters.iter().filter(|(name, _)| name == "temp") {
            temperature.set(&temperature.clamp(TEMPERATURE.0, TEMPERATURE.1)?)?;
        }
        Ok(())
    }
}

/// The batches of a run in order, built ahead on worker threads.
pub struct PretrainBatches {
    loader: Loader<Vec<Batch>>,
}

impl PretrainBatches {
    /// Batches from iteration `start` on. What an iteration gets depends on the seed and its number alone.
    ///
    /// # Errors
    /// If a worker thread cannot be started.
    pub fn new(
        builder: Arc<BatchBuilder>,
        iter_perc: f64,
        seed: u64,
        start: u64,
        workers: LoaderConfig,
        device: &Device,
    ) -> std::result::Result<Self, BoxError> {
        let device = device.clone();
        let build = move |step: u64| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(step);
            let mut batches = vec![Batch::Captions(builder.captions(step)?.to_tensors(&device)?)];
            if rng.random_bool(iter_perc) {
                batches.push(Batch::Regions(builder.regions(step)?.to_tensors(&device)?));
            }
            Ok(batches)
        };
        Ok(Self { loader: Loader::starting_at(start, workers, build)? })
    }
}

impl Batches<Batch> for PretrainBatches {
    fn next(&mut self) -> std::result::Result<Vec<Batch>, BoxError> {
        Ok(self.loader.next()?)
    }
}
