//! Pictures, regions and texts compared: matched, embedded, searched.

use serde::{Deserialize, Serialize};
use xvlm_data::Picture;
use xvlm_tasks::Source;
use xvlm_tasks::embed::{Found, Index, Query, SearchOptions};
use xvlm_tasks::matching::{self, Score};

use super::{PixelBox, Predictor, View};
use crate::Error;

/// Pictures that are encoded at a time.
const AT_ONCE: usize = 32;

/// How well a text tells a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Match {
    /// The text.
    pub text: String,
    /// Probability that the picture and the text belong together.
    pub probability: f32,
    /// Cosine of the picture's and the text's embeddings: what a search over many compares.
    pub similarity: f32,
}

fn named(texts: &[&str], scores: Vec<Score>) -> Vec<Match> {
    let scored = texts.iter().zip(scores);
    let named = scored.map(|(text, Score { probability, similarity })| Match {
        text: (*text).to_owned(),
        probability,
        similarity,
    });
    named.collect()
}

/// Regions that are encoded at a time, unless one picture has more: each has as many tokens as its picture.
const REGIONS: usize = 128;

/// Boxes of one picture as `(x, y, w, h)`.
fn boxes(regions: &[PixelBox]) -> Vec<(u32, [f32; 4])> {
    regions.iter().map(|region| (0, region.sides())).collect()
}

impl Predictor {
    /// Embeddings of pictures, of unit length.
    ///
    /// # Errors
    /// If the model is made for another task.
    pub fn embed_images(&self, pictures: &[Picture]) -> Result<Vec<Vec<f32>>, Error> {
        let mut embeddings = Vec::with_capacity(pictures.len());
        for pictures in pictures.chunks(AT_ONCE) {
            embeddings.extend(self.model.embed_images(&self.model.encode(pictures)?)?.to_vec2::<f32>()?);
        }
        Ok(embeddings)
    }

    /// Embeddings of regions of a picture, of unit length.
    ///
    /// # Errors
    /// If a box reaches outside the picture by more than a pixel, or the model is made for another task.
    pub fn embed_regions(&self, picture: &Picture, regions: &[PixelBox]) -> Result<Vec<Vec<f32>>, Error> {
        let concepts = matching::encode(&self.model, std::slice::from_ref(picture), &boxes(regions))?;
        match concepts.regions {
            Some(regions) => Ok(matching::embed(&self.model, &regions)?.to_vec2()?),
            None => Ok(Vec::new()),
        }
    }

    /// Says how well each text tells each picture: a row a picture. Pictures are encoded 32 at a time, and the texts
    /// once for each 32.
    ///
    /// # Errors
    /// If a text has no words, or the model is made for another task.
    pub fn match_images(&self, pictures: &[Picture], texts: &[&str]) -> Result<Vec<Vec<Match>>, Error> {
        let mut matches = Vec::with_capacity(pictures.len());
        for pictures in pictures.chunks(AT_ONCE) {
            let images = Source::images(&self.model.encode(pictures)?)?;
            let scores = matching::scores(&self.model, &images, texts)?;
            matches.extend(scores.into_iter().map(|scores| named(texts, scores)));
        }
        Ok(matches)
    }

    /// Says how well each text tells each region of a picture: a row a region.
    ///
    /// # Errors
    /// If a text has no words, a box reaches outside the picture by more than a pixel, or the model is made for another task.
    pub fn match_regions(
        &self,
        picture: &Picture,
        regions: &[PixelBox],
        texts: &[&str],
    ) -> Result<Vec<Vec<Match>>, Error> {
        Ok(self.match_regions_of(std::slice::from_ref(picture), regions, texts)?.remove(0))
    }

    /// Says how well each text tells each region of each picture; the regions are the same of all pictures.
    ///
    /// # Errors
    /// As [`Self::match_regions`].
    pub fn match_regions_of(
        &self,
        pictures: &[Picture],
        regions: &[PixelBox],
        texts: &[&str],
    ) -> Result<Vec<Vec<Vec<Match>>>, Error> {
        let Some(at_once) = REGIONS.checked_div(regions.len()) else { return Ok(vec![Vec::new(); pictures.len()]) };
        let mut matches = Vec::with_capacity(pictures.len());
        for pictures in pictures.chunks(at_once.clamp(1, AT_ONCE)) {
            let of = |picture| regions.iter().map(move |region| (picture, region.sides()));
            let boxes: Vec<(u32, [f32; 4])> = (0..pictures.len() as u32).flat_map(of).collect();
            let concepts = matching::encode(&self.model, pictures, &boxes)?;
            let Some(source) = concepts.regions else { continue };
            let scores = matching::scores(&self.model, &source, texts)?;
            let mut rows = scores.into_iter().map(|scores| named(texts, scores));
            matches.extend(pictures.iter().map(|_| rows.by_ref().take(regions.len()).collect::<Vec<_>>()));
        }
        Ok(matches)
    }

    /// Searches in embeddings that `xvlm embed` has filed, or that [`Index::of_pictures`] has made.
    ///
    /// # Errors
    /// As [`Index::search`].
    pub fn search(&self, index: &Index, queries: &[Query], options: SearchOptions) -> Result<Vec<Found>, Error> {
        index.search(&self.model, queries, options)
    }
}

impl View<'_> {
    /// Says how well each text tells the picture.
    ///
    /// # Errors
    /// If a text is empty.
    pub fn matches(&self, texts: &[&str]) -> Result<Vec<Match>, Error> {
        let scores = matching::scores(self.0.model, &Source::images(&self.0.images)?, texts)?.remove(0);
        Ok(named(texts, scores))
    }
}
