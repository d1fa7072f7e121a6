//! A model and what can be asked about a picture.

mod captioning;
mod filling;
mod grounding;
mod matching;
mod nlvr;
mod vqa;

use std::path::Path;

use xvlm_data::Picture;
use xvlm_tasks::{Compute, ImageTokens, Model};

pub use self::grounding::{Grounding, Heated, PixelBox, Proposal};
pub use self::matching::Match;
pub use self::nlvr::Judgement;
pub use self::vqa::{Answer, LikelyAnswer, RankedAnswers};
use crate::Error;

/// A model, ready to look at pictures.
pub struct Predictor {
    model: Model,
}

impl Predictor {
    /// The small model that comes with the crate. It knows the built-in world of coloured shapes only.
    ///
    /// # Errors
    /// If the device fails.
    #[cfg(feature = "bundled")]
    pub fn bundled(compute: impl Into<Compute>) -> Result<Self, Error> {
        Self::bundled_for(crate::Bundled::General, compute)
    }

    /// One of the small models that come with the crate.
    ///
    /// # Errors
    /// If the device fails.
    #[cfg(feature = "bundled")]
    pub fn bundled_for(model: crate::Bundled, compute: impl Into<Compute>) -> Result<Self, Error> {
        Ok(Self { model: Model::from_files(&model.files()?, compute)? })
    }

    /// A model folder: `config.json`, `model.safetensors`, `tokenizer.json`; to compute on a device in `f32`, or as [`Compute`]
    /// says:
    ///
    /// ```no_run
    /// use xvlm::{Compute, Device, Precision, Predictor};
    ///
    /// # fn main() -> Result<(), xvlm::Error> {
    /// let compute = Compute::on(&Device::Cpu).with(Precision::Bf16);
    /// let predictor = Predictor::from_folder("model", compute)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_folder(dir: impl AsRef<Path>, compute: impl Into<Compute>) -> Result<Self, Error> {
        Ok(Self { model: Model::open(dir.as_ref(), compute)? })
    }

    /// A model folder on the Hugging Face hub: repository `owner/name` at a revision, which is a branch (most often
    /// `main`), a tag or a commit. Downloaded once, into the hub's usual cache; see [`Hub`](crate::Hub) for the
    /// environment variables that are honoured, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` among them.
    ///
    /// ```no_run
    /// use xvlm::{Device, Predictor};
    ///
    /// # fn main() -> Result<(), xvlm::Error> {
    /// let predictor = Predictor::from_hub("owner/name", "main", &Device::Cpu)?;
    /// println!("{}", predictor.open("picture.png")?.caption()?.text);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Hub::fetch`](crate::Hub::fetch), if the model cannot be had, and as [`Self::from_folder`].
    #[cfg(feature = "hub")]
    pub fn from_hub(repository: &str, revision: &str, compute: impl Into<Compute>) -> Result<Self, Error> {
        Self::from_folder(crate::Hub::from_env()?.fetch(repository, revision)?, compute)
    }

    /// The model inside.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Looks at a picture: encodes it, once for all that is asked.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn look(&self, picture: &Picture) -> Result<View<'_>, Error> {
        Ok(View(self.look_at(std::slice::from_ref(picture))?))
    }

    /// Looks at pictures, all of them at once: what is asked goes through the model for all together.
    ///
    /// # Errors
    /// If there are none, or a tensor operation fails.
    pub fn look_at(&self, pictures: &[Picture]) -> Result<Views<'_>, Error> {
        let images = self.model.encode(pictures)?;
        let sizes = pictures.iter().map(|picture| (picture.width(), picture.height())).collect();
        Ok(Views { model: &self.model, images, sizes })
    }

    /// Opens an image file and looks at it.
    ///
    /// # Errors
    /// If the file is no image.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<View<'_>, Error> {
        self.look(&Picture::open_upright(path.as_ref())?)
    }

    /// Embeddings of texts, of unit length.
    ///
    /// # Errors
    /// If a text is empty.
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, Error> {
        Ok(self.model.embed_texts(texts)?.to_vec2()?)
    }
}

/// A picture the model has looked at.
pub struct View<'a>(Views<'a>);

impl View<'_> {
    /// The picture's embedding, of unit length.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn embedding(&self) -> Result<Vec<f32>, Error> {
        Ok(self.0.model.embed_images(&self.0.images)?.flatten_all()?.to_vec1()?)
    }
}

/// Pictures the model has looked at. What is asked about them is answered for each, in their order.
pub struct Views<'a> {
    model: &'a Model,
    images: ImageTokens,
    /// Width and height of each picture as given, in pixels.
    sizes: Vec<(u32, u32)>,
}

impl Views<'_> {
    /// Each text with each picture: picture by picture.
    fn about<'t>(&self, texts: &[&'t str]) -> Vec<(u32, &'t str)> {
        (0..self.sizes.len() as u32).flat_map(|image| texts.iter().map(move |text| (image, *text))).collect()
    }

    /// What was found out about [`Self::about`]: of each picture what `tell` makes of it, its size, a text and the answer.
    fn by_picture<T, A>(
        &self,
        texts: &[&str],
        answers: Vec<A>,
        tell: impl Fn((u32, u32), &str, A) -> Result<T, Error>,
    ) -> Result<Vec<Vec<T>>, Error> {
        let mut answers = answers.into_iter();
        let of = |&size| texts.iter().zip(&mut answers).map(|(text, answer)| tell(size, text, answer)).collect();
        self.sizes.iter().map(of).collect()
    }
}
