//! Looking for the first number that is not finite.

use candle_core::{Result, Tensor, Var};
use xvlm_encoders::Pass;
use xvlm_kernels::all_finite;
use xvlm_train::{Losses, Step};

/// The first tensor on the way to the losses of a batch that has numbers that are not finite: the pixels, the parameters, the
/// outputs of blocks and layers in the order in which they are computed, and the losses. `records` tell where each image is from,
/// if that is known.
pub(crate) fn first_not_finite(
    (pixels, records): (&Tensor, &[String]),
    parameters: &[(String, Var)],
    step: &mut Step,
    losses: impl FnOnce(&Pass, &mut Step) -> Result<Losses>,
) -> Option<String> {
    let is_bad = |x: &Tensor| !all_finite(x).unwrap_or(true);
    let mut images = 0..pixels.dim(0).unwrap_or(0);
    if let Some(image) = images.find(|&image| pixels.get(image).is_ok_and(|pixels| is_bad(&pixels))) {
        let record = records.get(image).cloned().unwrap_or_else(|| format!("image {image} of the batch"));
        return Some(format!("pixels of {record}"));
    }
    if let Some((name, _)) = parameters.iter().find(|(_, parameter)| is_bad(parameter)) {
        return Some(format!("parameter {name}"));
    }
    let pass = Pass::training(step.rng).checking();
    let losses = losses(&pass, step);
    let output = pass.first_not_finite().map(|name| format!("output of {name}"));
    let loss = || losses.ok()?.0.into_iter().find(|(_, loss)| is_bad(loss)).map(|(name, _)| format!("loss {name}"));
    output.or_else(loss)
}
