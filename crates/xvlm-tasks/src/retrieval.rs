//! Image–text retrieval: the dual encoder proposes, matching re-ranks (§4.2 of the paper).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::Tensor;
use xvlm_data::annotations::{RetrievalItem, read_retrieval};
use xvlm_data::{Picture, TextTensors};
use xvlm_encoders::{Pass, Xvlm};
use xvlm_metrics::retrieval::{RetrievalScores, recalls};
use xvlm_train::Losses;

use crate::align::{Alignment, Looks, Negatives};
use crate::config::Objective;
use crate::error::TaskError;
use crate::model::{ImageTokens, Model};
use crate::{BATCH, Counter, some};

/// Score of a pair that the dual encoder did not propose (as in the original's `evaluation`).
const NOT_PROPOSED: f32 = -100.0;

/// The losses of fine-tuning (`models/model_retrieval.py`): ITC and ITM of each image with its text. Texts of equal key are
/// about the same image.
///
/// # Errors
/// If a tensor operation fails, or the model has no heads for it.
pub fn losses(
    model: &Xvlm,
    images: &ImageTokens,
    texts: &TextTensors,
    pass: &Pass,
    negatives: Negatives,
) -> candle_core::Result<Losses> {
    let objectives = [Objective::Itc, Objective::Itm];
    let looks = Looks::whole(&images.0)?;
    Ok(Losses(Alignment { model, objectives: &objectives, pass }.losses(texts, Some(looks), None, negatives)?))
}

/// Retrieval over a data set: the scores, and the tables they come from.
pub struct Evaluation {
    /// The images with their captions.
    pub items: Vec<RetrievalItem>,
    /// For each image its row of scores over all captions, in the order of the items.
    pub image_to_text: Vec<f32>,
    /// For each caption its row of scores over all images.
    pub text_to_image: Vec<f32>,
    /// Recalls both ways.
    pub scores: RetrievalScores,
}

/// Evaluates on `retrieval.json` of a folder; matching re-ranks the `k_test` best of the dual encoder, both ways.
///
/// # Errors
/// If the file or an image cannot be read.
pub fn evaluate(model: &Model, data: &Path, k_test: usize, counter: Counter) -> Result<Evaluation, TaskError> {
    let items = some(read_retrieval(data.join("retrieval.json"))?, data, "retrieval.json")?;
    let mut tokens = Vec::new();
    for items in items.chunks(BATCH) {
        let pictures = items.iter().map(|item| Picture::open(&item.image)).collect::<Result<Vec<_>, _>>()?;
        tokens.push(model.encode(&pictures)?.0);
    }
    let images = ImageTokens(Tensor::cat(&tokens, 0)?);
    let texts: Vec<&str> = items.iter().flat_map(|item| item.captions.iter().map(String::as_str)).collect();
    let image_of_text: Vec<usize> =
        items.iter().enumerate().flat_map(|(image, item)| item.captions.iter().map(move |_| image)).collect();
    let similarities = model.embed_images(&images)?.matmul(&model.embed_texts(&texts)?.t()?)?;
    let (n, m) = (items.len(), texts.len());
    let mut proposed = BTreeSet::new();
    let texts_of_image = propose(&similarities, k_test)?;
    let images_of_text = propose(&similarities.t()?, k_test)?;
    for (image, texts) in texts_of_image.iter().enumerate() {
        proposed.extend(texts.iter().map(|&text| (image, text)));
    }
    for (text, images) in images_of_text.iter().enumerate() {
        proposed.extend(images.iter().map(|&image| (image, text)));
    }

    let pairs: Vec<(u32, &str)> = proposed.iter().map(|&(image, text)| (image as u32, texts[text])).collect();
    let mut scores = Vec::with_capacity(pairs.len());
    for chunk in pairs.chunks(4 * BATCH) {
        scores.extend(model.match_scores(&images, chunk)?);
        counter(scores.len(), pairs.len());
    }
    let scores: BTreeMap<(usize, usize), f32> = proposed.into_iter().zip(scores).collect();
    let mut image_to_text = vec![NOT_PROPOSED; n * m];
    for (image, texts) in texts_of_image.iter().enumerate() {
        texts.iter().for_each(|&text| image_to_text[image * m + text] = scores[&(image, text)]);
    }
    let mut text_to_image = vec![NOT_PROPOSED; n * m];
    for (text, images) in images_of_text.iter().enumerate() {
        images.iter().for_each(|&image| text_to_image[text * n + image] = scores[&(image, text)]);
    }
    let scores = recalls(&image_to_text, &text_to_image, &image_of_text)?;
    Ok(Evaluation { items, image_to_text, text_to_image, scores })
}

/// For each row of similarities the indices of its `k` largest numbers, best first.
fn propose(similarities: &Tensor, k: usize) -> Result<Vec<Vec<usize>>, TaskError> {
    let best = |row: Vec<f32>| {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        order.truncate(k);
        order
    };
    Ok(similarities.to_vec2::<f32>()?.into_iter().map(best).collect())
}
