//! Configuration files in the form of the original repository are read as they are.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm_data::Padding;
use xvlm_encoders::{Activation, SwinConfig, Task, TextModel, VisionConfig, VitConfig, XvlmConfig};
use xvlm_tasks::finetune::{FinetuneConfig, FinetuneKind};
use xvlm_tasks::{PretrainConfig, official};
use xvlm_train::{Precision, Warmup};

const SWIN: &str = r#"{
  "ckpt": "data/swin.pth", "vision_width": 1024, "image_res": 384, "window_size": 12, "embed_dim": 128,
  "depths": [ 2, 2, 18, 2 ], "num_heads": [ 4, 8, 16, 32 ]
}"#;
const CLIP: &str = r#"{
  "ckpt": "data/clip.bin", "vision_width": 768, "patch_size": 16, "hidden_act": "quick_gelu", "num_attention_heads": 12,
  "attention_dropout": 0.0, "intermediate_size": 3072, "num_hidden_layers": 12, "local_attn_depth": 4
}"#;
const ROBERTA: &str = r#"{
  "architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "eos_token_id": 2,
  "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
  "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "model_type": "roberta",
  "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "type_vocab_size": 1, "vocab_size": 50265,
  "fusion_layer": 6, "encoder_width": 1024
}"#;
const BERT: &str = r#"{
  "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
  "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
  "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
  "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30522, "fusion_layer": 6,
  "encoder_width": 1024
}"#;
const PRETRAIN: &str = "
train_file: [
    'shards/captions',  # one folder
]
train_dataset_size: 1000
images: {image_key: 'binary', is_image_rpath: False, caption_key: 'caption', tokenized: False, batch_size: 64, num_workers: 4}
train_file_regions: ['shards/objects']
regions: {image_key: 'path', is_image_rpath: True, careful_hflip: False, iter_perc: 0.25, batch_size: 96, max_images: 30, max_regions: 7, min_perc_in_image: 0.4}
use_clip_vit: False
use_swin: True
vision_config: 'configs/swin.json'
image_res: 384
patch_size: 32
use_roberta: False
text_config: 'configs/bert.json'
text_encoder: 'data/bert'
embed_dim: 256
temp: 0.07
max_words: 30
max_tokens: 33
mask_prob: 0.2
max_masks: 6
mask_whole_word: True
skipgram_prb: 0.3
skipgram_size: 2
optimizer: {opt: adamW, lr: 1e-4, weight_decay: 0.02, lr_mult: 3}
schedular: {sched: linear, lr: 1e-4, epochs: 3, num_warmup_steps: 0.1}
accelerator: {SYNCBN: false, FP16_OPT_LEVEL: O1, RNG_SEED: 7, GRAD_ACCUMULATE_STEPS: 1, CLIP_GRAD_NORM: 2.0}
";

/// A folder as the original's repository is: `configs/` with a YAML file and those it names.
fn repository(yaml: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    let configs = folder.path().join("configs");
    std::fs::create_dir(&configs).unwrap();
    for (name, text) in [("swin", SWIN), ("clip", CLIP), ("bert", BERT), ("roberta", ROBERTA)] {
        std::fs::write(configs.join(name).with_extension("json"), text).unwrap();
    }
    std::fs::write(configs.join("run.yaml"), yaml).unwrap();
    folder
}

fn model(yaml: &str, task: Task) -> Result<XvlmConfig, String> {
    let folder = repository(yaml);
    let config = official::model_config(&folder.path().join("configs/run.yaml"), task);
    config.map(|config| config.model).map_err(|error| error.to_string())
}

const SWIN_384: &str = "
use_clip_vit: False
use_swin: True
vision_config: configs/swin.json
image_res: 384
patch_size: 32
use_roberta: False
text_config: configs/bert.json
";

#[test]
fn the_base_models_are_the_presets() {
    let swin = model(SWIN_384, Task::Vqa).unwrap();
    assert_eq!(swin, XvlmConfig { task: Task::Vqa, ..XvlmConfig::preset("base-384").unwrap() });
    let folder = repository(&format!("{SWIN_384}max_length: 20\nmin_length: 5\nnum_beams: 2\nprompt: 'a picture of '"));
    let captions = official::model_config(&folder.path().join("configs/run.yaml"), Task::Captioning).unwrap();
    // [CLS] and the three words of the prompt count in the original.
    let search = captions.search;
    assert_eq!((search.beams, search.min_tokens, search.max_tokens), (2, 1, 16));
    let clip = "use_clip_vit: true\nvision_config: configs/clip.json\nimage_res: 224\npatch_size: 16\n\
                use_roberta: true\ntext_config: configs/roberta.json";
    let clip = model(clip, Task::Pretrain).unwrap();
    assert_eq!(clip.vision_config, VisionConfig::Vit(VitConfig::clip_base(224)));
    assert_eq!(clip.text_config.model_type, TextModel::Roberta);
    assert_eq!(clip.text_config, XvlmConfig::preset("base-roberta-224").unwrap().text_config);
    let deit = "use_swin: false\nimage_res: 224\npatch_size: 16\ntext_config: configs/bert.json";
    assert_eq!(model(deit, Task::Pretrain).unwrap(), XvlmConfig::preset("deit-base-224").unwrap());
}

#[test]
fn every_preset_is_valid_and_moves_to_another_resolution() {
    for name in XvlmConfig::PRESETS {
        let preset = XvlmConfig::preset(name).unwrap();
        preset.validate().unwrap();
        preset.at_resolution(384).unwrap();
    }
    assert!(XvlmConfig::preset("base-225").is_none());
    assert_eq!(XvlmConfig::preset("clip-vit-base"), XvlmConfig::preset("clip-vit-base-224"));
    let VisionConfig::Swin(larger) = XvlmConfig::base(224).at_resolution(480).unwrap().vision_config else { panic!() };
    assert_eq!(larger, SwinConfig::base(480));
    let error = XvlmConfig::base(224).at_resolution(230).unwrap_err().to_string();
    assert!(error.contains("windows of 7 tokens at 224"), "{error}");
}

#[test]
fn a_pre_training_run_is_read_whole() {
    let folder = repository(PRETRAIN);
    let overrides = ["train.log_every=5".to_owned()];
    let config = PretrainConfig::open(&folder.path().join("configs/run.yaml"), &overrides).unwrap();
    let [captions, regions] = [&config.train_file, &config.train_file_regions].map(|sources| &sources[0]);
    assert_eq!(
        (captions.files.as_slice(), regions.files.as_slice()),
        (&["shards/captions".to_owned()][..], &["shards/objects".to_owned()][..])
    );
    assert_eq!(captions.keys.image_key.as_deref(), Some("binary"));
    assert_eq!((captions.keys.caption_key.as_deref(), captions.image_root.as_deref()), (Some("caption"), None));
    assert_eq!((regions.keys.is_image_rpath, regions.image_root.as_deref()), (Some(true), Some(Path::new("."))));
    assert!(!config.data.careful_hflip);
    assert_eq!(config.tokenizer.as_deref(), Some(Path::new("data/bert/vocab.txt")));
    assert_eq!(config.regions.iter_perc, 0.25);
    let data = &config.data;
    assert_eq!((data.batch_size, data.max_regions, data.max_images, data.regions_per_image), (64, 96, 30, 7));
    assert_eq!((data.padding, data.tokenized), (Padding::Repeats, false));
    assert_eq!((data.max_words, data.max_tokens, data.seed), (30, 33, 7));
    assert_eq!((data.masking.mask_prob, data.masking.max_masks, data.masking.skipgram_size), (0.2, 6, 2));
    assert_eq!((config.train.epochs, config.train_dataset_size), (Some(3), Some(1000)));
    assert_eq!((config.train.precision, config.loader.workers), (Precision::F16, 4));
    assert_eq!((config.train.optimizer.lr, config.train.optimizer.lr_mult), (1e-4, 3.0));
    assert_eq!(config.train.schedule.warmup, Warmup::Fraction(0.1));
    assert_eq!((config.train.clip, config.train.log_every), (Some(2.0), 5));
    assert_eq!(config.model, XvlmConfig::base(384));
}

#[test]
fn tokens_and_the_vocabulary_of_roberta_are_understood() {
    let open = |text: &str| {
        let folder = repository(text);
        PretrainConfig::open(&folder.path().join("configs/run.yaml"), &[]).map_err(|error| error.to_string())
    };
    let both =
        PRETRAIN.replace("tokenized: False, ", "tokenized: True, ").replace("iter_perc", "tokenized: True, iter_perc");
    let of = |text: &str| (open(text).unwrap().data.tokenized, open(text).unwrap().data.regions_tokenized);
    assert_eq!(of(&both), (true, None));
    assert_eq!(of(&PRETRAIN.replace("tokenized: False, ", "tokenized: True, ")), (true, Some(false)));
    let clip = "use_clip_vit: True\nuse_swin: False";
    let roberta = PRETRAIN
        .replace("use_clip_vit: False\nuse_swin: True", clip)
        .replace("swin.json", "clip.json")
        .replace("patch_size: 32", "patch_size: 16")
        .replace("use_roberta: False", "use_roberta: True")
        .replace("bert.json", "roberta.json");
    let tokenizer = |text: &str| open(text).unwrap().tokenizer.unwrap();
    assert_eq!(tokenizer(&roberta.replace("data/bert'", "data/roberta'")), Path::new("data/roberta/vocab.json"));
    assert_eq!(
        tokenizer(&roberta.replace("text_encoder: 'data/bert'\n", "")),
        Path::new("data/roberta-base/vocab.json")
    );
}

#[test]
fn errors_name_file_field_and_what_was_found() {
    let wrong = |from: &str, to: &str| model(&SWIN_384.replace(from, to), Task::Pretrain).unwrap_err();
    let error = wrong("image_res: 384", "image_res: 224");
    assert!(error.contains("swin.json: image_res: expected 224, found 384"), "{error}");
    let error = wrong("patch_size: 32", "patch_size: 16");
    assert!(error.contains("run.yaml: patch_size: expected 32, found 16"), "{error}");
    let error = wrong("configs/swin.json", "configs/none.json");
    assert!(error.contains("vision_config: expected a file that is there, found configs/none.json"), "{error}");
    let error = wrong("use_roberta: False", "use_roberta: True");
    assert!(error.contains("use_roberta: expected false"), "{error}");
    let error = wrong("image_res: 384\n", "");
    assert!(error.contains("image_res: expected a whole number, found nothing"), "{error}");
    let error = wrong("use_swin: True", "use_swin: yes please");
    assert!(error.contains(r#"use_swin: expected true or false, found "yes please""#), "{error}");
    let error = wrong("image_res: 384", "image_ress: 384");
    assert!(error.contains("unknown field `image_ress`; did you mean `image_res`?"), "{error}");
    let layers = model(&format!("{SWIN_384}num_dec_layers: 4"), Task::Vqa).unwrap_err();
    assert!(layers.contains("num_dec_layers: expected 6, found 4"), "{layers}");
    for (from, to) in [
        ("[ 2, 2, 18, 2 ]", "[4611686018427387904, 2, 18, 2]"),
        (r#""embed_dim": 128"#, r#""embed_dim": 9223372036854775807"#),
        (r#""window_size": 12"#, r#""window_size": 0"#),
    ] {
        let folder = repository(SWIN_384);
        std::fs::write(folder.path().join("configs/swin.json"), SWIN.replace(from, to)).unwrap();
        let path = folder.path().join("configs/run.yaml");
        let error = official::model_config(&path, Task::Pretrain).unwrap_err().to_string();
        assert!(error.contains("swin.json") && error.contains("vision_config."), "{error}");
    }
    for (field, value) in [("num_hidden_layers", 1u64 << 31), ("hidden_size", 1 << 63), ("vocab_size", 1 << 40)] {
        let folder = repository(SWIN_384);
        let mut bert: Value = serde_json::from_str(BERT).unwrap();
        bert[field] = json!(value);
        std::fs::write(folder.path().join("configs/bert.json"), bert.to_string()).unwrap();
        let path = folder.path().join("configs/run.yaml");
        let error = official::model_config(&path, Task::Pretrain).unwrap_err().to_string();
        assert!(error.contains(&format!("text_config.{field}: expected ")), "{error}");
    }
    let error = model("- a list", Task::Pretrain).unwrap_err();
    assert!(error.contains("expected a mapping"), "{error}");
}

#[test]
fn encoders_alone() {
    let path = Path::new("case.json");
    let read = |json: Value| official::vision_config(&json, path).unwrap();
    let deit = json!({"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2,
                      "norm_eps": 1e-6, "local_attn_depth": 2});
    let VisionConfig::Vit(deit) = read(deit) else { panic!("expected a ViT") };
    assert_eq!((deit.intermediate_size, deit.grid(), deit.hidden_act), (128, 4, Activation::Gelu));
    assert_eq!(read(serde_json::from_str(SWIN).unwrap()), VisionConfig::Swin(SwinConfig::base(384)));
}

/// Files that say something, with bytes changed, taken out and put in.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let edit = (any::<prop::sample::Index>(), any::<u8>(), 0..4u8);
    let vqa = FinetuneConfig::preset_text("vqa").unwrap();
    (prop::sample::select(vec![PRETRAIN, SWIN_384, SWIN, BERT, vqa]), prop::collection::vec(edit, 1..8)).prop_map(
        |(text, edits)| {
            let mut bytes = text.as_bytes().to_vec();
            for (place, byte, kind) in edits {
                let at = place.index(bytes.len().max(1));
                match kind {
                    0 if at < bytes.len() => bytes[at] = byte,
                    1 => bytes.insert(at.min(bytes.len()), byte),
                    2 if at < bytes.len() => drop(bytes.remove(at)),
                    _ => bytes.truncate(at),
                }
            }
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A damaged configuration is read or refused, and never takes the program down.
    #[test]
    fn damaged_configurations_are_no_accident(bytes in mutated()) {
        let folder = repository("");
        let path = folder.path().join("configs/run.yaml");
        std::fs::write(&path, bytes).unwrap();
        let _ = official::model_config(&path, Task::Pretrain);
        let _ = PretrainConfig::open(&path, &[]);
        let _ = FinetuneConfig::open(&path, FinetuneKind::Vqa, &[]);
        let _ = FinetuneConfig::open(&path, FinetuneKind::CaptioningPretrain, &[]);
    }
}
