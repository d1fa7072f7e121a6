//! The built-in model as it is used and as it is trained, and vision encoders other than the base model's.

use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::DType;
use criterion::Criterion;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use xvlm::data::scenes::{self, Scene, Split, SynthOptions};
use xvlm::data::{BatchBuilder, Dataset, ImageCache, TextTokenizer, read_jsonl};
use xvlm::encoders::{Pass, VisionConfig, VitConfig, XvlmConfig};
use xvlm::tasks::PretrainConfig;
use xvlm::tasks::pretrain::{Batch, Pretraining};
use xvlm::train::ranks::{Alone, Communicator};
use xvlm::train::{Gradients, Optimizer, Step, Trainable};
use xvlm::{Device, Picture, Precision, Predictor};
use xvlm_benches::base::model;
use xvlm_benches::{device, random_at};

type Done = Result<(), Box<dyn Error>>;

/// Waits for the device, as a GPU only queues what it is asked for.
fn done<T, E: std::fmt::Debug>(device: &Device, result: Result<T, E>) -> T {
    let result = result.expect("a result to measure");
    device.synchronize().expect("the device");
    result
}

fn inference(criterion: &mut Criterion) -> Done {
    let device = device();
    let predictor = Predictor::bundled(&device)?;
    let side = scenes::SIDE as u32;
    let scene = Scene::generate(2022, 0, Split::Seen).render();
    let picture = Picture::from_rgb(side, side, scene).ok_or("a scene of another size")?;
    let view = predictor.look(&picture)?;
    let texts: Vec<String> = (0..8).map(|i| format!("the shape number {i} from the left")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();

    let mut group = criterion.benchmark_group("built-in model");
    group.bench_function("encode a picture", |bencher| bencher.iter(|| done(&device, predictor.look(&picture))));
    group.bench_function("ground a phrase", |bencher| bencher.iter(|| done(&device, view.ground(&texts[..1]))));
    group.bench_function("ground 8 phrases", |bencher| bencher.iter(|| done(&device, view.ground(&texts))));
    group.bench_function("describe", |bencher| bencher.iter(|| done(&device, view.caption())));
    group.bench_function("fill a blank", |bencher| bencher.iter(|| done(&device, view.fill("a ___ circle", 5))));
    group.finish();
    Ok(())
}

fn training(criterion: &mut Criterion) -> Done {
    let folder = std::env::temp_dir().join(format!("xvlm-bench-{}", std::process::id()));
    let options = SynthOptions { scenes: 64, seed: 1, split: Split::Seen, embed_images: true };
    scenes::write(&folder, &options, &mut |_| ())?;
    let records = read_jsonl(folder.join("pretrain.jsonl"));
    std::fs::remove_dir_all(&folder)?;

    let mut config = PretrainConfig::preset("scenes", &[])?;
    let tokenizer = TextTokenizer::from_vocabulary(&scenes::vocabulary())?;
    config.model.text_config.vocab_size = tokenizer.vocab_size();
    config.data.resolution = config.model.vision_config.image_res();
    config.data.final_stride = config.model.vision_config.stride();
    let cache = Arc::new(ImageCache::new(1 << 28));
    let builder =
        BatchBuilder::new(Arc::new(Dataset::from_records(records?)), Arc::new(tokenizer), config.data.clone(), cache)?;
    let device = device();
    let pretraining = Pretraining::new(&config.model, 0, &device)?;
    let mut optimizer = Optimizer::new(pretraining.parameters(), &config.train)?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let ranks: Arc<dyn Communicator> = Arc::new(Alone);

    let mut group = criterion.benchmark_group("pre-training of the built-in model");
    let mut steps = 0..;
    group.bench_function("build both batches", |bencher| {
        bencher.iter(|| {
            let step = steps.next().unwrap_or_default();
            (builder.captions(step).expect("captions"), builder.regions(step).expect("regions"))
        });
    });
    for (name, batch) in [
        ("image step", Batch::Captions(builder.captions(0)?.to_tensors(&device)?)),
        ("region step", Batch::Regions(builder.regions(0)?.to_tensors(&device)?)),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let tape = Rc::default();
                let mut step = Step { rng: &mut rng, tape: &tape, ranks: &ranks };
                let losses = pretraining.losses(&batch, &mut step).expect("losses").0;
                let total = losses.iter().skip(1).try_fold(losses[0].1.clone(), |sum, (_, loss)| sum + loss);
                let mut gradients = Gradients::default();
                tape.backward(total.expect("sum"), &mut gradients, |_, _| Ok(())).expect("gradients");
                done(&device, optimizer.step(&gradients, 1e-4))
            });
        });
    }
    group.finish();
    Ok(())
}

fn vits(criterion: &mut Criterion) -> Done {
    let device = device();
    let vits = [("CLIP's ViT", VitConfig::clip_base(224)), ("DeiT", VitConfig::deit_base(224))];
    for (name, vit) in vits {
        let model = model(&XvlmConfig::with_vision(VisionConfig::Vit(vit)), Precision::F32, &device)?;
        for images in [1, 8] {
            let pixels = random_at(&[images, 3, 224, 224], DType::F32, &device)?;
            criterion.bench_function(&format!("{name} 224, batch {images}"), |bencher| {
                bencher.iter(|| done(&device, model.encode_image(&pixels, &Pass::inference())));
            });
        }
    }
    Ok(())
}

fn main() {
    xvlm_benches::measure(|criterion| [inference, training, vits].into_iter().try_for_each(|group| group(criterion)));
}
