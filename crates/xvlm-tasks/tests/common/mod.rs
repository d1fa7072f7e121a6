//! What several test files have in common.

use serde_json::{Value, json};

/// Sizes of a tiny model: Swin with two stages over pictures of 32 pixels, and a text layer with cross attention over one without.
/// With a vocabulary of 0, its size is that of the tokenizer.
pub(crate) fn tiny_model(vocab_size: usize) -> Value {
    json!({
        "vision_config": {
            "kind": "swin",
            "image_res": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4,
        },
        "text_config": {
            "vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "fusion_layer": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 48,
        },
        "embed_dim": 16,
    })
}
