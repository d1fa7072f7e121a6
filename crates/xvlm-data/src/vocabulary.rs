//! Learning a vocabulary from texts: WordPiece as BERT's, or byte-level pieces as RoBERTa's.
//!
//! The same texts give the same vocabulary, in whatever order they come. Only the different words are kept in memory.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use crate::error::DataError;
use crate::json::io_error;
use crate::storage::atomic;
use crate::tokens::{BERT_SPECIALS, CONTINUES, TextTokenizer};

/// RoBERTa's special tokens in the order it numbers them (but for its mask, which comes last there).
const ROBERTA_ORDER: [&str; 5] = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"];

/// What kind of pieces words are cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pieces {
    /// BERT's: lower case without accents; `##` marks pieces inside a word.
    #[default]
    WordPiece,
    /// RoBERTa's: bytes that grow together; `Ġ` marks pieces that begin a word.
    ByteLevel,
}

/// How a vocabulary is learnt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VocabularyConfig {
    /// What kind of pieces. Default WordPiece.
    pub pieces: Pieces,
    /// Most pieces, special tokens included. Default 30522, as many as BERT has.
    pub size: usize,
    /// Pairs of pieces that are seen less often do not grow together. Default 2.
    pub min_frequency: u64,
    /// Most different characters of WordPiece; words with others, the rarest, are not learnt from. Default 1000.
    pub max_alphabet: usize,
}

impl Default for VocabularyConfig {
    fn default() -> Self {
        Self { pieces: Pieces::WordPiece, size: 30522, min_frequency: 2, max_alphabet: 1000 }
    }
}

/// Learns a vocabulary.
#[derive(Debug)]
pub struct VocabularyLearner {
    config: VocabularyConfig,
    words: HashMap<String, u64>,
    texts: u64,
}

/// A learnt vocabulary.
#[derive(Debug)]
pub struct Vocabulary {
    /// The tokenizer of these pieces.
    pub tokenizer: TextTokenizer,
    /// The pieces in the order of their numbers.
    pub pieces: Vec<String>,
    /// Number of texts it was learnt from.
    pub texts: u64,
    /// Number of different words in them.
    pub words: usize,
    kind: Pieces,
}

impl VocabularyLearner {
    /// One that has seen nothing.
    #[must_use]
    pub fn new(config: VocabularyConfig) -> Self {
        Self { config, words: HashMap::new(), texts: 0 }
    }

    /// Counts the words of a text. It should be cleaned as the texts that will be tokenised, see
    /// [`pre_caption`](crate::pre_caption).
    ///
    /// # Errors
    ///
    /// [`DataError::Tokenizer`] when it cannot be cut into words.
    pub fn add(&mut self, text: &str) -> Result<(), DataError> {
        let wrong = |error: tokenizers::Error| learning("a text that can be cut into words", error.to_string());
        let mut normalized = NormalizedString::from(text);
        let words = match self.config.pieces {
            Pieces::WordPiece => {
                BertNormalizer::new(true, true, None, true).normalize(&mut normalized).map_err(wrong)?;
                let mut words = PreTokenizedString::from(normalized);
                BertPreTokenizer.pre_tokenize(&mut words).map_err(wrong)?;
                words
            }
            Pieces::ByteLevel => {
                let mut words = PreTokenizedString::from(normalized);
                ByteLevel::new(false, true, true).pre_tokenize(&mut words).map_err(wrong)?;
                words
            }
        };
        for (word, _, _) in words.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            match self.words.get_mut(word) {
                Some(count) => *count += 1,
                None => drop(self.words.insert(word.to_owned(), 1)),
            }
        }
        self.texts += 1;
        Ok(())
    }

    /// The vocabulary of what was added.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] when `size` is less than what single characters take; [`DataError::Tokenizer`] when there are no
    /// words.
    pub fn learn(mut self) -> Result<Vocabulary, DataError> {
        let (texts, words) = (self.texts, self.words.len());
        if self.words.is_empty() {
            return Err(learning("texts with at least one word", format!("{texts} texts without any")));
        }
        let first = match self.config.pieces {
            Pieces::WordPiece => self.word_piece_alphabet(),
            Pieces::ByteLevel => {
                let bytes: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
                ROBERTA_ORDER.map(str::to_owned).into_iter().chain(bytes.into_iter().map(String::from)).collect()
            }
        };
        if self.config.size < first.len() {
            return Err(DataError::Config {
                field: "size",
                expected: format!("at least {}, for special tokens and single characters", first.len()),
                found: self.config.size.to_string(),
            });
        }
        // The trainer numbers characters as it meets them, in no certain order; as special tokens they are numbered already.
        // Ties between pairs are decided by these numbers.
        let mut trainer = BpeTrainer::builder()
            .vocab_size(self.config.size)
            .min_frequency(self.config.min_frequency)
            .show_progress(false)
            .special_tokens(first.iter().map(|token| AddedToken::from(token.as_str(), true)).collect());
        if self.config.pieces == Pieces::WordPiece {
            trainer = trainer.continuing_subword_prefix(CONTINUES.to_owned());
        }
        let counts = std::mem::take(&mut self.words).into_iter().map(|(word, count)| (word.into(), count)).collect();
        let mut model = BPE::default();
        let wrong = |error: String| learning("words that can be learnt from", error);
        trainer.build().do_train(&counts, &mut model).map_err(|error| wrong(error.to_string()))?;

        let mut numbered: Vec<(u32, String)> = model.get_vocab().into_iter().map(|(piece, id)| (id, piece)).collect();
        numbered.sort_unstable();
        let pieces: Vec<String> = numbered.into_iter().map(|(_, piece)| piece).collect();
        let tokenizer = match self.config.pieces {
            Pieces::WordPiece => TextTokenizer::from_pieces(NAME, &pieces)?,
            Pieces::ByteLevel => {
                let written = serde_json::to_value(&model).map_err(|error| wrong(error.to_string()))?;
                let pairs = written["merges"].as_array().into_iter().flatten().filter_map(Value::as_array);
                let line = |pair: &Vec<Value>| pair.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ");
                let merges: Vec<String> = pairs.map(line).collect();
                TextTokenizer::from_merges(NAME, written["vocab"].to_string().as_bytes(), merges.join("\n").as_bytes())?
            }
        };
        Ok(Vocabulary { tokenizer, pieces, texts, words, kind: self.config.pieces })
    }

    /// The special tokens, the characters of the words, and those that stand inside of words as continuations. Words with rarer
    /// characters than there is room for are forgotten.
    fn word_piece_alphabet(&mut self) -> Vec<String> {
        let mut seen: HashMap<char, u64> = HashMap::new();
        for (word, count) in &self.words {
            word.chars().for_each(|c| *seen.entry(c).or_default() += count);
        }
        let mut alphabet: Vec<(u64, char)> = seen.into_iter().map(|(c, count)| (count, c)).collect();
        alphabet.sort_unstable_by(|(a, c), (b, d)| b.cmp(a).then(c.cmp(d)));
        alphabet.truncate(self.config.max_alphabet);
        let alphabet: BTreeSet<char> = alphabet.into_iter().map(|(_, c)| c).collect();
        self.words.retain(|word, _| word.chars().all(|c| alphabet.contains(&c)));
        let inside: BTreeSet<char> = self.words.keys().flat_map(|word| word.chars().skip(1)).collect();
        let specials = BERT_SPECIALS.map(str::to_owned).into_iter();
        let alone = alphabet.into_iter().map(String::from);
        specials.chain(alone).chain(inside.into_iter().map(|c| format!("{CONTINUES}{c}"))).collect()
    }
}

impl Vocabulary {
    /// Writes `tokenizer.json` and, of word pieces, `vocab.txt` into a folder; each file is there as a whole or not at all.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`].
    pub fn write(&self, folder: &Path) -> Result<(), DataError> {
        std::fs::create_dir_all(folder).map_err(|source| io_error(folder, source))?;
        write_whole(&folder.join("tokenizer.json"), &self.tokenizer.to_bytes())?;
        if self.kind == Pieces::WordPiece {
            let lines: String = self.pieces.iter().flat_map(|piece| [piece, "\n"]).collect();
            write_whole(&folder.join("vocab.txt"), lines.as_bytes())?;
        }
        Ok(())
    }
}

const NAME: &str = "learnt from texts";

fn learning(expected: &str, found: String) -> DataError {
    DataError::Tokenizer { name: NAME.to_owned(), expected: expected.to_owned(), found }
}

/// Writes beside the file, then puts it in its place.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let write = || {
        let mut file = atomic::beside(path)?;
        file.write_all(bytes)?;
        atomic::keep(file, path)
    };
    write().map_err(|source| io_error(path, source))
}
