//! The models that come with the crate: see `docs/bundled-model.md` for what they were trained on and how good they are.

use xvlm_weights::ModelFiles;

use crate::Error;

/// The small models that come with the crate. They know the built-in world of coloured shapes only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bundled {
    /// The pre-trained one: boxes, captions, matching, search, blanks, and in a few words answers.
    #[default]
    General,
    /// Fine-tuned for questions about a picture.
    Questions,
    /// Fine-tuned for statements about two pictures.
    Statements,
}

impl Bundled {
    /// What names of tensors begin with that fine-tuned models may share with the pre-trained one.
    pub const SHARED: &str = "vision_encoder.";

    /// Its files. A fine-tuned model lacks the tensors that it shares with the pre-trained one; they are put in.
    ///
    /// # Errors
    /// None, unless the build is broken.
    pub fn files(self) -> Result<ModelFiles, Error> {
        macro_rules! read {
            ($name:literal, $folder:literal) => {
                ModelFiles::from_bytes(
                    $name,
                    include_bytes!(concat!("../model/", $folder, "config.json")).as_slice(),
                    include_bytes!(concat!("../model/", $folder, "model.safetensors")).as_slice(),
                    include_bytes!(concat!("../model/", $folder, "tokenizer.json")).as_slice(),
                )?
            };
        }
        let general = read!("bundled model", "");
        let mut own = match self {
            Self::General => return Ok(general),
            Self::Questions => read!("bundled model for questions", "questions/"),
            Self::Statements => read!("bundled model for statements", "statements/"),
        };
        own.weights.complete_with(&general.weights, |name| name.starts_with(Self::SHARED));
        Ok(own)
    }
}
