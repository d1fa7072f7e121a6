//! What the annotations say, an image a line, on disk: it can be shuffled as a whole and read at any place, whatever its size.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::write::{ElementFields, QuestionFields};
use crate::annotations::Annotated;
use crate::error::{DataError, Place};
use crate::json::io_error;
use crate::records::ImageSource;

/// An image of the spool.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Spooled {
    pub(super) id: String,
    pub(super) image: PathBuf,
    pub(super) size: Option<(u32, u32)>,
    pub(super) captions: Vec<String>,
    pub(super) elems: Vec<ElementFields>,
    pub(super) questions: Vec<QuestionFields>,
    pub(super) origin: String,
}

impl Spooled {
    pub(super) fn new(annotated: Annotated) -> Self {
        let Annotated { id, size, record } = annotated;
        let image = match record.image {
            ImageSource::Path(path) => path,
            // Published sets have their images in files.
            _ => PathBuf::new(),
        };
        let question = |(question, answer)| QuestionFields { question, answer };
        Self {
            id,
            image,
            size,
            captions: record.captions,
            elems: record.elems.into_iter().map(ElementFields::from).collect(),
            questions: record.questions.into_iter().map(question).collect(),
            origin: record.origin.to_string(),
        }
    }
}

/// The spool while it grows.
pub(super) struct SpoolWriter {
    path: PathBuf,
    out: BufWriter<File>,
    ends: Vec<u64>,
    at: u64,
}

/// The spool: 8 bytes an image in memory.
pub(super) struct Spool {
    path: PathBuf,
    ends: Vec<u64>,
    /// Places of the images in the order of the shards.
    order: Vec<u32>,
}

impl SpoolWriter {
    pub(super) fn new(path: &Path) -> Result<Self, DataError> {
        let file = File::create(path).map_err(|source| io_error(path, source))?;
        Ok(Self { path: path.to_owned(), out: BufWriter::with_capacity(1 << 20, file), ends: Vec::new(), at: 0 })
    }

    pub(super) fn add(&mut self, image: &Spooled) -> Result<(), DataError> {
        let io = |source| io_error(&self.path, source);
        let line = serde_json::to_vec(image).map_err(|error| io(error.into()))?;
        self.out.write_all(&line).map_err(io)?;
        self.at += line.len() as u64;
        self.ends.push(self.at);
        Ok(())
    }

    pub(super) fn finish(self, shuffle: Option<u64>) -> Result<Spool, DataError> {
        self.out.into_inner().map_err(|error| io_error(&self.path, error.into_error()))?;
        let mut order: Vec<u32> = (0..self.ends.len() as u32).collect();
        if let Some(seed) = shuffle {
            order.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(seed));
        }
        Ok(Spool { path: self.path, ends: self.ends, order })
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }
}

impl Spool {
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// The places of a shard's images.
    pub(super) fn of_shard(&self, shard: usize, records: usize) -> &[u32] {
        let start = shard * records;
        &self.order[start..(start + records).min(self.order.len())]
    }

    pub(super) fn open(&self) -> Result<File, DataError> {
        File::open(&self.path).map_err(|source| io_error(&self.path, source))
    }

    pub(super) fn read(&self, file: &mut File, place: u32, bytes: &mut Vec<u8>) -> Result<Spooled, DataError> {
        let place = place as usize;
        let start = if place == 0 { 0 } else { self.ends[place - 1] };
        bytes.resize((self.ends[place] - start) as usize, 0);
        file.seek(SeekFrom::Start(start))
            .and_then(|_| file.read_exact(bytes))
            .map_err(|source| io_error(&self.path, source))?;
        serde_json::from_slice(bytes).map_err(|source| DataError::Json {
            path: self.path.clone(),
            place: Place::Item(place),
            source,
        })
    }
}
