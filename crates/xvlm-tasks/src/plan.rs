//! What a pre-training run is going to be, before it is: parameters, memory, work, data and schedule, and its first batches.
//!
//! Counts of parameters, records and iterations are exact. Memory and FLOPs are estimates: they follow from the sizes
//! ([`xvlm_encoders::cost::Load`]), with every batch as large and every text as long as the configuration lets them be. A part of the
//! model whose parameters are all frozen, and what comes before it too, has no backward pass, and nothing of it is kept; a part of
//! which only some parameters are frozen counts as if none were.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use xvlm_data::{BatchBuilder, BatchConfig, CaptionBatch, RegionBatch};
use xvlm_encoders::cost::{Cost, Load, Part};
use xvlm_encoders::{Blueprint, Xvlm, XvlmConfig};
use xvlm_train::{Precision, Progress, TrainConfig, Warmup};
use xvlm_weights::{LoadRules, ModelFolder};

use crate::config::{Objective, PretrainConfig};
use crate::error::TaskError;
use crate::pretrain;

/// What a run is going to be.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// What is trained.
    pub parameters: ParameterCounts,
    /// What one process will hold.
    pub memory: Memory,
    /// The image stream, then the region stream, if there is one.
    pub streams: Vec<Stream>,
    /// FLOPs of an iteration in one process, with the region stream as often as it comes. An estimate.
    pub flops_per_iteration: f64,
    /// How long, and how fast.
    pub schedule: Schedule,
}

/// Numbers of parameters.
#[derive(Clone, Debug, Serialize)]
pub struct ParameterCounts {
    /// All of them.
    pub total: u64,
    /// Those that the optimizer moves.
    pub trainable: u64,
    /// Those that it leaves.
    pub frozen: u64,
    /// Those of each part of the model.
    pub parts: Vec<(Part, u64)>,
    /// The trainable ones by how they are trained.
    pub groups: Vec<Group>,
}

/// Parameters that are trained alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Group {
    /// Their highest learning rate.
    pub lr: f64,
    /// Their weight decay.
    pub weight_decay: f64,
    /// How many tensors they make.
    pub tensors: u64,
    /// How many there are.
    pub parameters: u64,
}

/// Bytes that one process holds: on its device, and in the host's memory (the same, if the device is the CPU). Those of
/// activations and gradients are estimates, and the sums are: what operations need while they run, and what an allocator
/// keeps, comes on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The parameters as the model computes with them.
    pub weights: u64,
    /// Their `f32` masters, if they are of a smaller type; of `bf16` on the CPU the 16 bits that masters have beyond them.
    pub masters: u64,
    /// A gradient for each trainable parameter: in the type of the model where it comes from one batch, else a sum in `f32`.
    /// (What a model uses twice in a batch has a sum too, which is left out here.)
    pub gradients: u64,
    /// What goes to the other processes, and what comes back: two sets of gradients in `f32`, if there are others.
    pub reduction: u64,
    /// The optimizer's two moments.
    pub moments: u64,
    /// The mean of the weights, if one is kept.
    pub ema: u64,
    /// What the backward pass needs of the forward pass of the larger stream, as configured.
    pub activations: u64,
    /// The same if everything is kept, and if blocks are computed anew.
    pub activations_kept: u64,
    /// See there.
    pub activations_recomputed: u64,
    /// The pixels of all batches of an iteration, on the device.
    pub batches: u64,
    /// Those of the batches that are built ahead, on the host.
    pub batches_ahead: u64,
    /// Decoded images that are kept on the host; a limit.
    pub image_cache: u64,
}

impl Memory {
    /// What is on the device, with activations as configured.
    pub fn device(&self) -> u64 {
        let Self { weights, masters, gradients, reduction, moments, ema, activations, batches, .. } = *self;
        weights + masters + gradients + reduction + moments + ema + activations + batches
    }

    /// What is on the host.
    pub fn host(&self) -> u64 {
        self.batches_ahead + self.image_cache
    }
}

/// One stream of batches.
#[derive(Clone, Debug, Serialize)]
pub struct Stream {
    /// `captions` or `regions`.
    pub name: &'static str,
    /// Records that it is drawn from; none if a shard has not been looked through yet.
    pub records: Option<u64>,
    /// Files that these lie in.
    pub shards: usize,
    /// Most images and texts of an optimizer step of all processes: the effective batch.
    pub images_per_step: u64,
    /// See there.
    pub texts_per_step: u64,
    /// How often the run goes through the records; none if their number is not known.
    pub epochs: Option<f64>,
    /// The largest batch, as it goes through the model, and what is written about it.
    pub largest: Vec<Load>,
    /// FLOPs of an optimizer step with it in one process, forward and backward. An estimate.
    pub flops_per_step: f64,
    /// The same of the first batch: of as many and as long texts as were drawn.
    pub flops_of_first_batch: f64,
}

/// How long a run is, and how its learning rate goes.
#[derive(Clone, Debug, Serialize)]
pub struct Schedule {
    /// Iterations; fewer if a time limit ends the run.
    pub iterations: u64,
    /// The time limit in minutes, if there is one; the learning rates are those of a run that it does not end.
    pub time_limit_minutes: Option<f64>,
    /// Iterations in which the learning rate goes up.
    pub warmup: u64,
    /// The highest learning rate that an iteration has, before `lr_mult`.
    pub peak_lr: f64,
    /// What it goes down to.
    pub final_lr: f64,
    /// Batches of one process that make an optimizer step.
    pub accumulate: usize,
    /// Processes.
    pub ranks: usize,
}

/// The first batches of a run.
pub struct FirstBatches {
    /// Of the image stream.
    pub captions: CaptionBatch,
    /// Of the region stream, which may come later than in the first iteration.
    pub regions: Option<RegionBatch>,
    /// What made them.
    pub builder: BatchBuilder,
}

/// Plans the run of a configuration in `ranks` processes, each on the CPU or on a GPU, which need not be there, and draws its
/// first batches. Nothing is written, but for what the configuration wants to be kept of shards.
///
/// # Errors
/// As [`pretrain::run`] before it begins to train: about values, data, a model to start from that is not there or of other
/// shapes, and names to be frozen that no parameter has.
pub fn plan(
    config: &PretrainConfig,
    ranks: usize,
    on_gpu: bool,
    progress: &mut dyn Progress,
) -> Result<(Plan, FirstBatches), TaskError> {
    let mut config = config.clone();
    config.fix_length(ranks);
    let builder = pretrain::open_batches(&mut config, None, progress)?.for_rank(0, ranks);
    let shapes = Blueprint::of(|vb| Xvlm::new(&config.model, vb))?.shapes();
    config.train.optimizer.check_frozen(shapes.keys().map(String::as_str))?;
    if let Some(dir) = &config.init_from {
        let files = ModelFolder::open(dir)?;
        let shapes = shapes.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()));
        xvlm_weights::compare(files.weights.name(), &files.weights.shapes(), shapes, &LoadRules::default())?;
    }
    let parameters = count(&config.train, &config.model, &shapes);
    let work = Work { config: &config, on_gpu, is_trained: trained(&config, &shapes) };
    let has_regions = config.regions.iter_perc > 0.0;
    let captions = builder.captions(0)?;
    let regions = if has_regions { Some(builder.regions(0)?) } else { None };

    let (of_captions, of_regions) = (largest_captions(&config), largest_regions(&config));
    let first = (first_captions(&config, &captions), regions.as_ref().map(|regions| first_regions(&config, regions)));
    let [(caption_records, caption_shards), (region_records, region_shards)] = builder.sizes();
    let BatchConfig { batch_size, max_images, max_regions, .. } = *builder.config();
    let steps = (config.train.accumulate * ranks) as u64;
    let iterations = config.train.iterations as f64;
    let epochs = |records: Option<u64>, images: u64, share: f64| {
        records.filter(|records| *records > 0).map(|records| iterations * share * images as f64 / records as f64)
    };
    let images_per_step = steps * batch_size as u64;
    let mut streams = vec![Stream {
        name: "captions",
        records: caption_records,
        shards: caption_shards,
        images_per_step,
        texts_per_step: images_per_step,
        epochs: epochs(caption_records, images_per_step, 1.0),
        flops_per_step: work.flops(&of_captions),
        flops_of_first_batch: work.flops(&first.0),
        largest: of_captions,
    }];
    if let Some(first) = &first.1 {
        let images_per_step = steps * max_images as u64;
        streams.push(Stream {
            name: "regions",
            records: region_records,
            shards: region_shards,
            images_per_step,
            texts_per_step: steps * max_regions as u64,
            epochs: epochs(region_records, images_per_step, config.regions.iter_perc),
            flops_per_step: work.flops(&of_regions),
            flops_of_first_batch: work.flops(first),
            largest: of_regions,
        });
    }
    let shares = [1.0, config.regions.iter_perc];
    let plan = Plan {
        memory: work.memory(&parameters, &streams, ranks),
        parameters,
        flops_per_iteration: streams.iter().zip(shares).map(|(stream, share)| share * stream.flops_per_step).sum(),
        schedule: schedule(&config.train, ranks),
        streams,
    };
    Ok((plan, FirstBatches { captions, regions, builder }))
}

/// Counts the parameters of these shapes.
pub(crate) fn count(train: &TrainConfig, model: &XvlmConfig, shapes: &BTreeMap<String, Vec<usize>>) -> ParameterCounts {
    let optimizer = &train.optimizer;
    let mut counts = ParameterCounts {
        total: 0,
        trainable: 0,
        frozen: 0,
        parts: Part::ALL.map(|part| (part, 0)).to_vec(),
        groups: Vec::new(),
    };
    for (name, shape) in shapes {
        let number = shape.iter().product::<usize>() as u64;
        counts.total += number;
        let part = Part::of_parameter(model, name);
        counts.parts.iter_mut().filter(|(other, _)| *other == part).for_each(|(_, sum)| *sum += number);
        if optimizer.freezes(name) {
            counts.frozen += number;
            continue;
        }
        counts.trainable += number;
        let (lr, weight_decay) = (optimizer.lr * optimizer.lr_mult_of(name), optimizer.weight_decay_of(name));
        match counts.groups.iter_mut().find(|group| (group.lr, group.weight_decay) == (lr, weight_decay)) {
            Some(group) => (group.tensors, group.parameters) = (group.tensors + 1, group.parameters + number),
            None => counts.groups.push(Group { lr, weight_decay, tensors: 1, parameters: number }),
        }
    }
    counts.groups.sort_by(|a, b| {
        (a.lr, b.weight_decay).partial_cmp(&(b.lr, a.weight_decay)).unwrap_or(a.tensors.cmp(&b.tensors))
    });
    counts
}

/// Whether the backward pass goes through each of [`Part::ALL`]: not where it and what comes before it are frozen.
fn trained(config: &PretrainConfig, shapes: &BTreeMap<String, Vec<usize>>) -> [bool; 4] {
    let optimizer = &config.train.optimizer;
    let is_of = |part, name: &str| Part::of_parameter(&config.model, name) == part && !optimizer.freezes(name);
    let has_own = |part| shapes.keys().any(|name| is_of(part, name));
    let [vision, text, fusion, _] = Part::ALL.map(has_own);
    // Something is trained, and the losses are those of heads.
    [vision, text, vision || text || fusion, true]
}

/// Estimates what a process holds and computes.
struct Work<'a> {
    config: &'a PretrainConfig,
    on_gpu: bool,
    /// See [`trained`].
    is_trained: [bool; 4],
}

impl Work<'_> {
    fn memory(&self, parameters: &ParameterCounts, streams: &[Stream], ranks: usize) -> Memory {
        let config = self.config;
        let TrainConfig { precision, recompute, ema_decay, accumulate, .. } = *config.train;
        let size = precision.dtype().size_in_bytes() as u64;
        let activations = |recompute| {
            let of_stream = |stream: &Stream| size * self.cost(&stream.largest).activations(recompute);
            streams.iter().map(of_stream).max().unwrap_or(0)
        };
        let trainable = 4 * parameters.trainable;
        let is_sum = accumulate > 1 || ranks > 1;
        let pixels = 4 * 3 * config.data.resolution.pow(2) as u64;
        let (captions, regions) = (config.data.batch_size, config.data.max_images);
        let largest = captions + if config.regions.iter_perc > 0.0 { regions } else { 0 };
        let usual = captions as f64 + config.regions.iter_perc * regions as f64;
        Memory {
            weights: size * parameters.total,
            masters: match (precision, self.on_gpu) {
                (Precision::F32, _) => 0,
                (Precision::Bf16, false) => trainable / 2,
                _ => trainable,
            },
            gradients: if is_sum { trainable } else { size * parameters.trainable },
            reduction: if ranks > 1 { 2 * trainable } else { 0 },
            moments: 2 * trainable,
            ema: if ema_decay.is_some() { trainable } else { 0 },
            activations: activations(recompute),
            activations_kept: activations(false),
            activations_recomputed: activations(true),
            batches: (accumulate * largest) as u64 * pixels,
            batches_ahead: config.loader.ahead.max(1) as u64 * (usual * pixels as f64) as u64,
            image_cache: (config.image_cache_mib as u64) << 20,
        }
    }

    /// What is kept for the backward pass, of the parts that have one.
    fn cost(&self, loads: &[Load]) -> Cost {
        let costs = loads.iter().flat_map(|load| self.config.model.costs(load).into_iter().zip(self.is_trained));
        costs.filter(|(_, is_trained)| *is_trained).fold(Cost::default(), |sum, (cost, _)| sum.and(cost))
    }

    /// FLOPs of an optimizer step: the forward pass, and where there is a backward pass twice as much for that, and once more
    /// what is computed anew.
    fn flops(&self, loads: &[Load]) -> f64 {
        let of_part = |((part, cost), is_trained): ((Part, Cost), bool)| {
            let passes = match is_trained {
                true if self.config.train.recompute && part != Part::Heads => 4,
                true => 3,
                false => 1,
            };
            (passes * cost.flops) as f64
        };
        let costs = |load: &Load| Part::ALL.into_iter().zip(self.config.model.costs(load)).zip(self.is_trained);
        self.config.train.accumulate as f64 * loads.iter().flat_map(costs).map(of_part).sum::<f64>()
    }
}

pub(crate) fn schedule(config: &TrainConfig, ranks: usize) -> Schedule {
    let warmup = match config.schedule.warmup {
        Warmup::Iterations(iterations) => iterations,
        Warmup::Fraction(share) => (config.iterations as f64 * share) as u64,
    };
    // It goes up until the warm-up ends and then down, or the run ends before.
    let highest = warmup.min(config.iterations.saturating_sub(1));
    Schedule {
        iterations: config.iterations,
        time_limit_minutes: config.time_limit_minutes,
        warmup,
        peak_lr: config.learning_rate(highest, Duration::ZERO),
        final_lr: config.optimizer.lr * config.schedule.final_lr_fraction,
        accumulate: config.accumulate,
        ranks,
    }
}

/// The load of texts with a concept each, as [`crate::align`] passes them through the model.
fn aligned(
    config: &PretrainConfig,
    load: Load,
    texts: usize,
    images: usize,
    predicted: usize,
    has_boxes: bool,
) -> Load {
    let has = |objective| config.objectives.contains(&objective);
    let (itm, mlm, boxes) = (has(Objective::Itm), has(Objective::Mlm), has_boxes && has(Objective::Box));
    let rows = |yes: bool, times: usize| if yes { times * texts } else { 0 };
    Load {
        images,
        texts: texts + rows(mlm, 1),
        // Each pair, with two negatives; its masked text; the text with the whole image.
        fused: rows(itm, 3) + rows(mlm, 1) + rows(boxes, 1),
        concepts: rows(itm || mlm, 1) + if boxes { images } else { 0 },
        compared: rows(itm || has(Objective::Itc), 1),
        matched: rows(itm, 3),
        boxes: rows(boxes, 1),
        predicted: if mlm { predicted } else { 0 },
        ..load
    }
}

/// The load of `rows` texts that are written about images of another load.
fn written(rows: usize, tokens: usize, images: usize, predicted: usize) -> Load {
    Load { texts: rows, tokens, fused: rows, concepts: images, predicted, ..Load::default() }
}

/// Most tokens that are blanked in texts.
fn most_blanks(data: &BatchConfig, texts: usize) -> usize {
    let of_text = (data.max_tokens as f64 * data.masking.mask_prob).round() as usize;
    texts * of_text.max(1).min(data.masking.max_masks)
}

fn largest_captions(config: &PretrainConfig) -> Vec<Load> {
    let data = &config.data;
    let (texts, tokens) = (data.batch_size, data.max_tokens);
    let load = Load { tokens, ..Load::default() };
    let mut loads = vec![aligned(config, load, texts, texts, most_blanks(data, texts), false)];
    if let Some(generation) = data.generation.as_ref().filter(|_| config.objectives.contains(&Objective::Generation)) {
        let rows = texts * (1 + generation.questions_per_image);
        loads.push(written(rows, tokens, texts, rows * tokens));
    }
    loads
}

fn largest_regions(config: &PretrainConfig) -> Vec<Load> {
    let data = &config.data;
    let texts = data.max_regions;
    let load = Load { tokens: data.max_tokens, regions: texts, ..Load::default() };
    vec![aligned(config, load, texts, data.max_images, most_blanks(data, texts), true)]
}

fn first_captions(config: &PretrainConfig, batch: &CaptionBatch) -> Vec<Load> {
    let text = &batch.text;
    let load = Load { tokens: text.len, ..Load::default() };
    let mut loads = vec![aligned(config, load, text.rows, batch.images, text.masked_positions.len(), false)];
    let generation = batch.generation.as_ref().filter(|_| config.objectives.contains(&Objective::Generation));
    loads.extend(generation.map(|rows| {
        let predicted = rows.labels.iter().filter(|label| **label >= 0).count();
        written(rows.rows, rows.len, batch.images, predicted)
    }));
    loads
}

fn first_regions(config: &PretrainConfig, batch: &RegionBatch) -> Vec<Load> {
    let text = &batch.text;
    let load = Load { tokens: text.len, regions: text.rows, ..Load::default() };
    vec![aligned(config, load, text.rows, batch.images, text.masked_positions.len(), true)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use xvlm_train::ScheduleConfig;

    #[test]
    fn the_highest_rate_is_that_of_an_iteration() {
        for warmup in [Warmup::Iterations(0), Warmup::Iterations(7), Warmup::Iterations(90), Warmup::Fraction(0.33)] {
            let schedule = ScheduleConfig { warmup, ..ScheduleConfig::default() };
            let config = TrainConfig { iterations: 40, schedule, ..TrainConfig::default() };
            let rates = (0..40).map(|iteration| config.learning_rate(iteration, Duration::ZERO));
            assert_eq!(super::schedule(&config, 1).peak_lr, rates.fold(0.0, f64::max), "{warmup:?}");
        }
    }

    /// The estimates of the 4M preset with one change, for so many ranks on the CPU: those of memory, and FLOPs of a caption batch.
    fn estimate(set: &str, ranks: usize) -> (Memory, f64) {
        estimate_on(false, set, ranks)
    }

    fn estimate_on(on_gpu: bool, set: &str, ranks: usize) -> (Memory, f64) {
        let mut config = PretrainConfig::preset("base-4m", &[format!("train={set}")]).unwrap();
        config.data.resolution = config.model.vision_config.image_res();
        let shapes = Blueprint::of(|vb| Xvlm::new(&config.model, vb)).unwrap().shapes();
        let work = Work { config: &config, on_gpu, is_trained: trained(&config, &shapes) };
        let largest = largest_captions(&config);
        let flops = work.flops(&largest);
        let stream = Stream {
            name: "captions",
            records: None,
            shards: 0,
            images_per_step: 0,
            texts_per_step: 0,
            epochs: None,
            largest,
            flops_per_step: flops,
            flops_of_first_batch: flops,
        };
        (work.memory(&count(&config.train, &config.model, &shapes), &[stream], ranks), flops)
    }

    #[test]
    fn what_is_frozen_is_not_kept() {
        let frozen = |names: &str| estimate(&format!("{{optimizer: {{frozen_names: [{names}]}}}}"), 1);
        let ((all, all_flops), (no_vision, vision_flops)) = (frozen(""), frozen("vision_encoder"));
        assert!(no_vision.activations_kept < all.activations_kept && vision_flops < all_flops);
        assert!(no_vision.activations_recomputed < all.activations_recomputed);
        // Gradients still go through frozen layers of a part.
        assert_eq!(frozen("vision_encoder.layers.0").1, all_flops);
        // The fusion layers come after both encoders.
        let layers: Vec<String> = (6..12).map(|layer| format!("layer.{layer}.")).collect();
        let (no_fusion, fusion_flops) = frozen(&layers.join(", "));
        assert_eq!((no_fusion.activations_kept, fusion_flops), (all.activations_kept, all_flops));
        assert!(frozen("vision_encoder, text_encoder").1 < vision_flops);
    }

    #[test]
    fn masters_are_what_the_optimizer_keeps() {
        let of = |precision: &str, on_gpu| estimate_on(on_gpu, &format!("{{precision: {precision}}}"), 1).0;
        let (cpu, gpu) = (false, true);
        let numbers = of("f32", cpu).moments / 8;
        let masters = [("f32", cpu), ("f32", gpu), ("bf16", cpu), ("bf16", gpu), ("f16", cpu), ("f16", gpu)];
        assert_eq!(masters.map(|(precision, on_gpu)| of(precision, on_gpu).masters / numbers), [0, 0, 2, 4, 4, 4]);
    }

    #[test]
    fn sums_of_gradients_are_wide() {
        let of = |set: &str, ranks| estimate(set, ranks).0;
        let (one, four, ranks) = (of("{precision: bf16}", 1), of("{precision: bf16, accumulate: 4}", 1), of("{}", 2));
        assert_eq!((4 * one.gradients, 2 * four.gradients), (one.moments, four.moments));
        assert_eq!((one.reduction, ranks.reduction), (0, ranks.moments));
        assert_eq!(4 * one.batches, four.batches);
        assert_eq!(one.host(), four.host());
    }
}
