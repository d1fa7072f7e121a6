//! Checkpoints of the original, and of what it starts from, to model folders and back.

use std::path::Path;
use std::sync::mpsc;

use candle_core::{Device, Tensor};
use xvlm_data::TextTokenizer;
use xvlm_encoders::{Blueprint, Task, VisionConfig, VitFamily, Xvlm, XvlmConfig};
use xvlm_weights::{
    Checkpoint, Conversion, ConversionReport, Layout, LoadRules, ModelFolder, NamedShape, Origin, StoredType,
    TextLayers, WeightsError,
};

use crate::error::{ConfigProblem, TaskError};
use crate::model::{ModelConfig, check_texts, parse_config};

/// What a checkpoint is made into.
#[derive(Clone, Debug)]
pub struct Goal {
    /// The model, its task and resolution among it.
    pub config: ModelConfig,
    /// Whether fusion layers come from every other of the last layers of a deeper BERT (`load_bertL_by_sep`).
    pub every_other_layer: bool,
    /// What may be missing or left over.
    pub rules: LoadRules,
    /// How the numbers are stored.
    pub stored: StoredType,
    /// Seed of the parameters that no checkpoint has.
    pub seed: u64,
}

/// The parameters of a model, and what decides where tensors of a checkpoint go.
///
/// # Errors
/// If the sizes do not fit together.
pub fn layout(config: &XvlmConfig, every_other_layer: bool) -> candle_core::Result<(Layout, Blueprint)> {
    let blueprint = Blueprint::of(|vb| Xvlm::new(config, vb))?;
    let text = match config.task {
        Task::Pretrain => TextLayers::Same,
        Task::Retrieval | Task::Grounding => TextLayers::Encoder,
        Task::Nlvr | Task::NlvrPretrain => TextLayers::Paired,
        Task::Vqa => TextLayers::EncoderAndDecoder,
        Task::Captioning => TextLayers::Decoder,
    };
    let (fusion_layer, num_hidden_layers) = (config.text_config.fusion_layer, config.text_config.num_hidden_layers);
    let layout = Layout { text, fusion_layer, num_hidden_layers, every_other_layer, parameters: blueprint.shapes() };
    Ok((layout, blueprint))
}

/// Makes a model folder of checkpoints; a later one goes before an earlier one. Memory holds a few tensors at a time. `written` is
/// told the bytes that are done, of how many.
///
/// Without a tokenizer the folder is complete only when a `tokenizer.json` is put there.
///
/// # Errors
/// If a tensor is missing, of another shape, not finite or unknown (all of them are named), the configuration or the tokenizer
/// does not fit, or a file cannot be read or written. Nothing is left half written.
pub fn convert(
    sources: &[(Origin, Checkpoint)],
    goal: &Goal,
    tokenizer: Option<&TextTokenizer>,
    out: &Path,
    written: &mut dyn FnMut(u64, u64),
) -> Result<ConversionReport, TaskError> {
    if let Some(tokenizer) = tokenizer {
        let problem = |message| ConfigProblem { file: "configuration and tokenizer".to_owned(), message };
        check_texts(&goal.config.model, goal.config.max_tokens, tokenizer).map_err(problem)?;
    }
    let (layout, blueprint) = layout(&goal.config.model, goal.every_other_layer)?;
    let conversion = Conversion::plan(sources, &layout, &goal.rules)?;
    let entries: Vec<NamedShape> =
        layout.parameters.iter().map(|(name, shape)| NamedShape { name: name.clone(), shape: shape.clone() }).collect();
    let bytes = |shape: &[usize]| shape.iter().product::<usize>() as u64 * goal.stored.size();
    let total = entries.iter().map(|entry| bytes(&entry.shape)).sum();
    let read = |name: &str| -> Result<Tensor, WeightsError> {
        let unknown = || WeightsError::NoSuchTensor { file: "model".to_owned(), tensor: name.to_owned() };
        Ok(match conversion.read(name)? {
            Some(tensor) => tensor,
            None => blueprint.draw(name, goal.seed).ok_or_else(unknown)?,
        })
    };
    let config = goal.config.to_json()?;
    let tokenizer = tokenizer.map(TextTokenizer::to_bytes);
    // The next tensor is read while one is written.
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::sync_channel(1);
        scope.spawn(|| {
            let send = send;
            entries.iter().try_for_each(|entry| send.send((&entry.name, read(&entry.name))))
        });
        let mut done = 0;
        let tensor = |name: &str| {
            // Both go through the entries in their order.
            let unread = || WeightsError::NoSuchTensor { file: "reader".to_owned(), tensor: name.to_owned() };
            let (_, tensor) = receive.recv().ok().filter(|(next, _)| *next == name).ok_or_else(unread)?;
            let tensor = tensor?;
            done += bytes(tensor.dims());
            written(done, total);
            Ok(tensor)
        };
        ModelFolder::write_with(out, &config, tokenizer.as_deref(), &entries, goal.stored, tensor)
    })?;
    Ok(conversion.report().clone())
}

/// Writes the model of a folder as the original saves checkpoints: a PyTorch zip of `{'model': state_dict}` that it loads.
/// Returns the number of tensors.
///
/// # Errors
/// If the folder is no model, or a file cannot be read or written.
pub fn export(folder: &Path, out: &Path, stored: StoredType) -> Result<usize, TaskError> {
    let file = folder.join("config.json");
    let text = std::fs::read(&file).map_err(|source| WeightsError::Io { path: file.clone(), source })?;
    let config = parse_config(&file.display().to_string(), &text)?;
    let weights = Checkpoint::open(&folder.join("model.safetensors"))?;
    let shapes = weights.tensors().iter().map(|(name, info)| (name.clone(), info.shape().to_vec()));
    let mut entries: Vec<NamedShape> = shapes.map(|(name, shape)| NamedShape { name, shape }).collect();
    // The one buffer that the original deletes without asking whether it is there.
    let mut positions = None;
    if let VisionConfig::Vit(vit) = &config.model.vision_config
        && vit.family == VitFamily::Clip
    {
        let count = 1 + vit.grid().pow(2);
        entries.push(NamedShape { name: CLIP_POSITIONS.to_owned(), shape: vec![1, count] });
        positions = Some(Tensor::arange(0, count as u32, &Device::Cpu)?.unsqueeze(0)?);
    }
    xvlm_weights::write_file_atomically(out, |out| {
        xvlm_weights::write_pytorch(out, &entries, stored, |name| match &positions {
            Some(positions) if name == CLIP_POSITIONS => Ok(positions.clone()),
            _ => weights.read(name),
        })
    })?;
    Ok(entries.len())
}

/// The numbers of CLIP's positions, in the original's models with its vision encoder.
const CLIP_POSITIONS: &str = "vision_encoder.position_ids";
