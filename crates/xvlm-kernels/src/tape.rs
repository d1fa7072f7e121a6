//! A backward pass in pieces.
//!
//! candle keeps the whole graph of a forward pass until its backward pass is over, and hands out gradients when all are there.
//! A [`Tape`] cuts the graph into segments, a transformer block each: the backward pass goes from segment to segment, frees
//! each when it is done, says which parameters have their whole gradient by then, and can leave the inside of a segment out
//! of memory and compute it again when it is needed (activation recomputation, Chen et al. 2016).

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, TensorId, Var};

use crate::graph::{Fresh, differentiable};

/// The segments of one forward pass.
#[derive(Default)]
pub struct Tape {
    recomputes: bool,
    segments: RefCell<Vec<Segment>>,
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
        let result = run()?;
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

    /// Adds to `gradients` that of `loss`, a scalar, with respect to every variable it was computed from, whether through
    /// segments of this tape or past them. `ready` is told each of these variables, with its gradient, when nothing will be
    /// added any more. The tape is empty afterwards.
    ///
    /// # Errors
    /// If `loss` is no scalar, or a tensor operation fails, or what `ready` says.
    pub fn backward(
        &self,
        loss: &Tensor,
        gradients: &mut Gradients,
        mut ready: impl FnMut(&Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let mut segments = self.segments.take();
        let after = leaves(loss);
        let mut uses = HashMap::<TensorId, usize>::new();
        for leaf in segments.iter().flat_map(|segment| &segment.leaves).chain(&after) {
            *uses.entry(leaf.id()).or_default() += 1;
        }
        let mut take = |mut found: GradStore, leaves: Vec<Tensor>, gradients: &mut Gradients| {
            leaves.into_iter().try_for_each(|leaf| {
                if let Some(gradient) = found.remove(&leaf) {
                    gradients.add(&leaf, gradient)?;
                }
                let left = uses.entry(leaf.id()).or_insert(1);
                *left -= 1;
                match gradients.get(&leaf) {
                    Some(gradient) if *left == 0 => ready(&leaf, gradient),
                    _ => Ok(()),
                }
            })
        };
        take(loss.backward()?, after, gradients)?;
        while let Some(Segment { boundary, inside, leaves }) = segments.pop() {
            // What nothing was made of has no gradient.
            let Some(gradient) = gradients.0.remove(&boundary.as_tensor().id()) else { continue };
            let result = match inside {
                Inside::Kept(result) => result,
                Inside::Recomputed(run) => run()?,
            };
            drop(boundary);
            let found = seeded(&result, gradient)?.backward()?;
            drop(result);
            take(found, leaves, gradients)?;
        }
        Ok(())
    }
}

/// The variables that a graph begins with.
fn leaves(result: &Tensor) -> Vec<Tensor> {
    result.sorted_nodes().into_iter().filter(|node| node.is_variable()).cloned().collect()
}

/// A scalar whose gradient with respect to `result` is the one given.
fn seeded(result: &Tensor, gradient: Tensor) -> Result<Tensor> {
    let gradient = gradient.to_dtype(result.dtype())?;
    let nothing = Fresh::zero(result)?;
    differentiable("seeded", [result], nothing, move |_, _, _| Ok([Some(gradient.clone())]))
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
