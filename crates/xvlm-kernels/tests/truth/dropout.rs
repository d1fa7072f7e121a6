use candle_core::{DType, Device, Tensor};
use xvlm_kernels::{self as kernels, Dropout};

use crate::check::{Array, check};

/// What a dropout multiplies numbers by.
fn factors(dropout: Dropout, count: usize) -> Vec<f64> {
    let ones = Tensor::ones(count, DType::F64, &Device::Cpu).unwrap();
    kernels::dropout(&ones, dropout).unwrap().to_vec1().unwrap()
}

#[test]
fn numbers_are_dropped_or_scaled_alike_on_every_path() {
    for (shape, probability, seed) in [(&[3, 5][..], 0.5, 1), (&[17, 1025], 0.1, 2), (&[4], 0.0, 3), (&[0, 3], 0.5, 4)]
    {
        let dropout = Dropout { probability, seed };
        let kept = factors(dropout, shape.iter().product());
        check(
            [Array::random(shape, seed)],
            |[x]| Array::new(shape, x.values.iter().zip(&kept).map(|(x, factor)| x * factor).collect()),
            |_, [x]| kernels::dropout(x, dropout),
        );
    }
}

#[test]
fn as_many_are_dropped_as_the_probability_says() {
    const COUNT: usize = 1 << 18;
    let mut before = Vec::new();
    for seed in 0..4 {
        let dropped: Vec<bool> =
            factors(Dropout { probability: 0.1, seed }, COUNT).iter().map(|factor| *factor == 0.0).collect();
        let share = |of: &dyn Fn(usize) -> bool| (0..COUNT - 1).filter(|&i| of(i)).count() as f64 / COUNT as f64;
        // Within five standard deviations: alone, beside a dropped neighbour, and where another seed dropped too.
        let close = |share: f64, wanted: f64| (share - wanted).abs() < 5.0 * (wanted / COUNT as f64).sqrt();
        assert!(close(share(&|i| dropped[i]), 0.1));
        assert!(close(share(&|i| dropped[i] && dropped[i + 1]), 0.01));
        assert!(before.is_empty() || close(share(&|i| dropped[i] && before[i]), 0.01));
        before = dropped;
    }
}

#[test]
fn a_branch_is_added_with_a_scale_for_each_sample() {
    for (shape, scales) in
        [(&[3, 4, 5][..], Some([0.0f32, 1.0, 1.25])), (&[3, 9000], Some([1.5, 0.0, 2.0])), (&[2, 3], None)]
    {
        let [x, branch] = [1, 2].map(|seed| Array::random(shape, seed));
        let scales = scales.as_ref().map(|scales| &scales[..]);
        check(
            [x, branch],
            |[x, branch]| {
                let sample = branch.values.len() / shape[0];
                let scale = |i: usize| scales.map_or(1.0, |scales| f64::from(scales[i / sample]));
                let sums = x.values.iter().zip(&branch.values).enumerate().map(|(i, (x, y))| x + scale(i) * y);
                Array::new(shape, sums.collect())
            },
            |_, [x, branch]| kernels::add_branch(x, branch, scales),
        );
    }
}

#[test]
fn what_makes_no_sense_is_named() {
    let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let found = kernels::dropout(&x, Dropout { probability: 1.0, seed: 0 }).unwrap_err().to_string();
    assert!(found.contains("probability") && found.contains("below 1"), "{found}");
    let found = kernels::add_branch(&x, &x, Some(&[1.0])).unwrap_err().to_string();
    assert!(found.contains("scales") && found.contains("2 numbers"), "{found}");
    let found = kernels::add_branch(&x, &x.t().unwrap(), None).unwrap_err().to_string();
    assert!(found.contains("branch") && found.contains("[2, 3]"), "{found}");
}
