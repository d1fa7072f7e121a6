//! Cleaning texts as X-VLM does (`dataset/utils.py`).

use super::hash_bytes;
use crate::error::{DataError, excerpt};

/// Lower case, without `,.'!?"()*#:;~`; hyphens and slashes become spaces.
fn clean(text: &str) -> String {
    text.to_lowercase()
        .chars()
        .filter(|c| !",.'!?\"()*#:;~".contains(*c))
        .map(|c| if matches!(c, '-' | '/') { ' ' } else { c })
        .collect()
}

/// At most `max_words` of the parts between single spaces.
fn first_words(text: &str, max_words: usize) -> String {
    text.split(' ').take(max_words).collect::<Vec<_>>().join(" ")
}

/// What Python's `\s` matches and its `strip` takes away.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

/// Each run of two or more white-space characters becomes one space.
fn squeeze(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if is_space(c) && chars.peek().is_some_and(|&next| is_space(next)) {
            while chars.next_if(|&next| is_space(next)).is_some() {}
            out.push(' ');
        } else {
            out.push(c);
        }
    }
    out
}

/// Cleans a caption as X-VLM does (`dataset/utils.py`, `pre_caption`): lower case, no punctuation,
/// single spaces, `<person>` as a word, at most `max_words` words.
///
/// # Errors
///
/// [`DataError::EmptyText`] when nothing is left.
pub fn pre_caption(text: &str, max_words: usize) -> Result<String, DataError> {
    let cleaned = squeeze(&clean(text).replace("<person>", "person"));
    let cleaned = first_words(cleaned.trim_end_matches('\n').trim_matches(' '), max_words);
    if cleaned.is_empty() {
        return Err(DataError::EmptyText { text: excerpt(text) });
    }
    Ok(cleaned)
}

/// Cleans a question as X-VLM does (`dataset/utils.py`, `pre_question`): lower case, no punctuation,
/// at most `max_words` words; spaces inside are kept.
#[must_use]
pub fn pre_question(text: &str, max_words: usize) -> String {
    first_words(clean(text).trim_end_matches(' '), max_words)
}

/// A number that texts equal after cleaning share; stable between runs and machines.
#[must_use]
pub fn text_key(text: &str) -> u64 {
    let cleaned = clean(text).replace("<person>", "person");
    let words: Vec<&str> = cleaned.split_whitespace().collect();
    hash_bytes(words.join(" ").as_bytes())
}
