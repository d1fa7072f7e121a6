//! Model folders on the Hugging Face hub.

use std::path::PathBuf;

use hf_hub::api::sync::Api;

use crate::{ConfigProblem, Error};

/// Downloads the files of a model folder (or finds them in the cache) and returns the folder they lie in.
pub(crate) fn download(repository: &str) -> Result<PathBuf, Error> {
    let problem = |file: &str, message: String| ConfigProblem { file: format!("hub {repository}/{file}"), message };
    let api = Api::new().map_err(|error| problem("", error.to_string()))?.model(repository.to_owned());
    let mut folder = PathBuf::new();
    for file in ["tokenizer.json", "model.safetensors", "config.json"] {
        let path = api.get(file).map_err(|error| problem(file, error.to_string()))?;
        folder = path.parent().map(PathBuf::from).unwrap_or_default();
    }
    Ok(folder)
}
