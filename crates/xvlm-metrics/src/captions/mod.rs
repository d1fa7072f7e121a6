//! Captions against references: BLEU, ROUGE-L and CIDEr, as `pycocoevalcap` (version 1.2) computes them.
//!
//! Texts are words separated by white space; [`ptb`] makes such of captions, in lower case and without punctuation.

pub mod cider;
pub mod ptb;

use std::collections::HashMap;

use rayon::prelude::*;

use crate::error::{MetricsError, same_length, some};
use crate::python_words;

/// Keep the quotients of BLEU defined (`small`, `tiny` of the reference); the score of nothing is 0 up to rounding.
const SMALL: f64 = 1e-9;
const TINY: f64 = 1e-15;

/// Weight of recall against precision in ROUGE-L.
const BETA: f64 = 1.2;

/// Captions a thread works through at a time.
const CHUNK: usize = 512;

/// What BLEU counts: n-grams that are right, all n-grams, words, and words there should be.
#[derive(Clone, Copy, Default)]
struct Overlap {
    right: [usize; 4],
    all: [usize; 4],
    length: usize,
    target: usize,
}

/// Corpus BLEU-1 to BLEU-4, as fractions (Papineni et al. 2002).
///
/// The geometric mean of the clipped precisions of 1- to n-grams, counted over all captions, times the brevity
/// penalty; the length to reach is, for each caption, that of the reference closest in length, the shorter of two.
///
/// # Errors
/// If there is no caption, a caption has no reference, or the lists differ in length.
pub fn bleu<C, R>(captions: &[C], references: &[Vec<R>]) -> Result<[f64; 4], MetricsError>
where
    C: AsRef<str> + Sync,
    R: AsRef<str> + Sync,
{
    check(captions, references)?;
    let pairs = captions.par_iter().zip(references).with_min_len(CHUNK);
    let Overlap { right, all, length, target } =
        pairs.map(|(caption, references)| overlap(caption, references)).reduce(Overlap::default, |mut sum, next| {
            for n in 0..4 {
                sum.right[n] += next.right[n];
                sum.all[n] += next.all[n];
            }
            sum.length += next.length;
            sum.target += next.target;
            sum
        });
    let ratio = (length as f64 + TINY) / (target as f64 + SMALL);
    let brevity = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
    let mut product = 1.0;
    Ok(std::array::from_fn(|n| {
        product *= (right[n] as f64 + TINY) / (all[n] as f64 + SMALL);
        product.powf(1.0 / (n + 1) as f64) * brevity
    }))
}

fn overlap<R: AsRef<str>>(caption: &impl AsRef<str>, references: &[R]) -> Overlap {
    let mut numbers = HashMap::new();
    let caption = numbered(words(caption), &mut numbers);
    let references: Vec<_> = references.iter().map(|text| numbered(words(text), &mut numbers)).collect();
    let target = references.iter().map(Vec::len).min_by_key(|&len| (len.abs_diff(caption.len()), len)).unwrap_or(0);
    let mut found = Overlap { length: caption.len(), target, ..Overlap::default() };
    let mut theirs: Vec<&[u32]> = Vec::new();
    for n in 1..=4 {
        found.all[n - 1] = (caption.len() + 1).saturating_sub(n);
        let mut own: Vec<&[u32]> = caption.windows(n).collect();
        own.sort_unstable();
        // How often each n-gram of the caption occurs in the reference that has most of it.
        let mut most = vec![0; own.len()];
        for reference in &references {
            theirs.clear();
            theirs.extend(reference.windows(n));
            theirs.sort_unstable();
            let (mut at, mut from) = (0, 0);
            for same in own.chunk_by(|a, b| a == b) {
                from += theirs[from..].iter().take_while(|other| **other < same[0]).count();
                let count = theirs[from..].iter().take_while(|other| **other == same[0]).count();
                most[at] = count.max(most[at]);
                at += same.len();
            }
        }
        let mut at = 0;
        for same in own.chunk_by(|a, b| a == b) {
            found.right[n - 1] += same.len().min(most[at]);
            at += same.len();
        }
    }
    found
}

/// ROUGE-L as a fraction: the mean over captions of the F-score of the longest common subsequence (Lin 2004).
///
/// Precision and recall are each the best over the references; recall weighs 1.2² times as much.
///
/// # Errors
/// If there is no caption, a caption has no reference, or the lists differ in length.
pub fn rouge_l<C, R>(captions: &[C], references: &[Vec<R>]) -> Result<f64, MetricsError>
where
    C: AsRef<str> + Sync,
    R: AsRef<str> + Sync,
{
    Ok(rouge_l_each(captions, references)?.iter().sum::<f64>() / captions.len() as f64)
}

/// [`rouge_l`] of each caption.
///
/// # Errors
/// If there is no caption, a caption has no reference, or the lists differ in length.
pub fn rouge_l_each<C, R>(captions: &[C], references: &[Vec<R>]) -> Result<Vec<f64>, MetricsError>
where
    C: AsRef<str> + Sync,
    R: AsRef<str> + Sync,
{
    check(captions, references)?;
    let score = |(caption, references): (&C, &Vec<R>)| {
        let mut numbers = HashMap::new();
        let caption = numbered(pieces(caption), &mut numbers);
        let mut row = Vec::new();
        let (mut precision, mut recall) = (0f64, 0f64);
        for reference in references {
            let reference = numbered(pieces(reference), &mut numbers);
            let common = common_subsequence(&caption, &reference, &mut row) as f64;
            precision = precision.max(common / caption.len().max(1) as f64);
            recall = recall.max(common / reference.len().max(1) as f64);
        }
        let weight = BETA * BETA;
        if precision == 0.0 { 0.0 } else { (1.0 + weight) * precision * recall / (recall + weight * precision) }
    };
    Ok(captions.par_iter().zip(references).with_min_len(CHUNK).map(score).collect())
}

fn check<C, R>(captions: &[C], references: &[Vec<R>]) -> Result<(), MetricsError> {
    some("captions", captions.len())?;
    same_length("references", captions.len(), references.len())?;
    references.iter().try_for_each(|references| some("references of a caption", references.len()))
}

fn words(text: &impl AsRef<str>) -> impl Iterator<Item = &str> {
    python_words(text.as_ref())
}

/// Words for ROUGE-L, whose reference implementation separates them at single spaces: "1 1/2", a word with a space that
/// does not break, is one, and a text without words is one empty word.
fn pieces(text: &impl AsRef<str>) -> impl Iterator<Item = &str> {
    text.as_ref().split(' ')
}

/// A number for each word.
fn numbered<'a>(words: impl Iterator<Item = &'a str>, numbers: &mut HashMap<&'a str, u32>) -> Vec<u32> {
    let number = |word| {
        let next = numbers.len() as u32;
        *numbers.entry(word).or_insert(next)
    };
    words.map(number).collect()
}

/// Length of the longest common subsequence.
fn common_subsequence<T: PartialEq>(a: &[T], b: &[T], row: &mut Vec<usize>) -> usize {
    // One row of the table: entry j is the length for the words of `a` so far and the first j of `b`.
    row.clear();
    row.resize(b.len() + 1, 0);
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
        assert_eq!(common_subsequence(&words("a b c d e"), &words("b x d a e"), &mut Vec::new()), 3);
        assert_eq!(common_subsequence(&words("a b"), &words("c d"), &mut Vec::new()), 0);
        assert_eq!(common_subsequence(&[], &words("c d"), &mut Vec::new()), 0);
    }

    #[test]
    fn empty_texts_score_nothing() -> Result<(), MetricsError> {
        assert_eq!(rouge_l(&[""], &[vec!["a"]])?, 0.0);
        // Nothing is all there is to say.
        assert_eq!(rouge_l(&[""], &[vec![""]])?, 1.0);
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
