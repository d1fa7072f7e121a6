//! Texts of batches: cleaned, cut into tokens, blanked and padded.

use rand::Rng;

use crate::error::DataError;
use crate::masking::{Masked, MaskingGenerator};
use crate::tokens::{TextTokenizer, is_space, pre_caption, pre_question, text_key};

/// Label of a position at which nothing is to be predicted.
pub const IGNORE: i64 = -100;

/// Texts of a batch, padded to the longest of them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TextBatch {
    /// The cleaned texts.
    pub texts: Vec<String>,
    /// Number of texts, `B`.
    pub rows: usize,
    /// Tokens of the longest, `T`.
    pub len: usize,
    /// `[B·T]`: `[CLS] pieces`, then padding.
    pub ids: Vec<u32>,
    /// `[B·T]`: 1 at tokens, 0 at padding.
    pub mask: Vec<f32>,
    /// `[B·T]`: [`Self::ids`] with blanks.
    pub masked_ids: Vec<u32>,
    /// `[K]`: where something is to be predicted, as `row · T + column`.
    pub masked_positions: Vec<u32>,
    /// `[K]`: the original token there.
    pub masked_labels: Vec<i64>,
    /// `[B]`: equal for texts that belong to the same thing: equal texts ([`text_key`]), or texts of the same image where
    /// the kind of batch says so.
    pub keys: Vec<i64>,
}

/// Rows for a text decoder, padded to the longest of them: `[CLS] prompt caption [SEP]`, or
/// `[CLS] question answer [SEP]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationBatch {
    /// Number of rows, `B`.
    pub rows: usize,
    /// Tokens of the longest, `T`.
    pub len: usize,
    /// `[B·T]`.
    pub ids: Vec<u32>,
    /// `[B·T]`: 1 at tokens, 0 at padding.
    pub mask: Vec<f32>,
    /// `[B·T]`: the token that should follow each position; [`IGNORE`] inside the prompt or question,
    /// at `[SEP]` and at padding.
    pub labels: Vec<i64>,
    /// `[B]`: the image of each row.
    pub image_index: Vec<u32>,
}

/// How texts become tokens.
#[derive(Debug)]
pub(super) struct TextMaker<'a> {
    pub(super) tokenizer: &'a TextTokenizer,
    pub(super) max_words: usize,
    pub(super) max_tokens: usize,
    /// Whether `[SEP]` ends texts.
    pub(super) append_sep: bool,
    /// Whether texts are tokens already, with single spaces between them.
    pub(super) tokenized: bool,
    pub(super) masking: Option<&'a MaskingGenerator>,
}

/// A text, ready for a batch.
#[derive(Debug, Clone)]
pub(super) struct Text {
    pub(super) text: String,
    pub(super) ids: Vec<u32>,
    pub(super) masked: Masked,
    pub(super) key: i64,
}

/// A row for a decoder.
#[derive(Debug)]
pub(super) struct Row {
    ids: Vec<u32>,
    /// How many of them are given.
    prompt: usize,
}

impl TextMaker<'_> {
    /// A caption or a phrase: cleaned, cut and, with `masking`, blanked.
    pub(super) fn text(&self, text: &str, rng: &mut impl Rng) -> Result<Text, DataError> {
        let cleaned = self.clean(text)?;
        let pieces = self.pieces(&cleaned)?;
        if pieces.is_empty() {
            return Err(DataError::EmptyText { text: text.to_owned() });
        }
        let key = text_key(&cleaned).cast_signed();
        Ok(self.finish(cleaned, pieces, key, self.append_sep, rng))
    }

    /// A question; what cleaning leaves nothing of is `[CLS]` alone.
    pub(super) fn question(&self, text: &str, rng: &mut impl Rng) -> Result<Text, DataError> {
        let cleaned = self.clean_question(text);
        let (pieces, key) = (self.pieces(&cleaned)?, text_key(&cleaned).cast_signed());
        Ok(self.finish(cleaned, pieces, key, self.append_sep, rng))
    }

    /// An answer as written, `[CLS] answer [SEP]`.
    pub(super) fn answer(&self, text: &str, rng: &mut impl Rng) -> Result<Text, DataError> {
        let pieces = self.pieces(text)?;
        if pieces.is_empty() {
            return Err(DataError::EmptyText { text: text.to_owned() });
        }
        Ok(self.finish(text.to_owned(), pieces, text_key(text).cast_signed(), true, rng))
    }

    fn finish(&self, text: String, pieces: Vec<u32>, key: i64, sep: bool, rng: &mut impl Rng) -> Text {
        let ids = self.tokenizer.with_specials(&pieces, self.max_tokens, sep);
        let masked = match self.masking {
            Some(masking) => masking.mask(&ids, self.tokenizer, rng),
            None => Masked { ids: ids.clone(), ..Masked::default() },
        };
        Text { text, ids, masked, key }
    }

    fn clean(&self, text: &str) -> Result<String, DataError> {
        if self.tokenized { Ok(strip(text)) } else { pre_caption(text, self.max_words) }
    }

    fn clean_question(&self, text: &str) -> String {
        if self.tokenized { strip(text) } else { pre_question(text, self.max_words) }
    }

    fn pieces(&self, cleaned: &str) -> Result<Vec<u32>, DataError> {
        if self.tokenized { Ok(self.tokenizer.token_ids(cleaned)) } else { self.tokenizer.tokens(cleaned) }
    }

    /// Pieces of a text that goes on after another: byte-level pieces tell by a space that they begin a word.
    fn pieces_after(&self, cleaned: &str) -> Result<Vec<u32>, DataError> {
        if self.tokenized { self.pieces(cleaned) } else { self.tokenizer.tokens(&format!(" {cleaned}")) }
    }

    /// `[CLS] prompt caption [SEP]`. The prompt is short and says what to do: the caption is what gets cut.
    pub(super) fn caption_row(&self, prompt: &str, caption: &str) -> Result<Row, DataError> {
        let prompt = self.tokenizer.tokens(prompt.trim())?;
        let target = self.pieces_after(&self.clean(caption)?)?;
        let room = self.max_tokens.saturating_sub(2 + prompt.len()).max(1);
        Ok(self.row(&prompt, &target[..target.len().min(room)]))
    }

    /// `[CLS] question answer [SEP]`. The question is what gets cut.
    pub(super) fn answer_row(&self, question: &str, answer: &str) -> Result<Row, DataError> {
        let prompt = self.pieces(&self.clean_question(question))?;
        let target = self.pieces_after(&self.clean(answer)?)?;
        let room = self.max_tokens.saturating_sub(2).max(1);
        let target = &target[..target.len().min(room)];
        Ok(self.row(&prompt[..prompt.len().min(room - target.len())], target))
    }

    fn row(&self, prompt: &[u32], target: &[u32]) -> Row {
        let (cls, sep) = ([self.tokenizer.cls_id()], [self.tokenizer.sep_id()]);
        Row { ids: [&cls, prompt, target, &sep].concat(), prompt: 1 + prompt.len() }
    }

    pub(super) fn collate(&self, texts: Vec<Text>) -> TextBatch {
        let (rows, pad) = (texts.len(), self.tokenizer.pad_id());
        let len = texts.iter().map(|text| text.ids.len()).max().unwrap_or(0);
        let mut batch = TextBatch { rows, len, ..TextBatch::default() };
        for (row, text) in texts.into_iter().enumerate() {
            push_row(&mut batch.ids, &text.ids, pad, len);
            push_row(&mut batch.mask, &vec![1.0; text.ids.len()], 0.0, len);
            push_row(&mut batch.masked_ids, &text.masked.ids, pad, len);
            let start = (row * len) as u32;
            batch.masked_positions.extend(text.masked.positions.iter().map(|p| start + p));
            batch.masked_labels.extend(text.masked.labels.iter().map(|&label| i64::from(label)));
            batch.keys.push(text.key);
            batch.texts.push(text.text);
        }
        batch
    }

    /// Rows, each with its image.
    pub(super) fn collate_rows(&self, rows: &[(u32, &Row)]) -> GenerationBatch {
        let pad = self.tokenizer.pad_id();
        let len = rows.iter().map(|(_, row)| row.ids.len()).max().unwrap_or(0);
        let mut batch = GenerationBatch { rows: rows.len(), len, ..GenerationBatch::default() };
        for &(image, row) in rows {
            // A position's label is the token after it, from the last given token on.
            let mut labels = vec![IGNORE; row.prompt - 1];
            labels.extend(row.ids[row.prompt..].iter().map(|&id| i64::from(id)));
            push_row(&mut batch.ids, &row.ids, pad, len);
            push_row(&mut batch.mask, &vec![1.0; row.ids.len()], 0.0, len);
            push_row(&mut batch.labels, &labels, IGNORE, len);
            batch.image_index.push(image);
        }
        batch
    }
}

fn strip(text: &str) -> String {
    text.trim_matches(is_space).to_owned()
}

/// Appends `values` and as much padding as makes them `len`.
fn push_row<V: Copy>(to: &mut Vec<V>, values: &[V], padding: V, len: usize) {
    let end = to.len() + len;
    to.extend_from_slice(values);
    to.resize(end, padding);
}
