//! Access to the numbers of CPU tensors.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Deref;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use half::bf16;

use crate::graph::Fresh;

/// A read lock on the numbers of a contiguous CPU tensor; dereferences to the slice.
struct Host<G, T> {
    storage: G,
    start: usize,
    end: usize,
    of: PhantomData<T>,
}

/// Locks a contiguous CPU tensor of type `T` for reading.
pub(crate) fn read<T: WithDType>(tensor: &Tensor) -> Result<impl Deref<Target = [T]> + '_> {
    let (storage, layout) = tensor.storage_and_layout();
    if !matches!(&*storage, Storage::Cpu(values) if values.as_slice::<T>().is_ok()) {
        bail!("expected a tensor of {:?} on the CPU, found {:?} on {:?}", T::DTYPE, tensor.dtype(), tensor.device());
    }
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor of shape {:?}", layout.dims())
    };
    Ok(Host { storage, start, end, of: PhantomData })
}

impl<G: Deref<Target = Storage>, T: WithDType> Deref for Host<G, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(values) => &values.as_slice::<T>().expect("checked by `read`")[self.start..self.end],
            _ => unreachable!("checked by `read`"),
        }
    }
}

/// A type of numbers that are changed in place.
pub(crate) trait Changed: WithDType {
    /// Those of a storage, if it has this type.
    fn values(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! changed {
    ($($T:ty, $storage:ident;)*) => {$(
        impl Changed for $T {
            fn values(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$storage(values) => Some(values),
                    _ => None,
                }
            }
        }
    )*};
}

changed! {
    f32, F32;
    bf16, BF16;
    i16, I16;
}

/// Hands the numbers of a contiguous CPU tensor of type `T`, of which there are some, to `work`, which alone reads and writes
/// them meanwhile.
pub(crate) fn change<T: Changed, R>(tensor: &Tensor, work: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    struct Change<F, T, R> {
        work: Cell<Option<F>>,
        result: Cell<Option<R>>,
        of: PhantomData<fn(T)>,
    }
    impl<T: Changed, R, F: FnOnce(&mut [T]) -> R> InplaceOp1 for Change<F, T, R> {
        fn name(&self) -> &'static str {
            "change"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let found = storage.dtype();
            let (Some(values), Some((start, end))) = (T::values(storage), layout.contiguous_offsets()) else {
                bail!("expected a contiguous tensor of {:?} to change, found {found:?}, {layout:?}", T::DTYPE)
            };
            self.result.set(self.work.take().map(|work| work(&mut values[start..end])));
            Ok(())
        }
    }
    let change = Change { work: Cell::new(Some(work)), result: Cell::new(None), of: PhantomData };
    tensor.inplace_op1(&change)?;
    let on = tensor.device().location();
    change
        .result
        .take()
        .ok_or_else(|| candle_core::Error::Msg(format!("expected a tensor on the CPU, found one on {on:?}")))
}

/// In another float type; without numbers too, which candle does not convert on a GPU.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.elem_count() == 0 { Tensor::zeros(x.shape(), dtype, x.device()) } else { x.to_dtype(dtype) }
}

/// A result of `shape` that `fill` writes. What it is handed is not initialised: it writes every number and reads none
/// that it has not written.
pub(crate) fn written<T: WithDType>(shape: impl Into<Shape>, fill: impl FnOnce(&mut [T])) -> Fresh {
    let shape = shape.into();
    let len = shape.elem_count();
    let mut values: Vec<T> = Vec::with_capacity(len);
    let space = values.spare_capacity_mut();
    // SAFETY: the space is there, and is written before it is read, as `fill` promises. That a slice of plain numbers covers
    // memory without a value until then is what spares every result a pass of zeros.
    fill(unsafe { std::slice::from_raw_parts_mut(space.as_mut_ptr().cast::<T>(), len) });
    // SAFETY: the capacity was reserved, and `fill` has written it.
    unsafe { values.set_len(len) };
    Fresh::new(Storage::Cpu(T::to_cpu_storage_owned(values)), shape)
}

/// What tells the memory of a tensor from that of others.
pub(crate) fn memory(tensor: &Tensor) -> usize {
    std::ptr::from_ref(&*tensor.storage_and_layout().0).addr()
}

/// A pointer that several threads write through, each to places no other thread touches; or that all read through, to places
/// that nobody writes meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<T>(*mut T);

// SAFETY: whoever goes through the pointer promises that no thread writes what another one reads or writes meanwhile, as the
// safety section of `slice_mut` demands.
unsafe impl<T: Send> Send for Disjoint<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// Of memory that is not a slice, or not one of values yet.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn of(start: *mut T) -> Self {
        Self(start)
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn start(self) -> *mut T {
        self.0
    }

    /// # Safety
    /// `start..start + len` lies inside the slice this was made from, that slice outlives the result, and no other
    /// thread reads or writes the range meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice_mut(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
