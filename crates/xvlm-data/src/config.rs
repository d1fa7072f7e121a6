//! What batches are made of.

use serde::{Deserialize, Serialize};

use crate::augment::RandAugment;
use crate::error::DataError;
use crate::masking::MaskingGenerator;
use crate::transform::{RandomResizedCrop, Transform};

/// What batches are made of. Defaults are those of X-VLM's base model (`Pretrain_XVLM_base_4m.yaml`),
/// for one process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Seed of all randomness. Default 42.
    pub seed: u64,
    /// Side of the square images, in pixels; a multiple of `final_stride`. Default 224; not in files, since it is the model's.
    #[serde(skip)]
    pub resolution: usize,
    /// Side of the square that one patch token stands for, in pixels. Default 32; not in files, since it is the model's.
    #[serde(skip)]
    pub final_stride: usize,
    /// Images in a caption batch. Default 128.
    pub batch_size: usize,
    /// Most images in a region batch. Default 48.
    pub max_images: usize,
    /// Texts in a region batch, those of whole images included. Default 128.
    pub max_regions: usize,
    /// Most texts of one image in a region batch, that of the whole image included. Default 5.
    pub regions_per_image: usize,
    /// What a region batch does when its images have more or fewer texts than `max_regions`. Default `repeats`.
    pub padding: Padding,
    /// Whether region batches hold captions of whole images too. Default true.
    pub whole_image_text: bool,
    /// Share of region batches that call their elements by a label instead of one of their texts: objects, the finest
    /// grain. Where there are several ways of classing, such a batch keeps to one of them, so that nothing else tells its
    /// elements apart. Default 0.
    pub label_share: f64,
    /// Probability that one of an element's attributes goes before its text. Default 1.
    pub attribute_probability: f64,
    /// Most words of a text. Default 40.
    pub max_words: usize,
    /// Most tokens of a text, special tokens included. Default 40.
    pub max_tokens: usize,
    /// Whether `[SEP]` ends texts (generation rows always have it). Default false.
    pub append_sep: bool,
    /// Whether texts are tokens of the vocabulary already, with single spaces between them: they are looked up as they are.
    /// Default false.
    pub tokenized: bool,
    /// Whether those of the region stream are; if left out, as `tokenized` says. (The original's 16M configuration has tokens in
    /// one stream alone.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regions_tokenized: Option<bool>,
    /// Blanks for masked language modelling.
    pub masking: MaskingGenerator,
    /// The part that the image stream sees of an image. Null: all of it, always. Default [`RandomResizedCrop::pretraining`].
    pub crop: Option<RandomResizedCrop>,
    /// What changes the pictures of the image stream. Null: nothing. Default [`RandAugment::pretraining`].
    pub augment: Option<RandAugment>,
    /// What changes those of the region stream; it must leave things where they are. Null: nothing. Default
    /// [`RandAugment::boxes`].
    pub region_augment: Option<RandAugment>,
    /// Whether region batches see a random part of each image. Default true.
    pub random_crop: bool,
    /// Elements of which no more than this share of the area is in that part are left out.
    /// Default 0.5.
    pub min_perc_in_image: f64,
    /// Whether half of the images are mirrored. Default true.
    pub hflip: bool,
    /// Whether images whose texts say left or right are not mirrored. Default true.
    pub careful_hflip: bool,
    /// Which texts that are. Default `record`.
    pub hflip_texts: FlipTexts,
    /// Rows for a text decoder beside each caption batch. Default none.
    pub generation: Option<GenerationConfig>,
    /// Share of broken records past which the run stops. Default 0.01.
    pub max_bad_fraction: f64,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self {
            seed: 42,
            resolution: 224,
            final_stride: 32,
            batch_size: 128,
            max_images: 48,
            max_regions: 128,
            regions_per_image: 5,
            padding: Padding::Repeats,
            whole_image_text: true,
            label_share: 0.0,
            attribute_probability: 1.0,
            max_words: 40,
            max_tokens: 40,
            append_sep: false,
            tokenized: false,
            regions_tokenized: None,
            masking: MaskingGenerator::default(),
            crop: Some(RandomResizedCrop::pretraining()),
            augment: Some(RandAugment::pretraining()),
            region_augment: Some(RandAugment::boxes()),
            random_crop: true,
            min_perc_in_image: 0.5,
            hflip: true,
            careful_hflip: true,
            hflip_texts: FlipTexts::Record,
            generation: None,
            max_bad_fraction: 0.01,
        }
    }
}

impl BatchConfig {
    /// Patches along a side of the image.
    #[must_use]
    pub fn grid(&self) -> usize {
        self.resolution / self.final_stride.max(1)
    }

    pub(crate) fn transform(&self) -> Transform {
        let Self { crop, random_crop, hflip, careful_hflip, .. } = *self;
        Transform { crop, random_crop, hflip, careful_hflip }
    }

    /// Checks that every value makes sense.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] about the first that does not.
    pub fn check(&self) -> Result<(), DataError> {
        let wrong = |field, expected: &str, found: String| {
            let expected = expected.to_owned();
            Err(DataError::Config { field, expected, found })
        };
        for (field, value, least) in [
            ("resolution", self.resolution, 1),
            ("final_stride", self.final_stride, 1),
            ("batch_size", self.batch_size, 1),
            ("max_images", self.max_images, 1),
            ("max_regions", self.max_regions, 1),
            ("regions_per_image", self.regions_per_image, 1),
            ("max_words", self.max_words, 1),
            ("max_tokens", self.max_tokens, 2 + usize::from(self.append_sep)),
        ] {
            if value < least {
                return wrong(field, &format!("at least {least}"), value.to_string());
            }
        }
        if !self.resolution.is_multiple_of(self.final_stride) {
            let expected = format!("a multiple of final_stride, {}", self.final_stride);
            return wrong("resolution", &expected, self.resolution.to_string());
        }
        for (field, value) in [
            ("label_share", self.label_share),
            ("attribute_probability", self.attribute_probability),
            ("max_bad_fraction", self.max_bad_fraction),
            ("masking.mask_prob", self.masking.mask_prob),
            ("masking.skipgram_prb", self.masking.skipgram_prb),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return wrong(field, "a share from 0 to 1", value.to_string());
            }
        }
        check_views(self.crop.as_ref(), self.augment.as_ref(), self.region_augment.as_ref())?;
        if self.generation.as_ref().is_some_and(|generation| generation.prompt.trim().is_empty()) {
            return wrong("generation.prompt", "at least one word", "none".to_owned());
        }
        if !(0.0..1.0).contains(&self.min_perc_in_image) {
            let found = self.min_perc_in_image.to_string();
            return wrong("min_perc_in_image", "a share from 0 to less than 1", found);
        }
        Ok(())
    }
}

/// Checks what changes pictures.
pub(crate) fn check_views(
    crop: Option<&RandomResizedCrop>,
    augment: Option<&RandAugment>,
    region_augment: Option<&RandAugment>,
) -> Result<(), DataError> {
    let wrong = |field, expected: &str, found| Err(DataError::Config { field, expected: expected.to_owned(), found });
    crop.map_or(Ok(()), RandomResizedCrop::check)?;
    augment.map_or(Ok(()), RandAugment::check)?;
    region_augment.map_or(Ok(()), RandAugment::check)?;
    if region_augment.is_some_and(|augment| !augment.keeps_places()) {
        let expected = "operations that leave things where their boxes are";
        return wrong("region_augment", expected, format!("{:?}", region_augment.map(|augment| &augment.operations)));
    }
    Ok(())
}

/// What a region batch does when the `max_images` images it reads have more or fewer texts than `max_regions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// It is as large as it gets: images are read until `max_regions` texts are together, or `max_images` images.
    None,
    /// It has exactly `max_regions` texts: a random choice of those of `max_images` images, filled up by repeats of some of
    /// them. As X-VLM does; in the contrastive loss repeats weigh some pairs twice.
    #[default]
    Repeats,
    /// The same, but the contrastive loss leaves repeats out, and they are not drawn as negatives. The other losses keep
    /// them: there they only weigh some rows twice.
    Masked,
}

/// The texts that decide whether an image may be mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlipTexts {
    /// All of the record ([`Record::texts`](crate::Record::texts)), as in X-VLM (`left_or_right_in_caption`).
    #[default]
    Record,
    /// Those that are in the batch: no text becomes wrong, and more images are mirrored.
    Batch,
}

/// Which of a record's captions a decoder learns to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Always the first.
    #[default]
    First,
    /// Any of them.
    Random,
}

/// Rows for a text decoder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationConfig {
    /// What goes before a caption. Default `a picture of`.
    pub prompt: String,
    /// Most questions of each image; each makes one row more. Default 0.
    pub questions_per_image: usize,
    /// Which caption. Default the first.
    pub target: Target,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self { prompt: "a picture of".to_owned(), questions_per_image: 0, target: Target::First }
    }
}
