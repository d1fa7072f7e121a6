//! What becomes of one image on its way into a batch, step by step and as a whole, on one core.
//!
//! `photo.jpg` is made of noise whose spectrum falls as that of photographs does, with some shapes: 640 × 480 pixels in
//! 4:2:0 at quality 90, as large as the photographs of COCO are.

use std::error::Error;
use std::hint::black_box;

use criterion::{BatchSize, Criterion};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm::data::{DataError, DecodeOptions, Encoded, Picture, RandAugment, RandomResizedCrop, Rect, View};
use xvlm_benches::criterion;

static PHOTO: &[u8] = include_bytes!("../photo.jpg");

/// Side of the pictures that the base model is pre-trained with.
const SIDE: usize = 224;

/// A part as random crops are on average: 0.6 of the area.
const PART: Rect = Rect { x: 72, y: 54, width: 496, height: 372 };

fn photo() -> Result<Encoded<'static>, DataError> {
    Encoded::new(PHOTO, &"photo.jpg", DecodeOptions::default())
}

fn decoding(criterion: &mut Criterion) -> Result<(), DataError> {
    let encoded = photo()?;
    let (whole, part) = (encoded.decode()?, encoded.decode_part(PART)?);
    let mut group = criterion.benchmark_group("an image of 640x480");
    group.bench_function("read its header", |bencher| bencher.iter(|| black_box(photo().expect("a photo"))));
    group.bench_function("decode all", |bencher| bencher.iter(|| black_box(encoded.decode().expect("pixels"))));
    group.bench_function("decode a part of 496x372", |bencher| {
        bencher.iter(|| black_box(encoded.decode_part(PART).expect("pixels")));
    });
    group.bench_function("resize all to 224x224", |bencher| bencher.iter(|| black_box(whole.resized_square(SIDE))));
    group.bench_function("resize that part to 224x224", |bencher| {
        bencher.iter(|| black_box(part.resized_square(SIDE)));
    });
    group.finish();
    Ok(())
}

fn augmenting(criterion: &mut Criterion) -> Result<(), DataError> {
    let square = photo()?.decode_part(PART)?.resized_square(SIDE);
    let mut group = criterion.benchmark_group("a picture of 224x224");
    for operation in RandAugment::all(1, 7.0).operations {
        group.bench_function(format!("{operation:?}"), |bencher| {
            let apply = |mut picture: Picture| {
                operation.apply(&mut picture, 7.0, false, false);
                picture
            };
            bencher.iter_batched(|| square.clone(), apply, BatchSize::LargeInput);
        });
    }
    let mut out = Vec::new();
    group.bench_function("normalise", |bencher| {
        bencher.iter(|| {
            out.clear();
            square.normalise_onto(false, &mut out);
            black_box(&out);
        });
    });
    group.finish();
    Ok(())
}

fn everything(criterion: &mut Criterion) {
    let (crop, augment) = (RandomResizedCrop::pretraining(), RandAugment::pretraining());
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut out = Vec::new();
    let mut one = || {
        let encoded = photo()?;
        let view = View { crop: crop.draw(encoded.width(), encoded.height(), &mut rng), flip: rng.random() };
        let mut picture = view.decode(&encoded, SIDE)?;
        augment.apply(&mut picture, &mut rng);
        out.clear();
        picture.normalise_onto(false, &mut out);
        black_box(&out);
        Ok::<_, DataError>(())
    };
    criterion.bench_function("an image, as in pre-training", |bencher| bencher.iter(|| one().expect("an image")));
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = criterion();
    decoding(&mut criterion)?;
    augmenting(&mut criterion)?;
    everything(&mut criterion);
    criterion.final_summary();
    Ok(())
}
