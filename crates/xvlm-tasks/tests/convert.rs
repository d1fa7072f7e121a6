//! Checkpoints become model folders, strictly, and go back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use tempfile::TempDir;
use xvlm_data::{Picture, TextTokenizer};
use xvlm_encoders::{Task, VisionConfig, XvlmConfig};
use xvlm_tasks::captioning::{self, Writing};
use xvlm_tasks::convert::{Goal, convert, export, layout};
use xvlm_tasks::finetune::initial_weights;
use xvlm_tasks::{Model, ModelConfig, Search, fill, grounding, vqa};
use xvlm_weights::{
    Checkpoint, ConversionReport, LoadRules, ModelFiles, ModelFolder, Origin, StoredTensors, StoredType,
};

type Tensors = BTreeMap<String, Tensor>;

fn swin(task: Task) -> XvlmConfig {
    let config = json!({
        "task": task,
        "vision_config": {
            "kind": "swin", "image_res": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2],
            "window_size": 4,
        },
        "text_config": {
            "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 4, "fusion_layer": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 48,
        },
        "embed_dim": 8,
    });
    serde_json::from_value(config).unwrap()
}

fn vit(family: &str, model_type: &str) -> XvlmConfig {
    let mut config = serde_json::to_value(swin(Task::Pretrain)).unwrap();
    config["vision_config"] = json!({
        "kind": "vit", "family": family, "image_res": 32, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 2, "intermediate_size": 24, "local_attn_depth": 2, "norm_eps": 1e-5,
    });
    config["text_config"]["model_type"] = json!(model_type);
    serde_json::from_value(config).unwrap()
}

/// The parameters of a model, each of numbers of its own.
fn parameters(config: &XvlmConfig) -> Tensors {
    let (layout, blueprint) = layout(config, false).unwrap();
    layout.parameters.keys().map(|name| (name.clone(), blueprint.draw(name, 7).unwrap())).collect()
}

/// A checkpoint file of some tensors.
fn checkpoint(folder: &Path, tensors: &Tensors) -> Checkpoint {
    let path = folder.join(format!("{}.safetensors", tensors.len()));
    let tensors: std::collections::HashMap<_, _> = tensors.clone().into_iter().collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    Checkpoint::open(&path).unwrap()
}

fn goal(model: XvlmConfig) -> Goal {
    Goal {
        config: ModelConfig { max_tokens: 20, max_words: 20, ..ModelConfig::of(model) },
        every_other_layer: false,
        rules: LoadRules::default(),
        stored: StoredType::F32,
        seed: 1,
    }
}

fn tokenizer() -> TextTokenizer {
    TextTokenizer::from_pieces("pieces", &["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of"]).unwrap()
}

struct Converted {
    report: ConversionReport,
    tensors: Tensors,
    _folder: TempDir,
    path: PathBuf,
}

fn run(sources: &[(Origin, &Tensors)], goal: &Goal) -> Result<Converted, String> {
    let folder = TempDir::new().unwrap();
    let sources: Vec<_> =
        sources.iter().map(|(origin, tensors)| (*origin, checkpoint(folder.path(), tensors))).collect();
    let path = folder.path().join("model");
    let mut last = (0, 1);
    let done = convert(&sources, goal, Some(&tokenizer()), &path, &mut |done, of| last = (done, of));
    let report = done.map_err(|error| {
        assert!(!path.exists(), "nothing is written if something is wrong");
        error.to_string()
    })?;
    assert_eq!(last.0, last.1);
    let tensors = ModelFolder::open(&path).unwrap().tensors().unwrap();
    Ok(Converted { report, tensors, _folder: folder, path })
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_same(found: &Tensor, expected: &Tensor) {
    assert_eq!(numbers(found), numbers(expected));
}

/// A model folder.
fn model_files(config: &XvlmConfig, tensors: Tensors) -> ModelFiles {
    let config = ModelConfig::of(config.clone()).to_json().unwrap();
    let weights = StoredTensors::of_tensors("folder/model.safetensors", &tensors).unwrap();
    ModelFiles { name: "folder".to_owned(), config, tokenizer: Vec::new().into(), weights }
}

#[test]
fn every_task_is_made_of_a_pre_trained_model() {
    let pretrained = parameters(&swin(Task::Pretrain));
    for task in Task::ALL {
        let Converted { report, tensors, path, _folder } =
            run(&[(Origin::Xvlm, &pretrained)], &goal(swin(task))).unwrap();
        Model::open(&path, &Device::Cpu).unwrap();
        let new = match task {
            Task::Nlvr => 6,
            Task::NlvrPretrain => 2,
            Task::Vqa => 2 * 4,
            _ => 0,
        };
        assert_eq!(report.initialised.len(), new, "{}: {report}", task.name());
        assert_eq!(report.loaded.len() + new, tensors.len(), "{}", task.name());
        let files = model_files(&swin(Task::Pretrain), pretrained.clone());
        let start = initial_weights(&files, &swin(task), 1).unwrap();
        assert_eq!(start.fresh(), report.initialised.iter().map(|because| &because.name).collect::<Vec<_>>());
        assert!(start.tensors.keys().eq(tensors.keys()), "{}", task.name());
        start.tensors.iter().for_each(|(name, tensor)| assert_same(tensor, &tensors[name]));
        let name = "encoder.layer.3.output.dense.weight";
        let source = &pretrained[&format!("text_encoder.bert.{name}")];
        match task {
            Task::Nlvr | Task::NlvrPretrain => {
                assert_same(&tensors["text_encoder.encoder.layer.4.output.dense.weight"], source);
                assert_same(&tensors["text_encoder.encoder.layer.5.output.dense.weight"], source);
            }
            Task::Vqa => assert_same(&tensors["text_decoder.bert.encoder.layer.1.output.dense.weight"], source),
            Task::Captioning => assert_same(&tensors[&format!("text_decoder.bert.{name}")], source),
            Task::Pretrain => assert_same(&tensors[&format!("text_encoder.bert.{name}")], source),
            Task::Retrieval | Task::Grounding => assert_same(&tensors[&format!("text_encoder.{name}")], source),
        }
    }
}

#[test]
fn a_converted_model_does_what_it_is_for() {
    let pretrained = parameters(&swin(Task::Pretrain));
    let picture = Picture::from_rgb(40, 30, (0..40 * 30 * 3).map(|i| (i % 251) as u8).collect()).unwrap();
    for task in [Task::Retrieval, Task::Grounding, Task::Vqa, Task::Captioning, Task::Pretrain] {
        let converted = run(&[(Origin::Xvlm, &pretrained)], &goal(swin(task))).unwrap();
        let model = Model::open(&converted.path, &Device::Cpu).unwrap();
        let images = model.encode(std::slice::from_ref(&picture)).unwrap();
        let texts = [(0, "a picture")];
        let search = Search { min_tokens: 2, max_tokens: 4, ..Search::default() };
        let boxes = grounding::ground(&model, &images, &texts);
        assert_eq!(boxes.is_ok(), matches!(task, Task::Grounding | Task::Pretrain));
        if let Ok(boxes) = boxes {
            assert_eq!(boxes[0].probability.is_some(), task == Task::Pretrain);
        }
        let filled = fill::fill(&model, &images, &[(0, "a ___")], fill::Completing::default());
        assert_eq!(filled.is_ok(), task == Task::Pretrain);
        let matched = model.match_pairs(&images, &texts);
        assert_eq!(matched.is_ok(), matches!(task, Task::Retrieval | Task::Pretrain));
        let captions = captioning::caption(&model, &images, &Writing { search, ..Writing::of(model.config()) });
        assert_eq!(captions.is_ok(), matches!(task, Task::Captioning | Task::Pretrain), "{}", task.name());
        let answers = vqa::answer(&model, &images, &[(0, "a picture of")], search);
        assert_eq!(answers.is_ok(), matches!(task, Task::Vqa | Task::Pretrain), "{}", task.name());
        if let Err(error) = answers {
            let expected = format!("answers: expected a model for pretrain or vqa, found one for {}", task.name());
            assert_eq!(error.to_string(), expected);
        }
    }
}

#[test]
fn a_decoder_of_the_width_of_the_images_starts_from_all_of_its_layers() {
    let narrow = |task| {
        let mut config = swin(task);
        config.text_config.hidden_size = config.vision_config.width();
        config
    };
    let pretrained = parameters(&narrow(Task::Pretrain));
    let converted = run(&[(Origin::Xvlm, &pretrained)], &goal(narrow(Task::Vqa))).unwrap();
    assert_eq!(converted.report.initialised, []);
    let (key, source) = ("crossattention.self.key.weight", "text_encoder.bert.encoder.layer.3");
    assert_same(
        &converted.tensors[&format!("text_decoder.bert.encoder.layer.1.{key}")],
        &pretrained[&format!("{source}.{key}")],
    );
}

#[test]
fn a_fine_tuned_model_is_what_it_was_and_goes_back() {
    for config in [swin(Task::Vqa), swin(Task::Nlvr), vit("clip", "bert")] {
        let tuned = parameters(&config);
        let Converted { report, tensors, path, _folder } =
            run(&[(Origin::Xvlm, &tuned)], &goal(config.clone())).unwrap();
        assert_eq!((report.loaded.len(), report.unused.len()), (tuned.len(), 0));
        assert!(tuned.iter().all(|(name, tensor)| numbers(&tensors[name]) == numbers(tensor)));
        let back = _folder.path().join("back.th");
        let count = export(&path, &back, StoredType::F32).unwrap();
        let again = _folder.path().join("again");
        let sources = [(Origin::Xvlm, Checkpoint::open(&back).unwrap())];
        let has_buffer = sources[0].1.tensors().contains_key("vision_encoder.position_ids");
        assert_eq!(count, tuned.len() + usize::from(has_buffer));
        assert_eq!(has_buffer, matches!(config.vision_config, VisionConfig::Vit(_)), "only CLIP has one");
        convert(&sources, &goal(config), Some(&tokenizer()), &again, &mut |_, _| ()).unwrap();
        let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
        assert!(bytes(&path) == bytes(&again), "the same bytes");
    }
}

#[test]
fn positions_are_resized() {
    let pretrained = parameters(&swin(Task::Pretrain));
    let larger = swin(Task::Pretrain).at_resolution(64).unwrap();
    let report = run(&[(Origin::Xvlm, &pretrained)], &goal(larger)).unwrap().report;
    assert_eq!(report.reshaped.len(), 3);
    assert_eq!((&report.reshaped[0].found[..], &report.reshaped[0].expected[..]), (&[49, 1][..], &[225, 1][..]));

    let pretrained = parameters(&vit("deit", "bert"));
    let larger = vit("deit", "bert").at_resolution(64).unwrap();
    let converted = run(&[(Origin::Xvlm, &pretrained)], &goal(larger)).unwrap();
    assert_eq!(converted.report.reshaped[0].name, "vision_encoder.pos_embed");
    let (before, after) = (&pretrained["vision_encoder.pos_embed"], &converted.tensors["vision_encoder.pos_embed"]);
    assert_eq!(after.dims(), [1, 1 + 64, 12]);
    assert_same(&after.narrow(1, 0, 1).unwrap(), &before.narrow(1, 0, 1).unwrap());
}

#[test]
fn a_model_starts_from_one_for_its_task_or_the_one_before() {
    let start = |from: &XvlmConfig, to: &XvlmConfig| initial_weights(&model_files(from, parameters(from)), to, 1);
    for task in Task::ALL {
        let same = start(&swin(task), &swin(task)).unwrap();
        assert_eq!((same.fresh().len(), same.report.unused.len()), (0, 0), "{}", task.name());
        let expected = parameters(&swin(task));
        same.tensors.iter().for_each(|(name, tensor)| assert_same(tensor, &expected[name]));
    }

    let assigned = start(&swin(Task::NlvrPretrain), &swin(Task::Nlvr)).unwrap();
    assert!(assigned.fresh().len() == 6 && assigned.fresh().iter().all(|name| name.starts_with("cls_head.")));
    let unused: Vec<&str> = assigned.report.unused.iter().map(|because| because.name.as_str()).collect();
    let is_left = |name: &str| ["ta_head.", "vision_proj."].iter().any(|part| name.starts_with(part));
    assert!(!unused.is_empty() && unused.iter().all(|name| is_left(name)), "{unused:?}");
    let (twin, before) = ("text_encoder.encoder.layer.5.output.dense.weight", parameters(&swin(Task::NlvrPretrain)));
    assert_same(&assigned.tensors[twin], &before[twin]);

    for (from, to) in [(Task::Vqa, Task::Nlvr), (Task::Retrieval, Task::Pretrain), (Task::Captioning, Task::Vqa)] {
        let error = start(&swin(from), &swin(to)).unwrap_err().to_string();
        assert!(error.starts_with("weights to start from: expected a model for pretrain"), "{error}");
    }
}

#[test]
fn a_model_starts_at_another_resolution_and_not_with_other_heads() {
    for (from, count) in [(swin(Task::Pretrain), 3), (vit("deit", "bert"), 1), (vit("clip", "roberta"), 1)] {
        let files = model_files(&from, parameters(&from));
        let mut larger = from.at_resolution(64).unwrap();
        larger.task = Task::Retrieval;
        let start = initial_weights(&files, &larger, 1).unwrap();
        assert_eq!((start.report.reshaped.len(), start.fresh().len()), (count, 0));
        let shapes = layout(&larger, false).unwrap().0.parameters;
        assert!(start.tensors.iter().all(|(name, tensor)| tensor.dims() == shapes[name]));
        let converted = run(&[(Origin::Xvlm, &files.tensors().unwrap())], &goal(larger.clone())).unwrap();
        start.tensors.iter().for_each(|(name, tensor)| assert_same(tensor, &converted.tensors[name]));

        larger.text_config.num_attention_heads = 4;
        let error = initial_weights(&files, &larger, 1).unwrap_err().to_string();
        let expected = "configuration: model.text_config.num_attention_heads: expected 2, that of folder, found 4";
        assert_eq!(error, expected);
        let mut wider = larger;
        (wider.text_config.num_attention_heads, wider.text_config.intermediate_size) = (2, 48);
        let error = initial_weights(&files, &wider, 1).unwrap_err().to_string();
        assert!(error.contains("intermediate.dense.weight") && error.contains("folder/model.safetensors"), "{error}");
    }
}

/// The tensors of some part of a model, under the names of another program.
fn renamed(tensors: &Tensors, rename: impl Fn(&str) -> Option<String>) -> Tensors {
    tensors.iter().filter_map(|(name, tensor)| Some((rename(name)?, tensor.clone()))).collect()
}

fn vision(name: &str) -> Option<&str> {
    name.strip_prefix("vision_encoder.")
}

#[test]
fn a_pre_training_run_starts_from_a_vision_and_a_text_encoder() {
    let config = swin(Task::Pretrain);
    let all = parameters(&config);
    let other = |name: &str| (name.to_owned(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    let mut swin = renamed(&all, |name| vision(name).map(str::to_owned));
    swin.extend([other("head.weight"), other("head.bias"), other("layers.0.blocks.1.attn_mask")]);
    // The first BERT of all calls scales and shifts gamma and beta.
    let mut bert = renamed(&all, |name| {
        let name = name.strip_prefix("text_encoder.").filter(|name| !name.contains("crossattention"))?;
        Some(name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
    });
    bert.extend([other("bert.pooler.dense.weight"), other("cls.seq_relationship.bias")]);
    bert.insert("cls.predictions.decoder.weight".to_owned(), bert["bert.embeddings.word_embeddings.weight"].clone());
    let converted = run(&[(Origin::Swin, &swin), (Origin::Bert, &bert)], &goal(config)).unwrap();
    let is_new = |name: &str| {
        name.contains("crossattention")
            || ["itm_", "bbox_", "vision_proj", "text_proj", "temp"].iter().any(|part| name.starts_with(part))
    };
    for (name, tensor) in &all {
        assert_eq!(
            numbers(&converted.tensors[name]) == numbers(tensor),
            !is_new(name) || is_constant(tensor),
            "{name}"
        );
    }
    assert!(converted.report.initialised.iter().all(|because| is_new(&because.name)));
    assert_eq!(converted.report.unused.len(), 6, "{}", converted.report);
    assert!(converted.report.to_string().contains("tensors unused"));
}

/// Whether a parameter starts as the same number everywhere, whatever the seed.
fn is_constant(tensor: &Tensor) -> bool {
    let numbers = numbers(tensor);
    numbers.iter().all(|number| *number == numbers[0]) && (numbers.len() > 1 || numbers[0] == 0.07)
}

#[test]
fn clip_deit_and_roberta_have_names_of_their_own() {
    let config = vit("clip", "roberta");
    let all = parameters(&config);
    let clip = renamed(&all, |name| {
        let name = match vision(name)? {
            "patch_embed.weight" => "embeddings.patch_embedding.weight",
            "pos_embed.weight" => "embeddings.position_embedding.weight",
            "class_embedding" => "embeddings.class_embedding",
            name => name,
        };
        Some(format!("vision_model.{name}"))
    });
    let roberta = renamed(&all, |name| {
        let name = name.strip_prefix("text_encoder.").filter(|name| !name.contains("crossattention"))?;
        Some(name.to_owned())
    });
    assert!(roberta.contains_key("lm_head.dense.weight") && roberta.contains_key("roberta.embeddings.LayerNorm.bias"));
    let converted = run(&[(Origin::ClipVit, &clip), (Origin::Roberta, &roberta)], &goal(config)).unwrap();
    for (name, tensor) in all.iter().filter(|(name, _)| name.starts_with("vision_encoder.") || name.contains("lm_head"))
    {
        assert_same(&converted.tensors[name], tensor);
    }

    let config = vit("deit", "bert");
    let all = parameters(&config);
    let deit = renamed(&all, |name| vision(name).map(str::to_owned));
    let converted = run(&[(Origin::Deit, &deit)], &goal(config)).unwrap();
    assert_same(&converted.tensors["vision_encoder.cls_token"], &all["vision_encoder.cls_token"]);
}

#[test]
fn every_other_layer_of_a_deeper_bert() {
    let config = swin(Task::Pretrain);
    let all = parameters(&config);
    // Six layers: 0 and 1 stay, 3 and 5 become 2 and 3.
    let mut bert = renamed(&all, |name| {
        let name = name.strip_prefix("text_encoder.").filter(|name| !name.contains("crossattention"))?;
        Some(name.to_owned()).filter(|name| !name.contains("layer.2.") && !name.contains("layer.3."))
    });
    for layer in 2..6 {
        let like = renamed(&bert, |name| {
            name.contains("layer.0.").then(|| name.replace("layer.0.", &format!("layer.{layer}.")))
        });
        bert.extend(like.into_iter().map(|(name, tensor)| (name, (tensor + f64::from(layer)).unwrap())));
    }
    let sources = [(Origin::Bert, &bert)];
    let deeper = Goal { every_other_layer: true, ..goal(config.clone()) };
    let tensors = run(&sources, &deeper).unwrap().tensors;
    for (layer, source) in [(2, 3), (3, 5)] {
        let name = |layer: usize| format!("encoder.layer.{layer}.attention.self.key.weight");
        assert_same(&tensors[&format!("text_encoder.bert.{}", name(layer))], &bert[&format!("bert.{}", name(source))]);
    }
    // Without, the first layers are taken, and the others told.
    let report = run(&sources, &goal(config)).unwrap().report;
    assert!(report.unused.iter().all(|because| because.name.contains("layer.4.") || because.name.contains("layer.5.")));
}

#[test]
fn what_is_not_explained_is_an_error() {
    let config = swin(Task::Retrieval);
    let pretrained = parameters(&swin(Task::Pretrain));
    let with = |edit: &dyn Fn(&mut Tensors), rules: LoadRules| {
        let mut tensors = pretrained.clone();
        edit(&mut tensors);
        run(&[(Origin::Xvlm, &tensors)], &Goal { rules, ..goal(config.clone()) })
    };
    let strict = |edit: &dyn Fn(&mut Tensors)| with(edit, LoadRules::default()).map(|_| ()).unwrap_err();
    let bias = "vision_encoder.layers.0.blocks.0.mlp.fc1.bias";
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();

    let error = strict(&|tensors| drop(tensors.remove(bias)));
    assert!(error.contains(bias), "{error}");
    let error = strict(&|tensors| drop(tensors.insert("surprise".to_owned(), zeros(&[2], DType::F32))));
    assert!(error.contains("surprise"), "{error}");
    let error = strict(&|tensors| drop(tensors.insert(bias.to_owned(), zeros(&[33], DType::F32))));
    assert!(error.contains(bias) && error.contains("[33]") && error.contains("[32]"), "{error}");
    let error = strict(&|tensors| drop(tensors.insert(bias.to_owned(), zeros(&[32], DType::I64))));
    assert!(error.contains(bias) && error.contains("I64"), "{error}");
    let error = strict(&|tensors| {
        let mut numbers = vec![0f32; 32];
        numbers[5] = f32::NAN;
        tensors.insert(bias.to_owned(), Tensor::new(numbers, &Device::Cpu).unwrap());
    });
    assert!(error.contains(bias) && error.contains("number 5"), "{error}");

    let word = "text_encoder.cls.predictions.decoder.weight";
    let words = pretrained["text_encoder.bert.embeddings.word_embeddings.weight"].clone();
    let error = strict(&|tensors| drop(tensors.insert(word.to_owned(), (&words + 1.0).unwrap())));
    assert!(error.contains(word) && error.contains("which it is tied to"), "{error}");
    let tied = with(&|tensors| drop(tensors.insert(word.to_owned(), words.clone())), LoadRules::default()).unwrap();
    assert!(tied.report.to_string().contains("is a copy of another tensor"), "{}", tied.report);
    let table = "vision_encoder.layers.0.blocks.0.attn.relative_position_bias_table";
    let error = strict(&|tensors| drop(tensors.insert(table.to_owned(), zeros(&[50, 1], DType::F32))));
    assert!(error.contains(table) && error.contains("[50, 1]"), "{error}");
    let mut large = pretrained.clone();
    large.insert(bias.to_owned(), (zeros(&[32], DType::F32) + 1e6).unwrap());
    for (stored, fits) in [(StoredType::F16, false), (StoredType::Bf16, true)] {
        let converted = run(&[(Origin::Xvlm, &large)], &Goal { stored, ..goal(config.clone()) }).map(|_| ());
        assert_eq!(converted.is_ok(), fits);
        assert!(fits || converted.unwrap_err().contains("expected numbers up to 65504 for F16"));
    }

    let rules = LoadRules { allow_missing: vec!["vision_encoder.*.bias".to_owned()], ..LoadRules::default() };
    let converted = with(&|tensors| drop(tensors.remove(bias)), rules).unwrap();
    assert_eq!(converted.report.initialised.len(), 1);
    let rules = LoadRules { allow_unexpected: vec!["surprise".to_owned()], ..LoadRules::default() };
    with(&|tensors| drop(tensors.insert("surprise".to_owned(), zeros(&[2], DType::F32))), rules).unwrap();

    let small = Goal { config: ModelConfig { max_tokens: 50, ..goal(config.clone()).config }, ..goal(config) };
    let error = run(&[(Origin::Xvlm, &pretrained)], &small).map(|_| ()).unwrap_err();
    assert!(error.contains("max_position_embeddings"), "{error}");
}
