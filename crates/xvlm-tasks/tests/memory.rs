//! Converting holds a few tensors, not a model.

use candle_core::Device;
use peak_alloc::PeakAlloc;
use serde_json::json;
use xvlm_encoders::XvlmConfig;
use xvlm_tasks::ModelConfig;
use xvlm_tasks::convert::{Goal, convert, export, layout};
use xvlm_weights::{Checkpoint, LoadRules, Origin, StoredType};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

#[test]
fn conversion_streams() {
    let config: XvlmConfig = serde_json::from_value(json!({
        "vision_config": {
            "kind": "vit", "family": "deit", "image_res": 64, "patch_size": 16, "hidden_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 64, "local_attn_depth": 1, "norm_eps": 1e-6,
        },
        "text_config": {
            "vocab_size": 100, "hidden_size": 256, "num_hidden_layers": 8, "fusion_layer": 4, "num_attention_heads": 4,
            "intermediate_size": 1024, "max_position_embeddings": 48,
        },
        "embed_dim": 64,
    }))
    .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("model.safetensors");
    let (layout, blueprint) = layout(&config, false).unwrap();
    let tensors: std::collections::HashMap<_, _> =
        layout.parameters.keys().map(|name| (name.clone(), blueprint.draw(name, 1).unwrap())).collect();
    candle_core::safetensors::save(&tensors, &checkpoint).unwrap();
    let bytes = tensors.values().map(|tensor| 4 * tensor.elem_count()).sum::<usize>();
    drop(tensors);

    let goal = Goal {
        config: ModelConfig::of(config),
        every_other_layer: false,
        rules: LoadRules::default(),
        stored: StoredType::F32,
        seed: 1,
    };
    let (out, back) = (folder.path().join("out"), folder.path().join("back.th"));
    let peak_of = |work: &dyn Fn()| {
        MEMORY.reset_peak_usage();
        let before = MEMORY.current_usage();
        work();
        MEMORY.peak_usage() - before
    };
    let converting = peak_of(&|| {
        let sources = [(Origin::Xvlm, Checkpoint::open(&checkpoint).unwrap())];
        convert(&sources, &goal, None, &out, &mut |_, _| ()).unwrap();
    });
    let exporting = peak_of(&|| {
        export(&out, &back, StoredType::F32).unwrap();
    });
    assert!(bytes > 20 << 20, "{bytes}");
    for (what, peak) in [("converting", converting), ("exporting", exporting)] {
        assert!(peak < bytes / 2, "{what} a checkpoint of {bytes} bytes held {peak}");
    }
    assert!(Checkpoint::open(&back).unwrap().read("temp").unwrap().device().same_device(&Device::Cpu));
}
