//! A trained model, opened for use.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use xvlm_data::{Picture, TextTokenizer, pre_caption};
use xvlm_encoders::{Attention, Blueprint, Parameters, Pass, Task, Xvlm, XvlmConfig};
use xvlm_weights::{LoadRules, ModelFiles, ModelFolder, StoredTensors, StoredType, WeightsError};

use crate::compute::{Compute, Precision};
use crate::error::{ConfigProblem, TaskError};
use crate::generate::Source;
use crate::search::Search;

/// The tasks whose models compare images with texts.
const CONTRASTING: &[Task] = &[Task::Pretrain, Task::Retrieval];

/// The file of a model folder that [`ModelConfig`] is the content of.
const CONFIG: &str = "config.json";

/// What `config.json` of a model folder holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Sizes of the model.
    pub model: XvlmConfig,
    /// Longest text in tokens, `[CLS]` included.
    pub max_tokens: usize,
    /// Longest text in words.
    pub max_words: usize,
    /// What captions begin with, left out of the answer.
    pub prompt: String,
    /// How captions are searched for, unless the caller says otherwise.
    #[serde(default)]
    pub search: Search,
}

impl ModelConfig {
    /// The original's settings for texts, with a model.
    pub fn of(model: XvlmConfig) -> Self {
        let prompt = "a picture of".to_owned();
        Self { model, max_tokens: 40, max_words: 30, prompt, search: Search::default() }
    }

    /// The text of `config.json`.
    ///
    /// # Errors
    /// If a number is not finite.
    pub fn to_json(&self) -> Result<String, ConfigProblem> {
        let problem = |error: serde_json::Error| ConfigProblem { file: CONFIG.to_owned(), message: error.to_string() };
        serde_json::to_string_pretty(self).map_err(problem)
    }
}

/// A model for inference: no gradients, no randomness.
pub struct Model {
    config: ModelConfig,
    xvlm: Xvlm,
    tokenizer: TextTokenizer,
    device: Device,
    precision: Precision,
    fingerprint: String,
}

/// Images after the vision encoder: patch tokens `[N, 1+L, C]`. Whatever is asked about them, they are encoded once.
#[derive(Clone, Debug)]
pub struct ImageTokens(pub(crate) Tensor);

impl ImageTokens {
    /// Images that have been encoded `[N, 1+L, C]`.
    pub fn new(tokens: Tensor) -> Self {
        Self(tokens)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.0.dim(0).unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens `[N, 1+L, C]`.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }
}

/// Texts as rows of one batch.
#[derive(Clone, Debug)]
pub struct Texts {
    /// Token ids `[B, T]`, u32.
    pub ids: Tensor,
    /// `[B, T]`, f32: 1 at tokens, 0 at padding.
    pub mask: Tensor,
}

impl Model {
    /// Opens a model folder, to compute on a device in `f32`, or as [`Compute`] says. The file of weights is mapped. On the CPU it
    /// stays so as long as the model lives: rows of word embeddings are read from there, and linear layers are at first, until they
    /// have been used often and are laid out in memory ([`PackedLinear::stored`](xvlm_kernels::PackedLinear::stored)). It must
    /// not be written to meanwhile (see [`MappedFile`](xvlm_kernels::MappedFile)); replacing it, as this workspace writes files, does no
    /// harm. If it is written to, whatever reads it from then on fails with [`KernelError::Changed`](xvlm_kernels::KernelError::Changed).
    ///
    /// # Errors
    /// If a file is missing or broken, a tensor is missing, unexpected or of another shape (each named), or the device
    /// cannot compute with these numbers.
    pub fn open(dir: &Path, compute: impl Into<Compute>) -> Result<Self, TaskError> {
        Self::from_files(&ModelFolder::open(dir)?, compute)
    }

    /// A model from the content of a model folder.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_files(files: &ModelFiles, compute: impl Into<Compute>) -> Result<Self, TaskError> {
        let compute = compute.into();
        compute.check()?;
        let file = format!("{}/{CONFIG}", files.name);
        let config = parse_config(&file, files.config.as_bytes())?;
        let tokenizer = || TextTokenizer::from_bytes(&format!("{}/tokenizer.json", files.name), &files.tokenizer);
        let (tokenizer, xvlm) = rayon::join(tokenizer, || build(&config.model, &files.weights, &compute));
        let (tokenizer, xvlm, Compute { device, precision }) = (tokenizer?, xvlm?, compute);
        check_texts(&config.model, config.max_tokens, &tokenizer).map_err(|message| ConfigProblem { file, message })?;
        let first = |name: &str| Ok((name.to_owned(), files.weights.first_numbers(name, FINGERPRINTED)?));
        let numbers = files.weights.shapes().into_keys().map(first).collect::<Result<Vec<_>, WeightsError>>()?;
        files.weights.check_unchanged()?;
        Ok(Self { config, xvlm, tokenizer, device, precision, fingerprint: fingerprint(numbers) })
    }

    /// A model with these weights, in f32. Those that are of f32 already it shares with whoever trains them; others are copied.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub(crate) fn with_weights(
        config: ModelConfig,
        weights: impl IntoIterator<Item = (String, Tensor)>,
        tokenizer: TextTokenizer,
        device: &Device,
    ) -> candle_core::Result<Self> {
        let weights = weights.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?)));
        let weights = weights.collect::<candle_core::Result<BTreeMap<String, Tensor>>>()?;
        let first = |(name, tensor): (&String, &Tensor)| {
            let numbers = tensor.flatten_all()?;
            let numbers = numbers.narrow(0, 0, FINGERPRINTED.min(numbers.elem_count()))?;
            Ok((name.clone(), numbers.to_vec1::<f32>()?))
        };
        let fingerprint = fingerprint(weights.iter().map(first).collect::<candle_core::Result<Vec<_>>>()?);
        let Compute { device, precision } = Compute::on(device);
        let xvlm = Xvlm::new(&config.model, Parameters::given(weights, precision.dtype(), &device))?;
        Ok(Self { config, xvlm, tokenizer, device, precision, fingerprint })
    }

    /// Writes a model folder, atomically.
    ///
    /// # Errors
    /// If a file cannot be written, or something other than a model is in the way.
    pub fn write(
        dir: &Path,
        config: &ModelConfig,
        weights: impl IntoIterator<Item = (String, Tensor)>,
        tokenizer: &TextTokenizer,
        stored: StoredType,
    ) -> Result<(), TaskError> {
        let tensors: BTreeMap<String, Tensor> = weights.into_iter().collect();
        Ok(ModelFolder::write(dir, &config.to_json()?, &tensors, &tokenizer.to_bytes(), stored)?)
    }

    /// What `config.json` holds.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What tells the weights from others: training changes it. It is the digest of the first numbers of each tensor.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The network.
    pub fn xvlm(&self) -> &Xvlm {
        &self.xvlm
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// Refuses a model that is made for none of some tasks.
    pub(crate) fn fit_for(&self, what: &'static str, expected: &'static [Task]) -> Result<(), TaskError> {
        let found = self.config.model.task;
        if expected.contains(&found) { Ok(()) } else { Err(TaskError::Unfit { what, expected, found }) }
    }

    /// Where the model computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What numbers the model computes with.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Encodes pictures, each resized to the model's square.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn encode(&self, pictures: &[Picture]) -> Result<ImageTokens, TaskError> {
        let mut batches = Vec::new();
        for pictures in pictures.chunks(crate::BATCH) {
            batches.push(self.xvlm.encode_image(&self.pixels(pictures)?, &Pass::inference())?);
        }
        match batches.as_slice() {
            [] => Err(TaskError::Empty { what: "pictures to encode".to_owned() }),
            [one] => Ok(ImageTokens(one.clone())),
            several => Ok(ImageTokens(Tensor::cat(several, 0)?)),
        }
    }

    /// Normalised pixels `[N, 3, R, R]` of pictures, each resized to the model's square.
    pub(crate) fn pixels(&self, pictures: &[Picture]) -> candle_core::Result<Tensor> {
        let side = self.config.model.vision_config.image_res();
        let normalised = |picture: &Picture| picture.resized_square(side).normalised();
        let pixels: Vec<f32> = pictures.par_iter().flat_map_iter(normalised).collect();
        Tensor::from_vec(pixels, (pictures.len(), 3, side, side), &self.device)
    }

    /// Embeddings of images `[N, E]`, of unit length.
    ///
    /// # Errors
    /// If the model is made for another task, or a tensor operation fails.
    pub fn embed_images(&self, images: &ImageTokens) -> Result<Tensor, TaskError> {
        self.fit_for("embeddings of images", CONTRASTING)?;
        Ok(self.xvlm.project_image(&images.0)?)
    }

    /// Embeddings of texts `[B, E]`, of unit length.
    ///
    /// # Errors
    /// If a text is empty, or the model is made for another task.
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Tensor, TaskError> {
        self.fit_for("embeddings of texts", CONTRASTING)?;
        let mut batches = Vec::new();
        for texts in texts.chunks(crate::BATCH) {
            batches.push(self.xvlm.project_text(&self.encode_texts(&self.tokenise(texts)?)?)?);
        }
        match batches.is_empty() {
            true => Err(TaskError::Empty { what: "texts to embed".to_owned() }),
            false => Ok(Tensor::cat(&batches, 0)?),
        }
    }

    /// Probability that each text tells its image: pairs of a row of `images` and a text.
    ///
    /// # Errors
    /// If a text is empty, or the model is made for another task.
    pub fn match_pairs(&self, images: &ImageTokens, pairs: &[(u32, &str)]) -> Result<Vec<f32>, TaskError> {
        self.fit_for("matching", CONTRASTING)?;
        let texts: Vec<&str> = pairs.iter().map(|(_, text)| *text).collect();
        let tokens = self.tokenise(&texts)?;
        let index: Vec<u32> = pairs.iter().map(|(image, _)| *image).collect();
        let fused = self.look(&self.encode_texts(&tokens)?, &tokens.mask, images, &index, Attention::Full)?;
        self.match_probabilities(&fused)
    }

    /// Fused texts `[B, T, H]` → the probability that each matches what it was fused with.
    pub(crate) fn match_probabilities(&self, fused: &Tensor) -> Result<Vec<f32>, TaskError> {
        Self::probabilities(&self.xvlm.match_logits(fused)?)
    }

    /// Logits of no match and of a match `[B, 2]` → the probability of a match.
    pub(crate) fn probabilities(logits: &Tensor) -> Result<Vec<f32>, TaskError> {
        let difference = (logits.narrow(1, 1, 1)? - logits.narrow(1, 0, 1)?)?;
        Ok(candle_nn::ops::sigmoid(&difference)?.flatten_all()?.to_vec1()?)
    }

    /// Token ids of a cleaned text, `[CLS]` first.
    pub(crate) fn token_row(&self, text: &str) -> Result<Vec<u32>, TaskError> {
        let cleaned = pre_caption(text, self.config.max_words)?;
        Ok(self.tokenizer.encode(&cleaned, self.config.max_tokens, false)?)
    }

    /// Cleans and tokenises texts.
    pub(crate) fn tokenise(&self, texts: &[&str]) -> Result<Texts, TaskError> {
        let rows = texts.iter().map(|text| self.token_row(text)).collect::<Result<Vec<_>, _>>()?;
        Ok(self.pad(&rows)?)
    }

    /// Rows of token ids, padded to the longest.
    pub(crate) fn pad(&self, rows: &[Vec<u32>]) -> candle_core::Result<Texts> {
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let shape = (rows.len(), longest);
        let padded = |row: &Vec<u32>| {
            let padding = longest - row.len();
            row.iter().copied().chain(std::iter::repeat_n(self.tokenizer.pad_id(), padding)).collect::<Vec<_>>()
        };
        let ids: Vec<u32> = rows.iter().flat_map(padded).collect();
        let mask: Vec<f32> =
            rows.iter().flat_map(|row| (0..longest).map(|i| if i < row.len() { 1.0 } else { 0.0 })).collect();
        Ok(Texts {
            ids: Tensor::from_vec(ids, shape, &self.device)?,
            mask: Tensor::from_vec(mask, shape, &self.device)?,
        })
    }

    pub(crate) fn encode_texts(&self, tokens: &Texts) -> candle_core::Result<Tensor> {
        self.xvlm.encode_text(&tokens.ids, &tokens.mask, Attention::Full, &Pass::inference())
    }

    /// Fuses encoded texts with whole images: text `i` looks at row `index[i]` of `images`.
    pub(crate) fn look(
        &self,
        text: &Tensor,
        mask: &Tensor,
        images: &ImageTokens,
        index: &[u32],
        attention: Attention,
    ) -> candle_core::Result<Tensor> {
        let pass = Pass::inference();
        Source::images(images)?.look_at(index, |looks| self.xvlm.fuse(text, mask, looks, attention, &pass))
    }
}

/// A network with the weights of a file, laid out for inference. Linear layers and word embeddings, nearly all of a model, are built
/// without theirs, and told where they are: that spares whoever asks once the time for memory that would be filled for one use.
fn build(config: &XvlmConfig, stored: &StoredTensors, compute: &Compute) -> Result<Xvlm, TaskError> {
    let mut packed = BTreeSet::new();
    let blueprint = Blueprint::of(|vb| {
        packed.extend(Xvlm::new(config, vb)?.weights_to_pack());
        Ok(())
    })?;
    let expected = blueprint.shapes();
    let targets = expected.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()));
    xvlm_weights::compare(stored.name(), &stored.shapes(), targets, &LoadRules::default())?;
    let Compute { device, precision } = compute;
    let tensor = |(name, shape): (&String, &Vec<usize>)| -> Result<(String, Tensor), TaskError> {
        // Scalars, such as a temperature, are few, and each counts.
        let dtype = if shape.is_empty() { DType::F32 } else { precision.dtype() };
        let tensor = match packed.contains(name) {
            // One number, seen as many: it is not computed with.
            true => Tensor::zeros((), dtype, device)?.broadcast_as(shape.as_slice())?,
            false => stored.read(name, dtype, device)?,
        };
        Ok((name.clone(), tensor))
    };
    let tensors = expected.par_iter().map(tensor).collect::<Result<BTreeMap<_, _>, _>>()?;
    let mut xvlm = Xvlm::new(config, Parameters::given(tensors, precision.dtype(), device))?;
    let place = |name: &str| stored.get(name).cloned().map(Some).map_err(candle_core::Error::wrap);
    xvlm.pack_with(precision.packed(), place)?;
    Ok(xvlm)
}

/// How many numbers of each tensor are fingerprinted.
const FINGERPRINTED: usize = 64;

/// SHA-256 of the names and the first numbers of tensors, in the order of their names, in 16 digits.
fn fingerprint(tensors: Vec<(String, Vec<f32>)>) -> String {
    let mut digest = Sha256::new();
    for (name, numbers) in tensors {
        digest.update(name);
        numbers.iter().for_each(|number| digest.update(number.to_le_bytes()));
    }
    digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Checks that a model has room for every word of a tokenizer and for the longest text.
pub(crate) fn check_texts(model: &XvlmConfig, max_tokens: usize, tokenizer: &TextTokenizer) -> Result<(), String> {
    let text = &model.text_config;
    let (known, longest) = (tokenizer.vocab_size(), text.longest_text());
    if text.vocab_size < known {
        let found = text.vocab_size;
        return Err(format!("model.text_config.vocab_size: expected at least the tokenizer's {known}, found {found}"));
    }
    if longest < max_tokens {
        let field = "model.text_config.max_position_embeddings";
        return Err(format!("{field}: expected at least max_tokens, {max_tokens}, found {longest}"));
    }
    Ok(())
}

/// The content of `config.json`, which errors call `file`.
pub(crate) fn parse_config(file: &str, text: &[u8]) -> Result<ModelConfig, ConfigProblem> {
    let problem = |message: String| ConfigProblem { file: file.to_owned(), message };
    let config: ModelConfig = serde_json::from_slice(text).map_err(|error| problem(error.to_string()))?;
    config.model.validate().map_err(|error| problem(error.to_string()))?;
    Ok(config)
}
