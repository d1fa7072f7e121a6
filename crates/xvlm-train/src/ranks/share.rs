//! What ranks have to agree on beside gradients.

use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, Tensor, Var};
use sha2::{Digest, Sha256};

use super::{Communicator, Gather, sum};
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::optimizer::{Optimizer, Weights};

/// Checks that all ranks say the same: of each of some things its name, and what this rank says of it.
///
/// # Errors
/// [`TrainError::Unlike`] on every rank, if one does not say what rank 0 says; as [`Communicator::all_gather`].
pub fn compare<const N: usize>(ranks: &dyn Communicator, said: [(&'static str, String); N]) -> Result<(), TrainError> {
    if ranks.size() == 1 {
        return Ok(());
    }
    let failed = || TrainError::tensor("what ranks have in common");
    let digests: Vec<u8> = said.iter().flat_map(|(_, text)| Sha256::digest(text).to_vec()).collect();
    let own = Tensor::from_vec(digests, (1, N * 32), &Device::Cpu).map_err(failed())?;
    let all = ranks.all_gather(&own)?.to_vec2::<u8>().map_err(failed())?;
    for (rank, digests) in all.iter().enumerate() {
        let mut others = digests.chunks(32).zip(all[0].chunks(32)).zip(&said);
        if let Some((_, (what, _))) = others.find(|((found, expected), _)| found != expected) {
            return Err(TrainError::Unlike { rank, what });
        }
    }
    Ok(())
}

/// Checks that all ranks train the same parameters in the same way, by the same version of this library: they would wait for
/// each other without end, or take one parameter's numbers for another's.
pub(crate) fn check_alike(
    ranks: &Arc<dyn Communicator>,
    parameters: &[(String, Var)],
    config: &TrainConfig,
) -> Result<(), TrainError> {
    let shape = |(name, parameter): &(String, Var)| format!("{name} {:?} {:?}\n", parameter.dtype(), parameter.dims());
    let said = [
        ("version of the program", env!("CARGO_PKG_VERSION").to_owned()),
        ("configuration of the training", format!("{config:?}")),
        ("parameters", parameters.iter().map(shape).collect()),
    ];
    compare(&**ranks, said)
}

/// Brings all ranks to the state of rank 0: weights, and what the optimizer knows of them, after `done` iterations. Returns
/// rank 0's `done` and `elapsed`.
pub(crate) fn share(
    ranks: &dyn Communicator,
    optimizer: &mut Optimizer,
    done: u64,
    elapsed: Duration,
) -> Result<(u64, Duration), TrainError> {
    if ranks.size() == 1 {
        return Ok((done, elapsed));
    }
    let failed = || TrainError::tensor("state of rank 0");
    // Steps are few enough for f64 to tell them apart.
    let scale = optimizer.loss_scale;
    let mut numbers = vec![done as f64, elapsed.as_secs_f64(), optimizer.steps as f64];
    numbers.extend([scale.factor, scale.finite_steps as f64]);
    numbers.extend(optimizer.slots.iter().map(|slot| slot.steps as f64));
    let count = numbers.len();
    let numbers = Tensor::from_vec(numbers, count, &Device::Cpu).map_err(failed())?;
    let numbers = ranks.broadcast(&numbers, 0)?.to_vec1::<f64>().map_err(failed())?;
    optimizer.steps = numbers[2] as u64;
    (optimizer.loss_scale.factor, optimizer.loss_scale.finite_steps) = (numbers[3], numbers[4] as u64);
    for (slot, steps) in optimizer.slots.iter_mut().zip(&numbers[5..]) {
        slot.steps = *steps as u64;
    }

    let take = |name: &str, weights: Weights| {
        let own = weights.tensor().map_err(TrainError::tensor(name))?;
        weights.set(&ranks.broadcast(&own, 0)?).map_err(TrainError::tensor(name))
    };
    optimizer.weights().into_iter().try_for_each(|(name, weights)| take(name, weights))?;
    for slot in &optimizer.slots {
        let known = [Some(&slot.first_moment), Some(&slot.second_moment), slot.average.as_ref()];
        known.into_iter().flatten().try_for_each(|variable| take(slot.name, Weights::Whole(variable)))?;
        slot.narrow().map_err(TrainError::tensor(slot.name))?;
    }
    Ok((numbers[0] as u64, Duration::try_from_secs_f64(numbers[1]).unwrap_or_default()))
}

/// Sums by name: of each the sum, and how many numbers it is of.
pub(crate) type Sums = Vec<(String, f64, u64)>;

/// The sums of all ranks, on all of them. Names that only some have are among them.
pub(crate) fn merge(ranks: &Arc<dyn Communicator>, own: Sums) -> Result<Sums, TrainError> {
    if ranks.size() == 1 {
        return Ok(own);
    }
    let failed = |error: &dyn std::fmt::Display| {
        let source = format!("expected losses by name, found {error}").into();
        TrainError::Ranks { rank: ranks.rank(), operation: "sums of losses", source }
    };
    let text = serde_json::to_vec(&[own]).map_err(|error| failed(&error))?;
    let all = Gather::new(ranks, text.len())?.join_numbers::<u8>(&text)?;
    let mut merged = Sums::new();
    for sums in serde_json::Deserializer::from_slice(&all).into_iter::<[Sums; 1]>() {
        let [sums] = sums.map_err(|error| failed(&error))?;
        for (name, sum, count) in sums {
            match merged.iter_mut().find(|(known, ..)| *known == name) {
                Some((_, total, of)) => (*total, *of) = (*total + sum, *of + count),
                None => merged.push((name, sum, count)),
            }
        }
    }
    Ok(merged)
}

/// Whether any rank wants to `stop`, and rank 0's clock.
pub(crate) fn agree(ranks: &dyn Communicator, stop: bool, elapsed: Duration) -> Result<(bool, Duration), TrainError> {
    if ranks.size() == 1 {
        return Ok((stop, elapsed));
    }
    let clock = if ranks.rank() == 0 { elapsed.as_secs_f64() } else { 0.0 };
    let [stops, clock] = sum(ranks, [f64::from(u8::from(stop)), clock])?;
    Ok((stops > 0.0, Duration::try_from_secs_f64(clock).unwrap_or_default()))
}
