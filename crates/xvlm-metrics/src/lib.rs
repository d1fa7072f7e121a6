//! Scores: what the answers of a model are worth, as the benchmarks of each task count.
//!
//! Numbers and strings in, scores out. Recalls and accuracies are in percent; BLEU and ROUGE-L are fractions and CIDEr
//! is up to 10, as their reference implementation gives them. All arithmetic is f64, sums run in the order of the input, and ties
//! are broken by position: equal input gives equal scores on every machine.

pub mod boxes;
pub mod captions;
mod error;
pub mod fill;
pub mod nlvr;
pub mod retrieval;
pub mod vqa;

pub use error::MetricsError;

/// `part` of `whole` in percent; 0 of nothing is 0.
fn percent(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// White space by Python's `str.split` and `str.strip`: four more control characters than Unicode's.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The words of a text as Python's `str.split` finds them.
fn python_words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_python_space).filter(|word| !word.is_empty())
}
