//! What a batch shows of its images: one way from an image's source to normalised pixels, for all kinds of batches.
//!
//! Header → view → the pixels that the view needs → resized → mirrored → augmented → normalised. Nothing is decoded before it
//! is known which part is to be seen.

use std::fmt::Display;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;

use crate::augment::RandAugment;
use crate::error::DataError;
use crate::image::{DecodeOptions, Decoded, Encoded, ImageCache, Picture};
use crate::records::ImageSource;
use crate::transform::{Rect, Transform, View};

/// What is shown of an image: resized to the square that the model sees.
#[derive(Debug)]
pub struct Shown {
    picture: Arc<Picture>,
    /// Whether it is still to be mirrored.
    flip: bool,
}

/// An image of which it is not decided yet what is shown.
#[derive(Debug)]
pub(super) enum Opened<'a> {
    /// The whole of it, as the square that the model sees.
    Square(Arc<Decoded>),
    /// Its file.
    File(Encoded<'a>),
}

impl Opened<'_> {
    /// Width and height as stored, in pixels.
    pub(super) fn size(&self) -> (u32, u32) {
        match self {
            Self::Square(decoded) => (decoded.width, decoded.height),
            Self::File(encoded) => (encoded.width(), encoded.height()),
        }
    }

    pub(super) fn whole(&self) -> View {
        let (width, height) = self.size();
        View::whole(width, height)
    }
}

/// Opens images and draws views of them.
#[derive(Debug)]
pub(super) struct Framer<'a> {
    pub(super) cache: &'a ImageCache,
    pub(super) transform: Transform,
    /// What changes whole images.
    pub(super) augment: Option<&'a RandAugment>,
    /// What changes images whose parts have texts.
    pub(super) region_augment: Option<&'a RandAugment>,
    /// Side of the square that views become.
    pub(super) resolution: usize,
}

impl Framer<'_> {
    /// The whole image as it is, for evaluation.
    pub(super) fn as_is(&self, source: &ImageSource, name: &dyn Display) -> Result<(Shown, View), DataError> {
        let opened = Opened::Square(self.cache.get(source, self.resolution, name)?);
        let view = opened.whole();
        Ok((self.resized(&opened, view)?, view))
    }

    /// The image for training with texts that tell the whole of it; `texts` decide whether it may be mirrored.
    pub(super) fn whole<'a>(
        &self,
        source: &ImageSource,
        name: &dyn Display,
        texts: impl IntoIterator<Item = &'a str>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Shown, DataError> {
        let opened = self.open(source, name, self.transform.crop.is_some())?;
        let (width, height) = opened.size();
        let whole = Rect::whole(width, height);
        let crop = self.transform.crop.map_or(whole, |crop| crop.draw(width, height, rng));
        let view = View { crop, flip: self.transform.flip(texts, rng) };
        self.show(&opened, view, self.augment, rng)
    }

    /// An image for training with texts that tell parts of it.
    pub(super) fn parts<'a>(&self, source: &'a ImageSource, name: &dyn Display) -> Result<Opened<'a>, DataError> {
        self.open(source, name, self.transform.random_crop)
    }

    /// A view of it that holds all of `keep`, a box `(x, y, w, h)` inside the image, not mirrored yet.
    pub(super) fn around(&self, opened: &Opened, keep: [f32; 4], rng: &mut ChaCha8Rng) -> View {
        let (width, height) = opened.size();
        View { crop: self.transform.crop_around(keep, width, height, rng), flip: false }
    }

    /// What is shown of it.
    pub(super) fn show_parts(&self, opened: &Opened, view: View, rng: &mut ChaCha8Rng) -> Result<Shown, DataError> {
        self.show(opened, view, self.region_augment, rng)
    }

    /// What is the same in each epoch is kept as the model sees it.
    fn open<'a>(&self, source: &'a ImageSource, name: &dyn Display, crops: bool) -> Result<Opened<'a>, DataError> {
        Ok(match crops {
            false => Opened::Square(self.cache.get(source, self.resolution, name)?),
            true => Opened::File(Encoded::of(source, name, DecodeOptions::default())?),
        })
    }

    fn show(
        &self,
        opened: &Opened,
        view: View,
        augment: Option<&RandAugment>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Shown, DataError> {
        let mut shown = self.resized(opened, view)?;
        if let Some(augment) = augment {
            let picture = Arc::make_mut(&mut shown.picture);
            if std::mem::take(&mut shown.flip) {
                picture.mirror();
            }
            augment.apply(picture, rng);
        }
        Ok(shown)
    }

    fn resized(&self, opened: &Opened, view: View) -> Result<Shown, DataError> {
        Ok(match opened {
            Opened::Square(decoded) => Shown { picture: Arc::clone(&decoded.picture), flip: view.flip },
            Opened::File(encoded) => Shown { picture: Arc::new(view.decode(encoded, self.resolution)?), flip: false },
        })
    }
}

/// The normalised pixels of all, `[N·3·side·side]`.
pub(super) fn render<'a>(shown: impl ExactSizeIterator<Item = &'a Shown>, side: usize) -> Vec<f32> {
    let mut pixels = Vec::with_capacity(shown.len() * 3 * side * side);
    for Shown { picture, flip } in shown {
        picture.normalise_onto(*flip, &mut pixels);
    }
    pixels
}
