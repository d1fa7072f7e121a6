//! AdamW over named parameters.

use std::collections::{HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{DType, Var};
use xvlm_kernels::{AdamW, Update, adamw_step};

use crate::config::OptimizerConfig;
use crate::error::TrainError;

/// AdamW with the original's four groups: with and without decay, with and without a multiplied learning rate.
pub struct Optimizer<'a> {
    pub(crate) slots: Vec<Slot<'a>>,
    /// Steps since the run began.
    pub(crate) steps: u64,
    config: OptimizerConfig,
}

/// A parameter with what the optimizer knows of it.
pub(crate) struct Slot<'a> {
    pub(crate) name: &'a str,
    pub(crate) parameter: &'a Var,
    pub(crate) first_moment: Var,
    pub(crate) second_moment: Var,
    /// Steps of this parameter: it makes none where it has no gradient, so that the bias correction is each one's own.
    pub(crate) steps: u64,
    weight_decay: f64,
    lr_mult: f64,
}

impl<'a> Optimizer<'a> {
    /// An optimizer that has seen no gradient yet.
    ///
    /// # Errors
    /// [`TrainError::Parameter`] if a parameter is not `f32` or listed twice.
    pub fn new(parameters: &'a [(String, Var)], config: &OptimizerConfig) -> Result<Self, TrainError> {
        let mut slots: Vec<Slot> = Vec::with_capacity(parameters.len());
        let (mut names, mut tensors) = (HashSet::new(), HashMap::new());
        for (name, parameter) in parameters {
            let wrong = |expected, found| TrainError::Parameter { name: name.clone(), expected, found };
            if parameter.dtype() != DType::F32 {
                return Err(wrong("dtype F32", format!("{:?}", parameter.dtype())));
            }
            if !names.insert(name) {
                return Err(wrong("a name of its own", "another parameter of this name".into()));
            }
            if let Some(other) = tensors.insert(parameter.id(), name) {
                return Err(wrong("a tensor of its own", format!("that of {other}")));
            }
            let zeros =
                || parameter.zeros_like().and_then(|zeros| Var::from_tensor(&zeros)).map_err(TrainError::tensor(name));
            slots.push(Slot {
                name,
                parameter,
                first_moment: zeros()?,
                second_moment: zeros()?,
                steps: 0,
                weight_decay: config.weight_decay_of(name),
                lr_mult: config.lr_mult_of(name),
            });
        }
        Ok(Self { slots, steps: 0, config: config.clone() })
    }

    /// One step at learning rate `lr`, with the gradient scaled down to the norm `clip` if it is longer. Returns its norm
    /// before that, over all parameters; if this is not finite, nothing was changed.
    ///
    /// A parameter without a gradient stays as it is, moments and all, as in PyTorch.
    ///
    /// # Errors
    /// [`TrainError::Tensor`] if a tensor operation fails.
    pub fn step(&mut self, gradients: &GradStore, lr: f64, clip: Option<f32>) -> Result<f64, TrainError> {
        let OptimizerConfig { betas: (beta1, beta2), eps, .. } = self.config;
        let settings = AdamW { beta1, beta2, eps, max_norm: clip.map(f64::from) };
        let with_gradients = self.slots.iter().filter_map(|slot| Some((slot, gradients.get(slot.parameter)?)));
        let updates: Vec<Update> = with_gradients
            .map(|(slot, gradient)| Update {
                parameter: slot.parameter,
                first_moment: &slot.first_moment,
                second_moment: &slot.second_moment,
                gradient,
                lr: lr * slot.lr_mult,
                weight_decay: slot.weight_decay,
                step: slot.steps + 1,
            })
            .collect();
        let norm = adamw_step(&settings, &updates).map_err(TrainError::tensor("optimizer step"))?;
        if norm.is_finite() {
            let moved = self.slots.iter_mut().filter(|slot| gradients.get(slot.parameter).is_some());
            moved.for_each(|slot| slot.steps += 1);
            self.steps += 1;
        }
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Gradients of 3 and 4, as a norm of 5: what one step makes of two zeros.
    fn after(clip: Option<f32>, scale: f64) -> (f64, Vec<f32>) {
        let variable = || Var::new(&[0f32], &Device::Cpu).unwrap();
        let parameters = [("a".to_owned(), variable()), ("b".to_owned(), variable())];
        // A large eps, so that the length of the gradient shows.
        let config = OptimizerConfig { eps: 10.0, ..OptimizerConfig::default() };
        let mut optimizer = Optimizer::new(&parameters, &config).unwrap();
        let [a, b] = [(0, 3.0), (1, 4.0)]
            .map(|(i, slope): (usize, f64)| (parameters[i].1.as_tensor() * (slope * scale)).unwrap());
        let norm = optimizer.step(&(a + b).unwrap().backward().unwrap(), 0.1, clip).unwrap();
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
}
