//! Captions against references: BLEU, ROUGE-L and CIDEr, as `pycocoevalcap` (version 1.2) computes them.
//!
//! Texts are words separated by white space; that they are lower-case and without punctuation is up to the caller.

pub mod cider;

use std::collections::HashMap;

use crate::error::{MetricsError, same_length, some};

/// Keep the quotients of BLEU defined (`small`, `tiny` of the reference); the score of nothing is 0 up to rounding.
const SMALL: f64 = 1e-9;
const TINY: f64 = 1e-15;

/// Weight of recall against precision in ROUGE-L.
const BETA: f64 = 1.2;

/// Corpus BLEU-1 to BLEU-4, as fractions (Papineni et al. 2002).
///
/// The geometric mean of the clipped precisions of 1- to n-grams, counted over all captions, times the brevity
/// penalty; the length to reach is, for each caption, that of the reference closest in length, the shorter of two.
///
/// # Errors
/// If there is no caption, a caption has no reference, or the lists differ in length.
pub fn bleu<C, R>(captions: &[C], references: &[Vec<R>]) -> Result<[f64; 4], MetricsError>
where
    C: AsRef<str>,
    R: AsRef<str>,
{
    check(captions, references)?;
    let (mut right, mut all) = ([0usize; 4], [0usize; 4]);
    let (mut length, mut target) = (0, 0);
    for (caption, references) in captions.iter().zip(references) {
        let caption = words(caption);
        let references: Vec<_> = references.iter().map(words).collect();
        length += caption.len();
        target += references.iter().map(Vec::len).min_by_key(|&len| (len.abs_diff(caption.len()), len)).unwrap_or(0);
        for n in 1..=4 {
            let theirs: Vec<_> = references.iter().map(|reference| ngrams(reference, n)).collect();
            all[n - 1] += (caption.len() + 1).saturating_sub(n);
            right[n - 1] += ngrams(&caption, n)
                .into_iter()
                .map(|(ngram, count)| {
                    count.min(theirs.iter().filter_map(|own| own.get(ngram)).copied().max().unwrap_or(0))
                })
                .sum::<usize>();
        }
    }
    let ratio = (length as f64 + TINY) / (target as f64 + SMALL);
    let brevity = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
    let mut product = 1.0;
    Ok(std::array::from_fn(|n| {
        product *= (right[n] as f64 + TINY) / (all[n] as f64 + SMALL);
        product.powf(1.0 / (n + 1) as f64) * brevity
    }))
}

/// ROUGE-L as a fraction: the mean over captions of the F-score of the longest common subsequence (Lin 2004).
///
/// Precision and recall are each the best over the references; recall weighs 1.2² times as much.
///
/// # Errors
/// If there is no caption, a caption has no reference, or the lists differ in length.
pub fn rouge_l<C, R>(captions: &[C], references: &[Vec<R>]) -> Result<f64, MetricsError>
where
    C: AsRef<str>,
    R: AsRef<str>,
{
    check(captions, references)?;
    let score = |(caption, references): (&C, &Vec<R>)| {
        let caption = words(caption);
        let (mut precision, mut recall) = (0f64, 0f64);
        for reference in references {
            let reference = words(reference);
            let common = common_subsequence(&caption, &reference) as f64;
            precision = precision.max(common / caption.len().max(1) as f64);
            recall = recall.max(common / reference.len().max(1) as f64);
        }
        let weight = BETA * BETA;
        if precision == 0.0 { 0.0 } else { (1.0 + weight) * precision * recall / (recall + weight * precision) }
    };
    Ok(captions.iter().zip(references).map(score).sum::<f64>() / captions.len() as f64)
}

fn check<C, R>(captions: &[C], references: &[Vec<R>]) -> Result<(), MetricsError> {
    some("captions", captions.len())?;
    same_length("references", captions.len(), references.len())?;
    references.iter().try_for_each(|references| some("references of a caption", references.len()))
}

fn words(text: &impl AsRef<str>) -> Vec<&str> {
    text.as_ref().split_whitespace().collect()
}

/// How often each run of `n` words occurs.
fn ngrams<'a, 'b>(words: &'b [&'a str], n: usize) -> HashMap<&'b [&'a str], usize> {
    let mut counts = HashMap::new();
    for ngram in words.windows(n) {
        *counts.entry(ngram).or_insert(0) += 1;
    }
    counts
}

/// Length of the longest common subsequence.
fn common_subsequence(a: &[&str], b: &[&str]) -> usize {
    // One row of the table: entry j is the length for the words of `a` so far and the first j of `b`.
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (j, other) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1e-3), "expected {expected}, found {found}");
    }

    fn compare(captions: &[&str], references: &[Vec<&str>], expected: ([f64; 4], f64)) -> Result<(), MetricsError> {
        bleu(captions, references)?.into_iter().zip(expected.0).for_each(|(found, expected)| close(found, expected));
        close(rouge_l(captions, references)?, expected.1);
        Ok(())
    }

    /// The expected numbers were computed with pycocoevalcap 1.2 (`Bleu(4)`, `Rouge()`), Python 3.11.
    #[test]
    fn the_reference_implementation_agrees() -> Result<(), MetricsError> {
        let captions =
            ["a red circle left of a blue square", "the small green triangle", "two dogs run on the the beach"];
        let references = [
            vec!["a red circle to the left of a blue square", "the red circle is left of the blue square"],
            vec!["a small green triangle", "one small triangle in green on a white ground"],
            vec!["two dogs are running on the beach", "a pair of dogs run along the sandy beach in the sun"],
        ];
        compare(
            &captions,
            &references,
            ([0.8987963493946461, 0.7997099129232801, 0.6156652888906518, 0.458724144543907], 0.7785714285714286),
        )?;
        compare(
            &captions[..1],
            &references[..1],
            ([0.8824969023639716, 0.8170333701882847, 0.7323193451806126, 0.610195043038188], 0.8714285714285713),
        )?;
        // Too short, hardly a word right, no 2-gram right.
        compare(
            &["a dog", "a cat"],
            &[vec!["zebra"], vec!["a dog runs fast"]],
            (
                [0.19470019567050137, 8.707257453946614e-09, 3.8940039134100283e-08, 8.234815676044393e-08],
                0.15721649484536082,
            ),
        )?;
        // An empty caption.
        compare(
            &["", "a cat sits"],
            &[vec!["a dog"], vec!["a cat sits"]],
            ([0.5134171186903144, 0.5134171186475296, 0.5134171185476987, 0.016235674845794527], 0.5),
        )?;
        // The shorter of two references equally close in length: no brevity penalty.
        compare(
            &["a b c d e"],
            &[vec!["a b c d", "a b c d e f"]],
            ([0.9999999998000002, 0.9999999997750002, 0.9999999997388891, 0.999999999679167], 1.0),
        )
    }

    #[test]
    fn a_caption_equal_to_its_reference_is_perfect() -> Result<(), MetricsError> {
        let text = ["a cat sits on the mat".to_owned()];
        let references = [vec!["a cat sits on the mat"]];
        assert!(bleu(&text, &references)?.iter().all(|&bleu| (bleu - 1.0).abs() < 1e-8));
        close(rouge_l(&text, &references)?, 1.0);
        Ok(())
    }

    #[test]
    fn repeated_words_are_clipped() -> Result<(), MetricsError> {
        // Papineni et al., section 2.1: 2 of 7 words count.
        let references = [vec!["the cat is on the mat", "there is a cat on the mat"]];
        let found = bleu(&["the the the the the the the"], &references)?[0];
        assert!((found - 2.0 / 7.0).abs() < 1e-9, "{found}");
        Ok(())
    }

    #[test]
    fn the_longest_common_subsequence_has_gaps() {
        let words = |text: &'static str| text.split(' ').collect::<Vec<_>>();
        assert_eq!(common_subsequence(&words("a b c d e"), &words("b x d a e")), 3);
        assert_eq!(common_subsequence(&words("a b"), &words("c d")), 0);
        assert_eq!(common_subsequence(&[], &words("c d")), 0);
    }

    #[test]
    fn empty_texts_score_nothing() -> Result<(), MetricsError> {
        assert_eq!(rouge_l(&[""], &[vec![""]])?, 0.0);
        assert!(bleu(&[""], &[vec!["a"]])?.iter().all(|&bleu| bleu < 1e-5));
        assert!(bleu(&[""], &[vec![""]])?.iter().all(|bleu| bleu.is_finite()));
        Ok(())
    }

    #[test]
    fn missing_texts_are_refused() {
        let none: [Vec<&str>; 0] = [];
        let refused = bleu(&[""; 0], &none).unwrap_err().to_string();
        assert_eq!(refused, "captions: expected at least one, found none");
        let refused = rouge_l(&["a"], &none).unwrap_err().to_string();
        assert_eq!(refused, "references: expected 1 entries, found 0");
        let refused = rouge_l(&["a"], &[Vec::<&str>::new()]).unwrap_err().to_string();
        assert_eq!(refused, "references of a caption: expected at least one, found none");
    }
}
