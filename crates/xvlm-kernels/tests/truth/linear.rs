use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use xvlm_kernels as kernels;

use crate::check::{Array, check};

fn plain(x: &Array, weight: &Array, bias: Option<&Array>) -> Array {
    let &[n, k] = weight.shape.as_slice() else { panic!("a matrix") };
    let output = |row: &[f64], j: usize| {
        let sum: f64 = row.iter().zip(&weight.values[j * k..]).map(|(x, w)| x * w).sum();
        sum + bias.map_or(0.0, |bias| bias.values[j])
    };
    let values = x.values.chunks(k).flat_map(|row| (0..n).map(move |j| output(row, j)));
    let mut shape = x.shape.clone();
    *shape.last_mut().unwrap() = n;
    Array::new(&shape, values.collect())
}

fn compare(shape: &[usize], n: usize, seed: u64) {
    let k = *shape.last().unwrap();
    let (x, weight, bias) =
        (Array::random(shape, seed), Array::random(&[n, k], seed ^ 1), Array::random(&[n], seed ^ 2));
    check(
        [x.clone(), weight.clone(), bias],
        |[x, weight, bias]| plain(x, weight, Some(bias)),
        |_, [x, weight, bias]| kernels::linear(x, weight, bias),
    );
    check([x, weight], |[x, weight]| plain(x, weight, None), |_, [x, weight]| kernels::linear_without_bias(x, weight));
}

fn compare_gelu(shape: &[usize], n: usize, seed: u64) {
    let k = *shape.last().unwrap();
    let (x, weight, bias) =
        (Array::random(shape, seed), Array::random(&[n, k], seed ^ 1), Array::random(&[n], seed ^ 2));
    check(
        [x.map(|x| 3.0 * x), weight, bias],
        |[x, weight, bias]| plain(&x.map(crate::activation::gelu), weight, Some(bias)),
        |_, [x, weight, bias]| kernels::gelu_linear(x, weight, bias),
    );
}

/// Three layers of different widths.
fn compare_stacked(shape: &[usize], n: usize, seed: u64) {
    let k = *shape.last().unwrap();
    let widths = [n, 1, n + 2];
    let part = |i: usize| {
        let seed = seed ^ (1 + i as u64);
        (Array::random(&[widths[i], k], seed << 8), Array::random(&[widths[i]], seed << 16))
    };
    let [(a, of_a), (b, of_b), (c, of_c)] = [0, 1, 2].map(part);
    check(
        [Array::random(shape, seed), a, b, c, of_a, of_b, of_c],
        |[x, weights @ .., of_a, of_b, of_c]| {
            let stack = |shape: &[usize], parts: [&Array; 3]| {
                Array::new(shape, parts.iter().flat_map(|part| part.values.iter().copied()).collect())
            };
            let outputs: usize = widths.iter().sum();
            let weight = stack(&[outputs, k], weights.each_ref());
            plain(x, &weight, Some(&stack(&[outputs], [of_a, of_b, of_c])))
        },
        |_, [x, a, b, c, of_a, of_b, of_c]| kernels::stacked_linear(x, &[a, b, c], &[of_a, of_b, of_c]),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn linears(batch in 0usize..4, rows in 1usize..6, k in 1usize..70, n in 1usize..70, seed: u64) {
        compare(&[batch, rows, k], n, seed);
        compare_gelu(&[batch, rows, k], n, seed);
        compare_stacked(&[batch, rows, k], n, seed);
    }
}

#[test]
fn more_rows_than_are_taken_at_a_time() {
    compare(&[1030, 3], 4, 8);
    compare(&[1030, 2], 4, 8);
}

/// Tiles, panels and parts of the summed dimension that are not filled.
#[test]
fn large_products() {
    compare(&[203, 70], 134, 9);
    compare(&[9, 2050], 5, 10);
}

#[test]
fn wrong_shapes_are_named() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (x, weight) = (zeros(&[2, 3]), zeros(&[4, 3]));
    let named = |result: candle_core::Result<Tensor>, parts: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    named(kernels::linear(&x, &zeros(&[4, 5]), &zeros(&[4])), &["linear: `weight`", "[4, 3]", "[4, 5]"]);
    named(kernels::linear(&x, &weight, &zeros(&[3])), &["linear: `bias`", "[4]", "[3]"]);
    named(kernels::linear(&x, &weight, &zeros(&[4]).to_dtype(DType::BF16).unwrap()), &["linear: `bias`", "BF16"]);
    named(kernels::linear_without_bias(&x, &zeros(&[4, 5])), &["linear_without_bias: `weight`", "[4, 3]", "[4, 5]"]);
    let bias = &zeros(&[4]);
    named(kernels::stacked_linear(&x, &[&weight], &[bias, bias]), &["stacked_linear: `biases`", "1, one for", "2"]);
    named(kernels::stacked_linear(&x, &[&weight; 2], &[bias, &zeros(&[3])]), &["stacked_linear: `bias`", "[4]", "[3]"]);
    assert!(kernels::stacked_linear(&x, &[], &[]).is_err());
}
