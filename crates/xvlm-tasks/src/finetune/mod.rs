//! The configuration of fine-tuning: what a pre-trained model is trained on next.

mod batches;
mod learn;
mod plan;
mod run;
mod start;
mod tasks;
mod validate;

use std::path::{Path, PathBuf};

use serde::de::{self, DeserializeOwned};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_norway::Value;
use xvlm_data::{BatchConfig, ItemConfig, LoaderConfig};
use xvlm_encoders::{Task, XvlmConfig};
use xvlm_weights::StoredType;

pub use learn::{Batch, Finetuning};
pub use plan::{FinetunePlan, FirstBatch, Said, TrainingItems, TrainingState, plan};
pub use run::run;
pub use start::{InitialWeights, initial_weights};
pub use tasks::{
    Baseline, BboxPretrainTask, BboxTask, CaptioningTask, NlvrTask, PairsTask, RetrievalTask, ScstTask, VqaTask,
    WeakGroundingTask,
};

use crate::config::{check_data, check_model, check_training, default_cache, default_stored};
use crate::error::ConfigProblem;
use crate::official;
use crate::presets::{Preset, Purpose};
use crate::training::Training;
use crate::yaml::{self, Configuration, suggestion};
use tasks::Own;

/// A run of fine-tuning, or of evaluation alone.
///
/// In a file, `task` is a section: its `name` is one of [`FinetuneKind::ALL`], the rest are the fields of that variant of
/// [`FinetuneTask`]. What batches are made of stands in the section `data`.
#[derive(Clone, Debug, PartialEq)]
pub struct FinetuneConfig {
    /// What is learnt, from which files.
    pub task: FinetuneTask,
    /// `tokenizer.json` or `vocab.txt`; if left out, that of `init_from`.
    pub tokenizer: Option<PathBuf>,
    /// The model folder to start from; what the task's model has and that one lacks starts from random weights.
    pub init_from: Option<PathBuf>,
    /// Sizes of the model; its `task` follows from this one.
    pub model: XvlmConfig,
    /// Threads that build batches.
    pub loader: LoaderConfig,
    /// Memory for decoded images, in MiB.
    pub image_cache_mib: usize,
    /// How long, optimizer, schedule, checkpoints; none where nothing is trained.
    pub train: Option<Training>,
    /// How the finished model's weights are stored.
    pub stored: StoredType,
}

/// The names of the tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinetuneKind {
    /// [`FinetuneTask::Retrieval`].
    Retrieval,
    /// [`FinetuneTask::Vqa`].
    Vqa,
    /// [`FinetuneTask::Nlvr`].
    Nlvr,
    /// [`FinetuneTask::NlvrPretrain`].
    NlvrPretrain,
    /// [`FinetuneTask::WeakGrounding`].
    WeakGrounding,
    /// [`FinetuneTask::Bbox`].
    Bbox,
    /// [`FinetuneTask::BboxPretrain`].
    BboxPretrain,
    /// [`FinetuneTask::Captioning`].
    Captioning,
    /// [`FinetuneTask::CaptioningPretrain`].
    CaptioningPretrain,
    /// [`FinetuneTask::CaptioningScst`].
    CaptioningScst,
}

impl FinetuneKind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Retrieval,
        Self::Vqa,
        Self::Nlvr,
        Self::NlvrPretrain,
        Self::WeakGrounding,
        Self::Bbox,
        Self::BboxPretrain,
        Self::Captioning,
        Self::CaptioningPretrain,
        Self::CaptioningScst,
    ];

    /// Its name, and what else it is called: the original's script, in lower case, and the tasks of its `run.py`.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Retrieval => &["retrieval", "itr_coco", "itr_flickr", "eval_vlue_itr"],
            Self::Vqa => &["vqa", "vqa_480", "eval_vlue_vqa"],
            Self::Nlvr => &["nlvr", "eval_vlue_nlvr"],
            Self::NlvrPretrain => &["nlvr_pretrain"],
            Self::WeakGrounding => &["weak_grounding", "grounding", "refcoco_weakly", "eval_vlue_refcoco_weakly"],
            Self::Bbox => &["bbox", "grounding_bbox", "refcoco_bbox", "eval_vlue_refcoco"],
            Self::BboxPretrain => &["bbox_pretrain", "grounding_bbox_pretrain"],
            Self::Captioning => &["captioning", "coco_captioning"],
            Self::CaptioningPretrain => &["captioning_pretrain", "coco_capt_domain"],
            Self::CaptioningScst => &["captioning_scst", "coco_captioning_scst"],
        }
    }

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        self.names()[0]
    }

    /// The task of a name, one of the original's among them.
    ///
    /// # Errors
    /// If there is none; the message has the nearest.
    pub fn of_name(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.names().contains(&name)).ok_or_else(|| {
            let nearest = suggestion(name, Self::ALL.into_iter().flat_map(Self::names).copied());
            format!("unknown task `{name}`{nearest}")
        })
    }

    /// What the model is for.
    pub fn model_task(self) -> Task {
        match self {
            // Boxes without boxes come from a model for search (`Grounding.py` imports `models/model_retrieval.py`).
            Self::Retrieval | Self::WeakGrounding => Task::Retrieval,
            Self::Vqa => Task::Vqa,
            Self::Nlvr => Task::Nlvr,
            Self::NlvrPretrain => Task::NlvrPretrain,
            Self::Bbox | Self::BboxPretrain => Task::Grounding,
            Self::Captioning | Self::CaptioningPretrain | Self::CaptioningScst => Task::Captioning,
        }
    }
}

macro_rules! tasks {
    ($($(#[$doc:meta])* $kind:ident($own:ty) = $name:literal;)*) => {
        /// What a pre-trained model is trained on, or evaluated on.
        #[derive(Clone, Debug, PartialEq, Serialize)]
        #[serde(tag = "name")]
        pub enum FinetuneTask {
            $($(#[$doc])* #[serde(rename = $name)] $kind($own),)*
        }

        impl FinetuneTask {
            /// Which task it is.
            pub fn kind(&self) -> FinetuneKind {
                match self {
                    $(Self::$kind(_) => FinetuneKind::$kind,)*
                }
            }

            /// What its batches are made of.
            pub fn data(&self) -> Data<'_> {
                match self {
                    $(Self::$kind(own) => Data::from(&own.data),)*
                }
            }

            fn check(&self, config: &FinetuneConfig) -> Result<(), String> {
                let (text, trains) = (&config.model.text_config, config.train.is_some());
                match self {
                    $(Self::$kind(own) => own.check(text, trains),)*
                }
            }

            fn read(kind: FinetuneKind, task: Value, data: Value) -> Result<Self, String> {
                Ok(match kind {
                    $(FinetuneKind::$kind => Self::$kind(read_own(task, data)?),)*
                })
            }
        }
    };
}

tasks! {
    /// Search.
    Retrieval(RetrievalTask) = "retrieval";
    /// Questions.
    Vqa(VqaTask) = "vqa";
    /// Statements about two images.
    Nlvr(NlvrTask) = "nlvr";
    /// Which of two images a text is about, before [`Self::Nlvr`].
    NlvrPretrain(PairsTask) = "nlvr_pretrain";
    /// Boxes, learnt without boxes.
    WeakGrounding(WeakGroundingTask) = "weak_grounding";
    /// Boxes of phrases.
    Bbox(BboxTask) = "bbox";
    /// Boxes of regions, before [`Self::Bbox`].
    BboxPretrain(BboxPretrainTask) = "bbox_pretrain";
    /// Captions.
    Captioning(CaptioningTask) = "captioning";
    /// The next word of captions, before [`Self::Captioning`].
    CaptioningPretrain(PairsTask) = "captioning_pretrain";
    /// Captions rewarded by CIDEr, after [`Self::Captioning`].
    CaptioningScst(ScstTask) = "captioning_scst";
}

impl FinetuneTask {
    /// The first epoch after which the model is evaluated, from 0.
    fn start_eval(&self) -> u64 {
        match self {
            Self::Vqa(task) => task.start_eval,
            Self::Captioning(task) => task.start_eval,
            _ => 0,
        }
    }
}

/// What batches are made of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Data<'a> {
    /// Annotated items.
    Items(&'a ItemConfig),
    /// Records of shards.
    Records(&'a BatchConfig),
}

impl<'a> From<&'a ItemConfig> for Data<'a> {
    fn from(config: &'a ItemConfig) -> Self {
        Self::Items(config)
    }
}

impl<'a> From<&'a BatchConfig> for Data<'a> {
    fn from(config: &'a BatchConfig) -> Self {
        Self::Records(config)
    }
}

impl Data<'_> {
    fn max_tokens(self) -> usize {
        match self {
            Self::Items(config) => config.max_tokens,
            Self::Records(config) => config.max_tokens,
        }
    }
}

fn read_own<T: Own<Data: DeserializeOwned> + DeserializeOwned>(task: Value, data: Value) -> Result<T, String> {
    let mut own: T = yaml::section("task", task)?;
    if !data.is_null() {
        *own.data_mut() = yaml::section("data", data)?;
    }
    Ok(own)
}

/// What a file has. `task` and `data` are read in a second step, since what they have depends on the task's name.
#[derive(Deserialize)]
#[serde(rename = "FinetuneConfig", deny_unknown_fields)]
struct Raw {
    task: Value,
    #[serde(default)]
    tokenizer: Option<PathBuf>,
    #[serde(default)]
    init_from: Option<PathBuf>,
    model: XvlmConfig,
    #[serde(default)]
    data: Value,
    #[serde(default)]
    loader: LoaderConfig,
    #[serde(default = "default_cache")]
    image_cache_mib: usize,
    #[serde(default)]
    train: Option<Training>,
    #[serde(default = "default_stored")]
    stored: StoredType,
}

impl TryFrom<Raw> for FinetuneConfig {
    type Error = String;

    fn try_from(raw: Raw) -> Result<Self, String> {
        let Raw { mut task, tokenizer, init_from, mut model, data, loader, image_cache_mib, train, stored } = raw;
        let name = task.as_mapping_mut().and_then(|fields| fields.remove("name"));
        let name = name.as_ref().and_then(Value::as_str).ok_or("task.name: expected the name of a task, found none")?;
        let kind = FinetuneKind::of_name(name).map_err(|message| format!("task.name: {message}"))?;
        if model.task == Task::default() {
            model.task = kind.model_task();
        }
        let task = FinetuneTask::read(kind, task, data)?;
        Ok(Self { task, tokenizer, init_from, model, loader, image_cache_mib, train, stored })
    }
}

impl<'de> Deserialize<'de> for FinetuneConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::try_from(Raw::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

impl Serialize for FinetuneConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Printed<'a> {
            task: &'a FinetuneTask,
            tokenizer: &'a Option<PathBuf>,
            init_from: &'a Option<PathBuf>,
            model: &'a XvlmConfig,
            data: Data<'a>,
            loader: &'a LoaderConfig,
            image_cache_mib: usize,
            #[serde(skip_serializing_if = "Option::is_none")]
            train: &'a Option<Training>,
            stored: StoredType,
        }
        let Self { task, tokenizer, init_from, model, loader, image_cache_mib, train, stored } = self;
        let (image_cache_mib, stored, data) = (*image_cache_mib, *stored, task.data());
        Printed { task, tokenizer, init_from, model, data, loader, image_cache_mib, train, stored }
            .serialize(serializer)
    }
}

impl Configuration for FinetuneConfig {
    fn check_values(&self) -> Result<(), String> {
        check_data(match self.task.data() {
            Data::Items(config) => config.check(),
            Data::Records(config) => config.check(),
        })?;
        self.train.iter().try_for_each(check_training)?;
        check_model(&self.model, self.task.kind().model_task())?;
        let (longest, tokens) = (self.model.text_config.longest_text(), self.task.data().max_tokens());
        if tokens > longest {
            return Err(format!("data.max_tokens: expected at most {longest}, found {tokens}"));
        }
        self.task.check(self)?;
        if let FinetuneTask::NlvrPretrain(task) = &self.task
            && task.data.batch_size < 3
        {
            let found = task.data.batch_size;
            return Err(format!("data.batch_size: expected at least 3, an image and two others, found {found}"));
        }
        let is_trained_on = |what| Err(format!("train: expected a section, since {what} is trained on, found none"));
        let start_eval = match (&self.task, &self.train) {
            (FinetuneTask::NlvrPretrain(_) | FinetuneTask::CaptioningPretrain(_), None) => {
                return is_trained_on("task.train_file");
            }
            (FinetuneTask::BboxPretrain(_), None) => return is_trained_on("task.train_file_regions"),
            (task, Some(_)) => task.start_eval(),
            (_, None) => 0,
        };
        let epochs = self.train.as_ref().and_then(|train| train.epochs);
        match epochs.filter(|&epochs| start_eval >= epochs) {
            Some(epochs) => {
                Err(format!("task.start_eval: expected less than train.epochs ({epochs}), found {start_eval}"))
            }
            None => Ok(()),
        }
    }
}

impl FinetuneConfig {
    /// Names of the compiled-in configurations.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        Preset::ALL.iter().filter(|preset| preset.purpose != Purpose::Pretrain).map(|preset| preset.name)
    }

    /// The YAML of a compiled-in configuration.
    ///
    /// # Errors
    /// If there is none of that name; the message has the nearest.
    pub fn preset_text(name: &str) -> Result<&'static str, ConfigProblem> {
        let preset = Preset::named(name)?;
        match preset.purpose {
            Purpose::Finetune(_) => Ok(preset.text),
            Purpose::Pretrain => {
                let known = Self::presets().collect::<Vec<_>>().join(", ");
                let message =
                    format!("expected one for fine-tuning ({known}), found {name}, which is for pre-training");
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

    /// A configuration file with single values replaced: one of this form, or one of the original, which does not say which
    /// task it is for. Paths in it are relative to the current directory.
    ///
    /// # Errors
    /// As [`Self::from_yaml`] and [`official::finetune_config`], if the file cannot be read, or if it is for another task.
    pub fn open(path: &Path, kind: FinetuneKind, overrides: &[String]) -> Result<Self, ConfigProblem> {
        let config: Self = yaml::open(path, overrides, |value| official::finetune_config(value, path, kind))?;
        match config.task.kind() {
            found if found == kind => Ok(config),
            found => {
                let message = format!("task.name: expected {}, found {}", kind.name(), found.name());
                Err(ConfigProblem { file: path.display().to_string(), message })
            }
        }
    }

    /// Reads YAML; `overrides` are of the form `a.b=value`, the value again YAML.
    ///
    /// # Errors
    /// If it is no YAML, a key is unknown (the message has the nearest known one), or a value has the wrong type or is out of
    /// its range.
    pub fn from_yaml(file: &str, text: &str, overrides: &[String]) -> Result<Self, ConfigProblem> {
        yaml::read(file, text, overrides)
    }

    /// The YAML of the configuration.
    ///
    /// # Errors
    /// If a path is no text.
    pub fn to_yaml(&self) -> Result<String, ConfigProblem> {
        serde_norway::to_string(self)
            .map_err(|error| ConfigProblem { file: "configuration".to_owned(), message: error.to_string() })
    }
}
