//! Every family of encoders and every task: builds, runs, and gives every parameter a gradient.

use candle_core::{DType, Device, Result, Tensor, Var};
use serde_json::{Value, json};
use xvlm_encoders::{Attention, Blueprint, Concepts, Parameters, Pass, Regions, Task, Xvlm, XvlmConfig};
use xvlm_kernels::PackedWeights;

const SIDE: usize = 32;

fn vision(family: &str) -> Value {
    match family {
        "swin" => json!({"kind": "swin", "image_res": SIDE, "patch_size": 4, "embed_dim": 8, "depths": [2, 2],
            "num_heads": [1, 2], "window_size": 4}),
        family => json!({"kind": "vit", "family": family, "image_res": SIDE, "patch_size": 8, "hidden_size": 16,
            "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "local_attn_depth": 2,
            "norm_eps": 1e-5, "hidden_act": if family == "clip" { "quick_gelu" } else { "gelu" }}),
    }
}

fn build(family: &str, text: &str, task: Task) -> (Xvlm, Parameters) {
    build_in(DType::F32, family, text, task)
}

fn build_in(dtype: DType, family: &str, text: &str, task: Task) -> (Xvlm, Parameters) {
    let config: XvlmConfig = serde_json::from_value(json!({
        "task": task,
        "vision_config": vision(family),
        "text_config": {
            "model_type": text, "pad_token_id": if text == "roberta" { 1 } else { 0 }, "vocab_size": 40, "hidden_size": 16,
            "num_hidden_layers": 4, "fusion_layer": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "max_position_embeddings": 12,
        },
        "embed_dim": 8,
    }))
    .unwrap();
    let parameters = Parameters::new(1);
    let model = Xvlm::new(&config, parameters.builder(dtype, &Device::Cpu)).unwrap();
    let shapes = Blueprint::of(|vb| Xvlm::new(&config, vb)).unwrap().shapes();
    let named: Vec<_> = parameters.named().into_iter().map(|(name, var)| (name, var.dims().to_vec())).collect();
    assert_eq!(shapes.into_iter().collect::<Vec<_>>(), named, "a blueprint is of the same model");
    (model, parameters)
}

fn pixels(images: usize) -> Tensor {
    let values = (0..images * 3 * SIDE * SIDE).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 300.0).collect();
    Tensor::from_vec(values, (images, 3, SIDE, SIDE), &Device::Cpu).unwrap()
}

fn close(a: &Tensor, b: &Tensor) -> bool {
    let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    a.dims() == b.dims() && numbers(a).iter().zip(numbers(b)).all(|(a, b)| (a - b).abs() < 1e-5)
}

/// Everything a model of a task computes from two images and two texts, as one number that depends on all of it.
fn everything(model: &Xvlm, task: Task, pass: &Pass) -> Result<Tensor> {
    let ids = Tensor::new(&[[2u32, 7, 9, 5], [2, 11, 30, 8]], &Device::Cpu)?;
    let mask = Tensor::ones((2, 4), DType::F32, &Device::Cpu)?;
    let pixels = pixels(2);
    let images = model.encode_image(&pixels, pass)?;
    let tokens = images.dim(1)?;
    let seen = Tensor::ones((2, tokens), DType::F32, &Device::Cpu)?;
    let looks = Concepts { tokens: &images, index: &[0, 1], mask: &seen };
    let mut results = vec![images.clone()];
    if task == Task::Captioning {
        results.push(model.next_token_logits(&model.decode(&ids, &mask, &looks, pass)?)?);
    } else {
        let text = model.encode_text(&ids, &mask, Attention::Full, pass)?;
        let pair = [looks.clone(), Concepts { index: &[1, 0], ..looks.clone() }];
        let fused = match task {
            Task::Nlvr | Task::NlvrPretrain => model.fuse_pair(&text, &mask, &pair, pass)?,
            _ => model.fuse(&text, &mask, &looks, Attention::Full, pass)?,
        };
        match task {
            Task::Pretrain => {
                let (regions, _) = model.encode_regions(&pixels, Regions { index: &[1, 0], mask: &seen }, pass)?;
                results.extend([regions, model.predict_box(&fused)?, model.mlm_logits(&fused)?]);
            }
            Task::Grounding => results.push(model.predict_box(&fused)?),
            Task::Nlvr => results.push(model.statement_logits(&fused)?),
            Task::NlvrPretrain => results.extend([model.assignment_logits(&fused)?, model.project_image(&images)?]),
            Task::Vqa => {
                let states = Concepts { tokens: &fused, index: &[0, 1], mask: &mask };
                results.push(model.next_token_logits(&model.decode(&ids, &mask, &states, pass)?)?);
            }
            Task::Retrieval | Task::Captioning => {}
        }
        if matches!(task, Task::Pretrain | Task::Retrieval) {
            let similarities = model.project_image(&images)?.matmul(&model.project_text(&text)?.t()?)?;
            results.extend([similarities.broadcast_div(model.temperature()?)?, model.match_logits(&fused)?]);
        }
    }
    let squares =
        results.iter().map(|result| result.to_dtype(DType::F32)?.sqr()?.sum_all()).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&squares, 0)?.sum_all()
}

#[test]
fn every_parameter_of_every_task_gets_a_gradient() -> Result<()> {
    for family in ["swin", "clip", "deit"] {
        for text in ["bert", "roberta"] {
            for task in Task::ALL {
                let (model, parameters) = build(family, text, task);
                let gradients = everything(&model, task, &Pass::inference())?.backward()?;
                for (name, var) in parameters.named() {
                    let gradient = |var: &Var| gradients.get(var).map(|g| g.sqr()?.sum_all()?.to_scalar::<f32>());
                    let length = gradient(&var).unwrap_or(Ok(0.0))?;
                    // Softmax does not see what all scores have in common, so a key's bias gets none but by rounding.
                    let is_key_bias = name.ends_with("key.bias") || name.ends_with("k_proj.bias");
                    assert!(length > 0.0 || is_key_bias, "{family}, {text}, {}: {name}", task.name());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_task_computes_in_half_types() -> Result<()> {
    for (dtype, noise) in [(DType::BF16, 0.02), (DType::F16, 0.002)] {
        for (family, text) in ["swin", "clip", "deit"].into_iter().flat_map(|f| ["bert", "roberta"].map(|t| (f, t))) {
            for task in Task::ALL {
                let (model, parameters) = build_in(dtype, family, text, task);
                let total = everything(&model, task, &Pass::inference())?;
                let (wide, _) = build(family, text, task);
                let expected = everything(&wide, task, &Pass::inference())?.to_scalar::<f32>()?;
                let (found, of) = (total.to_scalar::<f32>()?, format!("{dtype:?}, {family}, {text}, {}", task.name()));
                assert!((found - expected).abs() < noise * expected, "{of}: {found} for {expected}");
                let gradients = total.backward()?;
                for (name, var) in parameters.named() {
                    assert_eq!(var.dtype(), if var.rank() == 0 { DType::F32 } else { dtype }, "{of}: {name}");
                    let length =
                        gradients.get(&var).map(|g| g.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>());
                    let length = length.expect(&name)?;
                    // The gradients of keys are small, and those of f16 without a scaled loss soon 0.
                    let may_vanish = name.ends_with("bias") || name.contains("key");
                    assert!(length.is_finite() && (length > 0.0 || may_vanish), "{of}: {name}: {length}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_losses_are_made_of_is_f32() -> Result<()> {
    let (model, _) = build_in(DType::BF16, "swin", "bert", Task::Pretrain);
    let tokens = Tensor::ones((2, 4, 16), DType::BF16, &Device::Cpu)?;
    for found in [model.project_image(&tokens)?, model.project_text(&tokens)?, model.predict_box(&tokens)?] {
        assert_eq!(found.dtype(), DType::F32);
    }
    // Of unit length to the last digits of f32, which bf16 does not have.
    let length = model.project_text(&tokens)?.sqr()?.sum(1)?.to_vec1::<f32>()?;
    assert!(length.iter().all(|length| (length - 1.0).abs() < 1e-6), "{length:?}");
    assert_eq!(model.temperature()?.dtype(), DType::F32);
    Ok(())
}

#[test]
fn a_part_that_a_task_has_not_is_named() {
    let (model, _) = build("swin", "bert", Task::Grounding);
    let tokens = Tensor::zeros((1, 4, 16), DType::F32, &Device::Cpu).unwrap();
    let lacks = |result: Result<Tensor>, part: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("found one for grounding"), "{error}");
    };
    lacks(model.match_logits(&tokens), "a matching head");
    lacks(model.project_image(&tokens), "a projection of images");
    lacks(model.mlm_logits(&tokens), "a masked-language head");
    lacks(model.statement_logits(&tokens), "a statement head");
    lacks(model.temperature().cloned(), "a temperature");
    let mask = Tensor::ones((1, 4), DType::F32, &Device::Cpu).unwrap();
    let looks = Concepts { tokens: &tokens, index: &[0], mask: &mask };
    let pass = Pass::inference();
    lacks(model.fuse_pair(&tokens, &mask, &[looks.clone(), looks.clone()], &pass), "fusion layers for two images");
    let ids = Tensor::zeros((1, 4), DType::U32, &Device::Cpu).unwrap();
    lacks(model.decode(&ids, &mask, &looks, &pass), "a decoder");
    let (model, _) = build("swin", "bert", Task::Nlvr);
    assert!(model.fuse(&tokens, &mask, &looks, Attention::Full, &pass).is_err());
}

#[test]
fn regions_of_a_vit() -> Result<()> {
    for family in ["clip", "deit"] {
        let (model, _) = build(family, "bert", Task::Pretrain);
        let pass = Pass::inference();
        let images = model.encode_image(&pixels(2), &pass)?;
        let regions = |mask: &Tensor| model.encode_regions(&pixels(2), Regions { index: &[1, 0, 1], mask }, &pass);
        let whole = Tensor::ones((3, 17), DType::F32, &Device::Cpu)?;
        let (same, untouched) = regions(&whole)?;
        assert!(close(&untouched, &images));
        assert!(close(&same, &images.index_select(&Tensor::new(&[1u32, 0, 1], &Device::Cpu)?, 0)?));
        let part: Vec<f32> = (0..3 * 17).map(|i| if i % 17 < 6 { 1.0 } else { 0.0 }).collect();
        let (part, untouched) = regions(&Tensor::from_vec(part, (3, 17), &Device::Cpu)?)?;
        assert!(close(&untouched, &images), "a region does not change its image");
        assert!(!close(&part, &same), "what a region does not cover is not seen");
        let error = model.encode_regions(&pixels(2), Regions { index: &[2], mask: &whole.narrow(0, 0, 1)? }, &pass);
        assert!(error.unwrap_err().to_string().contains("below 2, found 2"));
    }
    Ok(())
}

#[test]
fn roberta_counts_from_its_padding() -> Result<()> {
    let (model, _) = build("swin", "roberta", Task::Retrieval);
    let encode = |ids: &[u32], length: usize| {
        let mask: Vec<f32> = (0..ids.len()).map(|i| if i < length { 1.0 } else { 0.0 }).collect();
        let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        let mask = Tensor::new(mask, &Device::Cpu)?.unsqueeze(0)?;
        model.encode_text(&ids, &mask, Attention::Full, &Pass::inference())
    };
    let short = encode(&[0, 7, 9, 2], 4)?;
    assert!(close(&short, &encode(&[0, 7, 9, 2, 1, 1], 4)?.narrow(1, 0, 4)?));
    assert!(!close(&short, &encode(&[0, 9, 7, 2], 4)?));
    // Of 12 positions, those of padding and before it are no token's.
    assert!(encode(&[5; 10], 10).is_ok());
    assert!(encode(&[5; 11], 11).unwrap_err().to_string().contains("at most 10 tokens, found 11"));
    Ok(())
}

#[test]
fn a_pass_keeps_what_is_asked_for() -> Result<()> {
    let (model, _) = build("swin", "bert", Task::Retrieval);
    let pass = Pass::inference().keeping().watching_attention(3);
    let total = everything(&model, Task::Retrieval, &pass)?;
    for name in ["patch_embed", "layers.0.blocks.1", "layers.1", "embeddings", "layer.0", "layer.3"] {
        assert!(pass.kept(name).is_some(), "{name}");
    }
    assert!(pass.kept("layer.4").is_none() && Pass::inference().kept("layer.0").is_none());
    let attention = pass.attention().unwrap();
    assert_eq!(attention.dims(), [2, 2, 4, 17]);
    let rows = attention.sum(3)?;
    assert!(close(&rows, &rows.ones_like()?), "probabilities");
    assert!(total.backward()?.get(&attention).is_some());
    assert!(close(&total, &everything(&model, Task::Retrieval, &Pass::inference())?), "looking changes nothing");
    Ok(())
}

/// The states of the last tokens of texts, from all of their tokens at once.
fn decoded(model: &Xvlm, texts: &[Vec<u32>], looks: &Concepts, padding: u32) -> Tensor {
    let longest = texts.iter().map(Vec::len).max().unwrap();
    let padded = |text: &Vec<u32>| (0..longest).map(|i| text.get(i).copied().unwrap_or(padding)).collect::<Vec<_>>();
    let ids = Tensor::new(texts.iter().map(padded).collect::<Vec<_>>(), &Device::Cpu).unwrap();
    let mask = ids.ne(padding).unwrap().to_dtype(DType::F32).unwrap();
    let states = model.decode(&ids, &mask, looks, &Pass::inference()).unwrap();
    let last = |(row, text): (usize, &Vec<u32>)| states.get(row).unwrap().get(text.len() - 1).unwrap();
    Tensor::stack(&texts.iter().enumerate().map(last).collect::<Vec<_>>(), 0).unwrap()
}

#[test]
fn texts_written_token_by_token_are_the_same() {
    for (text, padding) in [("bert", 0), ("roberta", 1)] {
        for task in [Task::Captioning, Task::Pretrain] {
            let (model, _) = build("swin", text, task);
            let images = model.encode_image(&pixels(2), &Pass::inference()).unwrap();
            let rows: Vec<Vec<f32>> = (0..3)
                .map(|row| (0..images.dim(1).unwrap()).map(|i| f32::from(u8::from(i % 3 != row))).collect())
                .collect();
            let looking = |index: &[u32], rows: &[&Vec<f32>], texts: &[Vec<u32>]| {
                let mask = Tensor::new(rows.iter().map(|row| row.to_vec()).collect::<Vec<_>>(), &Device::Cpu).unwrap();
                decoded(&model, texts, &Concepts { tokens: &images, index, mask: &mask }, padding)
            };
            let mask = Tensor::new(rows.clone(), &Device::Cpu).unwrap();
            let looks = Concepts { tokens: &images, index: &[1, 0, 1], mask: &mask };
            let mut decoding = model.begin_texts(&looks, 8).unwrap();
            let mut texts = vec![vec![2, 7, 9], vec![2], vec![2, 11]];
            let found = decoding.extend(&texts).unwrap();
            assert!(close(&found, &looking(&[1, 0, 1], &[&rows[0], &rows[1], &rows[2]], &texts)), "prompts");

            decoding.select(&[2, 0, 2, 1]).unwrap();
            texts = [2, 0, 2, 1].map(|row: usize| texts[row].clone()).to_vec();
            for step in 0..2 {
                let new: Vec<Vec<u32>> = (0..4).map(|row| vec![5 + 7 * step + row]).collect();
                texts.iter_mut().zip(&new).for_each(|(text, new)| text.extend(new));
                let found = decoding.extend(&new).unwrap();
                let expected = looking(&[1, 1, 1, 0], &[&rows[2], &rows[0], &rows[2], &rows[1]], &texts);
                assert!(close(&found, &expected), "step {step}");
            }
            assert!(decoding.extend(&[vec![3]]).unwrap_err().to_string().contains("expected 4 continuations"));
            assert!(decoding.select(&[4]).unwrap_err().to_string().contains("below 4"));
        }
    }
}

#[test]
fn texts_are_written_in_half_types() {
    for (dtype, noise) in [(DType::BF16, 0.1), (DType::F16, 0.01)] {
        let (model, _) = build_in(dtype, "swin", "bert", Task::Captioning);
        let images = model.encode_image(&pixels(2), &Pass::inference()).unwrap();
        let mask = Tensor::ones((2, images.dim(1).unwrap()), DType::F32, &Device::Cpu).unwrap();
        let looks = Concepts { tokens: &images, index: &[1, 0], mask: &mask };
        let mut decoding = model.begin_texts(&looks, 8).unwrap();
        let mut texts = vec![vec![2, 7, 9], vec![2, 11, 8]];
        decoding.extend(&texts).unwrap();
        let new = vec![vec![5], vec![6]];
        let found = decoding.extend(&new).unwrap();
        texts.iter_mut().zip(&new).for_each(|(text, new)| text.extend(new));
        let difference = (found - decoded(&model, &texts, &looks, 0)).unwrap().abs().unwrap().max_all().unwrap();
        let difference = difference.to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < noise, "{dtype:?}: {difference}");
    }
}

/// The gradient of a number that depends on all tokens of some images.
fn slopes_of_pixels(model: &Xvlm) -> Result<Tensor> {
    let pixels = Var::from_tensor(&pixels(1))?;
    // Of squares after a layer norm there is none.
    let number = model.encode_image(&pixels, &Pass::inference())?.to_dtype(DType::F32)?.exp()?.sum_all()?;
    number.backward()?.remove(&pixels).ok_or_else(|| candle_core::Error::Msg("pixels without a gradient".into()))
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.sqr()?.sum_all()?.sqrt()?.to_scalar()
}

#[test]
fn a_model_packed_for_inference_computes_what_it_did() -> Result<()> {
    let number = |model: &Xvlm, task| everything(model, task, &Pass::inference())?.to_scalar::<f32>();
    for family in ["swin", "clip", "deit"] {
        for text in ["bert", "roberta"] {
            for task in Task::ALL {
                let (model, parameters) = build(family, text, task);
                let (half, _) = build_in(DType::BF16, family, text, task);
                let wanted = number(&model, task)?;
                for (model, weights, allowed) in [
                    (&model, PackedWeights::AsGiven, 1e-5),
                    (&model, PackedWeights::Int8, 0.02),
                    (&half, PackedWeights::AsGiven, 0.03),
                ] {
                    let mut packed = model.clone();
                    packed.pack(weights)?;
                    let found = number(&packed, task)?;
                    let off = (found / wanted - 1.0).abs();
                    assert!(off < allowed, "{family}, {text}, {}, {weights:?}: off by {off}", task.name());
                    let (slopes, of_plain) = (slopes_of_pixels(&packed)?, slopes_of_pixels(model)?);
                    let off = distance(&slopes, &of_plain)? / distance(&of_plain, &of_plain.zeros_like()?)?;
                    assert!(off < 10.0 * allowed, "{family}, {weights:?}: gradients of pixels are off by {off}");
                    // What is packed is not packed again.
                    packed.pack(PackedWeights::AsGiven)?;
                    assert_eq!(number(&packed, task)?, found);
                    let slopes = everything(&packed, task, &Pass::inference())?.backward()?;
                    let mut dense = parameters.named().into_iter().filter(|(name, _)| name.ends_with("dense.weight"));
                    assert!(dense.all(|(_, var)| slopes.get(&var).is_none()), "packed weights have no gradients");
                }
            }
        }
    }
    Ok(())
}
