//! What a training step costs, from the sizes alone: products of matrices, and what is kept for the backward pass.
//!
//! *FLOPs* are those of matrix products: `2·m·n·k` for `[m, k]·[k, n]`. Everything else a transformer does (normalising,
//! adding, activating, softmax) is left out, as is common; it is a few per cent. The backward pass has two products for each
//! of the forward pass, so that a step is three times this, and four times if activations are computed anew.
//!
//! *Activations* are the numbers that the graph of the forward pass keeps for the backward pass. They are counted operation by
//! operation, as the modules of this crate are written and computed on the CPU. If blocks are computed anew, what there is at
//! the fullest moment of one counts too: beside what it keeps, norms, results of GELU and branches that are forgotten soon. What
//! an allocator adds, and what a single operation needs while it runs, is left out.

use serde::Serialize;

use crate::config::{Activation, BertConfig, SwinConfig, VisionConfig, VitConfig, VitFamily, XvlmConfig};

/// What passes through a model at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Images that are encoded.
    pub images: usize,
    /// Boxes in them that become concepts of their own.
    pub regions: usize,
    /// Texts that are encoded; with a masked copy of each, twice as many as there are.
    pub texts: usize,
    /// Tokens of a text, with padding.
    pub tokens: usize,
    /// Texts that are fused with a concept each; one that is fused with several counts so many times.
    pub fused: usize,
    /// Concepts that the fusion layers read.
    pub concepts: usize,
    /// Pairs of text and concept that contrastive learning compares, all with all.
    pub compared: usize,
    /// Fused texts that are asked whether they match.
    pub matched: usize,
    /// Fused texts that are asked for their box.
    pub boxes: usize,
    /// Tokens that are predicted.
    pub predicted: usize,
}

/// The parts of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// The vision encoder.
    Vision,
    /// Embeddings of words, and the layers below the fusion layers.
    Text,
    /// The layers with cross attention.
    Fusion,
    /// Projections, temperature, heads, and decoders.
    Heads,
}

impl Part {
    /// All of them, in the order of the forward pass.
    pub const ALL: [Self; 4] = [Self::Vision, Self::Text, Self::Fusion, Self::Heads];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Text => "text",
            Self::Fusion => "fusion",
            Self::Heads => "heads",
        }
    }

    /// The part that a parameter belongs to, by its name.
    pub fn of_parameter(config: &XvlmConfig, name: &str) -> Self {
        if name.starts_with("vision_encoder.") {
            return Self::Vision;
        }
        let Some(inside) = name.strip_prefix("text_encoder.") else { return Self::Heads };
        let layer =
            inside.split_once("encoder.layer.").and_then(|(_, rest)| rest.split('.').next()?.parse::<usize>().ok());
        match layer {
            Some(layer) if layer >= config.text_config.fusion_layer => Self::Fusion,
            None if inside.starts_with("cls.") || inside.starts_with("lm_head.") => Self::Heads,
            _ => Self::Text,
        }
    }
}

/// What one part costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// FLOPs of the forward pass.
    pub flops: u64,
    /// Numbers that are kept whatever the tape does: what comes out of segments, and what is in none.
    between: u64,
    /// Numbers inside segments.
    inside: u64,
    /// The most that there are while one segment is computed.
    largest: u64,
}

impl Cost {
    /// Numbers kept for the backward pass; with recomputation only one segment's at a time, and what there is while it is computed.
    pub fn activations(&self, recompute: bool) -> u64 {
        self.between + if recompute { self.largest } else { self.inside }
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            flops: self.flops + other.flops,
            between: self.between + other.between,
            inside: self.inside + other.inside,
            largest: self.largest.max(other.largest),
        }
    }

    /// What is in no segment.
    fn between(flops: usize, numbers: usize) -> Self {
        Self { flops: flops as u64, between: numbers as u64, ..Self::default() }
    }

    /// A segment with what it keeps beside its result, and the most that it forgets soon.
    fn segment(flops: usize, inside: usize, passing: usize, result: usize) -> Self {
        let largest = (inside + passing) as u64;
        Self { flops: flops as u64, between: result as u64, inside: inside as u64, largest }
    }
}

impl XvlmConfig {
    /// What each part of a model for pre-training costs, in the order of [`Part::ALL`].
    pub fn costs(&self, load: &Load) -> [Cost; 4] {
        let vision = match &self.vision_config {
            VisionConfig::Swin(swin) => swin_cost(swin, load),
            VisionConfig::Vit(vit) => vit_cost(vit, load),
        };
        let seen = self.vision_config.tokens();
        [vision, text_cost(&self.text_config, load), fusion_cost(self, load, seen), heads_cost(self, load)]
    }

    /// What the whole model costs.
    pub fn cost(&self, load: &Load) -> Cost {
        self.costs(load).into_iter().fold(Cost::default(), Cost::and)
    }
}

impl VisionConfig {
    /// Tokens of an image after the last block, with the pooled one.
    fn tokens(&self) -> usize {
        1 + (self.image_res() / self.stride()).pow(2)
    }
}

/// FLOPs of a linear layer.
fn linear(rows: usize, input: usize, output: usize) -> usize {
    2 * rows * input * output
}

/// FLOPs of attention: scores, and the means of the values.
fn attention(queries: usize, keys: usize, width: usize) -> usize {
    4 * queries * keys * width
}

fn patches(pixels_of_patch: usize, tokens: usize, width: usize, images: usize) -> (usize, usize) {
    let rows = images * tokens;
    (linear(rows, pixels_of_patch, width), rows * (pixels_of_patch + width))
}

fn swin_cost(config: &SwinConfig, load: &Load) -> Cost {
    let (n, patch) = (load.images, config.patch_size);
    let mut width = config.embed_dim;
    let mut side = config.image_res / patch;
    let (flops, numbers) = patches(3 * patch * patch, side * side, width, n);
    // Their norm, and each kind of position that is added.
    let more = 1 + usize::from(config.ape) + usize::from(config.sine_positions > 0.0);
    let mut cost = Cost::between(flops, numbers + more * n * side * side * width);
    for (i, &depth) in config.depths.iter().enumerate() {
        let (area, hidden) = (config.window_size.min(side).pow(2), config.mlp_ratio * width);
        let rows = n * side * side;
        for _ in 0..depth {
            let flops = linear(rows, width, 3 * width)
                + attention(rows, area, width)
                + linear(rows, width, width)
                + linear(rows, width, hidden)
                + linear(rows, hidden, width);
            // Queries, keys and values, attended, sum; hidden. Norms are made again, and branches are added and forgotten.
            let inside = rows * (5 * width + hidden);
            let biases = 2 * area * area * config.num_heads[i];
            // When GELU's result is multiplied: that, the norm before, and the branch.
            let passing = rows * (hidden + 2 * width);
            cost = cost.and(Cost::segment(flops, inside + biases, passing, rows * width));
        }
        if i + 1 < config.depths.len() {
            // Four tokens joined, their norm, and a token of twice the width.
            let joined = rows / 4;
            let result = joined * 2 * width;
            let flops = linear(joined, 4 * width, 2 * width);
            cost = cost.and(Cost::segment(flops, rows * width, rows * width, result));
            (width, side) = (2 * width, side / 2);
        }
    }
    // The norm, and the mean before the tokens: of images, and of regions.
    let tokens = side * side;
    cost.and(Cost::between(0, (n * tokens + (n + load.regions) * (1 + tokens)) * width))
}

fn vit_cost(config: &VitConfig, load: &Load) -> Cost {
    let (width, hidden, patch) = (config.hidden_size, config.intermediate_size, config.patch_size);
    let grid = config.grid().pow(2);
    let tokens = 1 + grid;
    let (flops, numbers) = patches(3 * patch * patch, grid, width, load.images);
    // With the class token, with positions, and a norm that only CLIP has there.
    let is_clip = config.family == VitFamily::Clip;
    let more = 2 + usize::from(is_clip);
    let mut cost = Cost::between(flops, numbers + more * load.images * tokens * width);
    let first_local = config.num_hidden_layers - config.local_attn_depth;
    let mut sequences = load.images;
    for i in 0..config.num_hidden_layers {
        if i == first_local && load.regions > 0 {
            sequences += load.regions;
            cost = cost.and(Cost::between(0, (load.regions + sequences) * tokens * width));
        }
        let rows = sequences * tokens;
        let flops = linear(rows, width, 3 * width)
            + sequences * attention(tokens, tokens, width)
            + linear(rows, width, width)
            + linear(rows, width, hidden)
            + linear(rows, hidden, width);
        // What CLIP's activation gives is kept; GELU's is computed again. The norm before and the branch pass.
        let (hidden, passing) = match config.hidden_act {
            Activation::QuickGelu => (2 * hidden, 2 * width),
            Activation::Gelu => (hidden, hidden + 2 * width),
        };
        let inside = rows * (5 * width + hidden);
        cost = cost.and(Cost::segment(flops, inside, rows * passing, rows * width));
    }
    cost.and(Cost::between(0, sequences * tokens * width))
}

/// A layer of BERT without cross attention, as FLOPs and kept numbers; GELU's result passes.
fn layer(config: &BertConfig, sequences: usize, tokens: usize) -> (usize, usize) {
    let (width, hidden, rows) = (config.hidden_size, config.intermediate_size, sequences * tokens);
    let flops = linear(rows, width, 3 * width)
        + sequences * attention(tokens, tokens, width)
        + linear(rows, width, width)
        + linear(rows, width, hidden)
        + linear(rows, hidden, width);
    // Queries, keys and values, attended, projected (with what was dropped of it), norm; hidden, out.
    let kept = rows * (7 * width + hidden);
    (flops, kept)
}

/// What a dropout makes of hidden states.
fn dropped(config: &BertConfig, rows: usize) -> usize {
    if config.hidden_dropout_prob > 0.0 { rows * config.hidden_size } else { 0 }
}

fn text_cost(config: &BertConfig, load: &Load) -> Cost {
    let rows = load.texts * load.tokens;
    // Words, with positions, the norm; positions with types once.
    let embedded = rows * 3 * config.hidden_size + dropped(config, rows) + load.tokens * config.hidden_size;
    let (flops, kept) = layer(config, load.texts, load.tokens);
    let layer = Cost::segment(flops, kept, rows * config.intermediate_size, rows * config.hidden_size);
    (0..config.fusion_layer).fold(Cost::between(0, embedded), |cost, _| cost.and(layer))
}

fn fusion_cost(config: &XvlmConfig, load: &Load, seen: usize) -> Cost {
    if load.fused == 0 {
        return Cost::default();
    }
    let (text, vision_width) = (&config.text_config, config.vision_config.width());
    let (width, rows) = (text.hidden_size, load.fused * load.tokens);
    let read = load.concepts * seen;
    let (flops, kept) = layer(text, load.fused, load.tokens);
    let flops = flops
        + 2 * linear(rows, width, width)
        + linear(read, vision_width, 2 * width)
        + load.fused * attention(load.tokens, seen, width);
    // Queries, keys and values, attended, projected, norm.
    let kept = kept + rows * 4 * width + read * 2 * width;
    let layer = Cost::segment(flops, kept, rows * text.intermediate_size, rows * width);
    // The texts by rows, and the concepts, joined and as the begin of a graph.
    let between = Cost::between(0, rows * width + 2 * read * vision_width);
    (text.fusion_layer..text.num_hidden_layers).fold(between, |cost, _| cost.and(layer))
}

fn heads_cost(config: &XvlmConfig, load: &Load) -> Cost {
    let (text, width) = (&config.text_config, config.text_config.hidden_size);
    let vision_width = config.vision_config.width();
    let (compared, shared) = (load.compared, config.embed_dim);
    // A head is as wide again inside: first token, hidden, norm, activation, output.
    let head = |rows: usize, output: usize| {
        let flops = linear(rows, width, 2 * width) + linear(rows, 2 * width, output);
        Cost::between(flops, rows * (7 * width + output))
    };
    let projections = linear(compared, vision_width, shared) + linear(compared, width, shared);
    let similarities = 2 * compared * compared * shared;
    // First tokens, projections, squares and unit lengths; similarities, and those over the temperature.
    let kept = compared * (vision_width + width + 6 * shared) + 2 * compared * compared;
    let words = linear(load.predicted, width, width) + linear(load.predicted, width, text.vocab_size);
    let kept_of_words = load.predicted * (4 * width + text.vocab_size);
    Cost::between(projections + similarities, kept)
        .and(Cost::between(words, kept_of_words))
        .and(head(load.matched, 2))
        .and(head(load.boxes, 4))
}
