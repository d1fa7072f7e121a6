//! Which losses a pre-training step has, and that together they reach every parameter.

mod common;

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tempfile::TempDir;
use xvlm_data::scenes::{self, Split, SynthOptions};
use xvlm_data::{BatchBuilder, BatchConfig, Dataset, GenerationConfig, ImageCache, Padding, TextTokenizer, read_jsonl};
use xvlm_encoders::Pass;
use xvlm_tasks::Objective;
use xvlm_tasks::pretrain::{Batch, Pretraining};
use xvlm_train::ranks::{Alone, Communicator};
use xvlm_train::{Gradients, Step, Tape, Trainable};

/// A tiny model and a batch of each stream.
fn world() -> (Pretraining, [Batch; 2]) {
    world_with(BatchConfig { padding: Padding::None, ..BatchConfig::default() })
}

/// The same of batches of another kind.
fn world_with(config: BatchConfig) -> (Pretraining, [Batch; 2]) {
    let dir = TempDir::new().unwrap();
    let options = SynthOptions { scenes: 6, seed: 3, split: Split::Seen, embed_images: true };
    let out = dir.path().join("world");
    scenes::write(&out, &options, &mut |_| ()).unwrap();
    let records = Arc::new(Dataset::from_records(read_jsonl(out.join("pretrain.jsonl")).unwrap()));
    let tokenizer = Arc::new(TextTokenizer::from_vocabulary(&scenes::vocabulary()).unwrap());
    let mut model = common::tiny_model(tokenizer.vocab_size());
    model["vision_config"]["ape"] = json!(true);
    let config = BatchConfig {
        resolution: 32,
        final_stride: 8,
        batch_size: 4,
        max_images: 3,
        generation: Some(GenerationConfig { questions_per_image: 1, ..GenerationConfig::default() }),
        ..config
    };
    let builder = BatchBuilder::new(records, tokenizer, config, Arc::new(ImageCache::new(1 << 24))).unwrap();
    let captions = Batch::Captions(builder.captions(0).unwrap().to_tensors(&Device::Cpu).unwrap());
    let regions = Batch::Regions(builder.regions(0).unwrap().to_tensors(&Device::Cpu).unwrap());
    (Pretraining::new(&serde_json::from_value(model).unwrap(), 1, &Device::Cpu).unwrap(), [captions, regions])
}

fn names(pretraining: &Pretraining, batch: &Batch) -> Vec<&'static str> {
    losses(pretraining, batch).0.into_iter().map(|(name, _)| name).collect()
}

fn losses(pretraining: &Pretraining, batch: &Batch) -> (Vec<(&'static str, Tensor)>, Rc<Tape>) {
    let (tape, ranks) = (Rc::default(), Arc::new(Alone) as Arc<dyn Communicator>);
    let mut step = Step { rng: &mut ChaCha8Rng::seed_from_u64(0), tape: &tape, ranks: &ranks };
    (pretraining.losses(batch, &mut step).unwrap().0, tape)
}

#[test]
fn each_objective_has_its_losses() {
    let (mut pretraining, [captions, regions]) = world();
    assert_eq!(names(&pretraining, &captions), ["itc", "itm", "mlm", "generation"]);
    assert_eq!(names(&pretraining, &regions), ["region_itc", "region_itm", "region_mlm", "bbox", "giou"]);
    for (objective, of_captions, of_regions) in [
        (Objective::Itc, vec!["itc"], vec!["region_itc"]),
        (Objective::Itm, vec!["itm"], vec!["region_itm"]),
        (Objective::Mlm, vec!["mlm"], vec!["region_mlm"]),
        (Objective::Box, vec![], vec!["bbox", "giou"]),
        (Objective::Generation, vec!["generation"], vec![]),
    ] {
        pretraining = pretraining.with_objectives(&[objective]);
        assert_eq!(names(&pretraining, &captions), of_captions, "{objective:?}");
        assert_eq!(names(&pretraining, &regions), of_regions, "{objective:?}");
    }
}

#[test]
fn masked_repeats_leave_the_contrastive_loss_as_it_is() {
    let of = |padding| {
        let sizes = BatchConfig { max_regions: 40, random_crop: false, ..BatchConfig::default() };
        let (pretraining, [_, regions]) = world_with(BatchConfig { padding, ..sizes });
        let mut candidates = BTreeSet::new();
        for seed in 0..20 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let Batch::Regions(batch) = &regions else { unreachable!() };
            let mut negatives = |scores: &Tensor, keys: &[i64]| {
                let pairs = xvlm_losses::hard_negatives(scores, keys, Some(&batch.row_weights), &mut rng)?;
                let (first, second) = pairs.split_at(pairs.len() / 2);
                candidates.extend(first.iter().map(|pair| pair.concept).chain(second.iter().map(|pair| pair.text)));
                Ok(pairs)
            };
            pretraining.losses_of(&regions, &Pass::inference(), &mut negatives).unwrap();
        }
        let pretraining = pretraining.with_objectives(&[Objective::Itc]);
        let loss = pretraining.losses_of(&regions, &Pass::inference(), &mut |_, _| Ok(Vec::new())).unwrap().0;
        let Batch::Regions(batch) = regions else { unreachable!() };
        (batch.row_weights, loss[0].1.to_scalar::<f32>().unwrap(), candidates)
    };
    let ((alone, expected, _), (masked, found, candidates)) = (of(Padding::None), of(Padding::Masked));
    let real = alone.len();
    assert!(real < 40 && masked.len() == 40, "{real} texts are to be filled up");
    assert!(masked[..real].iter().all(|&weight| weight == 1.0) && masked[real..].iter().all(|&weight| weight == 0.0));
    assert!((found - expected).abs() < 1e-5, "{found} for {expected}");
    assert!(candidates.iter().all(|&row| (row as usize) < real) && candidates.len() > real / 2, "{candidates:?}");
    let (repeated, spoilt, _) = of(Padding::Repeats);
    assert!(repeated == [1.0; 40] && (spoilt - expected).abs() > 1e-3, "{spoilt} for {expected}");
}

#[test]
fn a_loss_does_not_depend_on_the_others() {
    let (mut pretraining, batches) = world();
    let value = |pretraining: &Pretraining, batch: &Batch, name: &str| {
        let loss = losses(pretraining, batch).0.into_iter().find(|(found, _)| *found == name).unwrap().1;
        loss.to_scalar::<f32>().unwrap()
    };
    let all = ["region_itc", "region_itm", "region_mlm", "bbox"].map(|name| value(&pretraining, &batches[1], name));
    for (objective, name, all) in [
        (Objective::Itc, "region_itc", all[0]),
        (Objective::Itm, "region_itm", all[1]),
        (Objective::Mlm, "region_mlm", all[2]),
        (Objective::Box, "bbox", all[3]),
    ] {
        pretraining = pretraining.with_objectives(&[objective]);
        let alone = value(&pretraining, &batches[1], name);
        assert!((alone - all).abs() <= 1e-5 * all.abs(), "{name}: {alone} alone, {all} with the others");
    }
}

#[test]
fn every_parameter_gets_a_gradient() {
    let (pretraining, batches) = world();
    let mut reached = BTreeSet::new();
    for batch in &batches {
        let (losses, tape) = losses(&pretraining, batch);
        let total = losses.iter().skip(1).fold(losses[0].1.clone(), |sum, (_, loss)| (sum + loss).unwrap());
        let mut gradients = Gradients::default();
        tape.backward(total, &mut gradients, |_, _| Ok(())).unwrap();
        for (name, var) in pretraining.parameters() {
            let gradient = gradients.get(var).map(|g| g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            reached.extend(gradient.filter(|g| *g > 0.0).map(|_| name.clone()));
        }
    }
    let missed: Vec<_> = pretraining.parameters().iter().filter(|(name, _)| !reached.contains(name)).collect();
    assert!(missed.is_empty(), "{:?}", missed.iter().map(|(name, _)| name).collect::<Vec<_>>());
}
