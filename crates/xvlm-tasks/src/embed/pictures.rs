//! Where the pictures that are embedded come from.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use xvlm_data::annotations::{CaptionItem, Reading, Report};
use xvlm_data::storage::expand;
use xvlm_data::{
    DataError, Dataset, DatasetConfig, ImageSource, Location, Origin, Place, Record, SourceConfig, StorageOptions,
};

use super::{PART, digest};
use crate::error::{TaskError, wrong_data};

/// What names of pictures end in.
const EXTENSIONS: [&str; 5] = ["jpg", "jpeg", "png", "webp", "gif"];

/// A picture with its texts.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The picture's identifier.
    pub id: String,
    /// The picture, its captions and its boxes.
    pub record: Record,
}

/// Pictures to be embedded.
#[derive(Clone, Debug)]
pub enum Pictures {
    /// Files that are known by name.
    Listed {
        /// The pictures.
        entries: Vec<Entry>,
        /// Whether pictures are turned as their EXIF orientation says.
        upright: bool,
    },
    /// Records of shards, read one after the other.
    Shards {
        /// The shards.
        shards: Vec<Location>,
        /// What paths of images are relative to, if not the shard's folder.
        image_root: Option<PathBuf>,
    },
}

/// What is embedded in one go.
#[derive(Clone, Debug)]
pub(super) enum Unit {
    /// Some of the pictures that are known by name.
    Listed { range: Range<usize>, name: String },
    /// A shard.
    Shard(Location),
}

impl Unit {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Listed { name, .. } => name.clone(),
            Self::Shard(location) => location.name().display().to_string(),
        }
    }
}

fn entry(id: String, path: PathBuf, captions: Vec<String>) -> Entry {
    let origin = Origin { file: Arc::from(path.as_path()), place: Place::Whole };
    let image = ImageSource::Path(path);
    Entry { id, record: Record { image, captions, elems: Vec::new(), questions: Vec::new(), origin } }
}

impl Pictures {
    /// All pictures below a folder, by name; a picture is known by its path below it. What begins with a dot is passed over.
    ///
    /// # Errors
    /// If a folder cannot be read, or there are none.
    pub fn folder(dir: &Path) -> Result<Self, TaskError> {
        let mut paths = Vec::new();
        let mut folders = vec![dir.to_owned()];
        while let Some(folder) = folders.pop() {
            let failed = |source: io::Error| DataError::Io { path: folder.clone(), source };
            for found in std::fs::read_dir(&folder).map_err(failed)? {
                let found = found.map_err(failed)?;
                let path = found.path();
                let is_hidden = found.file_name().to_string_lossy().starts_with('.');
                let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
                match found.file_type().map_err(failed)? {
                    _ if is_hidden => {}
                    kind if kind.is_dir() => folders.push(path),
                    _ if EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known)) => paths.push(path),
                    _ => {}
                }
            }
        }
        paths.sort();
        let id = |path: &PathBuf| path.strip_prefix(dir).unwrap_or(path).display().to_string();
        let entries = paths.into_iter().map(|path| entry(id(&path), path, Vec::new()));
        Self::listed(entries.collect(), true, dir)
    }

    /// The pictures that a text file lists, a path a line, relative to the folder of the file.
    ///
    /// # Errors
    /// If the file cannot be read, or there are none.
    pub fn list(file: &Path) -> Result<Self, TaskError> {
        let text = std::fs::read_to_string(file).map_err(|source| DataError::Io { path: file.to_owned(), source })?;
        let root = file.parent().unwrap_or(Path::new(""));
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let entries = lines.map(|line| entry(line.to_owned(), root.join(line), Vec::new()));
        Self::listed(entries.collect(), true, file)
    }

    /// The pictures of annotation files with captions, as [`Reading::captions`] reads them; and what was left out of these.
    ///
    /// # Errors
    /// If a file cannot be read or is of none of the forms, or there are no pictures.
    pub fn annotated(files: &[PathBuf], image_root: Option<&Path>) -> Result<(Self, Report), TaskError> {
        let reading = Reading { images: image_root.map(Path::to_owned), ..Reading::default() };
        let loaded = reading.captions(files)?;
        let entries = CaptionItem::by_image(loaded.items).into_iter();
        let entries = entries.map(|item| entry(item.id, item.image, item.captions));
        let first = files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
        Ok((Self::listed(entries.collect(), false, first)?, loaded.report))
    }

    /// The records of shards: JSON lines, tar archives, Parquet tables; patterns and folders as [`expand`] takes them.
    ///
    /// # Errors
    /// If a pattern fits nothing.
    pub fn shards(files: &[String], image_root: Option<&Path>) -> Result<Self, TaskError> {
        let mut shards = Vec::new();
        for entry in files {
            shards.extend(expand(entry, &StorageOptions::default())?);
        }
        match shards.is_empty() {
            true => Err(TaskError::Empty { what: "shards".to_owned() }),
            false => Ok(Self::Shards { shards, image_root: image_root.map(Path::to_owned) }),
        }
    }

    fn listed(entries: Vec<Entry>, upright: bool, from: &Path) -> Result<Self, TaskError> {
        match entries.is_empty() {
            true => Err(TaskError::Empty { what: format!("{}: pictures", from.display()) }),
            false => Ok(Self::Listed { entries, upright }),
        }
    }

    /// The files of those that are known by name, in their order; none of shards.
    pub fn paths(self) -> Vec<PathBuf> {
        let Self::Listed { entries, .. } = self else { return Vec::new() };
        let path = |entry: Entry| match entry.record.image {
            ImageSource::Path(path) => Some(path),
            ImageSource::Bytes(_) => None,
        };
        entries.into_iter().filter_map(path).collect()
    }

    /// Number of pictures, if it is known.
    pub(super) fn known(&self) -> Option<usize> {
        match self {
            Self::Listed { entries, .. } => Some(entries.len()),
            Self::Shards { .. } => None,
        }
    }

    pub(super) fn upright(&self) -> bool {
        matches!(self, Self::Listed { upright: true, .. })
    }

    /// What is embedded in one go, each.
    pub(super) fn units(&self) -> Result<Vec<Unit>, TaskError> {
        Ok(match self {
            Self::Listed { entries, .. } => (0..entries.len())
                .step_by(PART)
                .map(|start| {
                    let range = start..(start + PART).min(entries.len());
                    let digest = digest(entries[range.clone()].iter().map(|entry| entry.id.as_str()));
                    Unit::Listed { name: json!([entries[start].id, range.len(), digest]).to_string(), range }
                })
                .collect(),
            Self::Shards { shards, .. } => shards.iter().cloned().map(Unit::Shard).collect(),
        })
    }

    /// Reads a unit, `batch` records at a time; broken ones are told too.
    pub(super) fn visit(
        &self,
        unit: &Unit,
        batch: usize,
        each: &mut dyn FnMut(Vec<Result<Entry, DataError>>) -> Result<(), TaskError>,
    ) -> Result<(), TaskError> {
        match (self, unit) {
            (Self::Listed { entries, .. }, Unit::Listed { range, .. }) => {
                let entries = &entries[range.clone()];
                entries.chunks(batch).try_for_each(|entries| each(entries.iter().cloned().map(Ok).collect()))
            }
            (Self::Shards { image_root, .. }, Unit::Shard(location)) => {
                let file = match location {
                    Location::File(path) => path
                        .to_str()
                        .ok_or_else(|| wrong_data(path, Place::Whole, "name", "a name in UTF-8", "another"))?,
                    Location::Url(url) => url,
                };
                let source = SourceConfig { image_root: image_root.clone(), ..SourceConfig::files([file]) };
                let dataset = match Dataset::open(&[source], &DatasetConfig::default(), &StorageOptions::default()) {
                    Ok(dataset) => dataset,
                    // Of a shard nothing of which can be read, the others are not to suffer.
                    Err(error) => return each(vec![Err(error)]),
                };
                let mut waiting = Vec::with_capacity(batch);
                dataset.visit(|record| {
                    waiting.push(record.map(|record| {
                        let record = Arc::unwrap_or_clone(record);
                        Entry { id: record.origin.to_string(), record }
                    }));
                    match waiting.len() < batch {
                        true => Ok(()),
                        false => each(std::mem::take(&mut waiting)),
                    }
                })?;
                if waiting.is_empty() { Ok(()) } else { each(waiting) }
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_the_folder_or_the_list() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("b")).unwrap();
        for name in ["c.png", "b/a.JPG", "b/.hidden.png", "note.txt"] {
            std::fs::write(at(name), "").unwrap();
        }
        std::fs::write(at("list.txt"), "c.png\n\nb/a.JPG\n").unwrap();
        std::fs::write(at("shard.jsonl"), "").unwrap();
        assert_eq!(Pictures::folder(dir.path()).unwrap().paths(), [at("b/a.JPG"), at("c.png")]);
        assert_eq!(Pictures::list(&at("list.txt")).unwrap().paths(), [at("c.png"), at("b/a.JPG")]);
        let shards = [at("shard.jsonl").display().to_string()];
        assert!(Pictures::shards(&shards, None).unwrap().paths().is_empty());
    }
}
