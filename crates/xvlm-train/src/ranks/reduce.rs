//! The mean of all ranks' gradients, found while the backward pass goes on.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use candle_core::{DType, Device, Tensor, TensorId};
use xvlm_kernels::{Gradients, Tape};

use super::Communicator;
use crate::error::TrainError;
use crate::optimizer::Optimizer;

/// Averages gradients over ranks.
///
/// Parameters are put into buckets in the order in which their gradients become ready. A bucket is on its way to the other
/// ranks, by a thread of its own, as soon as all its gradients are there, but never before the bucket ahead of it: all ranks
/// send the same buckets in the same order, so that the bits of the result do not depend on who is quicker. (Li et al. 2020,
/// *PyTorch Distributed*, §3.2.)
///
/// Which order that is, rank 0 sees in the first step, and tells the others; so in that step all is sent at its end.
pub(crate) struct Reducer {
    ranks: Arc<dyn Communicator>,
    variables: Vec<Tensor>,
    /// Which of the variables a tensor is.
    index: HashMap<TensorId, usize>,
    /// Numbers of a bucket.
    most: usize,
    /// The order in which gradients become ready, as far as it was seen.
    seen: Vec<usize>,
    buckets: Vec<Bucket>,
    /// The bucket of each variable, and its place there; empty until the order is known.
    places: Vec<(usize, usize)>,
    /// Buckets that are on their way.
    sent: usize,
    line: Option<Line>,
}

/// Variables whose gradients travel together.
struct Bucket {
    variables: Vec<usize>,
    given: Vec<Piece>,
    /// How many are not known yet.
    missing: usize,
}

/// What a bucket has of a variable.
#[derive(Clone)]
enum Piece {
    Unknown,
    /// No gradient: so many zeros.
    None(usize),
    Gradient(Tensor),
}

impl Bucket {
    fn clear(&mut self) {
        self.given.fill(Piece::Unknown);
        self.missing = self.variables.len();
    }
}

impl Reducer {
    /// For the parameters that an optimizer trains, in buckets of `bucket_mib`.
    pub(crate) fn new(ranks: &Arc<dyn Communicator>, optimizer: &Optimizer, bucket_mib: usize) -> Self {
        let variables = optimizer.slots.iter().map(|slot| slot.parameter.as_tensor().clone()).collect();
        Self::of(ranks, variables, (bucket_mib << 20) / size_of::<f32>())
    }

    fn of(ranks: &Arc<dyn Communicator>, variables: Vec<Tensor>, most: usize) -> Self {
        let index = variables.iter().enumerate().map(|(i, variable)| (variable.id(), i)).collect();
        Self {
            ranks: Arc::clone(ranks),
            variables,
            index,
            most,
            seen: Vec::new(),
            buckets: Vec::new(),
            places: Vec::new(),
            sent: 0,
            line: None,
        }
    }

    /// A backward pass begins, the last of this optimizer step; `gradients` has those of the passes before. What it does not
    /// reach need not be waited for.
    pub(crate) fn start(&mut self, tape: &Tape, loss: &Tensor, gradients: &Gradients) -> Result<(), TrainError> {
        if self.places.is_empty() {
            return Ok(());
        }
        let mut reached = vec![false; self.variables.len()];
        for variable in tape.variables(loss) {
            if let Some(&i) = self.index.get(&variable.id()) {
                reached[i] = true;
            }
        }
        let others = (0..reached.len()).filter(|i| !reached[*i]);
        others.into_iter().try_for_each(|i| self.know(i, gradients.get(&self.variables[i]).cloned()))
    }

    /// The gradient of a variable is complete on this rank.
    pub(crate) fn ready(&mut self, variable: &Tensor, gradient: &Tensor) -> candle_core::Result<()> {
        let Some(&i) = self.index.get(&variable.id()).filter(|_| self.ranks.size() > 1) else { return Ok(()) };
        if self.places.is_empty() {
            self.seen.push(i);
            return Ok(());
        }
        self.know(i, Some(gradient.clone())).map_err(candle_core::Error::wrap)
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
        if self.places.is_empty() {
            self.order()?;
        }
        for i in 0..self.variables.len() {
            self.know(i, gradients.get(&self.variables[i]).cloned())?;
        }
        let line = self.line.as_ref();
        let sums =
            (0..self.sent).map(|_| line.map_or_else(|| Err(ended(&*self.ranks)), |line| line.receive(&*self.ranks)));
        let sums = sums.collect::<Result<Vec<_>, _>>()?;
        self.sent = 0;
        self.buckets.iter_mut().for_each(Bucket::clear);
        self.spread(sums, gradients).map_err(TrainError::tensor("gradients of all ranks"))
    }

    /// The order of rank 0 becomes that of all. Variables that have not been seen come last.
    fn order(&mut self) -> Result<(), TrainError> {
        let failed = || TrainError::tensor("order of the gradients");
        let mut placed = vec![false; self.variables.len()];
        let unseen = (0..self.variables.len()).rev();
        let order = std::mem::take(&mut self.seen).into_iter().chain(unseen);
        let order: Vec<i64> = order.filter(|&i| !std::mem::replace(&mut placed[i], true)).map(|i| i as i64).collect();
        let order = Tensor::from_vec(order, self.variables.len(), &Device::Cpu).map_err(failed())?;
        let order = self.ranks.broadcast(&order, 0)?.to_vec1::<i64>().map_err(failed())?;
        self.places = vec![(0, 0); self.variables.len()];
        let mut size = 0;
        for i in order.into_iter().map(|i| i as usize) {
            let more = self.variables[i].elem_count();
            if self.buckets.is_empty() || size + more > self.most {
                self.buckets.push(Bucket { variables: Vec::new(), given: Vec::new(), missing: 0 });
                size = 0;
            }
            size += more;
            let last = self.buckets.len() - 1;
            let bucket = &mut self.buckets[last].variables;
            self.places[i] = (last, bucket.len());
            bucket.push(i);
        }
        for bucket in &mut self.buckets {
            bucket.given = vec![Piece::Unknown; bucket.variables.len()];
            bucket.clear();
        }
        Ok(())
    }

    /// Nothing will be added to the gradient of a variable any more; sends what is complete. Only what is said first counts.
    fn know(&mut self, i: usize, gradient: Option<Tensor>) -> Result<(), TrainError> {
        let (bucket, place) = self.places[i];
        let bucket = &mut self.buckets[bucket];
        if !matches!(bucket.given[place], Piece::Unknown) {
            return Ok(());
        }
        bucket.given[place] = gradient.map_or(Piece::None(self.variables[i].elem_count()), Piece::Gradient);
        bucket.missing -= 1;
        while let Some(next) = self.buckets.get_mut(self.sent).filter(|next| next.missing == 0) {
            let pieces = std::mem::take(&mut next.given);
            next.given = vec![Piece::Unknown; pieces.len()];
            // Not again before the end of the step.
            next.missing = usize::MAX;
            let line = match &mut self.line {
                Some(line) => line,
                none => none.insert(Line::open(&self.ranks, self.variables[i].device())?),
            };
            line.send(pieces, &*self.ranks)?;
            self.sent += 1;
        }
        Ok(())
    }

    /// From the buckets' sums to the gradients' means. Each sum goes when it is spread.
    fn spread(&self, sums: Vec<Tensor>, gradients: &mut Gradients) -> candle_core::Result<()> {
        // How many ranks have each gradient stands behind the numbers; a device is waited for once.
        let counts = sums.iter().zip(&self.buckets).map(|(sum, bucket)| {
            let count = bucket.variables.len();
            sum.narrow(0, sum.dim(0)? - count, count)
        });
        let counts = Tensor::cat(&counts.collect::<candle_core::Result<Vec<_>>>()?, 0)?.to_vec1::<f32>()?;
        let mut counts = counts.into_iter();
        for (sum, bucket) in sums.into_iter().zip(&self.buckets) {
            let mean = (&sum / self.ranks.size() as f64)?;
            drop(sum);
            let mut start = 0;
            for (&i, count) in bucket.variables.iter().zip(&mut counts) {
                let variable = &self.variables[i];
                if count > 0.0 {
                    let own = mean.narrow(0, start, variable.elem_count())?.reshape(variable.shape())?;
                    gradients.insert(variable, own);
                }
                start += variable.elem_count();
            }
        }
        Ok(())
    }
}

/// The thread that talks to the other ranks while this one computes.
struct Line {
    buckets: Option<Sender<Vec<Piece>>>,
    sums: Receiver<Result<Tensor, TrainError>>,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    fn open(ranks: &Arc<dyn Communicator>, device: &Device) -> Result<Self, TrainError> {
        let (buckets, given) = mpsc::channel();
        let (sum, sums) = mpsc::channel();
        let (ranks, device) = (Arc::clone(ranks), device.clone());
        let rank = ranks.rank();
        let work = move || {
            for pieces in given {
                let flat = flat(pieces, &device).map_err(TrainError::tensor("gradients of this rank"));
                let reduced = flat.and_then(|flat| ranks.all_reduce(&flat));
                let failed = reduced.is_err();
                if sum.send(reduced).is_err() || failed {
                    break;
                }
            }
        };
        let thread = thread::Builder::new().name("gradients".to_owned()).spawn(work);
        let thread =
            thread.map_err(|error| TrainError::Ranks { rank, operation: "start of a thread", source: error.into() })?;
        Ok(Self { buckets: Some(buckets), sums, thread: Some(thread) })
    }

    fn send(&self, pieces: Vec<Piece>, ranks: &dyn Communicator) -> Result<(), TrainError> {
        let sent = self.buckets.as_ref().is_some_and(|buckets| buckets.send(pieces).is_ok());
        if sent { Ok(()) } else { self.receive_error(ranks) }
    }

    fn receive(&self, ranks: &dyn Communicator) -> Result<Tensor, TrainError> {
        self.sums.recv().unwrap_or_else(|_| Err(ended(ranks)))
    }

    /// Why the thread has ended.
    fn receive_error(&self, ranks: &dyn Communicator) -> Result<(), TrainError> {
        Err(self.sums.iter().find_map(Result::err).unwrap_or_else(|| ended(ranks)))
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        let Some(mut line) = self.line.take() else { return };
        line.buckets = None;
        // With buckets on their way it may be waiting for ranks that do not come, and ends when those do.
        if let Some(thread) = line.thread.take().filter(|_| self.sent == 0) {
            let _ = thread.join();
        }
    }
}

fn ended(ranks: &dyn Communicator) -> TrainError {
    let source = "the thread that sends gradients has ended".into();
    TrainError::Ranks { rank: ranks.rank(), operation: "all-reduce", source }
}

/// The numbers of a bucket in `f32`, then a 1 for each gradient that there is and a 0 for each that there is not.
fn flat(pieces: Vec<Piece>, device: &Device) -> candle_core::Result<Tensor> {
    let there = pieces.iter().map(|piece| f32::from(u8::from(matches!(piece, Piece::Gradient(_)))));
    let there = Tensor::from_iter(there, device)?;
    let numbers = pieces.into_iter().map(|piece| match piece {
        Piece::Gradient(gradient) => gradient.flatten_all()?.to_dtype(DType::F32),
        Piece::None(count) => Tensor::zeros(count, DType::F32, device),
        Piece::Unknown => candle_core::bail!("a bucket that is not complete"),
    });
    let mut all = numbers.collect::<candle_core::Result<Vec<_>>>()?;
    all.push(there);
    Tensor::cat(&all, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::Threads;
    use candle_core::Var;

    const SIZES: [usize; 5] = [3, 4, 2, 5, 1];

    /// A rank's variables, and the gradients of a step: none of the variables for which `has` says so.
    fn of(rank: usize, step: usize, has: impl Fn(usize) -> bool, variables: &[Tensor]) -> Vec<Option<Tensor>> {
        let gradient = |i: usize| {
            let numbers = (0..SIZES[i]).map(|n| 0.1 + (rank * 7 + step * 5 + i * 3 + n) as f32 / 3.0);
            Tensor::from_iter(numbers, variables[i].device()).unwrap()
        };
        (0..SIZES.len()).map(|i| has(i).then(|| gradient(i))).collect()
    }

    /// Runs `work` on each rank.
    fn on_ranks<R: Send>(size: usize, work: impl Fn(Arc<dyn Communicator>) -> R + Sync) -> Vec<R> {
        thread::scope(|scope| {
            let all =
                Threads::new(size).into_iter().map(|ranks| scope.spawn(|| work(Arc::new(ranks)))).collect::<Vec<_>>();
            all.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn variables() -> Vec<Tensor> {
        let variable = |size: &usize| Var::zeros(*size, DType::F32, &Device::Cpu).unwrap().as_tensor().clone();
        SIZES.iter().map(variable).collect()
    }

    /// Variable 1 has a gradient on rank 0 only, variable 3 on none, but in the last step everywhere.
    fn has(rank: usize, step: usize, i: usize) -> bool {
        step == 2 || (i != 3 && (i != 1 || rank == 0))
    }

    /// The means after each step, and whether buckets were on their way before the step was over.
    fn reduced(ranks: &Arc<dyn Communicator>, told: bool) -> (Vec<Vec<Option<Vec<f32>>>>, bool) {
        let (rank, variables) = (ranks.rank(), variables());
        let mut reducer = Reducer::of(ranks, variables.clone(), 6);
        let mut early = false;
        let steps = (0..3).map(|step| {
            let mut gradients = Gradients::default();
            for (variable, gradient) in variables.iter().zip(of(rank, step, |i| has(rank, step, i), &variables)) {
                gradient.into_iter().for_each(|gradient| gradients.insert(variable, gradient));
            }
            if told {
                // A graph over just the variables that have a gradient.
                let there = variables.iter().filter(|variable| gradients.get(variable).is_some());
                let loss = there.fold(Tensor::zeros((), DType::F32, &Device::Cpu).unwrap(), |sum, variable| {
                    (sum + variable.sum_all().unwrap()).unwrap()
                });
                reducer.start(&Tape::default(), &loss, &Gradients::default()).unwrap();
                // Not all ranks have them ready in the same order.
                let mut order = [4, 2, 3, 0, 1];
                order.rotate_left(rank);
                for i in order {
                    if let Some(gradient) = gradients.get(&variables[i]) {
                        reducer.ready(&variables[i], gradient).unwrap();
                    }
                }
                early |= reducer.sent > 0;
            }
            reducer.finish(&mut gradients).unwrap();
            let numbers = |variable: &Tensor| gradients.get(variable).map(|mean| mean.to_vec1::<f32>().unwrap());
            variables.iter().map(numbers).collect()
        });
        (steps.collect(), early)
    }

    #[test]
    fn the_means_are_those_of_all_ranks_sooner_or_later() {
        for size in 2..=4 {
            let later = on_ranks(size, |ranks| reduced(&ranks, false).0);
            let sooner = on_ranks(size, |ranks| reduced(&ranks, true));
            for (means, (soon, early)) in later.iter().zip(&sooner) {
                assert!(early, "something is sent while the backward pass goes on");
                assert_eq!((means, soon), (&later[0], &later[0]), "{size} ranks");
            }
            let variables = variables();
            for (step, found) in later[0].iter().enumerate() {
                for (i, found) in found.iter().enumerate() {
                    let given =
                        (0..size).filter_map(|rank| of(rank, step, |i| has(rank, step, i), &variables).swap_remove(i));
                    let given: Vec<Vec<f32>> = given.map(|gradient| gradient.to_vec1().unwrap()).collect();
                    assert_eq!(found.is_some(), !given.is_empty(), "step {step}, variable {i}");
                    for (n, found) in found.iter().flatten().enumerate() {
                        let mean = given.iter().map(|numbers| numbers[n]).sum::<f32>() / size as f32;
                        assert!((found - mean).abs() < 1e-5, "step {step}, variable {i}: {found} for {mean}");
                    }
                }
            }
        }
    }

    #[test]
    fn who_leaves_lets_nobody_wait() {
        let results = on_ranks(3, |ranks| {
            let (rank, variables) = (ranks.rank(), variables());
            let mut reducer = Reducer::of(&ranks, variables.clone(), 6);
            let mut step = || {
                let mut gradients = Gradients::default();
                variables.iter().for_each(|variable| gradients.insert(variable, variable.clone()));
                reducer.finish(&mut gradients)
            };
            step()?;
            if rank == 1 { Ok(()) } else { step() }
        });
        assert!(results[1].is_ok());
        for rank in [0, 2] {
            let error = results[rank].as_ref().unwrap_err().to_string();
            assert!(error.contains("rank 1 has left"), "{error}");
        }
    }

    #[test]
    fn buckets_follow_the_order_of_rank_0() {
        let orders = on_ranks(2, |ranks| {
            let variables = variables();
            let mut reducer = Reducer::of(&ranks, variables.clone(), 6);
            let mut gradients = Gradients::default();
            let order = if ranks.rank() == 0 { [2, 0, 4, 1] } else { [0, 1, 2, 4] };
            for i in order {
                gradients.insert(&variables[i], variables[i].clone());
                reducer.ready(&variables[i], &variables[i]).unwrap();
            }
            reducer.finish(&mut gradients).unwrap();
            reducer.buckets.iter().map(|bucket| bucket.variables.clone()).collect::<Vec<_>>()
        });
        // Of at most 6 numbers: 2 + 3 + 1, 4, 5.
        assert_eq!(orders, [vec![vec![2, 0, 4], vec![1], vec![3]], vec![vec![2, 0, 4], vec![1], vec![3]]]);
    }
}
