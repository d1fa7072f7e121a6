use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use xvlm_kernels as kernels;

use crate::check::{Array, check};

/// Large enough that rows of one or two numbers have no steep gradients.
const EPS: f64 = 1e-2;

fn layer_norm(x: &Array, weight: &Array, bias: &Array) -> Array {
    let width = weight.values.len();
    let row = |row: &[f64]| {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let normal = row.iter().map(|x| (x - mean) / (variance + EPS).sqrt());
        normal.zip(&weight.values).zip(&bias.values).map(|((x, w), b)| x * w + b).collect::<Vec<_>>()
    };
    Array::new(&x.shape, x.values.chunks(width).flat_map(row).collect())
}

fn sum(x: &Array, y: &Array) -> Array {
    Array::new(&x.shape, x.values.iter().zip(&y.values).map(|(x, y)| x + y).collect())
}

fn compare(shape: &[usize], seed: u64) {
    let width = *shape.last().unwrap();
    let (weight, bias) = (Array::random(&[width], seed ^ 2), Array::random(&[width], seed ^ 3));
    check(
        [Array::random(shape, seed), weight, bias],
        |[x, weight, bias]| layer_norm(x, weight, bias),
        |_, [x, weight, bias]| kernels::layer_norm(x, weight, bias, EPS),
    );
}

fn compare_sum(shape: &[usize], seed: u64) {
    let width = *shape.last().unwrap();
    let (weight, bias) = (Array::random(&[width], seed ^ 2), Array::random(&[width], seed ^ 3));
    check(
        [Array::random(shape, seed), Array::random(shape, seed ^ 1), weight, bias],
        |[x, residual, weight, bias]| layer_norm(&sum(x, residual), weight, bias),
        |_, [x, residual, weight, bias]| kernels::add_layer_norm(x, residual, weight, bias, EPS),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn layer_norms(batch in 0usize..3, rows in 1usize..4, width in 1usize..90, seed: u64) {
        compare(&[batch, rows, width], seed);
        compare_sum(&[batch, rows, width], seed);
    }
}

#[test]
fn more_rows_than_a_thread_takes() {
    compare(&[520, 32], 5);
}

#[test]
fn a_row_for_a_whole_block() {
    compare(&[2, 1100], 6);
    compare_sum(&[2, 1100], 6);
}

#[test]
fn a_large_mean_costs_no_accuracy() {
    let x: Vec<f32> = (0..768).map(|i| 1000.0 + (i % 7) as f32 * 0.25).collect();
    let x = Tensor::from_vec(x, (1, 768), &Device::Cpu).unwrap();
    let one = Tensor::ones(768, DType::F32, &Device::Cpu).unwrap();
    let y = kernels::layer_norm(&x, &one, &one.zeros_like().unwrap(), 1e-5).unwrap();
    let to_f64 = |t: &Tensor| Array::from(t);
    let x = to_f64(&x).values;
    let mean = x.iter().sum::<f64>() / 768.0;
    let deviation = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 768.0 + 1e-5).sqrt();
    for (y, x) in to_f64(&y).values.iter().zip(x) {
        assert!((y - (x - mean) / deviation).abs() < 1e-3, "{y}");
    }
}

#[test]
fn one_tensor_on_both_sides_gets_both_gradients() {
    let x = candle_core::Var::new(&[[0.3f32, -0.2, 0.9]], &Device::Cpu).unwrap();
    let weight = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
    let bias = weight.zeros_like().unwrap();
    let gradient = |y: Tensor| {
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        Array::from(gradients.get(&x).unwrap()).values
    };
    let twice = gradient(kernels::add_layer_norm(&x, &x, &weight, &bias, 1e-3).unwrap());
    let doubled = gradient(kernels::layer_norm(&(x.as_tensor() * 2.0).unwrap(), &weight, &bias, 1e-3).unwrap());
    for (a, b) in twice.iter().zip(doubled) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

#[test]
fn wrong_shapes_are_named() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (x, good, bad) = (zeros(&[2, 3]), zeros(&[3]), zeros(&[4]));
    let named = |result: candle_core::Result<Tensor>, argument: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(argument), "{error}");
    };
    named(kernels::layer_norm(&x, &bad, &good, EPS), "layer_norm: `weight`");
    named(kernels::layer_norm(&x, &good, &bad, EPS), "layer_norm: `bias`");
    named(kernels::add_layer_norm(&x, &zeros(&[3, 3]), &good, &good, EPS), "add_layer_norm: `residual`");
    named(kernels::add_layer_norm(&x, &x, &bad, &good, EPS), "add_layer_norm: `weight`");
    let half = good.to_dtype(DType::BF16).unwrap();
    named(kernels::layer_norm(&x, &half, &good, EPS), "layer_norm: `weight`");
}
