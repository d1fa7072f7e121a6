//! A cache of what was decoded.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::{DecodeOptions, Encoded, Picture};
use crate::error::DataError;
use crate::records::ImageSource;
use crate::tokens::hash_bytes;

/// A whole image as the model sees it, and the size it had in its file.
#[derive(Debug)]
pub struct Decoded {
    /// The pixels, resized to a square.
    pub picture: Arc<Picture>,
    /// Width as stored; boxes in files refer to this.
    pub width: u32,
    /// Height as stored.
    pub height: u32,
}

/// Images in memory up to a limit, shared by the workers of a loader.
///
/// Without random crops an image is the same in each epoch but for its mirroring, so it is kept at
/// the model's resolution. What does not fit is decoded each time.
#[derive(Debug)]
pub struct ImageCache {
    limit: usize,
    used: AtomicUsize,
    images: RwLock<HashMap<(u64, usize), Arc<Decoded>>>,
}

impl ImageCache {
    /// A cache of at most `limit` bytes of pixels.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0), images: RwLock::default() }
    }

    /// Bytes of pixels held.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Number of images held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.images.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The image, from memory or decoded, resized to a square of `resolution` pixels a side.
    ///
    /// # Errors
    ///
    /// [`DataError::Image`]; see [`Encoded::decode`].
    pub fn get(
        &self,
        source: &ImageSource,
        resolution: usize,
        name: &dyn std::fmt::Display,
    ) -> Result<Arc<Decoded>, DataError> {
        let key = (source_key(source), resolution);
        let found = self.images.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(decoded) = found {
            return Ok(decoded);
        }
        let decoded = Arc::new(decode(source, resolution, name)?);
        let size = decoded.picture.rgb.len();
        let mut images = self.images.write().unwrap_or_else(PoisonError::into_inner);
        if self.used() + size <= self.limit && images.insert(key, Arc::clone(&decoded)).is_none() {
            self.used.fetch_add(size, Ordering::Relaxed);
        }
        Ok(decoded)
    }
}

fn decode(source: &ImageSource, resolution: usize, name: &dyn std::fmt::Display) -> Result<Decoded, DataError> {
    let picture = Encoded::of(source, name, DecodeOptions::default())?.decode()?;
    let (width, height) = (picture.width, picture.height);
    Ok(Decoded { picture: Arc::new(picture.resized_square(resolution)), width, height })
}

/// A number that equal sources share; stable between runs.
pub(crate) fn source_key(source: &ImageSource) -> u64 {
    match source {
        ImageSource::Path(path) => hash_bytes(path.as_os_str().as_encoded_bytes()),
        ImageSource::Bytes(bytes) => !hash_bytes(bytes),
    }
}
