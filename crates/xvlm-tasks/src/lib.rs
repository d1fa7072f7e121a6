//! What X-VLM is trained for and used for: the only place where model, losses, data and metrics meet.
//!
//! [`pretrain`] trains; [`Model`] is what training leaves, opened for use. Each other module is one use: how a question is
//! put to the model, what the answer is, and how well it does on a data set.

use std::path::Path;

use xvlm_data::Picture;

pub mod captioning;
mod config;
mod error;
pub mod fill;
mod generate;
pub mod grounding;
mod model;
pub mod pretrain;
pub mod retrieval;
pub mod vqa;

pub use config::{Objective, PretrainConfig, RegionStream};
pub use error::{ConfigProblem, TaskError};
pub use generate::{Search, Written};
pub use model::{ImageTokens, Model, ModelConfig};

/// How many images or texts go through the model at a time: enough to keep all cores busy.
const BATCH: usize = 32;

/// What is told while a data set is worked through: how many of how many items are done.
pub type Counter<'a> = &'a mut dyn FnMut(usize, usize);

/// Works through items of which those about one image stand together: each image is encoded once. `each` gets some images,
/// and the items about them, each with its row of images.
fn by_image<'a, T>(
    model: &Model,
    items: &'a [T],
    image: impl Fn(&T) -> &Path,
    mut each: impl FnMut(&ImageTokens, &[Picture], &[(u32, &'a T)]) -> Result<(), TaskError>,
) -> Result<(), TaskError> {
    let groups: Vec<&[T]> = items.chunk_by(|a, b| image(a) == image(b)).collect();
    for groups in groups.chunks(BATCH) {
        let pictures = groups.iter().map(|items| Picture::open(image(&items[0]))).collect::<Result<Vec<_>, _>>()?;
        let rows = groups.iter().enumerate();
        let rows: Vec<(u32, &T)> =
            rows.flat_map(|(row, items)| items.iter().map(move |item| (row as u32, item))).collect();
        each(&model.encode(&pictures)?, &pictures, &rows)?;
    }
    Ok(())
}

/// The items of a file of a folder, if there are any.
fn some<T>(items: Vec<T>, data: &Path, file: &str) -> Result<Vec<T>, TaskError> {
    match items.is_empty() {
        true => Err(TaskError::Empty { what: data.join(file).display().to_string() }),
        false => Ok(items),
    }
}
