//! What a batch shows of its images: one way from an image's source to normalised pixels, for all kinds of batches.

use std::fmt::Display;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;

use crate::error::DataError;
use crate::image::{Decoded, ImageCache};
use crate::records::ImageSource;
use crate::transform::{Transform, View};

/// An image and what is shown of it.
#[derive(Debug)]
pub struct Shown {
    pub(super) image: Arc<Decoded>,
    pub(super) view: View,
}

/// Opens images and draws views of them.
#[derive(Debug)]
pub(super) struct Framer<'a> {
    pub(super) cache: &'a ImageCache,
    pub(super) transform: Transform,
    /// Side of the square that views become.
    pub(super) resolution: usize,
}

impl Framer<'_> {
    /// The whole image as it is, for evaluation.
    pub(super) fn as_is(&self, source: &ImageSource, name: &dyn Display) -> Result<Shown, DataError> {
        let image = self.cache.get(source, Some(self.resolution), name)?;
        let view = View::whole(image.width, image.height);
        Ok(Shown { image, view })
    }

    /// The image for training with texts that tell the whole of it; `texts` decide whether it may be mirrored.
    pub(super) fn whole<'a>(
        &self,
        source: &ImageSource,
        name: &dyn Display,
        texts: impl IntoIterator<Item = &'a str>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Shown, DataError> {
        let mut shown = self.as_is(source, name)?;
        self.flip(&mut shown, texts, rng);
        Ok(shown)
    }

    /// A part of the image for training that holds all of `keep`, not mirrored yet: a box `(x, y, w, h)` inside the image,
    /// chosen knowing its width and height.
    pub(super) fn around(
        &self,
        source: &ImageSource,
        name: &dyn Display,
        keep: impl FnOnce(u32, u32, &mut ChaCha8Rng) -> Result<[f32; 4], DataError>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Shown, DataError> {
        // A crop needs the pixels as stored.
        let resolution = (!self.transform.random_crop).then_some(self.resolution);
        let image = self.cache.get(source, resolution, name)?;
        let keep = keep(image.width, image.height, rng)?;
        let crop = self.transform.crop(keep, image.width, image.height, rng);
        Ok(Shown { image, view: View { crop, flip: false } })
    }

    /// Perhaps mirrors what is shown, if `texts` allow it.
    pub(super) fn flip<'a>(&self, shown: &mut Shown, texts: impl IntoIterator<Item = &'a str>, rng: &mut ChaCha8Rng) {
        shown.view.flip = self.transform.flip(texts, rng);
    }
}

impl Shown {
    /// View → picture → normalised pixels `[3][side][side]`.
    fn render(&self, side: usize, out: &mut [f32]) {
        self.view.render(&self.image, side, out);
    }
}

/// The pixels of all, `[N·3·side·side]`.
pub(super) fn render<'a>(shown: impl ExactSizeIterator<Item = &'a Shown>, side: usize) -> Vec<f32> {
    let size = 3 * side * side;
    let mut pixels = vec![0.0; shown.len() * size];
    for (shown, pixels) in shown.zip(pixels.chunks_exact_mut(size)) {
        shown.render(side, pixels);
    }
    pixels
}
