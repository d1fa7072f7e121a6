use candle_core::{Device, Tensor, Var};
use proptest::prelude::*;
use xvlm_kernels as kernels;

use crate::check::{Array, check};

/// Φ(x) to 1e-12: by its series near zero, by its continued fraction away from it (Abramowitz and Stegun 26.2).
pub(crate) fn normal_cdf(x: f64) -> f64 {
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if x.abs() < 3.0 {
        let (mut term, mut total) = (x, x);
        for n in 1..80 {
            term *= x * x / f64::from(2 * n + 1);
            total += term;
        }
        return 0.5 + density * total;
    }
    let fraction = (1..200).rev().fold(x.abs(), |below, n| x.abs() + f64::from(n) / below);
    let tail = density / fraction;
    if x > 0.0 { 1.0 - tail } else { tail }
}

pub(crate) fn gelu(x: f64) -> f64 {
    x * normal_cdf(x)
}

fn quick_gelu(x: f64) -> f64 {
    x / (1.0 + (-1.702 * x).exp())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn gelus(rows in 0usize..5, width in 1usize..70, scale in 0.1f64..6.0, seed: u64) {
        let x = Array::random(&[rows, width], seed).map(|x| x * scale);
        check([x.clone()], |[x]| x.map(gelu), |_, [x]| kernels::gelu(x));
        check([x.clone()], |[x]| x.map(quick_gelu), |_, [x]| kernels::quick_gelu(x));
        let shifted = |[x, bias]: &[Array; 2]| {
            let shift = |(i, x): (usize, &f64)| gelu(x + bias.values[i % width]);
            Array::new(&x.shape, x.values.iter().enumerate().map(shift).collect())
        };
        check([x, Array::random(&[width], seed ^ 1)], shifted, |_, [x, bias]| kernels::bias_gelu(x, bias));
    }
}

#[test]
fn gelu_is_exact_to_a_millionth() {
    let x: Vec<f32> = (-80_000..80_000).map(|i| i as f32 * 1e-4).collect();
    let y = kernels::gelu(&Tensor::new(x.as_slice(), &Device::Cpu).unwrap()).unwrap();
    for (x, y) in x.iter().zip(y.to_vec1::<f32>().unwrap()) {
        let wanted = gelu(f64::from(*x));
        assert!((f64::from(y) - wanted).abs() <= 1e-6 * wanted.abs().max(1.0), "gelu({x}) is {y}, not {wanted}");
    }
}

#[test]
fn quick_gelu_stays_finite() {
    let x = Var::new(&[-1000f32, -60.0, 0.0, 60.0, 1000.0], &Device::Cpu).unwrap();
    let y = kernels::quick_gelu(&x).unwrap();
    let close = |found: Vec<f32>, wanted: [f32; 5]| {
        assert!(found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-30), "{found:?}, wanted {wanted:?}");
    };
    close(y.to_vec1().unwrap(), [0.0, 0.0, 0.0, 60.0, 1000.0]);
    let gradients = y.sum_all().unwrap().backward().unwrap();
    close(gradients.get(&x).unwrap().to_vec1().unwrap(), [0.0, 0.0, 0.5, 1.0, 1.0]);
}
