//! The losses of pre-training at the sizes of the base model, forward and with gradients.

use std::hint::black_box;

use candle_core::{DType, Device, Result, Tensor};
use criterion::Criterion;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use xvlm::losses::{self, BoxRule};
use xvlm_benches::{device, random_at};

/// Pairs of a batch, and the width of what contrastive learning compares.
const PAIRS: usize = 128;
const EMBED: usize = 256;
const VOCABULARY: usize = 30_522;

/// Measures one loss; a GPU only queues what it is asked for, so that each round waits for it.
fn measure(criterion: &mut Criterion, name: &str, device: &Device, loss: &dyn Fn() -> Result<Tensor>) {
    let mut group = criterion.benchmark_group(format!("loss: {name}"));
    group.bench_function("forward", |bencher| {
        bencher.iter(|| {
            let loss = black_box(loss().expect("a loss"));
            device.synchronize().expect("the device");
            loss
        });
    });
    group.bench_function("with gradients", |bencher| {
        bencher.iter(|| {
            let gradients = black_box(loss().and_then(|loss| loss.backward()).expect("gradients"));
            device.synchronize().expect("the device");
            gradients
        });
    });
    group.finish();
}

fn all(criterion: &mut Criterion) -> Result<()> {
    let device = device();
    let random = |shape: &[usize]| random_at(shape, DType::F32, &device);
    let keys: Vec<i64> = (0..PAIRS as i64).collect();

    let (concepts, texts, temperature) =
        (random(&[PAIRS, EMBED])?, random(&[PAIRS, EMBED])?, Tensor::new(0.07f32, &device)?);
    measure(criterion, "contrastive, 128 pairs", &device, &|| {
        let (loss, _) = losses::contrastive(&concepts, &texts, &temperature, &keys, None)?;
        Ok(loss)
    });
    let similarities = random(&[PAIRS, PAIRS])?.detach();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    criterion.bench_function("loss: hard negatives of 128 pairs", |bencher| {
        bencher.iter(|| {
            let negatives = losses::hard_negatives(&similarities, &keys, None, &mut rng).expect("negatives");
            device.synchronize().expect("the device");
            negatives
        });
    });
    let logits = random(&[3 * PAIRS, 2])?;
    measure(criterion, "matching, 128 pairs", &device, &|| losses::matching(&logits, PAIRS));
    let (logits, labels) = (random(&[64, VOCABULARY])?, (0..64).map(|i| i * 401).collect::<Vec<i64>>());
    measure(criterion, "masked words, 64", &device, &|| losses::masked_language(&logits, &labels));
    measure(criterion, "next words, 64", &device, &|| losses::generation(&logits, &labels, 0.1));
    let boxes = candle_core::Var::from_tensor(&random(&[PAIRS, 4])?.affine(0.1, 0.5)?)?;
    let (targets, is_image) = (boxes.affine(0.9, 0.02)?.detach(), [false; PAIRS]);
    measure(criterion, "boxes, 128", &device, &|| {
        let (l1, giou) = losses::boxes(&boxes, &targets, &is_image, BoxRule::Row)?;
        l1 + giou
    });
    Ok(())
}

fn main() {
    xvlm_benches::measure(all);
}
