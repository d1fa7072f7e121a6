//! The kernels on the CPU, by the shim of `cuda/host`.

use std::cell::Cell;
use std::ffi::{CString, c_char, c_int, c_void};

use candle_core::{CpuStorage, DType, Result, Storage, bail};
use half::{bf16, f16};

use super::{Arg, Grid, offset};

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` with every operation over CPU tensors in `f32`, `bf16` and `f16` computed by the CUDA kernels, emulated one
/// thread after the other. It is slow: it exists for tests.
pub fn emulated<R>(work: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            ON.set(self.0);
        }
    }
    let _restore = Restore(ON.replace(true));
    work()
}

pub(super) fn is_on() -> bool {
    ON.get()
}

/// Memory full of NaN (or of huge integers), so that what a kernel fails to write shows.
pub(super) fn allocate(dtype: DType, len: usize) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F64 => CpuStorage::F64(vec![f64::NAN; len]),
        DType::F32 => CpuStorage::F32(vec![f32::NAN; len]),
        DType::BF16 => CpuStorage::BF16(vec![bf16::NAN; len]),
        DType::F16 => CpuStorage::F16(vec![f16::NAN; len]),
        DType::U32 => CpuStorage::U32(vec![u32::MAX; len]),
        _ => bail!("kernels write no {dtype:?}"),
    })
}

pub(super) fn address(storage: &Storage, offset: usize) -> Result<u64> {
    let Storage::Cpu(storage) = storage else { bail!("an emulated kernel needs tensors on the CPU") };
    Ok(match storage {
        CpuStorage::F64(values) => values[offset..].as_ptr() as u64,
        CpuStorage::F32(values) => values[offset..].as_ptr() as u64,
        CpuStorage::BF16(values) => values[offset..].as_ptr() as u64,
        CpuStorage::F16(values) => values[offset..].as_ptr() as u64,
        CpuStorage::U32(values) => values[offset..].as_ptr() as u64,
        CpuStorage::I64(values) => values[offset..].as_ptr() as u64,
        _ => bail!("kernels read no such type"),
    })
}

/// The address of memory that is written.
fn address_mut(storage: &mut Storage) -> Result<u64> {
    let Storage::Cpu(storage) = storage else { bail!("an emulated kernel needs tensors on the CPU") };
    Ok(match storage {
        CpuStorage::F64(values) => values.as_mut_ptr() as u64,
        CpuStorage::F32(values) => values.as_mut_ptr() as u64,
        CpuStorage::BF16(values) => values.as_mut_ptr() as u64,
        CpuStorage::F16(values) => values.as_mut_ptr() as u64,
        CpuStorage::U32(values) => values.as_mut_ptr() as u64,
        _ => bail!("kernels write no such type"),
    })
}

unsafe extern "C" {
    /// Runs a kernel; not 0 if there is none of this name or it takes another number of arguments.
    fn xvlm_emulate(
        name: *const c_char,
        blocks: *const u32,
        threads: u32,
        shared: usize,
        arguments: *const *const c_void,
        count: usize,
    ) -> c_int;
}

pub(super) fn launch(file: &str, name: &str, grid: Grid, arguments: &mut [Arg]) -> Result<()> {
    // Each value in a slot of eight bytes: the shim reads as many of them as the parameter has.
    let mut values = Vec::with_capacity(arguments.len());
    let guards: Vec<_> =
        arguments.iter().map(|a| if let Arg::In(t) = a { Some(t.storage_and_layout().0) } else { None }).collect();
    for (argument, guard) in arguments.iter_mut().zip(&guards) {
        values.push(match (argument, guard) {
            (Arg::In(tensor), Some(storage)) => address(storage, offset(tensor)?)?,
            (Arg::Made(buffer), _) => address(&buffer.storage, 0)?,
            (Arg::Out(buffer), _) => address_mut(&mut buffer.storage)?,
            (Arg::U32(value), _) => u64::from(*value),
            (Arg::F32(value), _) => u64::from(value.to_bits()),
            (Arg::Absent | Arg::In(_), _) => 0,
        });
    }
    let pointers: Vec<*const c_void> = values.iter().map(|value| std::ptr::from_ref(value).cast()).collect();
    let blocks = grid.blocks.map(|n| n as u32);
    let Ok(c_name) = CString::new(name) else { bail!("{name}: no name of a kernel") };
    // SAFETY: the addresses belong to tensors and buffers locked or borrowed above; the kernels stay inside them, as they
    // must on a GPU; calls are serialised by the shim.
    let status = unsafe {
        xvlm_emulate(c_name.as_ptr(), blocks.as_ptr(), grid.threads, grid.shared, pointers.as_ptr(), pointers.len())
    };
    match status {
        0 => Ok(()),
        1 => bail!("cuda/{file}.cu has no kernel {name}"),
        _ => bail!("cuda/{file}.cu: {name} takes another number of arguments than {}", pointers.len()),
    }
}
