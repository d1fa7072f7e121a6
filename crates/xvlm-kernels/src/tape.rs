//! A backward pass in pieces.
//!
//! candle keeps the whole graph of a forward pass until its backward pass is over, and hands out gradients when all are there.
//! A [`Tape`] cuts the graph into segments, a transformer block each: the backward pass goes from segment to segment, frees
//! each when it is done, says which parameters have their whole gradient by then, and can leave the inside of a segment out
//! of memory and compute it again when it is needed (activation recomputation, Chen et al. 2016).
//!
//! Inside a segment the operations of this crate are put on record, each with what its backward pass needs, and hand their
//! gradients to one another; candle has only the graphs of its own operations between them.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};

use candle_core::{DType, Result, Tensor, TensorId, Var};

use crate::gradients::{Gradients, Sums, Width};
use crate::graph::{Piece, Record, leaves, recording};

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
    boundary: TensorId,
    dtype: DType,
    inside: Inside,
    leaves: Vec<Tensor>,
}

enum Inside {
    /// What made the result, and what the result is called in it.
    Kept(Vec<Piece>, TensorId),
    /// What makes it once more.
    Recomputed(Box<dyn Fn() -> Result<Tensor>>),
}

impl Tape {
    /// A tape without segments. If it `recomputes`, it keeps of a segment only what goes in and what comes out.
    pub fn new(recomputes: bool) -> Self {
        Self { recomputes, ..Self::default() }
    }

    /// Runs a piece of a forward pass, and returns its result without the graph that led to it. `run` must compute the same
    /// bits each time it is called. A tensor that leaves it by another way than its result has no history, or an incomplete one:
    /// no gradient goes through the operations of this crate that led to it.
    ///
    /// # Errors
    /// What `run` says.
    pub fn segment(&self, run: impl Fn() -> Result<Tensor> + 'static) -> Result<Tensor> {
        if self.is_inside.get() {
            return run();
        }
        let (result, record) = self.compute(&run)?;
        if !record.has_made(&result) || record.leaves.is_empty() {
            // Computed from no variable, or one itself.
            return Ok(result);
        }
        // The result of an operation of ours is a variable as it is.
        let seen = Var::from_tensor(&result)?.as_tensor().clone();
        let inside = match self.recomputes {
            true => Inside::Recomputed(Box::new(run)),
            false => Inside::Kept(record.pieces, result.id()),
        };
        let segment = Segment { boundary: seen.id(), dtype: seen.dtype(), inside, leaves: record.leaves };
        self.segments.borrow_mut().push(segment);
        Ok(seen)
    }

    fn compute(&self, run: &dyn Fn() -> Result<Tensor>) -> Result<(Tensor, Record)> {
        /// Leaves the segment, after a panic too.
        struct Leave<'a>(&'a Cell<bool>);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.set(false);
            }
        }
        self.is_inside.set(true);
        let _leave = Leave(&self.is_inside);
        recording(run)
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
    /// If `loss` is no scalar, or a tensor operation fails, or what `ready` says. `gradients` is of no use then: sums of earlier
    /// passes may be gone.
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
            let is_used = uses.contains_key(&segment.boundary);
            let leaves = segment.leaves.iter().filter(|_| is_used);
            leaves.for_each(|leaf| *uses.entry(leaf.id()).or_default() += 1);
            is_used
        });
        let boundaries: HashSet<TensorId> = segments.iter().map(|segment| segment.boundary).collect();
        let mut take = |mut found: Sums, leaves: Vec<Tensor>, gradients: &mut Gradients| {
            leaves.into_iter().try_for_each(|leaf| {
                if let Some(sum) = found.0.remove(&leaf.id()) {
                    gradients.0.add(leaf.id(), sum, Width::F32)?;
                }
                let left = uses.entry(leaf.id()).or_insert(1);
                *left -= 1;
                match gradients.get(&leaf) {
                    Some(gradient) if *left == 0 && !boundaries.contains(&leaf.id()) => ready(&leaf, gradient),
                    _ => Ok(()),
                }
            })
        };
        // What is summed for a parameter is wide; what is on its way to another operation is not, unless several segments
        // have addends of it.
        let width = |leaves: &[Tensor]| -> HashMap<TensorId, Width> {
            let parameters = leaves.iter().filter(|leaf| !boundaries.contains(&leaf.id()));
            parameters.map(|leaf| (leaf.id(), Width::F32)).collect()
        };
        // What there is of a parameter is added to where it lies.
        let begin = |widths: &HashMap<TensorId, Width>, gradients: &mut Gradients| {
            Sums(widths.keys().filter_map(|id| gradients.0.0.remove_entry(id)).collect())
        };
        let widths = width(&after);
        let mut found = begin(&widths, gradients);
        found.walk(loss, None, &widths)?;
        take(found, after, gradients)?;
        for Segment { boundary, dtype, inside, leaves } in segments {
            let widths = width(&leaves);
            let mut found = begin(&widths, gradients);
            // If there is none, no gradient comes through what the result was used in.
            if let Some(sum) = gradients.0.0.remove(&boundary) {
                let (pieces, result) = match inside {
                    Inside::Kept(pieces, result) => (pieces, result),
                    Inside::Recomputed(run) => {
                        let (result, record) = self.compute(&run)?;
                        (record.pieces, result.id())
                    }
                };
                found.0.insert(result, sum.narrowed(dtype)?);
                found.go_back(pieces, &widths)?;
            }
            take(found, leaves, gradients)?;
        }
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
            assert_eq!(gradients.0.0.len(), variables.len());
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

    /// Two blocks with the same parameters, of operations of ours with some of candle's between them, and past both a way from
    /// the first to the loss.
    fn blocks(tape: Option<&Rc<Tape>>, [x, weight, bias, norm, scale]: &[Var; 5]) -> Result<Tensor> {
        let block = |x: &Tensor| {
            let (x, [weight, bias, norm, scale]) =
                (x.clone(), [weight, bias, norm, scale].map(|p| p.as_tensor().clone()));
            let run = move || {
                let normal = crate::layer_norm(&x, &norm, &bias, 1e-5)?;
                let both = crate::stacked_linear(&normal, &[&weight, &weight], &[&bias, &bias])?;
                let (rows, width) = x.dims2()?;
                // A tensor of candle's that two operations of ours take, and a third that candle made of it.
                let mixed =
                    both.reshape((rows, 2, width))?.permute((0, 2, 1))?.contiguous()?.narrow(2, 0, 1)?.squeeze(2)?;
                let fed = crate::gelu_linear(&mixed, &weight, &bias)?;
                let scaled = crate::gelu(&mixed.broadcast_mul(&scale)?)?;
                let sum = crate::add_branch(&crate::add_branch(&x, &fed, None)?, &scaled, Some(&vec![0.5; rows]))?;
                crate::add_branch(&sum, &crate::quick_gelu(&mixed)?, None)
            };
            tape.map_or_else(&run, |tape| tape.segment(run.clone()))
        };
        let first = block(x)?;
        let second = block(&first)?;
        (crate::gelu(&second)? + first)?.to_dtype(DType::F32)?.sum_all()
    }

    #[test]
    fn operations_of_ours_hand_on_what_candle_would() {
        for (dtype, allowed) in [(DType::F32, 2e-6), (DType::BF16, 3e-2)] {
            let variable = |seed: usize, rows: usize, columns: usize| {
                let numbers = variable(seed, rows, columns).as_detached_tensor().to_dtype(dtype).unwrap();
                let numbers = if rows == 1 { numbers.flatten_all().unwrap() } else { numbers };
                Var::from_tensor(&numbers).unwrap()
            };
            let variables =
                [variable(1, 6, 8), variable(2, 8, 8), variable(3, 1, 8), variable(4, 1, 8), variable(5, 1, 8)];
            let plain = blocks(None, &variables).unwrap().backward().unwrap();
            let of_tape = |recomputes| {
                let (tape, mut gradients) = (Rc::new(Tape::new(recomputes)), Gradients::default());
                let mut told = Vec::new();
                let ready = |variable: &Tensor, _: &Tensor| {
                    told.push(variable.id());
                    Ok(())
                };
                tape.backward(blocks(Some(&tape), &variables).unwrap(), &mut gradients, ready).unwrap();
                assert_eq!(told.len(), variables.len());
                assert_eq!(told.into_iter().collect::<HashSet<_>>(), variables.iter().map(|v| v.id()).collect());
                let wide = |variable: &Var| numbers(&gradients.get(variable).unwrap().to_dtype(DType::F64).unwrap());
                variables.each_ref().map(wide)
            };
            let (kept, computed_again) = (of_tape(false), of_tape(true));
            assert_eq!(kept, computed_again, "{dtype:?}");
            for (found, variable) in kept.iter().zip(&variables) {
                let wanted = numbers(&plain.get(variable).unwrap().to_dtype(DType::F64).unwrap());
                let size = wanted.iter().fold(0f64, |size, x| size.max(x.abs()));
                for (found, wanted) in found.iter().zip(&wanted) {
                    assert!((found - wanted).abs() <= allowed * size, "{dtype:?}: {found} for {wanted}");
                }
            }
        }
    }

    #[test]
    fn what_somebody_else_has_is_not_added_to() {
        let [variable, one] = [0f32, 1.0].map(|x| Var::new(&[x; 3], &Device::Cpu).unwrap());
        let (mut gradients, given) = (Gradients::default(), one.as_detached_tensor());
        for (i, wanted) in [1f32, 2.0, 3.0, 4.0].into_iter().enumerate() {
            gradients.add(&variable, given.clone()).unwrap();
            assert_eq!(gradients.get(&variable).unwrap().to_vec1::<f32>().unwrap(), [wanted; 3], "{i}");
            assert_eq!(given.to_vec1::<f32>().unwrap(), [1.0; 3]);
        }
        // Its own sum as an addend.
        let sum = gradients.get(&variable).unwrap().clone();
        gradients.add(&variable, sum).unwrap();
        assert_eq!(gradients.get(&variable).unwrap().to_vec1::<f32>().unwrap(), [8.0; 3]);
        assert!(gradients.add(&variable, Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap()).is_err());
    }

    #[test]
    fn a_gradient_of_several_variables_is_not_added_to() {
        for recomputes in [false, true] {
            let variables = [1, 2, 3].map(|seed| {
                let numbers = variable(seed, 3, 4).as_detached_tensor().to_dtype(DType::F32).unwrap();
                Var::from_tensor(&numbers).unwrap()
            });
            // The sum hands its own gradient to both; each then has another addend, before or after.
            let loss = |tape: Option<&Rc<Tape>>| {
                let [a, b, c] = variables.each_ref().map(|v| v.as_tensor().clone());
                let (x, y, z) = (a.clone(), b.clone(), c.clone());
                let run = move || crate::add_branch(&crate::gelu(&x)?, &crate::add_branch(&x, &y, None)?, None);
                let sum = tape.map_or_else(&run, |tape| tape.segment(run.clone())).unwrap();
                let more = move || crate::add_branch(&crate::quick_gelu(&b)?, &crate::add_branch(&b, &z, None)?, None);
                let more = tape.map_or_else(&more, |tape| tape.segment(more.clone())).unwrap();
                let all = crate::add_branch(&sum, &crate::add_branch(&more, &a, None).unwrap(), None).unwrap();
                (all * c).unwrap().sum_all().unwrap()
            };
            let plain = loss(None).backward().unwrap();
            let (tape, mut gradients) = (Rc::new(Tape::new(recomputes)), Gradients::default());
            tape.backward(loss(Some(&tape)), &mut gradients, |_, _| Ok(())).unwrap();
            for variable in &variables {
                let wide = |x: &Tensor| numbers(&x.to_dtype(DType::F64).unwrap());
                let (found, wanted) = (wide(gradients.get(variable).unwrap()), wide(plain.get(variable).unwrap()));
                assert!(found.iter().zip(&wanted).all(|(x, y)| (x - y).abs() < 1e-6), "{found:?} for {wanted:?}");
            }
        }
    }

    /// A table that is looked up and multiplied with, as word embeddings are.
    #[test]
    fn rows_of_a_table_are_added_to_its_gradient() {
        const SHAPE: (usize, usize) = (200, 6);
        for (dtype, allowed) in [(DType::F32, 1e-6), (DType::BF16, 2e-2)] {
            let as_variable = |tensor: &Tensor| Var::from_tensor(&tensor.to_dtype(dtype).unwrap()).unwrap();
            let table = as_variable(&variable(1, SHAPE.0, SHAPE.1));
            // Rows of several threads, some more than once.
            let ids: Vec<u32> = (0..40).map(|i| i * 37 % 91 * 2).chain([4, 4, 0]).collect();
            let ids = Tensor::new(ids, &Device::Cpu).unwrap();
            let bias = Tensor::zeros(SHAPE.0, dtype, &Device::Cpu).unwrap();
            let loss = |tape: Option<&Rc<Tape>>, is_tied: bool| {
                let x = crate::embedding(&table, &ids, Some(0)).unwrap();
                let (inside, words) = (x.clone(), table.as_tensor().clone());
                let run = move || crate::gelu(&inside);
                let y = tape.map_or_else(&run, |tape| tape.segment(run.clone())).unwrap();
                let y = if is_tied { crate::linear(&y, &words, &bias).unwrap() } else { y };
                y.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap()
            };
            let wide = |x: &Tensor| numbers(&x.to_dtype(DType::F64).unwrap());
            for is_tied in [false, true] {
                let plain = wide(loss(None, is_tied).backward().unwrap().get(&table).unwrap());
                let size = plain.iter().fold(0f64, |size, x| size.max(x.abs()));
                let (mut gradients, mut places) = (Gradients::default(), HashSet::new());
                for pass in 1..=3 {
                    let tape = Rc::new(Tape::default());
                    tape.backward(loss(Some(&tape), is_tied), &mut gradients, |_, _| Ok(())).unwrap();
                    let found = gradients.get(&table).unwrap();
                    let times = f64::from(pass);
                    for (found, wanted) in wide(found).iter().zip(&plain) {
                        let wanted = times * wanted;
                        assert!((found - wanted).abs() <= times * allowed * size, "{dtype:?}: {found} for {wanted}");
                    }
                    if pass > 1 {
                        assert_eq!(found.dtype(), DType::F32);
                        places.insert(crate::host::memory(found));
                    }
                }
                assert_eq!(places.len(), 1, "a sum lies where it lay");
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
    fn a_panic_leaves_the_tape_as_it_was() {
        for recomputes in [false, true] {
            let (tape, x) = (Rc::new(Tape::new(recomputes)), variable(1, 2, 2));
            let run = || tape.segment(|| panic!("inside a segment"));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
            // Nothing is on record outside.
            let one = Var::new(&[1f32], &Device::Cpu).unwrap();
            assert!(crate::gelu(&one).unwrap().sum_all().unwrap().backward().unwrap().get(&one).is_some());
            let whole = x.as_tensor().clone();
            tape.segment(move || whole.tanh()).unwrap();
            assert_eq!(tape.segments.borrow().len(), 1);
        }
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
