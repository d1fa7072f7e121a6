//! Text: cleaning it, cutting it into word pieces, and putting pieces together again.

use tokenizers::models::wordpiece::WordPiece;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
    TokenizerImpl,
};

use crate::error::{DataError, excerpt};

mod cleaning;
mod files;

pub(crate) use cleaning::is_space;
pub use cleaning::{pre_caption, pre_question, text_key};

/// The special tokens of BERT, in the order [`TextTokenizer::from_vocabulary`] numbers them.
pub(crate) const BERT_SPECIALS: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
/// What RoBERTa calls the same.
const ROBERTA_SPECIALS: [&str; 5] = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"];
/// Marks a piece that continues a word (WordPiece).
pub(crate) const CONTINUES: &str = "##";
/// Marks a piece that begins a word (byte-level BPE: a space before it).
const BEGINS: char = 'Ġ';
/// More than any vocabulary has: a file should not claim memory for a table of as many entries as it likes.
const MOST_IDS: usize = 1 << 24;

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

/// A tokenizer of word pieces whose model is read as what it is: to find out what a model is, the library keeps its vocabulary in
/// other forms first.
type WordPieces =
    TokenizerImpl<WordPiece, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

fn read(bytes: &[u8]) -> tokenizers::Result<Tokenizer> {
    serde_json::from_slice::<WordPieces>(bytes).map_or_else(|_| Tokenizer::from_bytes(bytes), |read| Ok(read.into()))
}

impl TextTokenizer {
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
        // What the library does not expect of a file must not end the program.
        let read = std::panic::catch_unwind(|| read(bytes).map_err(|error| error.to_string()));
        let mut inner = read
            .unwrap_or_else(|_| Err("a part that its reader does not know".to_owned()))
            .map_err(|found| wrong("the content of a tokenizer.json", found))?;
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
        if size > MOST_IDS {
            return Err(wrong(&format!("identifiers below {MOST_IDS}"), (size - 1).to_string()));
        }
        let mut continues = vec![false; size];
        for (token, &id) in &vocabulary {
            continues[id as usize] = !specials.contains(&id)
                && if bytes_level { !token.starts_with(BEGINS) } else { token.starts_with(CONTINUES) };
        }
        Ok(Self { inner, name: name.to_owned(), specials, continues })
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
        Ok(self.with_specials(&self.tokens(text)?, max_tokens, sep))
    }

    /// `[CLS] pieces`, and `[SEP]` after them if `sep`; pieces beyond `max_tokens` in all are cut.
    #[must_use]
    pub fn with_specials(&self, pieces: &[u32], max_tokens: usize, sep: bool) -> Vec<u32> {
        let room = max_tokens.saturating_sub(1 + usize::from(sep));
        let mut ids = vec![self.cls_id()];
        ids.extend(&pieces[..pieces.len().min(room)]);
        if sep {
            ids.push(self.sep_id());
        }
        ids
    }

    /// The identifiers of a text that is tokens already, with single spaces between them; what is no token is unknown.
    #[must_use]
    pub fn token_ids(&self, text: &str) -> Vec<u32> {
        let text = text.trim_matches(is_space);
        let tokens = text.split(' ').filter(|_| !text.is_empty());
        tokens.map(|token| self.token_to_id(token).unwrap_or(self.unk_id())).collect()
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
