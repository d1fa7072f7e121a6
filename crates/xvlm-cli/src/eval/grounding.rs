//! `xvlm eval grounding`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use xvlm::data::annotations::{Reading, Report};
use xvlm::metrics::boxes::BoxScores;
use xvlm::tasks::FinetuneConfig;
use xvlm::tasks::finetune::{FinetuneKind, FinetuneTask};
use xvlm::tasks::grounding::{
    BoxOptions, GroundingScores, Layers, TestSet, WeakOptions, WeakScores, evaluate, evaluate_weakly, write_results,
};
use xvlm::tasks::sweep::LeftOut;

use super::reading::{Aside, name_left_out};
use super::{Common, DataArgs, Source, count, percent};
use crate::output::{CliError, Rows};

/// Boxes of phrases: those with an IoU of at least 0.5 with the truth, and the mean IoU (both in percent)
///
/// With --weak, of a model that was never told a box: where it looks chooses among the boxes of a detector, or, where there
/// are none, is pointed at. With --out, what is found is written to DIR/grounding.json, with --weak to DIR/heat.json, which
/// `xvlm score grounding` reads: a list of {"ref_id", "bbox": [x, y, w, h]}, with --weak and a "point": [x, y].
#[derive(Args)]
pub(crate) struct Grounding {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    common: Common,
    /// Use heat maps of the matching head instead of the box head
    #[arg(long)]
    weak: bool,
    /// With --weak: the text layer whose cross attention is looked at [default: that of the configuration; with --data all
    /// that have one]
    #[arg(long, value_name = "N")]
    layer: Option<usize>,
    /// With --weak and --data: boxes to choose from, {image_id: [[x, y, w, h], …]}
    #[arg(long, value_name = "FILE", requires = "data")]
    proposals: Option<PathBuf>,
    /// Score as the original does: boxes are not cut at the borders of their image, and, with --weak, a phrase without a
    /// proposal that scores above 0 gets the box of the phrase before
    #[arg(long)]
    as_original: bool,
}

#[derive(Serialize)]
struct Told<T> {
    #[serde(flatten)]
    scores: T,
    #[serde(flatten)]
    aside: Aside,
}

impl Grounding {
    pub(super) fn run(self) -> Result<(), CliError> {
        if self.is_weak()? { self.weakly() } else { self.boxes() }
    }

    /// Whether heat maps are wanted: told, or by the name of a preset.
    fn is_weak(&self) -> Result<bool, CliError> {
        let named = match &self.data.preset {
            Some(name) => FinetuneConfig::preset(name, &self.data.set)?.task.kind() == FinetuneKind::WeakGrounding,
            None => false,
        };
        let weak = self.weak || named;
        let only_weak = [("--layer", self.layer.is_some()), ("--proposals", self.proposals.is_some())];
        match only_weak.into_iter().find(|(_, given)| *given && !weak) {
            Some((option, _)) => Err(CliError::Option { option, expected: "--weak with it", found: "none".to_owned() }),
            None => Ok(weak),
        }
    }

    fn boxes(&self) -> Result<(), CliError> {
        let (set, batch) = match self.data.open(FinetuneKind::Bbox)? {
            Source::Folder(folder) => (self.folder(folder)?, BoxOptions::default().batch),
            Source::Config(config) => match &config.task {
                FinetuneTask::Bbox(task) => {
                    let set = TestSet::of_boxes(task, self.common.max_bad_fraction)?;
                    name_left_out(&set.report);
                    (set, task.batch_size_test)
                }
                other => return Err(self.data.other_task(other)),
            },
        };
        let options = BoxOptions { batch, as_original: self.as_original };
        let name = self.data.name();
        let TestSet { items, report } = set;
        let done = self
            .common
            .evaluate("pictures of phrases", &name, |model, sweep| evaluate(model, items, &options, sweep))?;
        let Some(done) = done else { return Ok(()) };
        let found = done.boxes(&options).map(|bbox| (bbox, None));
        let file = self.common.sweep.write("grounding.json", |out| write_results(&done.items, found, out))?;
        self.print(&name, done.scores, (report, file), &done.left_out, |scores| {
            [grounding_rows(&scores.all), split_rows(scores)].concat()
        })
    }

    fn weakly(&self) -> Result<(), CliError> {
        let (mut set, options) = match self.data.open(FinetuneKind::WeakGrounding)? {
            Source::Folder(folder) => (self.folder(folder)?, WeakOptions::default()),
            Source::Config(config) => match &config.task {
                FinetuneTask::WeakGrounding(task) => {
                    let (layers, batch) = (Layers::One(task.block_num), task.batch_size_test);
                    let set = TestSet::of_weak(task, self.common.max_bad_fraction)?;
                    name_left_out(&set.report);
                    (set, WeakOptions { layers, batch, ..WeakOptions::default() })
                }
                other => return Err(self.data.other_task(other)),
            },
        };
        if let Some(file) = &self.proposals {
            set.propose(file)?;
        }
        let layers = self.layer.map_or(options.layers, Layers::One);
        let options = WeakOptions { layers, as_original: self.as_original, ..options };
        let name = self.data.name();
        let TestSet { items, report } = set;
        let done = self
            .common
            .evaluate("pictures of phrases", &name, |model, sweep| evaluate_weakly(model, items, &options, sweep))?;
        let Some(done) = done else { return Ok(()) };
        // A box that there is not is wrong.
        let found = done.answers.iter().map(|answer| (answer.bbox.unwrap_or_default(), Some(answer.point)));
        let file = self.common.sweep.write("heat.json", |out| write_results(&done.items, found, out))?;
        self.print(&name, done.scores, (report, file), &done.left_out, weak_rows)
    }

    /// The phrases of a folder.
    fn folder(&self, folder: &Path) -> Result<TestSet, CliError> {
        let files = [folder.join("grounding.json")];
        let loaded = self.common.read(&files, |strict| Reading { strict, ..Reading::default() }.grounding(&files))?;
        Ok(TestSet { items: loaded.items, report: loaded.report })
    }

    fn print<T: Serialize>(
        &self,
        name: &str,
        scores: T,
        (skipped, result_file): (Report, Option<PathBuf>),
        left_out: &[LeftOut],
        rows: impl Fn(&T) -> Rows,
    ) -> Result<(), CliError> {
        let told = Told { scores, aside: Aside { result_file, skipped } };
        self.common.print("grounding", name, told, left_out, |told| [rows(&told.scores), told.aside.rows()].concat())
    }
}

pub(crate) fn grounding_rows(scores: &BoxScores) -> Rows {
    vec![
        percent("boxes with IoU ≥ 0.5", scores.accuracy),
        percent("mean IoU", scores.mean_iou),
        count("phrases", scores.count),
    ]
}

fn split_rows(scores: &GroundingScores) -> Rows {
    let rows = |(split, scores): (&String, &BoxScores)| {
        [(split.clone(), None)].into_iter().chain(grounding_rows(scores)).collect::<Rows>()
    };
    scores.splits.iter().flat_map(rows).collect()
}

pub(crate) fn pointing_rows(scores: &WeakScores) -> Rows {
    vec![
        percent("phrases pointed at", scores.pointing),
        percent("by the maximum of the stretched map", scores.pointing_maximum),
    ]
}

fn weak_rows(scores: &WeakScores) -> Rows {
    let mut rows = pointing_rows(scores);
    rows.extend(
        scores.pointing_splits.iter().map(|(split, pointing)| percent(format!("{split} pointed at"), *pointing)),
    );
    let boxes = if scores.proposals { "boxes chosen among proposals" } else { "boxes drawn around the heat" };
    rows.push((boxes.to_owned(), None));
    rows.extend(grounding_rows(&scores.boxes.all));
    rows.extend(split_rows(&scores.boxes));
    if scores.cold > 0 {
        rows.push(count(if scores.proposals { "no proposal above 0" } else { "without heat" }, scores.cold));
    }
    rows
}
