//! What an item of each task is.

use std::path::PathBuf;

/// A phrase and the box it refers to.
#[derive(Debug, Clone, PartialEq)]
pub struct GroundingItem {
    /// The phrase's identifier; phrases of one object share it.
    pub ref_id: String,
    /// The image file.
    pub image: PathBuf,
    /// The image's identifier.
    pub image_id: String,
    /// Number of the image, counted from 0 in the order in which images come first.
    pub image_index: u32,
    /// The phrase.
    pub text: String,
    /// `(x, y, w, h)` in pixels.
    pub bbox: [f32; 4],
    /// The image's height in pixels.
    pub height: u32,
    /// The image's width in pixels.
    pub width: u32,
    /// The split (`train`, `val`, `testA`, `testB`, `test`), where the file tells it.
    pub split: Option<String>,
    /// Boxes `(x, y, w, h)` among which to choose (VLUE's `dets`), where the file has them.
    pub proposals: Vec<[f32; 4]>,
}

/// An image and the captions that should find it.
#[derive(Debug, Clone, PartialEq)]
pub struct RetrievalItem {
    /// The image file.
    pub image: PathBuf,
    /// The image's identifier.
    pub image_id: String,
    /// Number of the image, counted from 0 in the order in which images come first.
    pub image_index: u32,
    /// Its captions, at least one.
    pub captions: Vec<String>,
    /// The split (`train`, `val`, `test`, …), where the file tells it.
    pub split: Option<String>,
}

/// A text with blanks about an image, and what fits.
#[derive(Debug, Clone, PartialEq)]
pub struct FillItem {
    /// The image file.
    pub image: PathBuf,
    /// The text, with its blanks as written.
    pub text: String,
    /// The answers that count as right, at least one.
    pub answers: Vec<String>,
    /// What is asked for (such as `colour`), to break scores down by.
    pub kind: String,
}

/// Which data set a question is of: that says where its image is, and what its answers weigh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum VqaSource {
    /// VQA v2: ten people's answers.
    #[default]
    Vqa,
    /// Visual Genome: one answer.
    VisualGenome,
    /// GQA.
    Gqa,
}

/// A question about an image.
#[derive(Debug, Clone, PartialEq)]
pub struct VqaItem {
    /// The question's identifier.
    pub question_id: String,
    /// The image file.
    pub image: PathBuf,
    /// The question.
    pub question: String,
    /// The answers people gave, as often as they gave them; empty where the file has none (test sets).
    pub answers: Vec<String>,
    /// What is asked for (such as `count`; of VQA v2 the `answer_type`), to break scores down by.
    pub kind: String,
    /// How the question begins (VQA v2's `question_type`), to break scores down by; empty where the file does not tell.
    pub question_type: String,
    /// The data set.
    pub source: VqaSource,
}

impl VqaItem {
    /// The different answers, in the order they come first, and what each weighs in training (`dataset/vqa_dataset.py`): the
    /// share of people who gave it; an answer of Visual Genome 0.5.
    #[must_use]
    pub fn weighted_answers(&self) -> Vec<(&str, f32)> {
        const VISUAL_GENOME: f32 = 0.5;
        let each = match self.source {
            VqaSource::VisualGenome => VISUAL_GENOME,
            VqaSource::Vqa | VqaSource::Gqa => 1.0 / self.answers.len() as f32,
        };
        let mut weighted: Vec<(&str, f32)> = Vec::new();
        for answer in &self.answers {
            match weighted.iter_mut().find(|(known, _)| known == answer) {
                Some((_, weight)) => *weight += each,
                None => weighted.push((answer, each)),
            }
        }
        weighted
    }
}

/// Two images and a sentence that tells both of them, or does not.
#[derive(Debug, Clone, PartialEq)]
pub struct NlvrItem {
    /// The identifier; of a list without identifiers, the item's number.
    pub id: String,
    /// The image files, left and right.
    pub images: [PathBuf; 2],
    /// The sentence.
    pub sentence: String,
    /// Whether it is true.
    pub label: bool,
}

/// An image and reference captions.
#[derive(Debug, Clone, PartialEq)]
pub struct CaptionItem {
    /// The image's identifier.
    pub id: String,
    /// The image file.
    pub image: PathBuf,
    /// Number of the image, counted from 0 in the order in which images come first.
    pub image_index: u32,
    /// The split (`train`, `val`, `test`, …), where the file tells it.
    pub split: Option<String>,
    /// Reference captions; empty where the file has none.
    pub captions: Vec<String>,
}

impl CaptionItem {
    /// Items of one image made into one, with the captions of all: what training on rewards compares with.
    #[must_use]
    pub fn by_image(items: Vec<Self>) -> Vec<Self> {
        let mut merged: Vec<Self> = Vec::new();
        let mut places = std::collections::HashMap::new();
        for item in items {
            match places.get(&item.image_index) {
                Some(&place) => {
                    let known: &mut Self = &mut merged[place];
                    known.captions.extend(item.captions);
                }
                None => {
                    places.insert(item.image_index, merged.len());
                    merged.push(item);
                }
            }
        }
        merged
    }
}
