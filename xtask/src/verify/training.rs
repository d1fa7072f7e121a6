//! Pre-training steps, and the optimizer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;
use xvlm::data::{CaptionTensors, RegionTensors, TextTensors};
use xvlm::encoders::{Attention, Concepts, Pass, Regions, Task, Xvlm};
use xvlm::losses::{Pair, negative_weights};
use xvlm::tasks::pretrain::{Batch, Pretraining};
use xvlm::train::{
    Batches, BoxError, Gradients, Job, Losses, MetricsRow, Optimizer, OptimizerConfig, RunFolder, ScheduleConfig,
    Silent, Step, Tape, TrainConfig, Trainable, Warmup, read_metrics, train,
};

use super::case::{Case, Outcome, SAFE};
use super::encoders::at;
use super::models::Built;

impl Case<'_> {
    /// Texts with what the losses of alignment need; keys are those of the case, or each text its own.
    pub(super) fn text_tensors(&self) -> Outcome<TextTensors> {
        let texts = self.texts("in.text")?;
        let (rows, length) = texts.ids.dims2()?;
        let (mut positions, mut labels) = (Vec::new(), Vec::new());
        let mut masked_ids = texts.ids.clone();
        if self.has("in.text_ids_masked") {
            masked_ids = self.ids("in.text_ids_masked")?;
            let (at, ids) = (self.index("in.masked_pos")?, self.integers("in.masked_ids")?);
            let masks = at.len() / rows.max(1);
            for (i, (position, label)) in at.into_iter().zip(ids).enumerate().filter(|(_, (_, label))| *label >= 0) {
                positions.push((i / masks * length) as u32 + position);
                labels.push(label);
            }
        }
        let keys = match self.has("in.idx") {
            true => self.integers("in.idx")?,
            false => (0..rows as i64).collect(),
        };
        let masked_positions = Tensor::new(positions, &Device::Cpu)?;
        Ok(TextTensors { ids: texts.ids, mask: texts.mask, masked_ids, masked_positions, masked_labels: labels, keys })
    }

    /// The negatives that the original drew, from tensors of `[2, B]` numbers.
    pub(super) fn pairs(images: &[i64], texts: &[i64]) -> Vec<Pair> {
        let with_image = (0u32..).zip(images).map(|(text, &concept)| Pair { text, concept: concept as u32 });
        let with_text = (0u32..).zip(texts).map(|(concept, &text)| Pair { text: text as u32, concept });
        with_image.chain(with_text).collect()
    }

    /// Hands out the recorded negatives, and checks the weights they were drawn with.
    pub(super) fn negatives(&self) -> impl FnMut(&Tensor, &[i64]) -> candle_core::Result<Vec<Pair>> {
        |similarities: &Tensor, keys: &[i64]| {
            let wrap = |error: Box<dyn std::error::Error>| candle_core::Error::Msg(error.to_string());
            let check = |name: &str, similarities: &Tensor| -> candle_core::Result<()> {
                let weights = negative_weights(&similarities.flatten_all()?.to_vec1()?, keys, None);
                let weights = Tensor::from_vec(weights, similarities.shape(), &Device::Cpu)?;
                self.check(name, &weights).map_err(wrap)
            };
            check("draw.weights_i2t", similarities)?;
            check("draw.weights_t2i", &similarities.t()?.contiguous()?)?;
            let drawn = |name: &str| self.integers(name).map_err(wrap);
            Ok(Self::pairs(&drawn("draw.image_neg_idx")?, &drawn("draw.text_neg_idx")?))
        }
    }

    fn batch(&self, model: &Xvlm) -> Outcome<Batch> {
        let text = self.text_tensors()?;
        let rows = text.ids.dim(0)?;
        if !self.has("in.idx_to_group_img") {
            return Ok(Batch::Captions(CaptionTensors {
                pixels: self.images(rows, model)?,
                text,
                generation: None,
                origins: Vec::new(),
            }));
        }
        let image_index = self.index("in.idx_to_group_img")?;
        let images = 1 + image_index.iter().copied().max().unwrap_or(0) as usize;
        Ok(Batch::Regions(RegionTensors {
            pixels: self.images(images, model)?,
            text,
            image_index,
            boxes: self.input("in.target_bbox")?,
            region_mask: self.mask("in.image_atts")?,
            is_image: self.integers("in.is_image")?.into_iter().map(|whole| whole == 1).collect(),
            row_weights: vec![1.0; rows],
            origins: Vec::new(),
        }))
    }
}

/// What lies between input and losses, on the way the original goes: positives and negatives apart.
fn middle(case: &Case, model: &Xvlm, batch: &Batch) -> Outcome {
    let pass = Pass::inference();
    let (text, concepts, images, mask) = match batch {
        Batch::Captions(batch) => {
            let images = model.encode_image(&batch.pixels, &pass)?;
            let mask = Tensor::ones((images.dim(0)?, images.dim(1)?), DType::F32, &Device::Cpu)?;
            (&batch.text, images.clone(), images, mask)
        }
        Batch::Regions(batch) => {
            let regions = Regions { index: &batch.image_index, mask: &batch.region_mask };
            let (concepts, images) = model.encode_regions(&batch.pixels, regions, &pass)?;
            let images = images.index_select(&Tensor::new(batch.image_index.as_slice(), &Device::Cpu)?, 0)?;
            (&batch.text, concepts, images, batch.region_mask.clone())
        }
    };
    let encoded = model.encode_text(&text.ids, &text.mask, Attention::Full, &pass)?;
    case.check("mid.image_embeds", &concepts)?;
    case.check("mid.image_embeds_fullatts", &images)?;
    case.check("mid.text_embeds", &encoded)?;
    case.check("mid.image_feat", &model.project_image(&concepts)?)?;
    case.check("mid.text_feat", &model.project_text(&encoded)?)?;

    let rows: Vec<u32> = (0..encoded.dim(0)? as u32).collect();
    let fuse = |encoded: &Tensor, texts: &[u32], tokens: &Tensor, mask: &Tensor, index: &[u32]| {
        let (texts, shown) = (Tensor::new(texts, &Device::Cpu)?, Tensor::new(index, &Device::Cpu)?);
        let mask = mask.index_select(&shown, 0)?;
        let looks = Concepts { tokens, index, mask: &mask };
        let (encoded, text_mask) = (encoded.index_select(&texts, 0)?, text.mask.index_select(&texts, 0)?);
        model.fuse(&encoded, &text_mask, &looks, Attention::Full, &pass)
    };
    let positive = fuse(&encoded, &rows, &concepts, &mask, &rows)?;
    case.check("mid.cross_pos", &positive)?;
    let pairs = Case::pairs(&case.integers("draw.image_neg_idx")?, &case.integers("draw.text_neg_idx")?);
    let texts: Vec<u32> = pairs.iter().map(|pair| pair.text).collect();
    let shown: Vec<u32> = pairs.iter().map(|pair| pair.concept).collect();
    let negative = fuse(&encoded, &texts, &concepts, &mask, &shown)?;
    case.check("mid.cross_neg_cls", &negative.narrow(1, 0, 1)?)?;
    case.check("mid.itm_logits", &model.match_logits(&Tensor::cat(&[&positive, &negative], 0)?)?)?;
    if case.has("in.masked_pos") {
        let encoded = model.encode_text(&text.masked_ids, &text.mask, Attention::Full, &pass)?;
        let masked = fuse(&encoded, &rows, &concepts, &mask, &rows)?;
        case.check("mid.mlm_logits", &model.mlm_logits(&at(&masked, &case.ids("in.masked_pos")?)?)?)?;
    }
    if let Batch::Regions(_) = batch {
        let looked = fuse(&encoded, &rows, &images, &mask.ones_like()?, &rows)?;
        case.check("mid.cross_bbox_cls", &looked.narrow(1, 0, 1)?)?;
        case.check("out.coord", &model.predict_box(&looked)?)?;
    }
    Ok(())
}

/// One step of either stream: the five losses, the negatives and the gradients.
pub(super) fn step(case: &Case) -> Outcome {
    let Built { model, parameters } = case.xvlm(Task::Pretrain)?;
    let batch = case.batch(&model)?;
    middle(case, &model, &batch)?;
    let pretraining = Pretraining::with_model(model, parameters);
    let losses = pretraining.losses_of(&batch, &Pass::inference(), &mut case.negatives())?.0;
    for (name, loss) in &losses {
        case.check(&format!("out.loss_{name}"), loss)?;
    }
    let total = sum(losses.iter().map(|(_, loss)| loss))?;
    case.check("out.loss", &total)?;
    case.check_gradients(&total.backward()?, pretraining.parameters())
}

/// The plain sum of losses.
pub(super) fn sum<'a>(losses: impl Iterator<Item = &'a Tensor>) -> Outcome<Tensor> {
    let losses = losses.map(Tensor::flatten_all).collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::cat(&losses, 0)?.sum_all()?)
}

/// How a case configures the optimizer. Parameters of another learning rate are listed by name.
fn configuration(case: &Case) -> Outcome<TrainConfig> {
    let json = &case.json;
    let number = |value: &Value| value.as_f64();
    let groups = json["groups"].as_array().ok_or("groups: expected a list")?;
    let rates: Vec<f64> = groups.iter().filter_map(|group| number(&group["initial_lr"])).collect();
    let decays = groups.iter().filter_map(|group| number(&group["weight_decay"]));
    let (lr, highest) =
        (rates.iter().copied().fold(f64::INFINITY, f64::min), rates.iter().copied().fold(0.0, f64::max));
    let parameters =
        |group: &Value| -> Vec<String> { serde_json::from_value(group["params"].clone()).unwrap_or_default() };
    let multiplied = groups.iter().filter(|group| highest > lr && number(&group["initial_lr"]) == Some(highest));
    let iterations = json["scheduler"]["num_training_steps"].as_u64();
    let warmup = &json["scheduler"]["num_warmup_steps"];
    // As the original: a number that is not whole is a share.
    let warmup = warmup.as_u64().map(Warmup::Iterations).or(warmup.as_f64().map(Warmup::Fraction));
    let optimizer = &json["optimizer"];
    let config = TrainConfig {
        iterations: iterations.ok_or("scheduler.num_training_steps: expected a whole number")?,
        optimizer: OptimizerConfig {
            lr,
            weight_decay: decays.fold(0.0, f64::max),
            lr_mult: highest / lr,
            lr_mult_names: multiplied.flat_map(parameters).collect(),
            betas: serde_json::from_value(optimizer["betas"].clone()).unwrap_or((0.9, 0.98)),
            eps: number(&optimizer["eps"]).unwrap_or(1e-8),
            ..OptimizerConfig::default()
        },
        schedule: ScheduleConfig {
            warmup: warmup.ok_or("scheduler.num_warmup_steps: expected a number")?,
            ..Default::default()
        },
        ..TrainConfig::default()
    };
    // Which parameters decay follows from their names, here as there.
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for group in groups {
        for name in parameters(group) {
            found.push((config.optimizer.weight_decay_of(&name), config.optimizer.lr_mult_of(&name) * lr));
            expected.push((number(&group["weight_decay"]).unwrap_or(0.0), number(&group["initial_lr"]).unwrap_or(0.0)));
        }
    }
    case.check_equal("groups", &found, &expected);
    Ok(config)
}

/// The learning rates of the groups, in the order of the case.
fn rates(case: &Case, config: &TrainConfig, step: usize) -> Vec<f64> {
    let lr = config.learning_rate(step as u64, Duration::ZERO);
    let groups = case.json["groups"].as_array().into_iter().flatten();
    groups.map(|group| lr * group["initial_lr"].as_f64().unwrap_or(0.0) / config.optimizer.lr).collect()
}

/// Steps of the optimizer on given gradients.
pub(super) fn optimizer(case: &Case) -> Outcome {
    const RTOL: f64 = 1e-5;
    let config = configuration(case)?;
    let mut parameters = Vec::new();
    for name in case.names("in.param.") {
        parameters.push((name.clone(), Var::from_tensor(&case.input(&format!("in.param.{name}"))?)?));
    }
    let mut optimizer = Optimizer::new(&parameters, &TrainConfig { clip: None, ..config.clone() })?;
    let steps = case.input("out.lr")?.dim(0)?;
    let mut lrs = Vec::new();
    for step in 0..steps {
        // The gradient of Σ p·g is g.
        let mut products = Vec::new();
        for (name, parameter) in &parameters {
            let gradient = case.input(&format!("in.grad.{step}.{name}"))?;
            products.push((parameter.as_tensor() * gradient)?.sum_all()?);
        }
        let lr = config.learning_rate(step as u64, Duration::ZERO);
        optimizer.step(&gradients(&Tape::default(), sum(products.iter())?)?, lr)?;
        lrs.extend(rates(case, &config, step));
        for (name, parameter) in &parameters {
            case.check_within(&format!("out.param.{step}.{name}"), parameter, RTOL, 0.0)?;
        }
    }
    case.check_within("out.lr", &Tensor::from_vec(lrs, case.input("out.lr")?.shape(), &Device::Cpu)?, RTOL, 0.0)
}

fn gradients(tape: &Tape, loss: Tensor) -> candle_core::Result<Gradients> {
    let mut gradients = Gradients::default();
    tape.backward(loss, &mut gradients, |_, _| Ok(()))?;
    Ok(gradients)
}

/// Pre-training on one batch, with the negatives that the original drew at each step, and without dropout.
struct Recorded {
    pretraining: Pretraining,
    batch: Batch,
    negatives: Vec<Vec<Pair>>,
    stop: Arc<AtomicBool>,
}

impl Trainable for Recorded {
    /// The number of the step.
    type Batch = usize;

    fn parameters(&self) -> &[(String, Var)] {
        self.pretraining.parameters()
    }

    fn losses(&self, number: &usize, step: &mut Step) -> Result<Losses, BoxError> {
        let pass = Pass::inference().on(step.tape);
        self.stop.store(number + 1 >= self.negatives.len(), Ordering::Relaxed);
        Ok(self.pretraining.losses_of(&self.batch, &pass, &mut |_, _| Ok(self.negatives[*number].clone()))?)
    }

    fn samples(_: &usize) -> usize {
        1
    }

    fn after_step(&self) -> Result<(), BoxError> {
        self.pretraining.after_step()
    }
}

/// The numbers from 0.
struct Numbers(usize);

impl Batches<usize> for Numbers {
    fn next(&mut self) -> Result<Vec<Vec<usize>>, BoxError> {
        self.0 += 1;
        Ok(vec![vec![self.0 - 1]])
    }
}

/// Several steps of pre-training in the loop, with and without recomputation: losses, gradient norms, learning rates and the
/// parameters at the end.
pub(super) fn steps(case: &Case, first: &Case) -> Outcome {
    /// Adam makes a full step of a rounding error where a gradient is tiny.
    const ADAM: f64 = 2e-5;
    let (images, texts) = (case.integers("draw.image_neg_idx")?, case.integers("draw.text_neg_idx")?);
    let shape = case.input("out.losses")?;
    let steps = shape.dim(0)?;
    let rows = images.len() / steps.max(1);
    let drawn = |step: usize| step * rows..(step + 1) * rows;
    let negatives: Vec<_> = (0..steps).map(|step| Case::pairs(&images[drawn(step)], &texts[drawn(step)])).collect();
    for recompute in [false, true] {
        let config = TrainConfig { recompute, log_every: 1, ..configuration(case)? };
        let Built { model, parameters } = case.xvlm(Task::Pretrain)?;
        let batch = first.batch(&model)?;
        let pretraining = Pretraining::with_model(model, parameters);
        let stop = Arc::<AtomicBool>::default();
        let model = Recorded { pretraining, batch, negatives: negatives.clone(), stop: Arc::clone(&stop) };
        let folder = tempfile::tempdir()?;
        let run = RunFolder::new(folder.path())?;
        let job = Job { stop, ..Job::alone(&run, false) };
        train(&model, |_| Ok(Box::new(Numbers(0))), &config, &job, &mut Silent)?;
        let metrics = read_metrics(&run.metrics_path())?;
        let loss = |row: &MetricsRow, name: &str| row.losses.get(name).copied().unwrap_or(f64::NAN);
        let losses = metrics.iter().flat_map(|row| ["itc", "itm", "mlm"].map(|name| loss(row, name)));
        case.check("out.losses", &Tensor::from_vec(losses.collect(), shape.shape(), &Device::Cpu)?)?;
        let norms: Vec<f64> = metrics.iter().map(|row| row.grad_norm).collect();
        case.check("out.grad_norm", &Tensor::from_vec(norms, steps, &Device::Cpu)?)?;
        let lrs = (0..steps).flat_map(|step| rates(case, &config, step)).collect();
        case.check("out.lr", &Tensor::from_vec(lrs, case.input("out.lr")?.shape(), &Device::Cpu)?)?;
        for (name, parameter) in model.parameters() {
            case.check_within(&format!("param.{name}"), parameter, SAFE, ADAM)?;
        }
    }
    Ok(())
}
