//! Plain vision transformers: CLIP's (Radford et al. 2021, `models/clip_vit.py`) and DeiT (Touvron et al. 2021,
//! `models/vit.py`).
//!
//! Parameter names are those of the official checkpoints. A region passes through all blocks but the last few as part of its
//! image; in those it is a row of its own, whose tokens see only the patches it covers.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use xvlm_kernels as kernels;

use crate::config::{VitConfig, VitFamily};
use crate::layers::{FeedForward, LayerNorm, Linear, PatchEmbedding, hide};
use crate::pass::Pass;
use crate::vision::Regions;

/// A vision transformer.
#[derive(Clone, Debug)]
pub struct Vit {
    config: VitConfig,
    patches: PatchEmbedding,
    /// `[1, 1, width]`.
    class: Tensor,
    /// `[1, 1 + patches, width]`.
    positions: Tensor,
    pre_norm: Option<LayerNorm>,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl Vit {
    /// Builds the encoder.
    ///
    /// # Errors
    /// If the builder has a parameter of another shape. Sizes are to be checked with
    /// [`crate::XvlmConfig::validate`].
    pub fn new(config: &VitConfig, vb: VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let tokens = 1 + config.grid().pow(2);
        let normal = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let norm = |name: &str| LayerNorm::new(width, config.norm_eps, vb.pp(name));
        let patches = |has_bias: bool, vb: VarBuilder| {
            PatchEmbedding::new(config.image_res, config.patch_size, width, has_bias, vb)
        };
        let blocks = |vb: VarBuilder| -> Result<Vec<Block>> {
            (0..config.num_hidden_layers).map(|i| Block::new(config, vb.pp(i))).collect()
        };
        let config = config.clone();
        Ok(match config.family {
            VitFamily::Clip => Self {
                patches: patches(false, vb.pp("patch_embed"))?,
                class: vb.get_with_hints(width, "class_embedding", normal)?.reshape((1, 1, width))?,
                positions: vb.pp("pos_embed").get_with_hints((tokens, width), "weight", normal)?.unsqueeze(0)?,
                // Spelt so in every published CLIP checkpoint.
                pre_norm: Some(norm("pre_layrnorm")?),
                blocks: blocks(vb.pp("encoder").pp("layers"))?,
                norm: norm("post_layernorm")?,
                config,
            },
            VitFamily::Deit => Self {
                patches: patches(true, vb.pp("patch_embed").pp("proj"))?,
                class: vb.get_with_hints((1, 1, width), "cls_token", normal)?,
                positions: vb.get_with_hints((1, tokens, width), "pos_embed", normal)?,
                pre_norm: None,
                blocks: blocks(vb.pp("blocks"))?,
                norm: norm("norm")?,
                config,
            },
        })
    }

    /// The sizes.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Pixels `[N, 3, R, R]` → tokens `[N, 1+L, C]`, the class token first; with `B` regions, `[B+N, 1+L, C]`: the regions,
    /// then the images.
    ///
    /// # Errors
    /// If the pixels do not have the configured resolution, or a region names an image that is not there.
    pub fn forward(&self, pixels: &Tensor, regions: Option<Regions>, pass: &Pass) -> Result<Tensor> {
        let patches = self.patches.forward(pixels)?;
        pass.keep(|| "patch_embed".to_owned(), &patches);
        let (n, l, width) = patches.dims3()?;
        let class = self.class.expand((n, 1, width))?;
        let mut x = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.positions)?;
        if let Some(norm) = &self.pre_norm {
            x = norm.forward(&x)?;
            pass.keep(|| "pre_layrnorm".to_owned(), &x);
        }
        let mut bias = Tensor::zeros((n, 1 + l), DType::F32, x.device())?;
        let first_local = self.blocks.len() - self.config.local_attn_depth;
        for (i, block) in self.blocks.iter().enumerate() {
            if let Some(regions) = regions.filter(|_| i == first_local) {
                regions.check(n, 1 + l)?;
                let index = Tensor::new(regions.index, x.device())?;
                x = Tensor::cat(&[&x.index_select(&index, 0)?, &x], 0)?;
                bias = Tensor::cat(&[&hide(regions.mask)?, &bias], 0)?;
            }
            let (block, seen) = (block.clone(), bias.clone());
            x = pass.segment(move |pass| block.forward(&x, &seen, pass))?;
            pass.keep(|| format!("block.{i}"), &x);
        }
        self.norm.forward(&x)
    }
}

#[derive(Clone, Debug)]
struct Block {
    norm1: LayerNorm,
    /// One layer for queries, keys and values together, or three.
    qkv: Vec<Linear>,
    heads: usize,
    projection: Linear,
    norm2: LayerNorm,
    feed_forward: FeedForward,
    attention_dropout: f64,
}

impl Block {
    fn new(config: &VitConfig, vb: VarBuilder) -> Result<Self> {
        let (width, hidden) = (config.hidden_size, config.intermediate_size);
        let (norms, attention, qkv, projection): (_, _, &[&str], _) = match config.family {
            VitFamily::Clip => {
                (["layer_norm1", "layer_norm2"], vb.pp("self_attn"), &["q_proj", "k_proj", "v_proj"], "out_proj")
            }
            VitFamily::Deit => (["norm1", "norm2"], vb.pp("attn"), &["qkv"], "proj"),
        };
        let linear =
            |input: usize, output: usize, vb: VarBuilder| Linear::normal(input, output, config.initializer_range, vb);
        let norm = |name: &str| LayerNorm::new(width, config.norm_eps, vb.pp(name));
        let part = |name: &&str| linear(width, 3 * width / qkv.len(), attention.pp(name));
        Ok(Self {
            norm1: norm(norms[0])?,
            qkv: qkv.iter().map(part).collect::<Result<_>>()?,
            heads: config.num_attention_heads,
            projection: linear(width, width, attention.pp(projection))?,
            norm2: norm(norms[1])?,
            feed_forward: FeedForward {
                inner: linear(width, hidden, vb.pp("mlp").pp("fc1"))?,
                activation: config.hidden_act,
                outer: linear(hidden, width, vb.pp("mlp").pp("fc2"))?,
            },
            attention_dropout: config.attention_dropout,
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor, pass: &Pass) -> Result<Tensor> {
        let parts: Vec<&Linear> = self.qkv.iter().collect();
        let qkv = Linear::forward_stacked(&parts, &self.norm1.forward(x)?)?;
        let attended = pass.attend(self.attention_dropout, |dropped| {
            kernels::self_attention(&qkv, bias, self.heads, false, dropped)
        })?;
        let x = kernels::add_branch(x, &self.projection.forward(&attended)?, None)?;
        let fed = self.feed_forward.forward(&self.norm2.forward(&x)?)?;
        kernels::add_branch(&x, &fed, None)
    }
}
