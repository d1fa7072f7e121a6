//! From host batches to tensors: the one place of this crate that knows a tensor library.
//!
//! What losses and samplers look at on the host anyway (labels, keys, indices) stays in vectors.

use candle_core::{Device, Result, Tensor};

use crate::batch::{
    CaptionBatch, GenerationBatch, ImageBatch, PhraseBatch, QuestionBatch, ReferenceBatch, RegionBatch, StatementBatch,
    TextBatch,
};

/// Texts on a device; see [`TextBatch`].
#[derive(Debug, Clone)]
pub struct TextTensors {
    /// `[B, T]` u32.
    pub ids: Tensor,
    /// `[B, T]` f32: 1 at tokens, 0 at padding.
    pub mask: Tensor,
    /// `[B, T]` u32: the texts with blanks.
    pub masked_ids: Tensor,
    /// `[K]` u32: where something is to be predicted, as `row · T + column`.
    pub masked_positions: Tensor,
    /// `[K]`: the original token there.
    pub masked_labels: Vec<i64>,
    /// `[B]`: equal for equal texts.
    pub keys: Vec<i64>,
}

/// Rows for a decoder on a device; see [`GenerationBatch`].
#[derive(Debug, Clone)]
pub struct GenerationTensors {
    /// `[B, T]` u32.
    pub ids: Tensor,
    /// `[B, T]` f32: 1 at tokens, 0 at padding.
    pub mask: Tensor,
    /// `[B·T]`: the token that should follow each position, or -100.
    pub labels: Vec<i64>,
    /// `[B]`: the image of each row.
    pub image_index: Vec<u32>,
}

/// Whole images with a text each on a device; see [`CaptionBatch`].
#[derive(Debug, Clone)]
pub struct CaptionTensors {
    /// `[N, 3, R, R]` f32.
    pub pixels: Tensor,
    /// `N` texts.
    pub text: TextTensors,
    /// Rows for a decoder.
    pub generation: Option<GenerationTensors>,
    /// `[N]`: where each record is, in words.
    pub origins: Vec<String>,
}

/// Images with texts of parts of them on a device; see [`RegionBatch`].
#[derive(Debug, Clone)]
pub struct RegionTensors {
    /// `[N, 3, R, R]` f32.
    pub pixels: Tensor,
    /// `B` texts.
    pub text: TextTensors,
    /// `[B]`: the image of each text.
    pub image_index: Vec<u32>,
    /// `[B, 4]` f32: `(cx, cy, w, h)` in fractions of the image.
    pub boxes: Tensor,
    /// `[B, 1+L]` f32 of 0 and 1.
    pub region_mask: Tensor,
    /// `[B]`: whether the text tells the whole image.
    pub is_image: Vec<bool>,
    /// `[B]`: 0 at rows that the contrastive loss leaves out, 1 at all others.
    pub row_weights: Vec<f32>,
    /// `[N]`: where each record is, in words.
    pub origins: Vec<String>,
}

/// Questions on a device; see [`QuestionBatch`].
#[derive(Debug, Clone)]
pub struct QuestionTensors {
    /// `[N, 3, R, R]` f32.
    pub pixels: Tensor,
    /// `Q` questions.
    pub questions: TextTensors,
    /// `[Q]`: the image of each.
    pub image_index: Vec<u32>,
    /// The answers of all questions.
    pub answers: Option<AnswerTensors>,
}

/// Answers on a device; see [`AnswerBatch`](crate::batch::AnswerBatch).
#[derive(Debug, Clone)]
pub struct AnswerTensors {
    /// `A` answers.
    pub text: TextTensors,
    /// `[A]`: the question of each.
    pub question_index: Vec<u32>,
    /// `[A]` f32: how much each counts.
    pub weights: Tensor,
}

/// Statements about two images each on a device; see [`StatementBatch`].
#[derive(Debug, Clone)]
pub struct StatementTensors {
    /// `[2·B, 3, R, R]` f32: the first images of all statements, then the second ones of all.
    pub pixels: Tensor,
    /// `B` statements.
    pub text: TextTensors,
    /// `[B]`: whether each is true.
    pub is_true: Vec<bool>,
}

/// Phrases with their boxes on a device; see [`PhraseBatch`].
#[derive(Debug, Clone)]
pub struct PhraseTensors {
    /// `[N, 3, R, R]` f32.
    pub pixels: Tensor,
    /// `N` phrases.
    pub text: TextTensors,
    /// `[N, 4]` f32: `(cx, cy, w, h)` in fractions of what is shown of the image.
    pub boxes: Tensor,
}

/// Images with reference captions on a device; see [`ReferenceBatch`].
#[derive(Debug, Clone)]
pub struct ReferenceTensors {
    /// `[N, 3, R, R]` f32.
    pub pixels: Tensor,
    /// `[N]`: the cleaned captions of each.
    pub references: Vec<Vec<String>>,
}

impl TextBatch {
    /// The batch on a device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_tensors(self, device: &Device) -> Result<TextTensors> {
        let shape = (self.rows, self.len);
        let count = self.masked_positions.len();
        Ok(TextTensors {
            ids: Tensor::from_vec(self.ids, shape, device)?,
            mask: Tensor::from_vec(self.mask, shape, device)?,
            masked_ids: Tensor::from_vec(self.masked_ids, shape, device)?,
            masked_positions: Tensor::from_vec(self.masked_positions, count, device)?,
            masked_labels: self.masked_labels,
            keys: self.keys,
        })
    }
}

impl GenerationBatch {
    /// The batch on a device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_tensors(self, device: &Device) -> Result<GenerationTensors> {
        let shape = (self.rows, self.len);
        Ok(GenerationTensors {
            ids: Tensor::from_vec(self.ids, shape, device)?,
            mask: Tensor::from_vec(self.mask, shape, device)?,
            labels: self.labels,
            image_index: self.image_index,
        })
    }
}

impl CaptionBatch {
    /// The batch on a device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_tensors(self, device: &Device) -> Result<CaptionTensors> {
        let generation = self.generation.map(|batch| batch.to_tensors(device));
        Ok(CaptionTensors {
            pixels: images(self.pixels, self.images, device)?,
            text: self.text.to_tensors(device)?,
            generation: generation.transpose()?,
            origins: self.origins,
        })
    }
}

impl RegionBatch {
    /// The batch on a device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_tensors(self, device: &Device) -> Result<RegionTensors> {
        let (rows, columns) = (self.text.rows, 1 + self.patches);
        Ok(RegionTensors {
            pixels: images(self.pixels, self.images, device)?,
            text: self.text.to_tensors(device)?,
            image_index: self.image_index,
            boxes: Tensor::from_vec(self.boxes.concat(), (rows, 4), device)?,
            region_mask: Tensor::from_vec(self.region_mask, (rows, columns), device)?,
            is_image: self.is_image,
            row_weights: self.row_weights,
            origins: self.origins,
        })
    }
}

impl QuestionBatch {
    /// The batch on a device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_tensors(self, device: &Device) -> Result<QuestionTensors> {
        let answers = self.answers.map(|answers| {
            let count = answers.weights.len();
            Ok::<_, candle_core::Error>(AnswerTensors {
                text: answers.text.to_tensors(device)?,
                question_index: answers.question_index,
                weights: Tensor::from_vec(answers.weights, count, device)?,
            })
        });
        Ok(QuestionTensors {
            pixels: images(self.pixels, self.images, device)?,
            questions: self.questions.to_tensors(device)?,
            image_index: self.image_index,
            answers: answers.transpose()?,
        })
    }
}

impl StatementBatch {
    /// The batch on a device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_tensors(self, device: &Device) -> Result<StatementTensors> {
        Ok(StatementTensors {
            pixels: images(self.pixels, 2 * self.is_true.len(), device)?,
            text: self.text.to_tensors(device)?,
            is_true: self.is_true,
        })
    }
}

impl PhraseBatch {
    /// The batch on a device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_tensors(self, device: &Device) -> Result<PhraseTensors> {
        Ok(PhraseTensors {
            pixels: images(self.pixels, self.images, device)?,
            text: self.text.to_tensors(device)?,
            boxes: Tensor::from_vec(self.boxes.concat(), (self.images, 4), device)?,
        })
    }
}

impl ReferenceBatch {
    /// The batch on a device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_tensors(self, device: &Device) -> Result<ReferenceTensors> {
        Ok(ReferenceTensors { pixels: images(self.pixels, self.images, device)?, references: self.references })
    }
}

impl ImageBatch {
    /// `[N, 3, R, R]` f32 on a device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_tensors(self, device: &Device) -> Result<Tensor> {
        images(self.pixels, self.images, device)
    }
}

impl TextTensors {
    /// The same on another device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Self {
            ids: self.ids.to_device(device)?,
            mask: self.mask.to_device(device)?,
            masked_ids: self.masked_ids.to_device(device)?,
            masked_positions: self.masked_positions.to_device(device)?,
            ..self
        })
    }
}

impl GenerationTensors {
    /// The same on another device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Self { ids: self.ids.to_device(device)?, mask: self.mask.to_device(device)?, ..self })
    }
}

impl CaptionTensors {
    /// The same on another device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Self {
            pixels: self.pixels.to_device(device)?,
            text: self.text.to_device(device)?,
            generation: self.generation.map(|batch| batch.to_device(device)).transpose()?,
            ..self
        })
    }
}

impl RegionTensors {
    /// The same on another device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Self {
            pixels: self.pixels.to_device(device)?,
            text: self.text.to_device(device)?,
            boxes: self.boxes.to_device(device)?,
            region_mask: self.region_mask.to_device(device)?,
            ..self
        })
    }
}

impl AnswerTensors {
    /// The same on another device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Self { text: self.text.to_device(device)?, weights: self.weights.to_device(device)?, ..self })
    }
}

impl QuestionTensors {
    /// The same on another device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Self {
            pixels: self.pixels.to_device(device)?,
            questions: self.questions.to_device(device)?,
            answers: self.answers.map(|answers| answers.to_device(device)).transpose()?,
            ..self
        })
    }
}

impl StatementTensors {
    /// The same on another device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Self { pixels: self.pixels.to_device(device)?, text: self.text.to_device(device)?, ..self })
    }
}

impl PhraseTensors {
    /// The same on another device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Self {
            pixels: self.pixels.to_device(device)?,
            text: self.text.to_device(device)?,
            boxes: self.boxes.to_device(device)?,
        })
    }
}

impl ReferenceTensors {
    /// The same on another device.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Self { pixels: self.pixels.to_device(device)?, ..self })
    }
}

/// `[N·3·R·R]` as `[N, 3, R, R]`.
fn images(pixels: Vec<f32>, count: usize, device: &Device) -> Result<Tensor> {
    let side = (pixels.len() / (3 * count.max(1))).isqrt();
    Tensor::from_vec(pixels, (count, 3, side, side), device)
}
