//! What the model of a task starts from: the parameters of another model, and random ones for what that one lacks.

use std::collections::BTreeMap;

use candle_core::Tensor;
use xvlm_encoders::{Task, VisionConfig, XvlmConfig};
use xvlm_weights::{Checkpoint, Conversion, ConversionReport, LoadRules, ModelFiles, Origin, WeightsError};

use crate::convert::layout;
use crate::error::{ConfigProblem, TaskError};
use crate::model::parse_config;

/// The parameters that a model is trained from.
#[derive(Clone, Debug)]
pub struct InitialWeights {
    /// Every parameter of the model by name: f32, on the CPU.
    pub tensors: BTreeMap<String, Tensor>,
    /// Where each is from.
    pub report: ConversionReport,
}

impl InitialWeights {
    /// The parameters that start from random numbers, by name. The original gives them a multiple of the learning rate of the
    /// others (`lr_mult`).
    pub fn fresh(&self) -> Vec<&str> {
        self.report.initialised.iter().map(|because| because.name.as_str()).collect()
    }
}

/// The parameters of the model that `config` describes, made of those of a model folder as [`convert`](crate::convert::convert)
/// makes them of a checkpoint of the original (`load_pretrained` of `models/model_*.py`): of a pre-trained model, or of one for
/// the same task, or, for statements about two images, of one that has learnt text assignment. Tables of positions are resized
/// where `config` has another resolution; what the folder's model has no parameter for is drawn with `seed`, as
/// [`Parameters::new`](xvlm_encoders::Parameters::new) of that seed draws it.
///
/// # Errors
/// If the folder's model is for another task, has other attention heads or conventions, or lacks a parameter, has one too many
/// or one of another shape (all of them are named).
pub fn initial_weights(folder: &ModelFiles, config: &XvlmConfig, seed: u64) -> Result<InitialWeights, TaskError> {
    let source = parse_config(&format!("{}/config.json", folder.name), folder.config.as_bytes())?.model;
    let expected = sources(config.task);
    if !expected.contains(&source.task) {
        let what = "weights to start from";
        return Err(TaskError::Unfit { what, expected, found: source.task });
    }
    check_same(&folder.name, &source, config)?;
    let (layout, blueprint) = layout(config, false)?;
    let file = format!("{}/model.safetensors", folder.name);
    let sources = [(Origin::Xvlm, Checkpoint::of_tensors(&file, folder.tensors()?)?)];
    let conversion = Conversion::plan(&sources, &layout, &LoadRules::default())?;
    let read = |name: &String| -> Result<(String, Tensor), TaskError> {
        let unknown = || WeightsError::NoSuchTensor { file: "model".to_owned(), tensor: name.clone() };
        let tensor = match conversion.read(name)? {
            Some(tensor) => tensor,
            None => blueprint.draw(name, seed).ok_or_else(unknown)?,
        };
        Ok((name.clone(), tensor))
    };
    let tensors = layout.parameters.keys().map(read).collect::<Result<_, _>>()?;
    Ok(InitialWeights { tensors, report: conversion.report().clone() })
}

/// The tasks whose models a model for this one can be made of.
fn sources(task: Task) -> &'static [Task] {
    match task {
        Task::Pretrain => &[Task::Pretrain],
        Task::Retrieval => &[Task::Pretrain, Task::Retrieval],
        Task::Grounding => &[Task::Pretrain, Task::Grounding],
        Task::NlvrPretrain => &[Task::Pretrain, Task::NlvrPretrain],
        Task::Nlvr => &[Task::Pretrain, Task::NlvrPretrain, Task::Nlvr],
        Task::Vqa => &[Task::Pretrain, Task::Vqa],
        Task::Captioning => &[Task::Pretrain, Task::Captioning],
    }
}

/// Refuses a model that computes something else with parameters of the same shapes.
fn check_same(folder: &str, source: &XvlmConfig, config: &XvlmConfig) -> Result<(), ConfigProblem> {
    let vision = |config: &XvlmConfig| match &config.vision_config {
        VisionConfig::Swin(swin) => {
            vec![("vision_config.sine_positions", swin.sine_positions.to_string())]
        }
        VisionConfig::Vit(vit) => vec![
            ("vision_config.num_attention_heads", vit.num_attention_heads.to_string()),
            ("vision_config.hidden_act", format!("{:?}", vit.hidden_act)),
        ],
    };
    let settings = |config: &XvlmConfig| {
        let text = &config.text_config;
        let mut settings = vec![
            ("text_config.model_type", format!("{:?}", text.model_type)),
            ("text_config.num_attention_heads", text.num_attention_heads.to_string()),
            ("text_config.fusion_layer", text.fusion_layer.to_string()),
        ];
        settings.extend(vision(config));
        settings
    };
    // Encoders of two kinds differ in the names of their parameters.
    let differing = settings(source).into_iter().zip(settings(config)).find(|(a, b)| a.0 == b.0 && a.1 != b.1);
    match differing {
        None => Ok(()),
        Some(((field, expected), (_, found))) => {
            let message = format!("model.{field}: expected {expected}, that of {folder}, found {found}");
            Err(ConfigProblem { file: "configuration".to_owned(), message })
        }
    }
}
