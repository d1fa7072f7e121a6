//! What each task of fine-tuning has of its own. Fields have the names of the original's configuration files.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};
use xvlm_data::{BatchConfig, DatasetConfig, ItemConfig, SourceConfig};
use xvlm_encoders::BertConfig;

use crate::config::ItcGradient;
use crate::search::Search;

/// One file, or a list of them.
fn files<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a file or a list of files")]
    enum Files {
        One(PathBuf),
        Many(Vec<PathBuf>),
    }
    Ok(match Files::deserialize(deserializer)? {
        Files::One(file) => vec![file],
        Files::Many(files) => files,
    })
}

/// Search (`Retrieval.py`): ITC and ITM, judged by recalls.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetrievalTask {
    /// Annotations to train on; none where the configuration only evaluates.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub train_file: Vec<PathBuf>,
    /// Annotations to evaluate on during training.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub val_file: Vec<PathBuf>,
    /// Annotations of the test.
    #[serde(deserialize_with = "files")]
    pub test_file: Vec<PathBuf>,
    /// What paths of images are relative to.
    pub image_root: PathBuf,
    /// Images that are encoded at a time in evaluation.
    pub batch_size_test: usize,
    /// Texts that are encoded at a time in evaluation.
    pub batch_size_test_text: usize,
    /// How many candidates of the dual encoder are matched, both ways. 256 for COCO, 128 for Flickr30k.
    pub k_test: usize,
    /// How strongly ITC pulls, if several processes train together.
    #[serde(default)]
    pub itc_gradient: ItcGradient,
    /// Batches: section `data` of the file.
    #[serde(skip)]
    pub data: ItemConfig,
}

/// Questions (`VQA.py`): a decoder learns to write answers weighted by how many people gave them, and ranks a list of answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VqaTask {
    /// Annotations to train on; none where the configuration only evaluates.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub train_file: Vec<PathBuf>,
    /// Annotations of the test.
    #[serde(deserialize_with = "files")]
    pub test_file: Vec<PathBuf>,
    /// The answers that are ranked: a JSON list.
    pub answer_list: PathBuf,
    /// What paths of VQA's images are relative to.
    pub vqa_root: PathBuf,
    /// What paths of Visual Genome's images are relative to.
    pub vg_root: PathBuf,
    /// Questions at a time in evaluation.
    pub batch_size_test: usize,
    /// How many answers, chosen by their first token, are ranked by the whole.
    pub k_test: usize,
    /// Most questions about one image that go into a batch together, so that one look at the image serves them all;
    /// `data.batch_size` counts images. 1: each question has an image of its own, as in the original.
    #[serde(default = "one")]
    pub questions_per_image: usize,
    /// The first epoch after which the model is evaluated, from 0.
    #[serde(default)]
    pub start_eval: u64,
    /// Batches: section `data` of the file.
    #[serde(skip)]
    pub data: ItemConfig,
}

fn one() -> usize {
    1
}

/// A statement about two images (`NLVR.py`), judged by accuracy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NlvrTask {
    /// Annotations to train on; none where the configuration only evaluates.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub train_file: Vec<PathBuf>,
    /// Annotations to evaluate on during training.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub val_file: Vec<PathBuf>,
    /// Annotations of the test.
    #[serde(deserialize_with = "files")]
    pub test_file: Vec<PathBuf>,
    /// What paths of images are relative to.
    pub image_root: PathBuf,
    /// Statements at a time in evaluation.
    pub batch_size_test: usize,
    /// Batches: section `data` of the file.
    #[serde(skip)]
    pub data: ItemConfig,
}

/// Training on shards of images with captions, before a task: for NLVR2 which of two images a text is about
/// (`NLVR_pretrain.py`), for captioning the next word (`Captioning_pretrain.py`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairsTask {
    /// Shards; see [`PretrainConfig::train_file`](crate::PretrainConfig::train_file).
    pub train_file: Vec<SourceConfig>,
    /// Number of records, which `train.epochs` counts.
    pub train_dataset_size: u64,
    /// How shards are read and mixed.
    #[serde(default)]
    pub dataset: DatasetConfig,
    /// Batches: section `data` of the file.
    #[serde(skip)]
    pub data: BatchConfig,
}

/// Boxes without training on boxes (`Grounding.py`): search is fine-tuned, and where a layer of cross attention looks, times
/// the gradient of the match, chooses among boxes of a detector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeakGroundingTask {
    /// Annotations to train on; none where the configuration only evaluates.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub train_file: Vec<PathBuf>,
    /// Annotations to evaluate on.
    #[serde(deserialize_with = "files")]
    pub test_file: Vec<PathBuf>,
    /// What paths of images are relative to.
    pub image_root: PathBuf,
    /// The folder that has `refcoco+`, with its phrases and their boxes, as published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refcoco_data: Option<PathBuf>,
    /// Boxes of a detector, by image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub det_file: Option<PathBuf>,
    /// Sizes of the images: a field of the original, which is not read, since `refcoco_data` has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coco_file: Option<PathBuf>,
    /// Whether boxes and sizes stand in `test_file`, as in VLUE.
    #[serde(default)]
    pub vlue_test: bool,
    /// The layer whose cross attention is looked at, counted from the first text layer.
    pub block_num: usize,
    /// How strongly ITC pulls, if several processes train together.
    #[serde(default)]
    pub itc_gradient: ItcGradient,
    /// Phrases at a time in evaluation.
    pub batch_size_test: usize,
    /// Batches: section `data` of the file.
    #[serde(skip)]
    pub data: ItemConfig,
}

/// The box of a phrase (`Grounding_bbox.py`): L1 and GIoU, judged by accuracy at an IoU of 0.5.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BboxTask {
    /// Annotations to train on; none where the configuration only evaluates.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub train_file: Vec<PathBuf>,
    /// Annotations to evaluate on.
    #[serde(deserialize_with = "files")]
    pub test_file: Vec<PathBuf>,
    /// What paths of images are relative to.
    pub image_root: PathBuf,
    /// The folder that has `refcoco+`, with its phrases and their boxes, as published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refcoco_data: Option<PathBuf>,
    /// Whether boxes and sizes stand in `test_file`, as in VLUE.
    #[serde(default)]
    pub vlue_test: bool,
    /// Phrases at a time in evaluation.
    pub batch_size_test: usize,
    /// Batches: section `data` of the file.
    #[serde(skip)]
    pub data: ItemConfig,
}

/// Boxes of shards of images with regions (`Grounding_bbox_pretrain.py`), before those of phrases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BboxPretrainTask {
    /// Shards; see [`PretrainConfig::train_file_regions`](crate::PretrainConfig::train_file_regions).
    pub train_file_regions: Vec<SourceConfig>,
    /// Number of texts, which `train.epochs` counts: `data.max_regions` of them go into a batch.
    pub train_dataset_size: u64,
    /// How shards are read and mixed.
    #[serde(default)]
    pub dataset: DatasetConfig,
    /// Batches: section `data` of the file. `data.batch_size` is of no account.
    #[serde(skip)]
    pub data: BatchConfig,
}

/// Captions (`Captioning.py`): the next word after a prompt, judged by BLEU, CIDEr and others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptioningTask {
    /// Annotations to train on.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub train_file: Vec<PathBuf>,
    /// Images to evaluate on during training.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub val_file: Vec<PathBuf>,
    /// Images of the test.
    #[serde(deserialize_with = "files")]
    pub test_file: Vec<PathBuf>,
    /// What paths of images are relative to.
    pub image_root: PathBuf,
    /// Reference captions of `val_file`.
    pub val_gt_file: PathBuf,
    /// Reference captions of `test_file`.
    pub test_gt_file: PathBuf,
    /// What captions begin with, and no loss is taken of.
    pub prompt: String,
    /// The share of a label that is spread over the vocabulary.
    pub label_smoothing: f64,
    /// How captions are searched for in evaluation.
    pub search: Search,
    /// Images at a time in evaluation.
    pub batch_size_test: usize,
    /// The first epoch after which the model is evaluated, from 0.
    #[serde(default)]
    pub start_eval: u64,
    /// Batches: section `data` of the file.
    #[serde(skip)]
    pub data: ItemConfig,
}

/// Captions that are rewarded by their CIDEr (`Captioning_scst.py`; self-critical sequence training, Rennie et al. 2017).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScstTask {
    /// Annotations to train on.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub train_file: Vec<PathBuf>,
    /// Images to evaluate on during training.
    #[serde(default, deserialize_with = "files", skip_serializing_if = "Vec::is_empty")]
    pub val_file: Vec<PathBuf>,
    /// Images of the test.
    #[serde(deserialize_with = "files")]
    pub test_file: Vec<PathBuf>,
    /// What paths of images are relative to.
    pub image_root: PathBuf,
    /// Reference captions of `val_file`.
    pub val_gt_file: PathBuf,
    /// Reference captions of `test_file`.
    pub test_gt_file: PathBuf,
    /// What captions begin with, and the reward does not see.
    pub prompt: String,
    /// How captions are searched for in evaluation; captions that are rewarded are as long at most.
    pub search: Search,
    /// In how many documents each n-gram occurs: what CIDEr weighs by. If left out, it is counted in the references of
    /// `train_file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cider_cached_tokens: Option<PathBuf>,
    /// Captions that are drawn for each image.
    pub sc_train_sample_n: usize,
    /// What the reward of a caption is measured against.
    pub sc_baseline_type: Baseline,
    /// Images at a time in evaluation.
    pub batch_size_test: usize,
    /// Batches: section `data` of the file.
    #[serde(skip)]
    pub data: ItemConfig,
}

/// What the reward of a caption that was drawn is measured against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Baseline {
    /// The reward of the caption that the model writes when it always takes the likeliest word.
    Greedy,
    /// The mean reward of the other captions that were drawn for the image.
    Sample,
}

/// A task's own part of a configuration.
pub(super) trait Own {
    /// What its batches are made of.
    type Data;

    /// That.
    fn data_mut(&mut self) -> &mut Self::Data;

    /// Checks every value; says which is out of its range, by its full name. `trains` says whether the configuration is one for
    /// training.
    fn check(&self, text: &BertConfig, trains: bool) -> Result<(), String>;
}

/// Refuses what does not hold.
fn ensure(holds: bool, field: &str, expected: &str, found: impl ToString) -> Result<(), String> {
    match holds {
        true => Ok(()),
        false => Err(format!("task.{field}: expected {expected}, found {}", found.to_string())),
    }
}

fn at_least_one(fields: &[(&str, u64)]) -> Result<(), String> {
    fields.iter().try_for_each(|&(field, number)| ensure(number > 0, field, "at least 1", number))
}

fn check_files(train_file: &[PathBuf], test_file: &[PathBuf], trains: bool) -> Result<(), String> {
    ensure(
        !trains || !train_file.is_empty(),
        "train_file",
        "at least one file, since there is a section train",
        "none",
    )?;
    ensure(!test_file.is_empty(), "test_file", "at least one file", "none")
}

fn check_writing(prompt: &str, search: &Search) -> Result<(), String> {
    ensure(!prompt.trim().is_empty(), "prompt", "at least one word", "none")?;
    match search.problem() {
        None => Ok(()),
        Some((field, expected, found)) => ensure(false, &format!("search.{field}"), &expected, found),
    }
}

macro_rules! own {
    ($task:ty, $data:ty, |$own:ident, $text:ident, $trains:ident| $check:expr) => {
        impl Own for $task {
            type Data = $data;

            fn data_mut(&mut self) -> &mut $data {
                &mut self.data
            }

            fn check(&self, $text: &BertConfig, $trains: bool) -> Result<(), String> {
                let $own = self;
                $check
            }
        }
    };
}

own!(RetrievalTask, ItemConfig, |own, _text, trains| {
    check_files(&own.train_file, &own.test_file, trains)?;
    at_least_one(&[
        ("batch_size_test", own.batch_size_test as u64),
        ("batch_size_test_text", own.batch_size_test_text as u64),
        ("k_test", own.k_test as u64),
    ])
});
own!(VqaTask, ItemConfig, |own, _text, trains| {
    check_files(&own.train_file, &own.test_file, trains)?;
    at_least_one(&[
        ("batch_size_test", own.batch_size_test as u64),
        ("k_test", own.k_test as u64),
        ("questions_per_image", own.questions_per_image as u64),
    ])
});
own!(NlvrTask, ItemConfig, |own, _text, trains| {
    check_files(&own.train_file, &own.test_file, trains)?;
    at_least_one(&[("batch_size_test", own.batch_size_test as u64)])
});
own!(PairsTask, BatchConfig, |own, _text, _trains| at_least_one(&[("train_dataset_size", own.train_dataset_size)]));
own!(WeakGroundingTask, ItemConfig, |own, text, trains| {
    check_files(&own.train_file, &own.test_file, trains)?;
    at_least_one(&[("batch_size_test", own.batch_size_test as u64)])?;
    let (first, end) = (text.fusion_layer, text.num_hidden_layers);
    let expected = format!("a layer with cross attention, {first} to {}", end.saturating_sub(1));
    ensure((first..end).contains(&own.block_num), "block_num", &expected, own.block_num)?;
    for (field, file) in [("refcoco_data", &own.refcoco_data), ("det_file", &own.det_file)] {
        ensure(own.vlue_test || file.is_some(), field, "a file, since vlue_test is false", "none")?;
    }
    Ok(())
});
own!(BboxTask, ItemConfig, |own, _text, trains| {
    check_files(&own.train_file, &own.test_file, trains)?;
    at_least_one(&[("batch_size_test", own.batch_size_test as u64)])?;
    ensure(own.vlue_test || own.refcoco_data.is_some(), "refcoco_data", "a folder, since vlue_test is false", "none")
});
own!(BboxPretrainTask, BatchConfig, |own, _text, _trains| {
    at_least_one(&[("train_dataset_size", own.train_dataset_size)])
});
own!(CaptioningTask, ItemConfig, |own, _text, trains| {
    check_files(&own.train_file, &own.test_file, trains)?;
    check_writing(&own.prompt, &own.search)?;
    ensure((0.0..1.0).contains(&own.label_smoothing), "label_smoothing", "0 to below 1", own.label_smoothing)?;
    at_least_one(&[("batch_size_test", own.batch_size_test as u64)])
});
own!(ScstTask, ItemConfig, |own, _text, trains| {
    check_files(&own.train_file, &own.test_file, trains)?;
    check_writing(&own.prompt, &own.search)?;
    at_least_one(&[
        ("batch_size_test", own.batch_size_test as u64),
        ("sc_train_sample_n", own.sc_train_sample_n as u64),
    ])?;
    let compares = own.sc_baseline_type == Baseline::Greedy || own.sc_train_sample_n > 1;
    let expected = "at least 2, since sc_baseline_type is sample";
    ensure(compares, "sc_train_sample_n", expected, own.sc_train_sample_n)
});
