//! Tables of document frequencies, which rewards for captions weigh words with.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::pickle::read_counts;
use crate::error::{DataError, Place};
use crate::json::Context;

/// In how many documents (images, by their captions) runs of words occur.
#[derive(Debug, Clone, PartialEq)]
pub struct DocumentCounts {
    /// Number of documents.
    pub documents: f64,
    /// Runs of words, and in how many documents each occurs.
    pub counts: Vec<(Vec<String>, f64)>,
}

#[derive(Deserialize)]
struct Json {
    ref_len: f64,
    document_frequency: BTreeMap<String, f64>,
}

/// Reads a table of document frequencies: a pickle of `{"document_frequency": {(word, …): count}, "ref_len": documents}`,
/// as `coco-train-words.p` and its like (`cider_cached_tokens` of the original's configuration) are; or the same as JSON,
/// whose keys are words separated by spaces.
///
/// # Errors
///
/// [`DataError::Io`]; [`DataError::Json`] and [`DataError::Field`] naming what was expected and found.
pub fn read_document_counts(path: impl AsRef<Path>) -> Result<DocumentCounts, DataError> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
    let place = Place::Whole;
    if bytes.trim_ascii_start().first() == Some(&b'{') {
        let Json { ref_len, document_frequency } = serde_json::from_slice(&bytes)
            .map_err(|source| DataError::Json { path: path.to_owned(), place, source })?;
        let words = |words: String| words.split(' ').map(str::to_owned).collect();
        let counts = document_frequency.into_iter().map(|(ngram, count)| (words(ngram), count)).collect();
        return Ok(DocumentCounts { documents: ref_len, counts });
    }
    let (documents, counts) = read_counts(&bytes, "ref_len", "document_frequency").map_err(|found| {
        Context { path, place }.error("file", "a pickle or JSON of document_frequency and ref_len", found)
    })?;
    Ok(DocumentCounts { documents, counts })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<DocumentCounts, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        std::fs::write(&path, bytes).unwrap();
        read_document_counts(&path).map_err(|error| error.to_string())
    }

    /// What Python's `pickle.dumps({"document_frequency": table, "ref_len": 4}, protocol)` writes of a
    /// `defaultdict(float)` with `("a",): 3.0, ("a", "dog"): 1.0, ("dog", "<eos>"): 2`; and the same as JSON.
    #[test]
    fn pickles_and_json_are_read() {
        let counts = vec![
            (vec!["a".to_owned()], 3.0),
            (vec!["a".to_owned(), "dog".to_owned()], 1.0),
            (vec!["dog".to_owned(), "<eos>".to_owned()], 2.0),
        ];
        let expected = Ok(DocumentCounts { documents: 4.0, counts });
        let zero = b"(dp0\nVdocument_frequency\np1\nccollections\ndefaultdict\np2\n(c__builtin__\nfloat\np3\ntp4\nRp5\n(Va\np6\ntp7\nF3.0\ns(g6\nVdog\np8\ntp9\nF1.0\ns(g8\nV<eos>\np10\ntp11\nI2\nssVref_len\np12\nI4\ns.";
        assert_eq!(read(zero), expected);
        let two = b"\x80\x02}q\x00(X\x12\x00\x00\x00document_frequencyq\x01ccollections\ndefaultdict\nq\x02c__builtin__\nfloat\nq\x03\x85q\x04Rq\x05(X\x01\x00\x00\x00aq\x06\x85q\x07G@\x08\x00\x00\x00\x00\x00\x00h\x06X\x03\x00\x00\x00dogq\x08\x86q\tG?\xf0\x00\x00\x00\x00\x00\x00h\x08X\x05\x00\x00\x00<eos>q\n\x86q\x0bK\x02uX\x07\x00\x00\x00ref_lenq\x0cK\x04u.";
        assert_eq!(read(two), expected);
        let four = b"\x80\x04\x95\x8f\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x12document_frequency\x94\x8c\x0bcollections\x94\x8c\x0bdefaultdict\x94\x93\x94\x8c\x08builtins\x94\x8c\x05float\x94\x93\x94\x85\x94R\x94(\x8c\x01a\x94\x85\x94G@\x08\x00\x00\x00\x00\x00\x00h\n\x8c\x03dog\x94\x86\x94G?\xf0\x00\x00\x00\x00\x00\x00h\x0c\x8c\x05<eos>\x94\x86\x94K\x02u\x8c\x07ref_len\x94K\x04u.";
        assert_eq!(read(four), expected);
        let json = br#"{"ref_len": 4, "document_frequency": {"a": 3.0, "a dog": 1, "dog <eos>": 2}}"#;
        assert_eq!(read(json), expected);
    }

    #[test]
    fn what_is_no_table_is_named() {
        let refused = |bytes: &[u8], expected: &str| {
            let found = read(bytes).unwrap_err();
            assert!(found.contains(expected), "{found}");
        };
        refused(b"{\"ref_len\": 4}", "document_frequency");
        refused(b"]q\x00.", "found something else than a dictionary");
        refused(b"}q\x00X\x07\x00\x00\x00ref_lenK\x04s.", "found no document_frequency");
        refused(b"}X\x07\x00\x00\x00ref_lenX\x01\x00\x00\x00as.", "found a ref_len that is no number");
        refused(b"cos\nsystem\n(S'true'\ntR.", "found os.system");
        let head = b"}(X\x07\x00\x00\x00ref_lenK\x04X\x12\x00\x00\x00document_frequency}".as_slice();
        refused(&[head, b"K\x01K\x01su."].concat(), "no tuple of strings");
        refused(&[head, b"X\x01\x00\x00\x00a\x85Nsu."].concat(), "no number, of [\"a\"]");
    }
}
