//! Questions about images, with weighted answers for training (X-VLM `dataset/vqa_dataset.py`).

use rand_chacha::ChaCha8Rng;

use super::items::{ItemKind, Maker};
use super::pixels::{Shown, render};
use super::texts::{Text, TextBatch};
use crate::annotations::VqaItem;
use crate::error::DataError;
use crate::records::ImageSource;

/// A question about an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// The image.
    pub image: ImageSource,
    /// The question.
    pub question: String,
    /// Its answers with their weights; empty where nobody knows them.
    pub answers: Vec<(String, f32)>,
}

impl From<&VqaItem> for Question {
    fn from(item: &VqaItem) -> Self {
        let answers = item.weighted_answers().into_iter().map(|(answer, weight)| (answer.to_owned(), weight)).collect();
        Self { image: ImageSource::Path(item.image.clone()), question: item.question.clone(), answers }
    }
}

/// Questions with their answers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Vqa;

/// Questions, each with its image.
#[derive(Debug, Clone, PartialEq)]
pub struct QuestionBatch {
    /// `[N·3·R·R]`, normalised.
    pub pixels: Vec<f32>,
    /// Number of questions and of images, `N`.
    pub images: usize,
    /// `[CLS] question`, `N` of them.
    pub questions: TextBatch,
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
    /// `[N]`: how many each question has.
    pub counts: Vec<usize>,
}

/// One question.
#[derive(Debug)]
pub struct QuestionSample {
    shown: Shown,
    question: Text,
    answers: Vec<(Text, f32)>,
}

impl ItemKind for Vqa {
    type Item = Question;
    type Sample = QuestionSample;
    type Batch = QuestionBatch;

    fn sample(&self, item: &Question, maker: &Maker, rng: &mut ChaCha8Rng) -> Result<QuestionSample, DataError> {
        if maker.training && item.answers.is_empty() {
            let origin = super::items::name(&item.image);
            return Err(DataError::MissingText { origin, expected: "an answer" });
        }
        let said = item.answers.iter().map(|(answer, _)| answer.as_str()).chain([item.question.as_str()]);
        let shown = maker.whole(&item.image, said, rng)?;
        let question = maker.texts.question(&item.question, rng)?;
        let answers = item.answers.iter().filter(|_| maker.training);
        let answers = answers.map(|(answer, weight)| Ok((maker.texts.answer(answer, rng)?, *weight)));
        Ok(QuestionSample { shown, question, answers: answers.collect::<Result<_, DataError>>()? })
    }

    fn collate(&self, samples: Vec<QuestionSample>, maker: &Maker) -> QuestionBatch {
        let pixels = render(samples.iter().map(|sample| &sample.shown), maker.framer.resolution);
        let images = samples.len();
        let counts: Vec<usize> = samples.iter().map(|sample| sample.answers.len()).collect();
        let (mut questions, mut answers, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for sample in samples {
            questions.push(sample.question);
            for (answer, weight) in sample.answers {
                answers.push(answer);
                weights.push(weight);
            }
        }
        let question_index = (0u32..).zip(&counts).flat_map(|(i, &count)| std::iter::repeat_n(i, count)).collect();
        let answers = (!answers.is_empty()).then(|| AnswerBatch {
            text: maker.texts.collate(answers),
            question_index,
            weights,
            counts,
        });
        QuestionBatch { pixels, images, questions: maker.texts.collate(questions), answers }
    }
}
