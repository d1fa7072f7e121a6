//! Sums of gradients, and the way of gradients through what was put on record.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Result, Tensor, TensorId};

use crate::embedding::Rows;
use crate::graph::{Addend, Fresh, Operation, Piece, are_own, collecting, differentiable_by_gradient, leaves};
use crate::sum::{add_in_place, sum};

/// A scalar whose gradient with respect to `result` is the one given; for one backward pass.
fn seeded(result: &Tensor, gradient: Tensor) -> Result<Tensor> {
    // Not kept beside the one that goes through the graph.
    let gradient = Mutex::new(Some(gradient.to_dtype(result.dtype())?));
    let nothing = Fresh::zero(result)?;
    differentiable_by_gradient("seeded", [result], nothing, move |_| {
        Ok([gradient.lock().unwrap_or_else(PoisonError::into_inner).take()])
    })
}

/// What sums of half types are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Width {
    /// Of the type of their addends.
    #[default]
    Own,
    F32,
}

/// The addends so far of a gradient.
#[derive(Debug)]
pub(crate) struct Sum {
    total: Tensor,
    /// Whether nobody else has the memory of the total.
    is_own: bool,
}

impl Sum {
    /// A first addend.
    fn of(gradient: Tensor) -> Self {
        Self { total: gradient.detach(), is_own: false }
    }

    /// A first addend, in memory that nobody else has.
    fn own(gradient: Tensor) -> Self {
        Self { is_own: true, ..Self::of(gradient) }
    }

    fn plus(self, other: Self, width: Width) -> Result<Self> {
        let dtype = match width {
            Width::F32 if self.total.dtype() != DType::F64 => DType::F32,
            _ => self.total.dtype(),
        };
        let can_grow = |sum: &Self| sum.is_own && sum.total.dtype() == dtype;
        if can_grow(&self) && add_in_place(&self.total, &other.total)? {
            return Ok(self);
        }
        if can_grow(&other) && add_in_place(&other.total, &self.total)? {
            return Ok(other);
        }
        Ok(Self { total: sum(&self.total, &other.total, dtype)?, is_own: true })
    }

    /// With the gradient of a table on the CPU: a sum in `f32`.
    fn plus_rows(self, rows: &Rows) -> Result<Self> {
        let sum = match (self.total.dtype(), self.is_own && self.total.is_contiguous()) {
            (DType::F32, true) => self,
            (DType::F32, false) => Self::own(self.total.force_contiguous()?),
            _ => Self::own(self.total.to_dtype(DType::F32)?.contiguous()?),
        };
        rows.add_to(&sum.total)?;
        Ok(sum)
    }

    pub(crate) fn narrowed(self, dtype: DType) -> Result<Self> {
        if self.total.dtype() == dtype { Ok(self) } else { Ok(Self::of(self.total.to_dtype(dtype)?)) }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Sums(pub(crate) HashMap<TensorId, Sum>);

impl Sums {
    pub(crate) fn add(&mut self, id: TensorId, sum: Sum, width: Width) -> Result<()> {
        let sum = match self.0.remove(&id) {
            Some(before) => before.plus(sum, width)?,
            None => sum,
        };
        self.0.insert(id, sum);
        Ok(())
    }

    /// From the last piece to the first, each of which is free when it is done.
    pub(crate) fn go_back(&mut self, mut pieces: Vec<Piece>, widths: &HashMap<TensorId, Width>) -> Result<()> {
        while let Some(piece) = pieces.pop() {
            match piece {
                Piece::Operation(Operation { result, inputs, backward }) => {
                    let Some(Sum { total, .. }) = self.0.remove(&result) else { continue };
                    let total = total.contiguous()?;
                    let found = backward(&total)?;
                    let own = are_own(&found, &total);
                    for (input, (gradient, is_own)) in inputs.into_iter().zip(found.into_iter().zip(own)) {
                        if let (Some(input), Some(gradient)) = (input, gradient) {
                            let sum = if is_own { Sum::own(gradient) } else { Sum::of(gradient) };
                            self.add(input, sum, widths.get(&input).copied().unwrap_or_default())?;
                        }
                    }
                }
                Piece::Graph(result) => {
                    if let Some(Sum { total, .. }) = self.0.remove(&result.id()) {
                        self.walk(result, Some(total), widths)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Through a graph of candle's, with the gradient of its result, 1 if none is given.
    pub(crate) fn walk(
        &mut self,
        result: Tensor,
        gradient: Option<Tensor>,
        widths: &HashMap<TensorId, Width>,
    ) -> Result<()> {
        let leaves = leaves(&result);
        let end = match gradient {
            Some(gradient) => seeded(&result, gradient)?,
            None => result,
        };
        let (mut found, collected) = collecting(|| end.backward())?;
        drop(end);
        let of_leaves = leaves.iter().filter_map(|leaf| Some((leaf.clone(), Addend::Whole(found.remove(leaf)?))));
        for (leaf, addend) in collected.into_iter().chain(of_leaves) {
            let id = leaf.id();
            let sum = match addend {
                Addend::Whole(gradient) => Sum::of(gradient),
                Addend::Own(gradient) => Sum::own(gradient),
                Addend::Rows(rows) => match self.0.remove(&id) {
                    Some(sum) => {
                        self.0.insert(id, sum.plus_rows(&rows)?);
                        continue;
                    }
                    None => Sum::own(rows.whole()?),
                },
            };
            self.add(id, sum, widths.get(&id).copied().unwrap_or_default())?;
        }
        Ok(())
    }
}

/// Gradients by variable.
#[derive(Debug, Default)]
pub struct Gradients(pub(crate) Sums);

impl Gradients {
    /// The gradient with respect to a variable; `None` if nothing depends on it.
    pub fn get(&self, variable: &Tensor) -> Option<&Tensor> {
        self.0.0.get(&variable.id()).map(|sum| &sum.total)
    }

    /// Puts a gradient in the place of what there is.
    pub fn insert(&mut self, variable: &Tensor, gradient: Tensor) {
        self.0.0.insert(variable.id(), Sum::of(gradient));
    }

    /// Adds to the gradient with respect to a variable, in place where there is a sum already: who has got it sees it change.
    /// Sums of `bf16` or `f16` are `f32`: what is small beside the sum so far would be lost.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn add(&mut self, variable: &Tensor, gradient: Tensor) -> Result<()> {
        self.0.add(variable.id(), Sum::of(gradient), Width::F32)
    }
}
