use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use xvlm_kernels as kernels;

use crate::check::{Array, At, check};

/// Softmax of the middle one of three dimensions, or its logarithm.
fn plain(x: &Array, [before, width, after]: [usize; 3], logarithm: bool) -> Array {
    let mut y = x.clone();
    for i in 0..before {
        for k in 0..after {
            let at = |j: usize| (i * width + j) * after + k;
            let top = (0..width).map(|j| x.values[at(j)]).fold(f64::NEG_INFINITY, f64::max);
            let log_sum = (0..width).map(|j| (x.values[at(j)] - top).exp()).sum::<f64>().ln() + top;
            for j in 0..width {
                let log = x.values[at(j)] - log_sum;
                y.values[at(j)] = if logarithm { log } else { log.exp() };
            }
        }
    }
    y
}

fn compare(shape: [usize; 3], dim: usize, scale: f64, seed: u64) {
    let x = Array::random(&shape, seed).map(|x| x * scale);
    let around = |dims: &[usize]| dims.iter().product();
    let dims = [around(&shape[..dim]), shape[dim], around(&shape[dim + 1..])];
    check([x.clone()], |[x]| plain(x, dims, false), |_, [x]| kernels::softmax(x, dim));
    check([x], |[x]| plain(x, dims, true), |_, [x]| kernels::log_softmax(x, dim));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn softmaxes(a in 0usize..4, b in 1usize..5, c in 1usize..100, dim in 0usize..3, scale in 0.1f64..8.0, seed: u64) {
        prop_assume!(a > 0 || dim > 0);
        compare([a, b, c], dim, scale, seed);
    }
}

#[test]
fn a_row_for_a_whole_block() {
    compare([1, 2, 2100], 2, 2.0, 3);
}

#[test]
fn the_logarithm_of_half_types_is_f32() {
    for at in At::all().filter(|at| at.dtype != DType::F64) {
        let x = Tensor::new(&[[0.5f32, 1.0]], &at.device).unwrap().to_dtype(at.dtype).unwrap();
        at.computer.run(|| {
            assert_eq!(kernels::softmax(&x, 1).unwrap().dtype(), at.dtype);
            assert_eq!(kernels::log_softmax(&x, 1).unwrap().dtype(), DType::F32);
        });
    }
}

/// What the operations make of rows with infinities and of numbers whose powers overflow.
#[test]
fn extremes() {
    let (inf, none) = (f64::INFINITY, f64::NAN);
    let rows: [([f64; 3], [f64; 3]); 6] = [
        ([1000.0, 1000.0, 1000.0], [1.0 / 3.0; 3]),
        ([-inf, 5.0, -inf], [0.0, 1.0, 0.0]),
        ([-inf, -4.0, -4.0], [0.0, 0.5, 0.5]),
        ([-1000.0, 0.0, 1000.0], [0.0, 0.0, 1.0]),
        ([-inf; 3], [none; 3]),
        ([0.0, none, 1.0], [none; 3]),
    ];
    for at in At::all() {
        for (x, wanted) in rows {
            let x = Tensor::new(&[x], &Device::Cpu).unwrap().to_dtype(at.dtype).unwrap().to_device(&at.device).unwrap();
            let (y, log) = at.computer.run(|| (kernels::softmax(&x, 1).unwrap(), kernels::log_softmax(&x, 1).unwrap()));
            for ((y, log), wanted) in Array::from(&y).values.iter().zip(Array::from(&log).values).zip(wanted) {
                let close = |a: f64, b: f64| (a - b).abs() < 5e-3 || a.is_nan() && b.is_nan();
                assert!(close(*y, wanted), "{at:?}: {y}, wanted {wanted}");
                assert!(close(log.exp(), wanted), "{at:?}: logarithm {log}, wanted that of {wanted}");
            }
        }
    }
}
