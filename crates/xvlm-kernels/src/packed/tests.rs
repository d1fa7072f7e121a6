//! Tests of linear layers for inference.

use std::borrow::Cow;

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::stored::DIRECT;
use super::*;
use crate::mapped::MappedFile;
use crate::numbers::StoredBytes;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn greatest_difference(a: &Tensor, b: &Tensor) -> f32 {
    numbers(a).iter().zip(numbers(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn epilogues(residual: &Tensor) -> [Epilogue<'_>; 4] {
    [Epilogue::Nothing, Epilogue::Gelu, Epilogue::QuickGelu, Epilogue::Add(residual)]
}

fn compare(rows: usize, inputs: usize, outputs: usize, seed: u64) {
    let (x, weight) = (random(&[rows, inputs], seed), random(&[outputs, inputs], seed ^ 1));
    let (bias, residual) = (random(&[outputs], seed ^ 2), random(&[rows, outputs], seed ^ 3));
    for bias in [Some(&bias), None] {
        let plain = || match bias {
            Some(bias) => linear(&x, &weight, bias),
            None => linear_without_bias(&x, &weight),
        };
        let packed = PackedLinear::new(&weight, bias, PackedWeights::AsGiven).unwrap();
        for epilogue in epilogues(&residual) {
            // To the bit: the same sums and the same curves.
            let (found, wanted) = (packed.forward(&x, epilogue).unwrap(), epilogue.apply(plain().unwrap()).unwrap());
            assert_eq!(numbers(&found), numbers(&wanted), "{rows} rows, {inputs} -> {outputs}");
        }
        let half = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
        let packed = PackedLinear::new(&half(&weight), bias.map(half).as_ref(), PackedWeights::AsGiven).unwrap();
        let residual = half(&residual);
        for epilogue in epilogues(&residual) {
            let found = packed.forward(&half(&x), epilogue).unwrap();
            let exact = |x: &Tensor| half(x).to_dtype(DType::F32).unwrap();
            let product = linear(&exact(&x), &exact(&weight), &bias.map_or_else(|| bias_of_zeros(outputs), exact));
            let wide = residual.to_dtype(DType::F32).unwrap();
            let epilogue = match epilogue {
                Epilogue::Add(_) => Epilogue::Add(&wide),
                other => other,
            };
            let wanted = epilogue.apply(product.unwrap()).unwrap();
            for (found, wanted) in numbers(&found).iter().zip(numbers(&wanted)) {
                // One rounding of the result; two where the epilogue follows a result that was written.
                let allowed = 2f32.powi(-7) * (wanted.abs() + 1.0);
                assert!((found - wanted).abs() <= allowed, "{found} for {wanted}");
            }
        }
    }
}

fn bias_of_zeros(outputs: usize) -> Tensor {
    Tensor::zeros(outputs, DType::F32, &Device::Cpu).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn layers_of_any_size(rows in 0usize..40, inputs in 1usize..70, outputs in 1usize..70, seed: u64) {
        compare(rows, inputs, outputs, seed);
    }

    /// What rounding loses is half a step of a row of `x` for each weight, and half a step of a weight for each number.
    #[test]
    fn bytes_are_off_by_their_steps(rows in 0usize..40, inputs in 1usize..150, outputs in 1usize..70, seed: u64) {
        let (x, weight) = (random(&[rows, inputs], seed), random(&[outputs, inputs], seed ^ 1));
        let (bias, residual) = (random(&[outputs], seed ^ 2), random(&[rows, outputs], seed ^ 3));
        let packed = PackedLinear::new(&weight, Some(&bias), PackedWeights::Int8).unwrap();
        let weight = packed.unpacked().unwrap();
        let wanted = linear(&x, &weight, &bias).unwrap();
        let half_a_step = 0.5 * 2.0 / 255.0;
        let sums = numbers(&weight.abs().unwrap().sum(1).unwrap());
        for epilogue in epilogues(&residual) {
            let wanted = epilogue.apply(wanted.clone()).unwrap();
            let found = packed.forward(&x, epilogue).unwrap();
            for (i, (found, wanted)) in numbers(&found).iter().zip(numbers(&wanted)).enumerate() {
                // No curve is steeper than 1.13.
                let allowed = 1.13 * half_a_step * sums[i % outputs] + 1e-4;
                assert!((found - wanted).abs() <= allowed, "{found} for {wanted}, {allowed} allowed");
            }
        }
    }
}

/// Rows of `outputs` lines each as they lie in a file, from an offset of bytes on, in memory that stays.
fn in_memory(weight: &Tensor, outputs: &[usize], stored: DType, offset: usize) -> Vec<StoredTensor> {
    let (mut bytes, mut ranges) = (vec![0; offset], Vec::new());
    let mut line = 0;
    for count in outputs {
        let start = bytes.len();
        let part = weight.narrow(0, line, *count).unwrap().contiguous().unwrap();
        part.to_dtype(stored).unwrap().write_bytes(&mut bytes).unwrap();
        ranges.push((start..bytes.len(), [*count, weight.dim(1).unwrap()]));
        line += count;
    }
    let bytes = Arc::new(StoredBytes::Memory(Cow::Borrowed(bytes.leak())));
    let tensor = |(range, shape): (_, [usize; 2])| StoredTensor::new(Arc::clone(&bytes), range, stored, &shape);
    ranges.into_iter().map(|range| tensor(range).unwrap()).collect()
}

/// To the bit, in every use: before panels are made and after.
fn compare_stored(
    (rows, inputs, outputs): (usize, usize, &[usize]),
    (stored, offset): (DType, usize),
    (dtype, kept_in): (DType, PackedWeights),
) {
    let count = outputs.iter().sum();
    let (x, weight) = (random(&[rows, inputs], 1), random(&[count, inputs], 2));
    let (bias, residual) = (random(&[count], 3), random(&[rows, count], 4));
    let parts = in_memory(&weight, outputs, stored, offset);
    let cast = |x: &Tensor| x.to_dtype(dtype).unwrap();
    let (x, bias, residual) = (cast(&x), cast(&bias), cast(&residual));
    let plain = cast(&weight.to_dtype(stored).unwrap());
    let wanted = PackedLinear::new(&plain, Some(&bias), kept_in).unwrap();
    let weight = numbers(&wanted.unpacked().unwrap());
    for epilogue in epilogues(&residual) {
        let layer = PackedLinear::stored(parts.clone(), Some(&bias), kept_in, dtype, &Device::Cpu).unwrap();
        let wanted = numbers(&wanted.forward(&x, epilogue).unwrap());
        for turn in 0..4 {
            let y = numbers(&layer.forward(&x, epilogue).unwrap());
            assert!(
                y == wanted,
                "{rows} rows, {inputs} -> {outputs:?}, {stored:?} + {offset}, {dtype:?}, {kept_in:?}, turn {turn}"
            );
            assert!(numbers(&layer.unpacked().unwrap()) == weight, "{inputs} -> {outputs:?}, turn {turn}");
        }
    }
}

#[test]
fn stored_weights_give_what_packed_ones_do() {
    let sizes: [(usize, usize, &[usize]); 8] = [
        (1, 5, &[33]),
        (10, 768, &[64, 64, 32]),
        (130, 515, &[7, 20, 3]),
        (3, 1025, &[16, 48]),
        (150, 2049, &[130]),
        (1000, 67, &[64]),
        (9, 31, &[1, 1, 15, 40]),
        (0, 4, &[4]),
    ];
    for size in sizes {
        for stored in [(DType::F32, 0), (DType::F32, 2), (DType::BF16, 0), (DType::BF16, 1), (DType::F16, 4)] {
            for computed in [
                (DType::F32, PackedWeights::AsGiven),
                (DType::BF16, PackedWeights::AsGiven),
                (DType::F32, PackedWeights::Int8),
            ] {
                compare_stored(size, stored, computed);
            }
        }
    }
}

/// As many panels as are packed together, as deep as a block; and more rows than a block has.
#[test]
fn stored_weights_fill_the_memory_of_a_block() {
    let bf16 = (DType::BF16, PackedWeights::AsGiven);
    compare_stored((3, 768, &[2100]), (DType::F32, 0), (DType::F32, PackedWeights::AsGiven));
    compare_stored((3, 1536, &[2100]), (DType::F32, 0), bf16);
    compare_stored((200, 800, &[300]), (DType::BF16, 0), (DType::F32, PackedWeights::AsGiven));
}

#[test]
fn stored_weights_in_memory_of_their_own_are_packed_at_once() {
    let (x, weight) = (random(&[3, 20], 1), random(&[9, 20], 2));
    let mut bytes = Vec::new();
    weight.write_bytes(&mut bytes).unwrap();
    let bytes = Arc::new(StoredBytes::Memory(bytes.into()));
    let part = StoredTensor::new(Arc::clone(&bytes), 0..bytes.len(), DType::F32, &[9, 20]).unwrap();
    let layer = PackedLinear::stored(vec![part], None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
    assert_eq!(Arc::strong_count(&bytes), 1, "{layer:?}");
    let wanted = PackedLinear::new(&weight, None, PackedWeights::AsGiven).unwrap();
    let forward = |layer: &PackedLinear| numbers(&layer.forward(&x, Epilogue::Nothing).unwrap());
    assert_eq!(forward(&layer), forward(&wanted));
}

#[test]
fn stored_weights_of_other_types_are_read_at_once() {
    let (x, weight) = (random(&[3, 20], 1), random(&[9, 20], 2));
    let parts = in_memory(&weight, &[9], DType::F64, 0);
    let layer = PackedLinear::stored(parts, None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
    let wanted = PackedLinear::new(&weight, None, PackedWeights::AsGiven).unwrap();
    let forward = |layer: &PackedLinear| numbers(&layer.forward(&x, Epilogue::Nothing).unwrap());
    assert_eq!(forward(&layer), forward(&wanted));
    assert!(!format!("{layer:?}").contains("stored"), "{layer:?}");
}

#[test]
fn threads_that_share_a_stored_layer_agree() {
    let (x, weight) = (random(&[20, 300], 1), random(&[200, 300], 2));
    let parts = in_memory(&weight, &[100, 100], DType::F32, 0);
    let layer = PackedLinear::stored(parts, None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
    let forward = |_| numbers(&layer.forward(&x, Epilogue::Nothing).unwrap());
    let found: Vec<_> = (0..32).into_par_iter().map(forward).collect();
    assert!(found.iter().all(|y| *y == found[0]));
}

#[test]
fn a_file_that_is_written_to_is_told() {
    let path = std::env::temp_dir().join(format!("xvlm-stored-{}", std::process::id()));
    let weight = random(&[40, 33], 1);
    let mut bytes = Vec::new();
    weight.write_bytes(&mut bytes).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    let layer = || {
        let file = Arc::new(StoredBytes::File(MappedFile::open(&path).unwrap()));
        let tensor = StoredTensor::new(file, 0..bytes.len(), DType::F32, &[40, 33]).unwrap();
        PackedLinear::stored(vec![tensor], None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap()
    };
    let x = random(&[2, 33], 2);
    let (settled, unsettled, unused) = (layer(), layer(), layer());
    let forward = |layer: &PackedLinear| layer.forward(&x, Epilogue::Nothing);
    let wanted = numbers(&forward(&settled).unwrap());
    (0..DIRECT).for_each(|_| assert_eq!(numbers(&forward(&settled).unwrap()), wanted));
    (0..DIRECT).for_each(|_| assert_eq!(numbers(&forward(&unsettled).unwrap()), wanted));
    let file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    std::io::Write::write_all(&mut &file, b"more").unwrap();
    // Where AVX-512 is missing, all have been read before.
    let is_read_late = format!("{unused:?}").contains("stored");
    for layer in [&unused, &unsettled, &unsettled] {
        match forward(layer) {
            Err(error) => {
                let error = error.to_string();
                assert!(is_read_late && error.contains(&path.display().to_string()), "{error}");
            }
            Ok(y) => assert!(!is_read_late && numbers(&y) == wanted),
        }
    }
    assert_eq!(numbers(&forward(&settled).unwrap()), wanted);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_layer_that_could_not_be_packed_is_packed_later() {
    let path = std::env::temp_dir().join(format!("xvlm-packed-later-{}", std::process::id()));
    let mut bytes = Vec::new();
    random(&[40, 33], 1).write_bytes(&mut bytes).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    let mapped = Arc::new(StoredBytes::File(MappedFile::open(&path).unwrap()));
    let tensor = StoredTensor::new(mapped, 0..bytes.len(), DType::F32, &[40, 33]).unwrap();
    let layer = PackedLinear::stored(vec![tensor], None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
    let (x, is_read_late) = (random(&[2, 33], 2), format!("{layer:?}").contains("stored"));
    let forward = || layer.forward(&x, Epilogue::Nothing);
    (0..DIRECT).for_each(|_| drop(forward().unwrap()));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(forward().is_err(), is_read_late);
    file.set_modified(time).unwrap();
    forward().unwrap();
    assert!(!format!("{layer:?}").contains("stored"), "{layer:?}");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn stored_weights_that_do_not_fit_are_named() {
    let (weight, device) = (random(&[6, 5], 1), &Device::Cpu);
    let stored = |parts: Vec<StoredTensor>, bias: Option<&Tensor>| {
        PackedLinear::stored(parts, bias, PackedWeights::AsGiven, DType::F32, device).unwrap_err().to_string()
    };
    let part = |lines: usize, inputs: usize| in_memory(&random(&[lines, inputs], 1), &[lines], DType::F32, 0).remove(0);
    let error = stored(vec![part(2, 5), part(3, 4)], None);
    assert!(error.contains("`weight` should have shape [N, 5]") && error.contains("[3, 4]"), "{error}");
    assert!(stored(Vec::new(), None).contains("both above 0"));
    let error = stored(in_memory(&weight, &[6], DType::F32, 0), Some(&random(&[5], 1)));
    assert!(error.contains("packed_linear: `bias`") && error.contains("[6]"), "{error}");
    let bytes = Arc::new(StoredBytes::Memory(vec![0; 100].into()));
    let tensor = |range| StoredTensor::new(Arc::clone(&bytes), range, DType::F32, &[5, 5]);
    assert!(tensor(0..100).is_ok());
    assert!(tensor(4..104).unwrap_err().to_string().contains("expected a range of 100, found 4..104"));
    assert!(tensor(0..96).unwrap_err().to_string().contains("found 96"));
}

#[test]
fn layers_of_several_blocks() {
    for (rows, inputs, outputs) in [(2049, 5, 33), (3, 2048, 15), (130, 515, 7), (1, 1025, 5000), (3, 4099, 35)] {
        compare(rows, inputs, outputs, 7);
    }
}

/// Whole numbers that bytes hold exactly, in more than a block.
#[test]
fn sums_of_bytes_are_exact() {
    let (rows, inputs, outputs) = (17, 4103, 37);
    let whole = |count: usize, least: i32, steps: i32, salt: usize| {
        (0..count).map(|i| (least + ((i * 7919 + salt) % steps as usize) as i32) as f32).collect::<Vec<_>>()
    };
    let (mut x, mut weight) = (whole(rows * inputs, -100, 256, 1), whole(outputs * inputs, -127, 255, 5));
    x.chunks_mut(inputs).for_each(|row| (row[0], row[1]) = (-100.0, 155.0));
    weight.chunks_mut(inputs).for_each(|row| row[2] = 127.0);
    let x = Tensor::from_vec(x, (rows, inputs), &Device::Cpu).unwrap();
    let weight = Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu).unwrap();
    let packed = PackedLinear::new(&weight, None, PackedWeights::Int8).unwrap();
    let found = packed.forward(&x, Epilogue::Nothing).unwrap();
    let exact = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    let wanted = exact(&x).matmul(&exact(&weight).t().unwrap()).unwrap();
    let off =
        numbers(&found).iter().zip(numbers(&wanted)).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0f32, f32::max);
    assert!(off < 1e-6, "{off}");
}

#[test]
fn the_longest_sums_of_bytes_do_not_wrap() {
    let row = |x: f32, count: usize| Tensor::full(x, (1, count), &Device::Cpu).unwrap();
    for sign in [1.0, -1.0] {
        let packed = PackedLinear::new(&row(sign * 127.0, MOST_INPUTS), None, PackedWeights::Int8).unwrap();
        let found = numbers(&packed.forward(&row(255.0, MOST_INPUTS), Epilogue::Nothing).unwrap())[0];
        let wanted = sign * 255.0 * 127.0 * MOST_INPUTS as f32;
        assert!((found / wanted - 1.0).abs() < 0.01, "{found} for {wanted}");
    }
    let error = PackedLinear::new(&row(1.0, MOST_INPUTS + 1), None, PackedWeights::Int8).unwrap_err().to_string();
    assert!(error.contains("K at most 66311") && error.contains("66312"), "{error}");
    assert!(PackedLinear::new(&row(1.0, MOST_INPUTS + 1), None, PackedWeights::AsGiven).is_ok());
}

#[test]
fn gradients_go_through() {
    let (x, weight, bias) = (random(&[9, 33], 1), random(&[40, 33], 2), random(&[40], 3));
    let (x, residual) = (candle_core::Var::from_tensor(&x).unwrap(), random(&[9, 40], 4));
    for weights in [PackedWeights::AsGiven, PackedWeights::Int8] {
        let packed = PackedLinear::new(&weight, Some(&bias), weights).unwrap();
        let weight = packed.unpacked().unwrap();
        for epilogue in epilogues(&residual) {
            let slope = |y: Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap().get(&x).unwrap().clone();
            let found = slope(packed.forward(&x, epilogue).unwrap());
            let wanted = slope(epilogue.apply(linear(&x, &weight, &bias).unwrap()).unwrap());
            let allowed = if weights == PackedWeights::Int8 { 1.0 } else { 1e-4 };
            assert!(greatest_difference(&found, &wanted) < allowed, "{:?}", greatest_difference(&found, &wanted));
        }
    }
}

#[test]
fn gradients_go_through_stored_weights() {
    let (x, weight) = (random(&[9, 33], 1), random(&[40, 33], 2));
    let x = candle_core::Var::from_tensor(&x).unwrap();
    let wanted = PackedLinear::new(&weight, None, PackedWeights::AsGiven).unwrap();
    let parts = in_memory(&weight, &[40], DType::F32, 0);
    let layer = PackedLinear::stored(parts, None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
    let slope = |layer: &PackedLinear| {
        let y = layer.forward(&x, Epilogue::Gelu).unwrap();
        numbers(y.sqr().unwrap().sum_all().unwrap().backward().unwrap().get(&x).unwrap())
    };
    (0..4).for_each(|_| assert_eq!(slope(&layer), slope(&wanted)));
}

#[test]
fn numbers_that_are_not_finite_are_not_lost() {
    let forward = |x: Tensor, weight: Tensor| {
        let packed = PackedLinear::new(&weight, None, PackedWeights::Int8).unwrap();
        numbers(&packed.forward(&x, Epilogue::Nothing).unwrap())
    };
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut poisoned = vec![0.5f32; 40];
        poisoned[27] = poison;
        let poisoned = Tensor::from_vec(poisoned, (2, 20), &Device::Cpu).unwrap();
        let y = forward(poisoned.clone(), random(&[3, 20], 1));
        assert!(y[..3].iter().all(|y| y.is_finite()) && y[3..].iter().all(|y| !y.is_finite()), "{y:?}");
        let y = forward(random(&[3, 20], 1), poisoned);
        assert!(y.iter().enumerate().all(|(i, y)| y.is_finite() == (i % 2 == 0)), "{y:?}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let (weight, bias) = (random(&[4, 3], 1), random(&[4], 2));
    let named = |result: Result<Tensor>, parts: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    let new =
        |weight: &Tensor, bias: &Tensor, weights| PackedLinear::new(weight, Some(bias), weights).map(|_| bias.clone());
    named(new(&weight, &random(&[3], 1), PackedWeights::AsGiven), &["packed_linear: `bias`", "[4]", "[3]"]);
    let half = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
    named(new(&weight, &half(&bias), PackedWeights::AsGiven), &["packed_linear: `bias`", "BF16"]);
    named(new(&half(&weight), &half(&bias), PackedWeights::Int8), &["packed_linear: `weight`", "F32", "BF16"]);
    let packed = PackedLinear::new(&weight, Some(&bias), PackedWeights::AsGiven).unwrap();
    let forward = |x: &Tensor, residual: &Tensor| packed.forward(x, Epilogue::Add(residual));
    named(forward(&random(&[2, 5], 1), &random(&[2, 4], 1)), &["packed_linear: `x`", "[.., 3]", "[2, 5]"]);
    named(forward(&half(&random(&[2, 3], 1)), &random(&[2, 4], 1)), &["packed_linear: `x`", "F32", "BF16"]);
    named(forward(&random(&[2, 3], 1), &random(&[2, 3], 1)), &["packed_linear: `residual`", "[2, 4]", "[2, 3]"]);
}
