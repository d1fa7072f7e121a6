//! Each preset says what the configuration file of the original says that it stands for.

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::Value;
use tempfile::TempDir;
use xvlm_encoders::{Parameters, Xvlm};
use xvlm_tasks::finetune::{Data, FinetuneConfig, FinetuneKind, FinetuneTask};
use xvlm_tasks::presets::{AnyConfig, Preset, Purpose};
use xvlm_tasks::{PretrainConfig, official};
use xvlm_train::{Precision, Warmup};

/// What every file has, at a resolution.
fn encoders(image_res: usize) -> String {
    format!(
        "vision_config: configs/config_swinB_{image_res}.json
use_clip_vit: False
use_swin: True
image_res: {image_res}
patch_size: 32
use_roberta: False
text_config: configs/config_bert.json
text_encoder: data/bert-base-uncased
"
    )
}

/// `optimizer` and `schedular`.
fn training(lr: &str, epochs: &str) -> String {
    format!(
        "optimizer: {{opt: adamW, lr: {lr}, weight_decay: 0.01, lr_mult: 2}}
schedular: {{sched: linear, lr: {lr}, num_warmup_steps: 0.1, {epochs}}}
"
    )
}

const ACCELERATOR: &str = "accelerator: {SYNCBN: false, FP16_OPT_LEVEL: O1, FP16_LOSS_SCALE: dynamic, RNG_SEED: 42, \
                           GRAD_ACCUMULATE_STEPS: 1, CLIP_GRAD_NORM: 1.0}\n";
const MASKING: &str = "mask_whole_word: True\nmask_prob: 0.25\nskipgram_prb: 0.2\nskipgram_size: 3\n";

fn pretraining(size: usize, epochs: usize, words: usize, masks: usize, regions: &str) -> String {
    let train =
        training("1e-4", &format!("epochs: {epochs}")).replace("num_warmup_steps: 0.1", "num_warmup_steps: 2500");
    format!(
        "train_file: ['hdfs://path/to/coco', 'hdfs://path/to/vg']
train_dataset_size: {size}
images: {{image_key: binary, is_image_rpath: False, caption_key: caption, tokenized: False, batch_size: 128, num_workers: 4}}
train_file_regions: ['hdfs://path/to/coco_objs']
regions: {{image_key: binary, is_image_rpath: False, caption_key: caption, iter_perc: 0.5, batch_size: 128,
          max_images: 48, max_regions: 5, min_perc_in_image: 0.5, {regions}}}
load_bertL_by_sep: False
calc_image_bbox_loss: False
embed_dim: 256
temp: 0.07
max_words: {words}
max_tokens: {words}
max_masks: {masks}
ckpt_frequent_step: 50000
ckpt_frequent: 5
{}{MASKING}{train}{ACCELERATOR}",
        encoders(224)
    )
}

/// Training on shards of pairs, before a task.
fn pairs() -> String {
    format!(
        "train_file: ['hdfs://path/to/coco']
train_dataset_size: 5114489
images: {{image_key: binary, is_image_rpath: False, caption_key: desc, tokenized: False, batch_size: 128, num_workers: 4}}
load_bertL_by_sep: False
embed_dim: 256
max_words: 40
max_tokens: 40
max_masks: 8
{}{MASKING}{}{ACCELERATOR}",
        encoders(224),
        training("3e-5", "epochs: 2")
    )
}

fn retrieval(files: &str, images: &str, k_test: usize) -> String {
    format!(
        "train_file: ['data/finetune/{files}_train.json']
val_file: 'data/finetune/{files}_val.json'
test_file: 'data/finetune/{files}_test.json'
image_root: '{images}'
batch_size_train: 20
batch_size_test: 12
batch_size_test_text: 64
max_tokens: 40
embed_dim: 256
temp: 0.07
k_test: {k_test}
{}{}",
        encoders(384),
        training("3e-5", "epochs: 10")
    )
}

fn vqa(image_res: usize, start_eval: usize) -> String {
    format!(
        "train_file: ['data/finetune/vqa_train.json', 'data/finetune/vqa_val.json', 'data/finetune/vg_qa.json']
test_file: ['data/finetune/vqa_test.json']
answer_list: 'data/finetune/answer_list.json'
vqa_root: 'images/coco/'
vg_root: 'images/visualgenome/'
num_dec_layers: 6
batch_size_train: 24
batch_size_test: 32
max_tokens: 40
k_test: 128
start_eval: {start_eval}
{}{}",
        encoders(image_res),
        training("5e-5", "epochs: 10")
    )
}

fn refcoco(own: &str, lr: &str, epochs: &str) -> String {
    format!(
        "train_file: ['data/finetune/refcoco+_train.json']
test_file: ['data/finetune/refcoco+_val.json', 'data/finetune/refcoco+_test.json']
refcoco_data: 'data/finetune/'
det_file: 'data/finetune/refcoco+/dets.json'
coco_file: 'data/finetune/refcoco+/cocos.json'
image_root: 'images/coco/'
batch_size: 20
max_tokens: 40
{own}{}{}",
        encoders(384),
        training(lr, epochs)
    )
}

fn captioning(own: &str, epochs: &str) -> String {
    let files = "data/finetune/coco_karpathy/coco_karpathy";
    format!(
        "train_file: ['{files}_train.json']
val_file: '{files}_val.json'
test_file: '{files}_test.json'
image_root: 'images/coco/'
val_gt_file: '{files}_val_gt.json'
test_gt_file: '{files}_test_gt.json'
num_dec_layers: 6
batch_size_test: 32
max_tokens: 40
label_smoothing: 0.1
max_length: 20
min_length: 5
num_beams: 3
prompt: 'a picture of '
{own}{}{}",
        encoders(384),
        training("1e-5", epochs)
    )
}

/// The file of the original that a preset stands for, in its words.
fn original(preset: &str) -> String {
    let vlue = |image_res, own: &str| format!("image_root: images/marvl/\n{own}{}", encoders(image_res));
    let vlue_vqa = |image_res| {
        let own = "test_file: ['data/vlue_released/vqa_vlue_test.json']\nvqa_root: 'images/marvl/'\n\
                   vg_root: 'images/visualgenome/'\nanswer_list: 'data/finetune/answer_list.json'\nnum_dec_layers: 6\n\
                   batch_size_test: 32\nmax_tokens: 40\nk_test: 128\n";
        format!("{own}{}", encoders(image_res))
    };
    match preset {
        "base-4m" => pretraining(5_114_489, 41, 40, 8, "tokenized: False, num_workers: 4"),
        "base-16m" => pretraining(16_219_845, 38, 30, 6, "tokenized: True, num_workers: 2"),
        "retrieval-coco" => retrieval("coco", "images/coco/", 256),
        "retrieval-flickr30k" => retrieval("flickr30k", "images/", 128),
        "vqa" => vqa(384, 7),
        "vqa-480" => vqa(480, 0),
        "nlvr2" => format!(
            "train_file: ['data/finetune/nlvr_train.json']\nval_file: ['data/finetune/nlvr_dev.json']\n\
             test_file: ['data/finetune/nlvr_test.json']\nimage_root: 'images/nlvr2/'\nbatch_size: 10\n{}{}",
            encoders(384),
            training("3e-5", "epochs: 10")
        ),
        "nlvr2-pretrain" | "captioning-pretrain" => pairs(),
        "grounding-weak" => refcoco("block_num: 9\nembed_dim: 256\ntemp: 0.07\n", "2e-5", "epochs: 5"),
        "refcoco-bbox" => refcoco("", "3e-5", "epochs: 10"),
        "refcoco-bbox-pretrain" => format!(
            "train_file_regions: ['hdfs://path/to/coco_objs']
train_dataset_size: 318547
regions: {{image_key: binary, is_image_rpath: False, caption_key: caption, tokenized: False, iter_perc: 1.0, batch_size: 24,
          max_images: 9, max_regions: 5, min_perc_in_image: 0.5, num_workers: 4}}
refcoco_data: 'data/finetune/'
det_file: 'data/finetune/refcoco+/dets.json'
coco_file: 'data/finetune/refcoco+/cocos.json'
image_root: 'images/coco/'
load_bertL_by_sep: False
calc_image_bbox_loss: False
max_words: 40
max_tokens: 40
max_masks: 8
{}{MASKING}{}{ACCELERATOR}",
            encoders(224),
            training("3e-5", "epochs: 2")
        ),
        "captioning-coco" => captioning("batch_size_train: 32\nstart_eval: 0\n", "epochs: 5"),
        "captioning-scst" => captioning(
            "batch_size_train: 8\ncider_cached_tokens: 'data/finetune/coco_karpathy/coco-train-words.p'\n\
             sc_train_sample_n: 5\nsc_baseline_type: 'greedy'\nsc_beam_size: 1\neval_steps: 500\n",
            "num_training_steps: 44275",
        ),
        "vlue-retrieval" => vlue(
            384,
            "test_file: 'data/vlue_released/itr_vlue_test.json'\nbatch_size_test: 64\nbatch_size_test_text: 64\n\
             max_tokens: 40\nembed_dim: 256\ntemp: 0.07\nk_test: 256\n",
        ),
        "vlue-vqa" => vlue_vqa(384),
        "vlue-vqa-480" => vlue_vqa(480),
        "vlue-nlvr2" => vlue(384, "test_file: ['data/vlue_released/nlvr2_vlue_test.json']\nbatch_size: 20\n"),
        "vlue-grounding-weak" => vlue(
            384,
            "test_file: ['data/vlue_released/refcoco+_bbox100_vlue_test.json']\nvlue_test: True\nbatch_size: 20\n\
             block_num: 9\nmax_tokens: 40\nembed_dim: 256\ntemp: 0.07\n",
        ),
        "vlue-bbox" => vlue(
            384,
            "test_file: ['data/vlue_released/refcoco+_vlue_test.json']\nvlue_test: True\nbatch_size: 20\n\
             max_tokens: 40\ncareful_hflip: True\n",
        ),
        other => panic!("no file of the original for {other}"),
    }
}

/// A folder as the original's repository is, with a file in `configs/`.
fn repository(yaml: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    let configs = folder.path().join("configs");
    std::fs::create_dir(&configs).unwrap();
    let bert = r#"{"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2,
        "vocab_size": 30522, "fusion_layer": 6, "encoder_width": 1024}"#;
    std::fs::write(configs.join("config_bert.json"), bert).unwrap();
    for (image_res, window) in [(224, 7), (384, 12), (480, 15)] {
        let swin = format!(
            r#"{{"ckpt": "data/swin.pth", "vision_width": 1024, "image_res": {image_res}, "window_size": {window},
                "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}}"#
        );
        std::fs::write(configs.join(format!("config_swinB_{image_res}.json")), swin).unwrap();
    }
    std::fs::write(configs.join("run.yaml"), yaml).unwrap();
    folder
}

fn open(kind: FinetuneKind, yaml: &str, set: &[&str]) -> Result<FinetuneConfig, String> {
    let folder = repository(yaml);
    let set: Vec<String> = set.iter().map(ToString::to_string).collect();
    let config = FinetuneConfig::open(&folder.path().join("configs/run.yaml"), kind, &set);
    config.map_err(|error| error.to_string())
}

/// Presets that stand for a configuration of the original, or for one that it names.
fn of_the_original() -> impl Iterator<Item = &'static Preset> {
    Preset::ALL.iter().filter(|preset| preset.official.is_some() || preset.name == "nlvr2-pretrain")
}

#[test]
fn every_preset_is_read_and_printed() {
    for preset in Preset::ALL {
        let config = preset.config(&[]).unwrap();
        let text = serde_norway::to_string(&config).unwrap();
        let again = match preset.purpose {
            Purpose::Pretrain => {
                AnyConfig::Pretrain(Box::new(PretrainConfig::from_yaml("printed", &text, &[]).unwrap()))
            }
            Purpose::Finetune(kind) => {
                let config = FinetuneConfig::from_yaml("printed", &text, &[]).unwrap();
                assert_eq!(config.task.kind(), kind, "{}", preset.name);
                AnyConfig::Finetune(Box::new(config))
            }
        };
        assert_eq!(again, config, "{}", preset.name);
        // As JSON too, which is YAML.
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(
            serde_norway::to_value(&again).unwrap(),
            serde_norway::from_str::<serde_norway::Value>(&json).unwrap()
        );
        assert!(preset.text.starts_with("# "), "{}", preset.name);
    }
}

#[test]
fn presets_are_what_the_original_says() {
    let mut compared = 0;
    for preset in of_the_original() {
        let folder = repository(&original(preset.name));
        let path = folder.path().join("configs/run.yaml");
        let value: Value = official::read(&path).unwrap();
        match preset.config(&[]).unwrap() {
            AnyConfig::Pretrain(config) => {
                let mut expected = official::pretrain_config(&value, &path).unwrap();
                // Shards are one's own, and made of texts.
                assert_eq!((expected.train_file.len(), expected.train_file_regions.len()), (2, 1));
                expected.train_file.clear();
                expected.train_file_regions.clear();
                assert_eq!(expected.data.regions_tokenized, (preset.name == "base-16m").then_some(true));
                expected.data.regions_tokenized = None;
                assert_eq!(*config, expected, "{}", preset.name);
            }
            AnyConfig::Finetune(config) => {
                let mut expected = official::finetune_config(&value, &path, config.task.kind()).unwrap();
                match &mut expected.task {
                    FinetuneTask::NlvrPretrain(own) | FinetuneTask::CaptioningPretrain(own) => own.train_file.clear(),
                    FinetuneTask::BboxPretrain(own) => own.train_file_regions.clear(),
                    _ => {}
                }
                assert_eq!(*config, expected, "{}", preset.name);
                assert_eq!(config.train.is_some(), !preset.name.starts_with("vlue"), "{}", preset.name);
            }
        }
        compared += 1;
    }
    assert_eq!(compared, 20);
}

#[test]
fn epochs_become_the_originals_iterations() {
    for (name, ranks, iterations) in
        [("base-4m", 8, 41 * 4995), ("base-4m", 1, 41 * 39_957), ("base-16m", 24, 38 * 5280)]
    {
        let mut config = PretrainConfig::preset(name, &[]).unwrap();
        assert_eq!((config.train.clip, config.train.precision), (Some(1.0), Precision::F16));
        config.fix_length(ranks);
        assert_eq!((config.train.iterations, config.train.epochs), (iterations, None), "{name}");
        assert_eq!(config.train.schedule.warmup, Warmup::Iterations(2500));
    }
    let set = ["train.accumulate=8".to_owned()];
    let mut config = PretrainConfig::preset("base-4m", &set).unwrap();
    config.fix_length(1);
    assert_eq!(config.train.iterations, 41 * 4995);
}

#[test]
fn only_what_is_fresh_learns_faster() {
    for (name, fresh) in [
        ("retrieval-coco", vec![]),
        ("nlvr2", vec!["cls_head.0.bias", "cls_head.0.weight"]),
        ("nlvr2-pretrain", vec!["ta_head.bias", "ta_head.weight"]),
        ("captioning-coco", vec![]),
        ("refcoco-bbox", vec![]),
        ("grounding-weak", vec![]),
        (
            "vqa",
            vec![
                "text_decoder.bert.encoder.layer.0.crossattention.self.key.bias",
                "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight",
                "text_decoder.bert.encoder.layer.0.crossattention.self.value.bias",
                "text_decoder.bert.encoder.layer.0.crossattention.self.value.weight",
            ],
        ),
    ] {
        let set = [
            "model.text_config={vocab_size: 50, hidden_size: 8, num_hidden_layers: 2, fusion_layer: 1, \
             num_attention_heads: 2, intermediate_size: 8, max_position_embeddings: 512}",
            "model.vision_config={kind: swin, image_res: 32, patch_size: 8, embed_dim: 8, depths: [1, 1], \
             num_heads: [1, 2], window_size: 2}",
        ];
        let set: Vec<String> = set.iter().map(ToString::to_string).collect();
        // Other sizes, one with the same layers: block_num is what it is.
        let set = if name == "grounding-weak" { [set, vec!["task.block_num=1".to_owned()]].concat() } else { set };
        let config = FinetuneConfig::preset(name, &set).unwrap();
        let parameters = Parameters::zeros();
        Xvlm::new(&config.model, parameters.builder(DType::F32, &Device::Cpu)).unwrap();
        let optimizer = &config.train.unwrap().config.optimizer;
        let mut found: Vec<String> = parameters
            .named()
            .into_iter()
            .map(|(name, _)| name)
            .filter(|name| optimizer.lr_mult_of(name) > 1.0)
            .collect();
        found.sort();
        // Of a head its first layer stands for all.
        found.retain(|name| !name.starts_with("cls_head.") || name.starts_with("cls_head.0"));
        assert_eq!(found, fresh, "{name}");
    }
}

#[test]
fn what_scripts_settle_is_filled_in() {
    let data = |name: &str| FinetuneConfig::preset(name, &[]).unwrap();
    let config = data("grounding-weak");
    let Data::Items(items) = config.task.data() else { panic!("expected items") };
    assert!(items.crop.is_none() && items.augment.is_some() && items.max_words == 30);
    let config = data("captioning-coco");
    let Data::Items(items) = config.task.data() else { panic!("expected items") };
    assert_eq!((items.max_words, items.max_tokens, items.batch_size), (40, 40, 32));
    let config = data("captioning-pretrain");
    let Data::Records(records) = config.task.data() else { panic!("expected records") };
    assert!(records.append_sep);
    let config = data("refcoco-bbox-pretrain");
    let Data::Records(records) = config.task.data() else { panic!("expected records") };
    assert_eq!((records.max_images, records.max_regions, records.regions_per_image), (9, 24, 5));
    let FinetuneTask::CaptioningScst(scst) = data("captioning-scst").task else { panic!("expected SCST") };
    assert_eq!(scst.search.max_tokens, 16);
    let train = data("captioning-scst").train.unwrap();
    assert_eq!((train.iterations, train.epochs, train.clip), (44_275, None, None));
    assert_eq!(train.checkpoint_every, 500);
    assert_eq!(train.precision, Precision::F32);
}

#[test]
fn values_of_the_original_may_be_replaced() {
    let yaml = original("retrieval-coco");
    let config = open(FinetuneKind::Retrieval, &yaml, &["data.batch_size=3", "task.k_test=7"]).unwrap();
    let FinetuneTask::Retrieval(own) = config.task else { panic!("expected retrieval") };
    assert_eq!((own.data.batch_size, own.k_test), (3, 7));
    let kind = FinetuneKind::of_name("itr_coco").unwrap();
    assert_eq!(kind, FinetuneKind::Retrieval);
    let error = FinetuneKind::of_name("retreival").unwrap_err();
    assert_eq!(error, "unknown task `retreival`; did you mean `retrieval`?");
}

#[test]
fn what_the_original_would_mean_otherwise_is_refused() {
    let refused = |kind, name: &str, from: &str, to: &str, expected: &str| {
        let yaml = original(name);
        assert!(yaml.contains(from), "{from}: {yaml}");
        let error = open(kind, &yaml.replace(from, to), &[]).unwrap_err();
        assert!(error.contains("run.yaml") && error.contains(expected), "{error}");
    };
    use FinetuneKind::*;
    refused(Retrieval, "retrieval-coco", "k_test: 256\n", "", "k_test: expected a whole number, found nothing");
    refused(Retrieval, "retrieval-coco", "k_test:", "k_tst:", "unknown field `k_tst`; did you mean `k_test`?");
    refused(Retrieval, "retrieval-coco", "k_test: 256", "k_test: 0", "task.k_test: expected at least 1, found 0");
    refused(Retrieval, "retrieval-coco", "opt: adamW", "opt: sgd", "optimizer.opt: expected adamW, found sgd");
    refused(Vqa, "vqa", "num_dec_layers: 6", "num_dec_layers: 4", "num_dec_layers: expected 6, found 4");
    refused(Vqa, "vqa", "start_eval: 7", "start_eval: 10", "task.start_eval: expected less than train.epochs (10)");
    refused(WeakGrounding, "grounding-weak", "block_num: 9", "block_num: 3", "task.block_num: expected a layer with");
    refused(Bbox, "refcoco-bbox", "refcoco_data: 'data/finetune/'\n", "", "task.refcoco_data: expected a folder");
    refused(BboxPretrain, "refcoco-bbox-pretrain", "iter_perc: 1.0", "iter_perc: 0.5", "regions.iter_perc: expected 1");
    refused(Captioning, "captioning-coco", "label_smoothing: 0.1", "label_smoothing: 1.0", "task.label_smoothing");
    refused(
        Captioning,
        "captioning-coco",
        "min_length: 5",
        "min_length: 50",
        "task.search.min_tokens: expected at most",
    );
    refused(CaptioningScst, "captioning-scst", "'greedy'", "'best'", "sc_baseline_type: expected greedy or sample");
    refused(CaptioningPretrain, "captioning-pretrain", "CLIP_GRAD_NORM", "CLIP_GRAD", "did you mean `CLIP_GRAD_NORM`?");
    refused(CaptioningPretrain, "captioning-pretrain", "O1", "O3", "accelerator.FP16_OPT_LEVEL: expected O0, O1 or O2");
    refused(CaptioningPretrain, "captioning-pretrain", "num_workers", "num_worker", "did you mean `num_workers`?");
    refused(Vqa, "vqa", "lr_mult: 2", "lr_mul: 2", "optimizer.lr_mul: unknown field `lr_mul`; did you mean `lr_mult`?");
    refused(Vqa, "vqa", "num_warmup_steps: 0.1", "num_warmup_steps: 0.1, warmup: 3", "schedular.warmup: unknown field");
}

#[test]
fn a_model_of_no_size_is_refused() {
    let folder = repository(&original("vqa"));
    let bert = folder.path().join("configs/config_bert.json");
    let text = std::fs::read_to_string(&bert).unwrap();
    for (from, to) in [(": 12, \"pad", ": 4294967296, \"pad"), ("fusion_layer\": 6", "fusion_layer\": 60")] {
        std::fs::write(&bert, text.replace(from, to)).unwrap();
        let path = folder.path().join("configs/run.yaml");
        let yaml = original("vqa").replace("num_dec_layers: 6\n", "");
        std::fs::write(&path, yaml).unwrap();
        let error = FinetuneConfig::open(&path, FinetuneKind::Vqa, &[]).unwrap_err().to_string();
        assert!(error.contains("run.yaml: ") && error.contains("text_config."), "{error}");
    }
}

#[test]
fn unknown_and_wrong_values_are_named() {
    let message = |preset: &str, set: &[&str]| {
        let set: Vec<String> = set.iter().map(ToString::to_string).collect();
        FinetuneConfig::preset(preset, &set).unwrap_err().to_string()
    };
    for (preset, set, expected) in [
        ("vqa", "data.batchsize=3", "data.batchsize: unknown field `batchsize`"),
        ("vqa", "data.batchsize=3", "did you mean `batch_size`?"),
        ("vqa", "task.k_tests=3", "task.k_tests: unknown field `k_tests`"),
        ("vqa", "task.k_tests=3", "did you mean `k_test`?"),
        ("vqa", "task.k_test=many", "task.k_test: invalid type: string \"many\""),
        ("vqa", "task.train_file=3", "a file or a list of files"),
        ("vqa", "task.train_file=[]", "task.train_file: expected at least one file, since there is a section train"),
        ("vqa", "task.name=vqq", "task.name: unknown task `vqq`; did you mean `vqa`?"),
        ("vqa", "task.name=null", "task.name: expected the name of a task"),
        ("vqa", "task.data={}", "task.data: unknown field `data`"),
        ("vqa", "trian={}", "did you mean `train`?"),
        ("vqa", "train.epoch=3", "did you mean `epochs`?"),
        ("vqa", "train.epochs=0", "train.epochs: expected at least 1, found 0"),
        ("vqa", "train.iterations=3", "expected epochs or iterations, found both"),
        ("vqa", "train.optimizer.lr=-1", "train.optimizer.lr: expected a positive number, found -1"),
        ("vqa", "model.embed_dim=0", "model.embed_dim"),
        ("vqa", "model.task=nlvr", "model.task: expected vqa, found nlvr"),
        ("vqa", "data.batch_size=0", "data.batch_size: expected at least 1, found 0"),
        ("vqa", "data.max_tokens=600", "data.max_tokens: expected at most 512, found 600"),
        ("vqa", "data.max_images=3", "unknown field `max_images`"),
        ("captioning-coco", "task.prompt=''", "task.prompt: expected at least one word"),
        ("captioning-scst", "task.sc_baseline_type=best", "task.sc_baseline_type: unknown variant `best`"),
        ("captioning-pretrain", "train=null", "train: expected a section, since task.train_file is trained on"),
        ("captioning-pretrain", "task.train_dataset_size=0", "task.train_dataset_size: expected at least 1"),
        ("refcoco-bbox-pretrain", "data.max_images=0", "data.max_images: expected at least 1"),
        ("vlue-bbox", "task.vlue_test=false", "task.refcoco_data: expected a folder, since vlue_test is false"),
    ] {
        let error = message(preset, &[set]);
        assert!(error.contains(expected) && error.contains(preset), "{set}: {error}");
    }
    let both = ["task.sc_baseline_type=sample", "task.sc_train_sample_n=1"];
    assert!(message("captioning-scst", &both).contains("expected at least 2, since sc_baseline_type is sample"));
    assert!(message("base-4m", &[]).contains("expected one for fine-tuning (scenes-retrieval, "));
    let error = PretrainConfig::preset("refcoco-bbox", &[]).unwrap_err().to_string();
    let found = "found refcoco-bbox, which is for fine-tuning (bbox)";
    assert!(error.contains("(scenes-align, scenes, base-4m, base-16m)") && error.ends_with(found), "{error}");
    let error = PretrainConfig::preset("base-4m", &["train_dataset_size=null".to_owned()]).unwrap_err().to_string();
    assert!(
        error.contains("train_dataset_size: expected the number of records that epochs count, found none"),
        "{error}"
    );
}

#[test]
fn a_file_for_another_task_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("mine.yaml");
    std::fs::write(&path, FinetuneConfig::preset_text("vqa").unwrap()).unwrap();
    assert!(FinetuneConfig::open(&path, FinetuneKind::Vqa, &[]).is_ok());
    let error = FinetuneConfig::open(&path, FinetuneKind::Nlvr, &[]).unwrap_err().to_string();
    assert!(error.contains("mine.yaml: task.name: expected nlvr, found vqa"), "{error}");
    let missing = FinetuneConfig::open(Path::new("none.yaml"), FinetuneKind::Nlvr, &[]).unwrap_err().to_string();
    assert!(missing.starts_with("none.yaml: "), "{missing}");
}
