//! What the composed model promises about its parts.

use candle_core::{DType, Device, Result, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use xvlm_encoders::{Attention, Concepts, Parameters, Pass, Regions, Xvlm, XvlmConfig};

fn sizes() -> Value {
    json!({
        "vision_config": {
            "kind": "swin",
            "image_res": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4,
            "drop_path_rate": 0.3, "ape": true, "sine_positions": 1.0,
        },
        "text_config": {
            "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "fusion_layer": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 12, "hidden_dropout_prob": 0.2,
        },
        "embed_dim": 16,
    })
}

fn build(sizes: Value, seed: u64) -> (Xvlm, Parameters) {
    let config: XvlmConfig = serde_json::from_value(sizes).unwrap();
    config.validate().unwrap();
    let parameters = Parameters::new(seed);
    (Xvlm::new(&config, parameters.builder(DType::F32, &Device::Cpu)).unwrap(), parameters)
}

fn pixels(images: usize) -> Tensor {
    let values = (0..images * 3 * 32 * 32).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 300.0).collect();
    Tensor::from_vec(values, (images, 3, 32, 32), &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn close(a: &Tensor, b: &Tensor) -> bool {
    a.dims() == b.dims() && numbers(a).iter().zip(numbers(b)).all(|(a, b)| (a - b).abs() < 1e-5)
}

#[test]
fn a_region_that_is_the_whole_image_is_the_image() -> Result<()> {
    let (model, _) = build(sizes(), 1);
    let (pixels, pass) = (pixels(2), Pass::inference());
    let images = model.encode_image(&pixels, &pass)?;
    assert_eq!(images.dims(), [2, 1 + 16, 16]);
    let mask = Tensor::ones((3, 17), DType::F32, &Device::Cpu)?;
    let (regions, same) = model.encode_regions(&pixels, Regions { index: &[1, 0, 1], mask: &mask }, &pass)?;
    assert!(close(&same, &images));
    assert!(close(&regions, &images.index_select(&Tensor::new(&[1u32, 0, 1], &Device::Cpu)?, 0)?));
    Ok(())
}

#[test]
fn padding_and_hidden_patches_do_not_matter() -> Result<()> {
    let (model, _) = build(sizes(), 1);
    let pass = Pass::inference();
    let tokens = model.encode_image(&pixels(1), &pass)?;
    let fused = |ids: &[u32], mask: &[f32], tokens: &Tensor, seen: &Tensor| -> Result<Tensor> {
        let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        let mask = Tensor::new(mask, &Device::Cpu)?.unsqueeze(0)?;
        let text = model.encode_text(&ids, &mask, Attention::Full, &pass)?;
        let concepts = Concepts { tokens, index: &[0], mask: seen };
        model.fuse(&text, &mask, &concepts, Attention::Full, &pass)
    };
    let seen: Vec<f32> = (0..17).map(|i| if i < 9 { 1.0 } else { 0.0 }).collect();
    let seen = Tensor::from_vec(seen, (1, 17), &Device::Cpu)?;
    let short = fused(&[2, 7, 9], &[1.0; 3], &tokens, &seen)?;
    let padded = fused(&[2, 7, 9, 0, 0], &[1.0, 1.0, 1.0, 0.0, 0.0], &tokens, &seen)?;
    assert!(close(&short, &padded.narrow(1, 0, 3)?));
    let other = Tensor::cat(&[tokens.narrow(1, 0, 9)?, (tokens.narrow(1, 9, 8)? * -3.0)?], 1)?;
    assert!(close(&short, &fused(&[2, 7, 9], &[1.0; 3], &other, &seen)?));
    Ok(())
}

#[test]
fn a_causal_text_does_not_see_what_follows() -> Result<()> {
    let (model, _) = build(sizes(), 1);
    let mask = Tensor::ones((1, 4), DType::F32, &Device::Cpu)?;
    let encode = |ids: [u32; 4], attention| {
        model.encode_text(&Tensor::new(&[ids], &Device::Cpu)?, &mask, attention, &Pass::inference())
    };
    let (one, other) = (encode([2, 7, 9, 11], Attention::Causal)?, encode([2, 7, 9, 30], Attention::Causal)?);
    assert!(close(&one.narrow(1, 0, 3)?, &other.narrow(1, 0, 3)?));
    assert!(!close(&one, &other));
    let (one, other) = (encode([2, 7, 9, 11], Attention::Full)?, encode([2, 7, 9, 30], Attention::Full)?);
    assert!(!close(&one.narrow(1, 0, 3)?, &other.narrow(1, 0, 3)?));
    Ok(())
}

#[test]
fn equal_seeds_give_equal_bits() -> Result<()> {
    let ((one, parameters), (same, _), (other, _)) = (build(sizes(), 1), build(sizes(), 1), build(sizes(), 2));
    let run = |model: &Xvlm, seed: u64| {
        let tokens = model.encode_image(&pixels(2), &Pass::training(&mut ChaCha8Rng::seed_from_u64(seed)))?;
        Ok::<_, candle_core::Error>(numbers(&tokens))
    };
    assert_eq!(run(&one, 5)?, run(&same, 5)?);
    assert_ne!(run(&one, 5)?, run(&one, 6)?, "stochastic depth draws from the generator");
    assert_ne!(run(&one, 5)?, run(&other, 5)?);
    assert_eq!(parameters.count(), parameters.named().iter().map(|(_, var)| var.elem_count()).sum::<usize>());
    Ok(())
}

#[test]
fn places_are_told_by_waves() -> Result<()> {
    let mut plain = sizes();
    plain["vision_config"]["sine_positions"] = json!(0.0);
    plain["vision_config"]["ape"] = json!(false);
    let mut waves = plain.clone();
    waves["vision_config"]["sine_positions"] = json!(1.0);
    let flat = Tensor::zeros((1, 3, 32, 32), DType::F32, &Device::Cpu)?;
    let spread = |sizes: Value| {
        let patches = build(sizes, 1).0.encode_image(&flat, &Pass::inference())?.narrow(1, 1, 16)?;
        let mean = patches.mean_keepdim(1)?;
        patches.broadcast_sub(&mean)?.sqr()?.sum_all()?.to_scalar::<f32>()
    };
    // Without positions, patches of an even picture differ by nothing but what shifted windows hide from each other.
    let (without, with) = (spread(plain)?, spread(waves)?);
    assert!(with > 100.0 * without.max(1e-6), "{without} without, {with} with");
    Ok(())
}

#[test]
fn what_does_not_fit_is_named() {
    let wrong = |section: &str, field: &str, value: Value| {
        let mut sizes = sizes();
        sizes[section][field] = value;
        serde_json::from_value::<XvlmConfig>(sizes).unwrap().validate().unwrap_err().to_string()
    };
    assert!(wrong("vision_config", "image_res", json!(36)).contains("vision_config.image_res"));
    assert!(wrong("vision_config", "window_size", json!(3)).contains("vision_config.window_size"));
    assert!(wrong("vision_config", "num_heads", json!([1])).contains("vision_config.num_heads"));
    assert!(wrong("text_config", "fusion_layer", json!(3)).contains("text_config.fusion_layer"));
    assert!(wrong("text_config", "num_attention_heads", json!(3)).contains("text_config.num_attention_heads"));

    let (model, _) = build(sizes(), 1);
    let pass = Pass::inference();
    let small = Tensor::zeros((1, 3, 16, 16), DType::F32, &Device::Cpu).unwrap();
    assert!(model.encode_image(&small, &pass).unwrap_err().to_string().contains("[_, 3, 32, 32]"));
    let ids = Tensor::zeros((1, 13), DType::U32, &Device::Cpu).unwrap();
    let mask = Tensor::ones((1, 13), DType::F32, &Device::Cpu).unwrap();
    let error = model.encode_text(&ids, &mask, Attention::Full, &pass).unwrap_err().to_string();
    assert!(error.contains("at most 12") && error.contains("found 13"), "{error}");
}
