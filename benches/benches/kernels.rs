//! Every operation of `xvlm-kernels` at the sizes of the base model: an image of 224 pixels, eight texts of 40 tokens.

use candle_core::{Device, Result, Tensor, Var};
use criterion::Criterion;
use xvlm::kernels::{self, AdamW, BoxFormat, Cover, Update, WindowShape};
use xvlm_benches::{both_ways, criterion, random};

/// Tokens of the first and the last stage of Swin-B, of the texts, and of the image they look at.
const FIRST: usize = 56 * 56;
const LAST: usize = 7 * 7;
const TEXTS: usize = 8;
const WORDS: usize = 40;

fn vision(criterion: &mut Criterion) -> Result<()> {
    let (x, weight, bias) = (random(&[1, FIRST, 128])?, random(&[512, 128])?, random(&[512])?);
    both_ways(criterion, "linear 3136x128x512", || kernels::linear(&x, &weight, &bias));
    let (wide, tall, narrow) = (random(&[1, LAST, 1024])?, random(&[4096, 1024])?, random(&[4096])?);
    both_ways(criterion, "linear 49x1024x4096", || kernels::linear(&wide, &tall, &narrow));
    let hidden = random(&[1, FIRST, 512])?;
    both_ways(criterion, "gelu 3136x512", || kernels::gelu(&hidden));
    let (scale, shift) = (random(&[128])?, random(&[128])?);
    both_ways(criterion, "layer norm 3136x128", || kernels::layer_norm(&x, &scale, &shift, 1e-5));

    let (qkv, table) = (random(&[1, FIRST, 384])?, random(&[4, 49, 49])?);
    for (name, shift) in [("window attention 56x56", 0), ("shifted window attention 56x56", 3)] {
        let shape = WindowShape { height: 56, width: 56, window: 7, shift };
        both_ways(criterion, name, || kernels::window_attention(&qkv, &table, shape));
    }
    Ok(())
}

fn regions(criterion: &mut Criterion) -> Result<()> {
    const REGIONS: usize = 32;
    let patches = random(&[8, LAST, 1024])?;
    let index: Vec<u32> = (0..REGIONS as u32).map(|region| region / 4).collect();
    let covered: Vec<f32> = (0..REGIONS)
        .flat_map(|region| kernels::patch_rectangle_mask([0.2 + 0.02 * region as f32, 0.5, 0.3, 0.4], 7))
        .collect();
    let covered = Tensor::from_vec(covered, (REGIONS, LAST), &Device::Cpu)?;
    both_ways(criterion, "patch pool 32 of 8x49x1024", || kernels::patch_pool(&patches, &index, Cover::Mask(&covered)));

    let boxes = Var::from_tensor(&random(&[1024, 4])?.affine(0.1, 0.5)?)?;
    let targets = boxes.affine(0.9, 0.02)?.detach();
    both_ways(criterion, "box losses 1024", || kernels::box_losses(&boxes, &targets));
    both_ways(criterion, "giou 1024x64", || {
        kernels::pairwise_giou(&boxes, &targets.narrow(0, 0, 64)?, BoxFormat::Cxcywh)
    });
    Ok(())
}

fn text(criterion: &mut Criterion) -> Result<()> {
    let packed = random(&[TEXTS, WORDS, 3 * 768])?;
    let seen = Tensor::zeros((TEXTS, WORDS), candle_core::DType::F32, &Device::Cpu)?;
    for (name, causal) in [("self attention 8x40", false), ("causal attention 8x40", true)] {
        both_ways(criterion, name, || kernels::self_attention(&packed, &seen, 12, causal, None));
    }
    let (queries, keys) = (random(&[TEXTS, WORDS, 768])?, random(&[1, 1 + LAST, 2 * 768])?);
    let visible = Tensor::zeros((TEXTS, 1 + LAST), candle_core::DType::F32, &Device::Cpu)?;
    both_ways(criterion, "cross attention 8x40 at one image", || {
        kernels::cross_attention(&queries, &keys, &[0; TEXTS], &visible, 12, None)
    });

    let table = random(&[30_522, 768])?;
    let ids: Vec<u32> = (0..TEXTS * WORDS).map(|i| (i * 7919 % 30_522) as u32).collect();
    let ids = Tensor::from_vec(ids, (TEXTS, WORDS), &Device::Cpu)?;
    let positions = random(&[24, 24, 768])?;
    both_ways(criterion, "resize bicubic 24x24x768 to 14x14", || kernels::resize_bicubic(&positions, 14, 14));
    both_ways(criterion, "embedding 8x40 of 30522x768", || kernels::embedding(&table, &ids, Some(0)));

    let logits = random(&[64, 30_522])?;
    let labels: Vec<i64> = (0..64).map(|i| i * 401).collect();
    both_ways(criterion, "cross entropy 64x30522", || kernels::cross_entropy(&logits, &labels, 0.1));
    Ok(())
}

fn optimizer(criterion: &mut Criterion) -> Result<()> {
    let shape = [4096, 1024];
    let (parameter, first, second, gradient) =
        (random(&shape)?, random(&shape)?, random(&shape)?.abs()?, random(&shape)?);
    let second = Var::from_tensor(&second)?;
    let settings = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-8, max_norm: Some(1.0) };
    let update = Update {
        parameter: &parameter,
        first_moment: &first,
        second_moment: &second,
        gradient: &gradient,
        lr: 1e-4,
        weight_decay: 0.01,
        step: 10,
    };
    criterion.bench_function("adamw 4096x1024", |bencher| {
        bencher.iter(|| kernels::adamw_step(&settings, &[update]).expect("adamw"));
    });
    Ok(())
}

fn main() {
    kernels::process::run(|| {
        let mut criterion = criterion();
        for group in [vision, regions, text, optimizer] {
            group(&mut criterion).expect("inputs of a measurement");
        }
        criterion.final_summary();
    });
}
