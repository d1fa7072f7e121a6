//! The mean of all ranks' gradients.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use xvlm_kernels::Gradients;

use super::Communicator;
use crate::error::TrainError;
use crate::optimizer::Optimizer;

/// Averages gradients over ranks.
pub(crate) struct Reducer {
    ranks: Arc<dyn Communicator>,
    variables: Vec<Tensor>,
}

impl Reducer {
    /// For the parameters that an optimizer trains.
    pub(crate) fn new(ranks: &Arc<dyn Communicator>, optimizer: &Optimizer) -> Self {
        let variables = optimizer.slots.iter().map(|slot| slot.parameter.as_tensor().clone()).collect();
        Self { ranks: Arc::clone(ranks), variables }
    }

    /// The gradient of a variable is complete on this rank.
    pub(crate) fn ready(&mut self, variable: &Tensor, gradient: &Tensor) -> candle_core::Result<()> {
        let _ = (variable, gradient);
        Ok(())
    }

    /// Puts the means of all ranks' gradients in the place of this rank's. A parameter that has none on some ranks counts there
    /// as 0; one that has none anywhere is left without.
    ///
    /// # Errors
    /// [`TrainError::Ranks`] if a rank does not answer.
    pub(crate) fn finish(&mut self, gradients: &mut Gradients) -> Result<(), TrainError> {
        if self.ranks.size() == 1 {
            return Ok(());
        }
        let failed = || TrainError::tensor("gradients of all ranks");
        let has: Vec<f32> = self.variables.iter().map(|v| f32::from(u8::from(gradients.get(v).is_some()))).collect();
        let has = self.ranks.all_reduce(&Tensor::new(has, &Device::Cpu).map_err(failed())?)?;
        let has = has.to_vec1::<f32>().map_err(failed())?;
        for (variable, _) in self.variables.iter().zip(has).filter(|(_, has)| *has > 0.0) {
            let local = match gradients.get(variable) {
                Some(gradient) => gradient.to_dtype(DType::F32),
                None => Tensor::zeros(variable.shape(), DType::F32, variable.device()),
            };
            let sum = self.ranks.all_reduce(&local.map_err(failed())?)?;
            gradients.insert(variable, (sum / self.ranks.size() as f64).map_err(failed())?);
        }
        Ok(())
    }
}
