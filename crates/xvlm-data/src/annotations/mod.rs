//! Annotation files: of the sets that models are pre-trained on, as published, and of those that they are fine-tuned and
//! evaluated on, in X-VLM's own form or as published.
//!
//! *Pre-training.* A reader a data set ([`Coco`], [`VisualGenome`], [`Conceptual`], [`Sbu`], [`OpenImages`], [`Flickr30k`],
//! [`Karpathy`]) opens as [`Records`]: a stream of images with captions, elements and questions, and a [`Report`] of what
//! was left out and why. Boxes come out clipped to their image. [`crate::convert`] makes shards of such a stream.
//!
//! *Fine-tuning and evaluation.* [`Reading`] reads items of a task and counts what is broken; the functions `read_*` fail at
//! the first broken item. Image paths are relative to the folder of the annotation file, or to a folder that the caller
//! names, and do not lead out of it (out of `/` none does). Identifiers are strings here, whether the file holds numbers or strings.

mod coco;
mod digest;
mod evaluation;
mod exclusions;
mod flickr30k;
mod frequencies;
mod items;
mod json_items;
mod karpathy;
mod open_images;
mod pairs;
mod pickle;
mod refer;
mod references;
mod report;
pub(crate) mod source;
mod stream;
mod template;
mod visual_genome;

use std::path::Path;

pub use self::coco::Coco;
pub use self::evaluation::{Loaded, Reading, read_proposals};
pub use self::flickr30k::Flickr30k;
pub use self::frequencies::{DocumentCounts, read_document_counts};
pub use self::items::{CaptionItem, FillItem, GroundingItem, NlvrItem, RetrievalItem, VqaItem, VqaSource};
pub use self::karpathy::Karpathy;
pub use self::open_images::OpenImages;
pub use self::pairs::{Conceptual, Sbu, SbuCaptions};
pub use self::references::read_references;
pub use self::report::{Reason, Report, Skipped};
pub use self::source::{Annotated, Exclusions, Records};
pub use self::template::NameTemplate;
pub use self::visual_genome::VisualGenome;
use crate::error::DataError;

/// Reads grounding; see [`Reading::grounding`].
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field;
/// also when the box reaches outside the image by more than a pixel.
pub fn read_grounding(path: impl AsRef<Path>) -> Result<Vec<GroundingItem>, DataError> {
    Ok(Reading::strict().grounding(&[path])?.items)
}

/// Reads image-text retrieval; see [`Reading::retrieval`].
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field.
pub fn read_retrieval(path: impl AsRef<Path>) -> Result<Vec<RetrievalItem>, DataError> {
    Ok(Reading::strict().retrieval(&[path])?.items)
}

/// Reads texts with blanks; see [`Reading::fill`].
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field.
pub fn read_fill(path: impl AsRef<Path>) -> Result<Vec<FillItem>, DataError> {
    Ok(Reading::strict().fill(&[path])?.items)
}

/// Reads questions; see [`Reading::vqa`].
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field.
pub fn read_vqa(path: impl AsRef<Path>) -> Result<Vec<VqaItem>, DataError> {
    Ok(Reading::strict().vqa(&[path])?.items)
}

/// Reads sentence pairs; see [`Reading::nlvr`].
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field.
pub fn read_nlvr(path: impl AsRef<Path>) -> Result<Vec<NlvrItem>, DataError> {
    Ok(Reading::strict().nlvr(&[path])?.items)
}

/// Reads captioning; see [`Reading::captions`].
///
/// # Errors
///
/// [`DataError::Io`], [`DataError::Json`], and [`DataError::Field`] naming file, item and field.
pub fn read_captions(path: impl AsRef<Path>) -> Result<Vec<CaptionItem>, DataError> {
    Ok(Reading::strict().captions(&[path])?.items)
}
