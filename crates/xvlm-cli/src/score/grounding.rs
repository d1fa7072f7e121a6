//! Phrases: how well predicted boxes, or points, agree with the true boxes.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use xvlm::data::Place;
use xvlm::data::annotations::{GroundingItem, Loaded, Reading};
use xvlm::metrics::boxes::{BoxScores, contains, refer_iou};

use super::read::{self, Item};
use super::{Common, check_splits, count, percent};
use crate::output::{CliError, Rows};

/// Phrases: boxes with an IoU of at least 0.5 with the truth, mean IoU, and points inside the truth, over all and by split
///
/// References are lists of X-VLM's form, or RefCOCO's refs(*).p with instances.json beside it; results are a list with an
/// entry for each phrase: its ref_id and a box, as `bbox` [x, y, w, h] in pixels or as the original's `pred` [cx, cy, w, h] in
/// fractions of the image; and, or instead, a `point` [x, y] in pixels.
#[derive(Args)]
pub(super) struct Grounding {
    /// Phrases with their boxes; repeatable
    #[arg(long, value_name = "FILE", required = true)]
    refs: Vec<PathBuf>,
    #[command(flatten)]
    common: Common,
    /// Only phrases of this split, where the references tell it; repeatable
    #[arg(long, value_name = "NAME")]
    split: Vec<String>,
}

#[derive(Serialize)]
struct Scores {
    #[serde(flatten)]
    all: Part,
    /// The same for each split (val, testA, testB), where the references tell it.
    splits: BTreeMap<String, Part>,
}

/// Scores of some phrases.
#[derive(Clone, Copy, Default, Serialize)]
struct Part {
    /// Absent if no result has a box.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    boxes: Option<BoxScores>,
    /// Points inside the true box, in percent; absent if no result has a point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pointing: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    points: Option<usize>,
}

/// What a result says of a phrase.
struct Found {
    iou: Option<f32>,
    hit: Option<bool>,
}

impl Grounding {
    pub(super) fn run(self) -> Result<(), CliError> {
        // The images themselves are not opened.
        let reading = Reading { images: Some("/".into()), splits: self.split.clone(), ..Reading::strict() };
        let Loaded { items: phrases, report } = reading.grounding(&self.refs)?;
        check_splits(&self.split, phrases.iter().filter_map(|phrase| phrase.split.as_deref()), &report)?;
        if phrases.is_empty() {
            return Err(read::wrong(&self.refs[0], Place::Whole, "references", "at least one phrase", "none"));
        }
        // Phrases of one object share an identifier, and the box: which is which does not matter.
        let mut wanted: HashMap<&str, (&GroundingItem, usize)> = HashMap::new();
        for phrase in &phrases {
            wanted.entry(&phrase.ref_id).or_insert((phrase, 0)).1 += 1;
        }
        let hyps = &self.common.hyps;
        let list: Value = read::document(hyps)?;
        let (mut found, mut unknown) = (Vec::new(), Vec::new());
        for item in read::items(hyps, "results", &list)? {
            let id = item.id("ref_id")?;
            match wanted.get_mut(id.as_str()) {
                None => unknown.push(id),
                Some((_, 0)) => return Err(item.wrong("ref_id", "no more results than phrases of this identifier")),
                Some((phrase, left)) => {
                    *left -= 1;
                    found.push((*phrase, compare(&item, phrase)?));
                }
            }
        }
        let mut missing = Vec::new();
        for phrase in &phrases {
            if let Some((_, left @ 1..)) = wanted.get_mut(phrase.ref_id.as_str()) {
                *left -= 1;
                missing.push(phrase.ref_id.as_str());
            }
        }
        let unknown: Vec<&str> = unknown.iter().map(String::as_str).collect();
        let coverage = self.common.pairing("phrases", "ref_id").cover(phrases.len(), &missing, &unknown)?;

        let mut splits: BTreeMap<&str, Vec<&Found>> = BTreeMap::new();
        for (phrase, found) in &found {
            if let Some(split) = &phrase.split {
                splits.entry(split).or_default().push(found);
            }
        }
        let scores = Scores {
            all: Part::of(&found.iter().map(|(_, found)| found).collect::<Vec<_>>()),
            splits: splits.into_iter().map(|(split, found)| (split.to_owned(), Part::of(&found))).collect(),
        };
        let each = || {
            let entry = |(phrase, found): &(&GroundingItem, Found)| {
                let mut entry = json!({"ref_id": phrase.ref_id});
                if let Some(iou) = found.iou {
                    entry["iou"] = iou.into();
                }
                if let Some(hit) = found.hit {
                    entry["hit"] = hit.into();
                }
                entry
            };
            found.iter().map(entry).collect()
        };
        self.common.print("grounding", &self.refs, scores, coverage, each, rows)
    }
}

fn compare(item: &Item<'_>, phrase: &GroundingItem) -> Result<Found, CliError> {
    let bbox = match (item.get("bbox"), item.get("pred")) {
        (Some(_), _) => Some(item.numbers::<4>("bbox")?),
        (None, Some(_)) => {
            let [cx, cy, w, h] = item.numbers::<4>("pred")?;
            let (width, height) = (phrase.width as f32, phrase.height as f32);
            let (w, h) = (w * width, h * height);
            Some([cx * width - w / 2.0, cy * height - h / 2.0, w, h])
        }
        (None, None) => None,
    };
    let point = item.get("point").map(|_| item.numbers::<2>("point")).transpose()?;
    if bbox.is_none() && point.is_none() {
        return Err(item.wrong("bbox", "a box [x, y, w, h], or `pred` or `point`"));
    }
    Ok(Found {
        iou: bbox.map(|bbox| refer_iou(phrase.bbox, bbox)),
        hit: point.map(|point| contains(phrase.bbox, point)),
    })
}

impl Part {
    fn of(found: &[&Found]) -> Self {
        let ious: Vec<f32> = found.iter().filter_map(|found| found.iou).collect();
        let hits: Vec<bool> = found.iter().filter_map(|found| found.hit).collect();
        let pointing = || 100.0 * hits.iter().filter(|&&hit| hit).count() as f64 / hits.len() as f64;
        Self {
            boxes: (!ious.is_empty()).then(|| BoxScores::from_ious(&ious)),
            pointing: (!hits.is_empty()).then(pointing),
            points: (!hits.is_empty()).then_some(hits.len()),
        }
    }
}

fn rows(scores: &Scores) -> Rows {
    let mut rows = Rows::new();
    let all = std::iter::once((None, &scores.all));
    let parts = all.chain(scores.splits.iter().map(|(split, part)| (Some(split), part)));
    for (split, part) in parts {
        if let Some(split) = split {
            rows.push((split.clone(), None));
        }
        if let Some(boxes) = &part.boxes {
            rows.push(percent("boxes with IoU ≥ 0.5", boxes.accuracy));
            rows.push(percent("mean IoU", boxes.mean_iou));
            rows.push(count("boxes", boxes.count));
        }
        rows.extend(part.pointing.map(|pointing| percent("points inside", pointing)));
        rows.extend(part.points.map(|points| count("points", points)));
    }
    rows
}
