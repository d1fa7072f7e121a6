use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_kernels::{self as kernels, Dropout, Dropped, KeyValueCache};

use crate::check::{Array, At, assert_close, check};

/// What hides a key.
const HIDDEN: f64 = -10_000.0;

/// Numbers of one head: a query or a key or a value per row.
type Rows<'a> = &'a dyn Fn(usize) -> &'a [f64];

/// What one query sees of `keys` positions: Σ softmax(q·k / √d + bias) v.
pub(crate) fn attended(q: &[f64], k: Rows, v: Rows, bias: &dyn Fn(usize) -> f64, keys: usize) -> Vec<f64> {
    let scale = (q.len() as f64).sqrt();
    let dot = |key: &[f64]| q.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() / scale;
    let scores: Vec<f64> = (0..keys).map(|j| dot(k(j)) + bias(j)).collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![0.0; q.len()];
    for (j, weight) in weights.iter().enumerate() {
        out.iter_mut().zip(v(j)).for_each(|(out, v)| *out += weight / total * v);
    }
    out
}

/// Biases of `[rows, keys]`: small numbers, and what hides a key in rows that hide some, all or none. With `first` the first
/// key is seen unless all are hidden: a causal row that sees only some of the hidden keys has scores near −10000 alone, where
/// `f32` keeps no more than three digits after the point.
fn key_bias(rows: usize, keys: usize, first: bool, seed: u64) -> Array {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut values = Vec::with_capacity(rows * keys);
    for _ in 0..rows {
        let hidden = rng.random_range(0..4);
        values.extend((0..keys).map(|key| match hidden {
            0 => HIDDEN,
            1 if rng.random_bool(0.5) && !(first && key == 0) => HIDDEN,
            2 => f64::from(rng.random_range(-4..5)) / 4.0,
            _ => 0.0,
        }));
    }
    Array::new(&[rows, keys], values)
}

fn plain_self_attention(qkv: &Array, bias: &Array, heads: usize, causal: bool) -> Array {
    let [b, t, packed] = qkv.shape[..] else { panic!("three dimensions") };
    let c = packed / 3;
    let width = c / heads;
    let mut out = Vec::with_capacity(b * t * c);
    for i in 0..b {
        for query in 0..t {
            for head in 0..heads {
                let part =
                    |row: usize, part: usize| &qkv.values[(i * t + row) * packed + part * c + head * width..][..width];
                let keys = if causal { query + 1 } else { t };
                let bias = |key: usize| bias.values[i * t + key];
                out.extend(attended(part(query, 0), &|key| part(key, 1), &|key| part(key, 2), &bias, keys));
            }
        }
    }
    Array::new(&[b, t, c], out)
}

fn plain_cross_attention(q: &Array, kv: &Array, index: &[u32], bias: &Array, heads: usize) -> Array {
    let [pairs, t, c] = q.shape[..] else { panic!("three dimensions") };
    let l = kv.shape[1];
    let width = c / heads;
    let mut out = Vec::with_capacity(pairs * t * c);
    for (pair, &image) in index.iter().enumerate() {
        for query in 0..t {
            for head in 0..heads {
                let q = &q.values[(pair * t + query) * c + head * width..][..width];
                let part = |row: usize, part: usize| {
                    let row = image as usize * l + row;
                    &kv.values[row * 2 * c + part * c + head * width..][..width]
                };
                let bias = |key: usize| bias.values[pair * l + key];
                out.extend(attended(q, &|key| part(key, 0), &|key| part(key, 1), &bias, l));
            }
        }
    }
    Array::new(&[pairs, t, c], out)
}

fn check_self_attention([b, t, heads, width]: [usize; 4], causal: bool, scale: f64, seed: u64) {
    let qkv = Array::random(&[b, t, 3 * heads * width], seed).map(|x| x * scale);
    let bias = key_bias(b, t, causal, seed ^ 1);
    check(
        [qkv],
        |[qkv]| plain_self_attention(qkv, &bias, heads, causal),
        |at, [qkv]| kernels::self_attention(qkv, &bias.tensor(at, true), heads, causal, None),
    );
}

fn check_cross_attention([pairs, n, t, l, heads, width]: [usize; 6], scale: f64, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let index: Vec<u32> = (0..pairs).map(|_| rng.random_range(0..n) as u32).collect();
    let q = Array::random(&[pairs, t, heads * width], seed ^ 1).map(|x| x * scale);
    let kv = Array::random(&[n, l, 2 * heads * width], seed ^ 2).map(|x| x * scale);
    let bias = key_bias(pairs, l, false, seed ^ 3);
    check(
        [q, kv],
        |[q, kv]| plain_cross_attention(q, kv, &index, &bias, heads),
        |at, [q, kv]| kernels::cross_attention(q, kv, &index, &bias.tensor(at, true), heads, None),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn self_attention(
        b in 0usize..4, t in 1usize..20, heads in 1usize..4, width in 1usize..36, causal: bool, scale in 0.1f64..2.0,
        seed: u64,
    ) {
        check_self_attention([b, t, heads, width], causal, scale, seed);
    }

    #[test]
    fn cross_attention(
        pairs in 0usize..4, n in 1usize..4, t in 1usize..12, l in 1usize..24, heads in 1usize..4, width in 1usize..36,
        scale in 0.1f64..2.0, seed: u64,
    ) {
        check_cross_attention([pairs, n, t, l, heads, width], scale, seed);
    }

    #[test]
    fn cached_attention(
        b in 1usize..4, t in 2usize..20, heads in 1usize..4, width in 1usize..36, spare in 0usize..3, seed: u64,
    ) {
        check_cached_attention([b, t, heads, width], spare, seed);
    }
}

/// Lengths on both sides of the tiles that kernels work in, and the widths of the published models.
#[test]
fn long_attention() {
    check_self_attention([1, 67, 1, 64], true, 1.0, 1);
    check_self_attention([1, 130, 1, 9], false, 1.0, 2);
    check_self_attention([1, 130, 1, 8], true, 1.0, 3);
    check_self_attention([1, 33, 1, 80], false, 1.0, 4);
    check_cross_attention([2, 1, 3, 145, 1, 16], 1.0, 5);
    check_cross_attention([1, 1, 70, 10, 2, 16], 1.0, 6);
}

/// As many as a text model has: values and gradients against the same operation in `f64`.
#[test]
fn a_thousand_positions() {
    let (t, width) = (1024, 16);
    let qkv = Array::random(&[1, t, 3 * width], 1);
    let wanted = plain_self_attention(&qkv, &Array::new(&[1, t], vec![0.0; t]), 1, true);
    for at in At::all().filter(|at| matches!(at.dtype, DType::F32 | DType::F64)) {
        at.computer.run(|| {
            let bias = Tensor::zeros((1, t), DType::F32, &at.device).unwrap();
            let found = kernels::self_attention(&qkv.tensor(&at, false), &bias, 1, true, None).unwrap();
            assert_close(&Array::from(&found), &wanted, at.tolerance(), &format!("{at:?}"));
        });
    }
}

/// Decodes a few positions at a time, with the rows exchanged on the way.
fn check_cached_attention([b, t, heads, width]: [usize; 4], spare: usize, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let qkv = Array::random(&[b, t, 3 * heads * width], seed);
    let bias = key_bias(b, t, true, seed ^ 1);
    let rows: Vec<u32> = (0..b + 1).map(|_| rng.random_range(0..b) as u32).collect();
    let exchanged = rng.random_range(1..t);
    let mut steps = Vec::new();
    while steps.iter().sum::<usize>() < exchanged {
        steps.push(rng.random_range(1..=exchanged - steps.iter().sum::<usize>()));
    }
    steps.extend((exchanged..t).map(|_| 1));
    let pick = |x: &Array| {
        let row = x.values.len() / b;
        let values = rows.iter().flat_map(|&i| x.values[i as usize * row..][..row].to_vec()).collect();
        Array::new(&[&[rows.len()], &x.shape[1..]].concat(), values)
    };
    for at in At::all() {
        let what = format!("{:?} {:?} in steps {steps:?}", at.computer, at.dtype);
        // What the float type keeps of the numbers.
        let numbers = Array::from(&qkv.tensor(&at, false));
        let before = plain_self_attention(&numbers, &bias, heads, true);
        let after = plain_self_attention(&pick(&numbers), &pick(&bias), heads, true);
        at.computer.run(|| {
            let mut cache = KeyValueCache::new(b, t + spare, heads * width, at.dtype, &at.device).unwrap();
            let (mut qkv, mut bias, mut wanted) = (qkv.clone(), bias.clone(), &before);
            for &step in &steps {
                let past = cache.len();
                if past == exchanged {
                    cache.select(&rows).unwrap();
                    (qkv, bias, wanted) = (pick(&qkv), pick(&bias), &after);
                }
                let new = qkv.tensor(&at, false).narrow(1, past, step).unwrap();
                let seen = bias.tensor(&at, false).narrow(1, 0, past + step).unwrap();
                let found = kernels::cached_attention(&new, &mut cache, &seen, heads).unwrap();
                let wanted = Tensor::from_slice(&wanted.values, wanted.shape.as_slice(), &Device::Cpu).unwrap();
                let wanted = Array::from(&wanted.narrow(1, past, step).unwrap());
                assert_close(&Array::from(&found), &wanted, at.tolerance(), &what);
                assert_eq!(found.dtype(), at.dtype);
            }
            assert_eq!((cache.len(), cache.capacity()), (t, t + spare));
        });
    }
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn wrong_shapes_are_named() {
    let error = |result: candle_core::Result<Tensor>| result.unwrap_err().to_string();
    let found = error(kernels::self_attention(&zeros(&[2, 3, 12]), &zeros(&[2, 4]), 2, false, None));
    assert!(found.contains("self_attention") && found.contains("key_bias") && found.contains("[2, 3]"), "{found}");
    let found = error(kernels::self_attention(&zeros(&[2, 3, 12]), &zeros(&[2, 3]), 3, false, None));
    assert!(found.contains("heads") && found.contains("divisor"), "{found}");
    let found =
        error(kernels::cross_attention(&zeros(&[2, 3, 4]), &zeros(&[1, 5, 6]), &[0, 0], &zeros(&[2, 5]), 2, None));
    assert!(found.contains("cross_attention") && found.contains("`kv`") && found.contains("[1, 5, 8]"), "{found}");
    let found =
        error(kernels::cross_attention(&zeros(&[2, 3, 4]), &zeros(&[1, 5, 8]), &[0, 1], &zeros(&[2, 5]), 2, None));
    assert!(found.contains("index") && found.contains("2 numbers below 1"), "{found}");
    let found = error(kernels::cross_attention(&zeros(&[1, 3, 4]), &zeros(&[1, 0, 8]), &[0], &zeros(&[1, 0]), 2, None));
    assert!(found.contains("`kv`") && found.contains("at least one key"), "{found}");
    let half = zeros(&[1, 5, 8]).to_dtype(DType::BF16).unwrap();
    let found = error(kernels::cross_attention(&zeros(&[1, 3, 4]), &half, &[0], &zeros(&[1, 5]), 2, None));
    assert!(found.contains("F32") && found.contains("BF16"), "{found}");
}

#[test]
fn a_cache_says_what_does_not_fit() {
    let mut cache = KeyValueCache::new(2, 3, 4, DType::F32, &Device::Cpu).unwrap();
    let mut step = |qkv: &[usize], bias: &[usize]| {
        let found = kernels::cached_attention(&zeros(qkv), &mut cache, &zeros(bias), 2);
        (found.map_err(|error| error.to_string()), cache.len())
    };
    assert!(step(&[2, 2, 12], &[2, 2]).0.is_ok());
    let (found, len) = step(&[2, 2, 12], &[2, 4]);
    let found = found.unwrap_err();
    assert!(found.contains("cache") && found.contains("room for 2") && found.contains("2 of 3"), "{found}");
    assert_eq!(len, 2, "a step that fails leaves the cache as it was");
    let found = step(&[1, 1, 12], &[1, 3]).0.unwrap_err();
    assert!(found.contains("`qkv`") && found.contains('2'), "{found}");
    let found = step(&[2, 1, 12], &[2, 2]).0.unwrap_err();
    assert!(found.contains("key_bias") && found.contains("[2, 3]"), "{found}");
    assert!(step(&[2, 1, 12], &[2, 3]).0.is_ok());
    let found = cache.select(&[0, 2]).unwrap_err().to_string();
    assert!(found.contains("rows") && found.contains("below 2"), "{found}");
}

/// What dropout multiplies the probabilities of `heads` heads by, `[heads, queries, keys]`: what it does to ones.
fn factors(dropout: Dropout, heads: usize, queries: usize, keys: usize) -> Vec<f64> {
    let (width, seen) = (queries.max(keys), Tensor::zeros((1, keys), DType::F64, &Device::Cpu).unwrap());
    let q = Tensor::zeros((1, queries, heads * width), DType::F64, &Device::Cpu).unwrap();
    // Equal scores, and a value for each key that is its unit vector: the result is the probabilities.
    let unit = Tensor::eye(width, DType::F64, &Device::Cpu).unwrap().narrow(0, 0, keys).unwrap();
    let values = Tensor::cat(&vec![&unit; heads], 1).unwrap();
    let kv = Tensor::cat(&[&values.zeros_like().unwrap(), &values], 1).unwrap().unsqueeze(0).unwrap();
    let found = kernels::cross_attention(&q, &kv, &[0], &seen, heads, Some(Dropped::AtRandom(dropout))).unwrap();
    let found = found.reshape((queries, heads, width)).unwrap().narrow(2, 0, keys).unwrap();
    let found = (found.transpose(0, 1).unwrap() * keys as f64).unwrap();
    found.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn dropout_is_the_same_on_every_path() {
    let dropout = Dropout { probability: 0.3, seed: 5 };
    for (t, heads, width) in [(1, 2, 4), (7, 2, 8), (70, 3, 8)] {
        let kept = factors(dropout, 2 * heads, t, t);
        let qkv = Array::random(&[2, t, 3 * heads * width], 1);
        // The first key is seen: of scores near −10000 alone a sum in the type of the numbers keeps too few digits.
        let mut bias = key_bias(2, t, false, 2);
        bias.values.iter_mut().step_by(t).for_each(|first| *first = 0.0);
        let plain = |qkv: &Array| dropped_self_attention(qkv, &bias, heads, &kept);
        check(
            [qkv],
            |[qkv]| plain(qkv),
            |at, [qkv]| {
                let dropped = Some(Dropped::AtRandom(dropout));
                kernels::self_attention(qkv, &bias.tensor(at, true), heads, false, dropped)
            },
        );
    }
    let share = factors(dropout, 4, 60, 60).iter().filter(|factor| **factor == 0.0).count() as f64 / 14_400.0;
    assert!((share - 0.3).abs() < 0.02, "{share}");
    let wrong = Some(Dropped::AtRandom(Dropout { probability: 1.0, seed: 0 }));
    let error = kernels::self_attention(&zeros(&[1, 2, 6]), &zeros(&[1, 2]), 1, false, wrong).unwrap_err().to_string();
    assert!(error.contains("probability") && error.contains("below 1"), "{error}");
}

fn dropped_self_attention(qkv: &Array, bias: &Array, heads: usize, kept: &[f64]) -> Array {
    let [b, t, packed] = qkv.shape[..] else { panic!("three dimensions") };
    let c = packed / 3;
    let width = c / heads;
    let mut out = vec![0.0; b * t * c];
    for i in 0..b {
        for head in 0..heads {
            let part =
                |row: usize, part: usize| &qkv.values[(i * t + row) * packed + part * c + head * width..][..width];
            for query in 0..t {
                let of_key = |key: usize| kept[((i * heads + head) * t + query) * t + key];
                let values: Vec<Vec<f64>> =
                    (0..t).map(|key| part(key, 2).iter().map(|x| x * of_key(key)).collect()).collect();
                let bias = |key: usize| bias.values[i * t + key];
                let found = attended(part(query, 0), &|key| part(key, 1), &|key| &values[key], &bias, t);
                out[(i * t + query) * c + head * width..][..width].copy_from_slice(&found);
            }
        }
    }
    Array::new(&[b, t, c], out)
}
