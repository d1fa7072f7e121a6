//! The model that comes with the crate: see `docs/bundled-model.md` for what it was trained on and how good it is.

use xvlm_weights::ModelFiles;

use crate::Error;

/// The files of the small model that comes with the crate.
///
/// # Errors
/// None, unless the build is broken.
pub fn bundled_files() -> Result<ModelFiles, Error> {
    let files = ModelFiles::from_bytes(
        "bundled model",
        include_bytes!("../model/config.json"),
        include_bytes!("../model/model.safetensors"),
        include_bytes!("../model/tokenizer.json"),
    );
    Ok(files?)
}
