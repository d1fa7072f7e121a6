//! Image–text retrieval: recall at 1, 5 and 10, both ways (`itm_eval` of the original's `Retrieval.py`).

use serde::Serialize;

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

/// How many ranks are below 1, 5 and 10, in percent.
fn within(ranks: impl Iterator<Item = Option<usize>>) -> [f64; 3] {
    let ranks: Vec<_> = ranks.collect();
    [1, 5, 10].map(|k| percent(ranks.iter().flatten().filter(|&&rank| rank < k).count(), ranks.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_found_has_no_rank() {
        let scores = RetrievalScores::of_ranks([Some(0), None].into_iter(), [Some(4), Some(9), None, None].into_iter());
        assert_eq!((scores.text_r1, scores.text_r10), (50.0, 50.0));
        assert_eq!((scores.image_r1, scores.image_r5, scores.image_r10), (0.0, 25.0, 50.0));
        assert_eq!((scores.text_mean, scores.image_mean, scores.r_mean), (50.0, 25.0, 37.5));
        assert_eq!(RetrievalScores::of_ranks([].into_iter(), [].into_iter()), RetrievalScores::default());
    }

    #[test]
    fn ranks_at_the_limits() {
        assert_eq!(within((0..20).map(Some)), [5.0, 25.0, 50.0]);
        assert_eq!(within([Some(0), Some(4), Some(5), Some(9), Some(10)].into_iter()), [20.0, 40.0, 80.0]);
    }
}
