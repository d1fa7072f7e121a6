//! The files that tokenizers are published in.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{BERT_SPECIALS, CONTINUES, ROBERTA_SPECIALS, TextTokenizer};
use crate::error::{DataError, excerpt};
use crate::json::io_error;

impl TextTokenizer {
    /// Reads a `tokenizer.json`; BERT's `vocab.txt`, one word piece a line; RoBERTa's `vocab.json` with the `merges.txt` beside
    /// it (either is named); or a folder with one of these, in this order.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`]; [`DataError::Tokenizer`] when it is no tokenizer or lacks a special token.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = path.as_ref();
        if path.is_dir() {
            const NAMES: [&str; 3] = ["tokenizer.json", "vocab.txt", "vocab.json"];
            let file = NAMES.map(|name| path.join(name)).into_iter().find(|file| file.is_file());
            let file =
                file.ok_or_else(|| wrong(&path.display(), &format!("one of {NAMES:?} in it"), "none of them"))?;
            return Self::from_file(file);
        }
        if let Some((vocabulary, merges)) = byte_level_files(path) {
            return Self::from_merges(&path.display().to_string(), &read(&vocabulary)?, &read(&merges)?);
        }
        let name = path.display().to_string();
        let bytes = read(path)?;
        if path.extension().is_some_and(|extension| extension == "txt") {
            let text = String::from_utf8_lossy(&bytes);
            let pieces: Vec<&str> = text.lines().map(str::trim_end).collect();
            Self::from_pieces(&name, &pieces)
        } else {
            Self::from_bytes(&name, &bytes)
        }
    }

    /// A lower-casing BERT tokenizer of exactly these pieces, numbered in their order.
    ///
    /// # Errors
    ///
    /// [`DataError::Tokenizer`] when a special token is missing or a piece stands there twice.
    pub fn from_pieces(name: &str, pieces: &[impl AsRef<str>]) -> Result<Self, DataError> {
        let mut vocabulary = Map::new();
        for (id, piece) in pieces.iter().enumerate() {
            let piece = piece.as_ref();
            if vocabulary.insert(piece.to_owned(), json!(id)).is_some() {
                return Err(DataError::Tokenizer {
                    name: name.to_owned(),
                    expected: "each word piece once".to_owned(),
                    found: format!("{piece:?} again at {id}"),
                });
            }
        }
        let special = |token: &str| Some(added_token(token, vocabulary.get(token)?, false));
        let id = |token: &str| vocabulary.get(token).cloned().unwrap_or(json!(0));
        let file = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": BERT_SPECIALS.iter().filter_map(|token| special(token)).collect::<Vec<_>>(),
            "normalizer": {
                "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "strip_accents": null, "lowercase": true,
            },
            "pre_tokenizer": { "type": "BertPreTokenizer" },
            "post_processor": {
                "type": "BertProcessing",
                "sep": ["[SEP]", id("[SEP]")], "cls": ["[CLS]", id("[CLS]")],
            },
            "decoder": { "type": "WordPiece", "prefix": CONTINUES, "cleanup": true },
            "model": {
                "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": CONTINUES,
                "max_input_chars_per_word": 100, "vocab": vocabulary,
            },
        });
        Self::from_bytes(name, file.to_string().as_bytes())
    }

    /// RoBERTa's byte-level tokenizer of the contents of a `vocab.json`, which numbers the pieces, and of a `merges.txt`, which
    /// says in what order bytes grow together; `name` is for messages.
    ///
    /// # Errors
    ///
    /// [`DataError::Tokenizer`] when these are not such files or a special token is missing.
    pub fn from_merges(name: &str, vocabulary: &[u8], merges: &[u8]) -> Result<Self, DataError> {
        let expected = "the content of a vocab.json, numbers of pieces";
        let vocabulary: Map<String, Value> =
            serde_json::from_slice(vocabulary).map_err(|error| wrong(&name, expected, &error.to_string()))?;
        if let Some((piece, value)) = vocabulary.iter().find(|(_, value)| value.as_u64().is_none()) {
            return Err(wrong(&name, expected, &format!("{piece:?}: {}", excerpt(&value.to_string()))));
        }
        let text = String::from_utf8_lossy(merges);
        let mut pairs: Vec<[&str; 2]> = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            match line.trim_end().split_once(' ') {
                // The first line tells the version of the format.
                _ if i == 0 && line.starts_with("#version") => {}
                Some((left, right)) if !right.contains(' ') => pairs.push([left, right]),
                _ => {
                    let found = format!("{:?} in line {}", excerpt(line), i + 1);
                    return Err(wrong(&name, "the content of a merges.txt, two pieces a line", &found));
                }
            }
        }
        let id = |token: &str| vocabulary.get(token).cloned().unwrap_or(json!(0));
        let special = |token: &str| {
            let id = vocabulary.get(token)?;
            // As RoBERTa's tokenizer has it, a blank takes the space before it with it.
            Some(added_token(token, id, token == ROBERTA_SPECIALS[4]))
        };
        let file = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": ROBERTA_SPECIALS.iter().filter_map(|token| special(token)).collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            "post_processor": {
                "type": "RobertaProcessing", "sep": ["</s>", id("</s>")], "cls": ["<s>", id("<s>")],
                "trim_offsets": true, "add_prefix_space": false,
            },
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "fuse_unk": false, "vocab": vocabulary, "merges": pairs,
            },
        });
        Self::from_bytes(name, file.to_string().as_bytes())
    }
}

fn added_token(token: &str, id: &Value, lstrip: bool) -> Value {
    json!({
        "id": id, "content": token, "special": true, "normalized": false,
        "single_word": false, "lstrip": lstrip, "rstrip": false,
    })
}

/// `vocab.json` and `merges.txt`, if the file is one of them; with a prefix, such as `roberta-base-`, if both are there.
fn byte_level_files(path: &Path) -> Option<(PathBuf, PathBuf)> {
    const NAMES: [&str; 2] = ["vocab.json", "merges.txt"];
    let name = path.file_name()?.to_str()?;
    let prefix = NAMES.iter().find_map(|end| name.strip_suffix(end))?;
    let [vocabulary, merges] = NAMES.map(|end| path.with_file_name(format!("{prefix}{end}")));
    let meant = prefix.is_empty() || (vocabulary.is_file() && merges.is_file());
    meant.then_some((vocabulary, merges))
}

fn read(path: &Path) -> Result<Vec<u8>, DataError> {
    std::fs::read(path).map_err(|source| io_error(path, source))
}

fn wrong(name: &dyn std::fmt::Display, expected: &str, found: &str) -> DataError {
    DataError::Tokenizer { name: name.to_string(), expected: expected.to_owned(), found: found.to_owned() }
}
