//! Scores: what the answers of a model are worth, as the benchmarks of each task count.
//!
//! Numbers and strings in, scores out. Recalls and accuracies are in percent; BLEU and ROUGE-L are fractions, as
//! their reference implementation gives them. All arithmetic is f64, sums run in the order of the input, and ties
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
