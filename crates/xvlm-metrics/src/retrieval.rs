//! Image–text retrieval: recall at 1, 5 and 10, both ways (`itm_eval` of the original's `Retrieval.py`).

use serde::Serialize;

use crate::error::{MetricsError, same_length, some};
use crate::percent;

/// Recalls in percent: how often the right one is among the first 1, 5, 10.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RetrievalScores {
    /// Given an image, one of its texts is first.
    pub text_r1: f64,
    /// Given an image, one of its texts is among the first five.
    pub text_r5: f64,
    /// Given an image, one of its texts is among the first ten.
    pub text_r10: f64,
    /// Mean of the three.
    pub text_mean: f64,
    /// Given a text, its image is first.
    pub image_r1: f64,
    /// Given a text, its image is among the first five.
    pub image_r5: f64,
    /// Given a text, its image is among the first ten.
    pub image_r10: f64,
    /// Mean of the three.
    pub image_mean: f64,
    /// Mean of both means.
    pub r_mean: f64,
}

/// Scores a retrieval.
///
/// `image_to_text` is `[images × texts]`: how well each text suits an image, a row an image. `text_to_image` is
/// `[texts × images]`, a row a text; the two differ where matching re-ranks different candidates each way.
/// `image_of_text` names each text's image. Of equal scores the one that stands first ranks first (the original leaves
/// it to an unstable sort). An image without any text counts as not found, as in the original.
///
/// # Errors
/// If there is no text, the tables' sizes are no multiple of the number of texts or differ, an index is no image, or
/// a score is NaN.
pub fn recalls(
    image_to_text: &[f32],
    text_to_image: &[f32],
    image_of_text: &[usize],
) -> Result<RetrievalScores, MetricsError> {
    let texts = image_of_text.len();
    some("image_of_text", texts)?;
    let images = image_to_text.len() / texts;
    some("image_to_text", images)?;
    same_length("image_to_text", images * texts, image_to_text.len())?;
    same_length("text_to_image", images * texts, text_to_image.len())?;
    for (what, scores) in [("image_to_text", image_to_text), ("text_to_image", text_to_image)] {
        if let Some(at) = scores.iter().position(|score| score.is_nan()) {
            return Err(MetricsError::NotANumber { what, at });
        }
    }
    let mut texts_of_image = vec![Vec::new(); images];
    for (at, &found) in image_of_text.iter().enumerate() {
        match texts_of_image.get_mut(found) {
            Some(texts) => texts.push(at),
            None => {
                return Err(MetricsError::Index { what: "image_of_text", at, below: images, found });
            }
        }
    }

    let text_ranks = image_to_text.chunks_exact(texts).zip(&texts_of_image).map(|(row, own)| rank(row, own));
    let image_ranks =
        text_to_image.chunks_exact(images).zip(image_of_text).map(|(row, &own)| rank(row, std::slice::from_ref(&own)));
    Ok(RetrievalScores::of_ranks(text_ranks, image_ranks))
}

impl RetrievalScores {
    /// Scores from ranks: for each image that of the best of its texts, for each text that of its image. The best rank is
    /// 0; what was not found has none. Recalls of nothing are 0.
    pub fn of_ranks(
        text_ranks: impl Iterator<Item = Option<usize>>,
        image_ranks: impl Iterator<Item = Option<usize>>,
    ) -> Self {
        let [text_r1, text_r5, text_r10] = within(text_ranks);
        let [image_r1, image_r5, image_r10] = within(image_ranks);
        let text_mean = (text_r1 + text_r5 + text_r10) / 3.0;
        let image_mean = (image_r1 + image_r5 + image_r10) / 3.0;
        let r_mean = (text_mean + image_mean) / 2.0;
        Self { text_r1, text_r5, text_r10, text_mean, image_r1, image_r5, image_r10, image_mean, r_mean }
    }
}

/// How many stand before the best of `own`; nothing if `own` is empty.
fn rank(row: &[f32], own: &[usize]) -> Option<usize> {
    // `own` ascends, so the first of its best is the one that ranks first.
    let best = own.iter().copied().reduce(|best, next| if row[next] > row[best] { next } else { best })?;
    let before = |&(at, &score): &(usize, &f32)| score > row[best] || (score == row[best] && at < best);
    Some(row.iter().enumerate().filter(before).count())
}

/// How many ranks are below 1, 5 and 10, in percent.
fn within(ranks: impl Iterator<Item = Option<usize>>) -> [f64; 3] {
    let ranks: Vec<_> = ranks.collect();
    [1, 5, 10].map(|k| percent(ranks.iter().flatten().filter(|&&rank| rank < k).count(), ranks.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transposed(scores: &[f32], columns: usize) -> Vec<f32> {
        (0..columns).flat_map(|c| scores.iter().skip(c).step_by(columns).copied()).collect()
    }

    #[test]
    fn a_table_by_hand() -> Result<(), MetricsError> {
        // Three images, texts 0 and 1 of image 0, text 2 of image 1, text 3 of image 2.
        #[rustfmt::skip]
        let image_to_text = [
            0.1, 0.9, 0.5, 0.2, // best own: text 1, rank 0
            0.8, 0.7, 0.6, 0.1, // text 2, rank 2
            0.3, 0.2, 0.1, 0.4, // text 3, rank 0
        ];
        // Texts: 0 → image 1 first (rank 2 for image 0), 1 → rank 0, 2 → rank 0, 3 → rank 0.
        let scores = recalls(&image_to_text, &transposed(&image_to_text, 4), &[0, 0, 1, 2])?;
        assert!((scores.text_r1 - 200.0 / 3.0).abs() < 1e-12);
        assert_eq!((scores.text_r5, scores.text_r10), (100.0, 100.0));
        assert_eq!((scores.image_r1, scores.image_r5, scores.image_r10), (75.0, 100.0, 100.0));
        assert!((scores.text_mean - 800.0 / 9.0).abs() < 1e-12);
        assert!((scores.image_mean - 275.0 / 3.0).abs() < 1e-12);
        assert!((scores.r_mean - (800.0 / 9.0 + 275.0 / 3.0) / 2.0).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn what_is_not_found_has_no_rank() {
        let scores = RetrievalScores::of_ranks([Some(0), None].into_iter(), [Some(4), Some(9), None, None].into_iter());
        assert_eq!((scores.text_r1, scores.text_r10), (50.0, 50.0));
        assert_eq!((scores.image_r1, scores.image_r5, scores.image_r10), (0.0, 25.0, 50.0));
        assert_eq!(RetrievalScores::of_ranks([].into_iter(), [].into_iter()), RetrievalScores::default());
    }

    #[test]
    fn ranks_at_the_limits() -> Result<(), MetricsError> {
        // Twelve images, a text each; image i ranks its own text i-th.
        let n = 12;
        let score = |i: usize, j: usize| {
            if i == j { -(i as f32) + 0.5 } else { -((j + usize::from(j < i)) as f32) }
        };
        let rows: Vec<f32> = (0..n).flat_map(|i| (0..n).map(move |j| score(i, j))).collect();
        let own: Vec<usize> = (0..n).collect();
        let ranks: Vec<_> = rows.chunks(n).zip(&own).map(|(row, i)| rank(row, &[*i])).collect();
        assert_eq!(ranks[0], Some(0));
        assert_eq!(within((0..20).map(Some)), [5.0, 25.0, 50.0]);
        assert_eq!(within([Some(0), Some(4), Some(5), Some(9), Some(10)].into_iter()), [20.0, 40.0, 80.0]);
        Ok(())
    }

    #[test]
    fn the_first_of_equals_ranks_first() -> Result<(), MetricsError> {
        let scores = recalls(&[0.0; 4], &[0.0; 4], &[0, 1])?;
        assert_eq!((scores.text_r1, scores.image_r1), (50.0, 50.0));
        assert_eq!(rank(&[1.0, 2.0, 2.0, 2.0], &[2, 3]), Some(1));
        Ok(())
    }

    #[test]
    fn both_tables_count() -> Result<(), MetricsError> {
        let (right, wrong) = ([1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]);
        let scores = recalls(&right, &wrong, &[0, 1])?;
        assert_eq!((scores.text_r1, scores.image_r1), (100.0, 0.0));
        Ok(())
    }

    #[test]
    fn an_image_without_text_is_not_found() -> Result<(), MetricsError> {
        let scores = recalls(&[1.0, 1.0], &[1.0, 0.0], &[0])?;
        assert_eq!((scores.text_r1, scores.text_r10, scores.image_r1), (50.0, 50.0, 100.0));
        Ok(())
    }

    #[test]
    fn infinite_scores_have_ranks() -> Result<(), MetricsError> {
        let scores = [f32::INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::INFINITY];
        assert_eq!(recalls(&scores, &scores, &[0, 1])?.r_mean, 100.0);
        Ok(())
    }

    #[test]
    fn wrong_tables_are_refused() {
        let refused = |i2t: &[f32], t2i: &[f32], own: &[usize]| recalls(i2t, t2i, own).unwrap_err().to_string();
        assert_eq!(refused(&[], &[], &[]), "image_of_text: expected at least one, found none");
        assert_eq!(refused(&[], &[], &[0]), "image_to_text: expected at least one, found none");
        assert_eq!(refused(&[0.; 3], &[0.; 3], &[0, 0]), "image_to_text: expected 2 entries, found 3");
        assert_eq!(refused(&[0.; 4], &[0.; 2], &[0, 1]), "text_to_image: expected 4 entries, found 2");
        assert_eq!(refused(&[0.; 2], &[0.; 2], &[0, 1]), "image_of_text[1]: expected an index below 1, found 1");
        assert_eq!(refused(&[0.], &[f32::NAN], &[0]), "text_to_image[0]: expected a number, found NaN");
    }
}
