use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use xvlm_kernels::{self as kernels, WindowShape};

use crate::attention::attended;
use crate::check::{Array, check};

/// Where the cyclic shift takes a token: its window, its place there, and the region it came from (Liu et al. 2021, §3.2).
fn placed(token: usize, shape: WindowShape) -> ((usize, usize), usize, (u8, u8)) {
    let WindowShape { height, width, window, shift } = shape;
    let y = (token / width + height - shift) % height;
    let x = (token % width + width - shift) % width;
    let region = |i: usize, size: usize| match i {
        _ if shift == 0 || i < size - window => 0,
        i if i < size - shift => 1,
        _ => 2,
    };
    ((y / window, x / window), y % window * window + x % window, (region(y, height), region(x, width)))
}

fn plain(qkv: &Array, bias: &Array, shape: WindowShape) -> Array {
    let [n, tokens, packed] = qkv.shape[..] else { panic!("three dimensions") };
    let [heads, area, _] = bias.shape[..] else { panic!("three dimensions") };
    let c = packed / 3;
    let width = c / heads;
    let places: Vec<_> = (0..tokens).map(|token| placed(token, shape)).collect();
    let mut out = Vec::with_capacity(n * tokens * c);
    for image in 0..n {
        for (window, place, region) in &places {
            let members: Vec<usize> = (0..tokens).filter(|&token| places[token].0 == *window).collect();
            let token = *members.iter().find(|&&token| places[token].1 == *place).unwrap();
            for head in 0..heads {
                let part = |token: usize, part: usize| {
                    &qkv.values[(image * tokens + token) * packed + part * c + head * width..][..width]
                };
                let bias = |j: usize| {
                    let (_, key_place, key_region) = places[members[j]];
                    let apart = if key_region == *region { 0.0 } else { -100.0 };
                    bias.values[(head * area + place) * area + key_place] + apart
                };
                let (k, v) = (|j: usize| part(members[j], 1), |j: usize| part(members[j], 2));
                out.extend(attended(part(token, 0), &k, &v, &bias, members.len()));
            }
        }
    }
    Array::new(&[n, tokens, c], out)
}

fn check_window([n, heads, width]: [usize; 3], shape: WindowShape, scale: f64, seed: u64) {
    let area = shape.window * shape.window;
    let qkv = Array::random(&[n, shape.height * shape.width, 3 * heads * width], seed).map(|x| x * scale);
    let bias = Array::random(&[heads, area, area], seed ^ 1);
    check(
        [qkv.clone(), bias.clone()],
        |[qkv, bias]| plain(qkv, bias, shape),
        |_, [qkv, bias]| {
            let result = kernels::window_attention(qkv, bias, shape)?;
            let prepared = kernels::window_attention_with(qkv, &kernels::WindowBias::new(bias)?, shape)?;
            assert_eq!(Array::from(&prepared).values, Array::from(&result).values);
            Ok(result)
        },
    );
    check_prepared(&qkv, &bias, shape);
}

/// With a bias that was laid out before, which gets no gradient.
fn check_prepared(qkv: &Array, bias: &Array, shape: WindowShape) {
    // Of numbers that all types hold.
    let bias = bias.map(|x| (64.0 * x).round() / 64.0);
    check(
        [qkv.clone()],
        |[qkv]| plain(qkv, &bias, shape),
        |at, [qkv]| kernels::window_attention_with(qkv, &kernels::WindowBias::new(&bias.tensor(at, false))?, shape),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn window_attention(
        n in 0usize..3, down in 1usize..4, across in 1usize..4, window in 1usize..4, shift in 0usize..4,
        heads in 1usize..3, width in 1usize..20, scale in 0.1f64..2.0, seed: u64,
    ) {
        let shape = WindowShape { height: down * window, width: across * window, window, shift: shift % window };
        check_window([n, heads, width], shape, scale, seed);
    }
}

/// The windows of the published models.
#[test]
fn wide_windows() {
    check_window([1, 1, 8], WindowShape { height: 14, width: 7, window: 7, shift: 3 }, 1.0, 1);
    check_window([1, 2, 32], WindowShape { height: 7, width: 7, window: 7, shift: 0 }, 1.0, 3);
    check_window([1, 1, 3], WindowShape { height: 12, width: 12, window: 12, shift: 0 }, 1.0, 2);
}

#[test]
fn wrong_shapes_are_named() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let error = |qkv: &[usize], bias: &[usize], height: usize| {
        let shape = WindowShape { height, width: 4, window: 2, shift: 0 };
        kernels::window_attention(&zeros(qkv), &zeros(bias), shape).unwrap_err().to_string()
    };
    let found = error(&[1, 20, 6], &[1, 4, 4], 5);
    assert!(found.contains("window_attention") && found.contains("window that divides"), "{found}");
    let found = error(&[1, 15, 6], &[1, 4, 4], 4);
    assert!(found.contains("`qkv`") && found.contains("[1, 16, 6]"), "{found}");
    let found = error(&[1, 16, 6], &[1, 9, 9], 4);
    assert!(found.contains("`bias`") && found.contains("[1, 4, 4]"), "{found}");
    let found = error(&[1, 16, 8], &[2, 4, 4], 4);
    assert!(found.contains("heads"), "{found}");
    let found = kernels::WindowBias::new(&zeros(&[1, 4, 5])).unwrap_err().to_string();
    assert!(found.contains("`bias`") && found.contains("[1, 4, 4]"), "{found}");
    for empty in [[2, 0, 0], [0, 4, 4]] {
        let found = kernels::WindowBias::new(&zeros(&empty)).unwrap_err().to_string();
        assert!(found.contains("`bias`") && found.contains("above 0"), "{found}");
    }
    let bias = kernels::WindowBias::new(&zeros(&[1, 4, 4])).unwrap();
    let shape = WindowShape { height: 4, width: 4, window: 4, shift: 0 };
    let found = kernels::window_attention_with(&zeros(&[1, 16, 6]), &bias, shape).unwrap_err().to_string();
    assert!(found.contains("`bias`") && found.contains("[1, 16, 16]"), "{found}");
}
