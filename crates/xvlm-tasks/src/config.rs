//! The configuration of a pre-training run: YAML, presets, single values on the command line.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_norway::Value;
use xvlm_data::{BatchConfig, DataError, DatasetConfig, LoaderConfig, SourceConfig};
use xvlm_encoders::{Task, XvlmConfig};
use xvlm_train::{TrainConfig, TrainError};
use xvlm_weights::StoredType;

use crate::error::ConfigProblem;
use crate::official;

/// A pre-training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainConfig {
    /// Where records come from: files, folders, patterns and URLs of shards, or objects that say more. Those with captions
    /// make the image stream.
    pub train_file: Vec<SourceConfig>,
    /// Where those of the region stream come from; if left out, `train_file`.
    #[serde(default)]
    pub train_file_regions: Vec<SourceConfig>,
    /// How shards are read and mixed.
    #[serde(default)]
    pub dataset: DatasetConfig,
    /// `tokenizer.json` or `vocab.txt`; if left out, the vocabulary of the built-in world.
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    /// A model folder to start from instead of random weights.
    #[serde(default)]
    pub init_from: Option<PathBuf>,
    /// Sizes of the model.
    pub model: XvlmConfig,
    /// What to train for; everything, unless listed. With `[itc]` alone nothing is fused: a step is cheap, and a model that
    /// starts from random weights first learns to see and to read.
    #[serde(default = "default_objectives")]
    pub objectives: Vec<Objective>,
    /// How strongly ITC pulls, if several processes train together.
    #[serde(default)]
    pub itc_gradient: ItcGradient,
    /// How often the region stream gets a batch.
    #[serde(default)]
    pub regions: RegionStream,
    /// What a batch is made of.
    #[serde(default)]
    pub data: BatchConfig,
    /// Threads that build batches.
    #[serde(default)]
    pub loader: LoaderConfig,
    /// Memory for decoded images, in MiB.
    #[serde(default = "default_cache")]
    pub image_cache_mib: usize,
    /// Optimizer, schedule, checkpoints.
    #[serde(default)]
    pub train: TrainConfig,
    /// How the finished model's weights are stored.
    #[serde(default = "default_stored")]
    pub stored: StoredType,
}

/// What a model is pre-trained for (§3.2 and §3.3 of the paper).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// Image–text contrastive loss.
    Itc,
    /// Image–text matching with hard negatives.
    Itm,
    /// Masked language modelling.
    Mlm,
    /// The box of a text in the whole image.
    Box,
    /// The next word of captions and answers, if `data.generation` is set.
    Generation,
}

impl Objective {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Itc, Self::Itm, Self::Mlm, Self::Box, Self::Generation];
}

/// What ITC, which compares the samples of all processes, adds to the gradient of the features of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ItcGradient {
    /// As much as if one process had all samples, whatever the number of processes.
    #[default]
    Whole,
    /// As much as in the official code: the mean over processes divides it by their number, although each has only its own
    /// part of it. So beside the other losses, ITC trains the encoders with 1/8 of its weight on the paper's 8 GPUs.
    Original,
}

fn default_objectives() -> Vec<Objective> {
    Objective::ALL.to_vec()
}

fn default_cache() -> usize {
    2048
}

fn default_stored() -> StoredType {
    StoredType::F32
}

/// The region stream.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionStream {
    /// Probability that an iteration has a region batch.
    pub iter_perc: f64,
}

impl Default for RegionStream {
    fn default() -> Self {
        Self { iter_perc: 0.5 }
    }
}

const PRESETS: [(&str, &str); 3] = [
    ("scenes-align", include_str!("../presets/scenes-align.yaml")),
    ("scenes", include_str!("../presets/scenes.yaml")),
    ("base-4m", include_str!("../presets/base-4m.yaml")),
];

impl PretrainConfig {
    /// Names of the compiled-in configurations.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|(name, _)| *name)
    }

    /// Checks that every value is in its range; says which is not, by its full name.
    pub(crate) fn check_values(&self) -> Result<(), String> {
        let out_of_range = |section: &str, field: &str, expected: String, found: String| {
            format!("{section}.{field}: expected {expected}, found {found}")
        };
        self.data.check().map_err(|error| match error {
            DataError::Config { field, expected, found } => out_of_range("data", field, expected, found),
            other => other.to_string(),
        })?;
        self.train.check().map_err(|error| match error {
            TrainError::Config { field, expected, found } => out_of_range("train", field, expected.to_owned(), found),
            other => other.to_string(),
        })?;
        let mut model = self.model.clone();
        // 0 stands for as many as the tokenizer knows.
        model.text_config.vocab_size = model.text_config.vocab_size.max(1);
        model.validate().map_err(|error| out_of_range("model", error.field, error.expected, error.found))?;
        let iter_perc = self.regions.iter_perc;
        if !(0.0..=1.0).contains(&iter_perc) {
            return Err(format!("regions.iter_perc: expected a probability, found {iter_perc}"));
        }
        if self.model.task != Task::Pretrain {
            return Err(format!("model.task: expected pretrain, found {}", self.model.task.name()));
        }
        let of_both = [Objective::Itc, Objective::Itm, Objective::Mlm];
        if !self.objectives.iter().any(|objective| of_both.contains(objective)) {
            let found = format!("{:?}", self.objectives).to_lowercase();
            let expected = "itc, itm or mlm among them, which both streams have";
            return Err(format!("objectives: expected {expected}, found {found}"));
        }
        Ok(())
    }

    /// The YAML of a compiled-in configuration.
    ///
    /// # Errors
    /// If there is none of that name; the message has the nearest.
    pub fn preset_text(name: &str) -> Result<&'static str, ConfigProblem> {
        let text = PRESETS.iter().find(|(preset, _)| *preset == name).map(|(_, text)| *text);
        text.ok_or_else(|| ConfigProblem {
            file: "preset".to_owned(),
            message: format!("unknown preset `{name}`{}", suggestion(name, Self::presets())),
        })
    }

    /// A compiled-in configuration with single values replaced.
    ///
    /// # Errors
    /// As [`Self::from_yaml`], or if there is no preset of that name.
    pub fn preset(name: &str, overrides: &[String]) -> Result<Self, ConfigProblem> {
        Self::from_yaml(&format!("preset {name}"), Self::preset_text(name)?, overrides)
    }

    /// A configuration file with single values replaced: one of this form, or one of the original, whose values are first put
    /// into this form. Paths in it are relative to the current directory.
    ///
    /// # Errors
    /// As [`Self::from_yaml`] and [`official::pretrain_config`], or if the file cannot be read.
    pub fn open(path: &Path, overrides: &[String]) -> Result<Self, ConfigProblem> {
        let file = path.display().to_string();
        let problem = |message: String| ConfigProblem { file: file.clone(), message };
        let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
        let value = serde_norway::from_str::<serde_json::Value>(&text).ok().filter(official::is_official);
        let Some(value) = value else { return Self::from_yaml(&file, &text, overrides) };
        let text = serde_norway::to_string(&official::pretrain_config(&value, path)?);
        Self::from_yaml(&file, &text.map_err(|error| problem(error.to_string()))?, overrides)
    }

    /// Reads YAML; `overrides` are of the form `a.b=value`, the value again YAML.
    ///
    /// # Errors
    /// If it is no YAML, a key is unknown (the message has the nearest known one), or a value has the wrong type or is out of
    /// its range.
    pub fn from_yaml(file: &str, text: &str, overrides: &[String]) -> Result<Self, ConfigProblem> {
        let problem = |message: String| ConfigProblem { file: file.to_owned(), message };
        // Straight from the text: only then do errors name line and column.
        let plain = || deserialized(serde_norway::Deserializer::from_str(text)).map_err(problem);
        if overrides.is_empty() {
            let config = plain()?;
            config.check_values().map_err(problem)?;
            return Ok(config);
        }
        let mut value: Value = serde_norway::from_str(text).map_err(|error| problem(error.to_string()))?;
        for assignment in overrides {
            set(&mut value, assignment)
                .map_err(|message| ConfigProblem { file: format!("--set {assignment}"), message })?;
        }
        let replaced = |message| ConfigProblem { file: format!("{file} with --set"), message };
        // What is wrong without the replacements too is wrong in the file.
        let config = deserialized(value).map_err(|message| plain().err().unwrap_or_else(|| replaced(message)))?;
        config.check_values().map_err(replaced)?;
        Ok(config)
    }
}

/// Replaces one value: `a.b=value`.
fn set(root: &mut Value, assignment: &str) -> Result<(), String> {
    let (path, value) = assignment.split_once('=').ok_or("expected the form key.key=value")?;
    let value: Value = serde_norway::from_str(value).map_err(|error| error.to_string())?;
    let mut slot = root;
    for key in path.split('.') {
        if slot.is_null() {
            *slot = Value::Mapping(Default::default());
        }
        let Value::Mapping(mapping) = slot else {
            return Err(format!("{key}: expected a section before it, found a value"));
        };
        slot = mapping.entry(Value::from(key)).or_insert(Value::Null);
    }
    *slot = value;
    Ok(())
}

/// Reads a configuration; errors name the field, and the nearest known key.
fn deserialized<'de, D>(from: D) -> Result<PretrainConfig, String>
where
    D: serde::Deserializer<'de, Error = serde_norway::Error>,
{
    serde_path_to_error::deserialize(from).map_err(|error| {
        let (field, message) = (error.path().to_string(), with_suggestion(&error.inner().to_string()));
        // Errors of YAML itself have no field, and those of serde_norway may begin with it.
        match field == "." || message.starts_with(&field) {
            true => message,
            false => format!("{field}: {message}"),
        }
    })
}

/// Adds the nearest known key to serde's "unknown field `x`, expected one of `a`, `b`".
fn with_suggestion(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    match quoted.next() {
        Some(unknown) if message.contains("unknown field") => format!("{message}{}", suggestion(unknown, quoted)),
        _ => message.to_owned(),
    }
}

pub(crate) fn suggestion<'a>(unknown: &str, known: impl Iterator<Item = &'a str>) -> String {
    let nearest = known.max_by(|a, b| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b)));
    nearest.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid() {
        for name in PretrainConfig::presets() {
            PretrainConfig::preset(name, &[]).unwrap();
        }
    }

    #[test]
    fn one_value_can_be_replaced() {
        let set = ["train.optimizer.lr=0.5".to_owned(), "train_file=[a.jsonl, b.jsonl]".to_owned()];
        let config = PretrainConfig::preset("scenes", &set).unwrap();
        assert_eq!(config.train.optimizer.lr, 0.5);
        assert_eq!(config.train_file, ["a.jsonl", "b.jsonl"].map(|file| SourceConfig::files([file])));
    }

    #[test]
    fn what_a_file_lacks_may_be_set() {
        let text = "model: {}\n";
        let lacking = PretrainConfig::from_yaml("a.yaml", text, &[]).unwrap_err().to_string();
        assert!(lacking.starts_with("a.yaml: "), "{lacking}");
        let set = ["train_file=[a.jsonl]".to_owned()];
        let whole = PretrainConfig::preset_text("scenes").unwrap().replace("train_file: []\n", "");
        assert!(PretrainConfig::from_yaml("a.yaml", &whole, &[]).is_err());
        assert_eq!(
            PretrainConfig::from_yaml("a.yaml", &whole, &set).unwrap().train_file,
            [SourceConfig::files(["a.jsonl"])]
        );
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest() {
        let message = |set: &str| PretrainConfig::preset("scenes", &[set.to_owned()]).unwrap_err().to_string();
        assert!(message("data.batchsize=3").contains("did you mean `batch_size`?"), "{}", message("data.batchsize=3"));
        assert!(message("trian.seed=3").contains("did you mean `train`?"));
        assert!(message("data.batch_size=many").contains("batch_size"), "{}", message("data.batch_size=many"));
        assert!(message("data").contains("key.key=value"));
        assert!(message("data.batch_size=0").contains("data.batch_size: expected at least 1, found 0"));
        assert!(message("train.optimizer.lr=-1").contains("train.optimizer.lr: expected a positive number, found -1"));
        assert!(message("model.vision_config.window_size=3").contains("model.vision_config.window_size"));
        assert!(message("regions.iter_perc=2").contains("regions.iter_perc"));
        let error = PretrainConfig::preset("scene", &[]).unwrap_err().to_string();
        assert!(error.contains("did you mean `scenes`?"), "{error}");
    }
}
