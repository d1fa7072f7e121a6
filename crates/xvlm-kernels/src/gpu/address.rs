//! The addresses of tensors, for kernels that find them in a table instead of among their arguments.
//!
//! Who launches such a kernel keeps the tensors until it has run.

use std::cell::Cell;

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, Storage, Tensor, Var, bail};

use super::offset;

/// Where a contiguous tensor starts, for a kernel that reads it.
pub(crate) fn address_of(tensor: &Tensor) -> Result<u64> {
    let offset = offset(tensor)?;
    match &*tensor.storage_and_layout().0 {
        #[cfg(feature = "cuda")]
        storage @ Storage::Cuda(_) => super::cuda::listed(storage, offset),
        #[cfg(feature = "emulation")]
        storage @ Storage::Cpu(_) => super::emulation::address(storage, offset),
        _ => bail!("no kernels for {:?}", tensor.device().location()),
    }
}

/// Where a contiguous variable in `f32` starts, for a kernel that changes it.
pub(crate) fn address_of_variable(variable: &Var) -> Result<u64> {
    offset(variable)?;
    let find = Find(Cell::new(0));
    // By an operation in place, because only those are handed memory that may be written.
    variable.inplace_op1(&find)?;
    Ok(find.0.get())
}

struct Find(Cell<u64>);

impl InplaceOp1 for Find {
    fn name(&self) -> &'static str {
        "address of a variable"
    }

    #[cfg_attr(not(feature = "emulation"), allow(unused_variables))]
    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        #[cfg(feature = "emulation")]
        if let CpuStorage::F32(values) = storage {
            self.0.set(values[layout.start_offset()..].as_mut_ptr() as u64);
            return Ok(());
        }
        bail!("kernels change variables of f32 on a GPU only")
    }

    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        #[cfg(feature = "cuda")]
        {
            self.0.set(super::cuda::listed_mut(storage, layout.start_offset())?);
            Ok(())
        }
        #[cfg(not(feature = "cuda"))]
        bail!("no kernels for GPUs")
    }
}
