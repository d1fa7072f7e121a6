use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use xvlm_kernels::{self as kernels, IGNORE};

use crate::check::{Array, check};

fn plain(logits: &Array, labels: &[i64], smoothing: f64) -> Array {
    let width = logits.shape[1];
    let counted = labels.iter().filter(|&&label| label != IGNORE).count().max(1);
    let row = |(row, &label): (&[f64], &i64)| {
        if label == IGNORE {
            return 0.0;
        }
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = row.iter().map(|x| (x - top).exp()).sum::<f64>().ln() + top;
        let target = |class: usize| if class as i64 == label { 1.0 - smoothing } else { smoothing / width as f64 };
        row.iter().enumerate().map(|(class, x)| target(class) * (log_sum - x)).sum()
    };
    let total: f64 = logits.values.chunks(width).zip(labels).map(row).sum();
    Array::new(&[], vec![total / counted as f64])
}

fn compare(logits: Array, labels: &[i64], smoothing: f32) {
    check(
        [logits],
        |[logits]| plain(logits, labels, f64::from(smoothing)),
        |_, [logits]| kernels::cross_entropy(logits, labels, smoothing),
    );
}

fn labels(rows: usize, classes: usize, seed: u64) -> Vec<i64> {
    let draw = |x: f64| if x < -0.5 { IGNORE } else { ((x + 0.5) / 1.5 * classes as f64) as i64 };
    Array::random(&[rows], seed).values.into_iter().map(draw).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn cross_entropies(
        rows in 0usize..6,
        classes in 1usize..90,
        scale in 0.1f64..8.0,
        smoothed: bool,
        seed: u64,
    ) {
        let smoothing = if smoothed { 0.1 } else { 0.0 };
        let logits = Array::random(&[rows, classes], seed).map(|x| x * scale);
        compare(logits, &labels(rows, classes, seed ^ 1), smoothing);
    }
}

#[test]
fn a_large_vocabulary() {
    compare(Array::random(&[2, 9000], 3).map(|x| x * 4.0), &[8999, 17], 0.1);
}

#[test]
fn nothing_that_counts_is_zero() {
    compare(Array::random(&[3, 5], 4), &[IGNORE; 3], 0.1);
}

#[test]
fn the_loss_of_half_types_is_f32() {
    let logits = Tensor::zeros((2, 3), DType::BF16, &Device::Cpu).unwrap();
    let loss = kernels::cross_entropy(&logits, &[0, 1], 0.0).unwrap();
    assert!((loss.to_scalar::<f32>().unwrap() - 3f32.ln()).abs() < 1e-6);
}

#[test]
fn wrong_labels_are_named() {
    let logits = Tensor::zeros((1, 3), DType::F32, &Device::Cpu).unwrap();
    for (labels, named) in [(&[3][..], "label 3"), (&[-1], "label -1"), (&[0, 0], "2 labels")] {
        let error = kernels::cross_entropy(&logits, labels, 0.0).unwrap_err().to_string();
        assert!(error.contains("cross_entropy") && error.contains(named), "{error}");
    }
    assert!(kernels::cross_entropy(&logits.unsqueeze(0).unwrap(), &[0], 0.0).is_err());
}
