//! The samples of all ranks, for losses that compare them.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::Communicator;
use crate::error::TrainError;

/// Joins rows of all ranks, of which each may have another number.
pub struct Gather {
    ranks: Arc<dyn Communicator>,
    /// Rows of each rank.
    rows: Vec<usize>,
}

impl Gather {
    /// Tells the other ranks that this one has `rows` rows.
    ///
    /// # Errors
    /// As [`Communicator::all_gather`].
    pub fn new(ranks: &Arc<dyn Communicator>, rows: usize) -> Result<Self, TrainError> {
        let failed = || TrainError::tensor("numbers of rows");
        let own = Tensor::new(&[rows as i64], &Device::Cpu).map_err(failed())?;
        let rows = ranks.all_gather(&own)?.to_vec1::<i64>().map_err(failed())?;
        Ok(Self { ranks: Arc::clone(ranks), rows: rows.into_iter().map(|rows| rows as usize).collect() })
    }

    /// Rows of all ranks.
    pub fn total(&self) -> usize {
        self.rows.iter().sum()
    }

    /// Where the rows of this rank stand among those of all.
    pub fn own(&self) -> Range<usize> {
        let rank = self.ranks.rank();
        let start = self.rows[..rank].iter().sum();
        start..start + self.rows[rank]
    }

    /// `[rows, ..]` of each rank, joined in the order of ranks: `[total, ..]`. The gradient of the result reaches this rank's
    /// rows; those of the others are constants (`AllGather` in the original's `models/xvlm.py`).
    ///
    /// # Errors
    /// As [`Communicator::all_gather`]; if the tensor has another number of rows than was told.
    pub fn join(&self, tensor: &Tensor) -> Result<Tensor, TrainError> {
        let failed = || TrainError::tensor("rows of all ranks");
        let (most, rank) = (self.rows.iter().copied().max().unwrap_or(0), self.ranks.rank());
        if tensor.dims().first() != Some(&self.rows[rank]) {
            let source = format!("expected {} rows, found shape {:?}", self.rows[rank], tensor.dims()).into();
            return Err(TrainError::Ranks { rank, operation: "all-gather", source });
        }
        // MPI has no messages without numbers.
        if self.rows.len() == 1 || most == 0 {
            return Ok(tensor.clone());
        }
        let padded = tensor.detach().pad_with_zeros(0, 0, most - self.rows[rank]).and_then(|rows| rows.contiguous());
        let all = self.ranks.all_gather(&padded.map_err(failed())?)?;
        let join = || {
            let of = |(other, &rows): (usize, &usize)| match other == rank {
                true => Ok(tensor.clone()),
                false => all.narrow(0, other * most, rows),
            };
            Tensor::cat(&self.rows.iter().enumerate().map(of).collect::<Result<Vec<_>, _>>()?, 0)
        };
        join().map_err(failed())
    }

    /// The same for one number a row, of the host.
    ///
    /// # Errors
    /// As [`Self::join`].
    pub fn join_numbers<T: candle_core::WithDType>(&self, numbers: &[T]) -> Result<Vec<T>, TrainError> {
        let failed = || TrainError::tensor("numbers of all ranks");
        let own = Tensor::from_slice(numbers, numbers.len(), &Device::Cpu).map_err(failed())?;
        self.join(&own)?.to_vec1().map_err(failed())
    }
}
