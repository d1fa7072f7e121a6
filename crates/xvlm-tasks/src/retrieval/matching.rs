//! Images matched with texts, by the fusion layers.

use xvlm_encoders::{Attention, Pass, Xvlm};

use super::Options;
use super::texts::{States, encode, tokens_within};
use crate::BATCH;
use crate::generate::Source;
use crate::model::ImageTokens;

/// Pairs of an image and a text that go through the fusion layers at a time.
const PAIRS: usize = 4 * BATCH;

/// The logit of each image's match with each of the texts wanted of it. Texts that are not encoded are encoded for it, as many
/// at a time as there is room for.
pub(super) fn match_images(
    model: &Xvlm,
    images: &ImageTokens,
    tokens: &[Vec<u32>],
    states: Option<&States>,
    wanted: &[&[u32]],
    options: Options,
) -> candle_core::Result<Vec<Vec<f32>>> {
    let dtype = images.tensor().dtype();
    let images = Source::images(images)?;
    let matching = |states: &States, wanted: &[&[u32]]| -> candle_core::Result<Vec<Vec<f32>>> {
        let logits = match_with(model, &images, states, wanted)?;
        Ok(logits.into_iter().map(|row| row.into_iter().map(|[_, matching]| matching).collect()).collect())
    };
    if let Some(states) = states {
        return matching(states, wanted);
    }
    let mut needed: Vec<u32> = wanted.concat();
    needed.sort_unstable();
    needed.dedup();
    let room = tokens_within(model, dtype, options.memory_mib).max(1);
    let mut logits: Vec<Vec<f32>> = wanted.iter().map(|texts| vec![0.0; texts.len()]).collect();
    let mut rest = needed.as_slice();
    while !rest.is_empty() {
        let mut sum = 0;
        let fits = |text: &&u32| {
            sum += tokens[**text as usize].len();
            sum <= room
        };
        let (now, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        rest = later;
        let states = encode(model, tokens, now, options.batch_size_text)?;
        let places: Vec<Vec<usize>> = wanted
            .iter()
            .map(|texts| (0..texts.len()).filter(|&at| now.binary_search(&texts[at]).is_ok()).collect())
            .collect();
        let texts: Vec<Vec<u32>> =
            places.iter().zip(wanted).map(|(places, texts)| places.iter().map(|&at| texts[at]).collect()).collect();
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        for ((row, places), found) in logits.iter_mut().zip(&places).zip(matching(&states, &texts)?) {
            places.iter().zip(found).for_each(|(&at, logit)| row[at] = logit);
        }
    }
    Ok(logits)
}

/// The logits, not matching and matching, of each concept with each of the texts wanted of it.
fn match_with(
    model: &Xvlm,
    concepts: &Source,
    states: &States,
    wanted: &[&[u32]],
) -> candle_core::Result<Vec<Vec<[f32; 2]>>> {
    let pass = Pass::inference();
    let pairs: Vec<(u32, u32)> =
        (0u32..).zip(wanted).flat_map(|(image, texts)| texts.iter().map(move |&text| (image, text))).collect();
    let mut logits = Vec::with_capacity(pairs.len());
    for pairs in pairs.chunks(PAIRS) {
        let (index, texts): (Vec<u32>, Vec<u32>) = pairs.iter().copied().unzip();
        let (text, mask) = states.rows(&texts)?;
        let fused = concepts.look_at(&index, |looks| model.fuse(&text, &mask, looks, Attention::Full, &pass))?;
        logits.extend(model.match_logits(&fused)?.to_vec2::<f32>()?.iter().map(|row| [row[0], row[1]]));
    }
    let mut logits = logits.into_iter();
    Ok(wanted.iter().map(|texts| logits.by_ref().take(texts.len()).collect()).collect())
}

/// The cosine of a concept and a text, and the logits of their not matching and matching.
pub(crate) type Compared = (f32, [f32; 2]);

/// Compares all concepts with all texts: a row a concept.
pub(crate) fn match_all(
    model: &Xvlm,
    concepts: &Source,
    tokens: &[Vec<u32>],
) -> candle_core::Result<Vec<Vec<Compared>>> {
    let mut all: Vec<u32> = (0..tokens.len() as u32).collect();
    let states = encode(model, tokens, &all, PAIRS)?;
    let embeddings = model.project_image(&concepts.tokens)?;
    let similarities = embeddings.matmul(&states.embeddings(model)?.t()?)?.to_vec2::<f32>()?;
    // Those of like length together.
    all.sort_by_key(|&text| (tokens[text as usize].len(), text));
    let wanted = vec![all.as_slice(); concepts.tokens.dim(0)?];
    let logits = match_with(model, concepts, &states, &wanted)?;
    let compared = |(similarities, logits): (Vec<f32>, Vec<[f32; 2]>)| {
        let mut row: Vec<Compared> = similarities.into_iter().map(|similarity| (similarity, [0.0; 2])).collect();
        all.iter().zip(logits).for_each(|(&text, logits)| row[text as usize].1 = logits);
        row
    };
    Ok(similarities.into_iter().zip(logits).map(compared).collect())
}
