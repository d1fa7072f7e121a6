//! `xvlm eval fill`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use xvlm::data::annotations::Reading;
use xvlm::metrics::fill::FillScores;
use xvlm::tasks::fill::{self, Completing, LONGER};

use super::reading::Aside;
use super::{Common, count, percent};
use crate::output::{CliError, Rows};
use crate::share;

/// Words for blanks: the right one first, or among the first five, in percent
#[derive(Args)]
pub(crate) struct Fill {
    /// Folder with fill.json
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Most words in a blank
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    words: u8,
    /// How much less likely, before the picture is asked, each word piece beyond one for every word makes a completion (0 to 1)
    #[arg(long, value_name = "FACTOR", default_value_t = LONGER, value_parser = share::<f32>)]
    longer: f32,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    scores: FillScores,
    #[serde(flatten)]
    aside: Aside,
}

impl Fill {
    pub(super) fn run(self) -> Result<(), CliError> {
        let name = self.data.display().to_string();
        let words = usize::from(self.words);
        let search = Completing { words, pieces: words + 2, longer: self.longer, ..Completing::default() };
        let files = [self.data.join("fill.json")];
        let loaded = self.common.read(&files, |strict| Reading { strict, ..Reading::default() }.fill(&files))?;
        let (items, skipped) = (loaded.items, loaded.report);
        let done = self.common.evaluate("blanks", &name, |model, sweep| fill::evaluate(model, items, search, sweep))?;
        let Some(done) = done else { return Ok(()) };
        let report = Report { scores: done.scores, aside: Aside { result_file: None, skipped } };
        self.common.print("fill", &name, report, &done.left_out, |report| {
            [fill_rows(&report.scores), report.aside.rows()].concat()
        })
    }
}

pub(crate) fn fill_rows(scores: &FillScores) -> Rows {
    let mut rows = vec![percent("right word first", scores.top1), percent("among the first five", scores.top5)];
    rows.extend(scores.kinds.iter().map(|(kind, scores)| percent(format!("{kind} first"), scores.top1)));
    rows.push(count("blanks", scores.count));
    rows
}
