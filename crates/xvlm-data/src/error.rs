//! What can go wrong with data, each variant naming where, what was expected and what was found.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::records::Origin;

/// Where in a file something stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// A line of a JSON-lines file, counted from 1.
    Line(usize),
    /// An item of a JSON array, counted from 0.
    Item(usize),
    /// The members of a tar archive that share a name up to its first dot.
    Key(Box<str>),
    /// A row of a table, counted from 0.
    Row(usize),
    /// A byte of a file, counted from 0.
    Byte(u64),
    /// The file as a whole.
    Whole,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, ":{line}"),
            Self::Item(item) => write!(f, " item {item}"),
            Self::Key(key) => write!(f, "[{key}]"),
            Self::Row(row) => write!(f, " row {row}"),
            Self::Byte(byte) => write!(f, " at byte {byte}"),
            Self::Whole => Ok(()),
        }
    }
}

/// The errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file could not be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Text that is no JSON.
    #[error("{}{place}: expected JSON, found {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A field is missing or holds something else than it should.
    #[error("{}{place}: {field}: expected {expected}, found {found}", path.display())]
    Field {
        /// The file.
        path: Box<Path>,
        /// Where in it.
        place: Place,
        /// The field, as a path such as `elems[2].bb`.
        field: String,
        /// What should have been there.
        expected: String,
        /// What was there.
        found: String,
    },
    /// A shard, or a part of one, that cannot be had, or is not what it should be.
    #[error("{}{place}: expected {expected}, found {found}", path.display())]
    Shard {
        /// The file or URL.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What should have been there.
        expected: String,
        /// What was there.
        found: String,
    },
    /// A shard that cannot be opened, told again for each of its records; the data set counts it once.
    #[error(transparent)]
    Unopened(std::sync::Arc<DataError>),
    /// A temporary file, into which shards are fetched or unpacked, that cannot be made or written. That says nothing of
    /// the data, so it ends a run.
    #[error("{}: expected room for the temporary file of a shard (spool_dir), found {source}", folder.display())]
    Spool {
        /// The folder of temporary files.
        folder: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A record that an index file says is broken.
    #[error("{}{place}: {reason}", path.display())]
    Indexed {
        /// The file or URL.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What is wrong with it.
        reason: String,
    },
    /// An image that cannot be read or decoded.
    #[error("image {name}: expected a JPEG, PNG, WebP or GIF, found {message}")]
    Image {
        /// The image's file, or the record that carries it.
        name: String,
        /// What the decoder said.
        message: String,
    },
    /// An image whose header claims no pixels, or more than are allowed.
    #[error("image {name}: expected 1 to {limit} pixels, found {width}x{height}")]
    ImageSize {
        /// The image's file, or the record that carries it.
        name: String,
        /// The most pixels allowed.
        limit: u64,
        /// Width in pixels as the header has it.
        width: u32,
        /// Height in pixels as the header has it.
        height: u32,
    },
    /// A box that reaches outside its image by more than a pixel.
    #[error("{origin}: {field}: expected a box (x, y, w, h) inside the {width}x{height} image, found {bbox:?}")]
    BoxOutside {
        /// The record: file and line.
        origin: String,
        /// The field, as a path such as `elems[2].bb`.
        field: String,
        /// The box as written, in pixels.
        bbox: [f32; 4],
        /// The image's width in pixels.
        width: u32,
        /// The image's height in pixels.
        height: u32,
    },
    /// A text of which cleaning leaves nothing.
    #[error("expected a text with at least one word, found {text:?}")]
    EmptyText {
        /// The text before cleaning.
        text: String,
    },
    /// A record that has no text for the batch it was asked for.
    #[error("{origin}: expected {expected}, found none")]
    MissingText {
        /// The record: file and line.
        origin: String,
        /// What kind of text was wanted.
        expected: &'static str,
    },
    /// A tokenizer that cannot be read, built or applied.
    #[error("tokenizer {name}: expected {expected}, found {found}")]
    Tokenizer {
        /// The file, or what it was built from.
        name: String,
        /// What should have been there.
        expected: String,
        /// What was there.
        found: String,
    },
    /// A configuration value that makes no sense.
    #[error("configuration: {field}: expected {expected}, found {found}")]
    Config {
        /// The field's name.
        field: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// So many records are broken that something is wrong with the data as a whole.
    #[error("expected at most {limit} of the records to be broken, found {broken} of {seen}, such as{examples}")]
    TooManyBroken {
        /// How often a broken record was met.
        broken: u64,
        /// How often any record was taken.
        seen: u64,
        /// The largest share allowed.
        limit: f64,
        /// The first few, a line each.
        examples: String,
    },
    /// A conversion of which nothing came out.
    #[error("{name}: expected at least one image that can be used, found none:\n{reasons}")]
    NothingLeft {
        /// The data set.
        name: String,
        /// What was left out and why, with examples, a line each.
        reasons: String,
    },
    /// The caller asked to stop.
    #[error("expected to go on, found a request to stop; what is finished is kept")]
    Stopped,
    /// A batch that could not be turned into tensors.
    #[error("a batch on the device: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A worker thread that the system would not start.
    #[error("expected to start a worker thread, found {0}")]
    Thread(#[source] std::io::Error),
    /// The code that makes a sample of a record panicked: a mistake of this program.
    #[error("{origin}: expected a sample of this record, found a panic: {message}")]
    RecordPanic {
        /// Where the record is, in words.
        origin: String,
        /// The panic's message.
        message: String,
    },
    /// The code that builds a batch panicked on a loader's worker thread.
    #[error("building the batch of step {step}: expected a batch, found a panic: {message}")]
    WorkerPanic {
        /// The step.
        step: u64,
        /// The panic's message.
        message: String,
    },
}

impl DataError {
    /// [`Self::TooManyBroken`] with the first few of what is broken.
    pub fn too_many_broken(
        broken: u64,
        seen: u64,
        limit: f64,
        examples: impl IntoIterator<Item = impl std::fmt::Display>,
    ) -> Self {
        const EXAMPLES: usize = 5;
        let examples = examples.into_iter().take(EXAMPLES).map(|example| format!("\n  {example}")).collect();
        Self::TooManyBroken { broken, seen, limit, examples }
    }

    /// What kind of error it is, without what is of one record only: errors are counted by this.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Io { source, .. } => format!("a file that cannot be read: {}", source.kind()),
            Self::Json { .. } => "no JSON".to_owned(),
            Self::Field { field, expected, .. } => format!("{}: not {expected}", without_numbers(field)),
            Self::Shard { expected, .. } => format!("not {}", any_numbers(expected)),
            Self::Unopened(error) => error.reason(),
            Self::Spool { source, .. } => format!("no room for a temporary file: {}", source.kind()),
            Self::Indexed { reason, .. } => any_numbers(reason),
            Self::ImageSize { .. } => "an image of no pixels, or of more than are allowed".to_owned(),
            Self::Image { .. } => "an image that cannot be read".to_owned(),
            Self::BoxOutside { field, .. } => format!("{}: a box outside its image", without_numbers(field)),
            Self::EmptyText { .. } => "a text without a word".to_owned(),
            Self::MissingText { expected, .. } => format!("without {expected}"),
            Self::Tokenizer { .. } => "a text that the tokenizer refuses".to_owned(),
            other => other.to_string(),
        }
    }

    /// The record, or file, that it is about, if it is about one.
    #[must_use]
    pub fn origin(&self) -> Option<Origin> {
        let (path, place) = match self {
            Self::Io { path, .. } => (path.as_path(), &Place::Whole),
            Self::Field { path, place, .. } => (&**path, place),
            Self::Json { path, place, .. } | Self::Shard { path, place, .. } | Self::Indexed { path, place, .. } => {
                (path.as_path(), place)
            }
            Self::Unopened(error) => return error.origin(),
            _ => return None,
        };
        Some(Origin { file: path.into(), place: place.clone() })
    }
}

/// A field's path such as `elems[2].bb` without its numbers.
fn without_numbers(field: &str) -> String {
    field.split_inclusive('[').map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit())).collect()
}

/// A text in which `N` stands for every number.
fn any_numbers(text: &str) -> String {
    let mut after_digit = false;
    let letter = |c: char| {
        let again = std::mem::replace(&mut after_digit, c.is_ascii_digit());
        match (c.is_ascii_digit(), again) {
            (true, true) => None,
            (true, false) => Some('N'),
            (false, _) => Some(c),
        }
    };
    text.chars().filter_map(letter).collect()
}

/// The first characters of a value, for messages.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()),
        None => text.to_owned(),
    }
}
