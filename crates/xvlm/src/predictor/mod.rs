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
        let image = self.model.encode(std::slice::from_ref(picture))?;
        Ok(View { model: &self.model, image, width: picture.width(), height: picture.height() })
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
pub struct View<'a> {
    model: &'a Model,
    image: ImageTokens,
    width: u32,
    height: u32,
}

impl View<'_> {
    /// The picture's embedding, of unit length.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn embedding(&self) -> Result<Vec<f32>, Error> {
        Ok(self.model.embed_images(&self.image)?.flatten_all()?.to_vec1()?)
    }

    fn about<'t>(&self, texts: &[&'t str]) -> Vec<(u32, &'t str)> {
        texts.iter().map(|text| (0, *text)).collect()
    }
}
