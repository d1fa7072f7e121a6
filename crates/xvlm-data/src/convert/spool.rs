//! What the annotations say, an image a line, on disk: it can be shuffled as a whole and read at any place, whatever its size.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::annotations::Annotated;
use crate::error::{DataError, Place};
use crate::json::io_error;
use crate::records::{Element, ImageSource, Origin, Record};
use crate::tokens::hash_bytes;

/// An image of the spool.
#[derive(Serialize, Deserialize)]
struct Spooled {
    size: Option<(u32, u32)>,
    fractions: bool,
    image: PathBuf,
    captions: Vec<String>,
    elems: Vec<SpooledElement>,
    questions: Vec<(String, String)>,
    file: PathBuf,
    place: Place,
}

#[derive(Serialize, Deserialize)]
struct SpooledElement {
    bbox: [f32; 4],
    texts: Vec<String>,
    attributes: Vec<String>,
    labels: Vec<String>,
}

/// An image read back.
pub(super) struct Planned {
    /// Width and height in pixels that the boxes refer to, where the data set tells them.
    pub(super) size: Option<(u32, u32)>,
    /// Whether the boxes are fractions of the image.
    pub(super) fractions: bool,
    /// What is to be written of it.
    pub(super) record: Record,
}

impl From<Annotated> for Spooled {
    fn from(annotated: Annotated) -> Self {
        let Annotated { size, fractions, record, .. } = annotated;
        let Record { image, captions, elems, questions, origin } = record;
        let image = match image {
            ImageSource::Path(path) => path,
            // Published sets have their images in files.
            ImageSource::Bytes(_) => PathBuf::new(),
        };
        let spooled = |Element { bbox, texts, attributes, labels }| SpooledElement { bbox, texts, attributes, labels };
        let elems = elems.into_iter().map(spooled).collect();
        Self {
            size,
            fractions,
            image,
            captions,
            elems,
            questions,
            file: origin.file.to_path_buf(),
            place: origin.place,
        }
    }
}

impl From<Spooled> for Planned {
    fn from(spooled: Spooled) -> Self {
        let Spooled { size, fractions, image, captions, elems, questions, file, place } = spooled;
        let element = |SpooledElement { bbox, texts, attributes, labels }| Element { bbox, texts, attributes, labels };
        let elems = elems.into_iter().map(element).collect();
        let origin = Origin { file: Arc::from(file), place };
        Self { size, fractions, record: Record { image: ImageSource::Path(image), captions, elems, questions, origin } }
    }
}

/// The spool while it grows.
pub(super) struct SpoolWriter {
    path: PathBuf,
    out: BufWriter<File>,
    ends: Vec<u64>,
    at: u64,
    digest: u64,
}

/// The spool: 12 bytes an image in memory.
pub(super) struct Spool {
    path: PathBuf,
    /// Of all that it holds, in its order.
    digest: u64,
    ends: Vec<u64>,
    /// Places of the images in the order of the shards.
    order: Vec<u32>,
}

impl SpoolWriter {
    pub(super) fn new(path: &Path) -> Result<Self, DataError> {
        let file = File::create(path).map_err(|source| io_error(path, source))?;
        Ok(Self {
            path: path.to_owned(),
            out: BufWriter::with_capacity(1 << 20, file),
            ends: Vec::new(),
            at: 0,
            digest: 0,
        })
    }

    pub(super) fn add(&mut self, image: Annotated) -> Result<(), DataError> {
        let io = |source| io_error(&self.path, source);
        let mut line = serde_json::to_vec(&Spooled::from(image)).map_err(|error| io(error.into()))?;
        self.digest = hash_bytes(&[self.digest.to_le_bytes(), hash_bytes(&line).to_le_bytes()].concat());
        line.push(b'\n');
        self.out.write_all(&line).map_err(io)?;
        self.at += line.len() as u64;
        self.ends.push(self.at);
        Ok(())
    }

    /// Puts the images in the order of the shards: that of the annotations, or shuffled.
    pub(super) fn finish(self, shuffle: Option<u64>) -> Result<Spool, DataError> {
        self.out.into_inner().map_err(|error| io_error(&self.path, error.into_error()))?;
        let mut order: Vec<u32> = (0..self.ends.len() as u32).collect();
        if let Some(seed) = shuffle {
            order.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(seed));
        }
        Ok(Spool { path: self.path, digest: self.digest, ends: self.ends, order })
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }
}

impl Spool {
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// Tells what is in the spool, and in which order, from what another may hold.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    /// The places of a shard's images.
    pub(super) fn of_shard(&self, shard: usize, records: usize) -> &[u32] {
        let start = shard * records;
        &self.order[start..(start + records).min(self.order.len())]
    }

    pub(super) fn open(&self) -> Result<File, DataError> {
        File::open(&self.path).map_err(|source| io_error(&self.path, source))
    }

    pub(super) fn read(&self, file: &mut File, place: u32) -> Result<Planned, DataError> {
        let place = place as usize;
        let start = if place == 0 { 0 } else { self.ends[place - 1] };
        let mut bytes = vec![0; (self.ends[place] - start) as usize];
        file.seek(SeekFrom::Start(start))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|source| io_error(&self.path, source))?;
        let spooled: Result<Spooled, _> = serde_json::from_slice(&bytes);
        let place = Place::Line(place + 1);
        Ok(spooled.map_err(|source| DataError::Json { path: self.path.clone(), place, source })?.into())
    }
}
