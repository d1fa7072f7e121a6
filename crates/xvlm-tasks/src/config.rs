//! The configuration of a pre-training run.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xvlm_data::{BatchConfig, DataError, DatasetConfig, LoaderConfig, SourceConfig};
use xvlm_encoders::{Task, XvlmConfig};
use xvlm_train::TrainError;
use xvlm_weights::StoredType;

use crate::error::ConfigProblem;
use crate::official;
use crate::presets::{Preset, Purpose};
use crate::training::Training;
use crate::yaml::{self, Configuration};

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
    /// Records of the image stream, which `train.epochs` counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_dataset_size: Option<u64>,
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
    /// How long, optimizer, schedule, checkpoints.
    #[serde(default)]
    pub train: Training,
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

pub(crate) fn default_cache() -> usize {
    2048
}

pub(crate) fn default_stored() -> StoredType {
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

impl Configuration for PretrainConfig {
    fn check_values(&self) -> Result<(), String> {
        check_data(self.data.check())?;
        check_training(&self.train)?;
        check_model(&self.model, Task::Pretrain)?;
        let iter_perc = self.regions.iter_perc;
        if !(0.0..=1.0).contains(&iter_perc) {
            return Err(format!("regions.iter_perc: expected a probability, found {iter_perc}"));
        }
        let of_both = [Objective::Itc, Objective::Itm, Objective::Mlm];
        if !self.objectives.iter().any(|objective| of_both.contains(objective)) {
            let found = format!("{:?}", self.objectives).to_lowercase();
            let expected = "itc, itm or mlm among them, which both streams have";
            return Err(format!("objectives: expected {expected}, found {found}"));
        }
        if self.train.epochs.is_some() && self.train_dataset_size.is_none_or(|size| size == 0) {
            let found = self.train_dataset_size.map_or("none".to_owned(), |size| size.to_string());
            return Err(format!("train_dataset_size: expected the number of records that epochs count, found {found}"));
        }
        Ok(())
    }
}

/// Names the section of what is wrong about batches.
pub(crate) fn check_data(checked: Result<(), DataError>) -> Result<(), String> {
    checked.map_err(|error| match error {
        DataError::Config { field, expected, found } => format!("data.{field}: expected {expected}, found {found}"),
        other => other.to_string(),
    })
}

/// Checks how to train.
pub(crate) fn check_training(train: &Training) -> Result<(), String> {
    if train.epochs == Some(0) {
        return Err("train.epochs: expected at least 1, found 0".to_owned());
    }
    train.check().map_err(|error| match error {
        TrainError::Config { field, expected, found } => format!("train.{field}: expected {expected}, found {found}"),
        other => other.to_string(),
    })
}

/// Checks the sizes of a model, and that it is for the task.
pub(crate) fn check_model(model: &XvlmConfig, task: Task) -> Result<(), String> {
    let mut sized = model.clone();
    // 0 stands for as many as the tokenizer knows.
    sized.text_config.vocab_size = sized.text_config.vocab_size.max(1);
    sized
        .validate()
        .map_err(|error| format!("model.{}: expected {}, found {}", error.field, error.expected, error.found))?;
    match model.task == task {
        true => Ok(()),
        false => Err(format!("model.task: expected {}, found {}", task.name(), model.task.name())),
    }
}

impl PretrainConfig {
    /// Names of the compiled-in configurations.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        Preset::ALL.iter().filter(|preset| preset.purpose == Purpose::Pretrain).map(|preset| preset.name)
    }

    /// The YAML of a compiled-in configuration.
    ///
    /// # Errors
    /// If there is none of that name; the message has the nearest.
    pub fn preset_text(name: &str) -> Result<&'static str, ConfigProblem> {
        let preset = Preset::named(name)?;
        match preset.purpose {
            Purpose::Pretrain => Ok(preset.text),
            Purpose::Finetune(kind) => {
                let known = Self::presets().collect::<Vec<_>>().join(", ");
                let found = format!("{name}, which is for fine-tuning ({})", kind.name());
                let message = format!("expected one for pre-training ({known}), found {found}");
                Err(ConfigProblem { file: "preset".to_owned(), message })
            }
        }
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
        yaml::open(path, overrides, |value| official::pretrain_config(value, path))
    }

    /// Reads YAML; `overrides` are of the form `a.b=value`, the value again YAML.
    ///
    /// # Errors
    /// If it is no YAML, a key is unknown (the message has the nearest known one), or a value has the wrong type or is out of
    /// its range.
    pub fn from_yaml(file: &str, text: &str, overrides: &[String]) -> Result<Self, ConfigProblem> {
        yaml::read(file, text, overrides)
    }

    /// The whole of it as YAML, which [`Self::from_yaml`] reads.
    ///
    /// # Errors
    /// If it cannot be written as YAML.
    pub fn to_yaml(&self) -> Result<String, ConfigProblem> {
        let problem =
            |error: serde_norway::Error| ConfigProblem { file: "configuration".to_owned(), message: error.to_string() };
        serde_norway::to_string(self).map_err(problem)
    }

    /// Iterations in place of epochs, where `ranks` processes train together.
    pub fn fix_length(&mut self, ranks: usize) {
        let batch = self.data.batch_size.saturating_mul(ranks).saturating_mul(self.train.accumulate) as u64;
        self.train.fix_length(self.train_dataset_size.unwrap_or(0), batch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid_and_can_be_written() {
        for name in PretrainConfig::presets() {
            let preset = PretrainConfig::preset(name, &[]).unwrap();
            assert_eq!(PretrainConfig::from_yaml("written", &preset.to_yaml().unwrap(), &[]).unwrap(), preset);
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
