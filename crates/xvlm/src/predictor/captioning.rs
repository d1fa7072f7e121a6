//! Describing pictures.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use xvlm_data::Picture;
use xvlm_tasks::captioning::{self, Writing};
use xvlm_tasks::{Sampling, Search, Written};

use super::{Predictor, View};
use crate::Error;

/// Pictures that are in the model at a time.
const BATCH: usize = 32;

impl Predictor {
    /// How pictures are described, unless told otherwise: what the model's configuration says.
    pub fn writing(&self) -> Writing {
        Writing::of(self.model.config())
    }

    /// Describes pictures, several at a time: one text for each.
    ///
    /// # Errors
    /// As [`captioning::caption`].
    pub fn captions(&self, pictures: &[Picture], writing: &Writing) -> Result<Vec<Written>, Error> {
        let mut written = Vec::with_capacity(pictures.len());
        for pictures in pictures.chunks(BATCH) {
            written.extend(captioning::caption(&self.model, &self.model.encode(pictures)?, writing)?);
        }
        Ok(written)
    }

    /// Draws `count` descriptions of each picture. The same seed gives the same texts.
    ///
    /// # Errors
    /// As [`captioning::sample`].
    pub fn sample_captions(
        &self,
        pictures: &[Picture],
        writing: &Writing,
        sampling: Sampling,
        count: usize,
        seed: u64,
    ) -> Result<Vec<Vec<Written>>, Error> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut drawn = Vec::with_capacity(pictures.len());
        for pictures in pictures.chunks(BATCH) {
            let images = self.model.encode(pictures)?;
            drawn.extend(captioning::sample(&self.model, &images, writing, sampling, count, &mut rng)?);
        }
        Ok(drawn)
    }
}

impl View<'_> {
    /// Describes the picture, searching as the model's configuration says.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn caption(&self) -> Result<Written, Error> {
        self.caption_with(self.search())
    }

    /// How captions are searched for, unless told otherwise: what the model's configuration says.
    pub fn search(&self) -> Search {
        self.model.config().search
    }

    /// Describes the picture, searching as given.
    ///
    /// # Errors
    /// As [`captioning::caption`].
    pub fn caption_with(&self, search: Search) -> Result<Written, Error> {
        self.caption_as(&Writing { search, ..Writing::of(self.model.config()) })
    }

    /// Describes the picture, beginning and searching as given.
    ///
    /// # Errors
    /// As [`captioning::caption`].
    pub fn caption_as(&self, writing: &Writing) -> Result<Written, Error> {
        Ok(captioning::caption(self.model, &self.image, writing)?.remove(0))
    }

    /// Draws `count` descriptions of the picture. The same seed gives the same texts.
    ///
    /// # Errors
    /// As [`captioning::sample`].
    pub fn sample_captions(
        &self,
        writing: &Writing,
        sampling: Sampling,
        count: usize,
        seed: u64,
    ) -> Result<Vec<Written>, Error> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Ok(captioning::sample(self.model, &self.image, writing, sampling, count, &mut rng)?.remove(0))
    }
}
