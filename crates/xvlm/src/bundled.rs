//! The model that comes with the crate: see `docs/bundled-model.md` for what it was trained on and how good it is.

use xvlm_weights::{ModelFiles, WeightsError};

/// The files of the bundled model.
pub(crate) fn files() -> Result<ModelFiles, WeightsError> {
    ModelFiles::from_bytes(
        "bundled model",
        include_bytes!("../model/config.json"),
        include_bytes!("../model/model.safetensors"),
        include_bytes!("../model/tokenizer.json"),
    )
}
