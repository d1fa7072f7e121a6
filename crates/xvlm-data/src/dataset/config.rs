//! What a data set is made of.

use std::fmt;
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde::{Serialize, Serializer};

use crate::error::DataError;
use crate::records::RecordKeys;
use crate::shards::ShardLimits;

/// A source of records. In a configuration it is a file, or an object with `files` and more.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SourceConfig {
    /// Files, folders, patterns and URLs; see [`expand`](crate::storage::expand).
    pub files: Vec<String>,
    /// How often its records are drawn, relative to the other sources: all have a weight, or none has. Without weights
    /// the sources are one, of which each record is drawn once an epoch.
    pub weight: Option<f64>,
    /// What paths of images are relative to, and must not leave. Default: the folder of the shard. `/` permits any.
    pub image_root: Option<PathBuf>,
    /// Under which keys a record has its image and captions.
    pub keys: RecordKeys,
}

impl SourceConfig {
    /// Files, folders, patterns and URLs as they are.
    pub fn files(files: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { files: files.into_iter().map(Into::into).collect(), ..Self::default() }
    }
}

/// The object that stands for a source.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(rename = "source")]
#[serde(deny_unknown_fields)]
struct Full {
    files: Files,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weight: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    image_root: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    image_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    is_image_rpath: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    caption_key: Option<String>,
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(untagged)]
enum Files {
    One(String),
    Many(Vec<String>),
}

impl Serialize for SourceConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let [file] = self.files.as_slice()
            && *self == Self::files([file])
        {
            return serializer.serialize_str(file);
        }
        let full = Full {
            files: Files::Many(self.files.clone()),
            weight: self.weight,
            image_root: self.image_root.clone(),
            image_key: self.keys.image_key.clone(),
            is_image_rpath: self.keys.is_image_rpath,
            caption_key: self.keys.caption_key.clone(),
        };
        full.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SourceConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Source;
        impl<'de> Visitor<'de> for Source {
            type Value = SourceConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a file, or an object with files")
            }

            fn visit_str<E: de::Error>(self, file: &str) -> Result<Self::Value, E> {
                Ok(SourceConfig::files([file]))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let full = Full::deserialize(MapAccessDeserializer::new(map))?;
                let files = match full.files {
                    Files::One(file) => vec![file],
                    Files::Many(files) => files,
                };
                let (image_key, is_image_rpath, caption_key) = (full.image_key, full.is_image_rpath, full.caption_key);
                let keys = RecordKeys { image_key, is_image_rpath, caption_key };
                Ok(SourceConfig { files, weight: full.weight, image_root: full.image_root, keys })
            }
        }
        deserializer.deserialize_any(Source)
    }
}

/// How shards are read and mixed.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetConfig {
    /// Shards whose records are shuffled together. Default: all, if every shard can be sought in as it lies, else 4. For
    /// each source and stream the temporary files of three windows are kept (the last two and the next), or of 16 if those
    /// have a few records only.
    pub window: Option<usize>,
    /// A folder in which the indices of shards that are fetched or unpacked are kept, so that a run that is resumed there
    /// fetches no shard again just to learn how many records come before its position. It goes with one state of the
    /// shards: of changed ones it has to be emptied. Default: none.
    pub index_dir: Option<PathBuf>,
    /// Bounds on what files may make a reader do.
    pub limits: ShardLimits,
}

pub(super) fn check(sources: &[SourceConfig], config: &DatasetConfig) -> Result<(), DataError> {
    let wrong =
        |field, expected: &str, found: String| Err(DataError::Config { field, expected: expected.to_owned(), found });
    if sources.iter().all(|source| source.files.is_empty()) {
        return wrong("files", "at least one file", "none".to_owned());
    }
    if config.window == Some(0) {
        return wrong("window", "at least 1", "0".to_owned());
    }
    let weighted = sources.iter().filter(|source| source.weight.is_some()).count();
    if weighted > 0 && weighted < sources.len() {
        let found = format!("{weighted} of {}", sources.len());
        return wrong("weight", "all sources to have one, or none", found);
    }
    for source in sources {
        if source.files.is_empty() {
            return wrong("files", "at least one file", "none".to_owned());
        }
        if let Some(weight) = source.weight.filter(|weight| !(weight.is_finite() && *weight > 0.0)) {
            return wrong("weight", "a number above 0", weight.to_string());
        }
    }
    Ok(())
}
