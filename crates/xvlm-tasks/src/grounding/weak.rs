//! Boxes of a model that never saw one (§4.2 of the paper; `Grounding.py`): chosen among those of a detector by where the model
//! looks, or drawn around it.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;
use xvlm_data::annotations::GroundingItem;
use xvlm_data::{DataError, Picture};
use xvlm_metrics::boxes::{BoxScores, contains};

use super::GroundingScores;
use super::heat::{HeatMap, Layers, MADE_FOR, StretchedHeat, heat_maps};
use crate::BATCH;
use crate::error::TaskError;
use crate::model::{ImageTokens, Model};
use crate::sweep::{LeftOut, Sweep, Work};

/// How heat maps are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeakOptions {
    /// The layers that are looked at.
    pub layers: Layers,
    /// Images at a time.
    pub batch: usize,
    /// Where no proposal has a score above 0, answer with the box of the phrase before, as the original does. Otherwise the best
    /// proposal is the answer whatever its score is, and the first of several that are equal.
    pub as_original: bool,
}

impl Default for WeakOptions {
    fn default() -> Self {
        Self { layers: Layers::default(), batch: BATCH, as_original: false }
    }
}

/// Where a phrase points.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WeakAnswer {
    /// The heat map.
    pub map: HeatMap,
    /// [`HeatMap::point`].
    pub point: [f32; 2],
    /// [`StretchedHeat::maximum`].
    pub maximum: [f32; 2],
    /// `(x, y, w, h)` in pixels: the chosen proposal, or, where there are no proposals, the box around the heat
    /// ([`StretchedHeat::bounds`]). None only as the original would have it: the first phrases, if no proposal has a score above 0.
    pub bbox: Option<[f32; 4]>,
    /// Whether a proposal has a score above 0; without proposals, whether there is any heat.
    pub is_warm: bool,
}

/// How well a model points at what phrases mean.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct WeakScores {
    /// Phrases whose box has [`WeakAnswer::point`] in it, in percent.
    pub pointing: f64,
    /// Phrases whose box has [`WeakAnswer::maximum`] in it, in percent.
    pub pointing_maximum: f64,
    /// [`Self::pointing`] of each split, where the data tell splits.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pointing_splits: BTreeMap<String, f64>,
    /// Whether boxes are chosen among proposals; otherwise they are drawn around the heat.
    pub proposals: bool,
    /// Phrases for which no proposal has a score above 0, or for which there is no heat.
    pub cold: usize,
    /// The boxes.
    #[serde(flatten)]
    pub boxes: GroundingScores,
}

/// What the model found for each item of a data set, and the scores.
#[derive(Clone, Debug)]
pub struct WeakEvaluation {
    /// The items that have answers.
    pub items: Vec<GroundingItem>,
    /// What was found for each.
    pub answers: Vec<WeakAnswer>,
    /// Pointing accuracy; accuracy at an IoU of 0.5 and mean IoU, by the rule of the RefCOCO evaluation.
    pub scores: WeakScores,
    /// What has no answer.
    pub left_out: Vec<LeftOut>,
}

/// Finds what each phrase is about, and scores it. If any item has proposals, boxes are chosen among those, and items that have
/// none are left out, as are those whose image cannot be opened, or has another size than its annotation says, and phrases
/// without a word.
///
/// # Errors
/// If the model is made for another task or has no such layer, there are no items, or as [`Sweep::run`].
pub fn evaluate_weakly(
    model: &Model,
    items: Vec<GroundingItem>,
    options: &WeakOptions,
    sweep: &mut Sweep,
) -> Result<WeakEvaluation, TaskError> {
    model.fit_for("heat maps", MADE_FOR)?;
    options.layers.of(&model.config().model.text_config)?;
    let proposals = items.iter().any(|item| !item.proposals.is_empty());
    let check = |item: &GroundingItem, picture: &Picture| {
        super::check(item, picture)?;
        match proposals && item.proposals.iter().all(|bbox| !has_area(bbox)) {
            true => Err(DataError::MissingText {
                origin: format!("{}, reference {}", item.image.display(), item.ref_id),
                expected: "boxes of a detector to choose from",
            }),
            false => Ok(()),
        }
    };
    let work = Work { name: "heat", options: json!({"layers": options.layers}), batch: options.batch };
    let ask = |images: &ImageTokens, texts: &[(u32, &str)]| heat_maps(model, images, texts, options.layers);
    let (items, maps, left_out) = super::ask(sweep, &work, model, &items, check, ask)?.split(items);
    let answers = items.par_iter().zip(maps).map(|(item, map)| WeakAnswer::of(item, map, proposals));
    let mut answers = answers.collect::<Result<Vec<_>, TaskError>>()?;
    if options.as_original && proposals {
        repeat_boxes(&mut answers);
    }
    let scores = WeakScores::of(&items, &answers, proposals);
    Ok(WeakEvaluation { items, answers, scores, left_out })
}

/// As the original does: a phrase without a proposal that scores above 0 is answered with the box of the phrase before.
fn repeat_boxes(answers: &mut [WeakAnswer]) {
    let mut before = None;
    for answer in answers {
        match answer.is_warm {
            true => before = answer.bbox,
            false => answer.bbox = before,
        }
    }
}

fn has_area([_, _, w, h]: &[f32; 4]) -> bool {
    *w > 0.0 && *h > 0.0
}

impl WeakAnswer {
    fn of(item: &GroundingItem, map: HeatMap, proposals: bool) -> Result<Self, TaskError> {
        let stretched = map.stretched(item.width, item.height)?;
        let (bbox, is_warm) = match proposals {
            true => {
                let scores = stretched.rank(&item.proposals);
                let candidates = item.proposals.iter().zip(scores).filter(|(bbox, _)| has_area(bbox));
                let best = candidates.reduce(|best, other| if other.1 > best.1 { other } else { best });
                (best.map(|(bbox, _)| *bbox), best.is_some_and(|(_, score)| score > 0.0))
            }
            false => (Some(stretched.bounds(StretchedHeat::SHARE)), !map.is_cold()),
        };
        let (point, maximum) = (map.point(item.width, item.height), stretched.maximum());
        Ok(Self { map, point, maximum, bbox, is_warm })
    }
}

impl WeakScores {
    fn of(items: &[GroundingItem], answers: &[WeakAnswer], proposals: bool) -> Self {
        let pairs = || items.iter().zip(answers);
        let share = |of: &dyn Fn(&GroundingItem) -> bool, point: &dyn Fn(&WeakAnswer) -> [f32; 2]| {
            let right = pairs().filter(|(item, _)| of(item)).map(|(item, answer)| contains(item.bbox, point(answer)));
            let right: Vec<bool> = right.collect();
            100.0 * right.iter().filter(|&&right| right).count() as f64 / right.len().max(1) as f64
        };
        let boxes = GroundingScores::of(items, answers.iter().map(|answer| answer.bbox));
        let split = |split: &String| {
            let of = |item: &GroundingItem| item.split.as_ref() == Some(split);
            (split.clone(), share(&of, &|answer| answer.point))
        };
        Self {
            pointing: share(&|_| true, &|answer| answer.point),
            pointing_maximum: share(&|_| true, &|answer| answer.maximum),
            pointing_splits: boxes.splits.keys().map(split).collect(),
            proposals,
            cold: answers.iter().filter(|answer| !answer.is_warm).count(),
            boxes,
        }
    }

    /// Scores of the boxes of all phrases.
    pub fn all(&self) -> BoxScores {
        self.boxes.all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(proposals: &[[f32; 4]]) -> GroundingItem {
        GroundingItem {
            ref_id: "7".to_owned(),
            image: "a.png".into(),
            image_id: "a".to_owned(),
            image_index: 0,
            text: "a cup".to_owned(),
            bbox: [0.0, 0.0, 4.0, 4.0],
            height: 8,
            width: 8,
            split: Some("val".to_owned()),
            proposals: proposals.to_vec(),
        }
    }

    fn answer(values: [f32; 4], proposals: &[[f32; 4]]) -> WeakAnswer {
        let map = HeatMap { side: 2, values: values.to_vec(), probability: 0.5 };
        WeakAnswer::of(&item(proposals), map, true).unwrap()
    }

    #[test]
    fn the_hottest_proposal_is_chosen_even_where_none_is_warm() {
        let (left, right, none) = ([0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 4.0, 4.0], [1.0, 1.0, 0.0, 3.0]);
        let warm = answer([1.0, 0.0, 0.0, 0.0], &[none, right, left]);
        assert_eq!((warm.bbox, warm.is_warm), (Some(left), true));
        // All alike: the first that has area.
        let cold = answer([0.0; 4], &[none, right, left]);
        assert_eq!((cold.bbox, cold.is_warm), (Some(right), false));
        assert_eq!(cold.point, [4.0, 4.0]);

        let scores = WeakScores::of(&[item(&[]), item(&[])], &[warm.clone(), cold.clone()], true);
        assert_eq!((scores.pointing, scores.cold), (100.0, 1));
        assert_eq!((scores.all().accuracy, scores.all().mean_iou), (50.0, 50.0));
        assert_eq!(scores.pointing_splits["val"], 100.0);
        assert_eq!(scores.boxes.splits["val"].count, 2);

        let mut answers = vec![cold.clone(), warm, cold.clone(), cold];
        repeat_boxes(&mut answers);
        let boxes: Vec<_> = answers.iter().map(|answer| answer.bbox).collect();
        assert_eq!(boxes, [None, Some(left), Some(left), Some(left)]);
    }
}
