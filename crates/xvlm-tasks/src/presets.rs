//! The configurations that are compiled in: one for each of the original's, and those of the built-in model.

use crate::config::PretrainConfig;
use crate::error::ConfigProblem;
use crate::finetune::{FinetuneConfig, FinetuneKind};
use crate::yaml::suggestion;

/// What a configuration is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Pre-training.
    Pretrain,
    /// A task that a pre-trained model is trained on.
    Finetune(FinetuneKind),
}

impl Purpose {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pretrain => "pretrain",
            Self::Finetune(kind) => kind.name(),
        }
    }
}

/// A configuration that is compiled in.
#[derive(Debug)]
pub struct Preset {
    /// Its name.
    pub name: &'static str,
    /// What it is for.
    pub purpose: Purpose,
    /// The data it is made for, in a few words.
    pub data: &'static str,
    /// The file of the original it stands for, below `configs/`.
    pub official: Option<&'static str>,
    /// Its YAML.
    pub text: &'static str,
}

/// A configuration of either purpose.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub enum AnyConfig {
    /// Of pre-training.
    Pretrain(Box<PretrainConfig>),
    /// Of fine-tuning.
    Finetune(Box<FinetuneConfig>),
}

impl AnyConfig {
    /// Side of the images that the model sees, in pixels.
    pub fn image_res(&self) -> usize {
        let model = match self {
            Self::Pretrain(config) => &config.model,
            Self::Finetune(config) => &config.model,
        };
        model.vision_config.image_res()
    }
}

impl Preset {
    /// The preset of a name.
    ///
    /// # Errors
    /// If there is none; the message has the nearest.
    pub fn named(name: &str) -> Result<&'static Self, ConfigProblem> {
        Self::ALL.iter().find(|preset| preset.name == name).ok_or_else(|| {
            let nearest = suggestion(name, Self::ALL.iter().map(|preset| preset.name));
            ConfigProblem { file: "preset".to_owned(), message: format!("unknown preset `{name}`{nearest}") }
        })
    }

    /// The configuration, with single values replaced.
    ///
    /// # Errors
    /// As [`PretrainConfig::from_yaml`] and [`FinetuneConfig::from_yaml`].
    pub fn config(&self, overrides: &[String]) -> Result<AnyConfig, ConfigProblem> {
        let file = format!("preset {}", self.name);
        Ok(match self.purpose {
            Purpose::Pretrain => AnyConfig::Pretrain(Box::new(PretrainConfig::from_yaml(&file, self.text, overrides)?)),
            Purpose::Finetune(_) => {
                AnyConfig::Finetune(Box::new(FinetuneConfig::from_yaml(&file, self.text, overrides)?))
            }
        })
    }
}

macro_rules! presets {
    ($($name:literal $purpose:expr, $data:literal, $official:expr;)*) => {
        impl Preset {
            /// All of them, in the order of a list for people.
            pub const ALL: &'static [Self] = &[$(Self {
                name: $name,
                purpose: $purpose,
                data: $data,
                official: $official,
                text: include_str!(concat!("../presets/", $name, ".yaml")),
            }),*];
        }
    };
}

use FinetuneKind::*;
use Purpose::{Finetune, Pretrain};

presets! {
    "scenes-align" Pretrain, "built-in scenes, first stage", None;
    "scenes" Pretrain, "built-in scenes, second stage", None;
    "scenes-retrieval" Finetune(Retrieval), "built-in scenes", None;
    "scenes-vqa" Finetune(Vqa), "built-in scenes", None;
    "scenes-nlvr2" Finetune(Nlvr), "built-in scenes", None;
    "scenes-bbox" Finetune(Bbox), "built-in scenes", None;
    "scenes-grounding-weak" Finetune(WeakGrounding), "built-in scenes", None;
    "scenes-captioning" Finetune(Captioning), "built-in scenes", None;
    "scenes-captioning-scst" Finetune(CaptioningScst), "built-in scenes", None;
    "base-4m" Pretrain, "COCO, VG, SBU, CC3M", Some("Pretrain_XVLM_base_4m.yaml");
    "base-16m" Pretrain, "4M and CC12M, Open Images, Objects365, RefCOCO", Some("Pretrain_XVLM_base_16m.yaml");
    "retrieval-coco" Finetune(Retrieval), "COCO captions", Some("Retrieval_coco.yaml");
    "retrieval-flickr30k" Finetune(Retrieval), "Flickr30k", Some("Retrieval_flickr.yaml");
    "vqa" Finetune(Vqa), "VQA v2, VG questions", Some("VQA.yaml");
    "vqa-480" Finetune(Vqa), "VQA v2, VG questions", Some("VQA_480.yaml");
    "nlvr2-pretrain" Finetune(NlvrPretrain), "COCO, VG, SBU, CC3M", None;
    "nlvr2" Finetune(Nlvr), "NLVR2", Some("NLVR.yaml");
    "grounding-weak" Finetune(WeakGrounding), "RefCOCO+, no boxes", Some("Grounding.yaml");
    "refcoco-bbox-pretrain" Finetune(BboxPretrain), "COCO and VG boxes", Some("Grounding_bbox_pretrain_O1.yaml");
    "refcoco-bbox" Finetune(Bbox), "RefCOCO+", Some("Grounding_bbox.yaml");
    "captioning-pretrain" Finetune(CaptioningPretrain), "COCO, VG, SBU, CC3M", Some("Captioning_pretrain_O1.yaml");
    "captioning-coco" Finetune(Captioning), "COCO captions (Karpathy)", Some("Captioning.yaml");
    "captioning-scst" Finetune(CaptioningScst), "COCO captions (Karpathy)", Some("Captioning_scst.yaml");
    "vlue-retrieval" Finetune(Retrieval), "VLUE test", Some("vlue-base-test/Retrieval.yaml");
    "vlue-vqa" Finetune(Vqa), "VLUE test", Some("vlue-base-test/VQA.yaml");
    "vlue-vqa-480" Finetune(Vqa), "VLUE test", Some("vlue-base-test/VQA_480.yaml");
    "vlue-nlvr2" Finetune(Nlvr), "VLUE test", Some("vlue-base-test/NLVR.yaml");
    "vlue-grounding-weak" Finetune(WeakGrounding), "VLUE test", Some("vlue-base-test/Grounding_weakly.yaml");
    "vlue-bbox" Finetune(Bbox), "VLUE test", Some("vlue-base-test/Grounding_bbox.yaml");
}
