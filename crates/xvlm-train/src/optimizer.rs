//! AdamW over named parameters.

use std::collections::{HashMap, HashSet};

use candle_core::{DType, Tensor, Var};
use xvlm_kernels::{AdamW, Gradients, Update, adamw_step, all_finite, joined, round_into, split_into};

use crate::config::{OptimizerConfig, Precision, TrainConfig};
use crate::error::TrainError;

/// AdamW with the original's four groups: with and without decay, with and without a multiplied learning rate.
pub struct Optimizer<'a> {
    pub(crate) slots: Vec<Slot<'a>>,
    /// Steps since the run began.
    pub(crate) steps: u64,
    pub(crate) loss_scale: LossScale,
    parameters: &'a [(String, Var)],
    config: OptimizerConfig,
    clip: Option<f32>,
    ema_decay: Option<f64>,
}

/// A parameter with what the optimizer knows of it.
pub(crate) struct Slot<'a> {
    pub(crate) name: &'a str,
    pub(crate) parameter: &'a Var,
    /// What the parameter lacks to be `f32`, if it is of another type.
    wide: Wide,
    pub(crate) first_moment: Var,
    pub(crate) second_moment: Var,
    /// The mean of the weights over past steps, if one is kept.
    pub(crate) average: Option<Var>,
    /// Steps of this parameter: it makes none where it has no gradient, so that the bias correction is each one's own.
    pub(crate) steps: u64,
    weight_decay: f64,
    lr_mult: f64,
}

/// How a parameter of a half type is trained as `f32`.
enum Wide {
    /// It is `f32`.
    Itself,
    /// By a copy, which it is rounded from.
    Master(Var),
    /// By the lower halves of numbers whose upper halves it has, rounded: half the memory of a copy.
    Rest(Var),
}

impl Wide {
    fn of(parameter: &Var) -> candle_core::Result<Self> {
        Ok(match parameter.dtype() {
            DType::F32 => Self::Itself,
            DType::BF16 if parameter.device().is_cpu() && parameter.is_contiguous() => {
                Self::Rest(Var::zeros(parameter.shape(), DType::I16, parameter.device())?)
            }
            _ => Self::Master(Var::from_tensor(&parameter.as_detached_tensor().to_dtype(DType::F32)?)?),
        })
    }
}

/// Weights as they are trained.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Weights<'a> {
    Whole(&'a Var),
    /// Those of [`split_into`].
    Halves {
        parameter: &'a Var,
        rest: &'a Var,
    },
}

impl Weights<'_> {
    /// A variable of the same shape on the same device.
    pub(crate) fn like(&self) -> &Var {
        match self {
            Self::Whole(weights) => weights,
            Self::Halves { parameter, .. } => parameter,
        }
    }

    /// The numbers, at their full precision.
    pub(crate) fn tensor(&self) -> candle_core::Result<Tensor> {
        match self {
            Self::Whole(weights) => Ok(weights.as_detached_tensor()),
            Self::Halves { parameter, rest } => joined(parameter, rest),
        }
    }

    /// Puts others in their place. Where these are the master of a parameter, that one follows by [`Slot::narrow`].
    pub(crate) fn set(&self, weights: &Tensor) -> candle_core::Result<()> {
        match self {
            Self::Whole(variable) => variable.set(&weights.to_dtype(variable.dtype())?),
            Self::Halves { parameter, rest } => split_into(parameter, rest, weights),
        }
    }
}

impl Slot<'_> {
    /// The weights as they are trained: `f32`.
    pub(crate) fn weights(&self) -> Weights<'_> {
        match &self.wide {
            Wide::Itself => Weights::Whole(self.parameter),
            Wide::Master(master) => Weights::Whole(master),
            Wide::Rest(rest) => Weights::Halves { parameter: self.parameter, rest },
        }
    }

    /// Brings the mean of the weights after them.
    fn follow(&self, ema_decay: Option<f64>) -> candle_core::Result<()> {
        if let (Some(average), Some(decay)) = (&self.average, ema_decay) {
            let old = (average.as_detached_tensor() * decay)?;
            average.set(&(old + (self.weights().tensor()? * (1.0 - decay))?)?)?;
        }
        Ok(())
    }

    /// Gives the parameter its master's weights, if it has one.
    pub(crate) fn narrow(&self) -> candle_core::Result<()> {
        match &self.wide {
            Wide::Master(master) => round_into(self.parameter, master),
            Wide::Itself | Wide::Rest(_) => Ok(()),
        }
    }
}

impl<'a> Optimizer<'a> {
    /// An optimizer that has seen no gradient yet.
    ///
    /// # Errors
    /// [`TrainError::Parameter`] if a parameter is of a type that cannot be trained, or listed twice; [`TrainError::Config`] if
    /// names are frozen that no parameter has, or nothing is left to train.
    pub fn new(parameters: &'a [(String, Var)], config: &TrainConfig) -> Result<Self, TrainError> {
        let mut slots: Vec<Slot> = Vec::with_capacity(parameters.len());
        let (mut names, mut tensors) = (HashSet::new(), HashMap::new());
        for (name, parameter) in parameters {
            let wrong = |expected, found| TrainError::Parameter { name: name.clone(), expected, found };
            if !matches!(parameter.dtype(), DType::F32 | DType::BF16 | DType::F16) {
                return Err(wrong("dtype F32, BF16 or F16", format!("{:?}", parameter.dtype())));
            }
            if !names.insert(name) {
                return Err(wrong("a name of its own", "another parameter of this name".into()));
            }
            if let Some(other) = tensors.insert(parameter.id(), name) {
                return Err(wrong("a tensor of its own", format!("that of {other}")));
            }
            if config.optimizer.freezes(name) {
                continue;
            }
            let wide = || parameter.as_detached_tensor().to_dtype(DType::F32);
            let copy = || wide().and_then(|wide| Var::from_tensor(&wide)).map_err(TrainError::tensor(name));
            let zeros = || {
                let zeros = Tensor::zeros(parameter.shape(), DType::F32, parameter.device());
                zeros.and_then(|zeros| Var::from_tensor(&zeros)).map_err(TrainError::tensor(name))
            };
            slots.push(Slot {
                name,
                parameter,
                wide: Wide::of(parameter).map_err(TrainError::tensor(name))?,
                first_moment: zeros()?,
                second_moment: zeros()?,
                average: config.ema_decay.map(|_| copy()).transpose()?,
                steps: 0,
                weight_decay: config.optimizer.weight_decay_of(name),
                lr_mult: config.optimizer.lr_mult_of(name),
            });
        }
        config.optimizer.check_frozen(parameters.iter().map(|(name, _)| name.as_str()))?;
        Ok(Self {
            slots,
            steps: 0,
            loss_scale: LossScale::new(config.precision),
            parameters,
            config: config.optimizer.clone(),
            clip: config.clip,
            ema_decay: config.ema_decay,
        })
    }

    /// What a loss is to be multiplied by before its gradient is taken: 1 but for `f16`.
    pub fn loss_scale(&self) -> f64 {
        self.loss_scale.factor
    }

    /// One step at learning rate `lr` with the gradients of the scaled loss, which are scaled down to the norm `clip` if theirs
    /// is longer. Returns their norm (without the loss's scale) before that, over all parameters; if this is not finite,
    /// nothing was changed but the scale.
    ///
    /// A parameter without a gradient stays as it is, moments and all, as in PyTorch.
    ///
    /// # Errors
    /// [`TrainError::Tensor`] if a tensor operation fails.
    pub fn step(&mut self, gradients: &Gradients, lr: f64) -> Result<f64, TrainError> {
        let OptimizerConfig { betas: (beta1, beta2), eps, .. } = self.config;
        let settings = AdamW { beta1, beta2, eps, max_norm: self.clip.map(f64::from) };
        let scale = self.loss_scale.factor;
        let unscaled = |gradient: &Tensor| match scale {
            1.0 => Ok(gradient.clone()),
            _ => gradient.to_dtype(DType::F32)?.affine(1.0 / scale, 0.0),
        };
        let known = |slot: &Slot| gradients.get(slot.parameter).map(unscaled).transpose();
        let known = self.slots.iter().map(known).collect::<candle_core::Result<Vec<_>>>();
        let known = known.map_err(TrainError::tensor("gradient"))?;
        let with_gradients =
            self.slots.iter().zip(&known).filter_map(|(slot, gradient)| Some((slot, gradient.as_ref()?)));
        let updates: Vec<Update> = with_gradients
            .map(|(slot, gradient)| Update {
                parameter: match &slot.wide {
                    Wide::Master(master) => master,
                    Wide::Itself | Wide::Rest(_) => slot.parameter,
                },
                rest: match &slot.wide {
                    Wide::Rest(rest) => Some(rest),
                    Wide::Itself | Wide::Master(_) => None,
                },
                first_moment: &slot.first_moment,
                second_moment: &slot.second_moment,
                gradient,
                lr: lr * slot.lr_mult,
                weight_decay: slot.weight_decay,
                step: slot.steps + 1,
            })
            .collect();
        let norm = adamw_step(&settings, &updates).map_err(TrainError::tensor("optimizer step"))?;
        self.loss_scale.update(norm);
        if norm.is_finite() {
            for (slot, gradient) in self.slots.iter_mut().zip(&known) {
                if gradient.is_some() {
                    slot.steps += 1;
                    slot.narrow().map_err(TrainError::tensor(slot.name))?;
                }
                slot.follow(self.ema_decay).map_err(TrainError::tensor(slot.name))?;
            }
            self.steps += 1;
        }
        Ok(norm)
    }

    /// The first parameter whose gradient has a number that is not finite.
    pub(crate) fn first_not_finite(&self, gradients: &Gradients) -> Option<&str> {
        let is_finite = |gradient: &Tensor| all_finite(gradient).unwrap_or(true);
        let slot = self.slots.iter().find(|slot| gradients.get(slot.parameter).is_some_and(|it| !is_finite(it)))?;
        Some(slot.name)
    }

    /// Every parameter's weights as they are trained, frozen ones among them.
    pub(crate) fn weights(&self) -> Vec<(&str, Weights<'_>)> {
        self.all(Slot::weights)
    }

    /// Every parameter's weights as a finished model has them, frozen ones among them: `f32`, and means over past steps where
    /// these are kept.
    ///
    /// # Errors
    /// [`TrainError::Tensor`] if a tensor operation fails.
    pub fn finished_weights(&self) -> Result<Vec<(String, Tensor)>, TrainError> {
        let weights = self.all(|slot| slot.average.as_ref().map_or_else(|| slot.weights(), Weights::Whole));
        let wide = |(name, weights): (&str, Weights)| {
            let wide = weights.tensor().and_then(|weights| weights.to_dtype(DType::F32));
            Ok((name.to_owned(), wide.map_err(TrainError::tensor(name))?))
        };
        weights.into_iter().map(wide).collect()
    }

    fn all<'b>(&'b self, of: impl Fn(&'b Slot<'a>) -> Weights<'b>) -> Vec<(&'b str, Weights<'b>)> {
        let trained: HashMap<&str, &Slot> = self.slots.iter().map(|slot| (slot.name, slot)).collect();
        let weights = |(name, parameter): &'b (String, Var)| {
            (name.as_str(), trained.get(name.as_str()).map_or(Weights::Whole(parameter), |slot| of(slot)))
        };
        self.parameters.iter().map(weights).collect()
    }
}

/// What losses are multiplied by, so that small gradients can be told from 0 in `f16` (Micikevicius et al. 2018); the
/// numbers are those of `torch.amp.GradScaler`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LossScale {
    pub(crate) factor: f64,
    /// Finite steps since the factor was changed.
    pub(crate) finite_steps: u64,
    is_dynamic: bool,
}

impl LossScale {
    const START: f64 = 65536.0;
    const DOUBLED_AFTER: u64 = 2000;

    fn new(precision: Precision) -> Self {
        let is_dynamic = precision == Precision::F16;
        Self { factor: if is_dynamic { Self::START } else { 1.0 }, finite_steps: 0, is_dynamic }
    }

    /// Whether a gradient that is not finite may be due to the factor.
    pub(crate) fn can_fall(&self) -> bool {
        self.is_dynamic && self.factor > 1.0
    }

    /// The factor, if it is one that changes.
    pub(crate) fn dynamic(&self) -> Option<f64> {
        self.is_dynamic.then_some(self.factor)
    }

    fn update(&mut self, norm: f64) {
        if !self.is_dynamic {
            return;
        }
        self.finite_steps = if norm.is_finite() { self.finite_steps + 1 } else { 0 };
        if !norm.is_finite() {
            self.factor = (self.factor / 2.0).max(1.0);
        } else if self.finite_steps == Self::DOUBLED_AFTER {
            (self.factor, self.finite_steps) = (self.factor * 2.0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use xvlm_kernels::Tape;

    /// Gradients of 3 and 4, as a norm of 5: what one step makes of two zeros.
    fn after(clip: Option<f32>, scale: f64) -> (f64, Vec<f32>) {
        let variable = || Var::new(&[0f32], &Device::Cpu).unwrap();
        let parameters = [("a".to_owned(), variable()), ("b".to_owned(), variable())];
        // A large eps, so that the length of the gradient shows.
        let optimizer = OptimizerConfig { eps: 10.0, ..OptimizerConfig::default() };
        let config = TrainConfig { optimizer, clip, ..TrainConfig::default() };
        let mut optimizer = Optimizer::new(&parameters, &config).unwrap();
        let [a, b] = [(0, 3.0), (1, 4.0)]
            .map(|(i, slope): (usize, f64)| (parameters[i].1.as_tensor() * (slope * scale)).unwrap());
        let mut gradients = Gradients::default();
        Tape::default().backward((a + b).unwrap().sum_all().unwrap(), &mut gradients, |_, _| Ok(())).unwrap();
        let norm = optimizer.step(&gradients, 0.1).unwrap();
        (norm, parameters.iter().flat_map(|(_, parameter)| parameter.to_vec1().unwrap()).collect())
    }

    #[test]
    fn clips_to_the_norm() {
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs());
        let (norm, clipped) = after(Some(1.0), 1.0);
        assert_eq!(norm, 5.0);
        assert!(close(&clipped, &after(None, 0.2).1), "{clipped:?}");
        assert!(!close(&clipped, &after(None, 1.0).1), "{clipped:?}");
        assert_eq!(after(Some(6.0), 1.0), after(None, 1.0));
    }

    #[test]
    fn an_infinite_gradient_changes_nothing() {
        let (norm, parameters) = after(Some(1.0), f64::INFINITY);
        assert!(!norm.is_finite());
        assert_eq!(parameters, [0.0, 0.0]);
    }

    fn weight(dtype: DType, value: f32) -> Var {
        Var::from_tensor(&Tensor::new(&[value], &Device::Cpu).unwrap().to_dtype(dtype).unwrap()).unwrap()
    }

    fn number(x: &Tensor) -> f32 {
        x.to_dtype(DType::F32).unwrap().to_vec1().unwrap()[0]
    }

    /// A step with a gradient of 1 for each of these.
    fn step(optimizer: &mut Optimizer, parameters: &[(String, Var)], lr: f64) -> f64 {
        let mut gradients = Gradients::default();
        for (_, parameter) in parameters {
            gradients.insert(parameter, parameter.ones_like().unwrap());
        }
        optimizer.step(&gradients, lr).unwrap()
    }

    fn plain(precision: Precision) -> TrainConfig {
        let optimizer = OptimizerConfig { weight_decay: 0.0, ..OptimizerConfig::default() };
        TrainConfig { precision, optimizer, ..TrainConfig::default() }
    }

    #[test]
    fn steps_that_a_half_type_would_round_away_add_up() {
        for (precision, rounded) in [(Precision::Bf16, 0.8984375), (Precision::F16, 0.899_902_34)] {
            let parameters = [("a".to_owned(), weight(precision.dtype(), 1.0))];
            let mut optimizer = Optimizer::new(&parameters, &plain(precision)).unwrap();
            // With a gradient that is always the same, Adam steps by the learning rate. Half of it is lost beside 1, in both types.
            for _ in 0..1000 {
                step(&mut optimizer, &parameters, 1e-4);
            }
            let finished = optimizer.finished_weights().unwrap();
            assert!((number(&finished[0].1) - 0.9).abs() < 1e-4, "{}", finished[0].1);
            assert_eq!((finished[0].1.dtype(), number(&parameters[0].1)), (DType::F32, rounded));
        }
    }

    #[test]
    fn averages_follow_the_weights() {
        let parameters = [("a".to_owned(), weight(DType::F32, 1.0)), ("b".to_owned(), weight(DType::F32, 2.0))];
        let config = TrainConfig { ema_decay: Some(0.75), ..plain(Precision::F32) };
        let mut optimizer = Optimizer::new(&parameters, &config).unwrap();
        let mut averages = [1.0, 2.0];
        for i in 0..8 {
            // The second has no gradient in the second half; its mean follows all the same.
            step(&mut optimizer, &parameters[..if i < 4 { 2 } else { 1 }], 0.1);
            for ((_, parameter), average) in parameters.iter().zip(&mut averages) {
                *average = 0.75 * *average + 0.25 * number(parameter);
            }
        }
        for ((_, found), expected) in optimizer.finished_weights().unwrap().iter().zip(averages) {
            assert!((number(found) - expected).abs() < 1e-6, "{found} for {expected}");
        }
        assert_eq!(
            optimizer.weights().iter().map(|(_, w)| number(&w.tensor().unwrap())).collect::<Vec<_>>(),
            [0, 1].map(|i: usize| number(&parameters[i].1))
        );
        assert!(averages[1] - number(&parameters[1].1) > 0.01);
    }

    #[test]
    fn what_is_frozen_stays_and_is_among_the_weights() {
        let names = ["vision.a", "text.a", "text.b"];
        let parameters = names.map(|name| (name.to_owned(), weight(DType::F32, 1.0)));
        let frozen = |names: &[&str]| {
            let mut config = plain(Precision::F32);
            config.optimizer.frozen_names = names.iter().map(ToString::to_string).collect();
            config
        };
        let mut optimizer = Optimizer::new(&parameters, &frozen(&["text.b", "vision"])).unwrap();
        step(&mut optimizer, &parameters, 0.1);
        let [kept, moved] = [1.0, 0.9];
        let finished = optimizer.finished_weights().unwrap();
        for ((name, weights), expected) in finished.iter().zip([kept, moved, kept]) {
            assert!((number(weights) - expected).abs() < 1e-6, "{name}: {weights}");
        }
        assert_eq!(finished.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), names);
        let error = |names: &[&str]| Optimizer::new(&parameters, &frozen(names)).err().unwrap().to_string();
        let expected = "optimizer.frozen_names: expected parts of names of parameters, but not of all, found ";
        assert_eq!(error(&["vision", "txt"]), format!("{expected}\"txt\", which no parameter has"));
        assert_eq!(error(&["a", "b"]), format!("{expected}[\"a\", \"b\"], which leave none to train"));
    }

    #[test]
    fn the_loss_scale_falls_and_rises() {
        let mut scale = LossScale::new(Precision::F16);
        scale.update(f64::NAN);
        assert_eq!((scale.factor, scale.can_fall()), (32768.0, true));
        (0..1999).for_each(|_| scale.update(1.0));
        assert_eq!(scale.factor, 32768.0);
        scale.update(1.0);
        assert_eq!((scale.factor, scale.finite_steps), (65536.0, 0));
        (0..20).for_each(|_| scale.update(f64::INFINITY));
        assert_eq!((scale.factor, scale.can_fall()), (1.0, false));
        let mut none = LossScale::new(Precision::Bf16);
        none.update(f64::NAN);
        assert_eq!((none.factor, none.can_fall()), (1.0, false));
    }
}
