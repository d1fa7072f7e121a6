//! Optimizer and schedule against the original implementation.
//!
//! `golden/optim_synthetic` was made by the official code: five steps on given parameters with given gradients.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;
use xvlm_kernels::{Gradients, Tape};
use xvlm_train::{Optimizer, OptimizerConfig, ScheduleConfig, TrainConfig, Warmup};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn case() -> (Value, HashMap<String, Tensor>, TrainConfig) {
    let text = std::fs::read_to_string(golden("optim_synthetic.json")).unwrap();
    let tensors = candle_core::safetensors::load(golden("optim_synthetic.safetensors"), &Device::Cpu).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let steps = |field: &str| json["scheduler"][field].as_u64().unwrap();
    let config = TrainConfig {
        iterations: steps("num_training_steps"),
        optimizer: OptimizerConfig {
            lr: 1e-2,
            weight_decay: 0.1,
            lr_mult: 2.0,
            lr_mult_names: vec!["head".into(), "temp".into()],
            ..OptimizerConfig::default()
        },
        schedule: ScheduleConfig { warmup: Warmup::Iterations(steps("num_warmup_steps")), ..ScheduleConfig::default() },
        clip: None,
        ..TrainConfig::default()
    };
    (json, tensors, config)
}

#[test]
fn groups() {
    let (json, _, config) = case();
    for group in json["groups"].as_array().unwrap() {
        for name in group["params"].as_array().unwrap() {
            let name = name.as_str().unwrap();
            assert_eq!(config.optimizer.weight_decay_of(name), group["weight_decay"].as_f64().unwrap(), "{name}");
            let lr = config.optimizer.lr * config.optimizer.lr_mult_of(name);
            assert_eq!(lr, group["initial_lr"].as_f64().unwrap(), "{name}");
        }
    }
}

#[test]
fn steps() {
    let (_, tensors, config) = case();
    let initial = |(name, tensor): (&String, &Tensor)| {
        Some((name.strip_prefix("in.param.")?.to_owned(), Var::from_tensor(tensor).unwrap()))
    };
    let parameters: Vec<(String, Var)> = tensors.iter().filter_map(initial).collect();
    assert_eq!(parameters.len(), 10);
    let mut optimizer = Optimizer::new(&parameters, &config).unwrap();
    let rates = tensors["out.lr"].to_vec2::<f64>().unwrap();
    for (step, rates) in rates.iter().enumerate() {
        let lr = config.learning_rate(step as u64, Duration::ZERO);
        for (expected, mult) in rates.iter().zip([1.0, 1.0, 2.0, 2.0]) {
            assert!((lr * mult - expected).abs() <= 1e-15, "step {step}: {} for {expected}", lr * mult);
        }
        // The gradient of Σ p·g is g.
        let products = parameters.iter().map(|(name, parameter)| {
            (parameter.as_tensor() * &tensors[&format!("in.grad.{step}.{name}")]).unwrap().sum_all().unwrap()
        });
        let sum = Tensor::stack(&products.collect::<Vec<_>>(), 0).unwrap().sum_all().unwrap();
        let mut gradients = Gradients::default();
        Tape::default().backward(sum, &mut gradients, |_, _| Ok(())).unwrap();
        optimizer.step(&gradients, lr).unwrap();
        for (name, parameter) in &parameters {
            let expected = numbers(&tensors[&format!("out.param.{step}.{name}")]);
            for (found, expected) in numbers(parameter).iter().zip(&expected) {
                let error = (found - expected).abs();
                assert!(error <= 1e-5 * expected.abs() + 1e-8, "step {step}, {name}: {found} for {expected}");
            }
        }
    }
}
