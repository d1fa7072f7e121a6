//! `xvlm data check`: what is wrong with a data set.

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;
use xvlm::data::check::{CheckConfig, check};

use super::{Shards, counts};
use crate::output::{self, CliError};
use crate::progress::Stage;

/// Look through every record of a data set, and name each that is broken
///
/// Every image is decoded, every box has to be inside of its image, every text has to have a word. A broken record is
/// named on stderr with its file, its place in it, the field and the reason. More of them than allowed are an error.
#[derive(Args)]
pub(crate) struct Check {
    #[command(flatten)]
    shards: Shards,
    /// Do not decode the images: much faster, but boxes are not held against them
    #[arg(long)]
    no_images: bool,
    /// Share of broken records past which the check fails
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    max_bad_fraction: f64,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    records: u64,
    captions: u64,
    elems: u64,
    questions: u64,
    repeated_images: u64,
    broken: u64,
    reasons: BTreeMap<String, u64>,
}

impl Check {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let dataset = self.shards.open()?;
        let config = CheckConfig { images: !self.no_images, ..CheckConfig::default() };
        let findings = Stage::run("records", |at| {
            let broken = &mut |message: &str| output::say(message);
            let all = dataset.found().try_into().unwrap_or(usize::MAX);
            check(&dataset, &config, broken, &mut |seen| at(seen as usize, all.max(seen as usize)))
        })?;
        let report = Report {
            records: findings.records,
            captions: findings.captions,
            elems: findings.elems,
            questions: findings.questions,
            repeated_images: findings.repeated_images,
            broken: findings.broken.total(),
            reasons: findings.broken.reasons().clone(),
        };
        output::print(self.json, &report, |report| {
            let mut rows = counts([
                ("whole records", report.records),
                ("captions", report.captions),
                ("elements", report.elems),
                ("questions", report.questions),
                ("repeated images", report.repeated_images),
                ("broken records", report.broken),
            ]);
            rows.extend(counts(report.reasons.iter().map(|(reason, count)| (reason.as_str(), *count))));
            output::table(&rows)
        })?;
        Ok(findings.check_broken(self.max_bad_fraction)?)
    }
}
