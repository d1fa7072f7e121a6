//! What becomes of one image on its way into a batch, step by step and as a whole, and what becomes of batches, on one core.
//!
//! `photo.jpg` is made of noise whose spectrum falls as that of photographs does, with some shapes: 640 × 480 pixels in
//! 4:2:0 at quality 90, as large as the photographs of COCO are.

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use criterion::{BatchSize, Criterion, Throughput};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm::data::{
    BatchBuilder, BatchConfig, CaptionBatch, DataError, Dataset, DecodeOptions, Element, Encoded, ImageCache,
    ImageSource, Origin, Picture, Place, RandAugment, RandomResizedCrop, Record, Rect, RegionBatch, TextTokenizer,
    View,
};
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

/// Records in memory, each the photograph with a caption and four regions.
fn records() -> Vec<Record> {
    let element = |x: u16, y: u16| Element {
        bbox: [x, y, 240, 180].map(f32::from),
        texts: vec!["a shape of one colour before a grey cloud".to_owned()],
        attributes: Vec::new(),
        labels: Vec::new(),
    };
    let photo: Arc<[u8]> = PHOTO.into();
    let record = |n| Record {
        image: ImageSource::Bytes(Arc::clone(&photo)),
        captions: vec!["some shapes of several colours before grey clouds".to_owned()],
        elems: vec![element(40, 30), element(340, 30), element(40, 260), element(340, 260)],
        questions: Vec::new(),
        origin: Origin { file: Path::new("memory").into(), place: Place::Item(n) },
    };
    (0..256).map(record).collect()
}

fn collating(criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    let dataset = Arc::new(Dataset::from_records(records()));
    let words = "a shape of one colour before grey cloud some shapes several colours clouds".split(' ');
    let tokenizer = TextTokenizer::from_vocabulary(&words.map(str::to_owned).collect::<Vec<_>>())?;
    let cache = Arc::new(ImageCache::new(0));
    let builder = BatchBuilder::new(dataset, Arc::new(tokenizer), BatchConfig::default(), cache)?;
    let (captions, regions) = (builder.captions(0)?, builder.regions(0)?);
    let images = |count: usize| Throughput::Elements(count as u64);

    let mut group = criterion.benchmark_group("collate");
    group.throughput(images(captions.images));
    group.bench_function("captions", |bencher| bencher.iter(|| black_box(builder.captions(0).expect("a batch"))));
    group.bench_function("captions to tensors", |bencher| {
        let to_tensors = |batch: CaptionBatch| batch.to_tensors(&Device::Cpu).expect("tensors");
        bencher.iter_batched(|| captions.clone(), to_tensors, BatchSize::LargeInput);
    });
    group.throughput(images(regions.images));
    group.bench_function("regions", |bencher| bencher.iter(|| black_box(builder.regions(0).expect("a batch"))));
    group.bench_function("regions to tensors", |bencher| {
        let to_tensors = |batch: RegionBatch| batch.to_tensors(&Device::Cpu).expect("tensors");
        bencher.iter_batched(|| regions.clone(), to_tensors, BatchSize::LargeInput);
    });
    group.finish();
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = criterion();
    decoding(&mut criterion)?;
    augmenting(&mut criterion)?;
    everything(&mut criterion);
    collating(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
