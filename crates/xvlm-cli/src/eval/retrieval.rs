//! `xvlm eval retrieval`.

use clap::Args;
use serde::Serialize;
use xvlm::data::annotations::{Reading, RetrievalItem};
use xvlm::metrics::retrieval::RetrievalScores;
use xvlm::tasks::finetune::{FinetuneKind, FinetuneTask};
use xvlm::tasks::retrieval::{self, Options};

use super::reading::Aside;
use super::{Common, DataArgs, Source, count, percent};
use crate::output::{CliError, Rows};
use crate::score::check_splits;

/// Texts found by their picture and pictures found by their text: recall at 1, 5 and 10 in percent
///
/// The nearest by embedding are matched, both ways. With --out, retrieval.json has what was found, as `xvlm score retrieval`
/// reads it.
#[derive(Args)]
pub(crate) struct Retrieval {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    common: Common,
    /// How many of the nearest by embedding are ranked again by matching, both ways [default: that of the configuration, or 16]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    k_test: Option<u32>,
    /// Split to evaluate on, where files tell splits, such as test; repeatable
    #[arg(long, value_name = "NAME")]
    split: Vec<String>,
    /// Memory for encoded texts, in MiB; beyond that they are encoded again as they are needed
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    text_memory: u32,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    scores: RetrievalScores,
    /// Pictures and texts that were searched with.
    images: usize,
    texts: usize,
    #[serde(flatten)]
    aside: Aside,
}

impl Retrieval {
    pub(super) fn run(self) -> Result<(), CliError> {
        let (files, images, options) = match self.data.open(FinetuneKind::Retrieval)? {
            Source::Folder(folder) => (vec![folder.join("retrieval.json")], None, Options::new(16)),
            Source::Config(config) => {
                let FinetuneTask::Retrieval(task) = config.task else {
                    return Err(self.data.other_task(&config.task));
                };
                let (batch_size, batch_size_text) = (task.batch_size_test, task.batch_size_test_text);
                let options = Options { batch_size, batch_size_text, ..Options::new(task.k_test) };
                (task.test_file, Some(task.image_root), options)
            }
        };
        let k_test = self.k_test.map_or(options.k_test, |k_test| k_test as usize);
        let options = Options { k_test, memory_mib: self.text_memory as usize, ..options };
        let reading = Reading { images, splits: self.split.clone(), ..Reading::default() };
        let loaded = self.common.read(&files, |strict| Reading { strict, ..reading }.retrieval(&files))?;
        let told = loaded.items.iter().filter_map(|item| item.split.as_deref());
        check_splits(&self.split, told, &loaded.report)?;
        let (items, skipped, name): (Vec<RetrievalItem>, _, String) = (loaded.items, loaded.report, self.data.name());
        let done = self
            .common
            .evaluate("pictures", &name, |model, sweep| retrieval::evaluate(model, &items, options, sweep))?;
        let Some(done) = done else { return Ok(()) };
        let result_file = self.common.sweep.write_json("retrieval.json", &done.results())?;
        let (images, texts) = (done.images.len(), done.texts.len());
        let report = Report { scores: done.scores, images, texts, aside: Aside { result_file, skipped } };
        self.common.print("retrieval", &name, report, &done.left_out, |report| {
            let mut rows = retrieval_rows(&report.scores);
            rows.extend([count("pictures", report.images), count("texts", report.texts)]);
            rows.extend(report.aside.rows());
            rows
        })
    }
}

pub(crate) fn retrieval_rows(scores: &RetrievalScores) -> Rows {
    vec![
        percent("text of a picture, R@1", scores.text_r1),
        percent("text of a picture, R@5", scores.text_r5),
        percent("text of a picture, R@10", scores.text_r10),
        percent("picture of a text, R@1", scores.image_r1),
        percent("picture of a text, R@5", scores.image_r5),
        percent("picture of a text, R@10", scores.image_r10),
    ]
}
