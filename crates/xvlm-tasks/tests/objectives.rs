//! Which losses a pre-training step has, and that together they reach every parameter.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::Device;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tempfile::TempDir;
use xvlm_data::scenes::{self, Split, SynthOptions};
use xvlm_data::{BatchBuilder, BatchConfig, Dataset, GenerationConfig, ImageCache, TextTokenizer, read_jsonl};
use xvlm_tasks::Objective;
use xvlm_tasks::pretrain::{Batch, Pretraining};
use xvlm_train::Trainable;

/// A tiny model and a batch of each stream.
fn world() -> (Pretraining, [Batch; 2]) {
    let dir = TempDir::new().unwrap();
    let options = SynthOptions { scenes: 6, seed: 3, split: Split::Seen, embed_images: true };
    let out = dir.path().join("world");
    scenes::write(&out, &options, &mut |_| ()).unwrap();
    let records = Arc::new(Dataset::from_records(read_jsonl(out.join("pretrain.jsonl")).unwrap()));
    let tokenizer = Arc::new(TextTokenizer::from_vocabulary(&scenes::vocabulary()).unwrap());
    let model = json!({
        "vision_config": {
            "kind": "swin",
            "image_res": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4,
            "ape": true,
        },
        "text_config": {
            "vocab_size": tokenizer.vocab_size(), "hidden_size": 16, "num_hidden_layers": 2, "fusion_layer": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 48,
        },
        "embed_dim": 16,
    });
    let config = BatchConfig {
        resolution: 32,
        final_stride: 8,
        batch_size: 4,
        max_images: 3,
        generation: Some(GenerationConfig { questions_per_image: 1, ..GenerationConfig::default() }),
        ..BatchConfig::default()
    };
    let builder = BatchBuilder::new(records, tokenizer, config, Arc::new(ImageCache::new(1 << 24))).unwrap();
    let captions = Batch::Captions(builder.captions(0).unwrap().to_tensors(&Device::Cpu).unwrap());
    let regions = Batch::Regions(builder.regions(0).unwrap().to_tensors(&Device::Cpu).unwrap());
    (Pretraining::new(&serde_json::from_value(model).unwrap(), 1, &Device::Cpu).unwrap(), [captions, regions])
}

fn names(pretraining: &Pretraining, batch: &Batch) -> Vec<&'static str> {
    let losses = pretraining.losses(batch, &mut ChaCha8Rng::seed_from_u64(0)).unwrap().0;
    losses.into_iter().map(|(name, _)| name).collect()
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
fn a_loss_does_not_depend_on_the_others() {
    let (mut pretraining, batches) = world();
    let value = |pretraining: &Pretraining, batch: &Batch, name: &str| {
        let losses = pretraining.losses(batch, &mut ChaCha8Rng::seed_from_u64(0)).unwrap().0;
        let loss = losses.into_iter().find(|(found, _)| *found == name).unwrap().1;
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
        let losses = pretraining.losses(batch, &mut ChaCha8Rng::seed_from_u64(0)).unwrap().0;
        let total = losses.iter().skip(1).fold(losses[0].1.clone(), |sum, (_, loss)| (sum + loss).unwrap());
        let gradients = total.backward().unwrap();
        for (name, var) in pretraining.parameters() {
            let gradient = gradients.get(var).map(|g| g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            reached.extend(gradient.filter(|g| *g > 0.0).map(|_| name.clone()));
        }
    }
    let missed: Vec<_> = pretraining.parameters().iter().filter(|(name, _)| !reached.contains(name)).collect();
    assert!(missed.is_empty(), "{:?}", missed.iter().map(|(name, _)| name).collect::<Vec<_>>());
}
