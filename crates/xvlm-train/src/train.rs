//! The loop.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use xvlm_kernels::{Gradients, Tape};

use crate::best::{Criterion, Judge};
use crate::checkpoint::Standing;
use crate::config::TrainConfig;
use crate::error::{BoxError, TrainError};
use crate::events::EventFile;
use crate::metrics::{MetricsRow, peak_memory_mib};
use crate::optimizer::Optimizer;
use crate::ranks::{Alone, Communicator, Reducer, agree, check_alike, merge, share, sum};
use crate::run::RunFolder;
use crate::{Batches, Losses, Progress, Silent, Step, StepReport, Summary, Trainable};

/// Where a run is kept, who else takes part, and how it is asked to stop.
pub struct Job<'a> {
    /// Metrics and checkpoints go here; only rank 0 reads or writes it.
    pub run: &'a RunFolder,
    /// Go on from the newest checkpoint that is whole; from the beginning if there is none.
    pub resume: bool,
    /// The processes that train together.
    pub ranks: Arc<dyn Communicator>,
    /// Becomes true when training should save and stop after the iteration it is at.
    pub stop: Arc<AtomicBool>,
}

impl<'a> Job<'a> {
    /// One process that is not asked to stop.
    pub fn alone(run: &'a RunFolder, resume: bool) -> Self {
        Self { run, resume, ranks: Arc::new(Alone), stop: Arc::default() }
    }
}

/// A model that was trained.
pub struct Trained {
    /// How it went.
    pub summary: Summary,
    /// Its weights in `f32`: with [`TrainConfig::ema_decay`] their means over past steps, which the model itself does not have.
    pub weights: Vec<(String, Tensor)>,
}

/// Trains a model in place.
///
/// `batches` is called once, with the number of iterations already done, and gives the batches of those that follow. By then
/// the folder of the run is locked, and its checkpoint was seen to fit. Resuming a finished run brings the model to its end.
///
/// With several ranks, each calls this with batches of its own; all begin with the weights of rank 0, and `progress` is told
/// on rank 0 alone.
///
/// # Errors
/// [`TrainError`]; the checkpoints made before stay. Other ranks may then be waiting for this one, until it calls
/// [`Communicator::abort`].
pub fn train<M: Trainable>(
    model: &M,
    batches: impl FnOnce(u64) -> Result<Box<dyn Batches<M::Batch>>, BoxError>,
    config: &TrainConfig,
    job: &Job,
    progress: &mut dyn Progress,
) -> Result<Trained, TrainError> {
    config.check()?;
    let Job { run, ranks, .. } = job;
    let is_first_rank = ranks.rank() == 0;
    let mut silent = Silent;
    let progress = if is_first_rank { progress } else { &mut silent };
    let _lock = is_first_rank.then(|| run.lock()).transpose()?;
    let mut optimizer = Optimizer::new(model.parameters(), config)?;
    let reducer = Reducer::new(ranks, &optimizer, config.bucket_mib);
    check_alike(ranks, model.parameters(), config)?;

    // Where to start: rank 0 knows.
    let Start { standing, mut last_row } =
        if is_first_rank { Start::of(job, config, &mut optimizer, progress)? } else { Start::default() };
    let Standing { iteration: done, elapsed, tally, judge } = standing;
    let (mut done, mut elapsed) = share(&**ranks, &mut optimizer, done, elapsed)?;
    let (first, clock) = (done, Clock::start(elapsed));
    // The meter measures from now on: what was trained on before is not in its time.
    let meter = Meter::new(Tally { samples: 0, ..tally });
    let mut batches = batches(done).map_err(|source| TrainError::Batches { iteration: done + 1, source })?;
    progress.start(config.iterations, done);

    let mut stopped = false;
    let run_ends =
        |done, elapsed| done >= config.iterations || config.time_limit().is_some_and(|limit| elapsed >= limit);
    let mut is_over = run_ends(done, elapsed);
    let for_tensorboard = is_first_rank && config.tensorboard && !is_over;
    let events = for_tensorboard.then(|| EventFile::begin(&run.tensorboard_path(), done)).transpose()?;
    let mut trainer = Trainer { model, config, job, optimizer, reducer, meter, judge, events, trained_on: 0 };
    while !is_over {
        let iteration = done + 1;
        let lr = config.learning_rate(done, elapsed);
        let mut rng = generator(config.seed, done, ranks.rank());
        for micro_batches in batches.next().map_err(|source| TrainError::Batches { iteration, source })? {
            trainer.step(iteration, lr, &mut rng, micro_batches)?;
        }
        done = iteration;
        (stopped, elapsed) = agree(&**ranks, job.stop.load(Ordering::Relaxed), clock.elapsed())?;
        let ends = run_ends(done, elapsed);
        stopped &= !ends;
        is_over = stopped || ends;

        // A checkpoint comes with a report and is compared with those before; but not where the run is only interrupted, so
        // that one that was interrupted leaves the same behind as one that was not.
        let is_due = ends || done % config.checkpoint_every == 0;
        let mut failed = None;
        if is_due || done % config.log_every == 0 {
            let per_iteration = clock.since_start().as_secs_f64() / (done - first) as f64;
            let left = Duration::try_from_secs_f64(per_iteration * (config.iterations - done) as f64);
            let left = left.unwrap_or(Duration::MAX);
            let eta = config.time_limit().map_or(left, |limit| left.min(limit.saturating_sub(elapsed)));
            let measured = trainer.meter.report(ranks)?;
            let score = if is_due && config.keep_best { trainer.judge(iteration) } else { Ok(None) };
            let at = At { iteration, lr, elapsed, eta, score: *score.as_ref().unwrap_or(&None) };
            last_row = Some(trainer.report(measured, &at, progress)?);
            failed = score.err();
        }
        let Trainer { optimizer, meter, judge, .. } = &mut trainer;
        if stopped {
            // Rank 0 keeps what the others counted too.
            judge.merge(ranks)?;
            meter.tally.merge(ranks)?;
        }
        if (is_due || stopped) && is_first_rank {
            let standing = Standing { iteration: done, elapsed, tally: meter.tally.clone(), judge: judge.clone() };
            run.save(&standing, config, optimizer)?;
        }
        // A model that cannot be scored was trained all the same.
        if let Some(error) = failed {
            return Err(error);
        }
    }

    let Trainer { optimizer, trained_on, .. } = &trainer;
    let [trained_on] = sum(&**ranks, [*trained_on as f64])?;
    let summary = Summary {
        iterations: done,
        optimizer_steps: optimizer.steps,
        out_of_time: done < config.iterations && !stopped,
        stopped,
        losses: last_row.map_or_else(Vec::new, |row| row.losses.into_iter().collect()),
        images_per_second: trained_on / clock.since_start().as_secs_f64().max(1e-9),
        elapsed: clock.elapsed(),
        peak_memory_mib: peak_memory_mib(),
    };
    progress.finish(&summary);
    Ok(Trained { summary, weights: optimizer.finished_weights()? })
}

/// A run on its way.
struct Trainer<'a, M> {
    model: &'a M,
    config: &'a TrainConfig,
    job: &'a Job<'a>,
    optimizer: Optimizer<'a>,
    reducer: Reducer,
    meter: Meter,
    judge: Judge,
    events: Option<EventFile>,
    /// Samples of this rank since training was started or resumed.
    trained_on: usize,
}

impl<M: Trainable> Trainer<'_, M> {
    /// One optimizer step, with the mean of the gradients of some batches of every rank. Each batch goes as soon as its
    /// gradients are there.
    fn step(
        &mut self,
        iteration: u64,
        lr: f64,
        rng: &mut ChaCha8Rng,
        batches: Vec<M::Batch>,
    ) -> Result<(), TrainError> {
        let model = self.model;
        let failed = |source| TrainError::Model { iteration, source };
        let mut gradients = Gradients::default();
        let (count, mut samples, mut records) = (batches.len(), 0, Vec::new());
        let scale = self.optimizer.loss_scale() / count as f64;
        for (i, batch) in batches.into_iter().enumerate() {
            samples += M::samples(&batch);
            records.extend(M::records(&batch));
            let batch = model.to_device(batch).map_err(failed)?;
            self.learn(iteration, &batch, scale, rng, &mut gradients, i + 1 == count)?;
        }
        self.reducer.finish(&mut gradients)?;
        let may_overflow = self.optimizer.loss_scale.can_fall();
        let norm = self.optimizer.step(&gradients, lr)?;
        if !norm.is_finite() && !may_overflow {
            let tensor = self.optimizer.first_not_finite(&gradients).map(|name| format!("gradient of {name}"));
            let of_ranks = self.job.ranks.size();
            return Err(self.not_finite(iteration, ("gradient norm", norm), tensor, records, of_ranks));
        }
        model.after_step().map_err(failed)?;
        self.meter.tally.add_step(norm, samples);
        self.trained_on += samples;
        Ok(())
    }

    /// Adds the gradients of a batch's losses, times `scale`. Those of the last batch of a step are on their way to the other
    /// ranks while the backward pass goes on.
    fn learn(
        &mut self,
        iteration: u64,
        batch: &M::Batch,
        scale: f64,
        rng: &mut ChaCha8Rng,
        gradients: &mut Gradients,
        is_last_batch: bool,
    ) -> Result<(), TrainError> {
        let (model, recompute) = (self.model, self.config.recompute);
        let (mut before, tape) = (rng.clone(), Rc::new(Tape::new(recompute)));
        let step = &mut Step { rng, tape: &tape, ranks: &self.job.ranks };
        let losses = model.losses(batch, step).map_err(|source| TrainError::Model { iteration, source })?;
        let (total, values) = total(&losses, scale)?;
        drop(losses);
        if let Some(&bad) = values.iter().find(|(_, value)| !value.is_finite()) {
            // The tensor is found by a second forward pass, which needs the room of the first. This rank makes it alone: the
            // losses of the others may be finite.
            drop((total, tape));
            let (tape, alone) = (Rc::new(Tape::new(recompute)), Arc::new(Alone) as Arc<dyn Communicator>);
            let step = &mut Step { rng: &mut before, tape: &tape, ranks: &alone };
            let tensor = model.first_not_finite(batch, step);
            return Err(self.not_finite(iteration, bad, tensor, M::records(batch), 1));
        }
        if is_last_batch {
            self.reducer.start(&tape, &total, gradients)?;
        }
        let reducer = &mut self.reducer;
        let ready = |variable: &Tensor, gradient: &Tensor| match is_last_batch {
            true => reducer.ready(variable, gradient),
            false => Ok(()),
        };
        tape.backward(total, gradients, ready).map_err(TrainError::tensor("gradient"))?;
        self.meter.tally.add_losses(&values);
        self.meter.tally.add_losses(&model.observations());
        match model.judged_by() {
            _ if !self.config.keep_best => {}
            None => self.judge.add(&values),
            Some(name) => {
                let observed = model.observations();
                self.judge.add(&observed.into_iter().filter(|(known, _)| *known == name).collect::<Vec<_>>());
            }
        }
        Ok(())
    }

    /// Compares the model after an iteration with those of the checkpoints before; returns its score, if it has one.
    fn judge(&mut self, iteration: u64) -> Result<Option<f64>, TrainError> {
        self.judge.merge(&self.job.ranks)?;
        let weights = || self.optimizer.finished_weights();
        let score = self.model.score(iteration, &weights);
        let score = score.map_err(|source| TrainError::Model { iteration, source })?;
        let otherwise = if self.model.judged_by().is_some() { Criterion::Observation } else { Criterion::Losses };
        self.judge.compare(iteration, score, otherwise);
        // Nothing was trained on meanwhile.
        self.meter.since = Instant::now();
        Ok(score)
    }

    /// The error about a loss or norm that is not finite, found in the batches of so many ranks.
    fn not_finite(
        &self,
        iteration: u64,
        (loss, value): (&'static str, f64),
        tensor: Option<String>,
        records: Vec<String>,
        of_ranks: usize,
    ) -> TrainError {
        let checkpoint =
            self.job.run.checkpoints().ok().and_then(|mut all| all.pop()).map(|(_, path)| path.into_boxed_path());
        TrainError::NotFinite { iteration, loss, value, tensor, records, of_ranks, checkpoint }
    }

    /// Tells `progress` how it went since the last report; rank 0 also writes it down.
    fn report(&mut self, measured: Report, at: &At, progress: &mut dyn Progress) -> Result<MetricsRow, TrainError> {
        let Job { run, ranks, .. } = self.job;
        let Report { losses, grad_norm, images_per_second } = measured;
        let At { iteration, lr, elapsed, eta, score } = *at;
        let peak_memory_mib = peak_memory_mib();
        progress.step(&StepReport {
            iteration,
            of: self.config.iterations,
            losses: &losses,
            score,
            lr,
            grad_norm,
            images_per_second,
            eta,
            elapsed,
            peak_memory_mib,
        });
        let row = MetricsRow {
            iteration,
            losses: losses.into_iter().collect(),
            score,
            lr,
            grad_norm,
            loss_scale: self.optimizer.loss_scale.dynamic(),
            images_per_second,
            elapsed_seconds: elapsed.as_secs_f64(),
            peak_memory_mib,
        };
        if ranks.rank() == 0 {
            run.append(&row)?;
            self.events.as_mut().map_or(Ok(()), |events| events.append(&row))?;
        }
        Ok(row)
    }
}

/// Where the loop is when it reports.
struct At {
    iteration: u64,
    lr: f64,
    elapsed: Duration,
    eta: Duration,
    score: Option<f64>,
}

/// Where a run begins.
#[derive(Default)]
struct Start {
    standing: Standing,
    last_row: Option<MetricsRow>,
}

impl Start {
    /// Of the run in a folder, which is brought to the state of its last checkpoint, as is the optimizer.
    fn of(
        job: &Job,
        config: &TrainConfig,
        optimizer: &mut Optimizer,
        progress: &mut dyn Progress,
    ) -> Result<Self, TrainError> {
        let Job { run, resume, .. } = job;
        let mut standing = Standing::default();
        if *resume && let Some(checkpoint) = run.latest(progress)? {
            checkpoint.check(config)?;
            checkpoint.restore(optimizer)?;
            standing = checkpoint.standing().clone();
        } else if let Some((_, newest)) = run.checkpoints()?.pop() {
            let found = newest.display().to_string();
            return Err(TrainError::Occupied { path: run.path().to_path_buf(), found });
        }
        let last_row = run.rewind(standing.iteration)?;
        let Judge { best, .. } = &mut standing.judge;
        if !config.keep_best {
            standing.judge = Judge::default();
        } else if best.as_ref().is_some_and(|best| !run.checkpoint(best.iteration).exists()) {
            // Removed for a better one that was damaged, or by hand.
            *best = None;
        }
        run.write_best(standing.judge.best.as_ref())?;
        Ok(Self { standing, last_row })
    }
}

/// Losses by name.
type Values = Vec<(&'static str, f64)>;

/// The generator of an iteration on a rank: its own stream of the seed, so that no state has to be kept.
fn generator(seed: u64, iteration: u64, rank: usize) -> ChaCha8Rng {
    // Data may be drawn from streams of the same seed; these must be others, and another for each rank.
    let rank = (rank as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ u64::from_le_bytes(*b"training") ^ rank);
    rng.set_stream(iteration);
    rng
}

/// The scaled sum of the losses, to be differentiated, and the value of each. A device is waited for once.
fn total(losses: &Losses, scale: f64) -> Result<(Tensor, Values), TrainError> {
    let scalar = |(name, loss): &(&'static str, Tensor)| {
        loss.to_dtype(DType::F32).and_then(|loss| loss.reshape(())).map_err(TrainError::tensor(name))
    };
    let scalars = losses.0.iter().map(scalar).collect::<Result<Vec<_>, _>>()?;
    let sum = || {
        let all = Tensor::stack(&scalars, 0)?;
        let sum = all.sum_all()?;
        Ok((if scale == 1.0 { sum } else { (sum * scale)? }, all.to_vec1::<f32>()?))
    };
    let (total, values) = sum().map_err(TrainError::tensor("sum of the losses"))?;
    Ok((total, losses.0.iter().map(|(name, _)| *name).zip(values.into_iter().map(f64::from)).collect()))
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

/// What happened since the last report, and when that was.
struct Meter {
    since: Instant,
    tally: Tally,
}

/// What happened since the last report.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tally {
    samples: usize,
    /// Sum and number of the norms that are finite.
    grad_norm: (f64, u64),
    /// Name, sum and number of values, in the order in which they first came.
    losses: Vec<(String, f64, u64)>,
}

struct Report {
    losses: Vec<(String, f64)>,
    grad_norm: f64,
    images_per_second: f64,
}

impl Tally {
    /// Makes the sums those of all ranks. Norms are the same on all.
    fn merge(&mut self, ranks: &Arc<dyn Communicator>) -> Result<(), TrainError> {
        self.losses = merge(ranks, std::mem::take(&mut self.losses))?;
        let [samples] = sum(&**ranks, [self.samples as f64])?;
        self.samples = samples as usize;
        Ok(())
    }

    fn add_step(&mut self, grad_norm: f64, samples: usize) {
        self.samples += samples;
        if grad_norm.is_finite() {
            self.grad_norm = (self.grad_norm.0 + grad_norm, self.grad_norm.1 + 1);
        }
    }

    fn add_losses(&mut self, losses: &[(&str, f64)]) {
        for &(name, value) in losses {
            match self.losses.iter_mut().find(|(known, ..)| known == name) {
                Some((_, sum, count)) => (*sum, *count) = (*sum + value, *count + 1),
                None => self.losses.push((name.to_owned(), value, 1)),
            }
        }
    }
}

impl Meter {
    fn new(tally: Tally) -> Self {
        Self { since: Instant::now(), tally }
    }

    /// The means over all ranks, of which the next begin anew.
    fn report(&mut self, ranks: &Arc<dyn Communicator>) -> Result<Report, TrainError> {
        let Self { since, mut tally } = std::mem::replace(self, Self::new(Tally::default()));
        tally.merge(ranks)?;
        let Tally { samples, grad_norm: (norms, steps), losses } = tally;
        Ok(Report {
            losses: losses.into_iter().map(|(name, sum, count)| (name, sum / count as f64)).collect(),
            grad_norm: norms / steps.max(1) as f64,
            images_per_second: samples as f64 / since.elapsed().as_secs_f64().max(1e-9),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn each_iteration_draws_its_own_numbers() {
        let draw = |seed, iteration| generator(seed, iteration, 0).random::<u64>();
        assert_eq!(draw(1, 5), draw(1, 5));
        assert_ne!(draw(1, 5), draw(1, 6));
        assert_ne!(draw(1, 5), draw(2, 5));
        assert_ne!(draw(1, 5), generator(1, 5, 1).random::<u64>());
        let mut data = ChaCha8Rng::seed_from_u64(1);
        data.set_stream(5);
        assert_ne!(draw(1, 5), data.random::<u64>());
    }
}
