//! How to train. The defaults are those of the paper's pre-training on 4M images (§4.2 and
//! `configs/Pretrain_XVLM_base_4m.yaml` of the official code).

use std::f64::consts::PI;
use std::time::Duration;

use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// How to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// How long: each iteration is one optimizer step a batch stream. 200 000, as in the paper.
    pub iterations: u64,
    /// How parameters follow gradients.
    pub optimizer: OptimizerConfig,
    /// How the learning rate goes over the run.
    pub schedule: ScheduleConfig,
    /// Largest norm of the gradient of all parameters together: a longer one is scaled down to it, so that a batch out of
    /// the ordinary does not throw the model off. 1; `null` for no clipping.
    pub clip: Option<f32>,
    /// Batches whose gradients are averaged to one optimizer step. 1. More make a large batch of small ones, where memory is
    /// short; what is compared within a batch, as in ITC, still meets only its own.
    pub accumulate: usize,
    /// The type in which the model computes. f32.
    pub precision: Precision,
    /// Whether the inside of transformer blocks is computed anew for the backward pass instead of being kept: about a third
    /// more work, and a fraction of the memory. The gradients are the same to the bit. No.
    pub recompute: bool,
    /// Size of the pieces, in MiB, in which gradients go to the other processes while the backward pass goes on: a small one is
    /// on its way sooner, a large one costs less a number. 25, as in PyTorch's `DistributedDataParallel`.
    pub bucket_mib: usize,
    /// Also keep a mean of the weights over past steps, each counting this factor less than the one after it, such as 0.9999;
    /// the finished model has these. None by default, as in the official code.
    pub ema_decay: Option<f64>,
    /// Iterations from one report (and row of metrics) to the next; each checkpoint and the end are reported too. 50.
    pub log_every: u64,
    /// Whether the same also goes to event files, for TensorBoard. Yes.
    pub tensorboard: bool,
    /// Iterations from one checkpoint to the next; the end makes one too. 1000: what an interruption can cost.
    pub checkpoint_every: u64,
    /// How many checkpoints to keep. 2: should the disk damage the last one, there is another.
    pub keep_checkpoints: usize,
    /// Whether the best checkpoint is kept as well: the one of the highest score ([`Trainable::score`](crate::Trainable::score)),
    /// or else of the lowest losses since the one before. Yes: the last is not always the best, and it costs the room of one more.
    pub keep_best: bool,
    /// Where dropout, negatives and whatever else the model draws comes from. 42, as in the official code.
    pub seed: u64,
    /// Stops training after this many minutes (interruptions not counted), if the iterations are not done before.
    ///
    /// With a limit, training measures its own speed and decays the learning rate over the time that is left: the schedule
    /// goes by the share of the time or of the iterations that has passed, whichever is larger. However fast the machine,
    /// the run thus ends with a learning rate that has come down. None by default, since a run by the clock cannot be
    /// repeated to the bit.
    pub time_limit_minutes: Option<f64>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            iterations: 200_000,
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
            clip: Some(1.0),
            accumulate: 1,
            precision: Precision::F32,
            recompute: false,
            bucket_mib: 25,
            ema_decay: None,
            log_every: 50,
            tensorboard: true,
            checkpoint_every: 1000,
            keep_checkpoints: 2,
            keep_best: true,
            seed: 42,
            time_limit_minutes: None,
        }
    }
}

/// The type in which a model computes. Weights, moments and sums of gradients are kept in f32 whatever it is, and losses are
/// f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with the range of 32: half the memory, and faster where processors have instructions for it.
    Bf16,
    /// 16 bits of a small range. Losses are scaled up, so that gradients do not vanish, by a factor that is halved when one
    /// overflows (the step is then left out) and doubled after 2000 steps without.
    F16,
}

impl Precision {
    /// The type of parameters and activations.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// AdamW, as in transformers 4.12: moments corrected for bias, then decay, decoupled and scaled by the learning rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Highest learning rate. 1e-4.
    pub lr: f64,
    /// Share of itself, times the learning rate, that a parameter loses at each step. 0.01.
    pub weight_decay: f64,
    /// How slowly the moments forget. 0.9 and 0.98: the second is quicker than Adam's usual 0.999.
    pub betas: (f64, f64),
    /// Added to the root of the second moment, against division by 0. 1e-8.
    pub eps: f64,
    /// Factor on the learning rate of the parameters in `lr_mult_names`. 2: they start from nothing, the others from a
    /// model that was trained before. Set 1 if all start from nothing.
    pub lr_mult: f64,
    /// Parts of names: a parameter that contains one gets `lr_mult`. By default what the original adds to the vision and
    /// text encoders it starts from: temperature, projections, heads, cross attention.
    pub lr_mult_names: Vec<String>,
    /// Parts of names: a parameter that contains one does not decay. By default biases and the scales of normalisations,
    /// in the original's words. (It does decay the temperature; add `temp` if that is not wanted.)
    pub no_decay_names: Vec<String>,
    /// Parts of names: a parameter that contains one is not trained. None.
    pub frozen_names: Vec<String>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        Self {
            lr: 1e-4,
            weight_decay: 0.01,
            betas: (0.9, 0.98),
            eps: 1e-8,
            lr_mult: 2.0,
            lr_mult_names: names(&["temp", "vision_proj", "text_proj", "itm_head", "bbox_head", "crossattention"]),
            no_decay_names: names(&["bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight"]),
            frozen_names: Vec::new(),
        }
    }
}

impl OptimizerConfig {
    /// The weight decay of the parameter of this name.
    pub fn weight_decay_of(&self, parameter: &str) -> f64 {
        if contains_any(parameter, &self.no_decay_names) { 0.0 } else { self.weight_decay }
    }

    /// The factor on the learning rate of the parameter of this name.
    pub fn lr_mult_of(&self, parameter: &str) -> f64 {
        if contains_any(parameter, &self.lr_mult_names) { self.lr_mult } else { 1.0 }
    }

    /// Checks `frozen_names` against the names of a model's parameters.
    ///
    /// # Errors
    /// [`TrainError::Config`] if names are frozen that no parameter has, or nothing is left to train.
    pub fn check_frozen<'a>(&self, parameters: impl Iterator<Item = &'a str> + Clone) -> Result<(), TrainError> {
        let wrong = |found| {
            let (field, expected) = ("optimizer.frozen_names", "parts of names of parameters, but not of all");
            TrainError::Config { field, expected, found }
        };
        let has = |part: &str| parameters.clone().any(|name| name.contains(part));
        if let Some(part) = self.frozen_names.iter().find(|part| !has(part)) {
            return Err(wrong(format!("{part:?}, which no parameter has")));
        }
        match !self.frozen_names.is_empty() && parameters.clone().all(|name| self.freezes(name)) {
            true => Err(wrong(format!("{:?}, which leave none to train", self.frozen_names))),
            false => Ok(()),
        }
    }

    /// Whether the parameter of this name is left as it is.
    pub fn freezes(&self, parameter: &str) -> bool {
        contains_any(parameter, &self.frozen_names)
    }
}

fn contains_any(name: &str, parts: &[String]) -> bool {
    parts.iter().any(|part| name.contains(part.as_str()))
}

/// How the learning rate goes over the run: up in a line, then down.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// How long it goes up from 0. 2500 iterations, while Adam's second moments are still taken from a few batches.
    pub warmup: Warmup,
    /// The shape of the way down. In a line.
    pub decay: Decay,
    /// Where it ends, as a share of the highest learning rate. 0.
    pub final_lr_fraction: f64,
}

/// How long the learning rate goes up: in a file, an integer counts iterations, and another number is a share of the run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Warmup {
    /// This many iterations.
    Iterations(u64),
    /// This share of the run.
    Fraction(f64),
}

impl Default for Warmup {
    fn default() -> Self {
        Self::Iterations(2500)
    }
}

/// The shape of the learning rate's way down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// A line.
    #[default]
    Linear,
    /// Half a wave: slow, fast, slow.
    Cosine,
}

impl ScheduleConfig {
    /// The share of the highest learning rate for the iteration after `iteration` ones, where the run has come `at`
    /// iterations of `of` far (more than `iteration` if a time limit drives it).
    fn factor(&self, iteration: f64, at: f64, of: f64) -> f64 {
        let (passed, warmup) = match self.warmup {
            Warmup::Iterations(iterations) => (iteration, iterations as f64),
            Warmup::Fraction(fraction) => (at, (of * fraction).floor()),
        };
        let up = if passed < warmup { passed / warmup } else { 1.0 };
        let left = ((of - at) / (of - warmup).max(1.0)).clamp(0.0, 1.0);
        let down = match self.decay {
            Decay::Linear => left,
            Decay::Cosine => 0.5 - 0.5 * (PI * left).cos(),
        };
        up.min(self.final_lr_fraction + (1.0 - self.final_lr_fraction) * down)
    }
}

impl TrainConfig {
    /// The learning rate of the iteration after `iteration` ones and `elapsed` time; the first has number 0.
    pub fn learning_rate(&self, iteration: u64, elapsed: Duration) -> f64 {
        let (iteration, of) = (iteration as f64, self.iterations as f64);
        let by_time = self.time_limit().map_or(0.0, |limit| elapsed.as_secs_f64() / limit.as_secs_f64() * of);
        self.optimizer.lr * self.schedule.factor(iteration, iteration.max(by_time), of)
    }

    /// The time limit, if there is one.
    pub(crate) fn time_limit(&self) -> Option<Duration> {
        self.time_limit_minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes))
    }

    /// Checks that every value is in its range.
    ///
    /// # Errors
    /// [`TrainError::Config`] about the first that is not.
    pub fn check(&self) -> Result<(), TrainError> {
        let OptimizerConfig { lr, weight_decay, betas, eps, lr_mult, .. } = self.optimizer;
        let decays = |beta: f64| (0.0..1.0).contains(&beta);
        let fraction = |share: f64| (0.0..=1.0).contains(&share);
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let warmup = match self.schedule.warmup {
            Warmup::Iterations(iterations) => (true, iterations.to_string()),
            Warmup::Fraction(share) => (fraction(share), share.to_string()),
        };
        let final_lr = self.schedule.final_lr_fraction;
        let clip = self.clip.unwrap_or(1.0);
        let limit = self.time_limit_minutes.unwrap_or(1.0);
        let ema = self.ema_decay.unwrap_or(0.0);
        // What `Duration` can hold without a second thought: 19 000 years.
        let fits = positive(limit) && limit < 1e10;
        let rules = [
            (self.iterations > 0, "iterations", "at least 1", self.iterations.to_string()),
            (positive(lr), "optimizer.lr", "a positive number", lr.to_string()),
            (fraction(weight_decay), "optimizer.weight_decay", "0 to 1", weight_decay.to_string()),
            (
                decays(betas.0) && decays(betas.1),
                "optimizer.betas",
                "two numbers from 0 to below 1",
                format!("{betas:?}"),
            ),
            (positive(eps), "optimizer.eps", "a positive number", eps.to_string()),
            (positive(lr_mult), "optimizer.lr_mult", "a positive number", lr_mult.to_string()),
            (warmup.0, "schedule.warmup", "a number of iterations, or a fraction of 0 to 1", warmup.1),
            (fraction(final_lr), "schedule.final_lr_fraction", "0 to 1", final_lr.to_string()),
            (positive(clip.into()), "clip", "a positive number or null", clip.to_string()),
            (self.accumulate > 0, "accumulate", "at least 1", self.accumulate.to_string()),
            ((1..=2048).contains(&self.bucket_mib), "bucket_mib", "1 to 2048", self.bucket_mib.to_string()),
            (decays(ema), "ema_decay", "a number from 0 to below 1, or null", ema.to_string()),
            (self.log_every > 0, "log_every", "at least 1", self.log_every.to_string()),
            (self.checkpoint_every > 0, "checkpoint_every", "at least 1", self.checkpoint_every.to_string()),
            (self.keep_checkpoints > 0, "keep_checkpoints", "at least 1", self.keep_checkpoints.to_string()),
            (fits, "time_limit_minutes", "a positive number or null", limit.to_string()),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            Some((_, field, expected, found)) => Err(TrainError::Config { field, expected, found }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(config: &TrainConfig, iterations: &[u64]) -> Vec<f64> {
        let rate = |&iteration| config.learning_rate(iteration, Duration::ZERO);
        iterations.iter().map(rate).map(|rate| (rate * 1e9).round() / 1e9).collect()
    }

    fn config(schedule: ScheduleConfig) -> TrainConfig {
        let optimizer = OptimizerConfig { lr: 1.0, ..OptimizerConfig::default() };
        TrainConfig { iterations: 100, optimizer, schedule, ..TrainConfig::default() }
    }

    #[test]
    fn up_then_down() {
        let warmup = Warmup::Iterations(20);
        let linear = config(ScheduleConfig { warmup, ..ScheduleConfig::default() });
        assert_eq!(rates(&linear, &[0, 1, 10, 19, 20, 60, 99, 100]), [0.0, 0.05, 0.5, 0.95, 1.0, 0.5, 0.0125, 0.0]);
        let cosine = config(ScheduleConfig { warmup, decay: Decay::Cosine, final_lr_fraction: 0.1 });
        assert_eq!(rates(&cosine, &[10, 20, 60, 100]), [0.5, 1.0, 0.55, 0.1]);
        let share = config(ScheduleConfig { warmup: Warmup::Fraction(0.2), ..ScheduleConfig::default() });
        assert_eq!(rates(&share, &[0, 10, 20, 60, 100]), [0.0, 0.5, 1.0, 0.5, 0.0]);
        let odd = config(ScheduleConfig { warmup: Warmup::Fraction(0.125), ..ScheduleConfig::default() });
        assert_eq!(rates(&odd, &[6, 12, 56]), [0.5, 1.0, 0.5]);
        let none = config(ScheduleConfig { warmup: Warmup::Iterations(0), ..ScheduleConfig::default() });
        assert_eq!(rates(&none, &[0, 50]), [1.0, 0.5]);
        let only = config(ScheduleConfig { warmup: Warmup::Iterations(200), ..ScheduleConfig::default() });
        assert_eq!(rates(&only, &[0, 50]), [0.0, 0.25]);
    }

    #[test]
    fn a_time_limit_moves_the_schedule() {
        let warmup = Warmup::Iterations(20);
        let mut config = config(ScheduleConfig { warmup, ..ScheduleConfig::default() });
        config.time_limit_minutes = Some(1.0);
        let rate =
            |iteration, seconds| (config.learning_rate(iteration, Duration::from_secs(seconds)) * 1e9).round() / 1e9;
        assert_eq!(rate(10, 3), 0.5);
        // Slower than the iterations want it: by the time.
        assert_eq!((rate(30, 36), rate(30, 60)), (0.5, 0.0));
        // Faster: by the iterations.
        assert_eq!(rate(60, 30), 0.5);
    }

    #[test]
    fn names_choose_the_group() {
        let config = OptimizerConfig::default();
        for (name, decays, multiplied) in [
            ("vision_encoder.layers.0.blocks.1.attn.qkv.weight", true, false),
            ("vision_encoder.layers.0.blocks.1.attn.relative_position_bias_table", false, false),
            ("vision_encoder.layers.0.blocks.1.norm1.weight", false, false),
            ("vision_encoder.layers.0.downsample.norm.weight", false, false),
            ("text_encoder.bert.encoder.layer.0.output.LayerNorm.weight", false, false),
            ("text_encoder.bert.encoder.layer.6.crossattention.self.query.weight", true, true),
            ("text_encoder.bert.encoder.layer.6.crossattention.self.query.bias", false, true),
            ("itm_head.1.weight", true, true),
            ("temp", true, true),
        ] {
            assert_eq!(config.weight_decay_of(name) > 0.0, decays, "{name}");
            assert_eq!(config.lr_mult_of(name) == 2.0, multiplied, "{name}");
        }
    }

    #[test]
    fn reads_what_it_writes() {
        let config = TrainConfig { time_limit_minutes: Some(30.0), ..TrainConfig::default() };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<TrainConfig>(&text).unwrap(), config);
        let read = |text| serde_json::from_str::<TrainConfig>(text);
        assert_eq!(read("{}").unwrap(), TrainConfig::default());
        assert_eq!(read(r#"{"schedule": {"warmup": 3}}"#).unwrap().schedule.warmup, Warmup::Iterations(3));
        assert_eq!(read(r#"{"schedule": {"warmup": 0.1}}"#).unwrap().schedule.warmup, Warmup::Fraction(0.1));
        assert_eq!(read(r#"{"clip": null}"#).unwrap().clip, None);
        assert!(read(r#"{"iteration": 3}"#).unwrap_err().to_string().contains("unknown field `iteration`"));
    }

    #[test]
    fn names_what_is_out_of_range() {
        TrainConfig::default().check().unwrap();
        let message = |change: fn(&mut TrainConfig)| {
            let mut config = TrainConfig::default();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert_eq!(message(|c| c.iterations = 0), "iterations: expected at least 1, found 0");
        assert_eq!(message(|c| c.optimizer.lr = f64::NAN), "optimizer.lr: expected a positive number, found NaN");
        assert_eq!(
            message(|c| c.optimizer.betas.1 = 1.0),
            "optimizer.betas: expected two numbers from 0 to below 1, found (0.9, 1.0)"
        );
        assert!(message(|c| c.schedule.warmup = Warmup::Fraction(1.5)).starts_with("schedule.warmup: "));
        assert!(message(|c| c.clip = Some(0.0)).starts_with("clip: "));
        assert!(message(|c| c.time_limit_minutes = Some(f64::INFINITY)).starts_with("time_limit_minutes: "));
        assert!(message(|c| c.keep_checkpoints = 0).starts_with("keep_checkpoints: "));
    }
}
