//! Looking through a whole data set before anything is trained on it.

use std::collections::HashSet;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::broken::{Tally, told};
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::image::{DecodeOptions, Encoded, source_key};
use crate::json::{Context, io_error};
use crate::records::{ImageSource, Origin, Record};
use crate::tokens::pre_caption;

/// Records that are looked at together, on all cores.
const CHUNK: usize = 256;

/// What a check finds.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// Records that are whole.
    pub records: u64,
    /// Texts of whole images in them.
    pub captions: u64,
    /// Boxes with texts in them.
    pub elems: u64,
    /// Questions in them.
    pub questions: u64,
    /// Whole records whose image occurred in an earlier one. That is no mistake in itself: captions and regions of an image
    /// may stand apart.
    pub repeated_images: u64,
    /// What is broken.
    pub broken: Tally,
}

impl Findings {
    /// Refuses a data set of which too much is broken.
    ///
    /// # Errors
    ///
    /// [`DataError::TooManyBroken`].
    pub fn check_broken(&self, limit: f64) -> Result<(), DataError> {
        self.broken.check(self.records + self.broken.total(), limit)
    }
}

/// How closely to look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckConfig {
    /// Whether to decode the images, which takes nearly all of the time. Without, of an image file its presence is checked,
    /// and boxes are not held against the image. Default true.
    pub images: bool,
    /// Most words of a text, as in [`BatchConfig`](crate::BatchConfig). Default 40.
    pub max_words: usize,
}

impl Default for CheckConfig {
    fn default() -> Self {
        Self { images: true, max_words: 40 }
    }
}

/// Reads every record of a data set as training would, whichever part of it a step may draw: the image is decoded, every
/// box has to be inside of it, every text of the image or of an element has to have a word. What is first found wrong with each
/// broken record goes to `broken`, and after every few hundred records their number to `progress`.
///
/// # Errors
///
/// [`DataError::Spool`]: without temporary files nothing can be said of the records.
pub fn check(
    dataset: &Dataset,
    config: &CheckConfig,
    broken: &mut dyn FnMut(&str),
    progress: &mut dyn FnMut(u64),
) -> Result<Findings, DataError> {
    let mut findings = Findings::default();
    let mut images = HashSet::new();
    let mut chunk: Vec<Result<Arc<Record>, DataError>> = Vec::with_capacity(CHUNK);
    let mut seen = 0;
    let mut look = |chunk: &mut Vec<Result<Arc<Record>, DataError>>| {
        let checked: Vec<_> = chunk.par_drain(..).map(|read| look_at(read, config)).collect();
        seen += checked.len() as u64;
        for looked in checked {
            match looked {
                Looked::Whole(record) => {
                    findings.records += 1;
                    findings.captions += record.captions.len() as u64;
                    findings.elems += record.elems.len() as u64;
                    findings.questions += record.questions.len() as u64;
                    findings.repeated_images += u64::from(!images.insert(source_key(&record.image)));
                }
                Looked::Broken(error, origin) => {
                    broken(&told(origin.as_ref(), &error));
                    findings.broken.add(1, error, origin.as_ref());
                }
            }
        }
        progress(seen);
    };
    dataset.visit(|read| {
        if let Err(error @ DataError::Spool { .. }) = read {
            return Err(error);
        }
        chunk.push(read);
        if chunk.len() == CHUNK {
            look(&mut chunk);
        }
        Ok(())
    })?;
    look(&mut chunk);
    Ok(findings)
}

/// What became of a record.
enum Looked {
    Whole(Arc<Record>),
    /// With where it is, if that is known.
    Broken(DataError, Option<Origin>),
}

fn look_at(read: Result<Arc<Record>, DataError>, config: &CheckConfig) -> Looked {
    match read {
        Err(error) => {
            let origin = error.origin();
            Looked::Broken(error, origin)
        }
        Ok(record) => match check_record(&record, config) {
            Ok(()) => Looked::Whole(record),
            Err(error) => Looked::Broken(error, Some(record.origin.clone())),
        },
    }
}

fn check_record(record: &Record, config: &CheckConfig) -> Result<(), DataError> {
    let captions = record.captions.iter().enumerate().map(|(i, text)| (format!("caption[{i}]"), text));
    let elems = record.elems.iter().enumerate();
    let of_elems = elems.flat_map(|(i, elem)| {
        let texts = elem.texts.iter().enumerate();
        texts.map(move |(j, text)| (format!("elems[{i}].caption[{j}]"), text))
    });
    for (field, text) in captions.chain(of_elems) {
        if let Err(DataError::EmptyText { text }) = pre_caption(text, config.max_words) {
            let Origin { file, place } = &record.origin;
            let context = Context { path: file, place: place.clone() };
            return Err(context.error(field, "a text with at least one word", format!("{text:?}")));
        }
    }
    if !config.images {
        return match &record.image {
            ImageSource::Path(path) => path.metadata().map(drop).map_err(|source| io_error(path, source)),
            ImageSource::Bytes(_) => Ok(()),
        };
    }
    let picture = Encoded::of(&record.image, &record.origin, DecodeOptions::default())?.decode()?;
    record.boxes_inside(picture.width(), picture.height()).map(drop)
}
