//! Statements about two images (X-VLM `dataset/nlvr_dataset.py`).

use rand_chacha::ChaCha8Rng;

use super::items::{ItemKind, Maker};
use super::pixels::{Shown, render};
use super::texts::{Text, TextBatch};
use crate::annotations::NlvrItem;
use crate::error::DataError;
use crate::records::ImageSource;

/// A statement about two images.
#[derive(Debug, Clone, PartialEq)]
pub struct Statement {
    /// The left image and the right one.
    pub images: [ImageSource; 2],
    /// The statement.
    pub text: String,
    /// Whether it is true.
    pub is_true: bool,
}

impl From<&NlvrItem> for Statement {
    fn from(item: &NlvrItem) -> Self {
        Self { images: item.images.clone().map(ImageSource::Path), text: item.sentence.clone(), is_true: item.label }
    }
}

/// Statements about two images each.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nlvr;

/// Statements, each with two images.
#[derive(Debug, Clone, PartialEq)]
pub struct StatementBatch {
    /// `[2·B·3·R·R]`, normalised: the first images of all statements, then the second ones of all.
    pub pixels: Vec<f32>,
    /// `B` statements.
    pub text: TextBatch,
    /// `[B]`: whether each is true.
    pub is_true: Vec<bool>,
}

/// One statement.
#[derive(Debug)]
pub struct StatementSample {
    shown: [Shown; 2],
    text: Text,
    is_true: bool,
}

impl ItemKind for Nlvr {
    type Item = Statement;
    type Sample = StatementSample;
    type Batch = StatementBatch;

    fn sample(&self, item: &Statement, maker: &Maker, rng: &mut ChaCha8Rng) -> Result<StatementSample, DataError> {
        let [first, second] = &item.images;
        let text = maker.texts.text(&item.text, rng)?;
        let mut show = |source| maker.whole(source, [item.text.as_str()], rng);
        Ok(StatementSample { shown: [show(first)?, show(second)?], text, is_true: item.is_true })
    }

    fn collate(&self, samples: Vec<StatementSample>, maker: &Maker) -> StatementBatch {
        let side = maker.framer.resolution;
        let images = |i: usize| render(samples.iter().map(|sample| &sample.shown[i]), side);
        let pixels = [images(0), images(1)].concat();
        let is_true = samples.iter().map(|sample| sample.is_true).collect();
        let text = maker.texts.collate(samples.into_iter().map(|sample| sample.text).collect());
        StatementBatch { pixels, text, is_true }
    }
}
