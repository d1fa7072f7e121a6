//! What can be wrong with the input of a score.

/// The errors of this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// There is nothing to score.
    #[error("{what}: expected at least one, found none")]
    Empty {
        /// What is empty.
        what: &'static str,
    },
    /// A list is of another length than what it belongs to.
    #[error("{what}: expected {expected} entries, found {found}")]
    Length {
        /// The list.
        what: &'static str,
        /// The length it should have.
        expected: usize,
        /// The length it has.
        found: usize,
    },
    /// A run of words is empty or too long for a table of document frequencies.
    #[error("n-gram {ngram:?}: expected 1 to 4 words, found {found}")]
    Ngram {
        /// The words.
        ngram: String,
        /// How many they are.
        found: usize,
    },
    /// A number that counts something is not one.
    #[error("{what}{}: expected a positive number, found {found}", of_what(of))]
    NotPositive {
        /// The number.
        what: &'static str,
        /// What it counts; empty if there is but one such number.
        of: String,
        /// The value.
        found: f64,
    },
}

fn of_what(of: &str) -> String {
    if of.is_empty() { String::new() } else { format!(" of {of:?}") }
}

/// Refuses an empty list.
pub(crate) fn some(what: &'static str, len: usize) -> Result<(), MetricsError> {
    if len == 0 { Err(MetricsError::Empty { what }) } else { Ok(()) }
}

/// Refuses a list of another length.
pub(crate) fn same_length(what: &'static str, expected: usize, found: usize) -> Result<(), MetricsError> {
    if expected == found { Ok(()) } else { Err(MetricsError::Length { what, expected, found }) }
}
