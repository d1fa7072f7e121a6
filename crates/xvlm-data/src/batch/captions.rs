//! Whole images, each with a text: the image–text stream of pre-training.

use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::pixels::{Shown, render};
use super::texts::{GenerationBatch, Row, Text, TextBatch, TextMaker};
use super::{BatchBuilder, missing};
use crate::config::{FlipTexts, Target};
use crate::error::DataError;
use crate::records::Record;

/// Whole images, each with a text.
#[derive(Debug, Clone, PartialEq)]
pub struct CaptionBatch {
    /// `[N·3·R·R]`, normalised.
    pub pixels: Vec<f32>,
    /// Number of images, `N`.
    pub images: usize,
    /// `[N]`: where each image's record is, for messages.
    pub origins: Vec<String>,
    /// One text an image.
    pub text: TextBatch,
    /// Rows for a decoder, if asked for.
    pub generation: Option<GenerationBatch>,
}

/// One image of a caption batch.
#[derive(Debug)]
pub struct Captioned {
    pub(super) shown: Shown,
    pub(super) origin: String,
    pub(super) text: Text,
    /// Rows for a decoder.
    pub(super) rows: Vec<Row>,
}

impl CaptionBatch {
    /// `has_rows`: whether rows for a decoder were asked for.
    pub(super) fn new(samples: Vec<Captioned>, has_rows: bool, texts: &TextMaker, side: usize) -> Self {
        let generation = has_rows.then(|| {
            let rows = samples.iter().enumerate();
            let rows = rows.flat_map(|(i, sample)| sample.rows.iter().map(move |row| (i as u32, row)));
            texts.collate_rows(&rows.collect::<Vec<_>>())
        });
        Self {
            pixels: render(samples.iter().map(|sample| &sample.shown), side),
            images: samples.len(),
            origins: samples.iter().map(|sample| sample.origin.clone()).collect(),
            text: texts.collate(samples.into_iter().map(|sample| sample.text).collect()),
            generation,
        }
    }
}

impl BatchBuilder {
    /// Whole images with a caption each: `batch_size` records of a pass over all of them that is
    /// shuffled anew in each epoch.
    ///
    /// # Errors
    ///
    /// [`DataError::TooManyBroken`]; [`DataError::Config`] when no record has a caption.
    pub fn captions(&self, step: u64) -> Result<CaptionBatch, DataError> {
        let sample = |record: &Record, rng: &mut ChaCha8Rng, _: &[Captioned]| self.captioned(record, rng);
        let samples = self.draw(&self.captions, step, self.config.batch_size, |_| false, sample)?;
        Ok(CaptionBatch::new(samples, self.config.generation.is_some(), &self.texts(), self.config.resolution))
    }

    fn captioned(&self, record: &Record, rng: &mut ChaCha8Rng) -> Result<Captioned, DataError> {
        let texts = self.texts();
        let caption = record.captions.choose(rng).ok_or_else(|| missing(record, "a caption"))?;
        let text = texts.text(caption, rng)?;
        let (mut rows, mut said) = (Vec::new(), vec![caption]);
        if let Some(config) = &self.config.generation {
            let caption = match config.target {
                Target::First => record.captions.first(),
                Target::Random => record.captions.choose(rng),
            };
            let caption = caption.ok_or_else(|| missing(record, "a caption"))?;
            rows.push(texts.caption_row(&config.prompt, caption)?);
            said.push(caption);
            let questions = record.questions.choose_multiple(rng, config.questions_per_image);
            for (question, answer) in questions {
                rows.push(texts.answer_row(question, answer)?);
                said.extend([question, answer]);
            }
        }
        let said = said.into_iter().map(String::as_str);
        let framer = self.framer();
        let shown = match self.config.hflip_texts {
            FlipTexts::Record => framer.whole(&record.image, &record.origin, record.texts(), rng)?,
            FlipTexts::Batch => framer.whole(&record.image, &record.origin, said, rng)?,
        };
        Ok(Captioned { shown, origin: record.origin.to_string(), text, rows })
    }
}
