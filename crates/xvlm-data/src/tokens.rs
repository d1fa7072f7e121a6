//! Text: cleaning it, cutting it into word pieces, and putting pieces together again.

use std::path::Path;

use serde_json::json;
use tokenizers::{ModelWrapper, Tokenizer};

use crate::error::{DataError, excerpt};

/// The special tokens of BERT, in the order [`TextTokenizer::from_vocabulary`] numbers them.
const BERT_SPECIALS: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
/// What RoBERTa calls the same.
const ROBERTA_SPECIALS: [&str; 5] = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"];
/// Marks a piece that continues a word (WordPiece).
const CONTINUES: &str = "##";
/// Marks a piece that begins a word (byte-level BPE: a space before it).
const BEGINS: char = 'Ġ';

/// A tokenizer file with the special tokens X-VLM needs: WordPiece (BERT) or byte-level BPE (RoBERTa).
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    name: String,
    /// Identifiers of padding, unknown, class, separator and mask.
    specials: [u32; 5],
    /// Of each identifier, whether the piece continues a word.
    continues: Vec<bool>,
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`, or a `vocab.txt` with one word piece a line.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`]; [`DataError::Tokenizer`] when it is no tokenizer or lacks a special token.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| crate::json::io_error(path, source))?;
        let name = path.display().to_string();
        if path.extension().is_some_and(|extension| extension == "txt") {
            let text = String::from_utf8_lossy(&bytes);
            let pieces: Vec<&str> = text.lines().map(str::trim_end).collect();
            Self::from_pieces(&name, &pieces)
        } else {
            Self::from_bytes(&name, &bytes)
        }
    }

    /// Reads the content of a `tokenizer.json`; `name` is for messages.
    ///
    /// # Errors
    ///
    /// [`DataError::Tokenizer`] when it is no tokenizer or lacks a special token.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Self, DataError> {
        let wrong = |expected: &str, found: String| DataError::Tokenizer {
            name: name.to_owned(),
            expected: expected.to_owned(),
            found,
        };
        let mut inner = Tokenizer::from_bytes(bytes)
            .map_err(|error| wrong("the content of a tokenizer.json", error.to_string()))?;
        // Published files may pad or cut to a length of their own; batches do that here.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| wrong("a tokenizer that need not truncate", error.to_string()))?;

        let vocabulary = inner.get_vocab(true);
        let find = |names: &[&str; 5]| -> Option<[u32; 5]> {
            let mut ids = [0; 5];
            for (id, name) in ids.iter_mut().zip(names) {
                *id = *vocabulary.get(*name)?;
            }
            Some(ids)
        };
        let specials = find(&BERT_SPECIALS).or_else(|| find(&ROBERTA_SPECIALS)).ok_or_else(|| {
            let expected = format!("the tokens {BERT_SPECIALS:?} or {ROBERTA_SPECIALS:?}");
            wrong(&expected, format!("{} tokens without them", vocabulary.len()))
        })?;

        let bytes_level = matches!(inner.get_model(), ModelWrapper::BPE(_));
        let size = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
        let mut continues = vec![false; size];
        for (token, &id) in &vocabulary {
            continues[id as usize] = !specials.contains(&id)
                && if bytes_level { !token.starts_with(BEGINS) } else { token.starts_with(CONTINUES) };
        }
        Ok(Self { inner, name: name.to_owned(), specials, continues })
    }

    /// A lower-casing BERT tokenizer of exactly these pieces, numbered in their order.
    ///
    /// # Errors
    ///
    /// [`DataError::Tokenizer`] when a special token is missing or a piece stands there twice.
    pub fn from_pieces(name: &str, pieces: &[impl AsRef<str>]) -> Result<Self, DataError> {
        let mut vocabulary = serde_json::Map::new();
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
        let special = |token: &str| {
            let id = vocabulary.get(token)?;
            Some(json!({
                "id": id, "content": token, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            }))
        };
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

    /// A small BERT tokenizer: the special tokens, each of `words` (in lower case, in this order),
    /// then letters, digits and signs, alone and as continuations, so that no plain word is unknown.
    ///
    /// # Errors
    ///
    /// [`DataError::Tokenizer`], which no list of words should cause.
    pub fn from_vocabulary(words: &[String]) -> Result<Self, DataError> {
        let mut pieces: Vec<String> = Vec::new();
        let mut known = std::collections::HashSet::new();
        let mut add = |piece: String| {
            if known.insert(piece.clone()) {
                pieces.push(piece);
            }
        };
        BERT_SPECIALS.iter().for_each(|&token| add(token.to_owned()));
        let words = words.iter().flat_map(|word| word.split_whitespace());
        for word in words.filter(|word| !BERT_SPECIALS.contains(word)) {
            add(word.to_lowercase());
        }
        let alphabet = ('a'..='z').chain('0'..='9');
        alphabet.clone().for_each(|letter| add(letter.to_string()));
        alphabet.for_each(|letter| add(format!("{CONTINUES}{letter}")));
        (' '..='~').filter(char::is_ascii_punctuation).for_each(|sign| add(sign.to_string()));
        Self::from_pieces("of a list of words", &pieces)
    }

    /// The content of a `tokenizer.json` that [`Self::from_bytes`] reads back.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // Serialising what was deserialised does not fail.
        self.inner.to_string(true).unwrap_or_default().into_bytes()
    }

    /// One more than the largest identifier: rows the embedding table needs.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.continues.len()
    }

    /// Identifier of padding.
    #[must_use]
    pub fn pad_id(&self) -> u32 {
        self.specials[0]
    }

    /// Identifier of what has no pieces.
    #[must_use]
    pub fn unk_id(&self) -> u32 {
        self.specials[1]
    }

    /// Identifier of the token every text begins with.
    #[must_use]
    pub fn cls_id(&self) -> u32 {
        self.specials[2]
    }

    /// Identifier of the token that ends a text.
    #[must_use]
    pub fn sep_id(&self) -> u32 {
        self.specials[3]
    }

    /// Identifier of the blank.
    #[must_use]
    pub fn mask_id(&self) -> u32 {
        self.specials[4]
    }

    /// Whether the piece continues the word before it.
    #[must_use]
    pub fn continues_word(&self, id: u32) -> bool {
        self.continues.get(id as usize).copied().unwrap_or(false)
    }

    /// The word pieces of a text, without special tokens around them.
    ///
    /// # Errors
    ///
    /// [`DataError::Tokenizer`] when the tokenizer cannot represent the text.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, false);
        let encoding = encoding.map_err(|error| DataError::Tokenizer {
            name: self.name.clone(),
            expected: format!("pieces of {:?}", excerpt(text)),
            found: error.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// `[CLS] pieces`, and `[SEP]` after them if `sep`; pieces beyond `max_tokens` in all are cut.
    ///
    /// # Errors
    ///
    /// See [`Self::tokens`].
    pub fn encode(&self, text: &str, max_tokens: usize, sep: bool) -> Result<Vec<u32>, DataError> {
        let mut ids = vec![self.cls_id()];
        ids.extend(self.tokens(text)?);
        ids.truncate(max_tokens.saturating_sub(usize::from(sep)).max(1));
        if sep {
            ids.push(self.sep_id());
        }
        Ok(ids)
    }

    /// The text of pieces, special tokens left out.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let ids: Vec<u32> = ids.iter().copied().filter(|id| !self.specials.contains(id)).collect();
        self.inner.decode(&ids, true).unwrap_or_default()
    }

    /// The piece of an identifier.
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The identifier of a piece.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}

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

/// What Python's `\s` matches.
fn is_space(c: char) -> bool {
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

/// A 64-bit hash, stable between runs and machines; not for adversaries.
#[must_use]
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    /// Fraction of the golden ratio, as in Fibonacci hashing; odd, so that multiplying loses nothing.
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = bytes.len() as u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(MULTIPLIER);
        hash ^= hash >> 29;
    }
    hash = hash.wrapping_mul(MULTIPLIER);
    hash ^ (hash >> 32)
}
