//! Images with captions, for retrieval and captioning (X-VLM `dataset/re_dataset.py`, `dataset/coco_karpathy_dataset.py`), and
//! images alone.

use rand::seq::index;
use rand_chacha::ChaCha8Rng;

use super::captions::{CaptionBatch, Captioned};
use super::items::{ItemKind, Maker, name};
use super::pixels::{Shown, render};
use crate::annotations::{CaptionItem, RetrievalItem};
use crate::error::DataError;
use crate::records::ImageSource;
use crate::tokens::{hash_bytes, pre_caption};

/// An image with one of its captions.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageText {
    /// The image.
    pub image: ImageSource,
    /// The image's identifier: texts of the same image belong together.
    pub image_id: String,
    /// The caption.
    pub text: String,
}

impl ImageText {
    /// One for each caption of an image.
    pub fn of_retrieval(item: &RetrievalItem) -> impl Iterator<Item = Self> {
        of_image(&item.image, &item.image_id, &item.captions)
    }

    /// One for each caption of an image.
    pub fn of_captions(item: &CaptionItem) -> impl Iterator<Item = Self> {
        of_image(&item.image, &item.id, &item.captions)
    }
}

fn of_image(image: &std::path::Path, id: &str, captions: &[String]) -> impl Iterator<Item = ImageText> {
    captions.iter().map(move |text| ImageText {
        image: ImageSource::Path(image.to_owned()),
        image_id: id.to_owned(),
        text: text.clone(),
    })
}

/// Images, each with a caption; [`TextBatch::keys`](super::TextBatch::keys) are equal for texts of the same image.
#[derive(Debug, Clone, Default)]
pub struct Pairs {
    /// For captioning: what goes before each caption in the rows for a decoder, such as `a picture of`.
    pub prompt: Option<String>,
}

impl ItemKind for Pairs {
    type Item = ImageText;
    type Sample = Captioned;
    type Batch = CaptionBatch;

    fn sample(&self, item: &ImageText, maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Captioned, DataError> {
        let shown = maker.whole(&item.image, [item.text.as_str()], rng)?;
        let mut text = maker.texts.text(&item.text, rng)?;
        text.key = hash_bytes(item.image_id.as_bytes()).cast_signed();
        let rows = self.prompt.iter().map(|prompt| maker.texts.caption_row(prompt, &item.text));
        Ok(Captioned { shown, origin: name(&item.image), text, rows: rows.collect::<Result<_, _>>()? })
    }

    fn collate(&self, samples: Vec<Captioned>, maker: &Maker) -> CaptionBatch {
        CaptionBatch::new(samples, self.prompt.is_some(), &maker.texts, maker.framer.resolution)
    }
}

/// An image with all of its captions.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    /// The image.
    pub image: ImageSource,
    /// Its captions, at least one.
    pub captions: Vec<String>,
}

impl From<&CaptionItem> for Described {
    fn from(item: &CaptionItem) -> Self {
        Self { image: ImageSource::Path(item.image.clone()), captions: item.captions.clone() }
    }
}

/// Images with reference captions, for self-critical training (`coco_karpathy_train_scst`).
#[derive(Debug, Clone, Copy)]
pub struct References {
    /// Most references of an image; of more, some are drawn.
    pub most: usize,
}

impl Default for References {
    /// Five, as X-VLM does; COCO has as many for nearly every image.
    fn default() -> Self {
        Self { most: 5 }
    }
}

/// Images with reference captions.
#[derive(Debug, Clone, PartialEq)]
pub struct ReferenceBatch {
    /// `[N·3·R·R]`, normalised.
    pub pixels: Vec<f32>,
    /// Number of images, `N`.
    pub images: usize,
    /// `[N]`: the cleaned captions of each.
    pub references: Vec<Vec<String>>,
}

/// One image with its references.
#[derive(Debug)]
pub struct ReferenceSample {
    shown: Shown,
    references: Vec<String>,
}

impl ItemKind for References {
    type Item = Described;
    type Sample = ReferenceSample;
    type Batch = ReferenceBatch;

    fn sample(&self, item: &Described, maker: &Maker, rng: &mut ChaCha8Rng) -> Result<ReferenceSample, DataError> {
        let shown = maker.whole(&item.image, item.captions.iter().map(String::as_str), rng)?;
        let count = item.captions.len();
        let drawn = index::sample(rng, count, self.most.min(count)).into_iter();
        let references: Vec<String> =
            drawn.map(|i| pre_caption(&item.captions[i], maker.texts.max_words)).collect::<Result<_, _>>()?;
        if references.is_empty() {
            return Err(DataError::MissingText { origin: name(&item.image), expected: "a caption" });
        }
        Ok(ReferenceSample { shown, references })
    }

    fn collate(&self, samples: Vec<ReferenceSample>, maker: &Maker) -> ReferenceBatch {
        ReferenceBatch {
            pixels: render(samples.iter().map(|sample| &sample.shown), maker.framer.resolution),
            images: samples.len(),
            references: samples.into_iter().map(|sample| sample.references).collect(),
        }
    }
}

/// Images alone, for evaluation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Images;

/// Images alone.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageBatch {
    /// `[N·3·R·R]`, normalised.
    pub pixels: Vec<f32>,
    /// Number of images, `N`.
    pub images: usize,
}

impl ItemKind for Images {
    type Item = ImageSource;
    type Sample = Shown;
    type Batch = ImageBatch;

    fn sample(&self, item: &ImageSource, maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Shown, DataError> {
        maker.whole(item, [], rng)
    }

    fn collate(&self, samples: Vec<Shown>, maker: &Maker) -> ImageBatch {
        ImageBatch { pixels: render(samples.iter(), maker.framer.resolution), images: samples.len() }
    }
}
