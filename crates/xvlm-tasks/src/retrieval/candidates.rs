//! What the dual encoder proposes, and in which order matching puts it.

use candle_core::Tensor;
use rayon::prelude::*;

use super::Ranking;

/// For each row of `from [N, E]` the `k` rows of `among [M, E]` that are nearest, the nearest first.
pub(crate) fn propose(from: &Tensor, among: &Tensor, k: usize) -> candle_core::Result<Vec<Vec<u32>>> {
    // Similarities that are in memory at a time.
    const AT_ONCE: usize = 1 << 24;
    let (n, m) = (from.dim(0)?, among.dim(0)?);
    let (rows, among) = ((AT_ONCE / m.max(1)).clamp(1, n.max(1)), among.t()?);
    let mut found = Vec::with_capacity(n);
    for start in (0..n).step_by(rows) {
        let similarities = from.narrow(0, start, rows.min(n - start))?.matmul(&among)?.to_vec2::<f32>()?;
        found.extend(similarities.par_iter().map(|row| nearest(row, k)).collect::<Vec<_>>());
    }
    Ok(found)
}

/// The places of the `k` largest numbers, the largest first, of equal ones the first.
pub(crate) fn nearest(row: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let larger = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if (1..order.len()).contains(&k) {
        order.select_nth_unstable_by(k - 1, larger);
    }
    order.truncate(k);
    order.sort_unstable_by(larger);
    order
}

/// For each image the texts it is matched with, for either way; those of like length together.
pub(super) fn both_ways(
    texts_of_image: &[Vec<u32>],
    images_of_text: &[Vec<u32>],
    tokens: &[Vec<u32>],
) -> Vec<Vec<u32>> {
    let mut wanted = texts_of_image.to_vec();
    for (text, images) in (0u32..).zip(images_of_text) {
        images.iter().for_each(|&image| wanted[image as usize].push(text));
    }
    for texts in &mut wanted {
        texts.sort_unstable_by_key(|&text| (tokens[text as usize].len(), text));
        texts.dedup();
    }
    wanted
}

/// The logits of the pairs that were matched: for each image its texts, in the order of their numbers.
pub(super) struct Matches(Vec<Vec<(u32, f32)>>);

impl Matches {
    pub(super) fn new(wanted: &[Vec<u32>], logits: impl IntoIterator<Item = Vec<f32>>) -> Self {
        let of_image = |(texts, logits): (&Vec<u32>, Vec<f32>)| {
            let mut found: Vec<(u32, f32)> = texts.iter().copied().zip(logits).collect();
            found.sort_unstable_by_key(|&(text, _)| text);
            found
        };
        Self(wanted.iter().zip(logits).map(of_image).collect())
    }

    fn logit(&self, image: u32, text: u32) -> Option<f32> {
        let texts = &self.0[image as usize];
        texts.binary_search_by_key(&text, |&(text, _)| text).ok().map(|at| texts[at].1)
    }

    /// Candidates by their logits; of equal ones the one that the dual encoder prefers comes first.
    fn ranked(candidates: &[u32], logit: impl Fn(u32) -> Option<f32>) -> Ranking {
        let mut found: Ranking = candidates.iter().filter_map(|&one| Some((one, logit(one)?))).collect();
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        found
    }

    /// The candidates of each image, and of each text.
    pub(super) fn rankings(&self, texts_of_image: &[Vec<u32>], images_of_text: &[Vec<u32>]) -> [Vec<Ranking>; 2] {
        let of_images = (0u32..).zip(texts_of_image);
        let of_texts = (0u32..).zip(images_of_text);
        [
            of_images.map(|(image, texts)| Self::ranked(texts, |text| self.logit(image, text))).collect(),
            of_texts.map(|(text, images)| Self::ranked(images, |image| self.logit(image, text))).collect(),
        ]
    }
}
