//! X-VLM: vision encoder, text and fusion layers, projections and heads put together.
//!
//! Which of them a model has follows from its [`Task`]; parameter names are those of the official checkpoints of that task
//! (`models/xvlm.py`, `models/model_*.py`).

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use xvlm_kernels::{PackedWeights, StoredTensor};

use crate::bert::{Attention, Bert, Concepts};
use crate::config::{BertConfig, Task, TextModel, XvlmConfig};
use crate::decoding::Decoding;
use crate::heads::{Head, MlmHead};
use crate::layers::{Linear, Words};
use crate::pass::Pass;
use crate::vision::{Regions, Vision};

/// The model.
#[derive(Clone, Debug)]
pub struct Xvlm {
    config: XvlmConfig,
    vision: Vision,
    text: Option<Bert>,
    vision_projection: Option<Linear>,
    text_projection: Option<Linear>,
    temperature: Option<Tensor>,
    match_head: Option<Head>,
    box_head: Option<Head>,
    mlm_head: Option<MlmHead>,
    statement_head: Option<Head>,
    assignment_head: Option<Linear>,
    decoder: Option<Decoder>,
}

impl Xvlm {
    /// Builds the parts of the model that its task needs.
    ///
    /// # Errors
    /// If sizes do not fit together, or the builder has a parameter of another shape.
    pub fn new(config: &XvlmConfig, vb: VarBuilder) -> Result<Self> {
        use Task::{Captioning, Grounding, Nlvr, NlvrPretrain, Pretrain, Retrieval, Vqa};
        config.validate().map_err(candle_core::Error::wrap)?;
        let (task, texts) = (config.task, &config.text_config);
        let (vision_width, text_width, shared) = (config.vision_config.width(), texts.hidden_size, config.embed_dim);
        let text = vb.pp("text_encoder");
        // Only beside a language head does the encoder have a name of its own.
        let body = || match texts.model_type {
            _ if task != Pretrain => text.clone(),
            TextModel::Bert => text.pp("bert"),
            TextModel::Roberta => text.pp("roberta"),
        };
        let is = |tasks: &[Task]| tasks.contains(&task);
        Ok(Self {
            vision: Vision::new(&config.vision_config, vb.pp("vision_encoder"))?,
            text: match task {
                Captioning => None,
                Nlvr | NlvrPretrain => Some(Bert::paired(texts, vision_width, body())?),
                Pretrain | Retrieval | Grounding | Vqa => Some(Bert::new(texts, vision_width, body())?),
            },
            vision_projection: part(is(&[Pretrain, Retrieval, NlvrPretrain]), || {
                Linear::uniform(vision_width, shared, vb.pp("vision_proj"))
            })?,
            text_projection: part(is(&[Pretrain, Retrieval]), || {
                Linear::uniform(text_width, shared, vb.pp("text_proj"))
            })?,
            temperature: part(is(&[Pretrain, Retrieval]), || vb.get_with_hints((), "temp", Init::Const(config.temp)))?,
            match_head: part(is(&[Pretrain, Retrieval]), || Head::new(text_width, 2, vb.pp("itm_head")))?,
            box_head: part(is(&[Pretrain, Grounding]), || Head::new(text_width, 4, vb.pp("bbox_head")))?,
            mlm_head: part(is(&[Pretrain]), || MlmHead::new(texts, text.clone()))?,
            statement_head: part(is(&[Nlvr]), || Head::new(text_width, 2, vb.pp("cls_head")))?,
            assignment_head: part(is(&[NlvrPretrain]), || Linear::uniform(text_width, 3, vb.pp("ta_head")))?,
            decoder: match task {
                Captioning => Some(Decoder::new(texts, vision_width, vb.pp("text_decoder"))?),
                Vqa => Some(Decoder::new(&texts.decoder(), text_width, vb.pp("text_decoder"))?),
                _ => None,
            },
            config: config.clone(),
        })
    }

    /// Lays out all weights for inference: of linear layers in the order in which the CPU multiplies by them
    /// ([`PackedWeights`] says of which type), of window attention with its biases looked up. Their plain form is
    /// dropped; what comes in has gradients as before, the weights have none. Results differ from those of the plain form by roundings
    /// of `bf16`, and by those of [`PackedWeights::Int8`]. A model that is packed stays as it is.
    ///
    /// # Errors
    /// If weights other than `f32` are to be bytes, or of more inputs than [`PackedWeights::Int8`] allows. The model is of no
    /// use then: some of its layers are packed and others are not.
    pub fn pack(&mut self, weights: PackedWeights) -> Result<()> {
        self.pack_with(weights, |_| Ok(None))
    }

    /// As [`Self::pack`], for a model whose linear layers and word embeddings have been built without their weights, each of
    /// which `source` then tells the place of, by the name that [`Self::weights_to_pack`] says. On the CPU those that
    /// can ([`StoredTensor::can_stay`]) stay there: word embeddings as long as the model lives, of which rows are read as they are
    /// needed, and layers, where the CPU multiplies by panels, until they are packed for their third product
    /// (see [`stored`](xvlm_kernels::PackedLinear::stored)). What it has none of is the model's own.
    ///
    /// # Errors
    /// As [`Self::pack`], those of `source`, or if a weight has another shape or its file was written to.
    pub fn pack_with(
        &mut self,
        weights: PackedWeights,
        source: impl Fn(&str) -> Result<Option<StoredTensor>> + Sync,
    ) -> Result<()> {
        if let Vision::Swin(swin) = &mut self.vision {
            swin.gather()?;
        }
        self.words().try_for_each(|words| words.pack(&source))?;
        if let (Some(head), Some(text)) = (&mut self.mlm_head, &self.text) {
            head.pack(weights, text.words());
        }
        if let Some(Decoder { bert, head }) = &mut self.decoder {
            head.pack(weights, bert.words());
        }
        let linears: Vec<&mut Linear> = self.linears().collect();
        linears.into_par_iter().try_for_each(|linear| linear.pack(weights, &source))
    }

    /// The names, among the parameters, of word embeddings and of the weights of linear layers that are not packed.
    pub fn weights_to_pack(&mut self) -> Vec<String> {
        let words: Vec<String> = self.words().map(|words| words.name().to_owned()).collect();
        let linears = self.linears().flat_map(|linear| linear.names().map(str::to_owned).collect::<Vec<_>>());
        linears.chain(words).collect()
    }

    fn words(&mut self) -> impl Iterator<Item = &mut Words> {
        let decoder = self.decoder.as_mut().map(|Decoder { bert, .. }| bert);
        self.text.iter_mut().chain(decoder).map(|bert| &mut bert.words)
    }

    fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        let projections = [&mut self.vision_projection, &mut self.text_projection, &mut self.assignment_head];
        let heads = [&mut self.match_head, &mut self.box_head, &mut self.statement_head];
        let decoder = self.decoder.as_mut().map(|Decoder { bert, head }| bert.linears().chain(head.linears()));
        let heads = heads.into_iter().flatten().flat_map(Head::linears);
        let heads = heads.chain(self.mlm_head.iter_mut().flat_map(MlmHead::linears));
        let text = self.text.iter_mut().flat_map(Bert::linears);
        let layers = self.vision.linears().chain(text).chain(decoder.into_iter().flatten());
        layers.chain(projections.into_iter().flatten()).chain(heads)
    }

    /// The sizes.
    pub fn config(&self) -> &XvlmConfig {
        &self.config
    }

    /// Pixels `[N, 3, R, R]` → patch tokens `[N, 1+L, C]`; row 0 is the pooled token.
    ///
    /// # Errors
    /// If the pixels do not have the configured resolution.
    pub fn encode_image(&self, pixels: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.vision.encode(pixels, pass)
    }

    /// Pixels `[N, 3, R, R]` and boxes in them → region tokens `[B, 1+L, C]` and image tokens `[N, 1+L, C]`, as
    /// [`Vision::encode_regions`]. Each image is encoded once.
    ///
    /// # Errors
    /// If the pixels do not have the configured resolution, or a region names an image that is not there.
    pub fn encode_regions(&self, pixels: &Tensor, regions: Regions, pass: &Pass) -> Result<(Tensor, Tensor)> {
        self.vision.encode_regions(pixels, regions, pass)
    }

    /// Token ids `[B, T]` (u32) and mask `[B, T]` → `[B, T, H]`.
    ///
    /// # Errors
    /// On a wrong shape, a text longer than the model allows, or if the model has no text encoder.
    pub fn encode_text(&self, ids: &Tensor, mask: &Tensor, attention: Attention, pass: &Pass) -> Result<Tensor> {
        self.has(&self.text, "a text encoder")?.encode(ids, mask, attention, pass)
    }

    /// Encoded texts `[B, T, H]`, their mask `[B, T]` and the concepts they look at → `[B, T, H]`.
    ///
    /// # Errors
    /// On a wrong shape or index, or if the model has no text encoder, or one for two images.
    pub fn fuse(
        &self,
        text: &Tensor,
        mask: &Tensor,
        concepts: &Concepts,
        attention: Attention,
        pass: &Pass,
    ) -> Result<Tensor> {
        if matches!(self.config.task, Task::Nlvr | Task::NlvrPretrain) {
            return self.lacks("fusion layers for one image");
        }
        let concepts = std::slice::from_ref(concepts);
        self.has(&self.text, "a text encoder")?.fuse(text, mask, concepts, attention, pass)
    }

    /// Encoded texts `[B, T, H]`, their mask `[B, T]` and the two images each is about → `[B, T, H]`.
    ///
    /// # Errors
    /// On a wrong shape or index, or if the model has no fusion layers for two images.
    pub fn fuse_pair(&self, text: &Tensor, mask: &Tensor, images: &[Concepts; 2], pass: &Pass) -> Result<Tensor> {
        match (&self.text, self.config.task) {
            (Some(bert), Task::Nlvr | Task::NlvrPretrain) => bert.fuse(text, mask, images, Attention::Full, pass),
            _ => self.lacks("fusion layers for two images"),
        }
    }

    /// Patch tokens `[B, 1+L, C]` → embeddings `[B, E]` of unit length, from row 0; `f32` for half types.
    ///
    /// # Errors
    /// On a wrong shape, or if the model has no projection.
    pub fn project_image(&self, tokens: &Tensor) -> Result<Tensor> {
        unit(&self.has(&self.vision_projection, "a projection of images")?.forward(&first(tokens)?)?)
    }

    /// Encoded texts `[B, T, H]` → embeddings `[B, E]` of unit length, from `[CLS]`; `f32` for half types.
    ///
    /// # Errors
    /// On a wrong shape, or if the model has no projection.
    pub fn project_text(&self, text: &Tensor) -> Result<Tensor> {
        unit(&self.has(&self.text_projection, "a projection of texts")?.forward(&first(text)?)?)
    }

    /// The temperature that similarities are divided by, a scalar.
    ///
    /// # Errors
    /// If the model has none.
    pub fn temperature(&self) -> Result<&Tensor> {
        self.has(&self.temperature, "a temperature")
    }

    /// Whether the model has a matching head.
    pub fn can_match(&self) -> bool {
        self.match_head.is_some()
    }

    /// Fused texts `[B, T, H]` → `[B, 2]`: logits of not matching and of matching; `f32` for half types.
    ///
    /// # Errors
    /// On a wrong shape, or if the model has no such head.
    pub fn match_logits(&self, fused: &Tensor) -> Result<Tensor> {
        wide(&self.has(&self.match_head, "a matching head")?.forward(&first(fused)?)?)
    }

    /// Texts fused with whole images `[B, T, H]` → boxes `[B, 4]`, `(cx, cy, w, h)` in fractions of the image; `f32` for half
    /// types.
    ///
    /// # Errors
    /// On a wrong shape, or if the model has no such head.
    pub fn predict_box(&self, fused: &Tensor) -> Result<Tensor> {
        candle_nn::ops::sigmoid(&wide(&self.has(&self.box_head, "a box head")?.forward(&first(fused)?)?)?)
    }

    /// Texts fused with two images `[B, T, H]` → `[B, 2]`: logits of a statement's being false and true; `f32` for half
    /// types.
    ///
    /// # Errors
    /// On a wrong shape, or if the model has no such head.
    pub fn statement_logits(&self, fused: &Tensor) -> Result<Tensor> {
        wide(&self.has(&self.statement_head, "a statement head")?.forward(&first(fused)?)?)
    }

    /// Texts fused with two images `[B, T, H]` → `[B, 3]`: logits of being about the first, the second and none of
    /// them; `f32` for half types.
    ///
    /// # Errors
    /// On a wrong shape, or if the model has no such head.
    pub fn assignment_logits(&self, fused: &Tensor) -> Result<Tensor> {
        wide(&self.has(&self.assignment_head, "a text-assignment head")?.forward(&first(fused)?)?)
    }

    /// Fused tokens `[.., H]` → logits over the vocabulary `[.., V]`.
    ///
    /// # Errors
    /// On a wrong shape, or if the model has no such head.
    pub fn mlm_logits(&self, fused: &Tensor) -> Result<Tensor> {
        let words = self.has(&self.text, "a text encoder")?.words();
        self.has(&self.mlm_head, "a masked-language head")?.forward(fused, words)
    }

    /// Texts that were written about concepts: token ids `[B, T]` (u32) and mask `[B, T]` → `[B, T, H]`, each token seeing
    /// those before it. The decoder does it, or, in a model for pre-training, the text and fusion layers.
    ///
    /// # Errors
    /// On a wrong shape or index, or if the model cannot write.
    pub fn decode(&self, ids: &Tensor, mask: &Tensor, concepts: &Concepts, pass: &Pass) -> Result<Tensor> {
        let bert = self.writer()?;
        let text = bert.encode(ids, mask, Attention::Causal, pass)?;
        bert.fuse(&text, mask, std::slice::from_ref(concepts), Attention::Causal, pass)
    }

    /// Begins texts about concepts, one for each index of them and each of at most `longest` tokens, to be written token by
    /// token: see [`Decoding::extend`]. What the layers read of the concepts is computed here, once.
    ///
    /// # Errors
    /// On a wrong shape or index, or if the model cannot write.
    pub fn begin_texts(&self, concepts: &Concepts, longest: usize) -> Result<Decoding<'_>> {
        Decoding::new(self.writer()?, concepts, longest)
    }

    /// The layers that write: the decoder's, or, in a model for pre-training, the text and fusion layers.
    fn writer(&self) -> Result<&Bert> {
        match (&self.decoder, &self.text, &self.mlm_head) {
            (Some(decoder), ..) => Ok(&decoder.bert),
            (None, Some(text), Some(_)) => Ok(text),
            _ => self.lacks("a decoder"),
        }
    }

    /// What [`Self::decode`] returns, or some of its rows `[.., H]` → logits of the next token `[.., V]`.
    ///
    /// # Errors
    /// On a wrong shape, or if the model cannot write.
    pub fn next_token_logits(&self, decoded: &Tensor) -> Result<Tensor> {
        match &self.decoder {
            Some(decoder) => decoder.head.forward(decoded, decoder.bert.words()),
            None => self.mlm_logits(decoded),
        }
    }

    fn has<'a, T>(&self, part: &'a Option<T>, name: &str) -> Result<&'a T> {
        part.as_ref().map_or_else(|| self.lacks(name), Ok)
    }

    fn lacks<T>(&self, name: &str) -> Result<T> {
        candle_core::bail!("model: expected one with {name}, found one for {}", self.config.task.name())
    }
}

fn part<T>(is_there: bool, build: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    is_there.then(build).transpose()
}

/// Writes text: causal layers that all, or from the fusion layer on, read tokens; and a language head.
#[derive(Clone, Debug)]
struct Decoder {
    bert: Bert,
    head: MlmHead,
}

impl Decoder {
    fn new(config: &BertConfig, reads: usize, vb: VarBuilder) -> Result<Self> {
        let body = match config.model_type {
            TextModel::Bert => vb.pp("bert"),
            TextModel::Roberta => vb.pp("roberta"),
        };
        Ok(Self { bert: Bert::new(config, reads, body)?, head: MlmHead::new(config, vb)? })
    }
}

/// Token 0 of each row.
fn first(tokens: &Tensor) -> Result<Tensor> {
    tokens.narrow(1, 0, 1)?.squeeze(1)?.contiguous()
}

/// Half types in `f32`: what losses are made of.
fn wide(x: &Tensor) -> Result<Tensor> {
    if matches!(x.dtype(), DType::BF16 | DType::F16) { x.to_dtype(DType::F32) } else { Ok(x.clone()) }
}

/// Rows of unit length (`F.normalize`, which keeps lengths above 1e-12).
fn unit(x: &Tensor) -> Result<Tensor> {
    let x = wide(x)?;
    let squares = x.sqr()?.sum_keepdim(D::Minus1)?;
    x.broadcast_div(&squares.maximum(1e-24)?.sqrt()?)
}
