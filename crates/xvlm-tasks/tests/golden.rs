//! One region step against the original implementation: values on the way, losses and gradients.
//!
//! `golden/pretrain_region_step` was made by the official code from seeded random weights; `noise` is how far it is from
//! itself in float64.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use xvlm_data::{RegionTensors, TextTensors};
use xvlm_encoders::{Attention, Pass, XvlmConfig};
use xvlm_losses::Pair;
use xvlm_tasks::pretrain::{Batch, Pretraining};
use xvlm_train::Trainable;

type Tensors = HashMap<String, Tensor>;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn tensors(name: &str) -> Tensors {
    candle_core::safetensors::load(golden(name), &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn integers(tensor: &Tensor) -> Vec<i64> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

struct Case {
    expected: Tensors,
    noise: serde_json::Value,
}

impl Case {
    /// Within ten times the original's own distance from float64.
    fn check(&self, name: &str, found: &Tensor) {
        let (found, expected) = (numbers(found), numbers(&self.expected[name]));
        assert_eq!(found.len(), expected.len(), "{name}");
        let size = expected.iter().fold(0.0, |size, x| f64::max(size, x.abs()));
        // Draws have no noise of their own; single precision is all that can be asked of what leads to them.
        let noise = self.noise[name][0].as_f64().unwrap_or(1e-6 * size);
        let error = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(error <= 10.0 * noise + 2e-6 * size, "{name}: {error:e} against a noise of {noise:e} (size {size})");
    }
}

#[test]
fn region_step() {
    let text = std::fs::read_to_string(golden("pretrain_region_step.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let case = Case { expected: tensors("pretrain_region_step.safetensors"), noise: json["noise"].clone() };

    let official = &json["config"];
    let (vision, bert) = (&official["vision_config"], &official["text_config"]);
    let config: XvlmConfig = serde_json::from_value(serde_json::json!({
        "vision_config": {
            "kind": "swin",
            "image_res": vision["image_res"], "patch_size": 4, "embed_dim": vision["embed_dim"],
            "depths": vision["depths"], "num_heads": vision["num_heads"], "window_size": vision["window_size"],
        },
        "text_config": {
            "vocab_size": bert["vocab_size"], "hidden_size": bert["hidden_size"],
            "num_hidden_layers": bert["num_hidden_layers"], "fusion_layer": bert["fusion_layer"],
            "num_attention_heads": bert["num_attention_heads"], "intermediate_size": bert["intermediate_size"],
            "max_position_embeddings": bert["max_position_embeddings"],
        },
        "embed_dim": official["embed_dim"],
    }))
    .unwrap();
    let pretraining = Pretraining::new(&config, 0, &Device::Cpu).unwrap();
    let mut parameters = Tensors::new();
    for file in ["tiny_vision.0", "tiny_vision.1", "pretrain_image_step.params"] {
        parameters.extend(tensors(&format!("{file}.safetensors")));
    }
    for (name, var) in pretraining.parameters() {
        let value = parameters.get(name).unwrap_or_else(|| panic!("the original has no parameter {name}"));
        var.set(&value.reshape(var.shape()).unwrap()).unwrap();
    }

    let given = |name: &str| case.expected[&format!("in.{name}")].clone();
    let pixels = tensors("tiny_images.safetensors").into_values().next().unwrap();
    let ids = |name: &str| given(name).to_dtype(DType::U32).unwrap();
    let (rows, length) = ids("text_ids").dims2().unwrap();
    let masks = given("masked_pos").dims2().unwrap().1;
    let (positions, labels): (Vec<u32>, Vec<i64>) = integers(&given("masked_pos"))
        .into_iter()
        .zip(integers(&given("masked_ids")))
        .enumerate()
        .filter(|(_, (_, label))| *label != -100)
        .map(|(i, (position, label))| ((i / masks * length) as u32 + position as u32, label))
        .unzip();
    let image_index: Vec<u32> = integers(&given("idx_to_group_img")).iter().map(|&i| i as u32).collect();
    let images = 1 + *image_index.iter().max().unwrap() as usize;
    let batch = Batch::Regions(RegionTensors {
        pixels: pixels.narrow(0, 0, images).unwrap(),
        text: TextTensors {
            ids: ids("text_ids"),
            mask: given("text_atts").to_dtype(DType::F32).unwrap(),
            masked_ids: ids("text_ids_masked"),
            masked_positions: Tensor::new(positions, &Device::Cpu).unwrap(),
            masked_labels: labels,
            keys: (0..rows as i64).collect(),
        },
        image_index,
        boxes: given("target_bbox"),
        region_mask: given("image_atts").to_dtype(DType::F32).unwrap(),
        is_image: integers(&given("is_image")).iter().map(|&whole| whole == 1).collect(),
    });

    let model = pretraining.model();
    let pass = Pass::inference();
    let Batch::Regions(regions) = &batch else { unreachable!("built above") };
    let encoded = model.encode_text(&regions.text.ids, &regions.text.mask, Attention::Full, &pass).unwrap();
    case.check("mid.text_embeds", &encoded);
    case.check("mid.text_feat", &model.project_text(&encoded).unwrap());
    let boxes = xvlm_encoders::Regions { index: &regions.image_index, mask: &regions.region_mask };
    let (concepts, _) = model.encode_regions(&regions.pixels, boxes, &pass).unwrap();
    case.check("mid.image_embeds", &concepts);
    case.check("mid.image_feat", &model.project_image(&concepts).unwrap());

    let draw = |name: &str| integers(&case.expected[&format!("draw.{name}")]);
    let mut negatives = |similarities: &Tensor, keys: &[i64]| {
        let by_concept: Vec<f32> = similarities.flatten_all()?.to_vec1()?;
        let weights = xvlm_losses::negative_weights(&by_concept, keys);
        let weights = Tensor::from_vec(weights, (rows, rows), &Device::Cpu)?;
        case.check("draw.weights_i2t", &weights);
        let images = draw("image_neg_idx").into_iter().enumerate();
        let images = images.map(|(text, concept)| Pair { text: text as u32, concept: concept as u32 });
        let texts = draw("text_neg_idx").into_iter().enumerate();
        let texts = texts.map(|(concept, text)| Pair { text: text as u32, concept: concept as u32 });
        Ok(images.chain(texts).collect())
    };
    let losses = pretraining.losses_of(&batch, &pass, &mut negatives).unwrap().0;
    for (name, loss) in &losses {
        case.check(&format!("out.loss_{name}"), loss);
    }
    let total = losses.iter().skip(1).fold(losses[0].1.clone(), |sum, (_, loss)| (sum + loss).unwrap());
    case.check("out.loss", &total);

    let gradients = total.backward().unwrap();
    for (name, var) in pretraining.parameters() {
        let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name} gets no gradient"));
        if case.expected.contains_key(&format!("grad.{name}")) {
            case.check(&format!("grad.{name}"), gradient);
        }
        let length = numbers(gradient).iter().map(|g| g * g).sum::<f64>().sqrt();
        let expected = json["grad_l2"][name].as_f64().unwrap();
        assert!((length - expected).abs() <= 1e-3 * expected + 1e-6, "{name}: {length} against {expected}");
    }
}
