//! FLOPs against the weights that a model really has: each takes part in one product for each row that it is applied to.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use xvlm_encoders::cost::{Load, Part};
use xvlm_encoders::{Blueprint, Xvlm, XvlmConfig};

const LOAD: Load = Load {
    images: 3,
    regions: 5,
    texts: 10,
    tokens: 7,
    fused: 20,
    concepts: 8,
    compared: 5,
    matched: 15,
    boxes: 5,
    predicted: 6,
};

fn config(vision: Value) -> XvlmConfig {
    let text = json!({
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "fusion_layer": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 12,
    });
    serde_json::from_value(json!({ "vision_config": vision, "text_config": text, "embed_dim": 12 })).unwrap()
}

fn swin() -> XvlmConfig {
    config(json!({
        "kind": "swin", "image_res": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2],
        "window_size": 4,
    }))
}

fn vit(family: &str) -> XvlmConfig {
    config(json!({
        "kind": "vit", "family": family, "image_res": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4,
        "num_attention_heads": 2, "intermediate_size": 24, "local_attn_depth": 1, "norm_eps": 1e-6,
    }))
}

fn shapes(config: &XvlmConfig) -> BTreeMap<String, Vec<usize>> {
    Blueprint::of(|vb| Xvlm::new(config, vb)).unwrap().shapes()
}

/// FLOPs of the products with weights of a part, where `rows` tells how many rows a weight is applied to.
fn of_weights(config: &XvlmConfig, part: Part, rows: impl Fn(&str) -> usize) -> u64 {
    let is_matrix = |name: &str, shape: &[usize]| {
        shape.len() >= 2 && name.ends_with(".weight") && !name.contains("embeddings") && !name.contains("pos_embed")
    };
    let products = shapes(config)
        .into_iter()
        .filter(|(name, shape)| is_matrix(name, shape) && Part::of_parameter(config, name) == part);
    products.map(|(name, shape)| (2 * shape.iter().product::<usize>() * rows(&name)) as u64).sum()
}

#[test]
fn swin_is_its_weights_and_windows() {
    let config = swin();
    let rows = |name: &str| match name {
        _ if name.contains("downsample") => 3 * 16,
        _ if name.contains("layers.1.") => 3 * 16,
        _ => 3 * 64,
    };
    // Windows of 16 tokens: two products of each token with each of its window, in two blocks of 64 tokens and one of 16.
    let attention = 3 * (2 * 64 * 16 * 8 + 16 * 16 * 16) * 2 * 2;
    assert_eq!(config.costs(&LOAD)[0].flops, of_weights(&config, Part::Vision, rows) + attention);
}

#[test]
fn vit_has_rows_for_regions_in_its_last_blocks() {
    for family in ["clip", "deit"] {
        let config = vit(family);
        let rows = |name: &str| match name {
            _ if name.contains("patch_embed") => 3 * 16,
            _ if name.contains("s.3.") => (3 + 5) * 17,
            _ => 3 * 17,
        };
        let attention = (3 * 3 + 8) * 17 * 17 * 16 * 2 * 2;
        assert_eq!(config.costs(&LOAD)[0].flops, of_weights(&config, Part::Vision, rows) + attention, "{family}");
    }
}

#[test]
fn text_and_fusion_are_their_weights_and_attention() {
    let config = swin();
    let [_, text, fusion, _] = config.costs(&LOAD);
    let attention = |rows: u64, seen: u64| 2 * 2 * rows * seen * 16;
    assert_eq!(text.flops, of_weights(&config, Part::Text, |_| 10 * 7) + attention(10 * 7, 7));
    let is_read = |name: &str| name.contains("crossattention.self.key") || name.contains("crossattention.self.value");
    let weights = of_weights(&config, Part::Fusion, |name| if is_read(name) { 8 * 17 } else { 20 * 7 });
    assert_eq!(fusion.flops, weights + 2 * (attention(20 * 7, 7) + attention(20 * 7, 17)));
}

#[test]
fn heads_are_their_weights() {
    let config = swin();
    let rows = |name: &str| match name {
        _ if name.contains("_proj.") => 5,
        _ if name.starts_with("itm_head.") => 15,
        _ if name.starts_with("bbox_head.") => 5,
        _ => 6,
    };
    // What is like each of the others, and words, whose weights are the embeddings.
    let more = 2 * 5 * 5 * 12 + 2 * 6 * 16 * 40;
    assert_eq!(config.costs(&LOAD)[3].flops, of_weights(&config, Part::Heads, rows) + more);
}

#[test]
fn every_parameter_has_its_part() {
    let config = swin();
    for (name, part) in [
        ("vision_encoder.layers.0.blocks.1.attn.qkv.weight", Part::Vision),
        ("text_encoder.bert.embeddings.word_embeddings.weight", Part::Text),
        ("text_encoder.bert.encoder.layer.0.output.dense.weight", Part::Text),
        ("text_encoder.bert.encoder.layer.1.output.dense.weight", Part::Fusion),
        ("text_encoder.cls.predictions.bias", Part::Heads),
        ("vision_proj.weight", Part::Heads),
        ("temp", Part::Heads),
    ] {
        assert!(shapes(&config).contains_key(name), "{name}");
        assert_eq!(Part::of_parameter(&config, name), part, "{name}");
    }
}

#[test]
fn the_base_model_costs_what_is_known() {
    // Swin-B has 15.4 GFLOPs at 224 pixels (Liu et al. 2021, table 1, which counts a multiplication and an addition as one).
    let one = Load { images: 1, ..Load::default() };
    let swin = XvlmConfig::base(224).costs(&one)[0].flops as f64 / 2e9;
    assert!((swin - 15.4).abs() < 0.3, "{swin}");
    // ViT-B/16 has 17.6 (Touvron et al. 2021).
    let vit = XvlmConfig::preset("deit-base-224").unwrap().costs(&one)[0].flops as f64 / 2e9;
    assert!((vit - 17.6).abs() < 0.3, "{vit}");
}
