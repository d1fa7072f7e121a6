//! Phrases and the boxes they refer to (X-VLM `dataset/grounding_dataset.py`).

use rand_chacha::ChaCha8Rng;

use super::items::{ItemKind, Maker, name};
use super::pixels::{Shown, render};
use super::texts::{Text, TextBatch};
use crate::annotations::GroundingItem;
use crate::error::DataError;
use crate::records::ImageSource;
use crate::transform::clip_box;

/// A phrase and the box it refers to.
#[derive(Debug, Clone, PartialEq)]
pub struct Phrase {
    /// The image.
    pub image: ImageSource,
    /// The phrase.
    pub text: String,
    /// `(x, y, w, h)` in pixels of the image as stored.
    pub bbox: [f32; 4],
}

impl From<&GroundingItem> for Phrase {
    fn from(item: &GroundingItem) -> Self {
        Self { image: ImageSource::Path(item.image.clone()), text: item.text.clone(), bbox: item.bbox }
    }
}

/// Phrases with their boxes: for training in a random part of the image that holds all of the box, for evaluation in the
/// whole of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Grounding;

/// Phrases, each with its image.
#[derive(Debug, Clone, PartialEq)]
pub struct PhraseBatch {
    /// `[N·3·R·R]`, normalised.
    pub pixels: Vec<f32>,
    /// Number of phrases and of images, `N`.
    pub images: usize,
    /// `N` phrases.
    pub text: TextBatch,
    /// `[N]`: `(cx, cy, w, h)` in fractions of what is shown of the image.
    pub boxes: Vec<[f32; 4]>,
}

/// One phrase.
#[derive(Debug)]
pub struct PhraseSample {
    shown: Shown,
    text: Text,
    bbox: [f32; 4],
}

impl ItemKind for Grounding {
    type Item = Phrase;
    type Sample = PhraseSample;
    type Batch = PhraseBatch;

    fn sample(&self, item: &Phrase, maker: &Maker, rng: &mut ChaCha8Rng) -> Result<PhraseSample, DataError> {
        let (framer, name) = (&maker.framer, name(&item.image));
        let text = maker.texts.text(&item.text, rng)?;
        let outside = |width, height| DataError::BoxOutside {
            origin: name.clone(),
            field: "bbox".to_owned(),
            bbox: item.bbox,
            width,
            height,
        };
        let clipped = |(width, height)| clip_box(item.bbox, width, height).ok_or_else(|| outside(width, height));
        let (shown, view, bbox) = if maker.training {
            let opened = framer.parts(&item.image, &name)?;
            let bbox = clipped(opened.size())?;
            let mut view = framer.around(&opened, bbox, rng);
            view.flip = framer.transform.flip([item.text.as_str()], rng);
            (framer.show_parts(&opened, view, rng)?, view, bbox)
        } else {
            let (shown, view) = framer.as_is(&item.image, &name)?;
            (shown, view, clipped((view.crop.width, view.crop.height))?)
        };
        // A part that holds all of the box leaves all of it.
        let placed = view.place(bbox, 0.0).ok_or_else(|| outside(view.crop.width, view.crop.height))?;
        let bbox = placed.centered();
        Ok(PhraseSample { shown, text, bbox })
    }

    fn collate(&self, samples: Vec<PhraseSample>, maker: &Maker) -> PhraseBatch {
        PhraseBatch {
            pixels: render(samples.iter().map(|sample| &sample.shown), maker.framer.resolution),
            images: samples.len(),
            boxes: samples.iter().map(|sample| sample.bbox).collect(),
            text: maker.texts.collate(samples.into_iter().map(|sample| sample.text).collect()),
        }
    }
}
