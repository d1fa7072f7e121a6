//! Models with drawn weights, and what a case does with it.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use xvlm::encoders::{Attention, Concepts, Pass, Xvlm, XvlmConfig};
use xvlm::{Precision, Search, tasks::search_texts};

use crate::cases::{BEAMS, Case, NEW_TOKENS, Work};

/// A case that is ready to run.
pub struct Prepared {
    case: Case,
    pixels: Tensor,
    ids: Tensor,
    text_mask: Tensor,
    /// For what reads the results of other parts: texts and images, encoded.
    states: Tensor,
    tokens: Tensor,
}

/// A model with drawn weights, laid out for inference.
///
/// # Errors
/// If it cannot be made.
pub fn model(config: &XvlmConfig, precision: Precision, device: &Device) -> Result<Xvlm> {
    let vb = VarBuilder::from_backend(Box::new(Drawn), precision.dtype(), device.clone());
    let mut model = Xvlm::new(config, vb)?;
    model.pack(precision.packed())?;
    Ok(model)
}

impl Prepared {
    /// Draws the inputs of a case, for a model that computes in a precision.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn new(case: &Case, precision: Precision, device: &Device) -> Result<Self> {
        let Case { resolution, images, texts, tokens, .. } = *case;
        let config = XvlmConfig::base(resolution);
        let (vision, text) = (config.vision_config.width(), config.text_config.hidden_size);
        let seen = 1 + (resolution / config.vision_config.stride()).pow(2);
        let drawn = |shape: Vec<usize>| numbers(&shape.into(), 1.0, 11)?.to_dtype(precision.dtype())?.to_device(device);
        let is_fusion = case.work == Work::Fusion;
        let id = |i: usize| 1000 + (i * 7919 % 29_000) as u32;
        Ok(Self {
            case: *case,
            pixels: drawn(vec![images, 3, resolution, resolution])?,
            ids: Tensor::from_iter((0..texts * tokens).map(id), device)?.reshape((texts, tokens))?,
            text_mask: Tensor::ones((texts, tokens), DType::F32, device)?,
            states: drawn(if is_fusion { vec![texts, tokens, text] } else { vec![0] })?,
            tokens: drawn(if is_fusion { vec![images, seen, vision] } else { vec![0] })?,
        })
    }

    /// Does the work of the case once.
    ///
    /// # Errors
    /// If the model is of another size or type, or the case is none of inference.
    pub fn run(&self, model: &Xvlm) -> Result<Tensor> {
        let pass = Pass::inference();
        let text = || model.encode_text(&self.ids, &self.text_mask, Attention::Full, &pass);
        match self.case.work {
            Work::Vision => model.encode_image(&self.pixels, &pass),
            Work::Text => text(),
            Work::Fusion => {
                let index: Vec<u32> = (0..self.case.texts as u32).collect();
                self.fuse(model, &self.states, &self.tokens, &index)
            }
            Work::Grounding => {
                let tokens = model.encode_image(&self.pixels, &pass)?;
                let fused = self.fuse(model, &text()?, &tokens, &vec![0; self.case.texts])?;
                model.predict_box(&fused)
            }
            Work::Caption | Work::CaptionCached => self.caption(model),
            Work::Step | Work::StartUp => candle_core::bail!("{}: expected a case of inference", self.case.name),
        }
    }

    fn fuse(&self, model: &Xvlm, text: &Tensor, tokens: &Tensor, index: &[u32]) -> Result<Tensor> {
        let mask = Tensor::ones((index.len(), tokens.dim(1)?), DType::F32, tokens.device())?;
        let concepts = Concepts { tokens, index, mask: &mask };
        model.fuse(text, &self.text_mask, &concepts, Attention::Full, &Pass::inference())
    }

    /// As `xvlm::tasks` writes, with no end before the last token. What comes out is how likely the text is.
    fn caption(&self, model: &Xvlm) -> Result<Tensor> {
        let search = Search { beams: BEAMS, min_tokens: NEW_TOKENS, max_tokens: NEW_TOKENS, ..Search::default() };
        let end = 102;
        let tokens = model.encode_image(&self.pixels, &Pass::inference())?;
        let mask = Tensor::ones((1, tokens.dim(1)?), DType::F32, tokens.device())?;
        let concepts = Concepts { tokens: &tokens, index: &[0], mask: &mask };
        let texts = search_texts(model, &concepts, &self.ids.to_vec2()?, search, end, None)?;
        let scores: Vec<f32> = texts.iter().map(|text| text.score).collect();
        Tensor::new(scores, self.ids.device())
    }

    /// Some numbers of the result of the case, evenly spread over it. Those of boxes are told as they were before the sigmoid, which
    /// would make differences smaller than they are.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn sample(&self, model: &Xvlm) -> Result<Vec<f32>> {
        const MOST: usize = 4096;
        let output = self.run(model)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let every = output.len().div_ceil(MOST).max(1);
        let logit = |share: f32| (share / (1.0 - share)).ln();
        let number = |output: f32| if self.case.work == Work::Grounding { logit(output) } else { output };
        Ok(output.into_iter().step_by(every).map(number).collect())
    }
}

/// Weights drawn when they are asked for, quickly: what they are does not matter, but that they are neither zero nor vast.
struct Drawn;

/// Numbers of a shape between −`most` and `most` (splitmix64: Steele, Lea and Flood 2014).
fn numbers(shape: &Shape, most: f32, seed: u64) -> Result<Tensor> {
    let number = |i: u64| {
        let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // The upper 24 bits are as many as an f32 tells apart.
        most * ((z >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    Tensor::from_vec((0..shape.elem_count() as u64).map(number).collect::<Vec<_>>(), shape, &Device::Cpu)
}

impl SimpleBackend for Drawn {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let dtype = if shape.rank() == 0 { DType::F32 } else { dtype };
        if let Init::Const(value) = init {
            return Tensor::full(value as f32, shape, device)?.to_dtype(dtype);
        }
        let seed = name.bytes().fold(0, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
        numbers(&shape, 0.035, seed)?.to_dtype(dtype)?.to_device(device)
    }

    fn get_unchecked(&self, name: &str, _dtype: DType, _device: &Device) -> Result<Tensor> {
        candle_core::bail!("parameter {name}: expected to be asked for with its shape")
    }

    fn contains_tensor(&self, _name: &str) -> bool {
        true
    }
}
