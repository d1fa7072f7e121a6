//! The loop.

use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::config::TrainConfig;
use crate::error::{BoxError, TrainError};
use crate::metrics::{MetricsRow, peak_memory_mib};
use crate::optimizer::Optimizer;
use crate::run::RunFolder;
use crate::{Batches, Losses, Progress, StepReport, Summary, Trainable};

/// Trains a model in place; metrics and checkpoints go to `run`.
///
/// `batches` is called once, with the number of iterations already done, and gives the batches of those that follow. With
/// `resume`, training goes on from the newest checkpoint that is whole, and starts from the beginning if there is none.
/// Resuming a finished run brings the model to its end.
///
/// # Errors
/// [`TrainError`]; the checkpoints made before stay.
pub fn train<M: Trainable>(
    model: &M,
    batches: impl FnOnce(u64) -> Result<Box<dyn Batches<M::Batch>>, BoxError>,
    config: &TrainConfig,
    run: &RunFolder,
    resume: bool,
    progress: &mut dyn Progress,
) -> Result<Summary, TrainError> {
    config.check()?;
    let mut optimizer = Optimizer::new(model.parameters(), &config.optimizer)?;

    // Where to start.
    let mut done = 0;
    let mut before = Duration::ZERO;
    if resume && let Some(checkpoint) = run.latest()? {
        checkpoint.check(config)?;
        checkpoint.restore(&mut optimizer)?;
        done = checkpoint.state.iteration;
        before = checkpoint.state.elapsed();
    } else if let Some((_, newest)) = run.checkpoints()?.pop() {
        let found = newest.display().to_string();
        return Err(TrainError::Occupied { path: run.path().to_path_buf(), found });
    }
    let (first, clock) = (done, Clock::start(before));
    let mut last_row = run.rewind(done)?;
    let mut batches = batches(done).map_err(|source| TrainError::Batches { iteration: done + 1, source })?;
    progress.start(config.iterations, done);

    let is_last = |done| done >= config.iterations || config.time_limit().is_some_and(|limit| clock.elapsed() >= limit);
    let mut last = is_last(done);
    let mut meter = Meter::new();
    let mut trained_on = 0;
    while !last {
        let iteration = done + 1;
        let lr = config.learning_rate(done, clock.elapsed());
        let mut rng = generator(config.seed, done);
        for batch in batches.next().map_err(|source| TrainError::Batches { iteration, source })? {
            let losses = model.losses(&batch, &mut rng).map_err(|source| TrainError::Model { iteration, source })?;
            let (total, values) = total(&losses)?;
            for (name, value) in &values {
                finite(name, *value, iteration, run)?;
            }
            let gradients = total.backward().map_err(TrainError::tensor("gradient"))?;
            let norm = optimizer.step(&gradients, lr, config.clip)?;
            finite("gradient norm", norm, iteration, run)?;
            model.after_step().map_err(|source| TrainError::Model { iteration, source })?;
            meter.add(&values, norm, M::samples(&batch));
            trained_on += M::samples(&batch);
        }
        done = iteration;
        last = is_last(done);

        // A checkpoint comes with a report, so that the means of a resumed run begin where they did in this one.
        let save = last || done % config.checkpoint_every == 0;
        if save || done % config.log_every == 0 {
            let Report { losses, grad_norm, images_per_second } = meter.report();
            let elapsed = clock.elapsed();
            let per_iteration = clock.since_start().as_secs_f64() / (done - first) as f64;
            let left = Duration::try_from_secs_f64(per_iteration * (config.iterations - done) as f64);
            let left = left.unwrap_or(Duration::MAX);
            let eta = config.time_limit().map_or(left, |limit| left.min(limit.saturating_sub(elapsed)));
            let peak_memory_mib = peak_memory_mib();
            progress.step(&StepReport {
                iteration,
                of: config.iterations,
                losses: &losses,
                lr,
                grad_norm,
                images_per_second,
                eta,
                elapsed,
                peak_memory_mib,
            });
            let (losses, elapsed_seconds) = (losses.into_iter().collect(), elapsed.as_secs_f64());
            let row =
                MetricsRow { iteration, losses, lr, grad_norm, images_per_second, elapsed_seconds, peak_memory_mib };
            run.append(&row)?;
            last_row = Some(row);
        }
        if save {
            run.save(done, clock.elapsed(), config, &optimizer)?;
        }
    }

    let summary = Summary {
        iterations: done,
        optimizer_steps: optimizer.steps,
        out_of_time: done < config.iterations,
        losses: last_row.map_or_else(Vec::new, |row| row.losses.into_iter().collect()),
        images_per_second: trained_on as f64 / clock.since_start().as_secs_f64().max(1e-9),
        elapsed: clock.elapsed(),
        peak_memory_mib: peak_memory_mib(),
    };
    progress.finish(&summary);
    Ok(summary)
}

/// Losses by name.
type Values = Vec<(&'static str, f64)>;

/// The generator of an iteration: its own stream of the seed, so that no state has to be kept.
fn generator(seed: u64, iteration: u64) -> ChaCha8Rng {
    // Data may be drawn from streams of the same seed; these must be others.
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ u64::from_le_bytes(*b"training"));
    rng.set_stream(iteration);
    rng
}

/// The sum of the losses, to be differentiated, and the value of each. A device is waited for once.
fn total(losses: &Losses) -> Result<(Tensor, Values), TrainError> {
    let scalar = |(name, loss): &(&'static str, Tensor)| {
        loss.to_dtype(DType::F32).and_then(|loss| loss.reshape(())).map_err(TrainError::tensor(name))
    };
    let scalars = losses.0.iter().map(scalar).collect::<Result<Vec<_>, _>>()?;
    let sum = || {
        let all = Tensor::stack(&scalars, 0)?;
        Ok((all.sum_all()?, all.to_vec1::<f32>()?))
    };
    let (total, values) = sum().map_err(TrainError::tensor("sum of the losses"))?;
    Ok((total, losses.0.iter().map(|(name, _)| *name).zip(values.into_iter().map(f64::from)).collect()))
}

fn finite(loss: &str, value: f64, iteration: u64, run: &RunFolder) -> Result<(), TrainError> {
    if value.is_finite() {
        return Ok(());
    }
    let checkpoint = run.checkpoints()?.pop().map(|(_, path)| path);
    Err(TrainError::NotFinite { iteration, loss: loss.to_owned(), value, checkpoint })
}

/// Time trained since the run began.
struct Clock {
    before: Duration,
    start: Instant,
}

impl Clock {
    fn start(before: Duration) -> Self {
        Self { before, start: Instant::now() }
    }

    fn elapsed(&self) -> Duration {
        self.before + self.since_start()
    }

    /// Since training was started or resumed.
    fn since_start(&self) -> Duration {
        self.start.elapsed()
    }
}

/// What happened since the last report.
struct Meter {
    since: Instant,
    steps: u64,
    samples: usize,
    grad_norm: f64,
    /// Name, sum and number of values, in the order in which they first came.
    losses: Vec<(String, f64, u64)>,
}

struct Report {
    losses: Vec<(String, f64)>,
    grad_norm: f64,
    images_per_second: f64,
}

impl Meter {
    fn new() -> Self {
        Self { since: Instant::now(), steps: 0, samples: 0, grad_norm: 0.0, losses: Vec::new() }
    }

    fn add(&mut self, losses: &[(&str, f64)], grad_norm: f64, samples: usize) {
        self.steps += 1;
        self.samples += samples;
        self.grad_norm += grad_norm;
        for &(name, value) in losses {
            match self.losses.iter_mut().find(|(known, ..)| known == name) {
                Some((_, sum, count)) => (*sum, *count) = (*sum + value, *count + 1),
                None => self.losses.push((name.to_owned(), value, 1)),
            }
        }
    }

    /// The means, of which the next begin anew.
    fn report(&mut self) -> Report {
        let Self { since, steps, samples, grad_norm, losses } = std::mem::replace(self, Self::new());
        Report {
            losses: losses.into_iter().map(|(name, sum, count)| (name, sum / count as f64)).collect(),
            grad_norm: grad_norm / steps.max(1) as f64,
            images_per_second: samples as f64 / since.elapsed().as_secs_f64().max(1e-9),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn each_iteration_draws_its_own_numbers() {
        let draw = |seed, iteration| generator(seed, iteration).random::<u64>();
        assert_eq!(draw(1, 5), draw(1, 5));
        assert_ne!(draw(1, 5), draw(1, 6));
        assert_ne!(draw(1, 5), draw(2, 5));
        let mut data = ChaCha8Rng::seed_from_u64(1);
        data.set_stream(5);
        assert_ne!(draw(1, 5), data.random::<u64>());
    }
}
