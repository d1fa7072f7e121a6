//! `xvlm data vocab`: learns a vocabulary.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use xvlm::data::vocabulary::{Pieces, VocabularyConfig, VocabularyLearner};
use xvlm::data::{DataError, pre_caption};

use super::Shards;
use crate::output::{self, CliError};

/// Words of a text that are learnt from: all of them.
const ALL_WORDS: usize = usize::MAX;

/// Learn a vocabulary from the texts of a data set
///
/// The folder gets tokenizer.json and, of word pieces, vocab.txt; either can be the `tokenizer` of a run. The same texts
/// give the same vocabulary.
#[derive(Args)]
pub(crate) struct Vocab {
    #[command(flatten)]
    shards: Shards,
    /// A file of texts, one a line; repeatable
    #[arg(long, value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Most pieces, special tokens included
    #[arg(long, value_name = "N", default_value_t = VocabularyConfig::default().size)]
    size: usize,
    /// Pairs of pieces that are seen less often do not grow together
    #[arg(long, value_name = "N", default_value_t = VocabularyConfig::default().min_frequency)]
    min_frequency: u64,
    /// Byte-level pieces as RoBERTa's, instead of word pieces as BERT's
    #[arg(long)]
    byte_level: bool,
    /// Learn from the texts as they are, not cleaned as for training
    #[arg(long)]
    raw: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Learnt<'a> {
    out: &'a Path,
    pieces: usize,
    words: usize,
    texts: u64,
    broken: u64,
}

impl Vocab {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let Self { shards, texts, out, size, min_frequency, byte_level, raw, json } = self;
        let pieces = if byte_level { Pieces::ByteLevel } else { Pieces::WordPiece };
        let config = VocabularyConfig { pieces, size, min_frequency, ..VocabularyConfig::default() };
        let mut learner = VocabularyLearner::new(config);
        let mut add = |text: &str| match pre_caption(text, ALL_WORDS) {
            _ if raw => learner.add(text),
            Ok(cleaned) => learner.add(&cleaned),
            // Nothing is left of it, so there is nothing to learn.
            Err(DataError::EmptyText { .. }) => Ok(()),
            Err(error) => Err(error),
        };
        let mut broken = 0;
        for path in &texts {
            let file = File::open(path).map_err(CliError::io(path))?;
            for line in BufReader::new(file).lines() {
                add(&line.map_err(CliError::io(path))?)?;
            }
        }
        shards.open()?.visit(|record| match record {
            Ok(record) => record.texts().try_for_each(&mut add),
            Err(error) => {
                output::say(&format!("left out: {error}"));
                broken += 1;
                Ok(())
            }
        })?;
        let learnt = learner.learn()?;
        learnt.write(&out)?;
        let report =
            Learnt { out: &out, pieces: learnt.pieces.len(), words: learnt.words, texts: learnt.texts, broken };
        output::print(json, &report, |report| {
            let Learnt { pieces, words, texts, .. } = report;
            format!("{pieces} pieces of {words} words in {texts} texts, in {}", out.display())
        })
    }
}
