//! Describing pictures.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use xvlm_data::Picture;
use xvlm_tasks::captioning::{self, Writing};
use xvlm_tasks::{ImageTokens, Sampling, Written};

use super::{Predictor, View};
use crate::Error;

/// Pictures that are in the model at a time.
const BATCH: usize = 32;

/// The generator of one picture: of the seed's streams of numbers, none of which overlap, that of the picture's number.
fn generator(seed: u64, number: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(number);
    rng
}

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

    /// Draws `count` descriptions of each picture. Each picture has a generator of its own, made of the seed and of the number
    /// that `number` gives to its place, whatever the other pictures are, so that many can be given some at a time.
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
        number: impl Fn(usize) -> u64,
    ) -> Result<Vec<Vec<Written>>, Error> {
        let mut drawn = Vec::with_capacity(pictures.len());
        for pictures in pictures.chunks(BATCH) {
            let images = self.model.encode(pictures)?;
            for at in 0..pictures.len() {
                let image = ImageTokens::new(images.tensor().narrow(0, at, 1)?);
                let mut rng = generator(seed, number(drawn.len()));
                drawn.extend(captioning::sample(&self.model, &image, writing, sampling, count, &mut rng)?);
            }
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
        self.caption_as(&Writing::of(self.0.model.config()))
    }

    /// Describes the picture, beginning and searching as given.
    ///
    /// # Errors
    /// As [`captioning::caption`].
    pub fn caption_as(&self, writing: &Writing) -> Result<Written, Error> {
        Ok(captioning::caption(self.0.model, &self.0.images, writing)?.remove(0))
    }

    /// Draws `count` descriptions of the picture: those that [`Predictor::sample_captions`] draws of number 0.
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
        let mut rng = generator(seed, 0);
        Ok(captioning::sample(self.0.model, &self.0.images, writing, sampling, count, &mut rng)?.remove(0))
    }
}
