//! A backward pass in pieces.
//!
//! candle keeps the whole graph of a forward pass until its backward pass is over, and hands out gradients when all are there.
//! A [`Tape`] cuts the graph into segments, a transformer block each: the backward pass goes from segment to segment, frees
//! each when it is done, says which parameters have their whole gradient by then, and can leave the inside of a segment out
//! of memory and compute it again when it is needed (activation recomputation, Chen et al. 2016).

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, TensorId, Var};

use crate::graph::{Fresh, differentiable};

/// The segments of one forward pass.
#[derive(Default)]
pub struct Tape {
    recomputes: bool,
    segments: RefCell<Vec<Segment>>,
    /// Whether a segment is being computed: a segment inside it is a part of it.
    is_inside: Cell<bool>,
}

struct Segment {
    /// The result as what comes after sees it: a variable, at which the graphs of later segments end.
    boundary: Var,
    inside: Inside,
    leaves: Vec<Tensor>,
}

enum Inside {
    /// The result with the graph that made it.
    Kept(Tensor),
    /// What makes it once more.
    Recomputed(Box<dyn Fn() -> Result<Tensor>>),
}

impl Tape {
    /// A tape without segments. If it `recomputes`, it keeps of a segment only what goes in and what comes out.
    pub fn new(recomputes: bool) -> Self {
        Self { recomputes, ..Self::default() }
    }

    /// Runs a piece of a forward pass, and returns its result without the graph that led to it. `run` must compute the same
    /// bits each time it is called.
    ///
    /// # Errors
    /// What `run` says.
    pub fn segment(&self, run: impl Fn() -> Result<Tensor> + 'static) -> Result<Tensor> {
        if self.is_inside.get() {
            return run();
        }
        let result = self.compute(&run)?;
        let leaves = leaves(&result);
        if leaves.is_empty() {
            return Ok(result);
        }
        let boundary = Var::from_tensor(&result)?;
        let seen = boundary.as_tensor().clone();
        let inside = if self.recomputes { Inside::Recomputed(Box::new(run)) } else { Inside::Kept(result) };
        self.segments.borrow_mut().push(Segment { boundary, inside, leaves });
        Ok(seen)
    }

    fn compute(&self, run: &dyn Fn() -> Result<Tensor>) -> Result<Tensor> {
        self.is_inside.set(true);
        let result = run();
        self.is_inside.set(false);
        result
    }

    /// The variables that `loss` was computed from, whether through segments of this tape or past them: no other gets a
    /// gradient.
    pub fn variables(&self, loss: &Tensor) -> Vec<Tensor> {
        let segments = self.segments.borrow();
        segments.iter().flat_map(|segment| &segment.leaves).cloned().chain(leaves(loss)).collect()
    }

    /// Adds to `gradients` that of `loss`, a scalar, with respect to every variable it was computed from, whether through
    /// segments of this tape or past them. `ready` is told each of these variables once, with what `gradients` has of it, when
    /// nothing will be added any more. The tape is empty afterwards, and each piece of the graph is free as soon as its gradients are
    /// there, unless somebody else holds it.
    ///
    /// # Errors
    /// If `loss` is no scalar, or a tensor operation fails, or what `ready` says.
    pub fn backward(
        &self,
        loss: Tensor,
        gradients: &mut Gradients,
        mut ready: impl FnMut(&Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        // From the last to the first: the segments that the loss was computed from, and how often each variable is a leaf.
        let mut segments = self.segments.take();
        segments.reverse();
        let after = leaves(&loss);
        let mut uses = HashMap::<TensorId, usize>::new();
        after.iter().for_each(|leaf| *uses.entry(leaf.id()).or_default() += 1);
        segments.retain(|segment| {
            let is_used = uses.contains_key(&segment.boundary.id());
            let leaves = segment.leaves.iter().filter(|_| is_used);
            leaves.for_each(|leaf| *uses.entry(leaf.id()).or_default() += 1);
            is_used
        });
        let boundaries: HashSet<TensorId> = segments.iter().map(|segment| segment.boundary.id()).collect();
        let mut take = |mut found: Option<GradStore>, leaves: Vec<Tensor>, gradients: &mut Gradients| {
            leaves.into_iter().try_for_each(|leaf| {
                if let Some(gradient) = found.as_mut().and_then(|found| found.remove(&leaf)) {
                    gradients.add(&leaf, gradient)?;
                }
                let left = uses.entry(leaf.id()).or_insert(1);
                *left -= 1;
                match gradients.get(&leaf) {
                    Some(gradient) if *left == 0 && !boundaries.contains(&leaf.id()) => ready(&leaf, gradient),
                    _ => Ok(()),
                }
            })
        };
        let found = loss.backward()?;
        drop(loss);
        take(Some(found), after, gradients)?;
        for Segment { boundary, inside, leaves } in segments {
            let gradient = gradients.0.remove(&boundary.id());
            drop(boundary);
            let found = match gradient {
                Some(gradient) => {
                    let result = match inside {
                        Inside::Kept(result) => result,
                        Inside::Recomputed(run) => self.compute(&run)?,
                    };
                    Some(seeded(&result, gradient)?.backward()?)
                }
                // No gradient comes through what it was used in.
                None => None,
            };
            take(found, leaves, gradients)?;
        }
        Ok(())
    }
}

/// The variables that a graph begins with.
fn leaves(result: &Tensor) -> Vec<Tensor> {
    result.sorted_nodes().into_iter().filter(|node| node.is_variable()).cloned().collect()
}

/// A scalar whose gradient with respect to `result` is the one given; for one backward pass.
fn seeded(result: &Tensor, gradient: Tensor) -> Result<Tensor> {
    // Not kept beside the one that goes through the graph.
    let gradient = Mutex::new(Some(gradient.to_dtype(result.dtype())?));
    let nothing = Fresh::zero(result)?;
    differentiable("seeded", [result], nothing, move |_, _, _| {
        Ok([gradient.lock().unwrap_or_else(PoisonError::into_inner).take()])
    })
}

/// Gradients by variable.
#[derive(Clone, Debug, Default)]
pub struct Gradients(HashMap<TensorId, Tensor>);

impl Gradients {
    /// The gradient with respect to a variable; `None` if nothing depends on it.
    pub fn get(&self, variable: &Tensor) -> Option<&Tensor> {
        self.0.get(&variable.id())
    }

    /// Puts a gradient in the place of what there is.
    pub fn insert(&mut self, variable: &Tensor, gradient: Tensor) {
        self.0.insert(variable.id(), gradient.detach());
    }

    /// Adds to the gradient with respect to a variable. Sums of `bf16` or `f16` are `f32`: what is small beside the sum so far
    /// would be lost.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn add(&mut self, variable: &Tensor, gradient: Tensor) -> Result<()> {
        let sum = match self.0.remove(&variable.id()) {
            None => gradient.detach(),
            Some(before) if before.dtype() == DType::F64 => (before + gradient.detach())?,
            Some(before) => (before.to_dtype(DType::F32)? + gradient.detach().to_dtype(DType::F32)?)?,
        };
        self.0.insert(variable.id(), sum);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use candle_core::Device;

    /// Numbers that nothing is special about.
    fn variable(seed: usize, rows: usize, columns: usize) -> Var {
        let number = |i: usize| ((i * 37 + seed * 101) as f64 * 0.618_034).sin();
        let numbers: Vec<f64> = (0..rows * columns).map(number).collect();
        Var::from_tensor(&Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap()).unwrap()
    }

    /// Input, a weight of two layers, a weight of one, and one that is multiplied with what comes out.
    fn variables() -> [Var; 4] {
        [variable(1, 3, 4), variable(2, 4, 4), variable(3, 4, 4), variable(4, 3, 4)]
    }

    fn layer(tape: Option<&Rc<Tape>>, x: &Tensor, weight: &Var) -> Tensor {
        let (x, weight) = (x.clone(), weight.as_tensor().clone());
        let run = move || x.matmul(&weight)?.tanh();
        tape.map_or_else(&run, |tape| tape.segment(run.clone())).unwrap()
    }

    /// Layers with a shared weight, a result that goes into two of them and past them, and one that nothing comes of.
    fn loss(tape: Option<&Rc<Tape>>, [x, shared, own, last]: &[Var; 4]) -> Tensor {
        let first = layer(tape, x, shared);
        let second = layer(tape, &first, own);
        layer(tape, &second, shared);
        let third = layer(tape, &(&second + &first).unwrap(), shared);
        ((third + first).unwrap() * last.as_tensor()).unwrap().sum_all().unwrap()
    }

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn scalar(tensor: &Tensor) -> f64 {
        tensor.to_scalar().unwrap()
    }

    fn gradients(recomputes: bool, variables: &[Var; 4]) -> Gradients {
        let (tape, mut gradients) = (Rc::new(Tape::new(recomputes)), Gradients::default());
        tape.backward(loss(Some(&tape), variables), &mut gradients, |_, _| Ok(())).unwrap();
        assert!(tape.segments.borrow().is_empty());
        gradients
    }

    #[test]
    fn gradients_are_those_of_one_graph_and_of_differences() {
        let variables = variables();
        let plain = loss(None, &variables).backward().unwrap();
        for recomputes in [false, true] {
            let gradients = gradients(recomputes, &variables);
            assert_eq!(gradients.0.len(), variables.len());
            for variable in &variables {
                let (found, expected) = (numbers(gradients.get(variable).unwrap()), plain.get(variable).unwrap());
                for (i, (found, expected)) in found.iter().zip(numbers(expected)).enumerate() {
                    assert!((found - expected).abs() <= 1e-14, "{found} for {expected}");
                    let moved = |by: f64| {
                        let before = variable.as_detached_tensor().copy().unwrap();
                        let mut values = numbers(&before);
                        values[i] += by;
                        variable.set(&Tensor::from_vec(values, before.shape(), &Device::Cpu).unwrap()).unwrap();
                        let loss = scalar(&loss(None, &variables));
                        variable.set(&before).unwrap();
                        loss
                    };
                    let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                    assert!((found - slope).abs() < 1e-8, "{found} for a slope of {slope}");
                }
            }
        }
    }

    #[test]
    fn each_variable_is_ready_once_with_its_whole_gradient() {
        let variables = variables();
        for recomputes in [false, true] {
            let (tape, mut gradients, mut told) = (Rc::new(Tape::new(recomputes)), Gradients::default(), Vec::new());
            let ready = |variable: &Tensor, gradient: &Tensor| {
                told.push((variable.id(), numbers(gradient)));
                Ok(())
            };
            tape.backward(loss(Some(&tape), &variables), &mut gradients, ready).unwrap();
            // The shared weight is waited for, however often it is used.
            let order = [3, 2, 0, 1].map(|i: usize| variables[i].id());
            assert_eq!(told.iter().map(|(id, _)| *id).collect::<HashSet<_>>(), order.into_iter().collect());
            assert_eq!((told.len(), told[0].0, told[1].0), (4, order[0], order[1]));
            for variable in &variables {
                let (_, gradient) = told.iter().find(|(id, _)| *id == variable.id()).unwrap();
                assert_eq!(*gradient, numbers(gradients.get(variable).unwrap()));
            }
        }
    }

    #[test]
    fn gradients_of_several_passes_add_up() {
        let variables = variables();
        let once = gradients(false, &variables);
        let mut twice = Gradients::default();
        for recomputes in [false, true] {
            let tape = Rc::new(Tape::new(recomputes));
            tape.backward(loss(Some(&tape), &variables), &mut twice, |_, _| Ok(())).unwrap();
        }
        for variable in &variables {
            let (once, twice) = (numbers(once.get(variable).unwrap()), numbers(twice.get(variable).unwrap()));
            // The parts of a gradient come in another order with another sum to begin with.
            assert!(once.iter().zip(&twice).all(|(once, twice)| (2.0 * once - twice).abs() < 1e-13));
        }
    }

    #[test]
    fn sums_of_half_types_are_wide() {
        let variable = Var::zeros(1, DType::BF16, &Device::Cpu).unwrap();
        let mut gradients = Gradients::default();
        let gradient = |x: f32| Tensor::new(&[x], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        [256.0, 0.5, 0.5].into_iter().for_each(|x| gradients.add(&variable, gradient(x)).unwrap());
        assert_eq!(gradients.get(&variable).unwrap().to_vec1::<f32>().unwrap(), [257.0]);
    }

    #[test]
    fn a_segment_inside_another_is_a_part_of_it() {
        let [x, weight, ..] = variables();
        let expected = layer(None, &layer(None, &x, &weight), &weight).sum_all().unwrap().backward().unwrap();
        for recomputes in [false, true] {
            let tape = Rc::new(Tape::new(recomputes));
            let (inner, x_inside, weight_inside) = (Rc::clone(&tape), x.clone(), weight.clone());
            let run = move || Ok(layer(Some(&inner), &layer(Some(&inner), &x_inside, &weight_inside), &weight_inside));
            let result = tape.segment(run).unwrap();
            assert_eq!(tape.segments.borrow().len(), 1);
            let mut gradients = Gradients::default();
            tape.backward(result.sum_all().unwrap(), &mut gradients, |_, _| Ok(())).unwrap();
            for variable in [&x, &weight] {
                let (found, expected) = (gradients.get(variable).unwrap(), expected.get(variable).unwrap());
                assert_eq!(numbers(found), numbers(expected));
            }
        }
    }

    #[test]
    fn what_has_no_variables_is_no_segment() {
        let (tape, x) = (Rc::new(Tape::new(true)), variable(1, 2, 2).as_detached_tensor());
        let result = tape.segment(move || x.tanh()).unwrap();
        assert!(tape.segments.borrow().is_empty() && !result.track_op());
    }

    #[test]
    fn an_error_leaves_the_tape_as_it_was() {
        let (tape, x) = (Rc::new(Tape::new(true)), variable(1, 2, 2));
        let broken = x.as_tensor().clone();
        assert!(tape.segment(move || broken.reshape(3)).is_err());
        let whole = x.as_tensor().clone();
        tape.segment(move || whole.tanh()).unwrap();
        assert_eq!(tape.segments.borrow().len(), 1);
    }

    #[test]
    fn a_segment_is_free_as_soon_as_its_gradients_are_there() {
        for recomputes in [false, true] {
            let tape = Rc::new(Tape::new(recomputes));
            let [x, weight, own, _] = variables();
            // Held by the first segment, and by the second.
            let held = [Rc::new(()), Rc::new(())];
            let mut y = x.as_tensor().clone();
            for (weight, held) in [&weight, &own].into_iter().zip(&held) {
                let (weight, held, before) = (weight.clone(), Rc::clone(held), y);
                y = tape
                    .segment(move || {
                        let _held = &held;
                        before.matmul(weight.as_tensor())?.tanh()
                    })
                    .unwrap();
            }
            let loss = y.sum_all().unwrap();
            drop(y);
            let mut counts = Vec::new();
            let ready = |_: &Tensor, _: &Tensor| {
                counts.push(held.each_ref().map(Rc::strong_count));
                Ok(())
            };
            tape.backward(loss, &mut Gradients::default(), ready).unwrap();
            let first = if recomputes { 2 } else { 1 };
            assert_eq!(counts, [[first, 1], [1, 1], [1, 1]]);
        }
    }
}
