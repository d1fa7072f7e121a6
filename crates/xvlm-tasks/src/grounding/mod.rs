//! Visual grounding (§3.3.2 of the paper): the box that a text means, and (§4.2) where a model looks that never saw one.

mod boxes;
mod data;
mod heat;
mod weak;

pub use boxes::{BoxOptions, Evaluation, Found, evaluate, ground, losses};
pub(crate) use data::training_phrases;
pub use data::{TestSet, write_results};
pub use heat::{Heat, HeatMap, Layers, StretchedHeat, heat, heat_maps};
pub use weak::{WeakAnswer, WeakEvaluation, WeakOptions, WeakScores, evaluate_weakly};

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use xvlm_data::annotations::GroundingItem;
use xvlm_data::{DataError, Picture, Place, pre_caption};
use xvlm_metrics::boxes::{BoxScores, refer_iou};

use crate::error::TaskError;
use crate::grouped::Grouped;
use crate::model::{ImageTokens, Model};
use crate::sweep::{Answers, Item, Sweep, Work};

impl Item for GroundingItem {
    fn image(&self) -> &Path {
        &self.image
    }

    fn text(&self) -> &str {
        &self.text
    }
}

/// How well the boxes of phrases are found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GroundingScores {
    /// Of all phrases.
    #[serde(flatten)]
    pub all: BoxScores,
    /// Of those of each split, where the data tell splits.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub splits: BTreeMap<String, BoxScores>,
}

impl GroundingScores {
    /// By REFER's rule, of a box `(x, y, w, h)` in pixels for each item; one that has none is wrong.
    fn of(items: &[GroundingItem], boxes: impl IntoIterator<Item = Option<[f32; 4]>>) -> Self {
        let overlap =
            |(item, found): (&GroundingItem, Option<[f32; 4]>)| found.map_or(0.0, |found| refer_iou(found, item.bbox));
        let overlaps: Vec<f32> = items.iter().zip(boxes).map(overlap).collect();
        let mut splits: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for (item, &overlap) in items.iter().zip(&overlaps) {
            if let Some(split) = &item.split {
                splits.entry(split.clone()).or_default().push(overlap);
            }
        }
        let splits = splits.into_iter().map(|(split, overlaps)| (split, BoxScores::from_ious(&overlaps))).collect();
        Self { all: BoxScores::from_ious(&overlaps), splits }
    }
}

/// Refuses a phrase without a word, and a picture of another size than the item says: its box is of another picture.
fn check(item: &GroundingItem, picture: &Picture) -> Result<(), DataError> {
    pre_caption(&item.text, usize::MAX)?;
    let (found, expected) = ((picture.width(), picture.height()), (item.width, item.height));
    match found == expected {
        true => Ok(()),
        false => Err(DataError::Field {
            path: item.image.as_path().into(),
            place: Place::Whole,
            field: "size".to_owned(),
            expected: format!("{} x {} pixels, as annotated for reference {}", expected.0, expected.1, item.ref_id),
            found: format!("{} x {}", found.0, found.1),
        }),
    }
}

/// Asks about each item, with those of one image together wherever they stand in the list; answers are in its order.
fn ask<A: Serialize + DeserializeOwned>(
    sweep: &mut Sweep,
    work: &Work,
    model: &Model,
    items: &[GroundingItem],
    check: impl Fn(&GroundingItem, &Picture) -> Result<(), DataError> + Sync,
    ask: impl Fn(&ImageTokens, &[(u32, &str)]) -> Result<Vec<A>, TaskError>,
) -> Result<Answers<A>, TaskError> {
    let grouped = Grouped::by(items, |item| item.image_index);
    Ok(grouped.undo(sweep.by_image(work, model, &grouped.apply(items), check, ask)?))
}
