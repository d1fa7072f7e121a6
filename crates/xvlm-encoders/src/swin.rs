//! Swin transformer (Liu et al. 2021, arXiv 2103.14030), as X-VLM's vision encoder.
//!
//! Parameter names are those of the official checkpoints (`layers.0.blocks.1.attn.qkv.weight`). Attention takes the
//! tokens in image order, so there is no roll and no copy into windows.

use std::sync::{Arc, OnceLock};

use candle_core::{Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use xvlm_kernels::{self as kernels, WindowBias, WindowShape};

use crate::config::{Activation, SwinConfig};
use crate::layers::{FeedForward, LayerNorm, Linear, PatchEmbedding};
use crate::pass::Pass;

/// Added to variances in layer normalisation.
const EPS: f64 = 1e-5;

/// The vision encoder.
#[derive(Clone, Debug)]
pub struct Swin {
    config: SwinConfig,
    patches: PatchEmbedding,
    patch_norm: LayerNorm,
    /// Absolute positions, learnt and fixed: `[1, tokens, width]`.
    positions: Option<Tensor>,
    waves: Option<Tensor>,
    stages: Vec<Stage>,
    norm: LayerNorm,
}

#[derive(Clone, Debug)]
struct Stage {
    blocks: Vec<Block>,
    merging: Option<Merging>,
}

impl Swin {
    /// Builds the encoder.
    ///
    /// # Errors
    /// If the builder has a parameter of another shape. Sizes are to be checked with
    /// [`crate::XvlmConfig::validate`].
    pub fn new(config: &SwinConfig, vb: VarBuilder) -> Result<Self> {
        let (patch, width) = (config.patch_size, config.embed_dim);
        let embed = vb.pp("patch_embed");
        let tokens = (config.image_res / patch).pow(2);
        let normal = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let blocks: usize = config.depths.iter().sum();
        let mut before = 0;
        let mut stages = Vec::new();
        for (i, &depth) in config.depths.iter().enumerate() {
            let vb = vb.pp("layers").pp(i);
            let width = width << i;
            let side = config.image_res / (patch << i);
            let build = |j: usize| {
                let drop_path = config.drop_path_rate * (before + j) as f64 / (blocks.max(2) - 1) as f64;
                Block::new(config, width, config.num_heads[i], side, j % 2 == 1, drop_path, vb.pp("blocks").pp(j))
            };
            stages.push(Stage {
                blocks: (0..depth).map(build).collect::<Result<_>>()?,
                merging: match i + 1 < config.depths.len() {
                    true => Some(Merging::new(config, side, width, vb.pp("downsample"))?),
                    false => None,
                },
            });
            before += depth;
        }
        Ok(Self {
            patches: PatchEmbedding::new(config.image_res, patch, width, true, embed.pp("proj"))?,
            patch_norm: LayerNorm::new(width, EPS, embed.pp("norm"))?,
            positions: match config.ape {
                true => Some(vb.get_with_hints((1, tokens, width), "absolute_pos_embed", normal)?),
                false => None,
            },
            waves: match config.sine_positions > 0.0 {
                true => Some(sine_positions(config.image_res / patch, width, config.sine_positions, vb.device())?),
                false => None,
            },
            stages,
            norm: LayerNorm::new(config.width(), EPS, vb.pp("norm"))?,
            config: config.clone(),
        })
    }

    /// The sizes.
    pub fn config(&self) -> &SwinConfig {
        &self.config
    }

    /// Pixels `[N, 3, R, R]` → patch tokens `[N, L, C]` in image order, after the final norm.
    ///
    /// # Errors
    /// If the pixels do not have the configured resolution.
    pub fn forward(&self, pixels: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut x = self.patch_norm.forward(&self.patches.forward(pixels)?)?;
        pass.keep(|| "patch_embed".to_owned(), &x);
        for positions in [&self.positions, &self.waves].into_iter().flatten() {
            x = x.broadcast_add(&positions.to_dtype(x.dtype())?)?;
        }
        for (i, stage) in self.stages.iter().enumerate() {
            for (j, block) in stage.blocks.iter().enumerate() {
                let block = block.clone();
                x = pass.segment(move |pass| block.forward(&x, pass))?;
                pass.keep(|| format!("layers.{i}.blocks.{j}"), &x);
            }
            if let Some(merging) = &stage.merging {
                let merging = merging.clone();
                x = pass.segment(move |_| merging.forward(&x))?;
            }
            pass.keep(|| format!("layers.{i}"), &x);
        }
        self.norm.forward(&x)
    }

    pub(crate) fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.stages.iter_mut().flat_map(|Stage { blocks, merging }| {
            let merging = merging.as_mut().map(|merging| &mut merging.reduction);
            blocks.iter_mut().flat_map(Block::linears).chain(merging)
        })
    }

    /// Looks up the biases of all windows, for inference.
    pub(crate) fn gather(&mut self) -> Result<()> {
        let blocks: Vec<&mut Block> = self.stages.iter_mut().flat_map(|stage| &mut stage.blocks).collect();
        blocks.into_par_iter().try_for_each(|block| block.bias.gather(block.window.window))
    }
}

/// Places on a square grid as waves along both axes, `[1, side², width]`: `width / 4` frequencies, from half a period over the
/// side to eight, each as sine and cosine along x, then along y.
fn sine_positions(side: usize, width: usize, amplitude: f64, device: &Device) -> Result<Tensor> {
    let frequencies = width / 4;
    let wave = |place: usize, channel: usize| {
        let (axis, channel) = (channel / (2 * frequencies), channel % (2 * frequencies));
        let octaves = 4.0 * (channel % frequencies) as f64 / (frequencies.max(2) - 1) as f64;
        let along = [place % side, place / side][axis] as f64 + 0.5;
        let angle = std::f64::consts::PI * along / side as f64 * octaves.exp2();
        amplitude * if channel < frequencies { angle.sin() } else { angle.cos() }
    };
    let values = (0..side * side).flat_map(|place| {
        (0..width).map(move |channel| if channel < 4 * frequencies { wave(place, channel) as f32 } else { 0.0 })
    });
    Tensor::from_vec(values.collect(), (1, side * side, width), device)
}

#[derive(Clone, Debug)]
struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    bias: PositionBias,
    window: WindowShape,
    projection: Linear,
    norm2: LayerNorm,
    feed_forward: FeedForward,
    drop_path: f64,
}

impl Block {
    fn new(
        config: &SwinConfig,
        width: usize,
        heads: usize,
        side: usize,
        shifted: bool,
        drop_path: f64,
        vb: VarBuilder,
    ) -> Result<Self> {
        let window = config.window_size.min(side);
        let shift = if shifted && side > window { window / 2 } else { 0 };
        let attention = vb.pp("attn");
        let table = ((2 * window - 1).pow(2), heads);
        let normal = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let hidden = config.mlp_ratio * width;
        let linear =
            |input: usize, output: usize, vb: VarBuilder| Linear::normal(input, output, config.initializer_range, vb);
        Ok(Self {
            norm1: LayerNorm::new(width, EPS, vb.pp("norm1"))?,
            qkv: linear(width, 3 * width, attention.pp("qkv"))?,
            bias: PositionBias::Table {
                rows: attention.get_with_hints(table, "relative_position_bias_table", normal)?,
                index: Arc::default(),
            },
            window: WindowShape { height: side, width: side, window, shift },
            projection: linear(width, width, attention.pp("proj"))?,
            norm2: LayerNorm::new(width, EPS, vb.pp("norm2"))?,
            feed_forward: FeedForward {
                inner: linear(width, hidden, vb.pp("mlp").pp("fc1"))?,
                activation: Activation::Gelu,
                outer: linear(hidden, width, vb.pp("mlp").pp("fc2"))?,
            },
            drop_path,
        })
    }

    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?;
        let attended = self.bias.attend(&qkv, self.window)?;
        let x = self.projection.forward_branch(&attended, x, self.drop_path, pass)?;
        self.feed_forward.forward_branch(&self.norm2.forward(&x)?, &x, self.drop_path, pass)
    }

    fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        [&mut self.qkv, &mut self.projection].into_iter().chain(self.feed_forward.linears())
    }
}

/// What is added to the scores of each pair of tokens of a window, by their relative position.
#[derive(Clone, Debug)]
enum PositionBias {
    /// As it is trained: a table `[(2·window − 1)², heads]`, and, once it has been asked for, its row for each pair.
    Table { rows: Tensor, index: Arc<OnceLock<Tensor>> },
    /// Of all pairs, for inference.
    Gathered(WindowBias),
}

impl PositionBias {
    /// Attention inside windows, with these biases.
    fn attend(&self, qkv: &Tensor, window: WindowShape) -> Result<Tensor> {
        match self {
            Self::Gathered(bias) => kernels::window_attention_with(qkv, bias, window),
            Self::Table { rows, index } => {
                let index = match index.get() {
                    Some(index) => index,
                    None => {
                        let new = Tensor::new(kernels::relative_positions(window.window), rows.device())?;
                        index.get_or_init(|| new)
                    }
                };
                kernels::window_attention(qkv, &gathered(rows, index)?, window)
            }
        }
    }

    fn gather(&mut self, window: usize) -> Result<()> {
        if let Self::Table { rows, .. } = self {
            *self = Self::Gathered(WindowBias::of_rows(rows, window)?);
        }
        Ok(())
    }
}

/// Rows of a table for all pairs: `[heads, window², window²]`.
fn gathered(rows: &Tensor, index: &Tensor) -> Result<Tensor> {
    let area = index.elem_count().isqrt();
    rows.index_select(index, 0)?.t()?.contiguous()?.reshape(((), area, area))
}

/// Joins each 2 × 2 tokens into one of twice the width.
#[derive(Clone, Debug)]
struct Merging {
    side: usize,
    norm: LayerNorm,
    reduction: Linear,
}

impl Merging {
    fn new(config: &SwinConfig, side: usize, width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            side,
            norm: LayerNorm::new(4 * width, EPS, vb.pp("norm"))?,
            reduction: Linear::without_bias(4 * width, 2 * width, config.initializer_range, vb.pp("reduction"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let joined = kernels::merge_patches(x, self.side, self.side)?;
        self.reduction.forward(&self.norm.forward(&joined)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::parameters::Parameters;

    #[test]
    fn stochastic_depth_rises_in_a_line_over_all_blocks() {
        let depths = [2, 3, 1];
        let config = |drop_path_rate| SwinConfig {
            image_res: 64,
            embed_dim: 8,
            depths: depths.to_vec(),
            num_heads: vec![1, 2, 4],
            window_size: 4,
            drop_path_rate,
            ..SwinConfig::base(64)
        };
        let rates = |rate| -> Vec<f64> {
            let swin = Swin::new(&config(rate), Parameters::zeros().builder(DType::F32, &Device::Cpu)).unwrap();
            swin.stages.iter().flat_map(|stage| &stage.blocks).map(|block| block.drop_path).collect()
        };
        // `torch.linspace(0, 0.1, 6)`.
        let expected = [0.0, 0.02, 0.04, 0.06, 0.08, 0.1];
        let found = rates(0.1);
        assert!(found.len() == 6 && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
        assert_eq!(rates(0.0), [0.0; 6]);
    }
}
