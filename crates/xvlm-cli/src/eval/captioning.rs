//! `xvlm eval captioning`.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use xvlm::Search;
use xvlm::data::annotations::{CaptionItem, Reading, read_references};
use xvlm::tasks::captioning::{self, CaptionScores, TruthScores};
use xvlm::tasks::finetune::{FinetuneKind, FinetuneTask};
use xvlm::tasks::{FinetuneConfig, TaskError};

use super::reading::Aside;
use super::{Common, DataArgs, Source, count, percent};
use crate::caption::WritingArgs;
use crate::output::{CliError, Rows, say};

/// Pictures at a time, where no configuration says how many.
const BATCH: usize = 32;

/// Captions against the reference captions: BLEU, ROUGE-L and CIDEr; on a folder of `xvlm synth` also against what is true
///
/// With --out, captions.json is the result file that COCO's evaluation reads.
#[derive(Args)]
pub(crate) struct Captioning {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    writing: WritingArgs,
    /// Pictures at a time [default: 32, or what the configuration says]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: Option<u16>,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Scores {
    #[serde(flatten)]
    words: Option<CaptionScores>,
    #[serde(flatten)]
    truth: Option<TruthScores>,
    captions: usize,
    wordless: Vec<String>,
    #[serde(flatten)]
    aside: Aside,
}

/// What a configuration says of its test.
struct Test<'a> {
    prompt: &'a str,
    search: Search,
    batch: usize,
    files: &'a [PathBuf],
    images: &'a Path,
    references: &'a Path,
}

/// Where the items come from.
enum OfItems<'a> {
    Folder(&'a Path),
    Test(Test<'a>),
}

impl<'a> Test<'a> {
    fn of(config: &'a FinetuneConfig) -> Option<Self> {
        macro_rules! test {
            ($task:ident) => {
                Self {
                    prompt: &$task.prompt,
                    search: $task.search,
                    batch: $task.batch_size_test,
                    files: &$task.test_file,
                    images: &$task.image_root,
                    references: &$task.test_gt_file,
                }
            };
        }
        match &config.task {
            FinetuneTask::Captioning(task) => Some(test!(task)),
            FinetuneTask::CaptioningScst(task) => Some(test!(task)),
            _ => None,
        }
    }

    fn with_references(&self, items: Vec<CaptionItem>) -> Result<Vec<CaptionItem>, TaskError> {
        let references = read_references(self.references)?;
        captioning::with_references(items, references, &self.references.display().to_string())
    }
}

impl Captioning {
    pub(super) fn run(self) -> Result<(), CliError> {
        // A configuration of either kind of training says how to test.
        let open = |kind| self.data.open(kind);
        let source =
            open(FinetuneKind::Captioning).or_else(|error| open(FinetuneKind::CaptioningScst).map_err(|_| error))?;
        let name = self.data.name();
        let of_items = match &source {
            Source::Folder(folder) => OfItems::Folder(folder),
            Source::Config(config) => {
                OfItems::Test(Test::of(config).ok_or_else(|| self.data.other_task(&config.task))?)
            }
        };
        let (files, images) = match &of_items {
            OfItems::Folder(folder) => (&[folder.join("captions.json")][..], None),
            OfItems::Test(test) => (test.files, Some(test.images.to_owned())),
        };
        let reading = Reading { images, ..Reading::default() };
        let loaded = self.common.read(files, |strict| Reading { strict, ..reading }.captions(files))?;
        let (items, skipped) = (loaded.items, loaded.report);
        if items.is_empty() {
            return Err(TaskError::Empty { what: name }.into());
        }
        let done = self.common.evaluate("captions", &name, |model, sweep| {
            let writing = captioning::Writing::of(model.config());
            let batch = |of_config: usize| self.batch_size.map_or(of_config, usize::from);
            match of_items {
                OfItems::Folder(folder) => {
                    captioning::evaluate_scenes(model, items, folder, &self.writing.of(writing), batch(BATCH), sweep)
                }
                OfItems::Test(test) => {
                    let writing = captioning::Writing { prompt: test.prompt.to_owned(), search: test.search };
                    let items = test.with_references(items)?;
                    captioning::evaluate(model, items, &self.writing.of(writing), batch(test.batch), sweep)
                }
            }
        })?;
        let Some(done) = done else { return Ok(()) };
        let write = |out: &mut dyn Write| captioning::write_results(&done.items, &done.answers, out);
        let result_file = self.common.sweep.write("captions.json", write)?;
        for id in done.wordless.iter().take(8) {
            say(&format!("without a word: image {id}"));
        }
        let (captions, aside) = (done.answers.len(), Aside { result_file, skipped });
        let scores = Scores { words: done.scores, truth: done.truth, captions, wordless: done.wordless, aside };
        self.common.print("captioning", &name, scores, &done.left_out, |scores| {
            let mut rows: Rows = scores.words.iter().flat_map(word_rows).collect();
            rows.extend(scores.truth.iter().flat_map(caption_rows));
            rows.push(count("captions", scores.captions));
            if !scores.wordless.is_empty() {
                rows.push(count("without a word", scores.wordless.len()));
            }
            rows.extend(scores.aside.rows());
            rows
        })
    }
}

/// Scores as papers print them: times 100.
fn word_rows(scores: &CaptionScores) -> Rows {
    let row = |name: &str, score: f64| (name.to_owned(), Some(format!("{:.1}", 100.0 * score)));
    vec![
        row("BLEU-1", scores.bleu1),
        row("BLEU-2", scores.bleu2),
        row("BLEU-3", scores.bleu3),
        row("BLEU-4", scores.bleu4),
        row("ROUGE-L", scores.rouge_l),
        row("CIDEr", scores.cider),
    ]
}

pub(crate) fn caption_rows(scores: &TruthScores) -> Rows {
    vec![
        percent("objects, colours and relation right", scores.right),
        percent("objects right", scores.objects),
        percent("colours right", scores.colours),
        percent("relation right", scores.relation),
        percent("all right, with sizes and textures", scores.all),
    ]
}
