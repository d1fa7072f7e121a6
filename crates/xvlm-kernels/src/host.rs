//! Access to the numbers of CPU tensors.

use std::ops::Deref;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

/// Whether all tensors live on the CPU in `f32`, so that the fused path applies.
pub(crate) fn is_host_f32(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// The numbers of a contiguous storage.
pub(crate) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("expected f32 storage") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("expected a contiguous tensor of shape {:?}", layout.dims()),
    }
}

/// The numbers of a contiguous storage, to be changed in place.
pub(crate) fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("expected f32 storage") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut values[start..end]),
        None => bail!("expected a contiguous tensor of shape {:?}", layout.dims()),
    }
}

/// A read lock on the numbers of a contiguous CPU `f32` tensor; dereferences to the slice.
struct Host<G> {
    storage: G,
    start: usize,
    end: usize,
}

/// Locks a contiguous CPU `f32` tensor for reading.
pub(crate) fn read(tensor: &Tensor) -> Result<impl Deref<Target = [f32]> + '_> {
    let (storage, layout) = tensor.storage_and_layout();
    if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
        bail!("expected an f32 tensor on the CPU");
    }
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor of shape {:?}", layout.dims())
    };
    Ok(Host { storage, start, end })
}

impl<G: Deref<Target = Storage>> Deref for Host<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.end],
            _ => unreachable!("checked by `read`"),
        }
    }
}

/// A pointer that several threads write through, each to places no other thread touches.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint(*mut f32);

// SAFETY: every user writes to disjoint ranges, as the safety section of `slice_mut` demands.
unsafe impl Send for Disjoint {}
// SAFETY: as above.
unsafe impl Sync for Disjoint {}

impl Disjoint {
    pub(crate) fn new(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// # Safety
    /// `start..start + len` lies inside the slice this was made from, that slice outlives the result, and no other
    /// thread reads or writes the range meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice_mut(&self, start: usize, len: usize) -> &mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
