//! Weights that are multiplied where they lie until they are used often.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{DType, Result};
use half::bf16;

use super::rounded::{Quantised, Rounded};
use super::{PackedWeights, Weights};
use crate::numbers::{Lines, Readable, StoredTensor};
use crate::simd::native::{Multiplier, Native, Panels};

/// Checks that no file of these was written to.
pub(super) fn check_unchanged(stored: &[StoredTensor]) -> Result<()> {
    stored.iter().try_for_each(StoredTensor::check_unchanged)
}

/// What [`Stored::is_read`] has checked.
pub(super) const READABLE: &str = "numbers that are read from files";

/// How many products are computed from where weights are stored: grounding one phrase takes two of the fusion layers.
pub(super) const DIRECT: usize = 2;

/// Weights that stay where they are stored until they are used often.
pub(super) struct Stored {
    /// Until they are packed.
    weights: Mutex<Option<Arc<[StoredTensor]>>>,
    /// What is computed in.
    dtype: DType,
    pub(super) kept_in: PackedWeights,
    uses: AtomicUsize,
    pub(super) packed: OnceLock<Weights>,
}

/// What a product is computed from.
pub(super) enum Turn<'a> {
    First(Arc<[StoredTensor]>),
    Later(&'a Weights),
}

impl Stored {
    pub(super) fn new(weights: Vec<StoredTensor>, dtype: DType, kept_in: PackedWeights) -> Self {
        let weights = Mutex::new(Some(weights.into()));
        Self { weights, dtype, kept_in, uses: AtomicUsize::new(0), packed: OnceLock::new() }
    }

    /// Whether such numbers are read from where they lie as they are multiplied.
    pub(super) fn is_read(stored: &[StoredTensor], dtype: DType, kept_in: PackedWeights) -> bool {
        let is_multiplied = match (dtype, kept_in) {
            (DType::F32, PackedWeights::AsGiven) => Multiplier::<f32>::find().is_some(),
            (DType::F32, PackedWeights::Int8) => Multiplier::<i8>::find().is_some(),
            (DType::BF16, _) => Multiplier::<bf16>::find().is_some(),
            _ => false,
        };
        is_multiplied && stored.iter().all(|tensor| tensor.can_stay(dtype))
    }

    /// For the first uses what is stored; then panels are made. Whoever comes meanwhile does not wait for them. If that fails, it
    /// is tried again for the next use.
    pub(super) fn turn(&self) -> Result<Turn<'_>> {
        /// Unless it is forgotten, after a panic too.
        struct Again<'a>(&'a AtomicUsize);
        impl Drop for Again<'_> {
            fn drop(&mut self) {
                self.0.store(DIRECT, Ordering::Relaxed);
            }
        }
        let stored = match self.without_use() {
            Turn::First(stored) => stored,
            later => return Ok(later),
        };
        if self.uses.fetch_add(1, Ordering::Relaxed) != DIRECT {
            return Ok(Turn::First(stored));
        }
        let again = Again(&self.uses);
        let packed = self.pack(&stored);
        check_unchanged(&stored)?;
        std::mem::forget(again);
        let packed = self.packed.get_or_init(|| packed);
        *self.weights.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(Turn::Later(packed))
    }

    pub(super) fn without_use(&self) -> Turn<'_> {
        if let Some(packed) = self.packed.get() {
            return Turn::Later(packed);
        }
        let stored = self.weights.lock().unwrap_or_else(PoisonError::into_inner).clone();
        stored.map_or_else(|| Turn::Later(self.packed.get().expect("made before the rest is dropped")), Turn::First)
    }

    fn pack(&self, stored: &[StoredTensor]) -> Weights {
        fn panels<T: Readable + Native>(stored: &[StoredTensor]) -> Panels<T> {
            let lines = Lines::of_stored(stored).expect(READABLE);
            Multiplier::find().expect(READABLE).pack_lines(&lines, lines.size())
        }
        match (self.dtype, self.kept_in) {
            (DType::BF16, _) => Weights::Bf16(panels(stored)),
            (_, PackedWeights::AsGiven) => Weights::F32(panels(stored)),
            (_, PackedWeights::Int8) => {
                let rounded = Rounded::of(&Lines::of_stored(stored).expect(READABLE), Vec::new());
                Weights::Int8(Quantised::new(&Multiplier::find().expect(READABLE), rounded))
            }
        }
    }
}
