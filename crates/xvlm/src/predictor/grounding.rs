//! Where texts point in a picture.

use serde::{Deserialize, Serialize};
use xvlm_tasks::grounding::{self, HeatMap, Layers, StretchedHeat};

use super::{View, Views};
use crate::Error;

/// A box in pixels of the picture as given.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PixelBox {
    /// Left edge.
    pub xmin: f32,
    /// Upper edge.
    pub ymin: f32,
    /// Right edge.
    pub xmax: f32,
    /// Lower edge.
    pub ymax: f32,
}

impl From<[f32; 4]> for PixelBox {
    /// From `(x, y, w, h)`.
    fn from([x, y, w, h]: [f32; 4]) -> Self {
        Self { xmin: x, ymin: y, xmax: x + w, ymax: y + h }
    }
}

impl PixelBox {
    /// As `(x, y, w, h)`.
    pub fn sides(&self) -> [f32; 4] {
        [self.xmin, self.ymin, self.xmax - self.xmin, self.ymax - self.ymin]
    }
}

/// Where a text points.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Grounding {
    /// The text.
    pub text: String,
    /// Its box.
    #[serde(rename = "box")]
    pub bounds: PixelBox,
    /// Probability that the text matches what is inside the box; none from a model without a matching head, such as one that
    /// was fine-tuned for boxes alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probability: Option<f32>,
}

/// Where a model looks while it matches a text with the picture: what it needs no box for to have learnt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Heated {
    /// The text.
    pub text: String,
    /// The box around the heat; see [`StretchedHeat::bounds`].
    #[serde(rename = "box")]
    pub bounds: PixelBox,
    /// Where it points, `(x, y)` in pixels; see [`HeatMap::point`].
    pub point: [f32; 2],
    /// Probability that the text tells the picture.
    pub probability: f32,
    /// The heat of each patch.
    #[serde(skip)]
    pub map: HeatMap,
    /// Width and height of the picture in pixels.
    #[serde(skip)]
    pub size: (u32, u32),
}

/// A box that was proposed, and how much of the heat is in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// Its place among those that were proposed, from 0.
    pub index: usize,
    /// The box.
    #[serde(rename = "box")]
    pub bounds: PixelBox,
    /// Heat inside, divided by the root of the area: to compare with others of the same text only.
    pub score: f32,
}

impl Heated {
    /// Ranks proposed boxes `(x, y, w, h)`, in pixels of the picture, by the heat inside; the best first, and of equal ones the
    /// earlier. Those without area are left out.
    ///
    /// # Errors
    /// If [`Self::map`] is not what its side says, or a side of [`Self::size`] is 0.
    pub fn rank(&self, proposals: &[[f32; 4]]) -> Result<Vec<Proposal>, Error> {
        let (width, height) = self.size;
        let scored = proposals.iter().zip(self.map.stretched(width, height)?.rank(proposals)).enumerate();
        let scored = scored.filter(|(_, ([_, _, w, h], _))| *w > 0.0 && *h > 0.0);
        let mut ranked: Vec<Proposal> =
            scored.map(|(index, (&bbox, score))| Proposal { index, bounds: bbox.into(), score }).collect();
        ranked.sort_by(|a, b| b.score.total_cmp(&a.score));
        Ok(ranked)
    }
}

impl View<'_> {
    /// Finds the box of each text.
    ///
    /// # Errors
    /// If a text is empty, or the model is made for another task.
    pub fn ground(&self, texts: &[&str]) -> Result<Vec<Grounding>, Error> {
        Ok(self.0.ground(texts)?.remove(0))
    }

    /// Finds where the model looks while it matches each text with the picture.
    ///
    /// # Errors
    /// If a text is empty, the model is made for another task, or it has no such layer.
    pub fn heat(&self, texts: &[&str], layers: Layers) -> Result<Vec<Heated>, Error> {
        Ok(self.0.heat(texts, layers)?.remove(0))
    }
}

impl Views<'_> {
    /// Finds the box of each text in each picture.
    ///
    /// # Errors
    /// As [`View::ground`].
    pub fn ground(&self, texts: &[&str]) -> Result<Vec<Vec<Grounding>>, Error> {
        let found = grounding::ground(self.model, &self.images, &self.about(texts))?;
        self.by_picture(texts, found, |(width, height), text, found| {
            let bounds = found.pixels(width, height).into();
            Ok(Grounding { text: text.to_owned(), bounds, probability: found.probability })
        })
    }

    /// Finds where the model looks while it matches each text with each picture.
    ///
    /// # Errors
    /// As [`View::heat`].
    pub fn heat(&self, texts: &[&str], layers: Layers) -> Result<Vec<Vec<Heated>>, Error> {
        let maps = grounding::heat_maps(self.model, &self.images, &self.about(texts), layers)?;
        self.by_picture(texts, maps, |(width, height), text, map: HeatMap| {
            // The stretched map is let go: of many large pictures and texts it is much more than all the rest.
            let bounds = map.stretched(width, height)?.bounds(StretchedHeat::SHARE).into();
            let (point, probability) = (map.point(width, height), map.probability);
            Ok(Heated { text: text.to_owned(), bounds, point, probability, map, size: (width, height) })
        })
    }
}
