//! Questions about images, with weighted answers for training (X-VLM `dataset/vqa_dataset.py`).

use std::collections::HashMap;
use std::path::Path;

use rand_chacha::ChaCha8Rng;

use super::items::{ItemKind, Maker};
use super::pixels::{Shown, render};
use super::texts::{Text, TextBatch};
use crate::annotations::VqaItem;
use crate::error::DataError;
use crate::records::ImageSource;

/// A question with its answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// The question.
    pub question: String,
    /// Its answers with their weights; empty where nobody knows them.
    pub answers: Vec<(String, f32)>,
}

impl From<&VqaItem> for Question {
    fn from(item: &VqaItem) -> Self {
        let answers = item.weighted_answers().into_iter().map(|(answer, weight)| (answer.to_owned(), weight)).collect();
        Self { question: item.question.clone(), answers }
    }
}

/// An image and what is asked about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// The image.
    pub image: ImageSource,
    /// The questions, at least one.
    pub questions: Vec<Question>,
}

impl Asked {
    /// Questions of a list, put together by image, at most `most` of them: with 1 each has an image of its own, as in the
    /// original; with more, one look at an image serves several.
    #[must_use]
    pub fn by_image(items: &[VqaItem], most: usize) -> Vec<Self> {
        let mut asked: Vec<Self> = Vec::new();
        let mut places: HashMap<&Path, usize> = HashMap::new();
        for item in items {
            match places.get(item.image.as_path()) {
                Some(&place) if asked[place].questions.len() < most => asked[place].questions.push(item.into()),
                _ => {
                    places.insert(&item.image, asked.len());
                    let image = ImageSource::Path(item.image.clone());
                    asked.push(Self { image, questions: vec![item.into()] });
                }
            }
        }
        asked
    }
}

/// Images with questions and their answers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Vqa;

/// Questions about images.
#[derive(Debug, Clone, PartialEq)]
pub struct QuestionBatch {
    /// `[N·3·R·R]`, normalised.
    pub pixels: Vec<f32>,
    /// Number of images, `N`.
    pub images: usize,
    /// `[CLS] question`, `Q` of them.
    pub questions: TextBatch,
    /// `[Q]`: the image of each.
    pub image_index: Vec<u32>,
    /// The answers of all questions; none if no question has any.
    pub answers: Option<AnswerBatch>,
}

/// The answers of all questions of a batch, one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerBatch {
    /// `[CLS] answer [SEP]`, `A` of them.
    pub text: TextBatch,
    /// `[A]`: the question of each.
    pub question_index: Vec<u32>,
    /// `[A]`: how much each counts.
    pub weights: Vec<f32>,
    /// `[Q]`: how many each question has.
    pub counts: Vec<usize>,
}

/// One image with its questions.
#[derive(Debug)]
pub struct QuestionSample {
    shown: Shown,
    questions: Vec<(Text, Vec<(Text, f32)>)>,
}

impl ItemKind for Vqa {
    type Item = Asked;
    type Sample = QuestionSample;
    type Batch = QuestionBatch;

    fn sample(&self, item: &Asked, maker: &Maker, rng: &mut ChaCha8Rng) -> Result<QuestionSample, DataError> {
        if maker.training && item.questions.iter().any(|question| question.answers.is_empty()) {
            let origin = super::items::name(&item.image);
            return Err(DataError::MissingText { origin, expected: "an answer" });
        }
        let said = item.questions.iter().flat_map(|Question { question, answers }| {
            answers.iter().map(|(answer, _)| answer.as_str()).chain([question.as_str()])
        });
        let shown = maker.whole(&item.image, said, rng)?;
        let mut tokenise = |Question { question, answers }: &Question| {
            let question = maker.texts.question(question, rng)?;
            let answers = answers.iter().filter(|_| maker.training);
            let answers = answers.map(|(answer, weight)| Ok((maker.texts.answer(answer, rng)?, *weight)));
            Ok((question, answers.collect::<Result<_, DataError>>()?))
        };
        let questions = item.questions.iter().map(&mut tokenise).collect::<Result<_, DataError>>()?;
        Ok(QuestionSample { shown, questions })
    }

    fn collate(&self, samples: Vec<QuestionSample>, maker: &Maker) -> QuestionBatch {
        let pixels = render(samples.iter().map(|sample| &sample.shown), maker.framer.resolution);
        let images = samples.len();
        let (mut questions, mut image_index, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        let (mut answers, mut weights) = (Vec::new(), Vec::new());
        for (image, sample) in (0u32..).zip(samples) {
            for (question, own) in sample.questions {
                questions.push(question);
                image_index.push(image);
                counts.push(own.len());
                for (answer, weight) in own {
                    answers.push(answer);
                    weights.push(weight);
                }
            }
        }
        let question_index = (0u32..).zip(&counts).flat_map(|(i, &count)| std::iter::repeat_n(i, count)).collect();
        let answers = (!answers.is_empty()).then(|| AnswerBatch {
            text: maker.texts.collate(answers),
            question_index,
            weights,
            counts,
        });
        QuestionBatch { pixels, images, questions: maker.texts.collate(questions), image_index, answers }
    }
}
