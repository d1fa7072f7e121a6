//! Image–text retrieval: the dual encoder proposes, matching re-ranks (§4.2 of the paper).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use xvlm_data::annotations::{RetrievalItem, read_retrieval};
use xvlm_data::{Picture, TextTensors};
use xvlm_encoders::{Attention, Pass, Xvlm};
use xvlm_metrics::retrieval::{RetrievalScores, recalls};
use xvlm_train::Losses;
use xvlm_train::ranks::Communicator;

use crate::align::{Alignment, Negatives};
use crate::config::{ItcGradient, Objective};
use crate::error::TaskError;
use crate::generate::Source;
use crate::model::{ImageTokens, Model, Texts};
use crate::{BATCH, Counter, some};

/// Score of a pair that the dual encoder did not propose (as in the original's `evaluation`).
const NOT_PROPOSED: f32 = -100.0;

/// The losses of fine-tuning (`models/model_retrieval.py`): ITC and ITM of each image with its text. Texts of equal key are
/// about the same image. Where several `ranks` train together, ITC compares the samples of all.
///
/// # Errors
/// If a tensor operation fails, or the model has no heads for it.
pub fn losses(
    model: &Xvlm,
    images: &ImageTokens,
    texts: &TextTensors,
    pass: &Pass,
    negatives: Negatives,
    ranks: Option<(&Arc<dyn Communicator>, ItcGradient)>,
) -> candle_core::Result<Losses> {
    let objectives = [Objective::Itc, Objective::Itm];
    let alignment = Alignment { model, objectives: &objectives, pass, weights: None, ranks };
    Ok(Losses(alignment.losses(texts, Some(&Source::images(images)?), None, negatives)?))
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
    let Scores { image_to_text, text_to_image, .. } =
        score(model.xvlm(), &images, &model.tokenise(&texts)?, k_test, counter)?;
    let scores = recalls(&image_to_text, &text_to_image, &image_of_text)?;
    Ok(Evaluation { items, image_to_text, text_to_image, scores })
}

/// Scores of `N` images with `M` texts.
pub struct Scores {
    /// Cosines of the dual encoder `[N, M]`.
    pub similarities: Tensor,
    /// For each image its row of matching logits over all texts; −100 where the dual encoder did not propose the text.
    pub image_to_text: Vec<f32>,
    /// For each text its row over all images.
    pub text_to_image: Vec<f32>,
}

/// Compares all images with all texts by the dual encoder, and the `k_test` best of each row and column by matching (the
/// original's `evaluation`).
///
/// # Errors
/// If a tensor operation fails, or the model has no heads for it.
pub fn score(
    model: &Xvlm,
    images: &ImageTokens,
    texts: &Texts,
    k_test: usize,
    counter: Counter,
) -> candle_core::Result<Scores> {
    let pass = Pass::inference();
    let m = texts.ids.dim(0)?;
    let mut states = Vec::new();
    for start in (0..m).step_by(BATCH) {
        let rows = |x: &Tensor| x.narrow(0, start, BATCH.min(m - start));
        states.push(model.encode_text(&rows(&texts.ids)?, &rows(&texts.mask)?, Attention::Full, &pass)?);
    }
    let (states, n) = (Tensor::cat(&states, 0)?, images.len());
    let similarities = model.project_image(&images.0)?.matmul(&model.project_text(&states)?.t()?)?;
    let texts_of_image = propose(&similarities, k_test)?;
    let images_of_text = propose(&similarities.t()?, k_test)?;
    let mut proposed = BTreeSet::new();
    for (image, texts) in texts_of_image.iter().enumerate() {
        proposed.extend(texts.iter().map(|&text| (image as u32, text as u32)));
    }
    for (text, images) in images_of_text.iter().enumerate() {
        proposed.extend(images.iter().map(|&image| (image as u32, text as u32)));
    }

    let pairs: Vec<(u32, u32)> = proposed.into_iter().collect();
    let source = Source::images(images)?;
    let mut scores = BTreeMap::new();
    for chunk in pairs.chunks(4 * BATCH) {
        let (index, rows): (Vec<u32>, Vec<u32>) = chunk.iter().copied().unzip();
        let rows = Tensor::new(rows, states.device())?;
        let (text, mask) = (states.index_select(&rows, 0)?, texts.mask.index_select(&rows, 0)?);
        let fused = source.look_at(&index, |looks| model.fuse(&text, &mask, looks, Attention::Full, &pass))?;
        let logits = model.match_logits(&fused)?.narrow(1, 1, 1)?.flatten_all()?.to_vec1::<f32>()?;
        scores.extend(chunk.iter().copied().zip(logits));
        counter(scores.len(), pairs.len());
    }
    let mut image_to_text = vec![NOT_PROPOSED; n * m];
    for (image, texts) in texts_of_image.iter().enumerate() {
        texts.iter().for_each(|&text| image_to_text[image * m + text] = scores[&(image as u32, text as u32)]);
    }
    let mut text_to_image = vec![NOT_PROPOSED; n * m];
    for (text, images) in images_of_text.iter().enumerate() {
        images.iter().for_each(|&image| text_to_image[text * n + image] = scores[&(image as u32, text as u32)]);
    }
    Ok(Scores { similarities, image_to_text, text_to_image })
}

/// For each row of similarities the indices of its `k` largest numbers, best first.
fn propose(similarities: &Tensor, k: usize) -> candle_core::Result<Vec<Vec<usize>>> {
    let best = |row: Vec<f32>| {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        order.truncate(k);
        order
    };
    Ok(similarities.to_vec2::<f32>()?.into_iter().map(best).collect())
}
